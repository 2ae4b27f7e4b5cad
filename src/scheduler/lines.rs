//! The lines of one segment that are still to run: which are ready, which wait for another try. Pure.

use std::{cmp::Reverse, collections::BinaryHeap, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use smallvec::SmallVec;
use tokio::time::Instant;

use super::{
    deaths::{Deaths, Losses, Lost},
    order::{Ready, Sketch},
    tries::Tally,
};
use crate::{
    domain::{LineSet, request_line},
    fleet::{Blame, WorkerKey, outage::Verdict},
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
    failed_on: SmallVec<[WorkerKey; 2]>,
    open: bool,
    /// Whether its body has a `priority` of its own.
    has_priority: bool,
}

/// Between a line's last try and the first time that it is sent all the same, and the longest such wait.
const FIRST_ASK: Duration = Duration::from_millis(500);
const LAST_ASK: Duration = Duration::from_secs(2);

/// The state of a line that fails while its worker answers nothing else.
#[derive(Clone, Copy, Debug, Default)]
struct Alone {
    /// Its first failure.
    since: Option<Instant>,
    /// Whether the worker has answered something since.
    is_proven: bool,
    /// How often the line was sent after its tries were used up.
    asked: u32,
}

/// Identifies a line by its index in the work list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LineKey(u32);

#[cfg(test)]
impl LineKey {
    pub(super) fn at(place: u32) -> Self {
        Self(place)
    }

    pub(super) fn place(self) -> u32 {
        self.0
    }
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

    /// The line's tally.
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

/// Where `part`, a slice of `whole`, lies in it.
fn within(whole: &[u8], part: &[u8]) -> Range<u32> {
    let start = part.as_ptr() as usize - whole.as_ptr() as usize;
    let at = |place: usize| u32::try_from(place).unwrap_or(u32::MAX);
    at(start)..at(start + part.len())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        fleet::{
            FailureKind,
            outage::{Outage, REQUESTS, Sign},
        },
        scheduler::TryPolicy,
    };

    const A: Lane = Lane { model: 0, alone: false };
    const SUSPECT: Lane = Lane { model: 0, alone: true };
    const B: Lane = Lane { model: 1, alone: false };

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
        let x = list.take(A).unwrap();
        assert_eq!((list.index(x), list.custom_id(x)), (0, &b"\"x\""[..]));
        assert_eq!(list.body(x), r#"{"model":"a","prompt":"x"}"#);
        let y = list.take(B).unwrap();
        assert_eq!((list.index(y), list.take(B)), (3, None));
        list.done(y);
        list.done(y);
        assert_eq!((list.open(), list.open_models()), (2, 0b01));

        let now = Instant::now();
        let policy = TryPolicy::default();
        let fail = |list: &mut WorkList| policy.next(list.failed(x, WorkerKey(7)), FailureKind::Connection, None, 0.0);
        assert!(fail(&mut list).is_some());
        list.later(x, now + Duration::from_secs(1));
        list.wake(now);
        assert_eq!(list.ready(0), 1, "z, x still waits");
        assert!(list.has_later());
        list.wake(now + Duration::from_secs(1));
        assert_eq!(list.take(A), Some(x), "what has waited goes first");
        for death in 1..=3 {
            assert!(fail(&mut list).is_some());
            let now = now + Duration::from_secs(10 * death);
            let lost = Lost { worker: WorkerKey(7), now, lived: Duration::from_secs(4), apart: 0, answers: 0 };
            assert!(!list.lost(x, lost));
            list.later(x, now);
            list.wake(now);
            let suspect = (death == 3).then_some(x);
            assert_eq!((list.ready(0), list.peek(SUSPECT)), (2, suspect), "it was there at {death} deaths");
            if suspect.is_none() {
                assert_eq!(list.take(A), Some(x));
            }
        }
        assert_eq!(list.failed_on(x), [WorkerKey(7)]);
        assert_eq!(list.take_suspects(0, 64), (vec![x], Duration::from_secs(6)));
        list.acquit(x);
        assert_eq!(list.unfinished().len(), 2);
    }

    /// A line that was failed with 502.
    fn failing(list: &mut WorkList, outage: &mut Outage, now: Instant) -> LineKey {
        let x = list.take(A).unwrap();
        let (_, blame) = outage.failed(Sign::Status(502), 0, now, now);
        list.doubt(x, Some(blame), now);
        x
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_is_sent_again_and_again_while_its_worker_answers_nothing() {
        let (mut list, mut outage, start) = (list(&line("x", "a"), &[]), Outage::default(), Instant::now());
        let x = failing(&mut list, &mut outage, start);
        let patience = TryPolicy::default().patience;
        let (mut now, mut asked) = (start, Vec::new());
        while let Some(at) = list.ask_again(x, patience, now) {
            asked.push((at - start).as_millis());
            now = at;
            let (_, blame) = outage.failed(Sign::Status(502), 0, now, now);
            list.doubt(x, Some(blame), now);
        }
        assert_eq!(asked[..4], [500, 1_500, 3_500, 5_500]);
        let last = *asked.last().unwrap();
        assert!((22_000..=25_000).contains(&last), "an outage of 20 s is survived: {last} ms");
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_that_fails_while_others_are_answered_is_not_sent_again() {
        let (mut list, mut outage, now) = (list(&line("x", "a"), &[]), Outage::default(), Instant::now());
        let x = failing(&mut list, &mut outage, now);
        outage.succeeded(now);
        let (_, blame) = outage.failed(Sign::Status(502), 0, now, now);
        list.doubt(x, Some(blame), now);
        let patience = Duration::from_secs(25);
        assert_eq!(list.ask_again(x, patience, now), None);
        assert!(!list.has_last_chance(x, patience, now + patience));
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_has_one_more_try_when_its_worker_answers_again_after_a_while() {
        let patience = Duration::from_secs(25);
        for (after, has) in [(FIRST_ASK, true), (FIRST_ASK / 2, false)] {
            let (mut list, mut outage, now) = (list(&line("x", "a"), &[]), Outage::default(), Instant::now());
            let x = failing(&mut list, &mut outage, now);
            outage.succeeded(now + after);
            assert_eq!(list.has_last_chance(x, patience, now + after), has);
            assert!(!list.has_last_chance(x, patience, now + after), "but one");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn all_tries_of_an_outage_are_given_back() {
        let (mut list, mut outage, now) = (list(&line("x", "a"), &[]), Outage::default(), Instant::now());
        let policy = TryPolicy::default();
        let x = failing(&mut list, &mut outage, now);
        for _ in 1..5 {
            assert!(policy.next(list.tally(x), FailureKind::Status, None, 0.0).is_some());
            let (_, blame) = outage.failed(Sign::Status(502), 0, now, now);
            list.doubt(x, Some(blame), now);
        }
        assert!(policy.next(list.tally(x), FailureKind::Status, None, 0.0).is_none(), "that was the last");
        (1..REQUESTS as u64).for_each(|request| drop(outage.failed(Sign::Status(502), request, now, now)));
        list.doubt(x, None, now);
        for _ in 1..5 {
            assert!(policy.next(list.tally(x), FailureKind::Status, None, 0.0).is_some(), "all five are left");
        }
    }

    #[test]
    fn a_priority_is_set_where_the_client_has_set_none() {
        let own = r#"{"custom_id":"o","method":"POST","url":"/v1/completions","body":{ "priority" : 3, "model":"a"}}"#;
        let nested =
            r#"{"custom_id":"n","method":"POST","url":"/v1/completions","body": {"x":{"priority":1},"model":"a"} }"#;
        let mut list = list(&format!("{own}\n{nested}"), &[]);
        let (own, nested) = (list.take(A).unwrap(), list.take(A).unwrap());
        assert!(list.has_priority(own) && !list.has_priority(nested));
        assert_eq!(list.body_with_priority(nested, -9), r#"{"priority":-9,"x":{"priority":1},"model":"a"}"#);
        assert_eq!(list.body(nested), r#"{"x":{"priority":1},"model":"a"}"#);
    }

    #[test]
    fn bytes_that_were_not_uploaded_are_noticed() {
        let read = |text: &str| WorkList::read(text.to_owned().into(), &["a".into()], &LineSet::default());
        assert_eq!(read(&format!("{}\n{{\n", line("x", "a"))).unwrap_err().line, 1);
        assert!(read(&line("x", "other")).is_err());
        assert_eq!(read("").unwrap().open(), 0);
    }

    proptest! {
        /// Whatever is taken, put off and done: a line is ready, waiting, taken or done, never two of them, and none is lost.
        #[test]
        fn every_line_is_in_one_place(
            models in prop::collection::vec(0usize..2, 1..20),
            blank in prop::collection::vec(any::<bool>(), 20),
            done in prop::collection::btree_set(0u32..20, 0..6),
            steps in prop::collection::vec((0u8..5, 0usize..20, 0u64..5_000), 0..120),
        ) {
            let mut text = String::new();
            let mut places = Vec::new();
            for (at, model) in models.iter().enumerate() {
                if blank[at] { text.push_str(" \r\n"); }
                places.push(u32::try_from(text.matches('\n').count()).unwrap());
                text.push_str(&line(&at.to_string(), ["a", "b"][*model]));
                text.push('\n');
            }
            let done: Vec<u32> = done.into_iter().collect();
            let mut list = list(&text, &done);
            let expected: BTreeSet<u32> = places.iter().copied().filter(|place| !done.contains(place)).collect();
            let unfinished: BTreeSet<u32> = list.unfinished().into_iter().map(|key| list.index(key)).collect();
            prop_assert_eq!(&unfinished, &expected);
            let (mut now, mut taken, mut ended) = (Instant::now(), Vec::new(), BTreeSet::new());
            let mut later = 0;
            for (step, pick, millis) in steps {
                match step {
                    0 | 1 => {
                        let model = pick % 2;
                        let lane = Lane { model, alone: false };
                        let first = list.peek(lane);
                        let key = list.take(lane);
                        prop_assert_eq!(first, key);
                        if let Some(key) = key {
                            let at = places.iter().position(|place| *place == list.index(key)).unwrap();
                            prop_assert_eq!(models[at], model);
                            let id = format!("\"{at}\"");
                            prop_assert_eq!(list.custom_id(key), id.as_bytes());
                            prop_assert!(!taken.contains(&key) && !ended.contains(&key));
                            taken.push(key);
                        }
                    }
                    2 if !taken.is_empty() => {
                        list.later(taken.swap_remove(pick % taken.len()), now + Duration::from_millis(millis));
                        later += 1;
                    }
                    3 if !taken.is_empty() => {
                        let key = taken.swap_remove(pick % taken.len());
                        list.done(key);
                        ended.insert(key);
                    }
                    _ => {
                        let before = list.ready(0) + list.ready(1);
                        now += Duration::from_millis(millis);
                        list.wake(now);
                        later -= list.ready(0) + list.ready(1) - before;
                        prop_assert!(list.next_due().is_none_or(|due| due > now));
                    }
                }
                prop_assert_eq!(list.has_later(), later > 0);
                prop_assert_eq!(list.ready(0) + list.ready(1) + later + taken.len() + ended.len(), expected.len());
                prop_assert_eq!(list.open(), expected.len() - ended.len());
                let model_at = |place: u32| models[places.iter().position(|other| *other == place).unwrap()];
                let open = list.unfinished().into_iter().map(|key| model_at(list.index(key)));
                prop_assert_eq!(list.open_models(), open.fold(0i64, |mask, model| mask | 1 << model));
            }
        }
    }
}
