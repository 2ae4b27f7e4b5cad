//! New batches: the requests of the body become the lines of an input file while they come.

use axum::{
    Extension,
    extract::{Request, State},
};
use futures::future::BoxFuture;
use http::{HeaderMap, StatusCode};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::{
    Answer,
    batch::shown,
    split::{Malformed, Splitter},
};
use crate::{
    access::{Account, Caller, Received},
    api::v1::{
        body::{Pieces, drain, length, pieces, plain},
        problem::Problem,
        request::{By, Of, idempotency_key},
    },
    domain::Endpoint,
    ingest::LineReport,
    service::{
        Service, ServiceError,
        files::{FileUpload, Patience},
        short,
    },
};

/// The most requests of a batch, and the most bytes of the body that has them.
const REQUESTS: usize = 100_000;
const BYTES: u64 = 256 * 1024 * 1024;
/// The most bad requests that a message describes.
const DESCRIBED: usize = 10;

pub(super) async fn create(
    State(service): Of,
    By(caller): By,
    Extension(account): Extension<Account>,
    Extension(received): Extension<Received>,
    request: Request,
) -> Answer {
    let (parts, body) = request.into_parts();
    let mut pieces = pieces(body);
    let create = Create { service: &service, caller: &caller, account: &account, headers: &parts.headers, received };
    let taken = service.in_time(create.take(&mut pieces)).await;
    // The answer comes at once, whatever is still on its way.
    drain(&parts.headers, pieces);
    let (upload, key) = taken?;
    // All of it is here: a client that goes away now has its batch, and never half of it.
    let made = tokio::spawn(async move { service.batch_of_requests(&caller, &account, upload, key).await });
    let made = made.await.map_err(|_| Problem::internal("the server has met a bug in this call; its log says more"))?;
    Ok(shown(&made.map_err(bad_requests)?))
}

/// The creation of one batch.
struct Create<'a> {
    service: &'a Service,
    caller: &'a Caller,
    account: &'a Account,
    headers: &'a HeaderMap,
    received: Received,
}

impl Create<'_> {
    /// Takes the body. If that fails, nothing is left of it.
    fn take<'a>(&'a self, pieces: &'a mut Pieces) -> BoxFuture<'a, Result<(FileUpload, String), Problem>> {
        Box::pin(async move {
            plain(self.headers)?;
            let key = idempotency_key(self.headers)?;
            if length(self.headers).is_some_and(|length| length > BYTES) {
                return Err(too_large());
            }
            let mut splitter = Splitter::new(REQUESTS, self.service.longest_line());
            let mut patience = Patience::new(self.received.clone());
            let (mut upload, mut lines, mut came) = (None::<FileUpload>, Vec::new(), 0);
            loop {
                let gives_way = upload.as_ref().map(FileUpload::gives_way);
                let Some(piece) = patience.next_of(self.service, gives_way, pieces).await? else { break };
                came += piece.len() as u64;
                if came > BYTES {
                    return Err(too_large());
                }
                splitter.push(&piece, |index, request| write_line(index, request, &mut lines))?;
                if lines.is_empty() {
                    continue;
                }
                let upload = match &mut upload {
                    Some(upload) => upload,
                    none => none.insert(self.begin(&key).await?),
                };
                upload.write(std::mem::take(&mut lines).into()).await?;
            }
            splitter.finish()?;
            // With a request there is an upload.
            let upload = upload.ok_or(Malformed::Empty)?;
            Ok((upload, key))
        })
    }

    async fn begin(&self, key: &str) -> Result<FileUpload, ServiceError> {
        self.service.begin_requests(self.caller, self.account, key.to_owned(), self.received.clone()).await
    }
}

fn too_large() -> Problem {
    let message = format!("the request body is larger than {BYTES} bytes: make several batches of its requests");
    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
}

impl From<Malformed> for Problem {
    fn from(why: Malformed) -> Self {
        Problem::new(StatusCode::BAD_REQUEST, "invalid_request", why.to_string())
    }
}

