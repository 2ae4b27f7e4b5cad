//! Registered webhook endpoints.

use std::time::Duration;

use sea_orm::{
    ActiveModelTrait, ColumnTrait, EntityTrait, IntoActiveModel, PaginatorTrait, QueryFilter, QueryOrder, QuerySelect,
    sea_query::Expr,
};

use super::{
    LEASE_MARGIN_MICROS, NEVER,
    claims::{ClaimedDelivery, take},
    new_delivery,
    steps::Change,
};
use crate::{
    domain::{
        BatchStatus, Owner, Scope, Timestamp, WebhookEndpointId,
        webhook::{DeliveryState, DeliveryTrigger, EventFilter, SealedSecret, WebhookEvent, target_of, test_payload},
    },
    store::{
        DatabaseTransaction, Store, StoreError,
        convert::{self, to_json},
        entity::{batch, webhook_delivery, webhook_endpoint},
        now,
        pages::readable_page,
        scoped::within,
        write::{commit, roll_back},
    },
};

/// An endpoint to register.
#[derive(Clone, Debug)]
pub struct NewEndpoint {
    /// The id, made by the caller, because the secret is encrypted for it.
    pub id: WebhookEndpointId,
    pub owner: Owner,
    pub url: String,
    /// The events that it receives.
    pub events: EventFilter,
    /// The secret. `None`: the server's own, if it has one.
    pub secret: Option<SealedSecret>,
    pub max_attempts: i32,
    /// The time limit of one attempt.
    pub timeout: Duration,
}

/// A registered endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointRecord {
    pub id: WebhookEndpointId,
    pub owner: Owner,
    pub url: String,
    /// The events that it receives.
    pub events: EventFilter,
    /// Whether it has a secret of its own.
    pub has_secret: bool,
    /// Until when the previous secret also signs.
    pub previous_secret_until: Option<Timestamp>,
    pub max_attempts: i32,
    /// The time limit of one attempt.
    pub timeout: Duration,
    /// Whether sending is suspended; then its deliveries wait.
    pub disabled: bool,
    pub disabled_reason: Option<String>,
    /// When it was registered.
    pub created_at: Timestamp,
    /// When it was last changed.
    pub updated_at: Timestamp,
}

/// Fields of an endpoint to update; `None` leaves a field unchanged.
#[derive(Clone, Debug, Default)]
pub struct EndpointChange {
    /// The new URL, also for deliveries that wait; a delivery being sent uses it from its next attempt.
    pub url: Option<String>,
    /// The events to send from now on.
    pub events: Option<EventFilter>,
    /// The attempts in all, for events from now on.
    pub max_attempts: Option<i32>,
    /// The time limit of one attempt, for events from now on.
    pub timeout: Option<Duration>,
    /// Whether it is disabled, and why.
    pub disabled: Option<(bool, Option<String>)>,
}

/// The outcome of a deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeletedEndpoint {
    /// It was deleted.
    Deleted,
    /// There is no such endpoint.
    NotFound,
    /// Unfinished batches name it, or deliveries wait for it.
    InUse {
        /// The number of unfinished batches that name it.
        batches: u64,
        /// The number of deliveries that are neither delivered nor ended.
        deliveries: u64,
    },
}

