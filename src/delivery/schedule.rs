//! When the next attempt is due.

use std::time::{Duration, SystemTime};

use rand::{Rng, RngExt};

/// The longest that a receiver's `Retry-After` is honoured.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(3_600);

/// Exponential backoff: before attempt n+1 waits `base * factor^(n-1)`, at most `cap`, give or take `jitter`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    base: Duration,
    factor: f64,
    cap: Duration,
    jitter: f64,
}

/// Why these numbers are no backoff.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadBackoff {
    /// The first wait is nothing, or longer than the longest.
    #[error("the base must be more than zero and at most the cap")]
    Base,
    /// Waits would shrink.
    #[error("the factor must be a number from 1 to 100")]
    Factor,
    /// A wait could be less than nothing.
    #[error("the jitter must be from 0 to less than 1")]
    Jitter,
}

impl Default for Backoff {
    /// 1, 2, 4, … s, at most an hour, ±20%.
    fn default() -> Self {
        Self { base: Duration::from_secs(1), factor: 2.0, cap: Duration::from_secs(3_600), jitter: 0.2 }
    }
}

impl Backoff {
    /// A backoff of these numbers.
    ///
    /// # Errors
    /// [`BadBackoff`].
    pub fn try_new(base: Duration, factor: f64, cap: Duration, jitter: f64) -> Result<Self, BadBackoff> {
        if base.is_zero() || base > cap {
            return Err(BadBackoff::Base);
        }
        if !(1.0..=100.0).contains(&factor) {
            return Err(BadBackoff::Factor);
        }
        if !(0.0..1.0).contains(&jitter) {
            return Err(BadBackoff::Jitter);
        }
        Ok(Self { base, factor, cap, jitter })
    }

    /// The wait after `attempts` failed attempts, without jitter.
    #[must_use]
    pub fn nominal(&self, attempts: i32) -> Duration {
        let wait = self.base.as_secs_f64() * self.factor.powi(attempts.max(1) - 1);
        // Also where the product is no finite number any more.
        if wait < self.cap.as_secs_f64() { Duration::from_secs_f64(wait) } else { self.cap }
    }

    /// The wait after `attempts` failed attempts. What the receiver asked for wins if it is longer.
    pub fn wait<R: Rng>(&self, attempts: i32, retry_after: Option<Duration>, random: &mut R) -> Duration {
        let spread = random.random_range(-1.0..=1.0) * self.jitter;
        let wait = self.nominal(attempts).mul_f64(1.0 + spread);
        wait.max(retry_after.unwrap_or_default().min(MAX_RETRY_AFTER))
    }

    /// The waits between `max_attempts` attempts, without jitter, when every one fails at once.
    #[must_use]
    pub fn schedule(&self, max_attempts: i32) -> Vec<Duration> {
        (1..max_attempts).map(|attempts| self.nominal(attempts)).collect()
    }

    /// From the first attempt to the last one, without jitter, when every one fails at once: a receiver that is away for
    /// longer than this and the attempts' own time misses the event.
    #[must_use]
    pub fn horizon(&self, max_attempts: i32) -> Duration {
        self.schedule(max_attempts).iter().sum()
    }
}

