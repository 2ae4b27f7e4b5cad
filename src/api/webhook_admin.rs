//! The `WebhookAdmin` service.

use std::time::Duration;

use tonic::{Code, Request, Response, Status};

use super::{
    page::Page,
    status::{self, error, invalid_field},
    webhooks::{
        accept, dead_letter, delivery, delivery_state, duration, endpoint, micros, no_dead_letter, no_endpoint, retry,
        retry_job, text, webhook_from_proto,
    },
};
use crate::{
    access::Caller,
    delivery::{DEFAULT_OVERLAP, TestError, Webhooks},
    domain::{
        BatchId, DeadLetterId, DeliveryId, RetryJobId, Scope, WebhookEndpointId,
        text::is_storable,
        webhook::{EventFilter, MAX_ATTEMPTS, TIMEOUT_RANGE, WebhookEvent},
    },
    pb::{self, webhook_admin_server::WebhookAdmin},
    store::{DeadLetterFilter, DeletedDeadLetter, DeletedEndpoint, DeliveryFilter, EndpointChange},
};

/// The most bytes of a request id.
const REQUEST_ID: usize = 128;
/// The most bytes of why an endpoint is disabled.
const REASON: usize = 256;

type Reply<T> = Result<Response<T>, Status>;

/// Dead letters, deliveries, endpoints.
pub(super) struct Admin {
    pub(super) webhooks: Webhooks,
}

/// Who calls, whose they see, and what they ask.
fn open<T>(request: Request<T>) -> Result<(Caller, Scope, T), Status> {
    let caller = super::gate::caller_of(&request)?;
    let scope = caller.scope();
    Ok((caller, scope, request.into_inner()))
}

/// An id that is there. One that can't be any is none.
fn id(of: String, field: &str) -> Result<String, Status> {
    text(of, field)?.ok_or_else(|| invalid_field(field, "is empty"))
}

/// The event to look for; empty: any.
fn event(of: String) -> Result<Option<WebhookEvent>, Status> {
    let unknown = || invalid_field("event", "must be completed, failed, progress, cancelled, expired or test");
    text(of, "event")?.map(|name| WebhookEvent::from_text(&name).ok_or_else(unknown)).transpose()
}

fn after<I>(page: &Page, read: impl FnOnce(String) -> I) -> Option<I> {
    page.after.clone().map(read)
}

#[tonic::async_trait]
impl WebhookAdmin for Admin {
    async fn list_dead_letters(
        &self,
        request: Request<pb::ListDeadLettersRequest>,
    ) -> Reply<pb::ListDeadLettersResponse> {
        let (_, scope, request) = open(request)?;
        let filter = DeadLetterFilter {
            scope,
            batch_id: text(request.batch_id, "batch_id")?,
            event: event(request.event)?.map(|event| event.as_str().to_owned()),
            host: text(request.url_host, "url_host")?,
            delivered: request.delivered,
            created_from: micros(request.created_from),
            created_before: micros(request.created_before),
        };
        let page = Page::parse(request.page_size, &request.page_token, &["dead_letters", &format!("{filter:?}")])?;
        let after = after(&page, DeadLetterId::from_text);
        let found = self.webhooks.store().dead_letters(&filter, after.as_ref(), page.size + 1).await;
        let found = found.map_err(status::store)?.into_iter().map(|one| dead_letter(one, Vec::new())).collect();
        let (dead_letters, next_page_token) = page.finish(found, |one| &one.id);
        Ok(Response::new(pb::ListDeadLettersResponse { dead_letters, next_page_token }))
    }

    async fn get_dead_letter(&self, request: Request<pb::GetDeadLetterRequest>) -> Reply<pb::DeadLetter> {
        let (_, scope, request) = open(request)?;
        let id = DeadLetterId::from_text(id(request.dead_letter_id, "dead_letter_id")?);
        let found = self.webhooks.store().dead_letter(&id, &scope).await.map_err(status::store)?;
        let found = found.ok_or_else(|| no_dead_letter(id.as_str()))?;
        let attempts = self.webhooks.store().attempts(&found.delivery_id, &scope).await.map_err(status::store)?;
        Ok(Response::new(dead_letter(found, attempts)))
    }

