//! Webhooks: the receivers of batches' events, registered endpoints, deliveries and attempts, dead letters and retries.

use std::{collections::BTreeMap, time::Duration};

use super::{
    Code, Found, Page, Service, ServiceError, Span,
    error::{self, Violation, Violations, no_dead_letter, no_endpoint},
    filters,
    rules::{self, id, span, text},
    text::short,
};
use crate::{
    access::Caller,
    delivery::{AcceptError, Retried, Tested},
    domain::{
        BatchId, DeadLetterId, DeliveryId, RetryJobId, Scope, WebhookEndpointId,
        text::{is_plain, is_storable},
        webhook::{
            DeliveryState, EventFilter, MAX_ATTEMPTS, OLD_URL_KEY, Secret, TIMEOUT_RANGE, WebhookConfig, WebhookEvent,
            WebhookTarget,
        },
    },
    store::{
        AttemptRecord, DeadLetter, DeadLetterFilter, DeletedDeadLetter, DeletedEndpoint, DeliveryFilter,
        DeliveryRecord, EndpointChange, EndpointRecord, RetryJob,
    },
};

/// How long the previous secret also signs after a rotation: by default, and at most.
const DEFAULT_OVERLAP: Duration = Duration::from_secs(24 * 3_600);
const MAX_OVERLAP: Duration = Duration::from_secs(7 * 24 * 3_600);
/// The most bytes of the reason why an endpoint is disabled.
const REASON: usize = 256;

/// A webhook, as a client describes it. It has no `Debug`, because it contains a secret.
#[derive(Clone, Default)]
pub struct NewWebhook {
    /// The receiver's URL.
    pub url: String,
    /// The signing secret. Empty: the server's.
    pub secret: String,
    /// The most attempts. 0: the server's default.
    pub max_retries: i32,
    /// The time for one attempt.
    pub timeout: Option<Span>,
    /// The events to send. Empty: every end of a batch.
    pub events: Vec<String>,
}

/// Changes to an endpoint. `None` leaves a field unchanged.
#[derive(Clone, Debug, Default)]
pub struct UpdateEndpoint {
    /// The URL.
    pub url: Option<String>,
    /// The events to send. Empty: unchanged.
    pub events: Vec<String>,
    /// The most attempts.
    pub max_retries: Option<i32>,
    /// The time for one attempt.
    pub timeout: Option<Span>,
    /// Whether it is disabled.
    pub disabled: Option<bool>,
    /// The reason for disabling it. Empty: none.
    pub disabled_reason: String,
}

/// A client's filter for dead letters. An empty text matches any.
#[derive(Clone, Debug, Default)]
pub struct DeadLettersWanted {
    /// Those of this batch.
    pub batch_id: String,
    /// Those of this event.
    pub event: String,
    /// Those to this host.
    pub url_host: String,
    /// Those that a retry has, or has not, delivered.
    pub delivered: Option<bool>,
    /// Those that became one at this time (microseconds since the Unix epoch) or later.
    pub created_from: Option<i64>,
    /// Those that became one before this time.
    pub created_before: Option<i64>,
}

/// A client's filter for deliveries. An empty text matches any.
#[derive(Clone, Debug, Default)]
pub struct DeliveriesWanted {
    /// Those of this batch.
    pub batch_id: String,
    /// Those to this endpoint.
    pub endpoint_id: String,
    /// Those of this event.
    pub event: String,
    /// Only those in this state. `Some(None)`: a state that does not exist.
    pub state: Option<Option<DeliveryState>>,
}

/// What a retry of many dead letters found, and the job that does it.
#[derive(Clone, Debug)]
pub struct RetriedMany {
    /// The number of matching dead letters.
    pub matched: i64,
    /// `None` if the call only asked for the number.
    pub job: Option<RetryJob>,
}

