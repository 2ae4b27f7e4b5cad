//! Errors on the wire: every error of the domain becomes a `google.rpc.Status` here and nowhere else.
//!
//! Each carries an `ErrorInfo` with a stable reason and the domain "tidemill"; bad input also a `BadRequest`, and what goes
//! away by itself a `RetryInfo`. No message holds a path, a query or a secret: what an operator needs goes to the log.

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use crate::{
    access::{Denied, LimitReached},
    blobs::BlobError,
    domain::{BatchId, FileId},
    fleet::{FleetError, InferError},
    ingest::{IngestError, LineReport},
    progress::WatchError,
    results::{BadCursor, ReadError, retry::RetryError},
    store::StoreError,
    telemetry::seldom,
    words,
};

/// The `domain` of every `ErrorInfo`.
pub const DOMAIN: &str = "tidemill";
/// The most bytes of the field violations of one error. They travel base64-coded (a third more) in the trailers, beside the
/// message, percent-coded, and many clients refuse more than 8 KiB of trailers (gRPC's default limit on metadata).
/// A hundred bad lines of a file fit, each in about 30 characters.
const VIOLATIONS_LIMIT: usize = 4_700;
/// The longest message, in bytes: it travels percent-coded beside the details, and once more in them.
const MESSAGE_LIMIT: usize = 600;
/// The longest message beside violations.
const INVALID_MESSAGE_LIMIT: usize = 300;
/// The longest description of one bad line, in characters: the longest there is, with a `custom_id` as [`short`] makes it.
const DESCRIPTION_LIMIT: usize = 280;

/// How long to wait before trying again what failed because something is briefly away.
const SOON: Duration = Duration::from_secs(1);
/// How long to wait for a worker to come.
const LATER: Duration = Duration::from_secs(5);

/// An error with a reason.
pub fn error(code: Code, reason: &'static str, message: impl Into<String>) -> Status {
    with_details(code, message.into(), ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new()))
}

/// An error that goes away by itself.
pub fn retry(code: Code, reason: &'static str, message: impl Into<String>, after: Duration) -> Status {
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    details.set_retry_info(Some(after));
    with_details(code, message.into(), details)
}

/// An error with facts for programs.
pub fn with_facts(code: Code, reason: &'static str, message: impl Into<String>, facts: &[(&str, String)]) -> Status {
    let facts: HashMap<String, String> =
        facts.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    with_details(code, message.into(), ErrorDetails::with_error_info(reason, DOMAIN, facts))
}

/// Bad input: what is wrong with which field, as far as it fits.
pub fn invalid(reason: &'static str, message: impl Into<String>, mut violations: Vec<FieldViolation>) -> Status {
    violations.truncate(fitting(&violations));
    let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    details.set_bad_request(violations);
    with_details(Code::InvalidArgument, cut(message.into(), INVALID_MESSAGE_LIMIT), details)
}

/// The caller is unknown or may not do this.
#[allow(clippy::needless_pass_by_value)] // for map_err
pub fn denied(why: Denied) -> Status {
    let (code, reason) = match why {
        Denied::TokenMissing => (Code::Unauthenticated, "TOKEN_MISSING"),
        Denied::TokenUnknown => (Code::Unauthenticated, "TOKEN_UNKNOWN"),
        Denied::AdminOnly => (Code::PermissionDenied, "ADMIN_ONLY"),
    };
    error(code, reason, why.to_string())
}

/// The caller has used up a limit.
#[allow(clippy::needless_pass_by_value)] // for map_err
pub fn limit(reached: LimitReached) -> Status {
    retry(Code::ResourceExhausted, reached.reason(), reached.to_string(), reached.retry_after())
}

/// How many of these can be told.
fn fitting(violations: &[FieldViolation]) -> usize {
    let mut room = VIOLATIONS_LIMIT;
    let fits = |one: &&FieldViolation| {
        // Three tags and lengths: of the violation and its two texts.
        let size = one.field.len() + one.description.len() + 8;
        let fits = size <= room;
        room = room.saturating_sub(size);
        fits
    };
    violations.iter().take_while(fits).count()
}

/// One field of the request is wrong.
pub fn invalid_field(field: &str, description: impl Into<String>) -> Status {
    let description = description.into();
    invalid("INVALID_REQUEST", format!("{field}: {description}"), vec![FieldViolation::new(field, description)])
}

