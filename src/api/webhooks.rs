//! Webhooks on the wire: wire types to domain types and back, and what went wrong with them.

use std::{collections::BTreeMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::FieldViolation;

use super::status::{self, error, invalid, invalid_field, short};
use crate::{
    access::Caller,
    delivery::{AcceptError, RetryError, Webhooks},
    domain::{
        Timestamp, WebhookEndpointId,
        text::is_storable,
        webhook::{DeliveryState, OLD_URL_KEY, WebhookConfig, WebhookTarget},
    },
    pb,
    store::{AttemptRecord, DeadLetter, DeliveryRecord, EndpointRecord, RetryJob, RetryJobState},
};

/// The most bytes of an id or another short text of a request: longer ones can't be any.
const SHORT: usize = 512;

/// A span on the wire.
pub(super) fn span(of: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(of.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(of.subsec_nanos()).unwrap_or(0),
    }
}

/// A span from the wire: none stays none.
pub(super) fn duration(of: Option<prost_types::Duration>, field: &str) -> Result<Option<Duration>, Status> {
    of.map(|of| match (u64::try_from(of.seconds), u32::try_from(of.nanos)) {
        (Ok(seconds), Ok(nanos @ 0..1_000_000_000)) => Ok(Duration::new(seconds, nanos)),
        _ => Err(invalid_field(field, "must not be negative")),
    })
    .transpose()
}

/// A short text to look something up by; empty is none.
pub(super) fn text(of: String, field: &str) -> Result<Option<String>, Status> {
    if of.len() > SHORT || !is_storable(&of) {
        return Err(invalid_field(field, format!("must be at most {SHORT} bytes without NUL")));
    }
    Ok((!of.is_empty()).then_some(of))
}

/// A time from the wire, in microseconds since the Unix epoch.
pub(super) fn micros(of: Option<prost_types::Timestamp>) -> Option<i64> {
    of.map(|at| at.seconds.saturating_mul(1_000_000).saturating_add(i64::from(at.nanos) / 1_000))
}

/// What a client asks for. Nothing is checked yet.
pub(super) fn webhook_from_proto(of: pb::WebhookConfig) -> Result<WebhookConfig, Status> {
    Ok(WebhookConfig::new(of.url)
        .secret((!of.secret.is_empty()).then_some(of.secret))
        .max_retries((of.max_retries != 0).then(|| of.max_retries.into()))
        .timeout(duration(of.timeout, "webhook.timeout")?)
        .events(of.events))
}

/// Where a new batch's webhooks go: what the request says, or the old form in its metadata; or a registered endpoint.
pub(super) async fn webhook_of_batch(
    webhooks: &Webhooks,
    caller: &Caller,
    webhook: Option<pb::WebhookConfig>,
    endpoint_id: String,
    metadata: &BTreeMap<String, String>,
) -> Result<(Option<WebhookTarget>, Option<WebhookEndpointId>), Status> {
    if let Some(id) = text(endpoint_id, "webhook_endpoint_id")? {
        if webhook.is_some() {
            return Err(invalid_field("webhook_endpoint_id", "goes without webhook: name one of the two"));
        }
        let id = WebhookEndpointId::from_text(id);
        let found = webhooks.store().endpoint(&id, &caller.scope()).await.map_err(status::store)?;
        return match found {
            Some(endpoint) if endpoint.disabled => {
                Err(error(Code::FailedPrecondition, "ENDPOINT_DISABLED", "the webhook endpoint is disabled"))
            }
            Some(endpoint) => Ok((None, Some(endpoint.id))),
            None => Err(invalid_field("webhook_endpoint_id", "names no webhook endpoint")),
        };
    }
    let (config, field) = match webhook {
        Some(webhook) => (webhook_from_proto(webhook)?, "webhook"),
        None => match WebhookConfig::from_metadata(metadata) {
            Some(config) => (config, "metadata"),
            None => return Ok((None, None)),
        },
    };
    let accepted = webhooks.accept(config).await.map_err(|refused| match field {
        "webhook" => accept(refused, "webhook."),
        _ => old_form(refused),
    })?;
    Ok((Some(accepted), None))
}

/// A batch's webhook without its secret, with the schedule that its number of attempts means.
pub(super) fn webhook_to_proto(of: &WebhookTarget, webhooks: &Webhooks) -> pb::WebhookConfig {
    pb::WebhookConfig {
        url: of.url.clone(),
        secret: String::new(),
        max_retries: of.max_attempts,
        timeout: Some(span(of.timeout)),
        events: of.events.names().into_iter().map(str::to_owned).collect(),
        retry_schedule: webhooks.schedule(of.max_attempts).into_iter().map(span).collect(),
        retry_horizon: Some(span(webhooks.horizon(of.max_attempts))),
    }
}

/// Why a webhook was not accepted. `prefix` goes before the fields' names.
pub(super) fn accept(refused: AcceptError, prefix: &str) -> Status {
    match refused {
        AcceptError::Store(error) => status::store(error),
        AcceptError::Invalid(fields) => {
            let violations: Vec<_> = fields
                .iter()
                .map(|invalid| FieldViolation::new(format!("{prefix}{}", invalid.field), invalid.message.clone()))
                .collect();
            let message = fields.first().map(|first| format!("{prefix}{first}")).unwrap_or_default();
            invalid("INVALID_WEBHOOK", message, violations)
        }
    }
}

fn old_form(refused: AcceptError) -> Status {
    match refused {
        AcceptError::Store(error) => status::store(error),
        AcceptError::Invalid(fields) => {
            let message = fields.first().map(|first| first.message.clone()).unwrap_or_default();
            let field = format!("metadata[{OLD_URL_KEY:?}]");
            invalid("INVALID_WEBHOOK", format!("{field}: {message}"), vec![FieldViolation::new(field, message)])
        }
    }
}

/// Why a dead letter was not retried.
pub(super) fn retry(refused: RetryError, id: &str) -> Status {
    let message = refused.to_string();
    match refused {
        RetryError::NotFound => no_dead_letter(id),
        RetryError::AlreadyDelivered => error(Code::FailedPrecondition, "DEAD_LETTER_ALREADY_DELIVERED", message),
        RetryError::Busy => error(Code::Aborted, "DEAD_LETTER_BUSY", message),
        RetryError::EndpointDeleted => error(Code::FailedPrecondition, "ENDPOINT_DELETED", message),
        RetryError::LeaseLost => error(Code::Aborted, "RETRY_RESULT_LOST", message),
        RetryError::Stopped => status::shutting_down(),
        RetryError::Store(error) => status::store(error),
    }
}

/// There is no such dead letter, or it is not the caller's.
pub(super) fn no_dead_letter(id: &str) -> Status {
    error(Code::NotFound, "DEAD_LETTER_NOT_FOUND", format!("no dead letter {:?}", short(id)))
}

/// There is no such endpoint, or it is not the caller's.
pub(super) fn no_endpoint(id: &str) -> Status {
    error(Code::NotFound, "ENDPOINT_NOT_FOUND", format!("no webhook endpoint {:?}", short(id)))
}

fn count(of: i64) -> i32 {
    i32::try_from(of).unwrap_or(i32::MAX)
}

fn utf8(of: Vec<u8>) -> String {
    // Bodies are ASCII: they are made here.
    String::from_utf8(of).unwrap_or_default()
}

pub(super) fn dead_letter(of: DeadLetter, attempts: Vec<AttemptRecord>) -> pb::DeadLetter {
    pb::DeadLetter {
        id: of.id.into_string(),
        batch_id: of.batch_id.map(crate::domain::BatchId::into_string).unwrap_or_default(),
        delivery_id: of.delivery_id.into_string(),
        webhook_url: of.url,
        event: of.event.as_str().to_owned(),
        payload: utf8(of.payload),
        error_message: of.error_message,
        attempts: of.attempts,
        last_attempt_time: Some(of.last_attempt_at.to_proto()),
        create_time: Some(of.created_at.to_proto()),
        retried_time: of.retried_at.map(Timestamp::to_proto),
        retry_success: of.retry_success,
        retry_count: count(of.retry_count),
        error_kind: of.error_kind.as_str().to_owned(),
        attempt_log: attempts.into_iter().map(attempt).collect(),
    }
}

fn attempt(of: AttemptRecord) -> pb::DeliveryAttempt {
    pb::DeliveryAttempt {
        generation: of.generation,
        attempt: of.attempt,
        outcome: of.outcome,
        error_kind: of.error_kind.map(|kind| kind.as_str().to_owned()).unwrap_or_default(),
        error_message: of.error_message.unwrap_or_default(),
        http_status: of.http_status.map(i32::from).unwrap_or_default(),
        response_excerpt: of.response_excerpt.unwrap_or_default(),
        start_time: Some(of.started_at.to_proto()),
        end_time: of.finished_at.map(Timestamp::to_proto),
        forced: of.forced,
    }
}

/// A delivery. `log`: with its body and its attempts.
pub(super) fn delivery(of: DeliveryRecord, log: Option<Vec<AttemptRecord>>) -> pb::Delivery {
    let state = match of.state {
        DeliveryState::Pending => pb::DeliveryState::Pending,
        DeliveryState::Leased => pb::DeliveryState::Leased,
        DeliveryState::Delivered => pb::DeliveryState::Delivered,
        DeliveryState::Dead => pb::DeliveryState::Dead,
        DeliveryState::Cancelled => pb::DeliveryState::Cancelled,
    };
    pb::Delivery {
        id: of.id.into_string(),
        batch_id: of.batch_id.map(crate::domain::BatchId::into_string).unwrap_or_default(),
        endpoint_id: of.endpoint_id.map(WebhookEndpointId::into_string).unwrap_or_default(),
        event: of.event.as_str().to_owned(),
        webhook_url: of.url,
        state: state.into(),
        attempts: of.attempts,
        max_attempts: of.max_attempts,
        next_attempt_time: of.next_attempt_at.map(Timestamp::to_proto),
        error_message: of.error_message.unwrap_or_default(),
        create_time: Some(of.created_at.to_proto()),
        settle_time: of.settled_at.map(Timestamp::to_proto),
        payload: if log.is_some() { utf8(of.body) } else { String::new() },
        attempt_log: log.into_iter().flatten().map(attempt).collect(),
    }
}

/// The state to list deliveries by; unspecified: any.
pub(super) fn delivery_state(of: i32) -> Result<Option<DeliveryState>, Status> {
    Ok(match pb::DeliveryState::try_from(of).map_err(|_| invalid_field("state", "is unknown"))? {
        pb::DeliveryState::Unspecified => None,
        pb::DeliveryState::Pending => Some(DeliveryState::Pending),
        pb::DeliveryState::Leased => Some(DeliveryState::Leased),
        pb::DeliveryState::Delivered => Some(DeliveryState::Delivered),
        pb::DeliveryState::Dead => Some(DeliveryState::Dead),
        pb::DeliveryState::Cancelled => Some(DeliveryState::Cancelled),
    })
}

pub(super) fn endpoint(of: EndpointRecord, webhooks: &Webhooks) -> pb::WebhookEndpoint {
    pb::WebhookEndpoint {
        id: of.id.into_string(),
        url: of.url,
        events: of.events.names().into_iter().map(str::to_owned).collect(),
        max_retries: of.max_attempts,
        timeout: Some(span(of.timeout)),
        disabled: of.disabled,
        disabled_reason: of.disabled_reason.unwrap_or_default(),
        previous_secret_expire_time: of.previous_secret_until.map(Timestamp::to_proto),
        create_time: Some(of.created_at.to_proto()),
        update_time: Some(of.updated_at.to_proto()),
        retry_schedule: webhooks.schedule(of.max_attempts).into_iter().map(span).collect(),
        retry_horizon: Some(span(webhooks.horizon(of.max_attempts))),
    }
}

pub(super) fn retry_job(of: RetryJob) -> pb::RetryJob {
    let state = match of.state {
        RetryJobState::Running => pb::RetryJobState::Running,
        RetryJobState::Done => pb::RetryJobState::Done,
        RetryJobState::Cancelled => pb::RetryJobState::Cancelled,
    };
    pb::RetryJob {
        id: of.id.into_string(),
        state: state.into(),
        matched: of.matched,
        succeeded: of.succeeded,
        failed: of.failed,
        skipped: of.skipped,
        create_time: Some(of.created_at.to_proto()),
        end_time: of.finished_at.map(Timestamp::to_proto),
    }
}
