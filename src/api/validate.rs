//! Wire types to domain types: what comes out is valid, what is not is named field by field.
//!
//! Lengths are in bytes, as the protos say.

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use tonic::Status;

use super::status::{self, Violations, invalid_field, short};
use crate::{
    domain::{
        BatchId, BatchStatus, Endpoint, FileId, Priority, WorkerId,
        batch::{DEFAULT_WINDOW, WINDOW_RANGE},
        request_line,
        text::{is_plain, is_storable},
    },
    ingest::{INLINE_MAX_BYTES, INLINE_MAX_REQUESTS, InlineRequest},
    pb,
    progress::{DEFAULT_INTERVAL, INTERVAL_RANGE},
};

/// The most bytes of a request id.
const REQUEST_ID: usize = 128;
/// The most bytes of a file name.
const FILENAME: usize = 255;
/// The most bytes of an id or a model in a request: longer ones can't be any.
const NAME: usize = 512;
/// The most pairs of metadata, and bytes of a key and of a value.
const METADATA: (usize, usize, usize) = (16, 64, 512);
/// The most inline requests, and their bytes together.
const INLINE: (usize, usize) = (INLINE_MAX_REQUESTS, INLINE_MAX_BYTES);
/// The most bytes of a chunk of an upload.
const CHUNK: usize = 1024 * 1024;

fn storable(text: &str, most: usize) -> bool {
    text.len() <= most && is_storable(text)
}

/// A batch's id. One that can't be any is not found.
pub(super) fn batch_id(text: &str) -> Result<BatchId, Status> {
    if text.is_empty() {
        return Err(invalid_field("batch_id", "is empty"));
    }
    let id = BatchId::from_text(text);
    if storable(text, NAME) { Ok(id) } else { Err(status::no_batch(&id)) }
}

/// A file's id. One that can't be any is not found.
pub(super) fn file_id(text: &str) -> Result<FileId, Status> {
    if text.is_empty() {
        return Err(invalid_field("file_id", "is empty"));
    }
    let id = FileId::from_text(text);
    if storable(text, NAME) { Ok(id) } else { Err(status::no_file(&id)) }
}

/// A worker's id.
pub(super) fn worker_id(text: &str) -> Result<WorkerId, Status> {
    if text.is_empty() {
        return Err(invalid_field("worker_id", "is empty"));
    }
    let id = WorkerId::from_text(text);
    if storable(text, NAME) { Ok(id) } else { Err(status::fleet(crate::fleet::FleetError::NotFound(id))) }
}

/// An idempotency key; empty is none.
fn request_id(text: String, wrong: &mut Violations, field: &str) -> Option<String> {
    // Control characters are kept for the keys that the server makes itself.
    let good = text.len() <= REQUEST_ID && is_plain(&text);
    wrong.check(good, field, format!("must be at most {REQUEST_ID} bytes without control characters"));
    (!text.is_empty()).then_some(text)
}

