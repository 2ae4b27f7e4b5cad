//! Finds the limit of a worker without metrics: changes it a little and keeps the change if throughput improves.

use std::time::Duration;

use super::Seen;

/// The gain in throughput for which doubling is kept.
const WORTH_DOUBLING: f64 = 1.05;
/// The gain in throughput for which a tenth more is kept, and the loss at which a tenth less is undone.
const WORTH_MORE: f64 = 1.04;
const WORTH_LESS: f64 = 0.97;
/// The first step of a trial; it doubles after each step that is kept.
const STEP: f64 = 0.1;
const LONGEST_UP: f64 = 1.0;
const LONGEST_DOWN: f64 = 0.5;
/// Measurements between two trials.
const HOLD: u32 = 6;
/// A throughput lower by this factor means another worker or another load: the limit must be found again.
const COLLAPSE: f64 = 0.67;
/// The fewest answers and the shortest time of a measurement.
const FEWEST: u32 = 16;
const SHORTEST: Duration = Duration::from_millis(200);

/// The current trial.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trial {
    /// Doubles repeatedly.
    Double,
    /// No trial for this many further measurements.
    Hold(u32),
    More(f64),
    Less(f64),
}

/// The search for the limit of a worker without metrics.
#[derive(Clone, Debug)]
pub(super) struct Climb {
    trial: Trial,
    /// Whether the last trial was to send more.
    up_last: bool,
    /// The best limit so far and its throughput, in requests per second.
    best: Option<(u32, f64)>,
    /// Requests sent under the previous limit whose answers are still to come.
    stale: Option<u32>,
    answered: u32,
    /// The sum of their latencies, in seconds.
    latencies: f64,
    since: Duration,
}

impl Default for Climb {
    fn default() -> Self {
        Self {
            trial: Trial::Double,
            up_last: true,
            best: None,
            stale: None,
            answered: 0,
            latencies: 0.0,
            since: Duration::ZERO,
        }
    }
}

impl Climb {
    /// Returns the limit from now on, at most `most`.
    pub(super) fn look(&mut self, now: Duration, seen: &Seen, limit: u32, most: u32) -> u32 {
        let stale = self.stale.get_or_insert_with(|| limit.max(seen.in_flight));
        if *stale > 0 {
            *stale = stale.saturating_sub(seen.answered);
            self.since = now;
            return limit;
        }
        if !seen.full {
            // The limit was not reached, so the measurement says nothing about it.
            (self.answered, self.latencies, self.since) = (0, 0.0, now);
            return limit;
        }
        self.answered += seen.answered;
        self.latencies += f64::from(seen.answered) * seen.latency.as_secs_f64();
        if self.answered < limit.max(FEWEST) || now.saturating_sub(self.since) < SHORTEST {
            return limit;
        }
        let throughput = f64::from(limit) / (self.latencies / f64::from(self.answered)).max(1e-6);
        let next = self.measured(limit, throughput).clamp(1, most.max(1));
        (self.stale, self.answered, self.latencies) = (None, 0, 0.0);
        next
    }

    fn measured(&mut self, limit: u32, throughput: f64) -> u32 {
        let Some((best, best_throughput)) = self.best else {
            self.best = Some((limit, throughput));
            return self.next(limit);
        };
        let gain = throughput / best_throughput.max(1e-9);
        let kept = match self.trial {
            Trial::Double => limit > best && gain >= WORTH_DOUBLING,
            Trial::More(_) => limit > best && gain >= WORTH_MORE,
            Trial::Less(_) => limit < best && gain >= WORTH_LESS,
            Trial::Hold(left) => {
                if gain < COLLAPSE {
                    self.best = Some((limit, throughput));
                    self.trial = Trial::Less(LONGEST_DOWN);
                } else {
                    self.best = Some((limit, best_throughput + (throughput - best_throughput) / 3.0));
                    self.trial = match left.checked_sub(1) {
                        Some(left) => Trial::Hold(left),
                        None if self.up_last => Trial::Less(STEP),
                        None => Trial::More(STEP),
                    };
                }
                return self.next(limit);
            }
        };
        if kept {
            self.best = Some((limit, throughput));
            self.trial = match self.trial {
                Trial::More(step) => Trial::More((2.0 * step).min(LONGEST_UP)),
                Trial::Less(step) => Trial::Less((2.0 * step).min(LONGEST_DOWN)),
                same @ (Trial::Double | Trial::Hold(_)) => same,
            };
            return self.next(limit);
        }
        self.up_last = !matches!(self.trial, Trial::Less(_));
        // A failed long step says little about a short one.
        self.trial = match self.trial {
            Trial::More(step) if step > STEP => Trial::More(STEP),
            Trial::Less(step) if step > STEP => Trial::Less(STEP),
            // The last doubling that was kept may have gone past what was needed.
            Trial::Double => Trial::Less(LONGEST_DOWN / 2.0),
            Trial::Hold(_) | Trial::More(_) | Trial::Less(_) => Trial::Hold(HOLD),
        };
        self.next(best)
    }

    fn next(&self, from: u32) -> u32 {
        let scaled = |factor: f64| super::round(f64::from(from) * factor);
        match self.trial {
            Trial::Double => from.saturating_mul(2),
            Trial::Hold(_) => from,
            Trial::More(step) => scaled(1.0 + step).max(from + 1),
            Trial::Less(step) => scaled(1.0 - step).min(from.saturating_sub(1)),
        }
    }
}