impl Service {
    /// The receiver of a new batch's webhooks: that of the request, or of the old form in its metadata, or a registered
    /// endpoint.
    pub(super) async fn webhook_of_batch(
        &self,
        caller: &Caller,
        webhook: Option<NewWebhook>,
        endpoint_id: String,
        metadata: &BTreeMap<String, String>,
    ) -> Result<(Option<WebhookTarget>, Option<WebhookEndpointId>), ServiceError> {
        if let Some(id) = text(endpoint_id, "webhook_endpoint_id")? {
            if webhook.is_some() {
                return Err(ServiceError::field(
                    "webhook_endpoint_id",
                    "can't be combined with webhook: set one of the two",
                ));
            }
            let id = WebhookEndpointId::from_text(id);
            return match self.parts.store.endpoint(&id, &caller.scope()).await? {
                Some(endpoint) if endpoint.disabled => {
                    let message = "the webhook endpoint is disabled";
                    Err(ServiceError::new(Code::FailedPrecondition, "ENDPOINT_DISABLED", message))
                }
                Some(endpoint) => Ok((None, Some(endpoint.id))),
                None => Err(ServiceError::field("webhook_endpoint_id", "there is no such webhook endpoint")),
            };
        }
        let accepted = if let Some(webhook) = webhook {
            let config = config(webhook)?;
            self.parts.webhooks.accept(config).await.map_err(|refused| error::accept(refused, "webhook."))?
        } else if let Some(config) = WebhookConfig::from_metadata(metadata) {
            self.parts.webhooks.accept(config).await.map_err(old_form)?
        } else {
            return Ok((None, None));
        };
        Ok((Some(accepted), None))
    }