/// None: negative, or not as a Duration must be. (prost's own conversion overflows at `i64::MIN`.)
fn duration(of: prost_types::Duration) -> Option<Duration> {
    let nanos = u32::try_from(of.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    Some(Duration::new(u64::try_from(of.seconds).ok()?, nanos))
}

fn window(of: Option<prost_types::Duration>, wrong: &mut Violations) -> Duration {
    let Some(given) = of else { return DEFAULT_WINDOW };
    let (least, most) = WINDOW_RANGE;
    let window = duration(given).filter(|window| (least..=most).contains(window));
    wrong.check(window.is_some(), "completion_window", "must be 3600s (1 h) to 1209600s (14 d)");
    window.unwrap_or(DEFAULT_WINDOW)
}

/// The least time between two progress events.
pub(super) fn min_interval(of: Option<prost_types::Duration>) -> Result<Duration, Status> {
    let Some(given) = of else { return Ok(DEFAULT_INTERVAL) };
    let (least, most) = INTERVAL_RANGE;
    duration(given)
        .filter(|interval| (least..=most).contains(interval))
        .ok_or_else(|| invalid_field("min_interval", "must be 0.050s to 60s"))
}

/// Where to go on.
pub(super) fn not_negative(value: i64, field: &str) -> Result<i64, Status> {
    if value < 0 { Err(invalid_field(field, "must not be negative")) } else { Ok(value) }
}

fn metadata(of: &BTreeMap<String, String>, wrong: &mut Violations) {
    let (pairs, key_bytes, value_bytes) = METADATA;
    wrong.check(of.len() <= pairs, "metadata", format!("must have at most {pairs} pairs, has {}", of.len()));
    for (key, value) in of.iter().take(pairs) {
        let field = || format!("metadata[{:?}]", short(key));
        if key.is_empty() || !storable(key, key_bytes) {
            wrong.add(field(), format!("the key must be 1 to {key_bytes} bytes without NUL"));
        }
        if !storable(value, value_bytes) {
            wrong.add(field(), format!("the value must be at most {value_bytes} bytes without NUL"));
        }
    }
}

fn endpoint(text: &str, wrong: &mut Violations) -> Option<Endpoint> {
    let known = text.parse().ok();
    wrong.check(known.is_some(), "endpoint", format!("must be one of {}", Endpoint::list()));
    known
}

/// What is uploaded.
#[derive(Debug)]
pub(super) struct Spec {
    pub(super) filename: String,
    pub(super) total_bytes: Option<u64>,
    pub(super) request_id: Option<String>,
}

pub(super) fn spec(of: pb::FileSpec) -> Result<Spec, Status> {
    let mut wrong = Violations::default();
    let good = of.filename.len() <= FILENAME && is_plain(&of.filename);
    wrong.check(good, "spec.filename", format!("must be at most {FILENAME} bytes without control characters"));
    wrong.check(matches!(of.purpose.as_str(), "" | "batch"), "spec.purpose", "must be \"batch\" or empty");
    wrong.check(of.total_bytes >= 0, "spec.total_bytes", "must not be negative");
    let request_id = request_id(of.request_id, &mut wrong, "spec.request_id");
    wrong.finish()?;
    Ok(Spec {
        filename: if of.filename.is_empty() { "upload.jsonl".to_owned() } else { of.filename },
        total_bytes: u64::try_from(of.total_bytes).ok().filter(|bytes| *bytes > 0),
        request_id,
    })
}

/// A chunk of an upload.
pub(super) fn chunk(of: pb::UploadFileRequest) -> Result<Bytes, Status> {
    use pb::upload_file_request::Payload;
    match of.payload {
        Some(Payload::Chunk(chunk)) if (1..=CHUNK).contains(&chunk.len()) => Ok(chunk),
        Some(Payload::Chunk(chunk)) => {
            Err(invalid_field("chunk", format!("must be 1 byte to 1 MiB, is {} bytes", chunk.len())))
        }
        Some(Payload::Spec(_)) => Err(invalid_field("spec", "may only be in the first message")),
        None => Err(invalid_field("chunk", "every message after the first must have one")),
    }
}

/// Where a new batch's requests come from.
#[derive(Debug)]
pub(super) enum BatchInput {
    File(FileId),
    Inline(Vec<InlineRequest>),
}

/// A new batch.
#[derive(Debug)]
pub(super) struct CreateBatch {
    pub(super) input: BatchInput,
    /// None: the file's.
    pub(super) endpoint: Option<Endpoint>,
    pub(super) window: Duration,
    pub(super) priority: Priority,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) request_id: Option<String>,
}

pub(super) fn create_batch(of: pb::CreateBatchRequest) -> Result<CreateBatch, Status> {
    use pb::create_batch_request::Input;
    let mut wrong = Violations::default();
    let inline = matches!(of.input, Some(Input::InlineRequests(_)));
    let endpoint = match of.endpoint.as_str() {
        "" if !inline => None,
        text => endpoint(text, &mut wrong),
    };
    let window = window(of.completion_window, &mut wrong);
    let priority = Priority::new(of.priority);
    wrong.check(priority.is_some(), "priority", "must be -1, 0 or 1");
    metadata(&of.metadata, &mut wrong);
    let request_id = request_id(of.request_id, &mut wrong, "request_id");
    let input = match of.input {
        Some(Input::InputFileId(id)) => {
            wrong.check(
                !id.is_empty() && storable(&id, NAME),
                "input_file_id",
                "must be a file that UploadFile returned",
            );
            Some(BatchInput::File(FileId::from_text(id)))
        }
        Some(Input::InlineRequests(of)) => Some(BatchInput::Inline(inline_requests(of, &mut wrong))),
        None => {
            wrong.add("input", "must be input_file_id or inline_requests");
            None
        }
    };
    wrong.finish()?;
    let input = input.ok_or_else(|| invalid_field("input", "must be input_file_id or inline_requests"))?;
    Ok(CreateBatch {
        input,
        endpoint,
        window,
        priority: priority.unwrap_or_default(),
        metadata: of.metadata,
        request_id,
    })
}

