//! Whether a request that failed is tried again, and when: pure.

use std::time::Duration;

use crate::fleet::FailureKind;

/// How often and how patiently requests are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TryPolicy {
    /// Tries in all, 1 or more.
    pub max_tries: u32,
    /// The wait after the first failed try; it doubles with each further one.
    pub base: Duration,
    /// The longest wait.
    pub cap: Duration,
}

impl Default for TryPolicy {
    fn default() -> Self {
        Self { max_tries: 5, base: Duration::from_millis(250), cap: Duration::from_secs(30) }
    }
}

impl TryPolicy {
    /// How long to wait before the next try after `tries` failed ones; none: that was the last. `random` is in 0..1, and
    /// spreads the waits over the upper half of their span, so that requests that failed together don't come back together.
    #[must_use]
    pub fn wait(&self, tries: u32, retry_after: Option<Duration>, random: f64) -> Option<Duration> {
        if tries >= self.max_tries {
            return None;
        }
        let doubled = self.base.saturating_mul(2u32.saturating_pow(tries.saturating_sub(1))).min(self.cap);
        let spread = doubled.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0);
        Some(retry_after.map_or(spread, |asked| asked.max(spread)))
    }
}

/// The `error.code` of a request that was given up, where no worker's answer says more.
#[must_use]
pub fn error_code(kind: FailureKind) -> &'static str {
    match kind {
        FailureKind::Timeout => "request_timeout",
        FailureKind::Connection => "worker_unreachable",
        FailureKind::Abandoned => "worker_lost",
        FailureKind::Status => "worker_error",
        FailureKind::BadAnswer => "bad_worker_answer",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_end() {
        let policy = TryPolicy { max_tries: 10, ..TryPolicy::default() };
        let waits: Vec<_> = (1..=10).map(|tries| policy.wait(tries, None, 1.0).map(|wait| wait.as_millis())).collect();
        let expected = [250, 500, 1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000].map(Some);
        assert_eq!(waits[..9], expected);
        assert_eq!(waits[9], None);
    }

    proptest! {
        #[test]
        fn a_wish_is_granted_and_the_spread_holds(tries in 1u32..4, random in 0.0f64..1.0, asked in 0u64..100) {
            let policy = TryPolicy::default();
            let full = policy.wait(tries, None, 1.0).unwrap();
            let wait = policy.wait(tries, Some(Duration::from_secs(asked)), random).unwrap();
            prop_assert!(wait >= Duration::from_secs(asked));
            prop_assert!(wait >= full / 2);
            prop_assert!(wait <= full.max(Duration::from_secs(asked)));
        }
    }
}
