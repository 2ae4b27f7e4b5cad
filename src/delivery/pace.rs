//! Measures recent throughput. Pure: time is an argument.

use std::time::{Duration, Instant};

/// The length of a window.
pub(super) const HORIZON: Duration = Duration::from_millis(100);

/// Recent amounts, in windows of [`HORIZON`].
#[derive(Default)]
pub(super) struct Pace {
    window: Option<Instant>,
    this: usize,
    before: usize,
}

impl Pace {
    pub(super) fn count(&mut self, now: Instant) {
        let age = self.window.map(|start| now.saturating_duration_since(start));
        match age {
            Some(age) if age < HORIZON => {}
            Some(age) if age < HORIZON * 2 => {
                self.before = std::mem::take(&mut self.this);
                self.window = self.window.map(|start| start + HORIZON);
            }
            Some(_) | None => *self = Self { window: Some(now), this: 0, before: 0 },
        }
        self.this += 1;
    }

    /// The amount of the last window, or of the current one if that is more already.
    pub(super) fn recent(&self, now: Instant) -> usize {
        match self.window.map(|start| now.saturating_duration_since(start)) {
            Some(age) if age < HORIZON => self.this.max(self.before),
            Some(age) if age < HORIZON * 2 => self.this,
            Some(_) | None => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_older_than_two_moments_is_forgotten() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(pace.recent(at(0)), 0);
        for millis in 0..50 {
            pace.count(at(millis));
        }
        assert_eq!([50, 99, 100, 199, 200].map(|millis| pace.recent(at(millis))), [50, 50, 50, 50, 0]);
        pace.count(at(120));
        assert_eq!([120, 199, 200, 299, 300].map(|millis| pace.recent(at(millis))), [50, 50, 1, 1, 0]);
        pace.count(at(900));
        assert_eq!(pace.recent(at(900)), 1);
    }

    proptest! {
        /// Never more than there was within two moments, and at least what there was within half a one.
        #[test]
        fn it_is_about_what_was_done(gaps in proptest::collection::vec(0u64..60, 1..200)) {
            let (mut pace, mut now) = (Pace::default(), Instant::now());
            let mut times = Vec::new();
            for gap in gaps {
                now += Duration::from_millis(gap);
                pace.count(now);
                times.push(now);
                let within = |age: Duration| times.iter().filter(|at| now.duration_since(**at) < age).count();
                prop_assert!(pace.recent(now) <= within(HORIZON * 2));
                prop_assert!(pace.recent(now) * 2 >= within(HORIZON));
            }
        }
    }
}