/// The server stops; another one, or this one in a moment, goes on.
pub fn shutting_down() -> Status {
    retry(Code::Unavailable, "SHUTTING_DOWN", "the server is shutting down; go on where you were in a moment", SOON)
}

/// What tonic itself answers to a message that can't be read, which it calls an internal error although the client made it.
/// Every other status stays as it is.
pub fn unreadable(status: Status) -> Status {
    if !status.details().is_empty() {
        return status;
    }
    match status.code() {
        Code::Internal => error(Code::InvalidArgument, "MESSAGE_UNREADABLE", status.message()),
        Code::OutOfRange | Code::ResourceExhausted => {
            let message = format!("a message is larger than {} bytes", super::MESSAGE_LIMIT);
            error(Code::ResourceExhausted, "MESSAGE_TOO_LARGE", message)
        }
        _ => status,
    }
}

/// There is no such batch, or it is not the caller's.
pub fn no_batch(id: &BatchId) -> Status {
    error(Code::NotFound, "BATCH_NOT_FOUND", format!("no batch {:?}", short(id.as_str())))
}

/// There is no such file, or it is not the caller's.
pub fn no_file(id: &FileId) -> Status {
    error(Code::NotFound, "FILE_NOT_FOUND", format!("no file {:?}", short(id.as_str())))
}

fn with_details(code: Code, message: String, details: ErrorDetails) -> Status {
    Status::with_error_details(code, cut(message, MESSAGE_LIMIT), details)
}

/// A client's own text, fit for a message.
pub fn short(text: &str) -> String {
    if text.chars().count() <= 80 {
        text.to_owned()
    } else {
        format!("{}…", text.chars().take(79).collect::<String>())
    }
}

fn cut(mut text: String, bytes: usize) -> String {
    if text.len() > bytes {
        text.truncate(text.floor_char_boundary(bytes - '…'.len_utf8()));
        text.push('…');
    }
    text
}

/// What is wrong inside: told in the log, not on the wire.
fn internal(error: &dyn std::error::Error) -> Status {
    seldom!(error, %error, "internal error");
    self::error(Code::Internal, "INTERNAL", "the server has met an error that it can't handle; its log says more")
}

/// The error of the database.
pub fn store(error: StoreError) -> Status {
    let full = error.full_disk();
    match error {
        StoreError::Unavailable(error) => {
            let why = full.map(|why| format!(" ({why})")).unwrap_or_default();
            seldom!(error, %error, "the database failed{why}");
            let message = format!("the database is not available now{why}; try again");
            retry(Code::Unavailable, "DATABASE_UNAVAILABLE", message, SOON)
        }
        StoreError::Rejected(_) | StoreError::Corrupt(_) | StoreError::Open(_) => internal(&error),
    }
}

/// The error of the blob store.
#[allow(clippy::needless_pass_by_value)] // for map_err
pub fn blob(error: BlobError) -> Status {
    match error {
        BlobError::Failed(_) | BlobError::Open(_) => {
            seldom!(error, %error, "the blob store failed");
            let why = error.in_words().map(|why| format!(" ({why})")).unwrap_or_default();
            let message = format!("the blob store is not available now{why}; try again");
            retry(Code::Unavailable, "BLOB_STORE_UNAVAILABLE", message, SOON)
        }
        BlobError::Refused(_) | BlobError::Foreign(_) => {
            seldom!(error, %error, "the blob store can't be used");
            let why = error.in_words().map(|why| format!(" ({why})")).unwrap_or_default();
            let message = format!(
                "the blob store can't be used{why}: trying again does not help before whoever runs the server has mended that"
            );
            self::error(Code::FailedPrecondition, "BLOB_STORE_REFUSED", message)
        }
        BlobError::Missing(_) => {
            seldom!(error, %error, "an object is gone");
            self::error(Code::DataLoss, "OBJECT_MISSING", "an object that holds this data is gone from the blob store")
        }
    }
}

/// The error of reading results.
pub fn read(error: ReadError) -> Status {
    match error {
        ReadError::Store(error) => store(error),
        ReadError::Blob(error) => blob(error),
        ReadError::Deleted(_) => self::error(Code::FailedPrecondition, "RESULTS_DELETED", error.to_string()),
        ReadError::Damaged(what) => damaged(&what),
        ReadError::Corrupt(_) => {
            seldom!(error, %error, "results can't be read");
            self::error(Code::DataLoss, "RESULTS_CORRUPT", "the stored results are damaged; the server's log says more")
        }
    }
}

