//! The speed of a batch, computed from what became durable when.
//!
//! Durable counts are a step function of time: between two samples nothing happened. So the speed over the last
//! [`SPAN`] is exactly what was counted at its end less what was counted at its start, over its length.

use std::{collections::VecDeque, time::Duration};

/// The time over which speed is measured: several checkpoints (one every 2 s at most), and short enough to show a
/// stall.
pub const SPAN: Duration = Duration::from_secs(10);
/// The shortest time over which speed is measured, because two checkpoints close together would give any number.
const LEAST_SPAN: Duration = Duration::from_secs(1);
/// Samples closer than this are merged; with [`SPAN`] this bounds how many are kept.
const GRAIN: Duration = Duration::from_millis(100);
/// The longest ETA that is reported.
const LONGEST_ETA: Duration = Duration::from_secs(365 * 24 * 3_600);

/// The speed of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// Requests finished per second, successful or not.
    pub requests_per_second: f64,
    /// Tokens generated per second.
    pub output_tokens_per_second: f64,
}

impl Rates {
    /// Whether anything has ended in the last [`SPAN`].
    #[must_use]
    pub fn moving(&self) -> bool {
        self.requests_per_second > 0.0
    }

    /// The time that `remaining` requests take at this speed. `None` while nothing finishes.
    #[must_use]
    pub fn eta(&self, remaining: i64) -> Option<Duration> {
        if !self.moving() {
            return None;
        }
        #[allow(clippy::cast_precision_loss)] // exact below 2^53 requests
        let seconds = remaining.max(0) as f64 / self.requests_per_second;
        Some(Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_ETA).min(LONGEST_ETA))
    }
}

/// The durable counts at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    at: Duration,
    requests: i64,
    output_tokens: i64,
}

/// The last seconds of one batch. Times are from any steady clock, always the same one.
#[derive(Clone, Debug, Default)]
pub struct Window {
    /// Oldest first. All but the first are younger than [`SPAN`]; the first says what was durable at its start.
    samples: VecDeque<Sample>,
}

impl Window {
    /// Adds what had become durable by `at`. If counts have decreased (results that their disk lost run again), the
    /// measurement starts again.
    pub fn record(&mut self, at: Duration, requests: i64, output_tokens: i64) {
        let new = Sample { at, requests, output_tokens };
        match self.samples.back() {
            Some(last) if requests < last.requests || output_tokens < last.output_tokens => self.samples.clear(),
            Some(last) if (last.requests, last.output_tokens) == (requests, output_tokens) => return,
            _ => {}
        }
        let close = self.samples.len() > 1 && self.samples.back().is_some_and(|last| at < last.at + GRAIN);
        if close && let Some(last) = self.samples.back_mut() {
            (last.requests, last.output_tokens) = (requests, output_tokens);
        } else {
            self.samples.push_back(new);
        }
        self.forget(at);
    }

    /// The speed over the [`SPAN`] before `now`, or since the first sample if that is later.
    #[must_use]
    pub fn rates(&self, now: Duration) -> Rates {
        let start = now.saturating_sub(SPAN);
        let (Some(first), Some(last)) = (self.samples.front(), self.samples.back()) else { return Rates::default() };
        let base = self.samples.iter().rev().find(|sample| sample.at <= start).unwrap_or(first);
        let span = now.saturating_sub(base.at.max(start)).max(LEAST_SPAN).as_secs_f64();
        #[allow(clippy::cast_precision_loss)] // exact below 2^53
        let per_second = |count: i64| count as f64 / span;
        Rates {
            requests_per_second: per_second(last.requests - base.requests),
            output_tokens_per_second: per_second(last.output_tokens - base.output_tokens),
        }
    }

    /// Whether nothing has changed for several [`SPAN`]s, so that a new window would give the same result.
    #[must_use]
    pub fn is_stale(&self, now: Duration) -> bool {
        self.samples.back().is_none_or(|last| last.at + 6 * SPAN < now)
    }

