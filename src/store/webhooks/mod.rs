//! The webhook outbox. The transaction that changes a batch also decides and writes its deliveries; everything else
//! works on those rows.
//!
//! Locks are taken in this order: batch, event counter, deliveries (by id where there are many), dead letters. Claims and
//! the reaper skip rows that somebody else has locked.

mod claims;
mod clock;
mod dead_letters;
mod endpoints;
mod log;
mod reseal;
mod retention;
mod retry_jobs;
mod settle;
mod steps;

use std::time::Duration;

use sea_orm::{
    ColumnTrait, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder, QuerySelect,
    sea_query::{Expr, SimpleExpr},
};

pub use claims::{ClaimShare, ClaimedDelivery, Due, DueTargets, Signing};
pub use dead_letters::{BeginRetry, DeadLetter, DeadLetterFilter, DeletedDeadLetter};
pub use endpoints::{DeletedEndpoint, EndpointChange, EndpointRecord, NewEndpoint};
pub use log::{AttemptRecord, DeliveryFilter, DeliveryRecord};
pub use reseal::SecretOf;
pub use retention::Purged;
pub use retry_jobs::{ClaimedJob, RetryJob, RetryJobState};
pub use settle::{Reaped, Settled, SettledAs, Settlement};

use self::steps::Change;
use super::{
    DatabaseTransaction, StoreError, convert,
    entity::{batch, webhook_delivery, webhook_endpoint},
};
use crate::domain::{
    Batch, BatchStatus, DeliveryId, Timestamp,
    webhook::{
        AttemptError, DeliveryState, DeliveryTrigger, ErrorKind, EventFilter, PROGRESS_LIFETIME, Payload, ProgressMark,
        WebhookEvent, WebhookTarget, target_of,
    },
};

/// Time by which a lease is longer than its attempt: enough to record the outcome.
pub(super) const LEASE_MARGIN_MICROS: i64 = 30_000_000;
/// Time until a row that this version can't read is tried again; a newer version may be able to read it sooner.
pub(super) const UNREADABLE_MICROS: i64 = 600_000_000;
/// The due time of a delivery to a disabled endpoint: never, until it is enabled.
pub(super) const NEVER: i64 = i64::MAX;

/// The condition that a delivery is in this state. It is written into the SQL, because the databases use the partial
/// index of a state only if the statement names the state.
fn is(state: DeliveryState) -> SimpleExpr {
    Expr::cust(in_state(state))
}

fn in_state(state: DeliveryState) -> String {
    format!("state = '{}'", state.as_str())
}

/// The names of the states of deliveries that have not ended.
fn unsettled() -> impl Iterator<Item = &'static str> {
    DeliveryState::ALL.into_iter().filter(|state| !state.is_settled()).map(DeliveryState::as_str)
}

/// Creates the delivery for the state that `row` has entered, if its webhook subscribes to it. Progress that still
/// waits is dropped, because it is useless after the end.
pub(super) async fn enqueue_state(
    tx: &DatabaseTransaction,
    row: &batch::Model,
    status: BatchStatus,
    at: Timestamp,
) -> Result<(), StoreError> {
    let Some(event) = WebhookEvent::of(status) else { return Ok(()) };
    let Some(receiver) = Receiver::of(tx, row).await? else { return Ok(()) };
    supersede_progress(tx, row, at).await?;
    if receiver.events().wants(event) {
        enqueue(tx, row, &receiver, event, at).await?;
    }
    Ok(())
}

/// Creates a progress delivery, if the batch has progressed far enough since the last one. It replaces one that still
/// waits. The caller writes `row`, which records it.
pub(super) async fn enqueue_progress(
    tx: &DatabaseTransaction,
    row: &mut batch::Model,
    at: Timestamp,
) -> Result<(), StoreError> {
    let last = ProgressMark { done: row.progress_done, at: row.progress_at };
    let Some(mark) = last.next(row.completed + row.failed, row.total, at) else { return Ok(()) };
    let Some(receiver) = Receiver::of(tx, row).await? else { return Ok(()) };
    // For a disabled endpoint it would only wait until it is too old.
    if !receiver.events().wants(WebhookEvent::Progress) || receiver.is_disabled() {
        return Ok(());
    }
    row.progress_done = mark.done;
    row.progress_at = mark.at;
    supersede_progress(tx, row, at).await?;
    enqueue(tx, row, &receiver, WebhookEvent::Progress, at).await
}

/// The receiver of a batch's webhooks.
enum Receiver {
    Webhook(WebhookTarget),
    Endpoint(Box<webhook_endpoint::Model>, EventFilter),
    /// The endpoint that the batch names was deleted.
    Gone(String),
}

