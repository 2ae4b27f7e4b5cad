//! The lines of one segment that are still to run: which are ready, which wait for another try. Pure.

use std::{cmp::Reverse, collections::BinaryHeap, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use smallvec::SmallVec;
use tokio::time::Instant;

pub use super::order::LineKey;
use super::{
    deaths::{Deaths, Losses, Lost},
    order::{Ready, Sketch},
    tries::Tally,
};
use crate::{
    domain::{LineSet, request_line},
    fleet::{Blame, Cut, WorkerKey, outage::Verdict},
};

/// A line, as found in the segment's bytes.
#[derive(Clone, Debug)]
struct Line {
    /// Its index in the segment: a bit of a [`LineSet`].
    index: u32,
    model: u8,
    custom_id: Range<u32>,
    body: Range<u32>,
    tally: Tally,
    losses: Losses,
    /// What may tell that the tries counted last were the worker's fault, and how many those are.
    doubt: Option<(Blame, u32)>,
    /// When it failed first, unless that was the worker's fault; and what became clear since.
    alone: Alone,
    /// When its answer was cut off last.
    cut: Option<Cut>,
    failed_on: SmallVec<[WorkerKey; 2]>,
    open: bool,
    /// Whether its body has a `priority` of its own.
    has_priority: bool,
}

/// The wait before a line with no tries left is first sent again while its worker is in doubt, and the longest such
/// wait.
const FIRST_ASK: Duration = Duration::from_millis(500);
const LAST_ASK: Duration = Duration::from_secs(2);

/// The state of a line that fails while its worker answers nothing else.
#[derive(Clone, Copy, Debug, Default)]
struct Alone {
    /// When the line failed first.
    since: Option<Instant>,
    /// Whether the worker has answered something since.
    is_proven: bool,
    /// How often the line was sent after its tries were used up.
    asked: u32,
}

/// Lines that wait for the same kind of slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    /// The model's index in the file's list.
    pub model: usize,
    /// Whether they are suspects, which are sent apart from others.
    pub alone: bool,
}

impl Lane {
    /// The lane's index.
    #[must_use]
    pub fn place(self) -> usize {
        2 * self.model + usize::from(self.alone)
    }
}

/// A segment whose bytes are not the requests that were uploaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the segment can't be read: {message}")]
pub struct Unreadable {
    /// The line's index in the segment, from 0.
    pub line: u32,
    /// What is wrong.
    pub message: String,
}

/// The lines of a segment.
#[derive(Debug)]
pub struct WorkList {
    bytes: Bytes,
    models: Vec<Arc<str>>,
    lines: Vec<Line>,
    ready: Vec<Ready>,
    later: BinaryHeap<Reverse<(Instant, LineKey)>>,
    deaths: Deaths,
    open: usize,
}

