//! Errors as people read them.

use std::{error::Error, fmt::Write as _, io, time::Duration};

use tonic::{Code, Status};
use tonic_types::StatusExt;

/// What `error:` is followed by. None: the reader of our output went away, as `| head` does, which is no error.
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
        let line = status.map_or_else(|| cause.to_string(), describe);
        if depth == 0 {
            text.push_str(&line);
        } else if !text.contains(&line) {
            let _ = write!(text, "\n  caused by: {line}");
        }
        if status.is_some() {
            // Its causes are the transport's innards; the hint says more.
            break;
        }
    }
    Some(text)
}

/// A status with its reason, its violations and what to do next.
fn describe(status: &Status) -> String {
    let details = status.get_error_details();
    let mut text = match status.message() {
        "" => status.code().to_string(),
        message => message.to_owned(),
    };
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
    // One alone is most often in the message already.
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

fn hint(status: &Status) -> Option<&'static str> {
    match status.code() {
        _ if is_lost_connection(status) && status.message().contains("certificate") => {
            Some("name who vouches for the server: --tls-ca FILE; and who vouches for you: --tls-client-cert FILE")
        }
        Code::Internal | Code::Cancelled if is_lost_connection(status) => Some(
            "does the server have TLS? then name it https://…, else http://…; does it want a client certificate? then \
             --tls-client-cert FILE",
        ),
        _ if is_lost_connection(status) => {
            Some("is the server running? start it with `tidemill serve`, or name another: --server URL")
        }
        Code::Unauthenticated => Some("give an access token: --token-file FILE or TIDEMILL_TOKEN"),
        Code::PermissionDenied => Some("the access token's role does not allow this: use one with the role admin"),
        Code::Unimplemented => Some("the server does not know this call: is it older than this command?"),
        _ => None,
    }
}

/// Whether the same call may well succeed a little later.
#[must_use]
pub fn is_transient(status: &Status) -> bool {
    status.code() == Code::Unavailable || is_lost_connection(status)
}

/// A status that no server sent: the transport made it up. Those have a cause; those from the wire have none.
fn is_lost_connection(status: &Status) -> bool {
    let made_up = matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled);
    made_up && status.source().is_some()
}

/// How long to wait before attempt `attempt` (from 1) of a call that failed so: what the server asks for, or twice as
/// long each time. `jitter`, 0 to 1, spreads clients that all lost the same server.
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
        assert!(text.contains("https://"), "{text}");
        let refused = io::Error::new(io::ErrorKind::InvalidData, "invalid peer certificate: UnknownIssuer");
        let status = Status::from_error(Box::new(refused));
        assert!(report(&status.into()).unwrap().contains("--tls-ca"));
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
