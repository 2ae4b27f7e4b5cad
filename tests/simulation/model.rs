//! The protocol as it is meant, in plain maps: what each call must answer, and what the database must hold after it.

use std::collections::{BTreeMap, BTreeSet};

use tidemill::{
    domain::{Batch, BatchId, BatchStatus, Epoch, LineSet, SegmentIndex, Sequence, lifecycle::Ending},
    store::{ClaimedSegment, Commit, FinalObject, NewPart, Part, Store},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Queued,
    Leased,
    Done,
}

/// A segment and its lease.
#[derive(Clone, Debug)]
pub struct Segment {
    pub lines: u32,
    pub state: State,
    pub epoch: i64,
    pub expires: i64,
    /// Bit `i`: to be claimed by whoever serves model `i`.
    pub models: i64,
    pub object: Option<FinalObject>,
}

/// A batch.
#[derive(Debug)]
pub struct Model {
    pub id: BatchId,
    pub status: BatchStatus,
    pub ending: Option<Ending>,
    pub segments: Vec<Segment>,
    /// Something was called for it since it was last compared.
    pub touched: bool,
    /// By object key.
    parts: BTreeMap<String, (SegmentIndex, LineSet, LineSet)>,
    /// States entered, in order.
    history: Vec<BatchStatus>,
    /// As last read.
    revision: i64,
    sequence: Sequence,
    /// Of a batch that has ended: all of it.
    last: Option<String>,
}

impl Model {
    pub fn new(id: BatchId, segments: Vec<Segment>) -> Self {
        Self {
            id,
            status: BatchStatus::InProgress,
            ending: None,
            segments,
            touched: true,
            parts: BTreeMap::new(),
            history: vec![BatchStatus::Validating, BatchStatus::InProgress],
            revision: 0,
            sequence: Sequence(0),
            last: None,
        }
    }

    fn segment(&mut self, index: SegmentIndex) -> &mut Segment {
        &mut self.segments[index.0 as usize]
    }

    fn holds(&mut self, index: SegmentIndex, epoch: Epoch) -> bool {
        self.touched = true;
        let segment = self.segment(index);
        segment.state == State::Leased && segment.epoch == epoch.0
    }

    fn enter(&mut self, status: BatchStatus) {
        assert!(!self.status.is_terminal(), "{:?} after {:?}", status, self.status);
        self.status = status;
        self.history.push(status);
    }

    /// The segment that a claim must give, if any.
    pub fn claim(&mut self, mask: i64, now: i64, lease: i64) -> Option<(SegmentIndex, Epoch)> {
        if self.status.is_terminal() {
            return None;
        }
        let (index, segment) = (0..).zip(&mut self.segments).find(|(_, segment)| {
            let free = segment.state == State::Queued || (segment.state == State::Leased && segment.expires < now);
            free && segment.models & mask != 0
        })?;
        segment.state = State::Leased;
        segment.epoch += 1;
        segment.expires = now + lease;
        Some((SegmentIndex(index), Epoch(segment.epoch)))
    }

    pub fn check_claim(expected: Option<(SegmentIndex, Epoch)>, claimed: Option<&ClaimedSegment>) {
        assert_eq!(claimed.map(|claimed| (claimed.segment.index, claimed.epoch)), expected, "claim");
    }

    pub fn renew(&mut self, index: SegmentIndex, epoch: Epoch, until: i64) {
        assert!(self.holds(index, epoch), "a lease was renewed that is not held");
        self.segment(index).expires = until;
    }

    pub fn commit(&mut self, index: SegmentIndex, epoch: Epoch, part: &NewPart) -> Commit {
        if !self.holds(index, epoch) {
            return Commit::Fenced;
        }
        if self.parts.contains_key(&part.object_key) {
            return Commit::Done;
        }
        if self.status.is_terminal() {
            return Commit::Fenced;
        }
        self.insert(index, part);
        Commit::Done
    }

    fn insert(&mut self, index: SegmentIndex, part: &NewPart) {
        self.parts.insert(part.object_key.clone(), (index, part.completed.clone(), part.failed.clone()));
    }

    pub fn finish(
        &mut self,
        index: SegmentIndex,
        epoch: Epoch,
        last: Option<&NewPart>,
        object: &FinalObject,
    ) -> Commit {
        self.touched = true;
        let ended = self.status.is_terminal();
        let segment = self.segment(index);
        if segment.state != State::Leased || segment.epoch != epoch.0 {
            let ours = segment.object.as_ref().is_some_and(|known| known.object_key == object.object_key);
            return if ours { Commit::Done } else { Commit::Fenced };
        }
        if ended {
            return Commit::Fenced;
        }
        segment.state = State::Done;
        segment.models = 0;
        segment.object = Some(object.clone());
        if let Some(last) = last {
            self.insert(index, last);
        }
        if self.segments.iter().all(|segment| segment.state == State::Done) {
            match self.status {
                BatchStatus::InProgress => {
                    self.enter(BatchStatus::Finalizing);
                    self.enter(BatchStatus::Completed);
                }
                BatchStatus::Finalizing => self.enter(BatchStatus::Expired),
                BatchStatus::Cancelling => self.enter(BatchStatus::Cancelled),
                other => panic!("segments of a batch that is {other:?} were running"),
            }
        }
        Commit::Done
    }