    /// Registers an endpoint. Its secret is never shown again.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn create_endpoint(
        &self,
        caller: &Caller,
        of: NewWebhook,
    ) -> Result<(EndpointRecord, Secret), ServiceError> {
        let config = config(of)?;
        let made = self.parts.webhooks.create_endpoint(&caller.owner, config).await;
        made.map_err(|refused| error::accept(refused, ""))
    }

    /// One endpoint.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn endpoint(&self, caller: &Caller, endpoint_id: String) -> Result<EndpointRecord, ServiceError> {
        let id = WebhookEndpointId::from_text(id(endpoint_id, "endpoint_id")?);
        self.parts.store.endpoint(&id, &caller.scope()).await?.ok_or_else(|| no_endpoint(id.as_str()))
    }

    /// The caller's endpoints, newest first.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn endpoints(
        &self,
        caller: &Caller,
        page_size: i32,
        page_token: &str,
    ) -> Result<Found<EndpointRecord>, ServiceError> {
        let scope = caller.scope();
        let page = Page::parse(page_size, page_token, &["endpoints", &format!("{scope:?}")])?;
        let after = page.after.clone().map(WebhookEndpointId::from_text);
        let items = self.parts.store.endpoints(&scope, after.as_ref(), page.size + 1).await?;
        Ok(Found { items, page })
    }

    /// Changes an endpoint.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn update_endpoint(
        &self,
        caller: &Caller,
        endpoint_id: String,
        of: UpdateEndpoint,
    ) -> Result<EndpointRecord, ServiceError> {
        let id = WebhookEndpointId::from_text(id(endpoint_id, "endpoint_id")?);
        let changed = self.parts.webhooks.update_endpoint(&id, &caller.scope(), change(of)?).await;
        changed.map_err(|refused| error::accept(refused, ""))?.ok_or_else(|| no_endpoint(id.as_str()))
    }

    /// Deletes an endpoint without waiting deliveries.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn delete_endpoint(&self, caller: &Caller, endpoint_id: String) -> Result<(), ServiceError> {
        let id = WebhookEndpointId::from_text(id(endpoint_id, "endpoint_id")?);
        match self.parts.store.delete_endpoint(&id, &caller.scope()).await? {
            DeletedEndpoint::Deleted => Ok(()),
            DeletedEndpoint::NotFound => Err(no_endpoint(id.as_str())),
            DeletedEndpoint::InUse { batches, deliveries } => {
                let message =
                    format!("{batches} unfinished batches name this endpoint, {deliveries} deliveries wait for it");
                Err(ServiceError::new(Code::FailedPrecondition, "ENDPOINT_IN_USE", message))
            }
        }
    }

    /// Gives an endpoint a new secret, generated if `secret` is empty. The previous one also signs for `overlap`. The
    /// secret is never shown again.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn rotate_secret(
        &self,
        caller: &Caller,
        endpoint_id: String,
        secret: String,
        overlap: Option<Span>,
    ) -> Result<(EndpointRecord, Secret), ServiceError> {
        let id = WebhookEndpointId::from_text(id(endpoint_id, "endpoint_id")?);
        let overlap = span(overlap, "overlap")?.unwrap_or(DEFAULT_OVERLAP);
        if overlap > MAX_OVERLAP {
            let message = format!("the overlap is at most {} days", MAX_OVERLAP.as_secs() / 86_400);
            return Err(ServiceError::field("overlap", message));
        }
        let secret = match secret.is_empty() {
            true => Secret::generate(),
            false => Secret::try_new(secret).map_err(|bad| ServiceError::field("secret", bad.to_string()))?,
        };
        let rotated = self.parts.webhooks.rotate_secret(&id, &caller.scope(), &secret, overlap).await?;
        rotated.map(|endpoint| (endpoint, secret)).ok_or_else(|| no_endpoint(id.as_str()))
    }

    /// Sends a test event to an endpoint, now and once.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn test_endpoint(&self, caller: &Caller, endpoint_id: String) -> Result<Tested, ServiceError> {
        let id = WebhookEndpointId::from_text(id(endpoint_id, "endpoint_id")?);
        self.parts.webhooks.test_endpoint(&id, &caller.scope()).await?.ok_or_else(|| no_endpoint(id.as_str()))
    }

    /// The caller's deliveries, newest first.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn deliveries(
        &self,
        caller: &Caller,
        of: DeliveriesWanted,
        page_size: i32,
        page_token: &str,
    ) -> Result<Found<DeliveryRecord>, ServiceError> {
        let filter = DeliveryFilter {
            scope: caller.scope(),
            batch_id: text(of.batch_id, "batch_id")?.map(BatchId::from_text),
            endpoint_id: text(of.endpoint_id, "endpoint_id")?.map(WebhookEndpointId::from_text),
            event: event(of.event)?,
            state: of.state.map(|state| state.ok_or_else(|| ServiceError::field("state", "is unknown"))).transpose()?,
        };
        let page = Page::parse(page_size, page_token, &[&filters::of_deliveries(&filter)])?;
        let after = page.after.clone().map(DeliveryId::from_text);
        let items = self.parts.store.deliveries(&filter, after.as_ref(), page.size + 1).await?;
        Ok(Found { items, page })
    }

    /// One delivery with its attempts.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn delivery(
        &self,
        caller: &Caller,
        delivery_id: String,
    ) -> Result<(DeliveryRecord, Vec<AttemptRecord>), ServiceError> {
        let id = DeliveryId::from_text(id(delivery_id, "delivery_id")?);
        let (store, scope) = (&self.parts.store, caller.scope());
        let found = store.delivery(&id, &scope).await?.ok_or_else(|| {
            ServiceError::new(Code::NotFound, "DELIVERY_NOT_FOUND", format!("no delivery {:?}", short(id.as_str())))
        })?;
        Ok((found, store.attempts(&id, &scope).await?))
    }

    /// The caller's dead letters, newest first.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn dead_letters(
        &self,
        caller: &Caller,
        of: DeadLettersWanted,
        page_size: i32,
        page_token: &str,
    ) -> Result<Found<DeadLetter>, ServiceError> {
        let filter = dead_letter_filter(caller.scope(), of)?;
        let page = Page::parse(page_size, page_token, &[&filters::of_dead_letters(&filter)])?;
        let after = page.after.clone().map(DeadLetterId::from_text);
        let items = self.parts.store.dead_letters(&filter, after.as_ref(), page.size + 1).await?;
        Ok(Found { items, page })
    }

    /// One dead letter with the attempts of its delivery.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn dead_letter(
        &self,
        caller: &Caller,
        dead_letter_id: String,
    ) -> Result<(DeadLetter, Vec<AttemptRecord>), ServiceError> {
        let id = DeadLetterId::from_text(id(dead_letter_id, "dead_letter_id")?);
        let (store, scope) = (&self.parts.store, caller.scope());
        let found = store.dead_letter(&id, &scope).await?.ok_or_else(|| no_dead_letter(id.as_str()))?;
        let attempts = store.attempts(&found.delivery_id, &scope).await?;
        Ok((found, attempts))
    }

    /// Sends a dead letter now, once. A repeated request id sends nothing and returns the same answer.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn retry_dead_letter(
        &self,
        caller: &Caller,
        dead_letter_id: String,
        force: bool,
        request_id: String,
    ) -> Result<Retried, ServiceError> {
        let id = id(dead_letter_id, "dead_letter_id")?;
        if request_id.len() > rules::REQUEST_ID || !is_plain(&request_id) {
            let message = format!("must be at most {} bytes without control characters", rules::REQUEST_ID);
            return Err(ServiceError::field("request_id", message));
        }
        let request_id = (!request_id.is_empty()).then_some(request_id);
        let letter = DeadLetterId::from_text(&id);
        let retried = self.parts.webhooks.retry(letter, caller.scope(), force, request_id).await;
        retried.map_err(|refused| error::dead_letter(refused, &id))
    }

    /// Deletes a dead letter that nobody is retrying.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn delete_dead_letter(&self, caller: &Caller, dead_letter_id: String) -> Result<(), ServiceError> {
        let id = DeadLetterId::from_text(id(dead_letter_id, "dead_letter_id")?);
        match self.parts.store.delete_dead_letter(&id, &caller.scope()).await? {
            DeletedDeadLetter::Deleted => Ok(()),
            DeletedDeadLetter::NotFound => Err(no_dead_letter(id.as_str())),
            DeletedDeadLetter::Busy => {
                let message = "another retry of this dead letter is running";
                Err(ServiceError::new(Code::Aborted, "DEAD_LETTER_BUSY", message))
            }
        }
    }

    /// Retries all matching dead letters that were not delivered since, in the background. `dry_run`: only counts them.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn retry_dead_letters(
        &self,
        caller: &Caller,
        of: DeadLettersWanted,
        dry_run: bool,
    ) -> Result<RetriedMany, ServiceError> {
        let filter = dead_letter_filter(caller.scope(), DeadLettersWanted { delivered: Some(false), ..of })?;
        if dry_run {
            let matched = self.parts.store.count_dead_letters(&filter).await?;
            return Ok(RetriedMany { matched, job: None });
        }
        let job = self.parts.webhooks.retry_all(&caller.owner, filter).await?;
        Ok(RetriedMany { matched: job.matched, job: Some(job) })
    }

    /// Deletes the caller's dead letters above an age, which is required. Returns their number.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn purge_dead_letters(&self, caller: &Caller, older_than: Option<Span>) -> Result<u64, ServiceError> {
        // Not given is not zero: whoever forgets it must not lose everything.
        let age = span(older_than, "older_than")?
            .ok_or_else(|| ServiceError::field("older_than", "must be given; 0s deletes all"))?;
        let mut purged = 0;
        loop {
            let some = self.parts.store.purge_dead_letters(age, &caller.scope()).await?;
            purged += some.count;
            if !some.more {
                return Ok(purged);
            }
        }
    }

    /// One retry job.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn retry_job(&self, caller: &Caller, retry_job_id: String) -> Result<RetryJob, ServiceError> {
        let id = RetryJobId::from_text(id(retry_job_id, "retry_job_id")?);
        self.parts.store.retry_job(&id, &caller.scope()).await?.ok_or_else(|| no_retry_job(&id))
    }

    /// The caller's retry jobs, newest first.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn retry_jobs(
        &self,
        caller: &Caller,
        page_size: i32,
        page_token: &str,
    ) -> Result<Found<RetryJob>, ServiceError> {
        let scope = caller.scope();
        let page = Page::parse(page_size, page_token, &["retry_jobs", &format!("{scope:?}")])?;
        let after = page.after.clone().map(RetryJobId::from_text);
        let items = self.parts.store.retry_jobs(&scope, after.as_ref(), page.size + 1).await?;
        Ok(Found { items, page })
    }

    /// Stops a retry job after its attempts in flight.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn cancel_retry_job(&self, caller: &Caller, retry_job_id: String) -> Result<RetryJob, ServiceError> {
        let id = RetryJobId::from_text(id(retry_job_id, "retry_job_id")?);
        self.parts.store.cancel_retry_job(&id, &caller.scope()).await?.ok_or_else(|| no_retry_job(&id))
    }
}

