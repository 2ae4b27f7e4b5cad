//! How slow an upload may be. It holds one of the places of [`super::Limiter`], for which others may be waiting.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// The server aborts an upload after waiting this long for its bytes: it also holds temporary files.
pub const IDLE: Duration = Duration::from_secs(300);
/// The limit while other uploads wait for a place. It is well below the 30 s for which they wait.
pub const CROWDED: Duration = Duration::from_secs(10);
/// Bytes that make up for a second's wait. Every network is faster than this, so only stalled uploads are aborted.
pub const LEAST: u64 = 1024;
/// The longest that an upload may take, at any speed.
pub const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest time between two checks.
pub const LOOK: Duration = Duration::from_secs(1);

/// How long an upload has kept the server waiting, less what it has sent. Pure: the caller measures the time, and
/// counts only waits for the client, not the client's waits for the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pace {
    waited: Duration,
}

impl Pace {
    /// Counts a wait, and the bytes that came after it.
    pub fn came(&mut self, waited: Duration, bytes: u64) {
        let worth = Duration::from_secs(bytes / LEAST) + Duration::from_secs(bytes % LEAST) / LEAST as u32;
        self.waited = (self.waited + waited).saturating_sub(worth);
    }

    /// Whether the upload is to be aborted. `crowded`: other uploads wait for a place.
    #[must_use]
    pub fn is_over(self, crowded: bool) -> bool {
        self.waited >= if crowded { CROWDED } else { IDLE }
    }
}

/// Counts the received bytes of a request's body, also those of an unfinished message. An extension of the request.
#[derive(Clone, Debug, Default)]
pub struct Received(Arc<AtomicU64>);

impl Received {
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(crate) fn of(bytes: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes)))
    }

    /// Counts more bytes.
    pub fn add(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Seconds until an upload of so many bytes a second is given up, if it is within an hour.
    fn given_up(bytes: u64, crowded: bool) -> Option<u64> {
        let mut pace = Pace::default();
        (1..3_600).find(|_| {
            pace.came(SECOND, bytes);
            pace.is_over(crowded)
        })
    }

    #[test]
    fn who_hardly_sends_is_given_up_and_who_sends_is_not() {
        assert_eq!(given_up(0, false), Some(300));
        assert_eq!(given_up(1, false), Some(301));
        assert_eq!(given_up(512, false), Some(600));
        assert_eq!(given_up(1_024, false), None);
        assert_eq!(given_up(0, true), Some(10));
        assert_eq!(given_up(1, true), Some(11));
        assert_eq!(given_up(1_024, true), None);
    }

    #[test]
    fn a_pause_is_made_good_by_what_comes_after_it() {
        let mut pace = Pace::default();
        pace.came(Duration::from_secs(299), 0);
        pace.came(SECOND, 1024 * 1024);
        assert_eq!(pace, Pace::default());
        // But nothing is saved up for later.
        pace.came(Duration::from_secs(300), 0);
        assert!(pace.is_over(false));
    }

    proptest! {
        #[test]
        fn never_given_up_above_the_least_rate(steps in proptest::collection::vec((1u64..9_000, 0u64..5_000), 1..100)) {
            let mut pace = Pace::default();
            for (millis, more) in steps {
                pace.came(Duration::from_millis(millis), millis * LEAST / 1_000 + 1 + more);
                prop_assert!(!pace.is_over(true));
            }
        }
    }
}