impl Store {
    /// Registers an endpoint.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn create_endpoint(&self, new: NewEndpoint) -> Result<EndpointRecord, StoreError> {
        let new = &new;
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let row = webhook_endpoint::Model {
                id: new.id.as_str().to_owned(),
                owner: new.owner.as_str().to_owned(),
                url: new.url.clone(),
                events: to_json(&new.events)?,
                secret: new.secret.as_ref().map(|secret| secret.as_bytes().to_vec()),
                previous_secret: None,
                previous_secret_until: None,
                max_attempts: new.max_attempts,
                timeout: convert::micros(new.timeout),
                disabled: false,
                disabled_reason: None,
                created_at: at.0,
                updated_at: at.0,
            };
            webhook_endpoint::Entity::insert(row.clone().into_active_model()).exec_without_returning(&tx).await?;
            commit(tx, row.try_into()?)
        })
        .await
    }

    /// Endpoints, newest first, those after `after` in that order, at most `limit`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn endpoints(
        &self,
        scope: &Scope,
        after: Option<&WebhookEndpointId>,
        limit: u64,
    ) -> Result<Vec<EndpointRecord>, StoreError> {
        let find = webhook_endpoint::Entity::find().order_by_desc(webhook_endpoint::Column::Id).limit(limit);
        let find = within(find, webhook_endpoint::Column::Owner, scope);
        let rows = |after: Option<String>| {
            let mut find = find.clone();
            if let Some(after) = after {
                find = find.filter(webhook_endpoint::Column::Id.lt(after));
            }
            async move { Ok(find.all(self.read()).await?) }
        };
        let after = after.map(|after| after.as_str().to_owned());
        readable_page("webhook endpoint", limit, after, rows, |row: &webhook_endpoint::Model| &row.id).await
    }

    /// One endpoint.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn endpoint(&self, id: &WebhookEndpointId, scope: &Scope) -> Result<Option<EndpointRecord>, StoreError> {
        let find = within(webhook_endpoint::Entity::find_by_id(id.as_str()), webhook_endpoint::Column::Owner, scope);
        find.one(self.read()).await?.map(EndpointRecord::try_from).transpose()
    }

    /// Changes an endpoint. `None` if there is no such endpoint.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn update_endpoint(
        &self,
        id: &WebhookEndpointId,
        scope: &Scope,
        change: EndpointChange,
    ) -> Result<Option<EndpointRecord>, StoreError> {
        let change = &change;
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let Some(mut row) = lock(&tx, id, scope).await? else { return roll_back(None) };
            if let Some(url) = &change.url {
                row.url.clone_from(url);
                // Also for deliveries being sent: their next attempts go to the new URL.
                unsettled_of(id)
                    .col_expr(webhook_delivery::Column::Url, Expr::val(row.url.as_str()))
                    .col_expr(webhook_delivery::Column::Target, Expr::val(target_of(&row.url)))
                    .exec(&tx)
                    .await?;
            }
            if let Some((disabled, reason)) = &change.disabled {
                let disabled = *disabled;
                if disabled != row.disabled {
                    let due = if disabled { NEVER } else { at.0 };
                    unsettled_of(id)
                        .col_expr(webhook_delivery::Column::NextAttemptAt, Expr::val(due))
                        .col_expr(webhook_delivery::Column::ScheduledAt, Expr::val(at.0))
                        .filter(webhook_delivery::Column::State.eq(DeliveryState::Pending.as_str()))
                        .exec(&tx)
                        .await?;
                }
                row.disabled = disabled;
                row.disabled_reason = reason.clone().filter(|_| disabled);
            }
            if let Some(events) = change.events {
                row.events = to_json(&events)?;
            }
            row.max_attempts = change.max_attempts.unwrap_or(row.max_attempts);
            if let Some(timeout) = change.timeout {
                row.timeout = convert::micros(timeout);
            }
            row.updated_at = at.0;
            let row = row.into_active_model().reset_all().update(&tx).await?;
            commit(tx, Some(row.try_into()?))
        })
        .await
    }

    /// Gives an endpoint a new secret; the previous one also signs for `overlap`. `None` if there is no such endpoint.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn rotate_secret(
        &self,
        id: &WebhookEndpointId,
        scope: &Scope,
        secret: &SealedSecret,
        overlap: Duration,
    ) -> Result<Option<EndpointRecord>, StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let Some(mut row) = lock(&tx, id, scope).await? else { return roll_back(None) };
            let previous = row.secret.replace(secret.as_bytes().to_vec()).filter(|_| !overlap.is_zero());
            row.previous_secret_until = previous.is_some().then(|| at.plus(overlap).0);
            row.previous_secret = previous;
            row.updated_at = at.0;
            let row = row.into_active_model().reset_all().update(&tx).await?;
            commit(tx, Some(row.try_into()?))
        })
        .await
    }

    /// Deletes an endpoint that nothing waits for.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn delete_endpoint(&self, id: &WebhookEndpointId, scope: &Scope) -> Result<DeletedEndpoint, StoreError> {
        self.write(|tx| async move {
            if lock(&tx, id, scope).await?.is_none() {
                return roll_back(DeletedEndpoint::NotFound);
            }
            let unfinished =
                BatchStatus::ALL.into_iter().filter(|status| !status.is_terminal()).map(BatchStatus::as_str);
            let batches = batch::Entity::find()
                .filter(batch::Column::Status.is_in(unfinished))
                .filter(batch::Column::WebhookEndpointId.eq(id.as_str()))
                .count(&tx)
                .await?;
            let deliveries = webhook_delivery::Entity::find()
                .filter(webhook_delivery::Column::EndpointId.eq(id.as_str()))
                .filter(webhook_delivery::Column::State.is_in(super::unsettled()))
                .count(&tx)
                .await?;
            if batches > 0 || deliveries > 0 {
                return roll_back(DeletedEndpoint::InUse { batches, deliveries });
            }
            webhook_endpoint::Entity::delete_by_id(id.as_str()).exec(&tx).await?;
            commit(tx, DeletedEndpoint::Deleted)
        })
        .await
    }

    /// Creates a test event for an endpoint and claims it for the caller, who sends and settles it like any other.
    /// `None` if there is no such endpoint. A disabled endpoint can be tested too, to find out whether to enable it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn begin_test(
        &self,
        id: &WebhookEndpointId,
        scope: &Scope,
    ) -> Result<Option<ClaimedDelivery>, StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let Some(endpoint) = lock(&tx, id, scope).await? else { return roll_back(None) };
            let mut row = new_delivery(WebhookEvent::Test, test_payload(at), at);
            super::address(&mut row, &endpoint);
            row.owner.clone_from(&endpoint.owner);
            row.max_attempts = 1;
            row.next_attempt_at = at.0.saturating_add(LEASE_MARGIN_MICROS);
            webhook_delivery::Entity::insert(row.clone().into_active_model()).exec_without_returning(&tx).await?;
            let endpoints = [(endpoint.id.clone(), endpoint)].into();
            let claimed = take(&tx, vec![Change::new(row, DeliveryTrigger::Claimed, at)?], &endpoints, at).await?.pop();
            commit(tx, claimed)
        })
        .await
    }
}