    async fn retry_dead_letter(
        &self,
        request: Request<pb::RetryDeadLetterRequest>,
    ) -> Reply<pb::RetryDeadLetterResponse> {
        let (_, scope, request) = open(request)?;
        let id = id(request.dead_letter_id, "dead_letter_id")?;
        if request.request_id.len() > REQUEST_ID || request.request_id.chars().any(char::is_control) {
            let message = format!("must be at most {REQUEST_ID} bytes without control characters");
            return Err(invalid_field("request_id", message));
        }
        let request_id = (!request.request_id.is_empty()).then_some(request.request_id);
        let retried = self.webhooks.retry(DeadLetterId::from_text(&id), scope, request.force, request_id).await;
        let retried = retried.map_err(|refused| retry(refused, &id))?;
        Ok(Response::new(pb::RetryDeadLetterResponse {
            retry_success: retried.success,
            forced: retried.forced,
            http_status: retried.http_status.map(i32::from).unwrap_or_default(),
            error_message: retried.error_message.unwrap_or_default(),
            dead_letter: Some(dead_letter(retried.dead_letter, Vec::new())),
        }))
    }

    async fn delete_dead_letter(&self, request: Request<pb::DeleteDeadLetterRequest>) -> Reply<()> {
        let (_, scope, request) = open(request)?;
        let id = DeadLetterId::from_text(id(request.dead_letter_id, "dead_letter_id")?);
        match self.webhooks.store().delete_dead_letter(&id, &scope).await.map_err(status::store)? {
            DeletedDeadLetter::Deleted => Ok(Response::new(())),
            DeletedDeadLetter::NotFound => Err(no_dead_letter(id.as_str())),
            DeletedDeadLetter::Busy => {
                Err(error(Code::Aborted, "DEAD_LETTER_BUSY", "somebody is retrying this dead letter"))
            }
        }
    }

    async fn retry_dead_letters(
        &self,
        request: Request<pb::RetryDeadLettersRequest>,
    ) -> Reply<pb::RetryDeadLettersResponse> {
        let (caller, scope, request) = open(request)?;
        let filter = DeadLetterFilter {
            scope,
            batch_id: text(request.batch_id, "batch_id")?,
            event: event(request.event)?.map(|event| event.as_str().to_owned()),
            host: text(request.url_host, "url_host")?,
            delivered: Some(false),
            created_from: micros(request.created_from),
            created_before: micros(request.created_before),
        };
        if request.dry_run {
            let matched = self.webhooks.store().count_dead_letters(&filter).await.map_err(status::store)?;
            return Ok(Response::new(pb::RetryDeadLettersResponse { matched, job: None }));
        }
        let job = self.webhooks.retry_all(&caller.owner, filter).await.map_err(status::store)?;
        Ok(Response::new(pb::RetryDeadLettersResponse { matched: job.matched, job: Some(retry_job(job)) }))
    }

    async fn purge_dead_letters(
        &self,
        request: Request<pb::PurgeDeadLettersRequest>,
    ) -> Reply<pb::PurgeDeadLettersResponse> {
        let (_, scope, request) = open(request)?;
        // Not given is not zero: whoever forgets it must not lose everything.
        let age = duration(request.older_than, "older_than")?
            .ok_or_else(|| invalid_field("older_than", "must be given; 0s deletes all"))?;
        let purged = self.webhooks.store().purge_dead_letters(age, &scope).await.map_err(status::store)?;
        Ok(Response::new(pb::PurgeDeadLettersResponse { purged: i64::try_from(purged).unwrap_or(i64::MAX) }))
    }

    async fn get_retry_job(&self, request: Request<pb::GetRetryJobRequest>) -> Reply<pb::RetryJob> {
        let (_, scope, request) = open(request)?;
        let id = RetryJobId::from_text(id(request.retry_job_id, "retry_job_id")?);
        let found = self.webhooks.store().retry_job(&id, &scope).await.map_err(status::store)?;
        Ok(Response::new(retry_job(found.ok_or_else(|| no_retry_job(&id))?)))
    }

    async fn list_retry_jobs(&self, request: Request<pb::ListRetryJobsRequest>) -> Reply<pb::ListRetryJobsResponse> {
        let (_, scope, request) = open(request)?;
        let filters = ["retry_jobs", &format!("{scope:?}")];
        let page = Page::parse(request.page_size, &request.page_token, &filters)?;
        let after = after(&page, RetryJobId::from_text);
        let found = self.webhooks.store().retry_jobs(&scope, after.as_ref(), page.size + 1).await;
        let found = found.map_err(status::store)?.into_iter().map(retry_job).collect();
        let (retry_jobs, next_page_token) = page.finish(found, |one| &one.id);
        Ok(Response::new(pb::ListRetryJobsResponse { retry_jobs, next_page_token }))
    }

