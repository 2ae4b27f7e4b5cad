//! Queries about deliveries and their attempts.

use sea_orm::{ColumnTrait, Condition, EntityTrait, QueryFilter, QueryOrder, QuerySelect, QueryTrait};

use super::{DueTargets, NEVER};
use crate::{
    domain::{
        BatchId, DeliveryId, Owner, Scope, Timestamp, WebhookEndpointId,
        webhook::{AttemptOutcome, DeliveryState, ErrorKind, WebhookEvent},
    },
    store::{
        Store, StoreError, convert,
        entity::{webhook_attempt, webhook_delivery},
        pages::readable_page,
        scoped::within,
    },
};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeliveryRecord {
    /// Its id, the `webhook-id`.
    pub id: DeliveryId,
    pub owner: Owner,
    /// The batch that the event is about.
    pub batch_id: Option<BatchId>,
    /// The registered endpoint that it goes to.
    pub endpoint_id: Option<WebhookEndpointId>,
    pub event: WebhookEvent,
    pub url: String,
    /// The body, byte for byte.
    pub body: Vec<u8>,
    pub state: DeliveryState,
    /// The number of attempts begun.
    pub attempts: i32,
    /// The most attempts that may be made.
    pub max_attempts: i32,
    /// When the next attempt is due, while there is one to come and its endpoint is not disabled.
    pub next_attempt_at: Option<Timestamp>,
    /// Why the last attempt failed.
    pub error_message: Option<String>,
    /// When the event happened.
    pub created_at: Timestamp,
    /// When it was delivered or ended.
    pub settled_at: Option<Timestamp>,
}

/// A filter for deliveries.
#[derive(Clone, Debug)]
pub struct DeliveryFilter {
    /// Only those within this scope.
    pub scope: Scope,
    /// Only those of this batch.
    pub batch_id: Option<BatchId>,
    /// Only those to this endpoint.
    pub endpoint_id: Option<WebhookEndpointId>,
    /// Only those of this event.
    pub event: Option<WebhookEvent>,
    /// Only those in this state.
    pub state: Option<DeliveryState>,
}

impl DeliveryFilter {
    /// All deliveries within a scope.
    #[must_use]
    pub fn within(scope: Scope) -> Self {
        Self { scope, batch_id: None, endpoint_id: None, event: None, state: None }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptRecord {
    /// 0 for the automatic attempts; each retry by hand has the next number.
    pub generation: i32,
    /// The number of the attempt within its generation, from 1.
    pub attempt: i32,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended, if that is known.
    pub finished_at: Option<Timestamp>,
    pub outcome: AttemptOutcome,
    /// Why it failed.
    pub error_kind: Option<ErrorKind>,
    /// Why it failed, for people.
    pub error_message: Option<String>,
    /// What the receiver answered, if it did.
    pub http_status: Option<u16>,
    /// The first characters of its answer.
    pub response_excerpt: Option<String>,
    /// A retry of what had been delivered.
    pub forced: bool,
}

impl Store {
    /// Deliveries, newest first, those after `after` in that order, at most `limit`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn deliveries(
        &self,
        filter: &DeliveryFilter,
        after: Option<&DeliveryId>,
        limit: u64,
    ) -> Result<Vec<DeliveryRecord>, StoreError> {
        use webhook_delivery::Column;
        let condition = Condition::all()
            .add_option(filter.scope.owner().map(|owner| Column::Owner.eq(owner.as_str())))
            .add_option(filter.batch_id.as_ref().map(|id| Column::BatchId.eq(id.as_str())))
            .add_option(filter.endpoint_id.as_ref().map(|id| Column::EndpointId.eq(id.as_str())))
            .add_option(filter.event.map(|event| Column::Event.eq(event.as_str())))
            .add_option(filter.state.map(|state| Column::State.eq(state.as_str())));
        let rows = |after: Option<String>| {
            let condition = condition.clone().add_option(after.map(|after| Column::Id.lt(after)));
            let find = webhook_delivery::Entity::find().filter(condition).order_by_desc(Column::Id).limit(limit);
            async move { Ok(find.all(self.read()).await?) }
        };
        let after = after.map(|after| after.as_str().to_owned());
        readable_page("webhook delivery", limit, after, rows, |row: &webhook_delivery::Model| &row.id).await
    }

    /// One delivery.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn delivery(&self, id: &DeliveryId, scope: &Scope) -> Result<Option<DeliveryRecord>, StoreError> {
        let find = within(webhook_delivery::Entity::find_by_id(id.as_str()), webhook_delivery::Column::Owner, scope);
        find.one(self.read()).await?.map(DeliveryRecord::try_from).transpose()
    }

    /// The attempts of a delivery within the scope, in order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn attempts(&self, of: &DeliveryId, scope: &Scope) -> Result<Vec<AttemptRecord>, StoreError> {
        let deliveries =
            webhook_delivery::Entity::find_by_id(of.as_str()).select_only().column(webhook_delivery::Column::Id);
        let deliveries = within(deliveries, webhook_delivery::Column::Owner, scope).into_query();
        let rows = webhook_attempt::Entity::find()
            .filter(webhook_attempt::Column::DeliveryId.in_subquery(deliveries))
            .order_by_asc(webhook_attempt::Column::Generation)
            .order_by_asc(webhook_attempt::Column::Attempt)
            .all(self.read())
            .await?;
        rows.into_iter().map(AttemptRecord::try_from).collect()
    }

    /// How long the longest waiting delivery has been due; `None` if none is due. If an owner has very many targets, only
    /// the first of them are considered ([`Store::due_targets`]).
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn oldest_due(&self) -> Result<Option<std::time::Duration>, StoreError> {
        let DueTargets { targets, at, .. } = self.due_targets(&[]).await?;
        let oldest = targets.into_iter().map(|target| target.due).min();
        Ok(oldest.filter(|due| *due <= at.0).map(|due| at.since(Timestamp(due))))
    }
}

impl TryFrom<webhook_delivery::Model> for DeliveryRecord {
    type Error = StoreError;

    fn try_from(row: webhook_delivery::Model) -> Result<Self, StoreError> {
        let state: DeliveryState = convert::name("delivery state", &row.state)?;
        let waits = state == DeliveryState::Pending && row.next_attempt_at != NEVER;
        Ok(Self {
            id: DeliveryId::from_text(row.id),
            owner: row.owner.into(),
            batch_id: row.batch_id.map(BatchId::from_text),
            endpoint_id: row.endpoint_id.map(WebhookEndpointId::from_text),
            event: convert::name("webhook event", &row.event)?,
            url: row.url,
            body: row.body,
            state,
            attempts: row.attempts,
            max_attempts: row.max_attempts,
            next_attempt_at: waits.then_some(Timestamp(row.next_attempt_at)),
            error_message: row.error_message,
            created_at: Timestamp(row.created_at),
            settled_at: row.settled_at.map(Timestamp),
        })
    }
}

impl TryFrom<webhook_attempt::Model> for AttemptRecord {
    type Error = StoreError;

    fn try_from(row: webhook_attempt::Model) -> Result<Self, StoreError> {
        Ok(Self {
            generation: row.generation,
            attempt: row.attempt,
            started_at: Timestamp(row.started_at),
            finished_at: row.finished_at.map(Timestamp),
            outcome: convert::name("outcome", &row.outcome)?,
            error_kind: row.error_kind.map(|kind| convert::name("error kind", &kind)).transpose()?,
            error_message: row.error_message,
            http_status: row.http_status.and_then(|status| u16::try_from(status).ok()),
            response_excerpt: row.response_excerpt,
            forced: row.forced,
        })
    }
}