    /// Drops samples that are no longer needed.
    fn forget(&mut self, now: Duration) {
        let start = now.saturating_sub(SPAN);
        while self.samples.get(1).is_some_and(|second| second.at <= start) {
            self.samples.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn millis(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    #[test]
    fn a_steady_stream_has_its_speed() {
        let mut window = Window::default();
        for second in 0..60 {
            window.record(Duration::from_secs(second), second as i64 * 50, second as i64 * 1_000);
        }
        let rates = window.rates(Duration::from_secs(59));
        assert_eq!(rates, Rates { requests_per_second: 50.0, output_tokens_per_second: 1_000.0 });
        assert_eq!(rates.eta(500), Some(Duration::from_secs(10)));
    }

    #[test]
    fn a_stall_shows_and_ends() {
        let mut window = Window::default();
        window.record(millis(0), 0, 0);
        window.record(millis(2_000), 100, 0);
        assert!(window.rates(millis(11_000)).moving());
        assert!(!window.rates(millis(12_001)).moving());
        assert_eq!(window.rates(millis(12_001)).eta(5), None);
        window.record(millis(60_000), 200, 0);
        assert_eq!(window.rates(millis(60_000)).requests_per_second, 10.0);
    }

    #[test]
    fn the_first_checkpoint_is_not_endless_speed() {
        let mut window = Window::default();
        window.record(millis(0), 0, 0);
        window.record(millis(1), 500, 0);
        assert_eq!(window.rates(millis(1)).requests_per_second, 500.0);
        assert_eq!(Rates { requests_per_second: 1e-300, ..Rates::default() }.eta(i64::MAX), Some(LONGEST_ETA));
    }

    #[test]
    fn lost_results_are_not_negative_speed() {
        let mut window = Window::default();
        window.record(millis(0), 500, 9);
        window.record(millis(1_000), 400, 9);
        assert_eq!(window.rates(millis(1_500)), Rates::default());
        window.record(millis(2_000), 410, 9);
        assert_eq!(window.rates(millis(2_000)).requests_per_second, 10.0);
    }

    proptest! {
        /// Against the definition: counts at the end less counts at the start, whatever the samples.
        #[test]
        fn it_is_the_step_function(steps in proptest::collection::vec((1u64..4_000, 0i64..500), 1..200), later in 0u64..15_000) {
            let (mut window, mut all, mut at, mut count) = (Window::default(), Vec::new(), 0, 0);
            for (wait, more) in steps {
                (at, count) = (at + wait.max(100), count + more);
                window.record(millis(at), count, 3 * count);
                all.push((at, count));
                prop_assert!(window.samples.len() <= 103);
            }
            let now = at + later;
            let start = now.saturating_sub(10_000).max(all[0].0);
            let counted = |by: u64| all.iter().rev().find(|sample| sample.0 <= by).map_or(all[0].1, |sample| sample.1);
            let expected = (counted(now) - counted(start)) as f64 / ((now - start).max(1_000) as f64 / 1_000.0);
            let rates = window.rates(millis(now));
            prop_assert!((rates.requests_per_second - expected).abs() < 1e-6, "{rates:?} {expected}");
            prop_assert!((rates.output_tokens_per_second - 3.0 * expected).abs() < 1e-6);
        }

        #[test]
        fn it_is_never_negative_and_always_bounded(samples in proptest::collection::vec((0u64..50, -5i64..20, -5i64..20), 0..2_000)) {
            let (mut window, mut at, mut requests, mut tokens) = (Window::default(), 0, 0i64, 0i64);
            for (wait, more, more_tokens) in samples {
                (at, requests, tokens) = (at + wait, (requests + more).max(0), (tokens + more_tokens).max(0));
                window.record(millis(at), requests, tokens);
                let rates = window.rates(millis(at));
                prop_assert!(rates.requests_per_second >= 0.0 && rates.requests_per_second.is_finite());
                prop_assert!(rates.output_tokens_per_second >= 0.0 && rates.output_tokens_per_second.is_finite());
                prop_assert!(window.samples.len() <= 103);
            }
        }
    }
}