/// Writes a request as a line. The values keep their bytes; what they may be is for the check of the line to say, so that
/// all that are wrong are named together.
fn write_line(index: usize, request: &[u8], lines: &mut Vec<u8>) -> Result<(), Problem> {
    #[derive(Deserialize)]
    struct Fields<'a> {
        #[serde(borrow)]
        custom_id: Option<&'a RawValue>,
        #[serde(borrow)]
        params: Option<&'a RawValue>,
    }
    let fields: Fields<'_> = serde_json::from_slice(request).map_err(|error| {
        let kind = if error.is_data() { "" } else { "not valid JSON: " };
        Problem::new(StatusCode::BAD_REQUEST, "invalid_request", format!("requests[{index}]: {kind}{error} of it"))
    })?;
    lines.push(b'{');
    for (name, value) in [("custom_id", fields.custom_id), ("body", fields.params)] {
        if let Some(value) = value {
            lines.extend_from_slice(format!("\"{name}\":").as_bytes());
            // In valid JSON a line feed occurs only between tokens, where a space means the same.
            let plain = |byte: u8| if matches!(byte, b'\n' | b'\r') { b' ' } else { byte };
            lines.extend(value.get().bytes().map(plain));
            lines.push(b',');
        }
    }
    lines.extend_from_slice(format!("\"method\":\"POST\",\"url\":\"{}\"}}\n", Endpoint::Messages).as_bytes());
    Ok(())
}

/// Bad lines in the words of those who sent requests.
fn bad_requests(error: ServiceError) -> Problem {
    let Some(bad) = error.bad_lines.as_ref().filter(|_| error.reason == "INVALID_FILE") else { return error.into() };
    let described: Vec<String> = bad.reports.iter().take(DESCRIBED).map(in_place).collect();
    let more = match bad.total - described.len() as u64 {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    let message = format!("{}{more}", described.join("; "));
    Problem::from(error).saying(message)
}

/// What is wrong with a request, and which one it is.
fn in_place(report: &LineReport) -> String {
    let id = report.custom_id.as_ref().map(|id| format!(" (custom_id {:?})", short(id))).unwrap_or_default();
    // Here the body of a line is called otherwise, and so are lines.
    let message = match report.message.strip_prefix("body") {
        Some(rest) => format!("params{rest}"),
        None => by_index(&report.message).replace("in the file", "in the batch"),
    };
    format!("requests[{}]{id}: {message}", report.line.saturating_sub(1))
}

/// A message that names another line, with the index of its request.
fn by_index(message: &str) -> String {
    let Some((before, rest)) = message.split_once("in line ") else { return message.to_owned() };
    let end = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
    match rest[..end].parse::<u64>() {
        Ok(line) => format!("{before}in requests[{}]{}", line.saturating_sub(1), &rest[end..]),
        Err(_) => message.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::request_line;

    #[test]
    fn params_become_the_body_byte_for_byte_on_one_line() {
        let mut lines = Vec::new();
        let request = b"{\"params\" : {\"model\":\"m\",\n \"x\":1.0e2, \"y\":\"\\u00e9\\n\"} , \"custom_id\":\"a\\u0062\",\"z\":[]}";
        write_line(0, request, &mut lines).map_err(|problem| problem.object()).unwrap();
        assert_eq!(lines.iter().filter(|byte| **byte == b'\n').count(), 1);
        let line = request_line::parse(lines.trim_ascii_end()).unwrap();
        assert_eq!((&*line.custom_id, line.endpoint, &*line.model), ("ab", Endpoint::Messages, "m"));
        assert_eq!(line.body, "{\"model\":\"m\",  \"x\":1.0e2, \"y\":\"\\u00e9\\n\"}");
    }

    #[test]
    fn lines_are_named_by_their_requests() {
        assert_eq!(by_index("it is already in line 12; expected"), "it is already in requests[11]; expected");
        assert_eq!(by_index("in line up"), "in line up");
    }

    #[test]
    fn a_request_smuggles_no_field_into_its_line() {
        for request in [
            r#"{"custom_id":"a","custom_id":"b","params":{}}"#,
            r#"{"custom_id":"a","params":{},"params":{}}"#,
            r#"{"custom_id":"a","params":{}]}"#,
            r#"{"custom_id":"a","params":{"a":}}"#,
        ] {
            let wrong = write_line(7, request.as_bytes(), &mut Vec::new()).map_err(|problem| problem.object());
            let message = wrong.unwrap_err()["message"].clone();
            assert!(message.as_str().unwrap().starts_with("requests[7]: "), "{message}");
        }
    }
}
