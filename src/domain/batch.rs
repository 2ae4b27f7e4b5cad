//! A batch as the whole of tidemill sees it.

use std::{collections::BTreeMap, time::Duration};

use super::{
    BatchId, BatchStatus, Endpoint, FileId, Owner, Revision, Timestamp, TokenUsage, WebhookEndpointId,
    lifecycle::Ending, webhook::WebhookTarget,
};

/// The least and the most that a completion window may be.
pub const WINDOW_RANGE: (Duration, Duration) = (Duration::from_secs(3_600), Duration::from_secs(14 * 24 * 3_600));
/// The completion window where none is given.
pub const DEFAULT_WINDOW: Duration = Duration::from_secs(24 * 3_600);

/// Whether a batch goes before others: higher first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Priority(i8);

impl Priority {
    /// -1, 0 or 1.
    #[must_use]
    pub fn new(value: i32) -> Option<Self> {
        i8::try_from(value).ok().filter(|value| (-1..=1).contains(value)).map(Self)
    }

    /// As given.
    #[must_use]
    pub fn value(self) -> i32 {
        self.0.into()
    }
}

/// How many requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// In the input.
    pub total: i64,
    /// In the output file.
    pub completed: i64,
    /// In the error file.
    pub failed: i64,
}

/// Why a batch failed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct BatchError {
    /// A stable word.
    pub code: String,
    /// For people.
    pub message: String,
    /// The input line, from 1; 0 for none in particular.
    pub line: i64,
    /// The field concerned.
    pub param: String,
}

/// When a batch entered each state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateTimes {
    /// `IN_PROGRESS`
    pub in_progress: Option<Timestamp>,
    /// `FINALIZING`
    pub finalizing: Option<Timestamp>,
    /// `COMPLETED`
    pub completed: Option<Timestamp>,
    /// `FAILED`
    pub failed: Option<Timestamp>,
    /// `EXPIRED`
    pub expired: Option<Timestamp>,
    /// `CANCELLING`
    pub cancelling: Option<Timestamp>,
    /// `CANCELLED`
    pub cancelled: Option<Timestamp>,
}

impl StateTimes {
    /// As they were when `status` had been entered at `at`: what came later is not known yet.
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

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewBatch {
    /// Whose it is.
    pub owner: Owner,
    /// The input.
    pub input_file_id: FileId,
    /// The url of its requests.
    pub endpoint: Endpoint,
    /// How long it may take.
    pub completion_window: Duration,
    /// Whether it goes before others.
    pub priority: Priority,
    /// The client's own.
    pub metadata: BTreeMap<String, String>,
    /// The client's idempotency key.
    pub request_id: Option<String>,
    /// Where its webhooks go.
    pub webhook: Option<WebhookTarget>,
    /// Or the registered endpoint that they go to.
    pub webhook_endpoint_id: Option<WebhookEndpointId>,
}

/// A batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Its id.
    pub id: BatchId,
    /// Whose it is.
    pub owner: Owner,
    /// Its state.
    pub status: BatchStatus,
    /// How it is to end, once its lines are no longer to be run.
    pub ending: Option<Ending>,
    /// The url of its requests.
    pub endpoint: Endpoint,
    /// The models that its requests name, in the input file's order.
    pub models: Vec<String>,
    /// The input.
    pub input_file_id: FileId,
    /// The successful lines, at the end.
    pub output_file_id: Option<FileId>,
    /// The other lines, at the end.
    pub error_file_id: Option<FileId>,
    /// How many requests.
    pub counts: Counts,
    /// How many tokens.
    pub usage: TokenUsage,
    /// Why it failed.
    pub errors: Vec<BatchError>,
    /// The client's own.
    pub metadata: BTreeMap<String, String>,
    /// Whether it goes before others.
    pub priority: Priority,
    /// How long it may take.
    pub completion_window: Duration,
    /// When it was created.
    pub created_at: Timestamp,
    /// When its window closes.
    pub expires_at: Timestamp,
    /// When it entered each state.
    pub times: StateTimes,
    /// Segments in all.
    pub segments: i32,
    /// Segments whose results are final.
    pub segments_done: i32,
    /// Where its webhooks go.
    pub webhook: Option<WebhookTarget>,
    /// Or the registered endpoint that they go to.
    pub webhook_endpoint_id: Option<WebhookEndpointId>,
    /// Grows with every durable change.
    pub revision: Revision,
}
