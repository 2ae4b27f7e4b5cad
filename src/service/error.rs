//! The error of every use case. A protocol's adapter only converts it.
//!
//! No message contains a path, a query or a secret. Details for operators go to the log.

use std::time::Duration;

use super::text::short;
use crate::{
    access::{Denied, LimitReached},
    blobs::BlobError,
    delivery::{AcceptError, DeadLetterRetryError, TestError},
    domain::{BatchId, FileId},
    fleet::{FleetError, InferError},
    ingest::{IngestError, LineReport},
    progress::WatchError,
    results::{BadCursor, ReadError},
    store::StoreError,
    telemetry::seldom,
    words,
};

/// The retry delay while something is briefly unavailable.
const SOON: Duration = Duration::from_secs(1);
/// The retry delay while there is no worker.
const LATER: Duration = Duration::from_secs(5);
/// The longest description of one bad line in a message, in characters: the longest there is, with a `custom_id` as
/// [`short`] makes it.
const DESCRIPTION_LIMIT: usize = 280;

/// The kind of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The request is invalid in every state of the server.
    InvalidArgument,
    /// It does not exist, or is not the caller's.
    NotFound,
    /// The request id was used for something else.
    AlreadyExists,
    /// The caller may not do this.
    PermissionDenied,
    /// The caller is unknown.
    Unauthenticated,
    /// The current state does not allow it.
    FailedPrecondition,
    /// A concurrent change interfered.
    Aborted,
    /// A position is beyond the end.
    OutOfRange,
    /// The caller is at a limit.
    ResourceExhausted,
    /// Something is unavailable; a retry may succeed.
    Unavailable,
    /// It took too long.
    DeadlineExceeded,
    /// The client has gone away.
    Cancelled,
    /// Stored data is lost or damaged.
    DataLoss,
    /// A bug, or something that only the server's log explains.
    Internal,
}

/// An invalid field of a request, or an invalid line of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The field, or `line 7`.
    pub field: String,
    /// What is wrong with it.
    pub description: String,
}

/// The bad lines of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLines {
    /// The first of them.
    pub reports: Vec<LineReport>,
    /// How many there are in all.
    pub total: u64,
}

/// Why a use case failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ServiceError {
    /// The kind of an error.
    pub code: Code,
    /// The stable reason, for programs.
    pub reason: &'static str,
    /// What happened and what to do, for people.
    pub message: String,
    /// The invalid fields. Only with [`Code::InvalidArgument`].
    pub violations: Vec<Violation>,
    /// The bad lines of a file, if the violations are bad lines. An adapter that can't report all of them says with
    /// [`bad_lines`] how many it leaves out.
    pub bad_lines: Option<Box<BadLines>>,
    /// The retry delay, if a retry may help.
    pub retry_after: Option<Duration>,
    /// Facts for programs.
    pub facts: Box<[(&'static str, String)]>,
}

impl ServiceError {
    /// An error with a reason.
    pub fn new(code: Code, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            violations: Vec::new(),
            bad_lines: None,
            retry_after: None,
            facts: Box::default(),
        }
    }

    /// A temporary error.
    pub fn retry(code: Code, reason: &'static str, message: impl Into<String>, after: Duration) -> Self {
        Self { retry_after: Some(after), ..Self::new(code, reason, message) }
    }

    /// Invalid input, with the invalid fields.
    pub fn invalid(reason: &'static str, message: impl Into<String>, violations: Vec<Violation>) -> Self {
        Self { violations, ..Self::new(Code::InvalidArgument, reason, message) }
    }

    /// One invalid field of the request.
    pub fn field(field: &str, description: impl Into<String>) -> Self {
        let description = description.into();
        let message = format!("{field}: {description}");
        Self::invalid("INVALID_REQUEST", message, vec![Violation { field: field.to_owned(), description }])
    }

    /// The batch has not ended, and this is only for one that has.
    #[must_use]
    pub fn not_ended() -> Self {
        let message = "the batch has not ended: cancel it, or wait for its end";
        Self::new(Code::FailedPrecondition, "BATCH_NOT_ENDED", message)
    }

    /// A stored result is not what this server writes.
    #[must_use]
    pub fn unreadable_result() -> Self {
        damaged("a line of the results")
    }

    /// The server stops. Another one, or this one after its restart, answers the retry.
    #[must_use]
    pub fn shutting_down() -> Self {
        let message = "the server is shutting down; continue from where you were in a moment";
        Self::retry(Code::Unavailable, "SHUTTING_DOWN", message, SOON)
    }
}

