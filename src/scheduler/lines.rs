//! The lines of one segment that are still to be run: which are ready, which wait for another try. Pure.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    ops::Range,
    sync::Arc,
};

use bytes::Bytes;
use smallvec::SmallVec;
use tokio::time::Instant;

use crate::{
    domain::{LineSet, request_line},
    fleet::WorkerKey,
};

/// A line, as found in the segment's bytes.
#[derive(Clone, Debug)]
struct Line {
    /// Its place in the segment: a bit of a [`LineSet`].
    index: u32,
    model: u8,
    custom_id: Range<u32>,
    body: Range<u32>,
    tries: u32,
    failed_on: SmallVec<[WorkerKey; 2]>,
    open: bool,
}

/// Which line: its place in the work list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LineKey(u32);

/// A segment whose bytes are not the requests that were uploaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the segment can't be read: {message}")]
pub struct Unreadable {
    /// Its place in the segment, from 0.
    pub line: u32,
    /// Why.
    pub message: String,
}

/// The lines of a segment.
#[derive(Debug)]
pub struct WorkList {
    bytes: Bytes,
    models: Vec<Arc<str>>,
    lines: Vec<Line>,
    ready: Vec<VecDeque<LineKey>>,
    later: BinaryHeap<Reverse<(Instant, LineKey)>>,
    open: usize,
}

impl WorkList {
    /// Finds the requests in a segment's bytes, but for those that are done.
    ///
    /// # Errors
    /// [`Unreadable`] if the bytes are not what was validated at upload.
    pub fn read(bytes: Bytes, models: &[String], done: &LineSet) -> Result<Self, Unreadable> {
        let mut lines = Vec::new();
        let mut ready = vec![VecDeque::new(); models.len()];
        for (index, text) in request_line::lines(&bytes) {
            if done.contains(index) {
                continue;
            }
            let unreadable = |message: String| Unreadable { line: index, message };
            let request = request_line::parse(text).map_err(|error| unreadable(error.to_string()))?;
            let model = models
                .iter()
                .position(|model| *model == request.model)
                .ok_or_else(|| unreadable(format!("the model {:?} is not one of the file's", request.model)))?;
            let key = LineKey(u32::try_from(lines.len()).unwrap_or(u32::MAX));
            lines.push(Line {
                index,
                model: u8::try_from(model).unwrap_or(u8::MAX),
                custom_id: within(&bytes, request.custom_id_json.as_bytes()),
                body: within(&bytes, request.body.as_bytes()),
                tries: 0,
                failed_on: SmallVec::new(),
                open: true,
            });
            ready[model].push_back(key);
        }
        let models = models.iter().map(|model| Arc::from(model.as_str())).collect();
        Ok(Self { bytes, models, open: lines.len(), lines, ready, later: BinaryHeap::new() })
    }

    /// The models, as in the file.
    #[must_use]
    pub fn models(&self) -> &[Arc<str>] {
        &self.models
    }