/// What a `Retry-After` header asks for (RFC 9110, section 10.2.3): seconds, or a date. At most an hour; none if it is
/// neither, or in the past.
#[must_use]
pub fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    let wait = if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than a number can have: a long time.
        value.parse().map_or(MAX_RETRY_AFTER, Duration::from_secs)
    } else {
        httpdate::parse_http_date(value).ok()?.duration_since(now).ok()?
    };
    (!wait.is_zero()).then_some(wait.min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::StdRng};

    use super::*;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn one_two_four_up_to_an_hour() {
        let backoff = Backoff::default();
        assert!(backoff.schedule(1).is_empty());
        assert_eq!(backoff.schedule(3), [seconds(1), seconds(2)]);
        assert_eq!(backoff.horizon(3), seconds(3));
        assert_eq!(backoff.horizon(10), seconds(511));
        assert_eq!(backoff.nominal(12), seconds(2_048));
        for far in [13, 100, 10_000, i32::MAX] {
            assert_eq!(backoff.nominal(far), seconds(3_600));
        }
        assert_eq!(backoff.nominal(0), seconds(1));
    }

    #[test]
    fn nonsense_is_refused() {
        let (one, hour) = (seconds(1), seconds(3_600));
        assert!(Backoff::try_new(one, 1.0, one, 0.0).is_ok());
        assert_eq!(Backoff::try_new(Duration::ZERO, 2.0, hour, 0.2), Err(BadBackoff::Base));
        assert_eq!(Backoff::try_new(hour, 2.0, one, 0.2), Err(BadBackoff::Base));
        for factor in [0.9, f64::NAN, f64::INFINITY, -2.0] {
            assert_eq!(Backoff::try_new(one, factor, hour, 0.2), Err(BadBackoff::Factor));
        }
        for jitter in [-0.1, 1.0, f64::NAN] {
            assert_eq!(Backoff::try_new(one, 2.0, hour, jitter), Err(BadBackoff::Jitter));
        }
    }

    #[test]
    fn retry_after_in_every_form() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (value, expected) in [
            ("1", Some(seconds(1))),
            (" 120 ", Some(seconds(120))),
            ("3600", Some(seconds(3_600))),
            ("3601", Some(seconds(3_600))),
            ("1000000000000000000", Some(seconds(3_600))),
            ("99999999999999999999999999", Some(seconds(3_600))),
            ("0", None),
            ("", None),
            ("-1", None),
            ("+5", None),
            ("1.5", None),
            ("1e18", None),
            ("soon", None),
            ("12 apples", None),
            ("Sun, 06 Nov 1994 08:51:37 GMT", Some(seconds(120))),
            ("Sunday, 06-Nov-94 08:51:37 GMT", Some(seconds(120))),
            ("Sun Nov  6 08:51:37 1994", Some(seconds(120))),
            ("Mon, 07 Nov 1994 08:49:37 GMT", Some(seconds(3_600))),
            ("Sun, 06 Nov 1994 08:49:36 GMT", None),
            ("Sun, 32 Nov 1994 08:49:37 GMT", None),
        ] {
            assert_eq!(retry_after(value, now), expected, "{value:?}");
        }
    }

    #[test]
    fn the_longer_wait_wins() {
        let (backoff, mut random) = (Backoff::default(), StdRng::seed_from_u64(1));
        assert_eq!(backoff.wait(1, Some(seconds(90)), &mut random), seconds(90));
        assert_eq!(backoff.wait(1, Some(seconds(1_000_000)), &mut random), seconds(3_600));
        assert!(backoff.wait(8, Some(seconds(1)), &mut random) >= seconds(102));
    }

    proptest! {
        #[test]
        fn waits_stay_within_their_jitter(seed: u64, attempts in 1i32..40, asked in proptest::option::of(0u64..10_000)) {
            let backoff = Backoff::default();
            let asked = asked.map(seconds);
            let wait = |seed| backoff.wait(attempts, asked, &mut StdRng::seed_from_u64(seed));
            let nominal = backoff.nominal(attempts);
            let floor = asked.unwrap_or_default().min(MAX_RETRY_AFTER);
            prop_assert!(wait(seed) >= nominal.mul_f64(0.799).max(floor));
            prop_assert!(wait(seed) <= nominal.mul_f64(1.201).max(floor));
            prop_assert_eq!(wait(seed), wait(seed), "the same seed gives the same wait");
        }

        #[test]
        fn any_text_is_a_retry_after_or_none(value: String) {
            let wait = retry_after(&value, SystemTime::now());
            prop_assert!(wait.is_none_or(|wait| !wait.is_zero() && wait <= MAX_RETRY_AFTER));
        }
    }
}