/// There is no such batch, or it is not the caller's.
pub(super) fn no_batch(id: &BatchId) -> ServiceError {
    ServiceError::new(Code::NotFound, "BATCH_NOT_FOUND", format!("no batch {:?}", short(id.as_str())))
}

/// There is no such file, or it is not the caller's.
pub(super) fn no_file(id: &FileId) -> ServiceError {
    ServiceError::new(Code::NotFound, "FILE_NOT_FOUND", format!("no file {:?}", short(id.as_str())))
}

/// There is no such dead letter, or it is not the caller's.
pub(super) fn no_dead_letter(id: &str) -> ServiceError {
    ServiceError::new(Code::NotFound, "DEAD_LETTER_NOT_FOUND", format!("no dead letter {:?}", short(id)))
}

/// There is no such endpoint, or it is not the caller's.
pub(super) fn no_endpoint(id: &str) -> ServiceError {
    ServiceError::new(Code::NotFound, "ENDPOINT_NOT_FOUND", format!("no webhook endpoint {:?}", short(id)))
}

/// An internal error. Its details go only to the log.
fn internal(error: &dyn std::error::Error) -> ServiceError {
    seldom!(error, %error, "internal error");
    let message = "the server failed because of an unexpected error; its log has the details";
    ServiceError::new(Code::Internal, "INTERNAL", message)
}

/// The blob store returned other bytes than were written. `what` names the segment.
pub(super) fn damaged(what: &str) -> ServiceError {
    seldom!(error, what, "stored data is damaged");
    ServiceError::new(Code::DataLoss, "DATA_DAMAGED", format!("damaged in the blob store: {what}"))
}

impl From<Denied> for ServiceError {
    fn from(why: Denied) -> Self {
        let (code, reason) = match why {
            Denied::TokenMissing => (Code::Unauthenticated, "TOKEN_MISSING"),
            Denied::TokenUnknown => (Code::Unauthenticated, "TOKEN_UNKNOWN"),
            Denied::AdminOnly => (Code::PermissionDenied, "ADMIN_ONLY"),
        };
        Self::new(code, reason, why.to_string())
    }
}

impl From<LimitReached> for ServiceError {
    fn from(reached: LimitReached) -> Self {
        Self::retry(Code::ResourceExhausted, reached.reason(), reached.to_string(), reached.retry_after())
    }
}

impl From<StoreError> for ServiceError {
    fn from(error: StoreError) -> Self {
        let obstacle = error.obstacle();
        match error {
            StoreError::Unavailable(error) => {
                let why = obstacle.map(|why| format!(" ({why})")).unwrap_or_default();
                seldom!(error, %error, "the database failed{why}");
                let message = format!("the database is not available now{why}; try again");
                Self::retry(Code::Unavailable, "DATABASE_UNAVAILABLE", message, SOON)
            }
            StoreError::Rejected(_) | StoreError::Corrupt(_) | StoreError::Open(_) => internal(&error),
        }
    }
}