/// Bytes in the blob store are not those that were written. `what` names the segment.
fn damaged(what: &str) -> Status {
    seldom!(error, what, "stored data is damaged");
    self::error(Code::DataLoss, "DATA_DAMAGED", format!("damaged in the blob store: {what}"))
}

/// A cursor that is none.
pub fn bad_cursor(error: &BadCursor) -> Status {
    invalid_field("cursor", error.to_string())
}

/// Why a batch can't be watched. `field` is the one that says after what.
pub fn watch(error: WatchError, field: &'static str) -> Status {
    match error {
        WatchError::NotFound(id) => no_batch(&id),
        WatchError::Ahead { newest, .. } => {
            invalid_field(field, format!("lies ahead of the newest, {newest}: it is not from this server's database"))
        }
        WatchError::ShuttingDown => shutting_down(),
        WatchError::Store(error) => store(error),
    }
}

/// Why a worker could not be added or changed.
pub fn fleet(error: FleetError) -> Status {
    match error {
        FleetError::BadUrl(message) => invalid_field("url", message),
        FleetError::NotFound(id) => {
            self::error(Code::NotFound, "WORKER_NOT_FOUND", format!("no worker {:?}", short(id.as_str())))
        }
        FleetError::FromConfig(_) => self::error(Code::FailedPrecondition, "WORKER_FROM_CONFIG", error.to_string()),
        FleetError::Client(_) => internal(&error),
        FleetError::Store(error) => store(error),
    }
}

/// Why a request was not answered by any worker.
#[allow(clippy::needless_pass_by_value)] // for map_err
pub fn infer(error: InferError) -> Status {
    match error {
        InferError::NoWorker(_) => retry(Code::Unavailable, "NO_WORKER", error.to_string(), LATER),
        InferError::Timeout(_) => self::error(Code::DeadlineExceeded, "WORKER_TIMEOUT", error.to_string()),
        InferError::Failed(_) => retry(Code::Unavailable, "WORKER_FAILED", error.to_string(), SOON),
    }
}

/// Why there is no file. `name` names a line's field in the violations.
pub fn ingest(error: IngestError, name: fn(u64) -> String) -> Status {
    match error {
        IngestError::Invalid { errors, total } => invalid_lines(&errors, total, name),
        IngestError::NotJsonl(_) => invalid("INVALID_FILE", error.to_string(), Vec::new()),
        IngestError::TooManyLines { .. } => {
            self::error(Code::ResourceExhausted, "FILE_TOO_MANY_LINES", error.to_string())
        }
        IngestError::TooManyBytes { .. } => self::error(Code::ResourceExhausted, "FILE_TOO_LARGE", error.to_string()),
        IngestError::Empty => invalid("FILE_EMPTY", "the file holds no request", Vec::new()),
        IngestError::SizeMismatch { .. } => {
            let violation = FieldViolation::new("spec.total_bytes", error.to_string());
            invalid("FILE_SIZE_MISMATCH", error.to_string(), vec![violation])
        }
        IngestError::Interrupted => shutting_down(),
        IngestError::Store(error) => store(error),
        IngestError::Blob(error) => blob(error),
        IngestError::Scratch(error) => {
            seldom!(error, error = words::file(&error), "the scratch directory failed");
            let message = match words::full_disk(&error) {
                Some(_) => "the server's disk for temporary files is full: its operator must make room; then try again",
                None => "the server can't write temporary files now; try again",
            };
            retry(Code::Unavailable, "SCRATCH_UNAVAILABLE", message, LATER)
        }
    }
}

/// Why the failed lines of a batch can't be tried again.
pub fn retry_failed(error: RetryError) -> Status {
    let refused = |reason| self::error(Code::FailedPrecondition, reason, error.to_string());
    match error {
        RetryError::NotEnded => refused("BATCH_NOT_ENDED"),
        RetryError::NothingFailed => refused("NO_FAILED_REQUESTS"),
        RetryError::InputGone => refused("INPUT_FILE_GONE"),
        RetryError::ResultsDeleted => refused("RESULTS_DELETED"),
        RetryError::Corrupt(what) => damaged(&what),
        RetryError::Ingest(error) => ingest(error, line_name),
        RetryError::Store(error) => store(error),
        RetryError::Blob(error) => blob(error),
    }
}

