//! Detects that the database's clock was set back. Pure: both clocks are arguments.

use std::time::{Duration, Instant};

use super::Timestamp;

/// A step back of the database's clock up to this length is ignored: due work is late by no more than this.
const TOLERATED: Duration = Duration::from_secs(1);

/// The last readings of two clocks: this process's, which never goes back, and the database's.
#[derive(Debug, Default)]
pub struct Clocks {
    last: Option<(Instant, Timestamp)>,
}

impl Clocks {
    /// Whether the database's clock may have been set back since the last call. It read `said` at some moment between
    /// `asked` and `answered`. False at the first call.
    pub fn may_be_back(&mut self, asked: Instant, answered: Instant, said: Timestamp) -> bool {
        let Some((since, before)) = self.last.replace((answered, said)) else { return true };
        said.plus(TOLERATED) < before.plus(asked.saturating_duration_since(since))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp(1_700_000_000_000_000).plus(Duration::from_secs(seconds))
    }

    #[test]
    fn a_clock_that_goes_back_is_noticed_once() {
        let (mut clocks, start) = (Clocks::default(), Instant::now());
        let mut look = |seconds: u64, said: Timestamp| {
            let now = start + Duration::from_secs(seconds);
            clocks.may_be_back(now, now, said)
        };
        assert!(look(0, at(3_600)), "nothing is known yet");
        assert!(!look(10, at(3_610)));
        assert!(look(20, at(20)), "an hour back");
        assert!(!look(30, at(30)));
        assert!(!look(40, at(3_640)), "an hour ahead");
        assert!(look(50, at(3_640)), "and stopped");
    }

    proptest! {
        /// However long the database takes to answer, a clock that runs as it should is left in peace.
        #[test]
        fn a_slow_answer_is_no_clock_set_back(answers in proptest::collection::vec((0u64..30_000, 0u64..5_000, 0u64..5_000), 1..50)) {
            let (mut clocks, start) = (Clocks::default(), Instant::now());
            let mut now = 0;
            for (n, (later, before, after)) in answers.into_iter().enumerate() {
                let (asked, said, answered) = (now + later, now + later + before, now + later + before + after);
                now = answered;
                let [asked, answered] = [asked, answered].map(|at| start + Duration::from_millis(at));
                let said = at(0).plus(Duration::from_millis(said));
                prop_assert_eq!(clocks.may_be_back(asked, answered, said), n == 0);
            }
        }
    }
}
