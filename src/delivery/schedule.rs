//! The waits between the attempts of a webhook.

use std::time::{Duration, SystemTime};

use rand::{Rng, RngExt};

/// The longest `Retry-After` of a receiver that is honoured.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(3_600);

/// The default waits: about 16 hours in all.
pub const DEFAULT_WAITS: [Duration; 9] = [
    Duration::from_secs(5),
    Duration::from_secs(30),
    Duration::from_secs(2 * 60),
    Duration::from_secs(10 * 60),
    Duration::from_secs(30 * 60),
    Duration::from_secs(3_600),
    Duration::from_secs(2 * 3_600),
    Duration::from_secs(4 * 3_600),
    Duration::from_secs(8 * 3_600),
];
/// The shortest and the longest wait in a schedule.
pub const WAIT_RANGE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_secs(7 * 24 * 3_600));
/// The fraction by which a wait is shortened or lengthened at random, so that webhooks that failed together are not
/// retried together.
const JITTER: f64 = 0.2;

/// The waits between the attempts of a delivery, without jitter. If there are more attempts, the last wait is repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    waits: Vec<Duration>,
}

/// Why waits are not a valid schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadSchedule {
    /// There are no waits.
    #[error("a schedule has at least one wait")]
    Empty,
    /// A wait is outside of [`WAIT_RANGE`].
    #[error("a wait is 1 ms to 7 days")]
    Range,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { waits: DEFAULT_WAITS.to_vec() }
    }
}

impl Schedule {
    /// Makes a schedule of these waits.
    ///
    /// # Errors
    /// [`BadSchedule`].
    pub fn try_new(waits: Vec<Duration>) -> Result<Self, BadSchedule> {
        let (least, most) = WAIT_RANGE;
        if waits.is_empty() {
            return Err(BadSchedule::Empty);
        }
        if !waits.iter().all(|wait| (least..=most).contains(wait)) {
            return Err(BadSchedule::Range);
        }
        Ok(Self { waits })
    }

    /// The wait after `attempts` failed attempts, without jitter.
    #[must_use]
    pub fn nominal(&self, attempts: i32) -> Duration {
        let at = usize::try_from(attempts.max(1) - 1).unwrap_or(0);
        self.waits.get(at).or_else(|| self.waits.last()).copied().unwrap_or_default()
    }

    /// The wait after `attempts` failed attempts, with jitter, or the receiver's `Retry-After` if that is longer.
    pub fn wait<R: Rng>(&self, attempts: i32, retry_after: Option<Duration>, random: &mut R) -> Duration {
        let spread = random.random_range(-1.0..=1.0) * JITTER;
        let wait = self.nominal(attempts).mul_f64(1.0 + spread);
        wait.max(retry_after.unwrap_or_default().min(MAX_RETRY_AFTER))
    }

    /// The waits between `max_attempts` attempts, without jitter, if each attempt fails at once.
    #[must_use]
    pub fn waits(&self, max_attempts: i32) -> Vec<Duration> {
        (1..max_attempts).map(|attempts| self.nominal(attempts)).collect()
    }

    /// The time from the first attempt to the last, without jitter, if each attempt fails at once. A receiver that is
    /// down for longer than this plus the attempts' own time misses the event.
    #[must_use]
    pub fn horizon(&self, max_attempts: i32) -> Duration {
        self.waits(max_attempts).iter().sum()
    }
}

/// The wait that a `Retry-After` header asks for (RFC 9110, section 10.2.3), in seconds or as a date; at most an hour.
/// `None` if it is neither or in the past.
#[must_use]
pub fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    let wait = if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit into a number: the longest wait.
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
    fn ten_attempts_over_some_sixteen_hours() {
        let schedule = Schedule::default();
        assert!(schedule.waits(1).is_empty());
        let waits = [5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, 28_800].map(seconds);
        assert_eq!(schedule.waits(10), waits);
        assert_eq!(schedule.horizon(10), seconds(56_555));
        assert_eq!(schedule.horizon(3), seconds(35));
        for far in [10, 100, i32::MAX] {
            assert_eq!(schedule.nominal(far), seconds(28_800));
        }
        assert_eq!((schedule.nominal(0), schedule.nominal(i32::MIN + 1)), (seconds(5), seconds(5)));
    }

    #[test]
    fn nonsense_is_refused() {
        let (least, most) = WAIT_RANGE;
        assert!(Schedule::try_new(vec![least, most, seconds(1)]).is_ok());
        assert_eq!(Schedule::try_new(Vec::new()), Err(BadSchedule::Empty));
        for bad in [Duration::ZERO, least / 2, most + least, Duration::MAX] {
            assert_eq!(Schedule::try_new(vec![seconds(1), bad]), Err(BadSchedule::Range));
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
        let (schedule, mut random) = (Schedule::default(), StdRng::seed_from_u64(1));
        assert_eq!(schedule.wait(1, Some(seconds(90)), &mut random), seconds(90));
        assert_eq!(schedule.wait(1, Some(seconds(1_000_000)), &mut random), seconds(3_600));
        assert!(schedule.wait(4, Some(seconds(1)), &mut random) >= seconds(480));
    }

    proptest! {
        #[test]
        fn waits_stay_within_their_jitter(seed: u64, attempts in 1i32..40, asked in proptest::option::of(0u64..10_000)) {
            let schedule = Schedule::default();
            let asked = asked.map(seconds);
            let wait = |seed| schedule.wait(attempts, asked, &mut StdRng::seed_from_u64(seed));
            let nominal = schedule.nominal(attempts);
            let floor = asked.unwrap_or_default().min(MAX_RETRY_AFTER);
            prop_assert!(wait(seed) >= nominal.mul_f64(0.799).max(floor));
            prop_assert!(wait(seed) <= nominal.mul_f64(1.201).max(floor));
            prop_assert_eq!(wait(seed), wait(seed), "the same seed gives the same wait");
        }

        /// A receiver that is away for a minute, from whenever on, gets the event by the default schedule, however the waits
        /// fall out.
        #[test]
        fn an_outage_of_a_minute_is_survived(seed: u64, began in 0u64..60) {
            let (schedule, mut random) = (Schedule::default(), StdRng::seed_from_u64(seed));
            let (mut at, back) = (seconds(began), seconds(60));
            let mut attempts = 1;
            while at < back {
                prop_assert!(attempts < 4, "{attempts} attempts are used up within a minute");
                at += schedule.wait(attempts, None, &mut random);
                attempts += 1;
            }
        }

        #[test]
        fn any_text_is_a_retry_after_or_none(value: String) {
            let wait = retry_after(&value, SystemTime::now());
            prop_assert!(wait.is_none_or(|wait| !wait.is_zero() && wait <= MAX_RETRY_AFTER));
        }
    }
}
