//! Whether a request that failed is tried again, when, and in whose company: pure.
//!
//! A failure has one of three causes. What the request itself may have caused (a time-out, a 500, nonsense) counts as a
//! try. What the worker says of itself (429, 503 with `Retry-After`, nobody there) counts as a pause: it uses up no try.
//! And when a worker dies, every request that it had is a suspect, though at most one of them killed it: a request that
//! was there twice is from then on sent alone, so that the next death, if there is one, is its own, and no other's.

use std::time::Duration;

use crate::fleet::FailureKind;

/// Deaths of workers that a request may have been there for, in the company of others, before it is sent alone.
const DEATHS_IN_COMPANY: u32 = 2;

/// How often and how patiently requests are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TryPolicy {
    /// Tries in all, 1 or more.
    pub max_tries: u32,
    /// The wait after the first failed try; it doubles with each further one.
    pub base: Duration,
    /// The longest wait.
    pub cap: Duration,
    /// How often a request may meet a worker that takes none, before that is its answer. With the default waits a
    /// thousand times last six hours or more; a batch's window may close before.
    pub max_pauses: u32,
}

impl Default for TryPolicy {
    fn default() -> Self {
        Self { max_tries: 5, base: Duration::from_millis(250), cap: Duration::from_secs(30), max_pauses: 1_000 }
    }
}

/// What a request has been through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    tries: u32,
    deaths: u32,
    pauses: u32,
}

/// Whose failure it may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// The request's own.
    Request,
    /// The worker died, of this request or of another one.
    Death,
    /// The worker takes no requests, or never had this one.
    Worker,
}

fn cause(kind: FailureKind) -> Cause {
    match kind {
        FailureKind::Timeout | FailureKind::Status | FailureKind::BadAnswer | FailureKind::NoModel => Cause::Request,
        FailureKind::Connection | FailureKind::Abandoned => Cause::Death,
        FailureKind::Busy | FailureKind::Unreachable | FailureKind::Removed | FailureKind::CutOff => Cause::Worker,
    }
}

impl Tally {
    /// How often the request was sent, or was to be.
    #[must_use]
    pub fn times(self) -> u32 {
        self.tries + self.deaths + self.pauses
    }

    /// Whether there is something to remember of it.
    #[must_use]
    pub fn counts(self) -> bool {
        self.tries + self.deaths > 0
    }

    /// Whether the request must have its worker for itself.
    #[must_use]
    pub fn alone(self) -> bool {
        self.deaths >= DEATHS_IN_COMPANY
    }
}

impl TryPolicy {
    /// Counts a failure. Returns how long to wait before the next try; none: that was the last. `random` is in 0..1, and
    /// spreads the waits over the upper half of their span, so that requests that failed together don't come back together.
    pub fn next(
        &self,
        tally: &mut Tally,
        kind: FailureKind,
        retry_after: Option<Duration>,
        random: f64,
    ) -> Option<Duration> {
        // One death alone must follow those in company before the request is given up.
        let (count, most) = match cause(kind) {
            Cause::Request => (&mut tally.tries, self.max_tries),
            Cause::Death => (&mut tally.deaths, self.max_tries.max(DEATHS_IN_COMPANY + 1)),
            Cause::Worker => (&mut tally.pauses, self.max_pauses),
        };
        *count += 1;
        (*count < most).then(|| self.wait(*count, retry_after, random))
    }

    fn wait(&self, times: u32, retry_after: Option<Duration>, random: f64) -> Duration {
        let doubled = self.base.saturating_mul(2u32.saturating_pow(times.saturating_sub(1))).min(self.cap);
        let spread = doubled.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0);
        retry_after.map_or(spread, |asked| asked.max(spread))
    }
}

/// The `error.code` of a request that was given up, where no worker's answer says more.
#[must_use]
pub fn error_code(kind: FailureKind) -> &'static str {
    match kind {
        FailureKind::Timeout => "request_timeout",
        FailureKind::Connection | FailureKind::Unreachable => "worker_unreachable",
        FailureKind::Abandoned | FailureKind::Removed => "worker_lost",
        FailureKind::Status | FailureKind::Busy | FailureKind::NoModel => "worker_error",
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
    fn waits_double_up_to_the_cap_and_end() {
        let policy = TryPolicy { max_tries: 10, ..TryPolicy::default() };
        let expected = [250, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000];
        assert_eq!(waits(&policy, &mut Tally::default(), FailureKind::Status), expected);
    }

    #[test]
    fn a_worker_that_takes_no_requests_uses_up_no_try() {
        let (policy, mut tally) = (TryPolicy::default(), Tally::default());
        for kind in [FailureKind::Busy, FailureKind::Unreachable, FailureKind::Removed, FailureKind::CutOff] {
            for _ in 0..225 {
                assert!(policy.next(&mut tally, kind, None, 0.0).is_some());
            }
        }
        assert!(!tally.alone());
        assert_eq!(waits(&policy, &mut tally, FailureKind::Timeout).len(), 4, "all five tries are left");
        assert_eq!(waits(&policy, &mut tally, FailureKind::Busy).len(), 99, "a thousand pauses, not for ever");
    }

    #[test]
    fn who_was_there_at_two_deaths_goes_alone_and_is_given_up_only_then() {
        for max_tries in [1, 2, 3, 5] {
            let (policy, mut tally) = (TryPolicy { max_tries, ..TryPolicy::default() }, Tally::default());
            assert!(policy.next(&mut tally, FailureKind::Connection, None, 0.0).is_some());
            assert!(!tally.alone(), "others were there too");
            assert!(policy.next(&mut tally, FailureKind::Abandoned, None, 0.0).is_some());
            assert!(tally.alone());
            assert_eq!(waits(&policy, &mut tally, FailureKind::Connection).len() + 3, 3.max(max_tries) as usize);
        }
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
