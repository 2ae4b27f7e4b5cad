//! Decides when a batch's progress is sent as a webhook.

use std::time::Duration;

use crate::domain::Timestamp;

/// The smallest share of a batch, in percent, between two progress webhooks.
pub const PROGRESS_PERCENT: i64 = 10;
/// The shortest time between two progress webhooks.
pub const PROGRESS_INTERVAL: Duration = Duration::from_secs(30);
/// The age after which a progress webhook is dropped.
pub const PROGRESS_LIFETIME: Duration = Duration::from_secs(600);

/// The progress of a batch at its last progress webhook; initially none, at its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProgressMark {
    /// Requests that had ended by then.
    pub done: i64,
    /// The time, in microseconds since the Unix epoch.
    pub at: i64,
}

impl ProgressMark {
    /// The new mark, if the batch is far enough from this one, both in requests and in time. `None` otherwise, and at
    /// the end of the batch, which has its own event.
    #[must_use]
    pub fn next(self, done: i64, total: i64, at: Timestamp) -> Option<Self> {
        let far = done.saturating_sub(self.done).saturating_mul(100) >= total.saturating_mul(PROGRESS_PERCENT);
        let long = at.since(Timestamp(self.at)) >= PROGRESS_INTERVAL;
        (done > self.done && done < total && far && long).then_some(Self { done, at: at.0 })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seconds(seconds: i64) -> Timestamp {
        Timestamp(seconds * 1_000_000)
    }

    #[test]
    fn the_rarer_of_both() {
        let start = ProgressMark { done: 0, at: seconds(100).0 };
        assert_eq!(start.next(50, 100, seconds(129)), None, "too soon");
        assert_eq!(start.next(9, 100, seconds(500)), None, "too little");
        assert_eq!(start.next(10, 100, seconds(130)), Some(ProgressMark { done: 10, at: seconds(130).0 }));
        assert_eq!(start.next(100, 100, seconds(500)), None, "the end is another event");
        assert_eq!(start.next(0, 0, seconds(500)), None);
    }

    proptest! {
        #[test]
        fn at_most_one_per_tenth_and_per_half_minute(steps in proptest::collection::vec((0i64..50, 0i64..40), 1..200)) {
            let (mut mark, mut done, mut at) = (ProgressMark::default(), 0, 0);
            let mut marks = Vec::new();
            for (more, later) in steps {
                done = (done + more).min(1_000);
                at += later;
                if let Some(next) = mark.next(done, 1_000, seconds(at)) {
                    prop_assert!(next.done - mark.done >= 100 && next.at - mark.at >= 30_000_000);
                    mark = next;
                    marks.push(next);
                }
            }
            prop_assert!(marks.len() <= 9);
        }
    }
}