impl From<BlobError> for ServiceError {
    fn from(error: BlobError) -> Self {
        match error {
            BlobError::Failed(_) | BlobError::Open(_) => {
                seldom!(error, %error, "the blob store failed");
                let why = error.in_words().map(|why| format!(" ({why})")).unwrap_or_default();
                let message = format!("the blob store is not available now{why}; try again");
                Self::retry(Code::Unavailable, "BLOB_STORE_UNAVAILABLE", message, SOON)
            }
            BlobError::Refused(_) | BlobError::Foreign(_) => {
                seldom!(error, %error, "the blob store can't be used");
                let why = error.in_words().map(|why| format!(" ({why})")).unwrap_or_default();
                let message = format!(
                    "the blob store can't be used{why}: a retry does not help until the server's operator has corrected that"
                );
                Self::new(Code::FailedPrecondition, "BLOB_STORE_REFUSED", message)
            }
            BlobError::Missing(_) => {
                seldom!(error, %error, "an object is gone");
                let message = "an object with this data is missing from the blob store";
                Self::new(Code::DataLoss, "OBJECT_MISSING", message)
            }
        }
    }
}

impl From<ReadError> for ServiceError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Store(error) => error.into(),
            ReadError::Blob(error) => error.into(),
            ReadError::Deleted(_) => Self::new(Code::FailedPrecondition, "RESULTS_DELETED", error.to_string()),
            ReadError::Damaged(what) => damaged(&what),
            ReadError::Corrupt(_) => {
                seldom!(error, %error, "results can't be read");
                let message = "the stored results are damaged; the server's log has the details";
                Self::new(Code::DataLoss, "RESULTS_CORRUPT", message)
            }
        }
    }
}

impl From<BadCursor> for ServiceError {
    fn from(error: BadCursor) -> Self {
        Self::field("cursor", error.to_string())
    }
}

impl From<FleetError> for ServiceError {
    fn from(error: FleetError) -> Self {
        match error {
            FleetError::BadUrl(message) => Self::field("url", message),
            FleetError::NotFound(id) => {
                Self::new(Code::NotFound, "WORKER_NOT_FOUND", format!("no worker {:?}", short(id.as_str())))
            }
            FleetError::FromConfig(_) => Self::new(Code::FailedPrecondition, "WORKER_FROM_CONFIG", error.to_string()),
            FleetError::Client(_) => internal(&error),
            FleetError::Store(error) => error.into(),
        }
    }
}

impl From<InferError> for ServiceError {
    fn from(error: InferError) -> Self {
        match error {
            InferError::NoWorker(_) => Self::retry(Code::Unavailable, "NO_WORKER", error.to_string(), LATER),
            InferError::Timeout(_) => Self::new(Code::DeadlineExceeded, "WORKER_TIMEOUT", error.to_string()),
            InferError::Failed(_) => Self::retry(Code::Unavailable, "WORKER_FAILED", error.to_string(), SOON),
        }
    }
}

impl From<TestError> for ServiceError {
    fn from(error: TestError) -> Self {
        match error {
            TestError::Store(error) => error.into(),
            TestError::Stopped => Self::shutting_down(),
        }
    }
}

/// Why a batch can't be watched. `field` is the one that says after what.
pub(super) fn watch(error: WatchError, field: &'static str) -> ServiceError {
    match error {
        WatchError::NotFound(id) => no_batch(&id),
        WatchError::Ahead { newest, .. } => {
            let message =
                format!("is greater than the newest revision, {newest}: it does not come from this server's database");
            ServiceError::field(field, message)
        }
        WatchError::ShuttingDown => ServiceError::shutting_down(),
        WatchError::Store(error) => error.into(),
    }
}

/// Why a webhook was not accepted. `prefix` goes before the fields' names.
pub(super) fn accept(refused: AcceptError, prefix: &str) -> ServiceError {
    match refused {
        AcceptError::Store(error) => error.into(),
        AcceptError::Invalid(fields) => {
            let violations = fields
                .iter()
                .map(|invalid| Violation {
                    field: format!("{prefix}{}", invalid.field),
                    description: invalid.message.clone(),
                })
                .collect();
            let message = fields.first().map(|first| format!("{prefix}{first}")).unwrap_or_default();
            ServiceError::invalid("INVALID_WEBHOOK", message, violations)
        }
    }
}

