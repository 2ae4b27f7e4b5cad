//! What only this server says, below `tidemill` in the objects of either dialect.

use serde_json::{Value, json};

use crate::{
    domain::{Batch, Timestamp, WebhookEndpointId},
    progress::Progress,
};

/// Of a batch.
pub(in crate::api) fn of_batch(of: &Batch, progress: Option<&Progress>) -> Value {
    let mut own = json!({
        "models": of.models,
        "priority": of.priority.value(),
        "revision": of.revision.0,
        "owner": of.owner.as_str(),
        "output_expires_at": of.output_expires_at().map(Timestamp::unix_seconds),
        "webhook_url": of.webhook.as_ref().map(|webhook| webhook.url.as_str()),
        "webhook_endpoint_id": of.webhook_endpoint_id.as_ref().map(WebhookEndpointId::as_str),
    });
    if let Some(progress) = progress {
        own["requests_per_second"] = json!(progress.rates.requests_per_second);
        own["output_tokens_per_second"] = json!(progress.rates.output_tokens_per_second);
        own["eta_seconds"] = json!(progress.eta.map(|eta| eta.as_secs()));
        own["queue_position"] = json!(progress.queue_position);
        own["waiting_reason"] = json!(progress.waiting_reason);
    }
    own
}
