//! Converts the service's errors to `google.rpc.Status`. No other module does.
//!
//! Each has an `ErrorInfo` with a stable reason and the domain "tidemill". Bad input also has a `BadRequest`, and a
//! temporary failure a `RetryInfo`.

use std::collections::HashMap;

use axum::response::Response;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use crate::service::{self, ServiceError, Violation, bad_lines, shortened};

/// The `domain` of every `ErrorInfo`.
pub(super) const DOMAIN: &str = "tidemill";
/// The most bytes of the field violations of one error. They travel base64-coded (a third more) in the trailers, beside
/// the message, percent-coded, and many clients refuse more than 8 KiB of trailers (gRPC's default limit on metadata).
/// A hundred bad lines of a file fit, each in about 30 characters.
const VIOLATIONS_LIMIT: usize = 4_700;
/// The longest message, in bytes: it travels percent-coded beside the details, and once more in them.
const MESSAGE_LIMIT: usize = 600;
/// The longest message beside violations.
const INVALID_MESSAGE_LIMIT: usize = 300;

impl From<ServiceError> for Status {
    fn from(error: ServiceError) -> Self {
        let ServiceError { code, reason, mut message, mut violations, bad_lines: total, retry_after, facts } = error;
        let facts: HashMap<String, String> = facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, facts);
        if code == service::Code::InvalidArgument {
            if let Some(total) = total.map(|lines| lines.total) {
                let first = violations.first().cloned();
                violations = few_words(&violations);
                message = bad_lines(total, fitting(&violations), first.as_ref());
            }
            violations.truncate(fitting(&violations));
            let violations = violations.into_iter().map(|one| FieldViolation::new(one.field, one.description));
            details.set_bad_request(violations.collect::<Vec<_>>());
            message = cut(message, INVALID_MESSAGE_LIMIT);
        }
        if retry_after.is_some() {
            details.set_retry_info(retry_after);
        }
        Self::with_error_details(grpc_code(code), cut(message, MESSAGE_LIMIT), details)
    }
}

fn grpc_code(of: service::Code) -> Code {
    match of {
        service::Code::InvalidArgument => Code::InvalidArgument,
        service::Code::NotFound => Code::NotFound,
        service::Code::AlreadyExists => Code::AlreadyExists,
        service::Code::PermissionDenied => Code::PermissionDenied,
        service::Code::Unauthenticated => Code::Unauthenticated,
        service::Code::FailedPrecondition => Code::FailedPrecondition,
        service::Code::Aborted => Code::Aborted,
        service::Code::OutOfRange => Code::OutOfRange,
        service::Code::ResourceExhausted => Code::ResourceExhausted,
        service::Code::Unavailable => Code::Unavailable,
        service::Code::DeadlineExceeded => Code::DeadlineExceeded,
        service::Code::Cancelled => Code::Cancelled,
        service::Code::DataLoss => Code::DataLoss,
        service::Code::Internal => Code::Internal,
    }
}

/// An error that only exists in gRPC.
pub(super) fn error(code: Code, reason: &'static str, message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
    Status::with_error_details(code, cut(message.into(), MESSAGE_LIMIT), details)
}

/// An error as the whole response to a gRPC call.
pub(in crate::api) fn response(error: ServiceError) -> Response {
    Status::from(error).into_http()
}

/// The response to a gRPC call whose handler has panicked.
pub(in crate::api) fn crashed(message: &str) -> Response {
    error(Code::Internal, "INTERNAL", message).into_http()
}

/// How many of these fit.
fn fitting(violations: &[Violation]) -> usize {
    let mut room = VIOLATIONS_LIMIT;
    let fits = |one: &&Violation| {
        // Three tags and lengths: of the violation and its two texts.
        let size = one.field.len() + one.description.len() + 8;
        let fits = size <= room;
        room = room.saturating_sub(size);
        fits
    };
    violations.iter().take_while(fits).count()
}

