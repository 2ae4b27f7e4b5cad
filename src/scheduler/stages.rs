//! Measures how long each stage of some requests takes.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use strum::EnumCount;

/// One request in this many is measured, so that the hot path reads no clocks.
const SAMPLE: u32 = 64;

/// The number of measurements in a stage's mean: seconds at full speed, and still meaningful where little is sent.
const MEMORY: u32 = 100;

const SECONDS: &str = "tidemill_request_stage_seconds";

/// A stage of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumCount, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Stage {
    /// From the start of its segment's run until a worker has a slot for it.
    Queue,
    /// From the slot to the HTTP client.
    Dispatch,
    /// From there to the whole answer.
    Worker,
    /// From the first answer of a part until the part is durable.
    Persist,
}

/// The measurements of this node's runs. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Stages {
    means: Arc<Mutex<[Mean; Stage::COUNT]>>,
}

impl Stages {
    /// Records how long a stage took.
    pub(super) fn took(&self, stage: Stage, time: Duration) {
        metrics::histogram!(SECONDS, "stage" => <&str>::from(stage)).record(time.as_secs_f64());
        self.means.lock()[stage as usize].add(time);
    }

    /// The mean of the last hundred or so measurements of a stage. `None` before the first.
    #[must_use]
    pub fn mean(&self, stage: Stage) -> Option<Duration> {
        self.means.lock()[stage as usize].value
    }
}

/// A moving mean: of all values, and as soon as there are more, of about the last [`MEMORY`].
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    added: u32,
    value: Option<Duration>,
}

impl Mean {
    fn add(&mut self, time: Duration) {
        self.added = (self.added + 1).min(MEMORY);
        let weight = 1.0 / f64::from(self.added);
        let known = self.value.unwrap_or(time);
        self.value = Some(known.mul_f64(1.0 - weight) + time.mul_f64(weight));
    }
}

/// Whether the request at this index of its segment is measured.
pub(super) fn is_sampled(index: u32) -> bool {
    index.is_multiple_of(SAMPLE)
}

pub(super) fn describe_metrics() {
    let what = "how long a stage took: queue, dispatch and worker of one request in 64, persist of every part";
    metrics::describe_histogram!(SECONDS, metrics::Unit::Seconds, what);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_is_that_of_the_last_ones() {
        let stages = Stages::default();
        assert_eq!(stages.mean(Stage::Queue), None);
        for millis in [10, 20, 30] {
            stages.took(Stage::Queue, Duration::from_millis(millis));
        }
        let mean = || stages.mean(Stage::Queue).unwrap();
        assert!(mean().abs_diff(Duration::from_millis(20)) < Duration::from_micros(1), "{:?}", mean());
        for _ in 0..1_000 {
            stages.took(Stage::Queue, Duration::from_secs(5));
        }
        assert!(mean().abs_diff(Duration::from_secs(5)) < Duration::from_millis(1), "{:?}", mean());
        assert!([Stage::Dispatch, Stage::Worker, Stage::Persist].iter().all(|stage| stages.mean(*stage).is_none()));
    }
}