    async fn cancel_retry_job(&self, request: Request<pb::CancelRetryJobRequest>) -> Reply<pb::RetryJob> {
        let (_, scope, request) = open(request)?;
        let id = RetryJobId::from_text(id(request.retry_job_id, "retry_job_id")?);
        let found = self.webhooks.store().cancel_retry_job(&id, &scope).await.map_err(status::store)?;
        Ok(Response::new(retry_job(found.ok_or_else(|| no_retry_job(&id))?)))
    }

    async fn list_deliveries(&self, request: Request<pb::ListDeliveriesRequest>) -> Reply<pb::ListDeliveriesResponse> {
        let (_, scope, request) = open(request)?;
        let filter = DeliveryFilter {
            scope,
            batch_id: text(request.batch_id, "batch_id")?.map(BatchId::from_text),
            endpoint_id: text(request.endpoint_id, "endpoint_id")?.map(WebhookEndpointId::from_text),
            event: event(request.event)?,
            state: delivery_state(request.state)?,
        };
        let page = Page::parse(request.page_size, &request.page_token, &["deliveries", &format!("{filter:?}")])?;
        let after = after(&page, DeliveryId::from_text);
        let found = self.webhooks.store().deliveries(&filter, after.as_ref(), page.size + 1).await;
        let found = found.map_err(status::store)?.into_iter().map(|one| delivery(one, None)).collect();
        let (deliveries, next_page_token) = page.finish(found, |one| &one.id);
        Ok(Response::new(pb::ListDeliveriesResponse { deliveries, next_page_token }))
    }

    async fn get_delivery(&self, request: Request<pb::GetDeliveryRequest>) -> Reply<pb::Delivery> {
        let (_, scope, request) = open(request)?;
        let id = DeliveryId::from_text(id(request.delivery_id, "delivery_id")?);
        let found = self.webhooks.store().delivery(&id, &scope).await.map_err(status::store)?;
        let found = found.ok_or_else(|| {
            error(Code::NotFound, "DELIVERY_NOT_FOUND", format!("no delivery {:?}", status::short(id.as_str())))
        })?;
        let attempts = self.webhooks.store().attempts(&id, &scope).await.map_err(status::store)?;
        Ok(Response::new(delivery(found, Some(attempts))))
    }

    async fn create_endpoint(&self, request: Request<pb::CreateEndpointRequest>) -> Reply<pb::CreateEndpointResponse> {
        let (caller, _, request) = open(request)?;
        let config = webhook_from_proto(pb::WebhookConfig {
            url: request.url,
            secret: request.secret,
            max_retries: request.max_retries,
            timeout: request.timeout,
            events: request.events,
            ..pb::WebhookConfig::default()
        })?;
        let (made, secret) =
            self.webhooks.create_endpoint(&caller.owner, config).await.map_err(|refused| accept(refused, ""))?;
        Ok(Response::new(pb::CreateEndpointResponse {
            endpoint: Some(endpoint(made, &self.webhooks)),
            secret: secret.expose().to_owned(),
        }))
    }

    async fn get_endpoint(&self, request: Request<pb::GetEndpointRequest>) -> Reply<pb::WebhookEndpoint> {
        let (_, scope, request) = open(request)?;
        let id = WebhookEndpointId::from_text(id(request.endpoint_id, "endpoint_id")?);
        let found = self.webhooks.store().endpoint(&id, &scope).await.map_err(status::store)?;
        Ok(Response::new(endpoint(found.ok_or_else(|| no_endpoint(id.as_str()))?, &self.webhooks)))
    }

    async fn list_endpoints(&self, request: Request<pb::ListEndpointsRequest>) -> Reply<pb::ListEndpointsResponse> {
        let (_, scope, request) = open(request)?;
        let filters = ["endpoints", &format!("{scope:?}")];
        let page = Page::parse(request.page_size, &request.page_token, &filters)?;
        let after = after(&page, WebhookEndpointId::from_text);
        let found = self.webhooks.store().endpoints(&scope, after.as_ref(), page.size + 1).await;
        let found = found.map_err(status::store)?.into_iter().map(|one| endpoint(one, &self.webhooks)).collect();
        let (endpoints, next_page_token) = page.finish(found, |one| &one.id);
        Ok(Response::new(pb::ListEndpointsResponse { endpoints, next_page_token }))
    }

    async fn update_endpoint(&self, request: Request<pb::UpdateEndpointRequest>) -> Reply<pb::WebhookEndpoint> {
        let (_, scope, request) = open(request)?;
        let id = WebhookEndpointId::from_text(id(request.endpoint_id.clone(), "endpoint_id")?);
        let change = change(request)?;
        let changed = self.webhooks.update_endpoint(&id, &scope, change).await;
        let changed = changed.map_err(|refused| accept(refused, ""))?.ok_or_else(|| no_endpoint(id.as_str()))?;
        Ok(Response::new(endpoint(changed, &self.webhooks)))
    }

