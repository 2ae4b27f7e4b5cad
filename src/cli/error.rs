//! Error messages for people.

use std::{error::Error, fmt::Write as _, io, time::Duration};

use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::printable::escaped;
use crate::words::{self, Peer};

/// The text after `error:`. `None` if the reader of our output went away, as `| head` does, which is not an error.
#[must_use]
pub fn report(error: &anyhow::Error) -> Option<String> {
    let broken_pipe = |cause: &(dyn Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(broken_pipe) {
        return None;
    }
    let mut text = String::new();
    for (depth, cause) in error.chain().enumerate() {
        let status = cause.downcast_ref::<Status>();
        let line = match (status, cause.downcast_ref::<io::Error>()) {
            (Some(status), _) => describe(status),
            // The wrapped error is printed further down.
            (None, Some(file)) if file.get_ref().is_none() => words::file(file),
            (None, _) => cause.to_string(),
        };
        if depth == 0 {
            text.push_str(&line);
        } else if !text.contains(&line) {
            let _ = write!(text, "\n  caused by: {line}");
        }
        if status.is_some() {
            // Its causes are details of the transport; the hint says more.
            break;
        }
    }
    Some(escaped(&text).into_owned())
}

/// A gRPC status with its reason, its field violations and a hint.
fn describe(status: &Status) -> String {
    let details = status.get_error_details();
    let mut text = brief(status);
    let code = code_name(status.code());
    match details.error_info() {
        Some(info) if !info.reason.is_empty() => {
            let _ = write!(text, " ({code}, {})", info.reason);
        }
        _ => {
            let _ = write!(text, " ({code})");
        }
    }
    let violations = details.bad_request().map(|bad| bad.field_violations.as_slice()).unwrap_or_default();
    // A single violation is usually in the message already.
    let told = |one: &tonic_types::FieldViolation| text.contains(&format!("{}: {}", one.field, one.description));
    let violations = if violations.len() == 1 && told(&violations[0]) { &[] } else { violations };
    for violation in violations {
        let _ = match violation.field.as_str() {
            "" => write!(text, "\n  {}", violation.description),
            field => write!(text, "\n  {field}: {}", violation.description),
        };
    }
    for violation in details.precondition_failure().map(|failed| failed.violations.as_slice()).unwrap_or_default() {
        let _ = write!(text, "\n  {}", violation.description);
    }
    if let Some(hint) = hint(status) {
        let _ = write!(text, "\n  {hint}");
    }
    text
}

/// What happened, in one line: the server's message, or ours for an error that no server sent.
#[must_use]
pub fn brief(status: &Status) -> String {
    if let Some(source) = status.source().filter(|_| is_lost_connection(status)) {
        return format!("no connection to the server: {}", words::cause(Peer::Server, source));
    }
    if let Some(words) = proxy_status(status.message()).and_then(words::proxy) {
        return words;
    }
    if is_cut_off(status) {
        return "the answer is incomplete: the server, or a proxy in front of it, ended the call early".to_owned();
    }
    match status.message() {
        "" => status.code().to_string(),
        message => message.to_owned(),
    }
}

/// The HTTP status of an answer that did not come from a gRPC server; the library puts it into its message.
fn proxy_status(message: &str) -> Option<u16> {
    let after = ["with status: ", "mapped from HTTP status code "]
        .iter()
        .find_map(|before| message.split_once(before).map(|(_, after)| after))?;
    after.get(..3)?.parse().ok()
}

/// Whether a stream ended without a status, as when a proxy ends it.
fn is_cut_off(status: &Status) -> bool {
    status.code() == Code::Unknown && status.message().contains("missing grpc-status trailer")
}

fn hint(status: &Status) -> Option<&'static str> {
    let lost = status.source().filter(|_| is_lost_connection(status));
    match status.code() {
        _ if lost.is_some_and(words::is_no_grpc) => Some(
            "check that this is the URL of a tidemill server, not of a worker; for a server with TLS use https://…",
        ),
        _ if lost.is_some_and(words::is_tls) => Some(
            "for a server without TLS use http://…; if it requires a client certificate, give --tls-client-cert FILE",
        ),
        Code::Internal | Code::Cancelled if lost.is_some() => Some(
            "check that this is the URL of a tidemill server: https://… with TLS, http://… without; if it requires a \
             client certificate, give --tls-client-cert FILE",
        ),
        _ if lost.is_some() => {
            Some("is the server running? Start it with `tidemill serve`, or give its URL: --server URL")
        }
        _ if proxy_status(status.message()).is_some() => None,
        Code::Unauthenticated => Some("give an access token: --token-file FILE or TIDEMILL_TOKEN"),
        Code::PermissionDenied => Some("the access token's role does not allow this: use a token with the role admin"),
        Code::Unimplemented => Some("the server does not know this call; it may be older than this command"),
        _ => None,
    }
}