/// Why a dead letter was not retried.
pub(super) fn dead_letter(refused: DeadLetterRetryError, id: &str) -> ServiceError {
    let message = refused.to_string();
    match refused {
        DeadLetterRetryError::NotFound => no_dead_letter(id),
        DeadLetterRetryError::AlreadyDelivered => {
            ServiceError::new(Code::FailedPrecondition, "DEAD_LETTER_ALREADY_DELIVERED", message)
        }
        DeadLetterRetryError::Busy => ServiceError::new(Code::Aborted, "DEAD_LETTER_BUSY", message),
        DeadLetterRetryError::EndpointDeleted => {
            ServiceError::new(Code::FailedPrecondition, "ENDPOINT_DELETED", message)
        }
        DeadLetterRetryError::LeaseLost => ServiceError::new(Code::Aborted, "RETRY_RESULT_LOST", message),
        DeadLetterRetryError::Stopped => ServiceError::shutting_down(),
        DeadLetterRetryError::Store(error) => error.into(),
    }
}

/// Why a file was not created. `name` gives a line's field in the violations its name.
pub(crate) fn ingest(error: IngestError, name: fn(u64) -> String) -> ServiceError {
    match error {
        IngestError::Invalid { errors, total } => invalid_lines(errors, total, name),
        IngestError::NotJsonl(_) => ServiceError::invalid("INVALID_FILE", error.to_string(), Vec::new()),
        IngestError::TooManyLines { .. } => {
            ServiceError::new(Code::ResourceExhausted, "FILE_TOO_MANY_LINES", error.to_string())
        }
        IngestError::TooManyBytes { .. } => {
            ServiceError::new(Code::ResourceExhausted, "FILE_TOO_LARGE", error.to_string())
        }
        IngestError::Empty => ServiceError::invalid("FILE_EMPTY", "the file contains no requests", Vec::new()),
        IngestError::SizeMismatch { .. } => {
            let violation = Violation { field: "spec.total_bytes".to_owned(), description: error.to_string() };
            ServiceError::invalid("FILE_SIZE_MISMATCH", error.to_string(), vec![violation])
        }
        IngestError::UploadEnded => ServiceError::new(Code::FailedPrecondition, "UPLOAD_ENDED", error.to_string()),
        IngestError::Interrupted => ServiceError::shutting_down(),
        IngestError::Store(error) => error.into(),
        IngestError::Blob(error) => error.into(),
        IngestError::Scratch(error) => {
            seldom!(error, error = words::file(&error), "the scratch directory failed");
            let message = match words::full_disk(&error) {
                Some(_) => "the server's disk for temporary files is full: its operator must make room; then try again",
                None => "the server can't write temporary files now; try again",
            };
            ServiceError::retry(Code::Unavailable, "SCRATCH_UNAVAILABLE", message, LATER)
        }
    }
}

/// Names a line of a file.
pub(crate) fn line_name(line: u64) -> String {
    format!("line {line}")
}

/// The error for bad lines, each described in full. The message counts all of them.
fn invalid_lines(errors: Vec<LineReport>, total: u64, name: fn(u64) -> String) -> ServiceError {
    let describe = |error: &LineReport| match &error.custom_id {
        Some(id) => format!("{} (custom_id {:?})", error.message, short(id)),
        None => error.message.clone(),
    };
    let violations: Vec<Violation> =
        errors.iter().map(|error| Violation { field: name(error.line), description: describe(error) }).collect();
    let message = bad_lines(total, violations.len(), violations.first());
    let bad_lines = Some(Box::new(BadLines { reports: errors, total }));
    ServiceError { bad_lines, ..ServiceError::invalid("INVALID_FILE", message, violations) }
}