/// A webhook that is still to be checked.
fn config(of: NewWebhook) -> Result<WebhookConfig, ServiceError> {
    Ok(WebhookConfig::new(of.url)
        .secret((!of.secret.is_empty()).then_some(of.secret))
        .max_retries((of.max_retries != 0).then(|| of.max_retries.into()))
        .timeout(span(of.timeout, "webhook.timeout")?)
        .events(of.events))
}

/// Why the old form of a webhook, in a batch's metadata, was not accepted.
fn old_form(refused: AcceptError) -> ServiceError {
    match refused {
        AcceptError::Store(error) => error.into(),
        AcceptError::Invalid(fields) => {
            let description = fields.first().map(|first| first.message.clone()).unwrap_or_default();
            let field = format!("metadata[{OLD_URL_KEY:?}]");
            let message = format!("{field}: {description}");
            ServiceError::invalid("INVALID_WEBHOOK", message, vec![Violation { field, description }])
        }
    }
}

/// The event to look for; an empty text stands for any.
fn event(of: String) -> Result<Option<WebhookEvent>, ServiceError> {
    let unknown = || ServiceError::field("event", "must be completed, failed, progress, cancelled, expired or test");
    text(of, "event")?.map(|name| WebhookEvent::from_text(&name).ok_or_else(unknown)).transpose()
}

