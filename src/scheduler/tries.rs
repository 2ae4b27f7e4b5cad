//! Decides whether a failed request is retried, when, and apart from which others. Pure.
//!
//! A failure has one of three causes. If the request itself may have caused it (a timeout, a 500, nonsense), it counts
//! as a try. If the worker is at fault (429, 503 with `Retry-After`, unreachable, an outage), it counts as a pause and
//! uses up no try. If a worker dies, every request that it had is lost, although at most one of them killed it:
//! [`super::deaths`] finds out which, and only deaths that are a request's own end it. An answer that was cut off ends
//! the request only if there is evidence that the request is why ([`Cut`]).

use std::time::Duration;

use crate::fleet::{Cut, FailureKind};

/// The factor between two waits: a first failure costs little time, and five tries bridge some seconds.
const GROWS: u32 = 4;
/// The factor between the first two waits: a request that fails twice is usually not at fault, and may be all that its
/// batch waits for.
const GROWS_AT_FIRST: u32 = 2;
/// The fewest deaths of workers in which a request is lost before it ends, however few tries there are.
const FEWEST_DEATHS: u32 = 3;
/// The evidence needed besides: two deaths that were its own, or four that may have been.
const GUILT: u32 = 4;
const OWN_DEATH: u32 = 2;
const MAYBE_OWN_DEATH: u32 = 1;
/// Tries of a request that is refused as if the key or the path was wrong.
const REFUSALS: u32 = 2;
/// The longest wait of a request whose worker has died or is at fault, because the request waits for a worker anyway.
const WORKER_CAP: Duration = Duration::from_millis(500);
/// The longest wait of a request whose answer was cut off. Its health check says when a worker that stops is back.
const CUT_CAP: Duration = Duration::from_secs(5);

/// How long a line is kept after its first failure while its worker answers nothing. Longer than the upstream of a
/// gateway usually takes to restart, short enough for somebody who tries out a request.
const PATIENCE: Duration = Duration::from_secs(25);

/// How often and how patiently requests are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TryPolicy {
    /// Tries in all, 1 or more.
    pub max_tries: u32,
    /// The wait after the first failed try. The second wait is twice as long, the third 16 times, and each further one
    /// four times the one before it.
    pub base: Duration,
    /// The longest wait.
    pub cap: Duration,
    /// How often a request may meet a worker that takes none, before that is its answer. With the default waits a
    /// thousand times last six hours or more, or one hour if answers are cut off; a batch's window may close before.
    pub max_pauses: u32,
    /// A request whose last try has failed by a status, a page or an answer cut short is sent again until this time
    /// after its first failure, as long as its worker answers nothing else: until then it is not clear whether the
    /// request or the worker is at fault.
    pub patience: Duration,
}

impl Default for TryPolicy {
    fn default() -> Self {
        Self {
            max_tries: 5,
            base: Duration::from_millis(50),
            cap: Duration::from_secs(30),
            max_pauses: 1_000,
            patience: PATIENCE,
        }
    }
}

/// What a request has been through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    tries: u32,
    deaths: u32,
    guilt: u32,
    pauses: u32,
    /// The evidence that it is cut off for what it asks.
    cut: u32,
}

/// The possible cause of a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// The request's own.
    Request,
    /// The request's own, or a wrong key or path.
    Refusal,
    /// The worker died, of this request or of another one.
    Death,
    /// The worker takes no requests, or never had this one.
    Worker,
}

fn cause(kind: FailureKind) -> Cause {
    match kind {
        FailureKind::Timeout | FailureKind::Status | FailureKind::BadAnswer | FailureKind::NoModel => Cause::Request,
        FailureKind::Refused => Cause::Refusal,
        FailureKind::Connection | FailureKind::Abandoned => Cause::Death,
        FailureKind::Busy
        | FailureKind::Unreachable
        | FailureKind::Removed
        | FailureKind::CutOff
        | FailureKind::Outage
        | FailureKind::Local => Cause::Worker,
    }
}

/// Whether the worker died, or seems to have died, while it had the request.
#[must_use]
pub fn is_death(kind: FailureKind) -> bool {
    cause(kind) == Cause::Death
}

/// Whether this kind of failure uses up a try.
#[must_use]
pub fn is_a_try(kind: FailureKind) -> bool {
    matches!(cause(kind), Cause::Request | Cause::Refusal)
}

impl Tally {
    /// How often the request was sent, or should have been.
    #[must_use]
    pub fn times(self) -> u32 {
        self.tries + self.deaths + self.pauses
    }