/// The message of an error for bad lines, `listed` of which are among the violations.
#[must_use]
pub fn bad_lines(total: u64, listed: usize, first: Option<&Violation>) -> String {
    let first = first.map(|first| format!("; {}: {}", first.field, shortened(&first.description, DESCRIPTION_LIMIT)));
    let summary = match total {
        1 => "1 bad line".to_owned(),
        total => format!("{total} bad lines"),
    };
    let more = match total - listed as u64 {
        0 => String::new(),
        more => format!("; {more} more than are listed here"),
    };
    format!("{summary}{more}{}", first.unwrap_or_default())
}

/// A description, shortened to at most `most` characters.
#[must_use]
pub fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

/// Collects the invalid fields of a request.
#[derive(Debug, Default)]
pub(super) struct Violations(Vec<Violation>);

impl Violations {
    pub(super) fn add(&mut self, field: impl Into<String>, description: impl Into<String>) {
        self.0.push(Violation { field: field.into(), description: description.into() });
    }

    /// Adds a violation unless `good`.
    pub(super) fn check(&mut self, good: bool, field: &str, description: impl Into<String>) {
        if !good {
            self.add(field, description);
        }
    }

    /// An error with the reason `INVALID_REQUEST` if there are violations.
    pub(super) fn finish(self) -> Result<(), ServiceError> {
        let Some(first) = self.0.first() else { return Ok(()) };
        let message = format!("{}: {}", first.field, first.description);
        Err(ServiceError::invalid("INVALID_REQUEST", message, self.0))
    }
}

#[cfg(test)]
mod tests {
    use sea_orm::DbErr;

    use super::*;

    #[test]
    fn secrets_stay_in_the_log() {
        let secret = "SELECT secret FROM /var/lib/tidemill";
        let all: [ServiceError; 8] = [
            StoreError::Unavailable(DbErr::Custom(secret.into())).into(),
            StoreError::Rejected(DbErr::Custom(secret.into())).into(),
            StoreError::Corrupt(secret.into()).into(),
            StoreError::Open(secret.into()).into(),
            BlobError::Missing(secret.into()).into(),
            BlobError::Open(secret.into()).into(),
            ReadError::Corrupt(secret.into()).into(),
            ingest(IngestError::Scratch(std::io::Error::other(secret)), line_name),
        ];
        for error in all {
            assert!(!format!("{error:?}").contains("SELECT"), "{error:?}");
        }
    }

    #[tokio::test]
    async fn a_client_learns_that_the_databases_disk_is_full() {
        use sea_orm::ConnectionTrait;
        let database = sea_orm::Database::connect("sqlite::memory:").await.unwrap();
        let fill = "PRAGMA max_page_count = 3; CREATE TABLE a (b BLOB); INSERT INTO a VALUES (zeroblob(100000))";
        let error = ServiceError::from(StoreError::from(database.execute_unprepared(fill).await.unwrap_err()));
        assert_eq!((error.code, error.reason), (Code::Unavailable, "DATABASE_UNAVAILABLE"));
        assert!(error.message.contains("no space is left"), "{error:?}");
        assert!(!error.message.contains("INSERT"), "{error:?}");
    }

    #[test]
    fn what_helps_is_said() {
        let error = ServiceError::from(StoreError::Unavailable(DbErr::Custom("away".into())));
        assert_eq!((error.code, error.reason), (Code::Unavailable, "DATABASE_UNAVAILABLE"));
        assert_eq!(error.retry_after, Some(Duration::from_secs(1)));
        let error = ServiceError::from(StoreError::Rejected(DbErr::Custom("no NUL".into())));
        assert_eq!((error.code, error.reason), (Code::Internal, "INTERNAL"));
        assert!(error.retry_after.is_none(), "it would be refused again");
        let error = ServiceError::from(InferError::NoWorker("m".into()));
        assert_eq!((error.code, error.reason), (Code::Unavailable, "NO_WORKER"));
        assert!(error.retry_after.is_some());
    }
}
