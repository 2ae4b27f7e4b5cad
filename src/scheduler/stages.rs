//! Where a request's time goes: of some requests, how long each stage took.

use std::time::Duration;

/// One request in so many is measured: the hot path stays free of clocks.
const SAMPLE: u32 = 64;

const SECONDS: &str = "tidemill_request_stage_seconds";

/// A stage of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// From the start of its segment's run until a worker has a slot for it.
    Queue,
    /// From the slot to the HTTP client.
    Dispatch,
    /// From there to the whole answer.
    Worker,
    /// From the first answer of a part until the part is durable.
    Persist,
}

impl Stage {
    fn label(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Dispatch => "dispatch",
            Self::Worker => "worker",
            Self::Persist => "persist",
        }
    }

    /// Notes how long it took.
    pub(super) fn took(self, time: Duration) {
        metrics::histogram!(SECONDS, "stage" => self.label()).record(time.as_secs_f64());
    }
}

/// Whether the request at this place of its segment is measured.
pub(super) fn is_sampled(index: u32) -> bool {
    index.is_multiple_of(SAMPLE)
}

pub(super) fn describe_metrics() {
    let what = "how long a stage took: queue, dispatch and worker of one request in 64, persist of every part";
    metrics::describe_histogram!(SECONDS, metrics::Unit::Seconds, what);
}