fn dead_letter_filter(scope: Scope, of: DeadLettersWanted) -> Result<DeadLetterFilter, ServiceError> {
    Ok(DeadLetterFilter {
        scope,
        batch_id: text(of.batch_id, "batch_id")?,
        event: event(of.event)?.map(|event| event.as_str().to_owned()),
        host: text(of.url_host, "url_host")?,
        delivered: of.delivered,
        created_from: of.created_from,
        created_before: of.created_before,
    })
}

/// What to change of an endpoint. Its URL is checked where the guard is.
fn change(of: UpdateEndpoint) -> Result<EndpointChange, ServiceError> {
    let mut wrong = Violations::default();
    let attempts = of.max_retries.map(i64::from);
    let good = attempts.is_none_or(|attempts| (1..=MAX_ATTEMPTS).contains(&attempts));
    wrong.check(good, "max_retries", format!("the total number of attempts is 1 to {MAX_ATTEMPTS}"));
    let (least, most): (Duration, Duration) = TIMEOUT_RANGE;
    let timeout = span(of.timeout, "timeout")?;
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

fn no_retry_job(id: &RetryJobId) -> ServiceError {
    ServiceError::new(Code::NotFound, "RETRY_JOB_NOT_FOUND", format!("no retry job {:?}", short(id.as_str())))
}