/// An update of the deliveries to an endpoint that wait or are being sent.
fn unsettled_of(id: &WebhookEndpointId) -> sea_orm::UpdateMany<webhook_delivery::Entity> {
    webhook_delivery::Entity::update_many()
        .filter(webhook_delivery::Column::EndpointId.eq(id.as_str()))
        .filter(webhook_delivery::Column::State.is_in(super::unsettled()))
}

pub(super) async fn lock(
    tx: &DatabaseTransaction,
    id: &WebhookEndpointId,
    scope: &Scope,
) -> Result<Option<webhook_endpoint::Model>, StoreError> {
    let find = webhook_endpoint::Entity::find_by_id(id.as_str()).lock_exclusive();
    Ok(within(find, webhook_endpoint::Column::Owner, scope).one(tx).await?)
}

impl TryFrom<webhook_endpoint::Model> for EndpointRecord {
    type Error = StoreError;

    fn try_from(row: webhook_endpoint::Model) -> Result<Self, StoreError> {
        Ok(Self {
            id: WebhookEndpointId::from_text(row.id),
            owner: row.owner.into(),
            url: row.url,
            events: convert::json("event list", &row.events)?,
            has_secret: row.secret.is_some(),
            previous_secret_until: row.previous_secret_until.map(Timestamp),
            max_attempts: row.max_attempts,
            timeout: convert::duration(row.timeout),
            disabled: row.disabled,
            disabled_reason: row.disabled_reason,
            created_at: Timestamp(row.created_at),
            updated_at: Timestamp(row.updated_at),
        })
    }
}
