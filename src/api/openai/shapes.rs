//! Files, batches and models as OpenAI writes them. What is this server's own is below `tidemill`.

use std::time::Duration;

use serde_json::{Value, json};

use super::problem::openais;
use crate::{
    api::v1::own,
    domain::{
        Batch, BatchError, Counts, Endpoint, File, FileId, PartedUpload, Timestamp, TokenUsage, UploadId, UploadPart,
    },
    progress::Progress,
};

const HOUR: u64 = 3_600;

/// A file. It is `processed` at once: an upload answers when every line has been checked.
pub(super) fn file(of: &File) -> Value {
    json!({
        "id": of.id.as_str(),
        "object": "file",
        "bytes": of.bytes,
        "created_at": of.created_at.unix_seconds(),
        "expires_at": time(of.expires_at),
        "filename": of.filename,
        "purpose": of.kind.purpose(),
        "status": "processed",
        "status_details": null,
        "tidemill": {
            "line_count": of.line_count,
            "models": of.models,
            "endpoint": of.endpoint.map(Endpoint::path),
            "owner": of.owner.as_str(),
        },
    })
}

/// An upload in parts, with the file that it has become.
pub(super) fn upload(of: &PartedUpload, file: Option<&File>) -> Value {
    json!({
        "id": of.id.as_str(),
        "object": "upload",
        "bytes": of.bytes,
        "created_at": of.created_at.unix_seconds(),
        "expires_at": of.expires_at.unix_seconds(),
        "filename": of.filename,
        "purpose": "batch",
        "status": of.state.as_str(),
        "file": file.map(self::file),
    })
}

/// A part of an upload.
pub(super) fn upload_part(upload: &UploadId, of: &UploadPart) -> Value {
    json!({
        "id": of.id.as_str(),
        "object": "upload.part",
        "created_at": of.created_at.unix_seconds(),
        "upload_id": upload.as_str(),
    })
}

/// A batch. Without `progress`, what its own numbers say.
pub(super) fn batch(of: &Batch, progress: Option<&Progress>) -> Value {
    let times = &of.times;
    let model = match of.models.as_slice() {
        [only] => Some(only),
        _ => None,
    };
    json!({
        "id": of.id.as_str(),
        "object": "batch",
        "endpoint": of.endpoint.path(),
        "model": model,
        "errors": errors(&of.errors),
        "input_file_id": of.input_file_id.as_str(),
        "completion_window": window(of.completion_window),
        "status": of.status.as_str(),
        "output_file_id": of.output_file_id.as_ref().map(FileId::as_str),
        "error_file_id": of.error_file_id.as_ref().map(FileId::as_str),
        "created_at": of.created_at.unix_seconds(),
        "in_progress_at": time(times.in_progress),
        "expires_at": of.expires_at.unix_seconds(),
        "finalizing_at": time(times.finalizing),
        "completed_at": time(times.completed),
        "failed_at": time(times.failed),
        "expired_at": time(times.expired),
        "cancelling_at": time(times.cancelling),
        "cancelled_at": time(times.cancelled),
        "request_counts": counts(of.counts),
        "usage": usage(of.usage),
        "metadata": if of.metadata.is_empty() { Value::Null } else { json!(of.metadata) },
        "tidemill": own::of_batch(of, progress),
    })
}

/// The newest progress of a batch, for those who watch it.
pub(super) fn progress(of: &Progress) -> Value {
    json!({
        "request_counts": counts(of.counts),
        "usage": usage(of.usage),
        "requests_per_second": of.rates.requests_per_second,
        "output_tokens_per_second": of.rates.output_tokens_per_second,
        "eta_seconds": of.eta.map(|eta| eta.as_secs()),
        "queue_position": of.queue_position,
        "waiting_reason": of.waiting_reason,
    })
}

fn errors(of: &[BatchError]) -> Value {
    if of.is_empty() {
        return Value::Null;
    }
    let error = |of: &BatchError| {
        let line = (of.line > 0).then_some(of.line);
        let param = (!of.param.is_empty()).then_some(&of.param);
        let message = format!("{}{}", openais(&of.code, param.map(String::as_str)), of.message);
        json!({"code": of.code, "message": message, "line": line, "param": param})
    };
    json!({"object": "list", "data": of.iter().map(error).collect::<Vec<_>>()})
}

fn time(of: Option<Timestamp>) -> Option<i64> {
    of.map(Timestamp::unix_seconds)
}

fn counts(of: Counts) -> Value {
    json!({"total": of.total, "completed": of.completed, "failed": of.failed})
}

fn usage(of: TokenUsage) -> Value {
    json!({
        "input_tokens": of.input,
        "input_tokens_details": {"cached_tokens": of.cached_input},
        "output_tokens": of.output,
        "output_tokens_details": {"reasoning_tokens": of.reasoning},
        "total_tokens": of.total,
    })
}

/// A completion window as a client writes it: whole hours where it is that.
fn window(of: Duration) -> String {
    let seconds = of.as_secs();
    if seconds.is_multiple_of(HOUR) { format!("{}h", seconds / HOUR) } else { format!("{seconds}s") }
}

/// A model.
pub(super) fn model(id: &str, created: i64) -> Value {
    json!({"id": id, "object": "model", "created": created, "owned_by": "tidemill"})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_written_as_openai_writes_it() {
        assert_eq!(window(Duration::from_secs(86_400)), "24h");
        assert_eq!(window(Duration::from_secs(604_800)), "168h");
        assert_eq!(window(Duration::from_secs(5_400)), "5400s");
    }

    #[test]
    fn an_error_of_no_line_has_no_line() {
        let error = BatchError { code: "x".into(), message: "y".into(), line: 0, param: String::new() };
        assert_eq!(errors(&[]), Value::Null);
        let expected = json!({"code": "x", "message": "y", "line": null, "param": null});
        assert_eq!(errors(&[error])["data"][0], expected);
    }
}
