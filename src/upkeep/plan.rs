//! When a sweep is due, purely: the time and the lease are arguments.

use std::time::Duration;

use tokio::time::Instant;

/// Time until a tick that failed is repeated; it doubles with each failure, up to the sweep's interval.
const AGAIN: Duration = Duration::from_secs(1);
/// After this many failures in a row that may be this node's own, another node gets its turn.
const OWN_FAILURES: u32 = 3;

/// This node's lease of a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// When it ends.
    pub until: Instant,
    /// When a node last left the sweep with nothing to do.
    pub caught_up: Option<Instant>,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Tick now.
    Tick,
    /// Wait until then.
    At(Instant),
    /// Wait for the lease.
    Lease,
}

/// How a tick ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing is left to do.
    CaughtUp,
    /// More is due.
    More,
    /// The database failed.
    Failed,
    /// Something failed that may work on another node.
    FailedHere,
}

/// When a sweep is due on this node.
#[derive(Debug)]
pub struct Plan {
    every: Duration,
    /// `None` while this node does not hold the lease.
    due: Option<Instant>,
    caught_up: Option<Instant>,
    failures: u32,
    own_failures: u32,
}

impl Plan {
    /// A sweep that looks this often when nothing is left to do.
    #[must_use]
    pub fn new(every: Duration) -> Self {
        Self { every, due: None, caught_up: None, failures: 0, own_failures: 0 }
    }

    /// The next action. A node that takes over continues where the last holder was.
    pub fn next(&mut self, now: Instant, lease: Option<Lease>) -> Next {
        let Some(lease) = lease.filter(|lease| lease.until > now) else {
            self.due = None;
            return Next::Lease;
        };
        let due = *self.due.get_or_insert_with(|| lease.caught_up.map_or(now, |then| then + self.every));
        if due <= now { Next::Tick } else { Next::At(due.min(lease.until)) }
    }

    /// Records a tick.
    pub fn ended(&mut self, began: Instant, now: Instant, outcome: Outcome) {
        (self.failures, self.own_failures) = match outcome {
            Outcome::CaughtUp | Outcome::More => (0, 0),
            Outcome::Failed => (self.failures + 1, 0),
            Outcome::FailedHere => (self.failures + 1, self.own_failures + 1),
        };
        let wait = match outcome {
            Outcome::CaughtUp => {
                // What becomes due during the tick may have been missed by it.
                self.caught_up = Some(began);
                self.every
            }
            Outcome::More => Duration::ZERO,
            Outcome::Failed | Outcome::FailedHere => {
                AGAIN.saturating_mul(1 << (self.failures - 1).min(16)).min(self.every)
            }
        };
        self.due = Some(now + wait);
    }

    /// When it last had nothing left to do on this node.
    #[must_use]
    pub fn caught_up(&self) -> Option<Instant> {
        self.caught_up
    }

    /// Whether another node should try.
    #[must_use]
    pub fn gives_up(&self) -> bool {
        self.own_failures >= OWN_FAILURES
    }
}

/// How long a sweep has been overdue, whose last node left it with nothing to do that long ago. `lease` is the time in
/// which a dead node is noticed: a delay below it is normal.
#[must_use]
pub fn lag(since: Duration, every: Duration, lease: Duration) -> Duration {
    let late = since.saturating_sub(every);
    if late > lease { late } else { Duration::ZERO }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn lease(until: Instant) -> Option<Lease> {
        Some(Lease { until, caught_up: None })
    }

    #[test]
    fn a_sweep_is_done_by_the_holder_of_its_lease_only() {
        let start = Instant::now();
        let mut plan = Plan::new(10 * SECOND);
        assert_eq!(plan.next(start, None), Next::Lease);
        assert_eq!(plan.next(start, lease(start)), Next::Lease, "a lease that has ended");
        let until = start + 15 * SECOND;
        assert_eq!(plan.next(start, lease(until)), Next::Tick, "nobody has ever done it");
        plan.ended(start, start + SECOND, Outcome::CaughtUp);
        assert_eq!(plan.caught_up(), Some(start));
        assert_eq!(plan.next(start + SECOND, lease(until)), Next::At(start + 11 * SECOND));
        assert_eq!(plan.next(start + 11 * SECOND, lease(until)), Next::Tick);
        plan.ended(start + 11 * SECOND, start + 11 * SECOND, Outcome::CaughtUp);
        assert_eq!(plan.next(start + 12 * SECOND, lease(until)), Next::At(until), "the lease ends before it is due");
        assert_eq!(plan.next(until, lease(until)), Next::Lease);
    }

    #[test]
    fn a_node_that_takes_over_goes_on_where_the_other_was() {
        let start = Instant::now();
        let now = start + 600 * SECOND;
        let until = now + 9_000 * SECOND;
        let mut plan = Plan::new(3_600 * SECOND);
        let taken = Some(Lease { until, caught_up: Some(start) });
        assert_eq!(plan.next(now, taken), Next::At(start + 3_600 * SECOND));
        // It loses it, and takes it again after another node has done it.
        assert_eq!(plan.next(now, None), Next::Lease);
        let taken = Some(Lease { until, caught_up: Some(now) });
        assert_eq!(plan.next(now, taken), Next::At(now + 3_600 * SECOND));
        let mut late = Plan::new(300 * SECOND);
        assert_eq!(late.next(now, Some(Lease { until, caught_up: Some(start) })), Next::Tick);
    }

    #[test]
    fn what_fails_is_tried_less_and_less_often_and_what_is_left_is_done_at_once() {
        let now = Instant::now();
        let until = now + 99_999 * SECOND;
        let mut plan = Plan::new(10 * SECOND);
        let mut after = |outcome| {
            plan.ended(now, now, outcome);
            match plan.next(now, lease(until)) {
                Next::Tick => 0,
                Next::At(at) => (at - now).as_secs(),
                Next::Lease => panic!("it has the lease"),
            }
        };
        let mut waits = |outcomes: &[Outcome]| outcomes.iter().map(|one| after(*one)).collect::<Vec<_>>();
        assert_eq!(waits(&[Outcome::Failed; 6]), [1, 2, 4, 8, 10, 10]);
        assert_eq!(waits(&[Outcome::More, Outcome::More, Outcome::CaughtUp, Outcome::FailedHere]), [0, 0, 10, 1]);
        assert_eq!(waits(&[Outcome::Failed; 100]).last(), Some(&10));
    }

    #[test]
    fn another_node_gets_its_turn_after_failures_that_may_be_this_nodes_own() {
        let now = Instant::now();
        let mut plan = Plan::new(SECOND);
        let mut gives_up = |outcome| {
            plan.ended(now, now, outcome);
            plan.gives_up()
        };
        assert!(!gives_up(Outcome::FailedHere) && !gives_up(Outcome::FailedHere));
        assert!(!gives_up(Outcome::Failed), "the database is away for all");
        assert!(!gives_up(Outcome::FailedHere) && !gives_up(Outcome::FailedHere) && gives_up(Outcome::FailedHere));
        assert!(!gives_up(Outcome::More));
    }

    #[test]
    fn a_sweep_lags_by_what_it_is_late() {
        let lag = |since| lag(Duration::from_secs(since), 10 * SECOND, 15 * SECOND).as_secs();
        assert_eq!([0, 10, 25, 26, 610].map(lag), [0, 0, 0, 16, 600]);
    }
}
