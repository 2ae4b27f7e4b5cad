//! A batch as Anthropic writes it. What is this server's own is below `tidemill`.

use std::time::{Duration, UNIX_EPOCH};

use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::{
    api::v1::own,
    domain::{Batch, BatchId, BatchStatus, Timestamp},
    progress::Progress,
    service::Shown,
};

/// The beginning of a batch's id in this dialect.
pub(super) const PREFIX: &str = "msgbatch_";

/// A batch's id in this dialect.
pub(super) fn id_of(batch: &BatchId) -> String {
    format!("{PREFIX}{}", batch.as_str().strip_prefix(BatchId::PREFIX).unwrap_or(batch.as_str()))
}

/// The batch that an id of this dialect names. `None`: it names none.
pub(super) fn batch_of(id: &str) -> Option<String> {
    id.strip_prefix(PREFIX).map(|digits| format!("{}{digits}", BatchId::PREFIX))
}

pub(super) fn shown(of: &Shown) -> Response {
    axum::Json(batch(&of.batch, &of.progress)).into_response()
}

/// A batch.
pub(super) fn batch(of: &Batch, progress: &Progress) -> Value {
    let (id, times) = (id_of(&of.id), &of.times);
    let ended = times.completed.or(times.failed).or(times.expired).or(times.cancelled);
    let results = of.status.is_terminal().then(|| format!("/v1/messages/batches/{id}/results"));
    let mut own = own::of_batch(of, Some(progress));
    own["batch_id"] = json!(of.id.as_str());
    json!({
        "id": id,
        "type": "message_batch",
        "processing_status": status(of),
        "request_counts": counts(of),
        "created_at": time(of.created_at),
        "expires_at": time(of.expires_at),
        "ended_at": ended.filter(|_| of.status.is_terminal()).map(time),
        "cancel_initiated_at": times.cancelling.map(time),
        "archived_at": null,
        // Relative: clients resolve it against their base URL, so that it is right behind any proxy.
        "results_url": results,
        "tidemill": own,
    })
}

fn status(of: &Batch) -> &'static str {
    match of.status {
        status if status.is_terminal() => "ended",
        BatchStatus::Cancelling => "canceling",
        _ if of.times.cancelling.is_some() => "canceling",
        _ => "in_progress",
    }
}

/// Everything is being processed until the batch has ended.
fn counts(of: &Batch) -> Value {
    let (total, done) = (of.counts.total, of.counts.completed);
    if !of.status.is_terminal() {
        return json!({"processing": total, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0});
    }
    let (canceled, expired) = match of.status {
        BatchStatus::Cancelled => (of.not_run, 0),
        BatchStatus::Expired => (0, of.not_run),
        _ => (0, 0),
    };
    let errored = (total - done - canceled - expired).max(0);
    json!({"processing": 0, "succeeded": done, "errored": errored, "canceled": canceled, "expired": expired})
}

fn time(of: Timestamp) -> String {
    let since = Duration::from_micros(u64::try_from(of.0).unwrap_or(0));
    humantime::format_rfc3339_micros(UNIX_EPOCH + since).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_go_both_ways() {
        let batch = BatchId::from_text("batch_0a");
        assert_eq!(id_of(&batch), "msgbatch_0a");
        assert_eq!(batch_of("msgbatch_0a").as_deref(), Some("batch_0a"));
        assert_eq!((batch_of("batch_0a"), batch_of("0a"), batch_of("")), (None, None, None));
    }

    #[test]
    fn times_are_rfc_3339_in_utc() {
        assert_eq!(time(Timestamp(1_796_000_400_000_001)), "2026-11-30T01:00:00.000001Z");
    }
}