/// Names a line of a file.
pub fn line_name(line: u64) -> String {
    format!("line {line}")
}

/// The bad lines, each in words that leave room for the others; the message counts them all.
fn invalid_lines(errors: &[LineReport], total: u64, name: fn(u64) -> String) -> Status {
    let first = errors.first().map(|first| format!("; {}: {}", name(first.line), describe(first, DESCRIPTION_LIMIT)));
    let summary = match total {
        1 => "1 bad line".to_owned(),
        total => format!("{total} bad lines"),
    };
    let all = |most| -> Vec<FieldViolation> {
        errors.iter().map(|error| FieldViolation::new(name(error.line), describe(error, most))).collect()
    };
    // Better all of them in few words than a few of them in many: the first is told in full in the message.
    let violations = [DESCRIPTION_LIMIT, 140, 100, 80, 60, 45, 35]
        .into_iter()
        .map(all)
        .find(|violations| fitting(violations) == violations.len())
        .unwrap_or_else(|| all(25));
    let more = match total - fitting(&violations) as u64 {
        0 => String::new(),
        more => format!("; {more} more than are listed here"),
    };
    invalid("INVALID_FILE", format!("{summary}{more}{}", first.unwrap_or_default()), violations)
}

/// A bad line in at most that many characters.
fn describe(error: &LineReport, most: usize) -> String {
    let text = match &error.custom_id {
        Some(id) => format!("{} (custom_id {:?})", error.message, short(id)),
        None => error.message.clone(),
    };
    if text.chars().count() <= most {
        return text;
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

/// Collects what is wrong with a request, field by field.
#[derive(Debug, Default)]
pub struct Violations(Vec<FieldViolation>);

impl Violations {
    /// Adds one.
    pub fn add(&mut self, field: impl Into<String>, description: impl Into<String>) {
        self.0.push(FieldViolation::new(field, description));
    }

    /// Adds one unless `good`.
    pub fn check(&mut self, good: bool, field: &str, description: impl Into<String>) {
        if !good {
            self.add(field, description);
        }
    }

    /// An error if there are any.
    ///
    /// # Errors
    /// `INVALID_ARGUMENT`, reason `INVALID_REQUEST`.
    pub fn finish(self) -> Result<(), Status> {
        let Some(first) = self.0.first() else { return Ok(()) };
        let message = format!("{}: {}", first.field, first.description);
        Err(invalid("INVALID_REQUEST", message, self.0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sea_orm::DbErr;

    use super::*;

    fn reason(status: &Status) -> String {
        let info = status.get_details_error_info().expect("ErrorInfo always");
        assert_eq!(info.domain, DOMAIN);
        info.reason
    }

    #[test]
    fn secrets_stay_in_the_log() {
        let secret = "SELECT secret FROM /var/lib/tidemill";
        let all = [
            store(StoreError::Unavailable(DbErr::Custom(secret.into()))),
            store(StoreError::Rejected(DbErr::Custom(secret.into()))),
            store(StoreError::Corrupt(secret.into())),
            store(StoreError::Open(secret.into())),
            blob(BlobError::Missing(secret.into())),
            blob(BlobError::Open(secret.into())),
            read(ReadError::Corrupt(secret.into())),
            ingest(IngestError::Scratch(std::io::Error::other(secret)), line_name),
        ];
        for status in all {
            reason(&status);
            assert!(!format!("{status:?}").contains("SELECT"), "{status:?}");
        }
    }

    #[tokio::test]
    async fn a_client_learns_that_the_databases_disk_is_full() {
        use sea_orm::ConnectionTrait;
        let database = sea_orm::Database::connect("sqlite::memory:").await.unwrap();
        let fill = "PRAGMA max_page_count = 3; CREATE TABLE a (b BLOB); INSERT INTO a VALUES (zeroblob(100000))";
        let status = store(StoreError::from(database.execute_unprepared(fill).await.unwrap_err()));
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "DATABASE_UNAVAILABLE"));
        assert!(status.message().contains("no space is left"), "{status:?}");
        assert!(!status.message().contains("INSERT"), "{status:?}");
    }

    #[test]
    fn what_helps_is_said() {
        let status = store(StoreError::Unavailable(DbErr::Custom("away".into())));
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "DATABASE_UNAVAILABLE"));
        assert_eq!(status.get_details_retry_info().unwrap().retry_delay, Some(Duration::from_secs(1)));
        let status = store(StoreError::Rejected(DbErr::Custom("no NUL".into())));
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Internal, "INTERNAL"));
        assert!(status.get_details_retry_info().is_none(), "it would be refused again");
        let status = infer(InferError::NoWorker("m".into()));
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "NO_WORKER"));
        assert!(status.get_details_retry_info().is_some());
    }

    /// gRPC's default limit on metadata: name, value and 32 bytes of overhead of every header. Some room is for others.
    const LIMIT: usize = 8_192 - 200;

    fn size(status: &Status) -> usize {
        let mut headers = http::HeaderMap::new();
        status.add_header(&mut headers).unwrap();
        headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum()
    }

    #[test]
    fn the_worst_error_fits_into_the_trailers() {
        // Four bytes a character, twelve when percent-coded.
        let text = "𝔵".repeat(1_000);
        let report = |line| LineReport { line, custom_id: Some(text.clone()), message: text.clone() };
        let errors: Vec<_> = (1_000_000..1_000_100).map(report).collect();
        let status = ingest(IngestError::Invalid { errors, total: u64::MAX }, line_name);
        assert!(size(&status) < LIMIT, "{}", size(&status));
        let mut wrong = Violations::default();
        for _ in 0..40 {
            wrong.add(short(&text), text.clone());
        }
        let status = wrong.finish().unwrap_err();
        assert!(size(&status) < LIMIT, "{}", size(&status));
        let status = invalid_field("cursor", text);
        assert!(size(&status) < LIMIT, "{}", size(&status));
    }

    #[test]
    fn one_bad_line_is_told_in_full() {
        let message = "url is \"/v1/foo\"; expected one of /v1/chat/completions, /v1/completions, /v1/embeddings, \
                       /v1/responses, /v1/score, /v1/rerank";
        let report = LineReport { line: 7, custom_id: Some("request-7".into()), message: message.into() };
        let status = ingest(IngestError::Invalid { errors: vec![report], total: 1 }, line_name);
        let description = format!("{message} (custom_id \"request-7\")");
        assert_eq!(status.message(), format!("1 bad line; line 7: {description}"));
        assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].description, description);
    }

    #[test]
    fn a_hundred_bad_lines_are_all_listed() {
        let message = "url is /v1/embeddings; expected /v1/chat/completions as in line 1: one file, one url";
        let errors = (999_900..1_000_000)
            .map(|line| LineReport { line, custom_id: Some(format!("request-{line}")), message: message.into() })
            .collect();
        let status = ingest(IngestError::Invalid { errors, total: 250_000 }, line_name);
        assert!(size(&status) < LIMIT, "{}", size(&status));
        let listed = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!((listed.len(), listed[99].field.as_str()), (100, "line 999999"));
        assert!(listed[99].description.starts_with("url is /v1/embeddings; e"), "{}", listed[99].description);
        assert!(
            status.message().starts_with("250000 bad lines; 249900 more than are listed here; line 999900: url is")
        );
    }

    proptest! {
        #[test]
        fn bad_lines_fit_into_the_trailers(
            messages in proptest::collection::vec(("\\PC{0,120}", proptest::option::of("\\PC{0,90}")), 1..100),
            more in 0u64..1_000_000,
        ) {
            let total = messages.len() as u64 + more;
            let errors: Vec<_> = (1..)
                .zip(messages)
                .map(|(line, (message, custom_id))| LineReport { line: line * 9_999, custom_id, message })
                .collect();
            let status = ingest(IngestError::Invalid { errors: errors.clone(), total }, line_name);
            prop_assert!(size(&status) < LIMIT, "{}", size(&status));
            prop_assert_eq!(reason(&status), "INVALID_FILE");
            prop_assert!(status.message().starts_with(&total.to_string()));
            let listed = status.get_details_bad_request().unwrap().field_violations;
            prop_assert!(!listed.is_empty() && listed.len() <= errors.len());
            prop_assert_eq!(&listed[0].field, "line 9999");
        }
    }
}