    pub fn drop_parts(&mut self, index: SegmentIndex, epoch: Epoch, torn: &[Part]) -> Commit {
        if !self.holds(index, epoch) || self.status.is_terminal() {
            return Commit::Fenced;
        }
        for part in torn {
            self.parts.remove(&part.content.object_key);
        }
        Commit::Done
    }

    pub fn release(&mut self, index: SegmentIndex, epoch: Epoch, mask: i64) {
        if self.holds(index, epoch) {
            let segment = self.segment(index);
            segment.state = State::Queued;
            segment.models = mask;
        }
    }

    pub fn release_all(&mut self) {
        self.touched = true;
        for segment in self.segments.iter_mut().filter(|segment| segment.state == State::Leased) {
            segment.state = State::Queued;
        }
    }

    pub fn cancel(&mut self) {
        self.touched = true;
        if self.status == BatchStatus::InProgress {
            self.enter(BatchStatus::Cancelling);
            self.ending = Some(Ending::Cancelled);
        }
    }

    pub fn close_window(&mut self) {
        self.touched = true;
        if self.status == BatchStatus::InProgress {
            self.enter(BatchStatus::Finalizing);
            self.ending = Some(Ending::Expired);
        }
    }

    pub fn fail(&mut self, index: SegmentIndex, epoch: Epoch) -> Commit {
        if !self.holds(index, epoch) || self.status.is_terminal() {
            return Commit::Fenced;
        }
        self.enter(BatchStatus::Failed);
        Commit::Done
    }

    /// Compares the database with all of this.
    pub async fn check(&mut self, store: &Store) {
        self.touched = false;
        let (batch, events) = store.history(&self.id).await.unwrap().unwrap();
        let parts = store.parts_from(&self.id, 0, 1_000).await.unwrap();
        assert_eq!(batch.status, self.status);
        assert!(batch.revision.0 >= self.revision, "the revision went from {} to {}", self.revision, batch.revision.0);
        self.revision = batch.revision.0;

        let states: Vec<_> = events.iter().map(|event| event.batch.status).collect();
        assert_eq!(states, self.history, "one event for each state, in order");
        assert!(events.windows(2).all(|two| two[0].sequence < two[1].sequence), "sequences grow");
        assert!(events.windows(2).all(|two| two[0].batch.revision < two[1].batch.revision), "revisions grow");
        let last = events.last().unwrap();
        assert!(last.sequence >= self.sequence);
        self.sequence = last.sequence;

        self.check_parts(&batch, &parts);
        if self.status.is_terminal() {
            assert_eq!(last.batch.counts, batch.counts, "the last event has the last counts");
            let mut segments = store.segments(&self.id, SegmentIndex(0), 1_000).await.unwrap();
            // A run of a failed batch may still give its segment back: bookkeeping that nobody reads any more.
            segments.iter_mut().for_each(|segment| segment.span.models = 0);
            let all = format!("{batch:?} {events:?} {parts:?} {segments:?}");
            assert_eq!(self.last.get_or_insert_with(|| all.clone()), &all, "a batch that has ended changed");
        }
    }

    fn check_parts(&self, batch: &Batch, parts: &[Part]) {
        let keys: BTreeSet<&str> = parts.iter().map(|part| part.content.object_key.as_str()).collect();
        assert_eq!(keys.len(), parts.len(), "a part twice");
        assert!(keys.iter().copied().eq(self.parts.keys().map(String::as_str)), "{keys:?} but {:?}", self.parts.keys());
        let mut seen = BTreeSet::new();
        let (mut completed, mut failed) = (0, 0);
        for part in parts {
            for line in part.content.completed.iter().chain(part.content.failed.iter()) {
                assert!(seen.insert((part.segment, line)), "line {line} of segment {} twice", part.segment);
            }
            completed += part.content.completed.len() as i64;
            failed += part.content.failed.len() as i64;
        }
        assert_eq!((batch.counts.completed, batch.counts.failed), (completed, failed), "counts and parts");
        assert!(completed + failed <= batch.counts.total);
        let tokens: i64 = parts.iter().map(|part| part.content.usage.total).sum();
        assert_eq!(batch.usage.total, tokens, "tokens and parts");
    }
}
