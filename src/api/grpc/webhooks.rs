//! Webhooks on the wire.

use super::times::{span, time, timestamp};
use crate::{
    domain::{
        WebhookEndpointId,
        webhook::{DeliveryState, WebhookTarget},
    },
    pb,
    service::Service,
    store::{AttemptRecord, DeadLetter, DeliveryRecord, EndpointRecord, RetryJob, RetryJobState},
};

/// A batch's webhook without its secret, with the schedule that its number of attempts means.
pub(super) fn webhook_to_proto(of: &WebhookTarget, service: &Service) -> pb::WebhookConfig {
    let (waits, horizon) = service.webhook_schedule(of.max_attempts);
    pb::WebhookConfig {
        url: of.url.clone(),
        secret: String::new(),
        max_retries: of.max_attempts,
        timeout: Some(span(of.timeout)),
        events: of.events.names().into_iter().map(str::to_owned).collect(),
        retry_schedule: waits.into_iter().map(span).collect(),
        retry_horizon: Some(span(horizon)),
    }
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
        last_attempt_time: Some(timestamp(of.last_attempt_at)),
        create_time: Some(timestamp(of.created_at)),
        retried_time: time(of.retried_at),
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
        outcome: of.outcome.as_str().to_owned(),
        error_kind: of.error_kind.map(|kind| kind.as_str().to_owned()).unwrap_or_default(),
        error_message: of.error_message.unwrap_or_default(),
        http_status: of.http_status.map(i32::from).unwrap_or_default(),
        response_excerpt: of.response_excerpt.unwrap_or_default(),
        start_time: Some(timestamp(of.started_at)),
        end_time: time(of.finished_at),
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
        next_attempt_time: time(of.next_attempt_at),
        error_message: of.error_message.unwrap_or_default(),
        create_time: Some(timestamp(of.created_at)),
        settle_time: time(of.settled_at),
        payload: if log.is_some() { utf8(of.body) } else { String::new() },
        attempt_log: log.into_iter().flatten().map(attempt).collect(),
    }
}

pub(super) fn endpoint(of: EndpointRecord, service: &Service) -> pb::WebhookEndpoint {
    let (waits, horizon) = service.webhook_schedule(of.max_attempts);
    pb::WebhookEndpoint {
        id: of.id.into_string(),
        url: of.url,
        events: of.events.names().into_iter().map(str::to_owned).collect(),
        max_retries: of.max_attempts,
        timeout: Some(span(of.timeout)),
        disabled: of.disabled,
        disabled_reason: of.disabled_reason.unwrap_or_default(),
        previous_secret_expire_time: time(of.previous_secret_until),
        create_time: Some(timestamp(of.created_at)),
        update_time: Some(timestamp(of.updated_at)),
        retry_schedule: waits.into_iter().map(span).collect(),
        retry_horizon: Some(span(horizon)),
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
        create_time: Some(timestamp(of.created_at)),
        end_time: time(of.finished_at),
    }
}
