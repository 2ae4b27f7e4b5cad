//! Messages as JSON, similar to protobuf's own mapping: field names as in the proto, enum values without their prefix,
//! times in RFC 3339, durations in seconds ("30s"). Unlike in that mapping, 64-bit numbers stay numbers, and fields
//! that are not set are left out.

use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use crate::pb;

/// The start of the year 10000, which RFC 3339 can't express.
const YEAR_10000: Duration = Duration::from_secs(253_402_300_800);

/// A timestamp as RFC 3339 in UTC. `None` if it is not set or outside of the years 1970 to 9999.
#[must_use]
pub fn time(time: Option<&prost_types::Timestamp>) -> Option<String> {
    let time = SystemTime::try_from(*time?).ok()?;
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    if since >= YEAR_10000 {
        return None;
    }
    Some(humantime::format_rfc3339_micros(time).to_string())
}

/// A duration. `None` if it is not set or negative, which no server sends.
#[must_use]
pub fn duration(span: Option<&prost_types::Duration>) -> Option<Duration> {
    Duration::try_from(*span?).ok()
}

fn seconds(span: Option<&prost_types::Duration>) -> Option<String> {
    duration(span).map(|span| format!("{}s", span.as_secs_f64()))
}

/// A batch's state, such as "COMPLETED".
#[must_use]
pub fn batch_status(status: i32) -> &'static str {
    bare(pb::BatchStatus::try_from(status).unwrap_or_default().as_str_name(), "BATCH_STATUS_")
}

/// A worker's state, such as "HEALTHY".
#[must_use]
pub fn worker_state(state: i32) -> &'static str {
    bare(pb::WorkerState::try_from(state).unwrap_or_default().as_str_name(), "WORKER_STATE_")
}