    /// Whether it has failed in a way for which it may be at fault.
    #[must_use]
    pub fn counts(self) -> bool {
        self.tries + self.deaths > 0
    }

    /// The last death was its own: see [`super::deaths`]. `sure`: others were answered in between.
    pub fn blame(&mut self, sure: bool) {
        self.guilt += if sure { OWN_DEATH } else { MAYBE_OWN_DEATH };
    }

    /// It was cut off again, and its last cut-off says so much against it.
    pub fn suspect_cut(&mut self, evidence: u32) {
        self.cut += evidence;
    }

    /// The worker cuts off everything.
    pub fn forgive_cuts(&mut self) {
        self.cut = 0;
    }

    /// So many tries that were counted turned out to be the worker's fault.
    pub fn refund(&mut self, tries: u32) {
        self.tries = self.tries.saturating_sub(tries);
        self.pauses += tries;
    }
}

impl TryPolicy {
    /// Counts a failure. Returns how long to wait before the next try; none: that was the last. `random` is in 0..1,
    /// and spreads the waits over the upper half of their span, so that requests that failed together don't come back
    /// together.
    pub fn next(
        &self,
        tally: &mut Tally,
        kind: FailureKind,
        retry_after: Option<Duration>,
        random: f64,
    ) -> Option<Duration> {
        let cause = cause(kind);
        let (count, most) = match cause {
            Cause::Request => (&mut tally.tries, self.max_tries),
            Cause::Refusal => (&mut tally.tries, self.max_tries.min(REFUSALS)),
            Cause::Death => (&mut tally.deaths, self.max_pauses),
            Cause::Worker => (&mut tally.pauses, self.max_pauses),
        };
        *count += 1;
        let count = *count;
        if cause == Cause::Death && tally.guilt >= GUILT && tally.deaths >= self.max_tries.max(FEWEST_DEATHS) {
            return None;
        }
        if kind == FailureKind::CutOff && tally.cut >= Cut::ENOUGH {
            return None;
        }
        let cap = match cause {
            Cause::Worker if kind == FailureKind::CutOff => self.cap.min(CUT_CAP),
            Cause::Death => self.cap.min(WORKER_CAP),
            Cause::Worker if kind == FailureKind::Outage => self.cap.min(WORKER_CAP),
            Cause::Request | Cause::Refusal | Cause::Worker => self.cap,
        };
        (count < most).then(|| self.wait(count, cap, retry_after, random))
    }

    fn wait(&self, times: u32, cap: Duration, retry_after: Option<Duration>, random: f64) -> Duration {
        let factor = if times == 2 { GROWS_AT_FIRST } else { GROWS.saturating_pow(times.saturating_sub(1)) };
        let grown = self.base.saturating_mul(factor).min(cap);
        let spread = grown.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0);
        retry_after.map_or(spread, |asked| asked.max(spread))
    }
}

