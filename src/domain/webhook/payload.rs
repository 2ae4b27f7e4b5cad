//! The body of a webhook.

use super::{Json, WebhookEvent};
use crate::domain::{Batch, Counts, FileId, Timestamp};

/// The content of a webhook.
#[derive(Clone, Debug)]
pub struct Payload<'a> {
    pub event: WebhookEvent,
    /// The batch at the time of the event.
    pub batch: &'a Batch,
}

impl Payload<'_> {
    /// The body in canonical form. Rendered once, stored, and sent unchanged on every attempt.
    #[must_use]
    pub fn body(&self) -> Vec<u8> {
        let Self { event, batch } = self;
        let id = batch.id.as_str();
        let output = batch.output_file_id.as_ref();
        let error = batch.error_file_id.as_ref();
        let mut members = shape(*event, id, batch.status.as_str(), batch.counts, batch.created_at);
        members.extend([
            ("endpoint", batch.endpoint.path().into()),
            ("completed_at", batch.times.completed.map(Timestamp::unix_seconds).into()),
            (
                "metadata",
                Json::Object(
                    batch.metadata.iter().map(|(name, value)| (name.clone(), value.as_str().into())).collect(),
                ),
            ),
            ("output_file_id", output.map(FileId::as_str).into()),
            ("error_file_id", error.map(FileId::as_str).into()),
            ("output_file_url", output.map(|_| format!("/v1/batches/{id}/results")).as_deref().into()),
            ("error_file_url", error.map(|_| format!("/v1/batches/{id}/errors")).as_deref().into()),
            // Of two bodies about one batch, the later one has the larger number.
            ("sequence", batch.revision.0.into()),
        ]);
        bytes(members)
    }
}

/// The body of a test event: the same members, about no batch.
#[must_use]
pub fn test_payload(at: Timestamp) -> Vec<u8> {
    let mut members = shape(WebhookEvent::Test, "batch_test", "completed", Counts::default(), at);
    members.extend([
        ("endpoint", "/v1/chat/completions".into()),
        ("completed_at", at.unix_seconds().into()),
        ("metadata", Json::object([])),
        ("output_file_id", Json::Null),
        ("error_file_id", Json::Null),
        ("output_file_url", Json::Null),
        ("error_file_url", Json::Null),
        ("sequence", 1.into()),
    ]);
    bytes(members)
}

fn shape(
    event: WebhookEvent,
    id: &str,
    status: &str,
    counts: Counts,
    created_at: Timestamp,
) -> Vec<(&'static str, Json)> {
    vec![
        ("id", id.into()),
        ("object", "batch".into()),
        ("type", format!("batch.{}", event.as_str()).as_str().into()),
        ("status", status.into()),
        ("created_at", created_at.unix_seconds().into()),
        (
            "request_counts",
            Json::object([
                ("total", counts.total.into()),
                ("completed", counts.completed.into()),
                ("failed", counts.failed.into()),
            ]),
        ),
    ]
}

fn bytes(members: Vec<(&'static str, Json)>) -> Vec<u8> {
    Json::Object(members.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()).canonical().into_bytes()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;
    use crate::domain::{BatchId, BatchStatus, Endpoint, Priority, Revision, TokenUsage, batch::StateTimes};

    fn batch() -> Batch {
        Batch {
            id: BatchId::from_text("batch_abc123"),
            owner: "someone".into(),
            status: BatchStatus::Completed,
            ending: None,
            endpoint: Endpoint::ChatCompletions,
            models: vec!["m".into()],
            input_file_id: FileId::from_text("file-in"),
            output_file_id: Some(FileId::from_text("file-out")),
            error_file_id: None,
            counts: Counts { total: 100, completed: 98, failed: 2 },
            not_run: 0,
            usage: TokenUsage::default(),
            errors: vec![],
            metadata: BTreeMap::from([("name".into(), "café 你 😀 \"q\" \\ /".into()), ("z".into(), "1".into())]),
            priority: Priority::default(),
            completion_window: Duration::from_secs(86_400),
            created_at: Timestamp(1_699_564_800_000_001),
            expires_at: Timestamp(1_699_651_200_000_000),
            times: StateTimes { completed: Some(Timestamp(1_699_568_400_999_999)), ..StateTimes::default() },
            segments: 1,
            segments_done: 1,
            webhook: None,
            webhook_endpoint_id: None,
            revision: Revision(7),
            output_expires_after: None,
        }
    }

    #[test]
    fn the_body_is_canonical_and_whole() {
        let body = Payload { event: WebhookEvent::Completed, batch: &batch() }.body();
        assert_eq!(
            String::from_utf8(body).unwrap(),
            r#"{"completed_at": 1699568400, "created_at": 1699564800, "endpoint": "/v1/chat/completions", "error_file_id": null, "error_file_url": null, "id": "batch_abc123", "metadata": {"name": "caf\u00e9 \u4f60 \ud83d\ude00 \"q\" \\ /", "z": "1"}, "object": "batch", "output_file_id": "file-out", "output_file_url": "/v1/batches/batch_abc123/results", "request_counts": {"completed": 98, "failed": 2, "total": 100}, "sequence": 7, "status": "completed", "type": "batch.completed"}"#
        );
    }

    #[test]
    fn a_test_event_has_the_same_members() {
        let keys = |body: &[u8]| match serde_json::from_slice::<serde_json::Value>(body).unwrap() {
            serde_json::Value::Object(members) => members.keys().cloned().collect::<Vec<_>>(),
            other => panic!("{other}"),
        };
        let real = Payload { event: WebhookEvent::Failed, batch: &batch() }.body();
        assert_eq!(keys(&test_payload(Timestamp(0))), keys(&real));
    }
}