impl WorkList {
    /// Parses the requests of a segment, except those that are done.
    ///
    /// # Errors
    /// [`Unreadable`] if the bytes are not what was validated at upload.
    pub fn read(bytes: Bytes, models: &[String], done: &LineSet) -> Result<Self, Unreadable> {
        let mut lines = Vec::new();
        let mut fresh: Vec<Vec<Sketch<'_>>> = vec![Vec::new(); models.len()];
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
                tally: Tally::default(),
                losses: Losses::default(),
                doubt: None,
                alone: Alone::default(),
                cut: None,
                failed_on: SmallVec::new(),
                open: true,
                has_priority: request.hints.has_priority,
            });
            let (prompt, max_tokens) = (request.hints.prompt.as_bytes(), request.hints.max_tokens);
            fresh[model].push(Sketch { key, prompt, max_tokens });
        }
        let mut ready = vec![Ready::default(); 2 * models.len()];
        for (model, sketches) in fresh.iter().enumerate() {
            ready[Lane { model, alone: false }.place()] = Ready::plan(sketches);
        }
        drop(fresh);
        let models = models.iter().map(|model| Arc::from(model.as_str())).collect();
        Ok(Self { bytes, models, open: lines.len(), lines, ready, later: BinaryHeap::new(), deaths: Deaths::default() })
    }

    /// The models, as in the file.
    #[must_use]
    pub fn models(&self) -> &[Arc<str>] {
        &self.models
    }

    /// The number of lines without a result: ready, waiting or in flight.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open
    }

    /// The models whose lines have no result yet, as a mask.
    #[must_use]
    pub fn open_models(&self) -> i64 {
        self.lines.iter().filter(|line| line.open).fold(0, |mask, line| mask | 1 << line.model)
    }

    /// The number of ready lines of a model.
    #[must_use]
    pub fn ready(&self, model: usize) -> usize {
        [false, true].iter().map(|alone| self.ready[Lane { model, alone: *alone }.place()].count()).sum()
    }

    /// The number of ready lines of a lane.
    #[must_use]
    pub fn ready_in(&self, lane: Lane) -> usize {
        self.ready[lane.place()].count()
    }

    /// All lanes, by place.
    pub fn lanes(&self) -> impl Iterator<Item = Lane> + use<> {
        (0..self.models.len()).flat_map(|model| [false, true].map(|alone| Lane { model, alone }))
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

    /// Makes lines ready whose wait is over. They go first, although others have not been tried at all.
    pub fn wake(&mut self, now: Instant) {
        while self.next_due().is_some_and(|at| at <= now) {
            if let Some(Reverse((_, key))) = self.later.pop() {
                let line = &mut self.lines[key.0 as usize];
                line.losses.suspect(&mut self.deaths);
                let lane = Lane { model: usize::from(line.model), alone: line.losses.company() > 0 };
                self.ready[lane.place()].again(key);
            }
        }
    }

    /// The next ready line of a lane.
    #[must_use]
    pub fn peek(&self, lane: Lane) -> Option<LineKey> {
        self.ready[lane.place()].peek()
    }

    /// Takes the next ready line of a lane.
    pub fn take(&mut self, lane: Lane) -> Option<LineKey> {
        self.ready[lane.place()].take()
    }

    /// Takes the ready line of a lane that fits this worker best. `workers` are all that serve the model, by
    /// [`Worker::affinity`](crate::fleet::Worker::affinity).
    pub fn take_for(&mut self, lane: Lane, worker: (WorkerKey, u64), workers: &[u64]) -> Option<LineKey> {
        let lines = &self.lines;
        let fits = |key: LineKey| !lines[key.0 as usize].failed_on.contains(&worker.0);
        self.ready[lane.place()].take_for(worker.1, workers, fits)
    }

    /// Takes the ready line of a lane that finds out best whether a worker answers again: one that has not been sent before,
    /// and is far from those that have. They may have in themselves what they failed by, and so may their neighbours.
    pub fn take_to_find_out(&mut self, lane: Lane) -> Option<LineKey> {
        self.ready[lane.place()].take_last()
    }

    /// Takes suspects that may be sent to one worker together: at most `most`, and as few as one of them must be. Also says
    /// how long they should be apart from others.
    pub fn take_suspects(&mut self, model: usize, most: u32) -> (Vec<LineKey>, Duration) {
        let lines = &self.lines;
        let company = |key: LineKey| lines[key.0 as usize].losses.company();
        let ready = &mut self.ready[Lane { model, alone: true }.place()];
        // The smallest group is the one that is nearest to the end of the search.
        let Some(least) = ready.sent_before().map(company).min() else { return (Vec::new(), Duration::ZERO) };
        let mut room = least.min(most).max(1);
        let taken = ready.take_again(|key| {
            let fits = room > 0 && company(key) == least;
            room -= u32::from(fits);
            fits
        });
        let longest = taken.iter().map(|key| lines[key.0 as usize].losses.apart_for()).max();
        (taken, longest.unwrap_or_default())
    }

    /// Records that a worker died while it had the line. Returns whether it probably died of this line.
    pub fn lost(&mut self, key: LineKey, lost: Lost) -> bool {
        self.lines[key.0 as usize].losses.lose(&mut self.deaths, lost)
    }

    /// Records that the line came back from a worker that still lives.
    pub fn acquit(&mut self, key: LineKey) {
        self.lines[key.0 as usize].losses.acquit(&mut self.deaths);
    }

    /// Before the line's next failure is counted: gives back the tries counted last if those were the worker's fault, and
    /// notes what may tell the same of this one.
    pub fn doubt(&mut self, key: LineKey, blame: Option<Blame>, now: Instant) {
        let line = self.line_mut(key);
        let before = line.doubt.take();
        let mut tries = 1;
        if let Some((before, counted)) = before {
            match before.verdict() {
                Verdict::Worker => {
                    line.tally.refund(counted);
                    line.alone = Alone::default();
                }
                Verdict::Request => line.alone.is_proven = true,
                Verdict::Open if blame.as_ref() == Some(&before) => tries += counted,
                Verdict::Open => {}
            }
        }
        if blame.is_some() {
            line.alone.since.get_or_insert(now);
        }
        line.doubt = blame.map(|blame| (blame, tries));
    }

    /// Before it is counted that the line's answer was cut off: reads what has become clear of the last time.
    pub fn cut_off(&mut self, key: LineKey, cut: Cut) {
        let line = self.line_mut(key);
        if let Some(last) = line.cut.replace(cut) {
            line.tally.suspect_cut(last.evidence());
        }
    }

    /// When a line whose last try has failed is to be sent again all the same, because it is the only one that can find out
    /// whether its worker is at fault. None: not again.
    pub fn ask_again(&mut self, key: LineKey, patience: Duration, now: Instant) -> Option<Instant> {
        let alone = &mut self.line_mut(key).alone;
        let until = alone.since? + patience;
        let at = now + (FIRST_ASK * 2u32.saturating_pow(alone.asked)).min(LAST_ASK);
        if alone.is_proven || at > until {
            return None;
        }
        alone.asked += 1;
        Some(at)
    }

    /// The worker of a line whose last try has failed has answered another request since. Whether the line is to be sent
    /// once more, because the worker had failed everything for a while.
    pub fn has_last_chance(&mut self, key: LineKey, patience: Duration, now: Instant) -> bool {
        let alone = &mut self.line_mut(key).alone;
        let long = !patience.is_zero() && alone.since.is_some_and(|since| now >= since + FIRST_ASK);
        !std::mem::replace(&mut alone.is_proven, true) && long
    }

    pub fn tally(&mut self, key: LineKey) -> &mut Tally {
        &mut self.line_mut(key).tally
    }

    /// Whether a line without a result has used up tries, or was there when a worker died.
    #[must_use]
    pub fn has_suspects(&self) -> bool {
        self.lines.iter().any(|line| line.open && line.tally.counts())
    }

    /// Records a worker on which the line has failed. Returns its tally, to be updated.
    pub fn failed(&mut self, key: LineKey, on: WorkerKey) -> &mut Tally {
        let line = self.line_mut(key);
        if !line.failed_on.contains(&on) {
            line.failed_on.push(on);
        }
        &mut line.tally
    }

    /// Makes a line wait until a time.
    pub fn later(&mut self, key: LineKey, at: Instant) {
        self.later.push(Reverse((at, key)));
    }

    /// Records that the line has its result.
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

    /// The line's index in the segment.
    #[must_use]
    pub fn index(&self, key: LineKey) -> u32 {
        self.line(key).index
    }

    /// The line's model, by its place in [`WorkList::models`].
    #[must_use]
    pub fn model(&self, key: LineKey) -> usize {
        usize::from(self.line(key).model)
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

    /// Whether the client has set a `priority` in the body.
    #[must_use]
    pub fn has_priority(&self, key: LineKey) -> bool {
        self.line(key).has_priority
    }

    /// The body with a `priority`, for vLLM's scheduler. For one that [has none](Self::has_priority).
    #[must_use]
    pub fn body_with_priority(&self, key: LineKey, priority: i32) -> Bytes {
        let body = self.body(key);
        // It is an object, and has a model: a field can go before the others.
        let mut text = Vec::with_capacity(body.len() + 24);
        text.extend_from_slice(format!("{{\"priority\":{priority},").as_bytes());
        text.extend_from_slice(&body[1..]);
        text.into()
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

/// The byte range of `part`, a slice of `whole`.
fn within(whole: &[u8], part: &[u8]) -> Range<u32> {
    let start = part.as_ptr() as usize - whole.as_ptr() as usize;
    let at = |place: usize| u32::try_from(place).unwrap_or(u32::MAX);
    at(start)..at(start + part.len())
}

#[cfg(test)]
mod tests;
