//! Segments whose runs on this node ended early for a reason that would end the next run too: a panic, or rows that
//! can't be read. They run again, because the reason may pass, but not for ever, because each run costs GPU time.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::run::Ended;
use crate::domain::{BatchError, SegmentRef};

/// The number of such runs of a segment in a row, on one node, after which its batch fails.
pub(super) const LIMIT: u32 = 5;
/// A segment without such a run for this long is forgotten: longer than any reasonable lease.
const FORGET: Duration = Duration::from_secs(24 * 3_600);

/// The counts of such runs and their last reasons. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Crashes {
    segments: Arc<Mutex<HashMap<SegmentRef, Crashed>>>,
}

#[derive(Debug)]
struct Crashed {
    times: u32,
    at: Instant,
    why: String,
}

impl Crashes {
    /// Records how a run of a segment has ended.
    pub(super) fn ended(&self, segment: &SegmentRef, how: Ended, now: Instant) {
        match how {
            Ended::Broken(what) => self.note(segment, format!("the server can't {what}"), now),
            // The reason has passed: the next one is another.
            Ended::Finished | Ended::Released => self.forget(segment),
            // These say nothing of it.
            Ended::Lost | Ended::Missing | Ended::Stuck => {}
        }
    }

    /// Records a run that ended early.
    fn note(&self, segment: &SegmentRef, why: String, now: Instant) {
        let mut segments = self.segments.lock();
        segments.retain(|_, crashed| crashed.at + FORGET > now);
        let crashed = segments.entry(segment.clone()).or_insert(Crashed { times: 0, at: now, why: String::new() });
        (crashed.times, crashed.at, crashed.why) = (crashed.times + 1, now, why);
    }

    /// Why the segment is not run any more. `None`: it may run.
    pub(super) fn verdict(&self, segment: &SegmentRef) -> Option<BatchError> {
        let segments = self.segments.lock();
        let crashed = segments.get(segment).filter(|crashed| crashed.times >= LIMIT)?;
        let (times, why) = (crashed.times, &crashed.why);
        let message = format!(
            "{segment}: {why}, {times} runs in a row. This is a bug in tidemill, or rows of its database were changed; the \
             server's log has the details"
        );
        Some(BatchError { code: "internal_error".into(), message, line: 0, param: String::new() })
    }

    /// Forgets a segment that has ended.
    pub(super) fn forget(&self, segment: &SegmentRef) {
        self.segments.lock().remove(segment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{BatchId, SegmentIndex};

    #[tokio::test(start_paused = true)]
    async fn a_segment_is_given_up_after_so_many_runs_and_no_other_is() {
        let crashes = Crashes::default();
        let batch = BatchId::generate();
        let [one, other] = [0, 1].map(|index| SegmentRef { batch: batch.clone(), index: SegmentIndex(index) });
        for time in 1..=LIMIT {
            assert_eq!(crashes.verdict(&one), None, "after {}", time - 1);
            crashes.note(&one, "it crashed".into(), Instant::now());
            tokio::time::advance(FORGET / 2).await;
        }
        let verdict = crashes.verdict(&one).unwrap();
        assert!(verdict.message.contains("it crashed, 5 runs"), "{}", verdict.message);
        assert_eq!(crashes.verdict(&other), None);
        tokio::time::advance(FORGET).await;
        crashes.note(&other, "too".into(), Instant::now());
        assert_eq!(crashes.verdict(&one), None, "that was long ago");
        crashes.note(&one, "again".into(), Instant::now());
        crashes.forget(&one);
        assert!(crashes.segments.lock().len() == 1);
    }

    #[tokio::test(start_paused = true)]
    async fn only_runs_in_a_row_count() {
        let crashes = Crashes::default();
        let segment = SegmentRef { batch: BatchId::generate(), index: SegmentIndex(0) };
        let given_up = |how| {
            crashes.ended(&segment, how, Instant::now());
            crashes.verdict(&segment).is_some()
        };
        let broken = Ended::Broken("run it");
        for well in [Ended::Released, Ended::Finished] {
            for how in [broken, broken, broken, broken, well, broken, broken, broken, broken] {
                assert!(!given_up(how), "{how:?}");
            }
            // What tells nothing of the segment neither counts nor begins anew.
            assert!(!given_up(Ended::Lost) && !given_up(Ended::Missing) && !given_up(Ended::Stuck));
            assert!(given_up(broken), "five in a row");
            crashes.forget(&segment);
        }
    }
}