    /// Lines without a result: ready, waiting or in flight.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open
    }

    /// The models whose lines have no result yet, as a mask.
    #[must_use]
    pub fn open_models(&self) -> i64 {
        self.lines.iter().filter(|line| line.open).fold(0, |mask, line| mask | 1 << line.model)
    }

    /// How many lines of a model are ready to be sent.
    #[must_use]
    pub fn ready(&self, model: usize) -> usize {
        self.ready[model].len()
    }

    /// Whether lines wait for another try.
    #[must_use]
    pub fn has_later(&self) -> bool {
        !self.later.is_empty()
    }

    /// When the next line that waits becomes ready.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        self.later.peek().map(|Reverse((at, _))| *at)
    }

    /// Makes the lines ready whose wait is over. They go first: others have not been tried at all.
    pub fn wake(&mut self, now: Instant) {
        while self.next_due().is_some_and(|at| at <= now) {
            if let Some(Reverse((_, key))) = self.later.pop() {
                let model = usize::from(self.line(key).model);
                self.ready[model].push_front(key);
            }
        }
    }

    /// The next ready line of a model.
    #[must_use]
    pub fn peek(&self, model: usize) -> Option<LineKey> {
        self.ready[model].front().copied()
    }

    /// Takes the next ready line of a model.
    pub fn take(&mut self, model: usize) -> Option<LineKey> {
        self.ready[model].pop_front()
    }

    /// Counts a failed try. Returns how many the line has had.
    pub fn failed(&mut self, key: LineKey, on: WorkerKey) -> u32 {
        let line = self.line_mut(key);
        line.tries += 1;
        line.failed_on.push(on);
        line.tries
    }

    /// Lets a line wait.
    pub fn later(&mut self, key: LineKey, at: Instant) {
        self.later.push(Reverse((at, key)));
    }

    /// The line has its result.
    pub fn done(&mut self, key: LineKey) {
        let line = self.line_mut(key);
        if std::mem::replace(&mut line.open, false) {
            self.open -= 1;
        }
    }

    /// The lines without a result.
    pub fn unfinished(&self) -> Vec<LineKey> {
        (0u32..).zip(&self.lines).filter(|(_, line)| line.open).map(|(at, _)| LineKey(at)).collect()
    }

    /// The line's place in the segment.
    #[must_use]
    pub fn index(&self, key: LineKey) -> u32 {
        self.line(key).index
    }

    /// The line's `custom_id`, as the JSON string that the client wrote.
    #[must_use]
    pub fn custom_id(&self, key: LineKey) -> &[u8] {
        let range = &self.line(key).custom_id;
        &self.bytes[range.start as usize..range.end as usize]
    }

    /// The line's `body`, as the client wrote it; shares the segment's memory.
    #[must_use]
    pub fn body(&self, key: LineKey) -> Bytes {
        let range = &self.line(key).body;
        self.bytes.slice(range.start as usize..range.end as usize)
    }

    /// Workers on which the line has failed.
    #[must_use]
    pub fn failed_on(&self, key: LineKey) -> &[WorkerKey] {
        &self.line(key).failed_on
    }

    fn line(&self, key: LineKey) -> &Line {
        &self.lines[key.0 as usize]
    }

    fn line_mut(&mut self, key: LineKey) -> &mut Line {
        &mut self.lines[key.0 as usize]
    }
}

/// Where `part`, a slice of `whole`, lies in it.
fn within(whole: &[u8], part: &[u8]) -> Range<u32> {
    let start = part.as_ptr() as usize - whole.as_ptr() as usize;
    let at = |place: usize| u32::try_from(place).unwrap_or(u32::MAX);
    at(start)..at(start + part.len())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn line(id: &str, model: &str) -> String {
        format!(
            r#"{{"custom_id":"{id}","method":"POST","url":"/v1/completions","body":{{"model":"{model}","prompt":"{id}"}}}}"#
        )
    }

    fn list(text: &str, done: &[u32]) -> WorkList {
        WorkList::read(text.to_owned().into(), &["a".into(), "b".into()], &done.iter().copied().collect()).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn lines_are_found_and_come_in_order() {
        let text = format!("{}\r\n\n  \n{}\n{}\n{}", line("x", "a"), line("y", "b"), line("done", "a"), line("z", "a"));
        let mut list = list(&text, &[4]);
        assert_eq!(list.open(), 3);
        assert_eq!(list.open_models(), 0b11);
        let x = list.take(0).unwrap();
        assert_eq!((list.index(x), list.custom_id(x)), (0, &b"\"x\""[..]));
        assert_eq!(list.body(x), r#"{"model":"a","prompt":"x"}"#);
        let y = list.take(1).unwrap();
        assert_eq!((list.index(y), list.take(1)), (3, None));
        list.done(y);
        list.done(y);
        assert_eq!((list.open(), list.open_models()), (2, 0b01));

        let now = Instant::now();
        assert_eq!(list.failed(x, WorkerKey(7)), 1);
        list.later(x, now + Duration::from_secs(1));
        list.wake(now);
        assert_eq!(list.ready(0), 1, "z, x still waits");
        assert!(list.has_later());
        list.wake(now + Duration::from_secs(1));
        assert_eq!(list.take(0), Some(x), "what has waited goes first");
        assert_eq!(list.failed_on(x), [WorkerKey(7)]);
        assert_eq!(list.unfinished().len(), 2);
    }

    #[test]
    fn bytes_that_were_not_uploaded_are_noticed() {
        let read = |text: &str| WorkList::read(text.to_owned().into(), &["a".into()], &LineSet::default());
        assert_eq!(read(&format!("{}\n{{\n", line("x", "a"))).unwrap_err().line, 1);
        assert!(read(&line("x", "other")).is_err());
        assert_eq!(read("").unwrap().open(), 0);
    }
}