impl Receiver {
    async fn of(tx: &DatabaseTransaction, row: &batch::Model) -> Result<Option<Self>, StoreError> {
        if let Some(id) = &row.webhook_endpoint_id {
            return Ok(Some(match webhook_endpoint::Entity::find_by_id(id).one(tx).await? {
                Some(endpoint) => {
                    let events = convert::json("event list", &endpoint.events)?;
                    Self::Endpoint(Box::new(endpoint), events)
                }
                None => Self::Gone(id.clone()),
            }));
        }
        row.webhook.as_deref().map(|text| convert::json("webhook", text).map(Self::Webhook)).transpose()
    }

    fn is_disabled(&self) -> bool {
        match self {
            Self::Endpoint(endpoint, _) => endpoint.disabled,
            Self::Webhook(_) | Self::Gone(_) => false,
        }
    }

    fn events(&self) -> EventFilter {
        match self {
            Self::Webhook(webhook) => webhook.events,
            Self::Endpoint(_, events) => *events,
            Self::Gone(_) => EventFilter::default(),
        }
    }
}

async fn enqueue(
    tx: &DatabaseTransaction,
    row: &batch::Model,
    receiver: &Receiver,
    event: WebhookEvent,
    at: Timestamp,
) -> Result<(), StoreError> {
    let batch = Batch::try_from(row.clone())?;
    let body = Payload { event, batch: &batch }.body();
    let mut delivery = webhook_delivery::Model {
        batch_id: Some(row.id.clone()),
        owner: row.owner.clone(),
        ..new_delivery(event, body, at)
    };
    match receiver {
        Receiver::Webhook(webhook) => {
            delivery.target = target_of(&webhook.url);
            delivery.url.clone_from(&webhook.url);
            delivery.secret = webhook.secret.as_ref().map(|secret| secret.as_bytes().to_vec());
            delivery.max_attempts = webhook.max_attempts;
            delivery.timeout = convert::micros(webhook.timeout);
        }
        Receiver::Endpoint(endpoint, _) => address(&mut delivery, endpoint),
        Receiver::Gone(id) => delivery.endpoint_id = Some(id.clone()),
    }
    if event.is_disposable() {
        delivery.max_attempts = 1;
    }
    if let Receiver::Gone(_) = receiver {
        // This must not go unnoticed.
        let message = "the webhook endpoint was deleted before the batch ended".into();
        let error = AttemptError { kind: ErrorKind::EndpointDeleted, message };
        let change = Change::new(delivery, DeliveryTrigger::Unaddressed, at)?.after(Some(&error), Duration::ZERO, at);
        steps::bury(tx, &change, at).await?;
        delivery = change.row;
    }
    webhook_delivery::Entity::insert(delivery.into_active_model()).exec_without_returning(tx).await?;
    Ok(())
}

/// A delivery that is due at once; the caller sets its receiver.
fn new_delivery(event: WebhookEvent, body: Vec<u8>, at: Timestamp) -> webhook_delivery::Model {
    webhook_delivery::Model {
        id: DeliveryId::generate().into_string(),
        batch_id: None,
        endpoint_id: None,
        owner: String::new(),
        event: event.as_str().to_owned(),
        url: String::new(),
        target: String::new(),
        secret: None,
        body,
        max_attempts: 1,
        timeout: 0,
        state: DeliveryState::Pending.as_str().to_owned(),
        attempts: 0,
        next_attempt_at: at.0,
        scheduled_at: None,
        expires_at: (event == WebhookEvent::Progress).then(|| at.plus(PROGRESS_LIFETIME).0),
        lease_token: None,
        lease_expires_at: None,
        error_message: None,
        created_at: at.0,
        settled_at: None,
    }
}

/// Addresses a delivery to an endpoint.
fn address(delivery: &mut webhook_delivery::Model, endpoint: &webhook_endpoint::Model) {
    delivery.endpoint_id = Some(endpoint.id.clone());
    delivery.target = target_of(&endpoint.url);
    delivery.url.clone_from(&endpoint.url);
    delivery.max_attempts = endpoint.max_attempts;
    delivery.timeout = endpoint.timeout;
    if endpoint.disabled {
        delivery.next_attempt_at = NEVER;
    }
}

async fn supersede_progress(tx: &DatabaseTransaction, row: &batch::Model, at: Timestamp) -> Result<(), StoreError> {
    let waiting = webhook_delivery::Entity::find()
        .filter(webhook_delivery::Column::BatchId.eq(&row.id))
        .filter(webhook_delivery::Column::Event.eq(WebhookEvent::Progress.as_str()))
        .filter(webhook_delivery::Column::State.eq(DeliveryState::Pending.as_str()))
        .order_by_asc(webhook_delivery::Column::Id)
        .lock_exclusive()
        .all(tx)
        .await?;
    let changes = waiting.into_iter().map(|row| Change::new(row, DeliveryTrigger::Superseded, at));
    steps::write(tx, &changes.collect::<Result<Vec<_>, _>>()?, at).await
}