fn bare(name: &'static str, prefix: &str) -> &'static str {
    name.strip_prefix(prefix).unwrap_or(name)
}

/// An object without its unset fields: those that are null or an empty string.
fn object(fields: Value) -> Value {
    match fields {
        Value::Object(fields) => {
            let set = fields.into_iter().filter(|(_, value)| !value.is_null() && value != "");
            Value::Object(set.collect::<Map<_, _>>())
        }
        other => other,
    }
}

/// A file.
#[must_use]
pub fn file(file: &pb::File) -> Value {
    object(json!({
        "id": file.id,
        "filename": file.filename,
        "purpose": file.purpose,
        "bytes": file.bytes,
        "line_count": file.line_count,
        "models": file.models,
        "create_time": time(file.create_time.as_ref()),
        "expire_time": time(file.expire_time.as_ref()),
        "endpoint": file.endpoint,
    }))
}

fn counts(counts: Option<&pb::RequestCounts>) -> Value {
    let counts = counts.copied().unwrap_or_default();
    json!({ "total": counts.total, "completed": counts.completed, "failed": counts.failed })
}

fn usage(usage: Option<&pb::TokenUsage>) -> Value {
    let usage = usage.copied().unwrap_or_default();
    json!({
        "input_tokens": usage.input_tokens,
        "cached_input_tokens": usage.cached_input_tokens,
        "output_tokens": usage.output_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "total_tokens": usage.total_tokens,
    })
}

fn progress(progress: &pb::BatchProgress) -> Value {
    object(json!({
        "request_counts": counts(progress.request_counts.as_ref()),
        "usage": usage(progress.usage.as_ref()),
        "requests_per_second": progress.requests_per_second,
        "output_tokens_per_second": progress.output_tokens_per_second,
        "eta": seconds(progress.eta.as_ref()),
        "queue_position": progress.queue_position,
        "waiting_reason": progress.waiting_reason,
    }))
}

fn webhook(webhook: &pb::WebhookConfig) -> Value {
    object(json!({
        "url": webhook.url,
        "max_retries": webhook.max_retries,
        "timeout": seconds(webhook.timeout.as_ref()),
        "events": webhook.events,
        "retry_horizon": seconds(webhook.retry_horizon.as_ref()),
    }))
}

fn batch_error(error: &pb::BatchError) -> Value {
    object(json!({
        "code": error.code,
        "message": error.message,
        "line": (error.line > 0).then_some(error.line),
        "param": error.param,
    }))
}

/// A batch.
#[must_use]
pub fn batch(batch: &pb::Batch) -> Value {
    object(json!({
        "id": batch.id,
        "status": batch_status(batch.status),
        "endpoint": batch.endpoint,
        "models": batch.models,
        "input_file_id": batch.input_file_id,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "request_counts": counts(batch.request_counts.as_ref()),
        "usage": usage(batch.usage.as_ref()),
        "errors": batch.errors.iter().map(batch_error).collect::<Vec<_>>(),
        "metadata": batch.metadata,
        "priority": batch.priority,
        "completion_window": seconds(batch.completion_window.as_ref()),
        "create_time": time(batch.create_time.as_ref()),
        "in_progress_time": time(batch.in_progress_time.as_ref()),
        "finalizing_time": time(batch.finalizing_time.as_ref()),
        "completed_time": time(batch.completed_time.as_ref()),
        "failed_time": time(batch.failed_time.as_ref()),
        "expired_time": time(batch.expired_time.as_ref()),
        "cancelling_time": time(batch.cancelling_time.as_ref()),
        "cancelled_time": time(batch.cancelled_time.as_ref()),
        "expire_time": time(batch.expire_time.as_ref()),
        "progress": batch.progress.as_ref().map(progress),
        "webhook": batch.webhook.as_ref().map(webhook),
        "webhook_endpoint_id": batch.webhook_endpoint_id,
        "waiting_reason": batch.waiting_reason,
        "revision": batch.revision,
    }))
}

/// An event of a watch.
#[must_use]
pub fn event(event: &pb::BatchEvent) -> Value {
    let (name, body) = match &event.event {
        Some(pb::batch_event::Event::StateChanged(state)) => ("state_changed", batch(state)),
        Some(pb::batch_event::Event::Progress(now)) => ("progress", progress(now)),
        Some(pb::batch_event::Event::Heartbeat(_)) => ("heartbeat", json!({})),
        None => ("unknown", json!({})),
    };
    object(json!({
        "batch_id": event.batch_id,
        "revision": event.revision,
        "sequence": event.sequence,
        "event_time": time(event.event_time.as_ref()),
        name: body,
    }))
}

/// A result; its line as JSON if it is JSON, which every line is.
#[must_use]
pub fn result(result: &pb::BatchResult) -> Value {
    json!({
        "custom_id": result.custom_id,
        "cursor": result.cursor,
        "line_number": result.line_number,
        "succeeded": result.succeeded,
        "line": json_or_text(&result.line),
    })
}

/// A worker's answer.
#[must_use]
pub fn answer(answer: &pb::InferResponse) -> Value {
    json!({
        "status_code": answer.status_code,
        "body": json_or_text(&answer.body),
        "worker_id": answer.worker_id,
    })
}

fn json_or_text(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|_| String::from_utf8_lossy(bytes).into())
}

/// A worker.
#[must_use]
pub fn worker(worker: &pb::Worker) -> Value {
    object(json!({
        "id": worker.id,
        "url": worker.url,
        "models": worker.models,
        "state": worker_state(worker.state),
        "in_flight": worker.in_flight,
        "limit": worker.limit,
        "running": worker.running,
        "waiting": worker.waiting,
        "kv_cache_usage": worker.kv_cache_usage,
        "output_tokens_per_second": worker.output_tokens_per_second,
        "requests_per_second": worker.requests_per_second,
        "last_error": worker.last_error,
        "create_time": time(worker.create_time.as_ref()),
        "reports_metrics": worker.reports_metrics,
        "prefix_hit_rate": worker.prefix_hit_rate,
        "request_time": seconds(worker.request_time.as_ref()),
        "health_path": worker.health_path,
        "health_interval": seconds(worker.health_interval.as_ref()),
    }))
}

