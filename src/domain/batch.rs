//! A batch, as all of tidemill uses it.

use std::{collections::BTreeMap, time::Duration};

use super::{
    BatchId, BatchStatus, Endpoint, FileId, Owner, Revision, Timestamp, TokenUsage, WebhookEndpointId,
    lifecycle::Ending, webhook::WebhookTarget,
};

/// The shortest and the longest completion window.
pub const WINDOW_RANGE: (Duration, Duration) = (Duration::from_secs(3_600), Duration::from_secs(14 * 24 * 3_600));
/// The default completion window.
pub const DEFAULT_WINDOW: Duration = Duration::from_secs(24 * 3_600);

/// How soon and how late a file may expire, counted from when it was complete.
pub const EXPIRY_RANGE: (Duration, Duration) = (Duration::from_secs(3_600), Duration::from_secs(30 * 24 * 3_600));

/// The priority of a batch; a higher one goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Priority(i8);

impl Priority {
    /// A priority from -1, 0 or 1; `None` for any other number.
    #[must_use]
    pub fn new(value: i32) -> Option<Self> {
        i8::try_from(value).ok().filter(|value| (-1..=1).contains(value)).map(Self)
    }

    /// The number: -1, 0 or 1.
    #[must_use]
    pub fn value(self) -> i32 {
        self.0.into()
    }
}

/// Numbers of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests in the input.
    pub total: i64,
    /// Requests with a line in the output file.
    pub completed: i64,
    /// Requests with a line in the error file.
    pub failed: i64,
}

/// Why a batch failed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BatchError {
    /// A stable word.
    pub code: String,
    /// An explanation for people.
    pub message: String,
    /// The number of the input line, from 1. 0: it concerns no single line.
    pub line: i64,
    /// The field concerned. Empty: no single field.
    pub param: String,
}

/// When a batch entered each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateTimes {
    pub in_progress: Option<Timestamp>,
    pub finalizing: Option<Timestamp>,
    pub completed: Option<Timestamp>,
    pub failed: Option<Timestamp>,
    pub expired: Option<Timestamp>,
    pub cancelling: Option<Timestamp>,
    pub cancelled: Option<Timestamp>,
}

impl StateTimes {
    /// The times as they were when `status` was entered at `at`, without later ones.
    #[must_use]
    pub fn until(self, at: Timestamp, status: BatchStatus) -> Self {
        let known = |time: Option<Timestamp>| time.filter(|time| *time <= at);
        let ended = status.is_terminal();
        Self {
            in_progress: known(self.in_progress),
            finalizing: known(self.finalizing),
            // Entered in the same instant as FINALIZING, but after it.
            completed: known(self.completed).filter(|_| ended),
            failed: known(self.failed).filter(|_| ended),
            expired: known(self.expired).filter(|_| ended),
            cancelling: known(self.cancelling),
            cancelled: known(self.cancelled).filter(|_| ended),
        }
    }
}

/// A new batch, as a client describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBatch {
    pub owner: Owner,
    pub input_file_id: FileId,
    /// The url of its requests.
    pub endpoint: Endpoint,
    pub completion_window: Duration,
    pub priority: Priority,
    /// The client's metadata.
    pub metadata: BTreeMap<String, String>,
    /// The client's idempotency key.
    pub request_id: Option<String>,
    /// Identifies what was asked for, so that something else under the same key is noticed. `None`: it is not compared.
    pub request_hash: Option<String>,
    /// The target of its webhooks, if it has one of its own.
    pub webhook: Option<WebhookTarget>,
    /// The registered endpoint of its webhooks.
    pub webhook_endpoint_id: Option<WebhookEndpointId>,
    /// How long its result files stay after its end. `None`: until they are deleted.
    pub output_expires_after: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub id: BatchId,
    pub owner: Owner,
    /// Its state.
    pub status: BatchStatus,
    /// How it is to end, once its remaining lines are not to run any more.
    pub ending: Option<Ending>,
    /// The url of its requests.
    pub endpoint: Endpoint,
    /// The models that its requests name, in the input file's order.
    pub models: Vec<String>,
    pub input_file_id: FileId,
    /// The file with the successful lines, after the end.
    pub output_file_id: Option<FileId>,
    /// The file with the other lines, after the end.
    pub error_file_id: Option<FileId>,
    /// Numbers of requests.
    pub counts: Counts,
    /// How many of the failed requests were not run, because the batch was cancelled or expired. An earlier version did not
    /// count them.
    pub not_run: i64,
    /// Numbers of tokens.
    pub usage: TokenUsage,
    /// Why it failed.
    pub errors: Vec<BatchError>,
    /// The client's metadata.
    pub metadata: BTreeMap<String, String>,
    pub priority: Priority,
    pub completion_window: Duration,
    /// When it was created.
    pub created_at: Timestamp,
    /// When its window closes.
    pub expires_at: Timestamp,
    /// When it entered each state.
    pub times: StateTimes,
    pub segments: i32,
    /// Segments whose results are final.
    pub segments_done: i32,
    /// The target of its webhooks, if it has one of its own.
    pub webhook: Option<WebhookTarget>,
    /// The registered endpoint of its webhooks.
    pub webhook_endpoint_id: Option<WebhookEndpointId>,
    /// Increases with every durable change.
    pub revision: Revision,
    /// How long its result files stay after its end. `None`: until they are deleted.
    pub output_expires_after: Option<Duration>,
}

impl Batch {
    /// When its result files expire. `None`: never, or it has not ended.
    #[must_use]
    pub fn output_expires_at(&self) -> Option<Timestamp> {
        let times = &self.times;
        let ended = times.completed.or(times.expired).or(times.cancelled)?;
        Some(ended.plus(self.output_expires_after?))
    }
}