    async fn delete_endpoint(&self, request: Request<pb::DeleteEndpointRequest>) -> Reply<()> {
        let (_, scope, request) = open(request)?;
        let id = WebhookEndpointId::from_text(id(request.endpoint_id, "endpoint_id")?);
        match self.webhooks.delete_endpoint(&id, &scope).await.map_err(status::store)? {
            DeletedEndpoint::Deleted => Ok(Response::new(())),
            DeletedEndpoint::NotFound => Err(no_endpoint(id.as_str())),
            DeletedEndpoint::InUse { batches, deliveries } => {
                let message =
                    format!("{batches} unfinished batches name this endpoint, {deliveries} deliveries wait for it");
                Err(error(Code::FailedPrecondition, "ENDPOINT_IN_USE", message))
            }
        }
    }

    async fn rotate_secret(&self, request: Request<pb::RotateSecretRequest>) -> Reply<pb::RotateSecretResponse> {
        let (_, scope, request) = open(request)?;
        let id = WebhookEndpointId::from_text(id(request.endpoint_id, "endpoint_id")?);
        let overlap = duration(request.overlap, "overlap")?.unwrap_or(DEFAULT_OVERLAP);
        let secret = (!request.secret.is_empty()).then_some(request.secret);
        let rotated = self.webhooks.rotate_secret(&id, &scope, secret, overlap).await;
        let (changed, secret) =
            rotated.map_err(|refused| accept(refused, ""))?.ok_or_else(|| no_endpoint(id.as_str()))?;
        Ok(Response::new(pb::RotateSecretResponse {
            endpoint: Some(endpoint(changed, &self.webhooks)),
            secret: secret.expose().to_owned(),
        }))
    }

    async fn send_test_event(&self, request: Request<pb::SendTestEventRequest>) -> Reply<pb::SendTestEventResponse> {
        let (_, scope, request) = open(request)?;
        let id = WebhookEndpointId::from_text(id(request.endpoint_id, "endpoint_id")?);
        let tested = self.webhooks.test_endpoint(&id, &scope).await.map_err(|error| match error {
            TestError::Store(error) => status::store(error),
            TestError::Stopped => status::shutting_down(),
        })?;
        let tested = tested.ok_or_else(|| no_endpoint(id.as_str()))?;
        let failed = tested.result.error;
        Ok(Response::new(pb::SendTestEventResponse {
            success: failed.is_none(),
            http_status: tested.result.http_status.map(i32::from).unwrap_or_default(),
            error_kind: failed.as_ref().map(|error| error.kind.as_str().to_owned()).unwrap_or_default(),
            error_message: failed.map(|error| error.message).unwrap_or_default(),
            response_excerpt: tested.result.response_excerpt.unwrap_or_default(),
            delivery_id: tested.claim.id.into_string(),
        }))
    }
}

/// What to change of an endpoint. Its URL is checked where the guard is.
fn change(of: pb::UpdateEndpointRequest) -> Result<EndpointChange, Status> {
    let mut wrong = status::Violations::default();
    let attempts = of.max_retries.map(i64::from);
    let good = attempts.is_none_or(|attempts| (1..=MAX_ATTEMPTS).contains(&attempts));
    wrong.check(good, "max_retries", format!("the total number of attempts is 1 to {MAX_ATTEMPTS}"));
    let (least, most): (Duration, Duration) = TIMEOUT_RANGE;
    let timeout = duration(of.timeout, "timeout")?;
    let good = timeout.is_none_or(|timeout| (least..=most).contains(&timeout));
    wrong.check(good, "timeout", format!("a timeout is {} s to {} s", least.as_secs(), most.as_secs()));
    let events = match of.events.as_slice() {
        [] => None,
        names => EventFilter::parse(names).map_err(|unknown| wrong.add("events", unknown.to_string())).ok(),
    };
    let reason = of.disabled_reason;
    let good = reason.len() <= REASON && is_storable(&reason);
    wrong.check(good, "disabled_reason", format!("must be at most {REASON} bytes without NUL"));
    wrong.finish()?;
    Ok(EndpointChange {
        url: of.url,
        events,
        max_attempts: of.max_retries,
        timeout,
        disabled: of.disabled.map(|disabled| (disabled, (!reason.is_empty()).then_some(reason))),
    })
}

fn no_retry_job(id: &RetryJobId) -> Status {
    error(Code::NotFound, "RETRY_JOB_NOT_FOUND", format!("no retry job {:?}", status::short(id.as_str())))
}