/// How many and how large they are; what is in them is for ingest to judge.
fn inline_requests(of: pb::InlineRequests, wrong: &mut Violations) -> Vec<InlineRequest> {
    let (most, bytes) = INLINE;
    let count = of.requests.len();
    wrong.check((1..=most).contains(&count), "inline_requests.requests", format!("must be 1 to {most}, are {count}"));
    let size: usize = of.requests.iter().map(|request| request.custom_id.len() + request.body.len()).sum();
    wrong.check(size <= bytes, "inline_requests", "must be 3 MiB together: upload a file instead");
    of.requests.into_iter().map(|request| InlineRequest { custom_id: request.custom_id, body: request.body }).collect()
}

/// Names an inline request in the violations.
pub(super) fn inline_name(line: u64) -> String {
    format!("inline_requests.requests[{}]", line.saturating_sub(1))
}

/// The completion window and the idempotency key of a retry.
pub(super) fn retry(
    completion_window: Option<prost_types::Duration>,
    id: String,
) -> Result<(Duration, Option<String>), Status> {
    let mut wrong = Violations::default();
    let window = window(completion_window, &mut wrong);
    let id = request_id(id, &mut wrong, "request_id");
    wrong.finish()?;
    Ok((window, id))
}

/// Which batches to list.
pub(super) fn batch_filter(of: &pb::ListBatchesRequest) -> Result<Vec<BatchStatus>, Status> {
    let mut wrong = Violations::default();
    let mut statuses = Vec::new();
    for (at, status) in of.statuses.iter().enumerate() {
        match pb::BatchStatus::try_from(*status).ok().and_then(batch_status) {
            Some(status) if statuses.contains(&status) => {}
            Some(status) => statuses.push(status),
            None => wrong.add(format!("statuses[{at}]"), "must be a known status other than BATCH_STATUS_UNSPECIFIED"),
        }
    }
    wrong.check(storable(&of.model, NAME), "model", format!("must be at most {NAME} bytes without NUL"));
    metadata(&of.metadata, &mut wrong);
    wrong.finish()?;
    Ok(statuses)
}

fn batch_status(of: pb::BatchStatus) -> Option<BatchStatus> {
    Some(match of {
        pb::BatchStatus::Unspecified => return None,
        pb::BatchStatus::Validating => BatchStatus::Validating,
        pb::BatchStatus::InProgress => BatchStatus::InProgress,
        pb::BatchStatus::Finalizing => BatchStatus::Finalizing,
        pb::BatchStatus::Completed => BatchStatus::Completed,
        pb::BatchStatus::Failed => BatchStatus::Failed,
        pb::BatchStatus::Expired => BatchStatus::Expired,
        pb::BatchStatus::Cancelling => BatchStatus::Cancelling,
        pb::BatchStatus::Cancelled => BatchStatus::Cancelled,
    })
}

/// The purpose to list files by; empty: any.
pub(super) fn purpose(text: String) -> Result<Option<String>, Status> {
    match text.as_str() {
        "" => Ok(None),
        "batch" | "batch_output" => Ok(Some(text)),
        _ => Err(invalid_field("purpose", "must be \"batch\", \"batch_output\" or empty")),
    }
}

