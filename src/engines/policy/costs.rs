//! What swaps cost and how fast models are: guessed first, then learned.

use std::collections::BTreeMap;

use super::ModelName;

/// The weight of the newest observation in the moving average.
const NEWEST: f64 = 0.3;
/// Lines per second of a model that has not run yet: a typical chat model of some billion parameters.
const LINES_PER_SECOND: f64 = 5.0;
/// The slowest rate that is believed, so that the work of a model is always finite.
const SLOWEST: f64 = 1e-3;

/// A part of a swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// From the start of the process until it serves.
    Start,
    /// From sleep until it serves.
    Wake,
    /// From the first request not sent to it until it has none.
    Drain,
    /// Until it sleeps and the memory is back.
    Sleep,
    /// Until no process of it is left and the memory is back.
    Stop,
}

impl Phase {
    /// Seconds of a model that has not been seen in this phase.
    fn guess(self) -> f64 {
        match self {
            Self::Start => 120.0,
            Self::Drain => 20.0,
            Self::Wake | Self::Sleep => 10.0,
            Self::Stop => 5.0,
        }
    }
}

/// What is known about each model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Costs {
    seconds: BTreeMap<(ModelName, Phase), f64>,
    rates: BTreeMap<ModelName, f64>,
}

impl Costs {
    /// Takes in what a phase took.
    pub fn took(&mut self, model: &ModelName, phase: Phase, seconds: f64) {
        if seconds.is_finite() && seconds >= 0.0 {
            let known = self.seconds.entry((model.clone(), phase)).or_insert(seconds);
            *known += NEWEST * (seconds - *known);
        }
    }

    /// Takes in how many lines per second one engine of a model did while it was full.
    pub fn ran_at(&mut self, model: &ModelName, lines_per_second: f64) {
        if lines_per_second.is_finite() && lines_per_second > 0.0 {
            let known = self.rates.entry(model.clone()).or_insert(lines_per_second);
            *known += NEWEST * (lines_per_second - *known);
        }
    }

    /// The seconds that a phase takes.
    #[must_use]
    pub fn seconds(&self, model: &ModelName, phase: Phase) -> f64 {
        self.seconds.get(&(model.clone(), phase)).copied().unwrap_or_else(|| phase.guess())
    }

    /// The lines per second of one engine.
    #[must_use]
    pub fn rate(&self, model: &ModelName) -> f64 {
        self.rates.get(model).copied().unwrap_or(LINES_PER_SECOND).max(SLOWEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_observation_counts_fully_and_later_ones_by_their_weight() {
        let (mut costs, model) = (Costs::default(), ModelName::from("m"));
        assert_eq!((costs.seconds(&model, Phase::Start), costs.rate(&model)), (120.0, LINES_PER_SECOND));
        costs.took(&model, Phase::Start, 40.0);
        assert_eq!(costs.seconds(&model, Phase::Start), 40.0);
        costs.took(&model, Phase::Start, 50.0);
        assert_eq!(costs.seconds(&model, Phase::Start), 43.0);
        assert_eq!(costs.seconds(&model, Phase::Wake), 10.0, "phases are apart");
        costs.ran_at(&model, 100.0);
        costs.ran_at(&model, 0.0);
        costs.ran_at(&model, f64::NAN);
        costs.took(&model, Phase::Start, f64::INFINITY);
        assert_eq!((costs.seconds(&model, Phase::Start), costs.rate(&model)), (43.0, 100.0), "nonsense is not learned");
    }
}