/// How long requests spend in each stage.
#[must_use]
pub fn stages(stages: &pb::RequestStages) -> Value {
    object(json!({
        "queue": seconds(stages.queue.as_ref()),
        "dispatch": seconds(stages.dispatch.as_ref()),
        "worker": seconds(stages.worker.as_ref()),
        "persist": seconds(stages.persist.as_ref()),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_written_as_in_the_proto() {
        let sent = pb::Batch {
            id: "batch_1".into(),
            status: pb::BatchStatus::Completed.into(),
            request_counts: Some(pb::RequestCounts { total: 9_007_199_254_740_993, completed: 2, failed: 1 }),
            completion_window: Some(prost_types::Duration { seconds: 86_400, nanos: 0 }),
            create_time: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 5_000 }),
            progress: Some(pb::BatchProgress {
                eta: Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }),
                ..pb::BatchProgress::default()
            }),
            webhook: Some(pb::WebhookConfig { url: "http://h".into(), secret: "s".into(), ..Default::default() }),
            ..pb::Batch::default()
        };
        let value = batch(&sent);
        assert_eq!(value["status"], "COMPLETED");
        assert_eq!(value["request_counts"]["total"], 9_007_199_254_740_993_i64);
        assert_eq!(value["completion_window"], "86400s");
        assert_eq!(value["create_time"], "2023-11-14T22:13:20.000005Z");
        assert_eq!(value["progress"]["eta"], "1.5s");
        assert_eq!(value["metadata"], json!({}));
        assert!(value.get("completed_time").is_none() && value.get("output_file_id").is_none());
        assert!(!value.to_string().contains("secret"), "never shown, even if a server sent it");
    }

    #[test]
    fn every_field_of_the_proto_is_written() {
        let now = Some(prost_types::Timestamp { seconds: 1, nanos: 0 });
        let batch_sent = pb::Batch {
            id: "b".into(),
            endpoint: "e".into(),
            input_file_id: "i".into(),
            output_file_id: "o".into(),
            error_file_id: "x".into(),
            waiting_reason: "w".into(),
            webhook_endpoint_id: "h".into(),
            completion_window: Some(prost_types::Duration::default()),
            create_time: now,
            in_progress_time: now,
            finalizing_time: now,
            completed_time: now,
            failed_time: now,
            expired_time: now,
            cancelling_time: now,
            cancelled_time: now,
            expire_time: now,
            progress: Some(pb::BatchProgress::default()),
            webhook: Some(pb::WebhookConfig::default()),
            ..pb::Batch::default()
        };
        assert_eq!(batch(&batch_sent).as_object().unwrap().len(), 27, "the proto's number of fields");
        let worker_sent = pb::Worker {
            id: "w".into(),
            url: "u".into(),
            last_error: "e".into(),
            create_time: now,
            prefix_hit_rate: Some(0.0),
            request_time: Some(prost_types::Duration::default()),
            health_path: "none".into(),
            health_interval: Some(prost_types::Duration::default()),
            ..pb::Worker::default()
        };
        assert_eq!(worker(&worker_sent).as_object().unwrap().len(), 18, "the proto's number of fields");
        let stages_sent = pb::RequestStages {
            queue: Some(prost_types::Duration { seconds: 0, nanos: 250_000_000 }),
            ..pb::RequestStages::default()
        };
        assert_eq!(stages(&stages_sent), json!({ "queue": "0.25s" }), "what was not measured is left out");
    }

    #[test]
    fn events_and_results_are_told_apart() {
        use pb::batch_event::Event;
        let sent = |what| pb::BatchEvent { batch_id: "b".into(), revision: 3, event: Some(what), ..Default::default() };
        assert_eq!(event(&sent(Event::Heartbeat(pb::Heartbeat {})))["heartbeat"], json!({}));
        assert_eq!(event(&sent(Event::Progress(Default::default())))["progress"]["queue_position"], 0);
        assert_eq!(event(&sent(Event::StateChanged(Default::default())))["state_changed"]["status"], "UNSPECIFIED");
        let line = pb::BatchResult { line: "{\"a\":[1]}".into(), ..pb::BatchResult::default() };
        assert_eq!(result(&line)["line"]["a"][0], 1);
        assert_eq!(json_or_text(b"<h1>"), "<h1>");
    }

    #[test]
    fn odd_times_are_left_out() {
        assert_eq!(time(Some(&prost_types::Timestamp { seconds: -5, nanos: 0 })), None);
        assert_eq!(duration(Some(&prost_types::Duration { seconds: -5, nanos: 0 })), None);
        assert_eq!(worker_state(99), "UNSPECIFIED");
    }
}