/// Violations for bad lines, each short enough that all fit. The error's message describes the first line in full.
fn few_words(violations: &[Violation]) -> Vec<Violation> {
    let all = |most| -> Vec<Violation> {
        let short =
            |one: &Violation| Violation { field: one.field.clone(), description: shortened(&one.description, most) };
        violations.iter().map(short).collect()
    };
    [280, 140, 100, 80, 60, 45, 35]
        .into_iter()
        .map(all)
        .find(|violations| fitting(violations) == violations.len())
        .unwrap_or_else(|| all(25))
}

/// Corrects tonic's own status for an unreadable message: tonic calls it an internal error, although the client caused
/// it. Other statuses pass unchanged.
pub(super) fn unreadable(status: Status) -> Status {
    if !status.details().is_empty() {
        return status;
    }
    match status.code() {
        Code::Internal => error(Code::InvalidArgument, "MESSAGE_UNREADABLE", status.message()),
        Code::OutOfRange | Code::ResourceExhausted => {
            let message = format!("a message is larger than {} bytes", crate::api::MESSAGE_LIMIT);
            error(Code::ResourceExhausted, "MESSAGE_TOO_LARGE", message)
        }
        _ => status,
    }
}

fn cut(mut text: String, bytes: usize) -> String {
    if text.len() > bytes {
        text.truncate(text.floor_char_boundary(bytes - '…'.len_utf8()));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::{
        ingest::{Fault, IngestError, LineReport},
        service::{ingest_error, line_name, short},
    };

    const FAULT: Fault = Fault { code: "invalid_request", param: None };

    fn ingest(error: IngestError, name: fn(u64) -> String) -> Status {
        ingest_error(error, name).into()
    }

    fn reason(status: &Status) -> String {
        let info = status.get_details_error_info().expect("ErrorInfo always");
        assert_eq!(info.domain, DOMAIN);
        info.reason
    }

    #[test]
    fn when_to_try_again_is_told() {
        let error = ServiceError::retry(service::Code::Unavailable, "X", "x", Duration::from_millis(1_500));
        let status = Status::from(error);
        assert_eq!((status.code(), reason(&status).as_str()), (Code::Unavailable, "X"));
        assert_eq!(status.get_details_retry_info().unwrap().retry_delay, Some(Duration::from_millis(1_500)));
        let status = Status::from(ServiceError::new(service::Code::NotFound, "Y", "y"));
        assert!(status.get_details_retry_info().is_none() && status.get_details_bad_request().is_none());
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
        let report = |line| LineReport { line, custom_id: Some(text.clone()), message: text.clone(), fault: FAULT };
        let errors: Vec<_> = (1_000_000..1_000_100).map(report).collect();
        let status = ingest(IngestError::Invalid { errors, total: u64::MAX }, line_name);
        assert!(size(&status) < LIMIT, "{}", size(&status));
        let violations = vec![Violation { field: short(&text), description: text.clone() }; 40];
        let status = Status::from(ServiceError::invalid("INVALID_REQUEST", text.clone(), violations));
        assert!(size(&status) < LIMIT, "{}", size(&status));
        let status = Status::from(ServiceError::field("cursor", text));
        assert!(size(&status) < LIMIT, "{}", size(&status));
    }

    #[test]
    fn one_bad_line_is_told_in_full() {
        let message = "url is \"/v1/foo\"; expected one of /v1/chat/completions, /v1/completions, /v1/embeddings, \
                       /v1/responses, /v1/score, /v1/rerank";
        let report = LineReport { line: 7, custom_id: Some("request-7".into()), message: message.into(), fault: FAULT };
        let status = ingest(IngestError::Invalid { errors: vec![report], total: 1 }, line_name);
        let description = format!("{message} (custom_id \"request-7\")");
        assert_eq!(status.message(), format!("1 bad line; line 7: {description}"));
        assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].description, description);
    }

    #[test]
    fn a_hundred_bad_lines_are_all_listed() {
        let message = "url is /v1/embeddings; expected /v1/chat/completions as in line 1: one file, one url";
        let errors = (999_900..1_000_000)
            .map(|line| LineReport {
                line,
                custom_id: Some(format!("request-{line}")),
                message: message.into(),
                fault: FAULT,
            })
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
                .map(|(line, (message, custom_id))| LineReport { line: line * 9_999, custom_id, message, fault: FAULT })
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