/// One request to run now: its endpoint, its model, its body.
pub(super) fn infer(of: pb::InferRequest) -> Result<(Endpoint, String, Bytes), Status> {
    #[derive(serde::Deserialize)]
    struct Body<'a> {
        #[serde(borrow)]
        model: std::borrow::Cow<'a, str>,
        #[serde(default)]
        stream: Option<bool>,
    }
    let mut wrong = Violations::default();
    let endpoint = endpoint(&of.endpoint, &mut wrong);
    let body = serde_json::from_slice::<Body<'_>>(&of.body);
    let model = match &body {
        Ok(body) if body.model.is_empty() => {
            wrong.add("body", "\"model\" is empty");
            String::new()
        }
        Ok(body) if !is_plain(&body.model) => {
            wrong.add("body", "\"model\" has a control character");
            String::new()
        }
        Ok(body) => {
            wrong.check(body.stream != Some(true), "body", "\"stream\" must not be true: the answer comes whole");
            body.model.clone().into_owned()
        }
        Err(error) => {
            // As a line's body is refused; what only this reader minds (a model twice) in the reader's words.
            let why = request_line::model_of(&of.body).err().map_or_else(|| error.to_string(), |why| why.to_string());
            wrong.add("body", format!("must be a JSON object with a string \"model\": {why}"));
            String::new()
        }
    };
    wrong.finish()?;
    let endpoint = endpoint.ok_or_else(|| invalid_field("endpoint", "is unknown"))?;
    Ok((endpoint, model, of.body))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tonic_types::StatusExt;

    use super::*;

    fn fields(status: &Status) -> Vec<String> {
        status.get_details_bad_request().unwrap().field_violations.into_iter().map(|one| one.field).collect()
    }

    fn seconds(seconds: i64, nanos: i32) -> Option<prost_types::Duration> {
        Some(prost_types::Duration { seconds, nanos })
    }

    #[test]
    fn everything_wrong_is_named_at_once() {
        let request = pb::CreateBatchRequest {
            endpoint: "/v1/nothing".into(),
            completion_window: seconds(60, 0),
            priority: 7,
            metadata: [(String::new(), "x".repeat(513))].into(),
            request_id: "x".repeat(129),
            ..Default::default()
        };
        let status = create_batch(request).unwrap_err();
        let expected =
            ["endpoint", "completion_window", "priority", "metadata[\"\"]", "metadata[\"\"]", "request_id", "input"];
        assert_eq!(fields(&status), expected);
    }

    #[test]
    fn the_edges_are_inside() {
        for (good, window) in [
            (true, seconds(3_600, 0)),
            (true, seconds(1_209_600, 0)),
            (false, seconds(3_599, 999_999_999)),
            (false, seconds(1_209_600, 1)),
            (false, seconds(-1, 0)),
            (false, seconds(i64::MAX, 0)),
            (false, seconds(i64::MIN, i32::MIN)),
            (false, seconds(7_200, -1)),
            (false, seconds(7_200, 1_000_000_000)),
        ] {
            assert_eq!(retry(window, String::new()).is_ok(), good, "{window:?}");
        }
        assert!(min_interval(seconds(0, 50_000_000)).is_ok() && min_interval(seconds(0, 49_999_999)).is_err());
        assert!(min_interval(seconds(60, 0)).is_ok() && min_interval(seconds(60, 1)).is_err());
    }

    #[test]
    fn nul_never_reaches_the_database() {
        assert_eq!(batch_id("batch_\0").unwrap_err().code(), tonic::Code::NotFound);
        assert_eq!(file_id("\0").unwrap_err().code(), tonic::Code::NotFound);
        let request = pb::ListBatchesRequest { model: "\0".into(), statuses: vec![0, 99, 1, 1], ..Default::default() };
        assert_eq!(fields(&batch_filter(&request).unwrap_err()), ["statuses[0]", "statuses[1]", "model"]);
        assert!(retry(None, "a\u{1}".into()).is_err());
    }

    #[test]
    fn a_request_to_run_now_names_its_model_and_wants_no_stream() {
        let of =
            |body: &str| infer(pb::InferRequest { endpoint: "/v1/completions".into(), body: body.to_owned().into() });
        let (_, model, body) = of(r#"{"a":[1.0e5], "model":"\u006d"}"#).unwrap();
        assert_eq!((model.as_str(), &body[..]), ("m", &br#"{"a":[1.0e5], "model":"\u006d"}"#[..]));
        assert!(of(r#"{"model":"m","stream":false}"#).is_ok());
        for bad in [
            "",
            "[]",
            "{}",
            r#"{"model":1}"#,
            r#"{"model":""}"#,
            r#"{"model":"m\u0000"}"#,
            r#"{"model":"m","stream":true}"#,
            "{\"model\":\"m\"} x",
        ] {
            assert_eq!(fields(&of(bad).unwrap_err()), ["body"], "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_chunk_is_what_it_says(size in 0usize..1_100_000) {
            let request = pb::UploadFileRequest {
                payload: Some(pb::upload_file_request::Payload::Chunk(vec![b'x'; size].into())),
            };
            prop_assert_eq!(chunk(request).is_ok(), (1..=1_048_576).contains(&size));
        }
    }
}