/// Whether the same call may succeed a little later.
#[must_use]
pub fn is_transient(status: &Status) -> bool {
    status.code() == Code::Unavailable || is_lost_connection(status) || is_cut_off(status)
}

/// Whether the transport made up this status. Such a status has a cause; a status from the server has none.
#[must_use]
pub fn is_lost_connection(status: &Status) -> bool {
    let made_up = matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled);
    made_up && status.source().is_some()
}

/// The wait before attempt `attempt` (from 1) of a call that failed with `status`: what the server asks for, or
/// doubling. `jitter`, 0 to 1, spreads out clients that lost the same server.
#[must_use]
pub fn delay(status: &Status, attempt: u32, jitter: f64) -> Duration {
    const FIRST: Duration = Duration::from_millis(200);
    const LONGEST: Duration = Duration::from_secs(5);
    let asked = status.get_details_retry_info().and_then(|info| info.retry_delay);
    let wait = asked.unwrap_or_else(|| FIRST * 2u32.saturating_pow(attempt.saturating_sub(1).min(10))).min(LONGEST);
    wait.mul_f64(0.75 + 0.5 * jitter.clamp(0.0, 1.0))
}

fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use anyhow::Context;
    use tonic_types::ErrorDetails;

    use super::*;
    use crate::pb;

    #[test]
    fn a_status_shows_reason_and_violations() {
        let mut details = ErrorDetails::with_error_info("INVALID_FILE", "tidemill", HashMap::new());
        details.add_bad_request_violation("line 17", "custom_id is missing");
        details.add_bad_request_violation("line 18", "not JSON");
        let status = Status::with_error_details(Code::InvalidArgument, "2 bad lines", details);
        let error = Err::<(), _>(status).context("upload of in.jsonl").unwrap_err();
        assert_eq!(
            report(&error).unwrap(),
            "upload of in.jsonl\n  caused by: 2 bad lines (INVALID_ARGUMENT, INVALID_FILE)\n  line 17: custom_id is \
             missing\n  line 18: not JSON"
        );
    }

    #[test]
    fn one_violation_is_not_said_twice() {
        let mut details = ErrorDetails::with_error_info("INVALID_REQUEST", "tidemill", HashMap::new());
        details.add_bad_request_violation("url", "is none");
        let status = Status::with_error_details(Code::InvalidArgument, "url: is none", details);
        assert_eq!(report(&status.into()).unwrap(), "url: is none (INVALID_ARGUMENT, INVALID_REQUEST)");
    }

    #[tokio::test]
    async fn a_hundred_bad_lines_arrive() {
        let (_, url) = super::super::fake::Fake::start("").await;
        let create = pb::CreateBatchRequest::default();
        let error = super::super::fake::client(&url).batches().create_batch(create).await.unwrap_err();
        let text = report(&error.into()).unwrap();
        assert_eq!(text.lines().count(), 101, "{text}");
        assert!(text.lines().last().unwrap().starts_with("  line 100: xxx"));
    }

    #[test]
    fn what_to_do_next_is_said() {
        let refused = Status::from_error(Box::new(io::Error::new(io::ErrorKind::ConnectionRefused, "refused")));
        assert!(is_transient(&refused), "{refused:?}");
        assert!(report(&refused.into()).unwrap().contains("tidemill serve"));
        let draining = Status::unavailable("shutting down");
        assert!(is_transient(&draining));
        assert!(!report(&draining.into()).unwrap().contains("tidemill serve"), "it runs: it said so itself");
        assert!(report(&Status::unauthenticated("no token").into()).unwrap().contains("--token-file"));
        assert!(!is_transient(&Status::internal("bug")));
        assert_eq!(report(&Status::not_found("").into()).unwrap(), "Some requested entity was not found (NOT_FOUND)");
    }

    #[tokio::test]
    async fn a_server_that_speaks_otherwise_is_no_server_that_is_away() {
        use tokio::io::AsyncWriteExt as _;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            // A TLS alert, as a TLS server answers plain text.
            while let Ok((mut client, _)) = listener.accept().await {
                let _ = client.write_all(&[0x15, 3, 3, 0, 2, 2, 0x32, 0, 0, 0, 0, 0]).await;
            }
        });
        let answer = super::super::fake::client(&url).batches().get_batch(pb::GetBatchRequest::default()).await;
        let text = report(&answer.unwrap_err().into()).unwrap();
        // Which of the two is seen first is the system's choice.
        let told = ["does not speak HTTP/2", "the connection was closed"].iter().any(|words| text.contains(words));
        assert!(text.contains("https://") && text.contains("a tidemill server") && told, "{text}");
        let unknown = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        let status = Status::from_error(Box::new(io::Error::new(io::ErrorKind::InvalidData, unknown)));
        let text = report(&status.into()).unwrap();
        assert!(text.contains("self-signed") && text.contains("--tls-ca FILE"), "{text}");
    }

    #[test]
    fn what_a_proxy_answers_is_told_in_words() {
        for (code, message, words) in [
            (
                Code::Internal,
                "protocol error: received message with invalid compression flag: 60 (valid flags are 0 and 1) while receiving \
                 response with status: 413 Payload Too Large",
                "refuses bodies of this size: raise its limit (in nginx client_max_body_size) (HTTP 413) (INTERNAL)",
            ),
            (
                Code::Unavailable,
                "grpc-status header missing, mapped from HTTP status code 502",
                "can't reach it: is the server running? (HTTP 502) (UNAVAILABLE)",
            ),
            (
                Code::Unavailable,
                "grpc-status header missing, mapped from HTTP status code 504",
                "gave up waiting for it: raise its time-out",
            ),
            (
                Code::Unauthenticated,
                "grpc-status header missing, mapped from HTTP status code 401",
                "asks for a login of its own",
            ),
            (
                Code::Unimplemented,
                "grpc-status header missing, mapped from HTTP status code 404",
                "no gRPC server answers",
            ),
            (
                Code::Unknown,
                "protocol error: missing grpc-status trailer, stream was terminated without a final status (possible \
                 truncation by a proxy or load balancer)",
                "the answer is incomplete",
            ),
        ] {
            let text = report(&Status::new(code, message).into()).unwrap();
            assert!(text.contains(words), "{message}\n{text}");
            assert!(!text.contains("protocol error") && !text.contains("grpc-status"), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn an_error_holds_any_text(text in super::super::printable::tests::text(), code in 1..17_i32) {
            let mut details = ErrorDetails::with_error_info(&text, &text, HashMap::new());
            details.add_bad_request_violation(&text, &text);
            details.add_precondition_failure_violation(&text, &text, &text);
            let status = Status::with_error_details(Code::from(code), &text, details);
            let shown = report(&Err::<(), _>(status).context(text).unwrap_err()).unwrap();
            proptest::prop_assert!(!shown.chars().any(|char| char.is_control() && char != '\n' && char != '\t'));
        }
    }

    #[test]
    fn a_reader_that_went_away_is_no_error() {
        let error = anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe)).context("writing results");
        assert_eq!(report(&error), None);
    }

    #[test]
    fn delays_grow_to_a_bound_and_follow_the_server() {
        let status = Status::unavailable("");
        let delays: Vec<_> = (1..=8).map(|attempt| delay(&status, attempt, 0.5).as_millis()).collect();
        assert_eq!(delays, [200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
        assert!(delay(&status, u32::MAX, 1.0) <= Duration::from_millis(6_250));
        let details = ErrorDetails::with_retry_info(Some(Duration::from_secs(2)));
        let asked = Status::with_error_details(Code::Unavailable, "", details);
        assert_eq!(delay(&asked, 1, 0.5), Duration::from_secs(2));
    }
}
