//! Converts wire types to the service's arguments. Checks that every protocol needs are in the service.

use std::time::Duration;

use bytes::Bytes;
use tonic::{Status, metadata::MetadataMap};

use super::gate;
use crate::{
    domain::{BatchStatus, webhook::DeliveryState},
    ingest::InlineRequest,
    pb,
    service::{
        NotASpan, ServiceError, Span,
        batches::{BatchInput, CreateBatch, ListBatches},
        files::NewFile,
        webhooks::{NewWebhook, UpdateEndpoint},
    },
};

/// The most bytes of a chunk of an upload.
const CHUNK: usize = 1024 * 1024;

/// A span of time. (prost's own conversion overflows at `i64::MIN`.)
pub(super) fn span(of: Option<prost_types::Duration>) -> Option<Span> {
    of.map(|of| match (u64::try_from(of.seconds), u32::try_from(of.nanos)) {
        (Ok(seconds), Ok(nanos @ 0..1_000_000_000)) => Ok(Duration::new(seconds, nanos)),
        _ => Err(NotASpan),
    })
}

/// A timestamp, in microseconds since the Unix epoch.
pub(super) fn micros(of: Option<prost_types::Timestamp>) -> Option<i64> {
    of.map(|at| at.seconds.saturating_mul(1_000_000).saturating_add(i64::from(at.nanos) / 1_000))
}

/// A little less than the client's deadline, so that our error arrives before the client gives up.
pub(super) fn deadline(metadata: &MetadataMap) -> Option<Duration> {
    let timeout = gate::timeout(metadata.get("grpc-timeout")?.to_str().ok()?)?;
    Some(timeout.saturating_sub((timeout / 20).min(Duration::from_millis(50))))
}

pub(super) fn file(of: pb::FileSpec) -> NewFile {
    NewFile {
        filename: of.filename,
        purpose: of.purpose,
        total_bytes: of.total_bytes,
        request_id: of.request_id,
        expires_after: span(of.expires_after),
        keeps_bad: false,
    }
}

pub(super) fn chunk(of: pb::UploadFileRequest) -> Result<Bytes, Status> {
    use pb::upload_file_request::Payload;
    let wrong = match of.payload {
        Some(Payload::Chunk(chunk)) if (1..=CHUNK).contains(&chunk.len()) => return Ok(chunk),
        Some(Payload::Chunk(chunk)) => {
            ServiceError::field("chunk", format!("must be 1 byte to 1 MiB, is {} bytes", chunk.len()))
        }
        Some(Payload::Spec(_)) => ServiceError::field("spec", "may only be in the first message"),
        None => ServiceError::field("chunk", "every message after the first must have one"),
    };
    Err(wrong.into())
}

pub(super) fn create_batch(of: pb::CreateBatchRequest) -> CreateBatch {
    use pb::create_batch_request::Input;
    CreateBatch {
        input: of.input.map(|input| match input {
            Input::InputFileId(id) => BatchInput::File(id),
            Input::InlineRequests(of) => {
                let request = |of: pb::InlineRequest| InlineRequest { custom_id: of.custom_id, body: of.body };
                BatchInput::Inline(of.requests.into_iter().map(request).collect())
            }
        }),
        endpoint: of.endpoint,
        completion_window: span(of.completion_window),
        priority: of.priority,
        metadata: of.metadata,
        request_id: of.request_id,
        webhook: of.webhook.map(webhook),
        webhook_endpoint_id: of.webhook_endpoint_id,
        output_expires_after: span(of.output_expires_after),
    }
}

pub(super) fn list_batches(of: pb::ListBatchesRequest) -> ListBatches {
    let status = |of: &i32| pb::BatchStatus::try_from(*of).ok().and_then(batch_status);
    ListBatches {
        statuses: of.statuses.iter().map(status).collect(),
        model: of.model,
        metadata: of.metadata,
        page_size: of.page_size,
        page_token: of.page_token,
    }
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

pub(super) fn webhook(of: pb::WebhookConfig) -> NewWebhook {
    NewWebhook {
        url: of.url,
        secret: of.secret,
        max_retries: of.max_retries,
        timeout: span(of.timeout),
        events: of.events,
    }
}

pub(super) fn endpoint(of: pb::CreateEndpointRequest) -> NewWebhook {
    NewWebhook {
        url: of.url,
        secret: of.secret,
        max_retries: of.max_retries,
        timeout: span(of.timeout),
        events: of.events,
    }
}

/// An endpoint's id, and the changes to it.
pub(super) fn update_endpoint(of: pb::UpdateEndpointRequest) -> (String, UpdateEndpoint) {
    let change = UpdateEndpoint {
        url: of.url,
        events: of.events,
        max_retries: of.max_retries,
        timeout: span(of.timeout),
        disabled: of.disabled,
        disabled_reason: of.disabled_reason,
    };
    (of.endpoint_id, change)
}

/// The state to list deliveries by. Unspecified means any.
pub(super) fn delivery_state(of: i32) -> Option<Option<DeliveryState>> {
    let state = match pb::DeliveryState::try_from(of) {
        Ok(pb::DeliveryState::Unspecified) => return None,
        Ok(pb::DeliveryState::Pending) => Some(DeliveryState::Pending),
        Ok(pb::DeliveryState::Leased) => Some(DeliveryState::Leased),
        Ok(pb::DeliveryState::Delivered) => Some(DeliveryState::Delivered),
        Ok(pb::DeliveryState::Dead) => Some(DeliveryState::Dead),
        Ok(pb::DeliveryState::Cancelled) => Some(DeliveryState::Cancelled),
        Err(_) => None,
    };
    Some(state)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_span_is_read_as_protobuf_writes_it() {
        let of = |seconds, nanos| span(Some(prost_types::Duration { seconds, nanos }));
        assert_eq!(of(3_600, 5), Some(Ok(Duration::new(3_600, 5))));
        for (seconds, nanos) in [(-1, 0), (i64::MIN, i32::MIN), (7_200, -1), (7_200, 1_000_000_000)] {
            assert_eq!(of(seconds, nanos), Some(Err(NotASpan)), "{seconds} {nanos}");
        }
        assert!(of(i64::MAX, 0).is_some_and(|span| span.is_ok()), "its length is for the service to judge");
        assert_eq!(span(None), None);
    }

    #[test]
    fn the_deadline_is_a_little_earlier_than_the_clients() {
        let of = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            deadline(&metadata)
        };
        assert_eq!(of("10S"), Some(Duration::from_millis(9_950)));
        assert_eq!(of("1000m"), Some(Duration::from_millis(950)));
        assert_eq!(of("0n"), Some(Duration::ZERO));
        assert_eq!(of("10s"), None);
        assert_eq!(deadline(&MetadataMap::new()), None);
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