/// The `error.code` of a request that was given up, where no worker's answer says more.
#[must_use]
pub fn error_code(kind: FailureKind) -> &'static str {
    match kind {
        FailureKind::Timeout => "request_timeout",
        FailureKind::Connection | FailureKind::Unreachable | FailureKind::Local => "worker_unreachable",
        FailureKind::Abandoned | FailureKind::Removed => "worker_lost",
        FailureKind::Status | FailureKind::Busy | FailureKind::NoModel | FailureKind::Refused | FailureKind::Outage => {
            "worker_error"
        }
        FailureKind::BadAnswer => "bad_worker_answer",
        FailureKind::CutOff => "answer_cut_off",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The waits until the end, in milliseconds.
    fn waits(policy: &TryPolicy, tally: &mut Tally, kind: FailureKind) -> Vec<u128> {
        std::iter::from_fn(|| policy.next(tally, kind, None, 1.0).map(|wait| wait.as_millis())).take(2_000).collect()
    }

    #[test]
    fn waits_grow_up_to_the_cap_and_end() {
        let policy = TryPolicy { max_tries: 8, ..TryPolicy::default() };
        let expected = [50, 100, 800, 3_200, 12_800, 30_000, 30_000];
        assert_eq!(waits(&policy, &mut Tally::default(), FailureKind::Status), expected);
        let deaths = waits(&policy, &mut Tally::default(), FailureKind::Connection);
        assert_eq!(deaths[..5], [50, 100, 500, 500, 500], "the worker is waited for anyway");
    }

    #[test]
    fn what_is_the_workers_fault_uses_up_no_try() {
        let (policy, mut tally) = (TryPolicy::default(), Tally::default());
        for kind in [
            FailureKind::Busy,
            FailureKind::Unreachable,
            FailureKind::Removed,
            FailureKind::CutOff,
            FailureKind::Outage,
            FailureKind::Local,
        ] {
            for _ in 0..150 {
                assert!(policy.next(&mut tally, kind, None, 0.0).is_some());
            }
        }
        assert_eq!(waits(&policy, &mut tally, FailureKind::Timeout).len(), 4, "all five tries are left");
        assert_eq!(waits(&policy, &mut tally, FailureKind::Busy).len(), 99, "a thousand pauses, not for ever");
    }

    #[test]
    fn a_try_that_was_the_workers_fault_is_given_back() {
        let (policy, mut tally) = (TryPolicy { max_tries: 2, ..TryPolicy::default() }, Tally::default());
        for _ in 0..10 {
            assert!(policy.next(&mut tally, FailureKind::Status, None, 0.0).is_some());
            tally.refund(1);
        }
        assert_eq!(waits(&policy, &mut tally, FailureKind::Status).len(), 1);
    }

    #[test]
    fn a_refusal_is_the_answer_at_the_second_time() {
        let policy = TryPolicy::default();
        assert_eq!(waits(&policy, &mut Tally::default(), FailureKind::Refused).len(), 1);
        let once = TryPolicy { max_tries: 1, ..policy };
        assert_eq!(waits(&once, &mut Tally::default(), FailureKind::Refused).len(), 0);
    }

    #[test]
    fn only_deaths_of_its_own_end_a_request() {
        for max_tries in [1, 2, 3, 5] {
            let (policy, mut tally) = (TryPolicy { max_tries, ..TryPolicy::default() }, Tally::default());
            for kind in [FailureKind::Connection, FailureKind::Abandoned].repeat(20) {
                assert!(policy.next(&mut tally, kind, None, 0.0).is_some(), "others were there too");
            }
            tally.blame(true);
            assert!(policy.next(&mut tally, FailureKind::Connection, None, 0.0).is_some(), "once may be chance");
            tally.blame(true);
            assert!(policy.next(&mut tally, FailureKind::Connection, None, 0.0).is_none());
        }
        let (policy, mut tally) = (TryPolicy::default(), Tally::default());
        tally.blame(true);
        tally.blame(true);
        assert_eq!(waits(&policy, &mut tally, FailureKind::Connection).len(), 4, "five in all");
        let mut maybe = Tally::default();
        (0..3).for_each(|_| maybe.blame(false));
        assert!(waits(&policy, &mut maybe.clone(), FailureKind::Connection).len() > 100);
        maybe.blame(false);
        assert_eq!(waits(&policy, &mut maybe, FailureKind::Connection).len(), 4);
        assert_eq!(waits(&policy, &mut Tally::default(), FailureKind::Connection).len(), 999, "not for ever");
    }

    #[test]
    fn cut_offs_end_a_request_once_there_is_evidence_against_it() {
        let (policy, mut tally) = (TryPolicy { max_tries: 1, ..TryPolicy::default() }, Tally::default());
        assert_eq!(waits(&policy, &mut tally.clone(), FailureKind::CutOff)[3..6], [3_200, 5_000, 5_000]);
        tally.suspect_cut(Cut::ENOUGH - 1);
        assert!(policy.next(&mut tally, FailureKind::CutOff, None, 0.0).is_some());
        tally.suspect_cut(1);
        assert!(policy.next(&mut tally.clone(), FailureKind::Outage, None, 0.0).is_some(), "that says nothing of it");
        assert!(policy.next(&mut tally.clone(), FailureKind::CutOff, None, 0.0).is_none());
        tally.forgive_cuts();
        assert!(policy.next(&mut tally, FailureKind::CutOff, None, 0.0).is_some());
    }

    proptest! {
        #[test]
        fn a_wish_is_granted_and_the_spread_holds(before in 0u32..3, random in 0.0f64..1.0, asked in 0u64..100) {
            let policy = TryPolicy::default();
            let tally = Tally { tries: before, ..Tally::default() };
            let full = policy.next(&mut tally.clone(), FailureKind::Status, None, 1.0).unwrap();
            let wish = Some(Duration::from_secs(asked));
            let wait = policy.next(&mut tally.clone(), FailureKind::Status, wish, random).unwrap();
            prop_assert!(wait >= Duration::from_secs(asked));
            prop_assert!(wait >= full / 2);
            prop_assert!(wait <= full.max(Duration::from_secs(asked)));
        }
    }
}
