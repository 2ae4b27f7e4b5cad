//! Which targets have something due, and taking it.

use std::collections::HashMap;

use bytes::Bytes;
use sea_orm::{
    ColumnTrait, Condition, EntityTrait, FromQueryResult, IntoActiveModel, QueryFilter, QueryOrder, QuerySelect,
    Statement,
    sea_query::{Expr, ExprTrait, LockBehavior, LockType},
};
use uuid::Uuid;

use super::{LEASE_MARGIN_MICROS, NEVER, event_of, outcome, state_of};
use crate::store::again::again;
use crate::{
    domain::{
        BatchId, DeliveryId, Timestamp, WebhookEndpointId,
        webhook::{Delivery, DeliveryState, Input, SealedSecret, WebhookEvent, apply},
    },
    fault::{self, Fault},
    store::{
        DatabaseTransaction, Store, StoreError,
        entity::{webhook_attempt, webhook_delivery, webhook_endpoint},
        now,
    },
};

/// A target with deliveries that wait.
#[derive(Clone, Debug, PartialEq, Eq, FromQueryResult)]
pub struct Due {
    /// Its key ([`crate::domain::webhook::target_of`]).
    pub target: String,
    /// When the first of them is due, in microseconds since the Unix epoch.
    pub due: i64,
}

/// Which secrets sign a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signing {
    /// The server's own, if it has one.
    Global,
    /// The batch's.
    Batch(SealedSecret),
    /// The endpoint's: what it has now, newest first, so that a rotation reaches deliveries that wait.
    Endpoint(WebhookEndpointId, Vec<SealedSecret>),
    /// The endpoint was deleted.
    EndpointDeleted,
}

/// A delivery that this node has the lease of. Its attempt is written already.
#[derive(Clone, Debug)]
pub struct ClaimedDelivery {
    /// The `webhook-id`.
    pub id: DeliveryId,
    /// The batch it tells of.
    pub batch_id: Option<BatchId>,
    /// What it tells.
    pub event: WebhookEvent,
    /// Where it goes.
    pub url: String,
    /// The key of fairness.
    pub target: String,
    /// What signs it.
    pub signing: Signing,
    /// The bytes, sent as they are.
    pub body: Bytes,
    /// 0 for the automatic chain, then one for each retry by hand.
    pub generation: i32,
    /// Which attempt of its generation, from 1.
    pub attempt: i32,
    /// What `X-Webhook-Attempt` says: all attempts of all generations, from 1.
    pub number: i64,
    /// For the whole attempt.
    pub timeout: std::time::Duration,
    /// The fencing token of what is written of it.
    pub lease: String,
    /// When it was written.
    pub created_at: Timestamp,
}

impl Store {
    /// Every target with deliveries that wait, and when the first of each is due, by the database's clock, which is
    /// returned too.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn due_targets(&self) -> Result<(Vec<Due>, Timestamp), StoreError> {
        let at = now(self.read()).await?;
        // One index probe a target, however many rows each has (neither database skips through an index by itself).
        let sql = "WITH RECURSIVE scan(target) AS ( \
             SELECT MIN(target) FROM webhook_deliveries WHERE state = 'pending' \
             UNION ALL \
             SELECT (SELECT MIN(d.target) FROM webhook_deliveries d WHERE d.state = 'pending' AND d.target > scan.target) \
             FROM scan WHERE scan.target IS NOT NULL) \
             SELECT target, (SELECT MIN(d.next_attempt_at) FROM webhook_deliveries d \
             WHERE d.state = 'pending' AND d.target = scan.target) AS due FROM scan WHERE target IS NOT NULL";
        let backend = sea_orm::ConnectionTrait::get_database_backend(self.read());
        let due = Due::find_by_statement(Statement::from_string(backend, sql)).all(self.read()).await?;
        Ok((due, at))
    }

    /// Takes due deliveries, of each target at most as many as given, the longest due first. An attempt of each is written
    /// before this returns: a crash leaves a trace.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn claim_deliveries(&self, shares: &[(String, usize)]) -> Result<Vec<ClaimedDelivery>, StoreError> {
        again(|| self.claim_deliveries_once(shares)).await
    }

    async fn claim_deliveries_once(&self, shares: &[(String, usize)]) -> Result<Vec<ClaimedDelivery>, StoreError> {
        let tx = self.begin().await?;
        let at = now(&tx).await?;
        let mut rows = Vec::new();
        for (target, count) in shares {
            let found = webhook_delivery::Entity::find()
                .filter(webhook_delivery::Column::State.eq(DeliveryState::Pending.as_str()))
                .filter(webhook_delivery::Column::Target.eq(target))
                .filter(webhook_delivery::Column::NextAttemptAt.lte(at.0))
                .filter(
                    Condition::any()
                        .add(webhook_delivery::Column::ExpiresAt.is_null())
                        .add(webhook_delivery::Column::ExpiresAt.gt(at.0)),
                )
                .order_by_asc(webhook_delivery::Column::NextAttemptAt)
                .order_by_asc(webhook_delivery::Column::Id)
                .limit(u64::try_from(*count).unwrap_or(u64::MAX))
                .lock_with_behavior(LockType::Update, LockBehavior::SkipLocked)
                .all(&tx)
                .await?;
            rows.extend(found);
        }
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let endpoints = endpoints_of(&tx, &rows).await?;
        let (held, rows): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| {
            row.endpoint_id.as_ref().and_then(|id| endpoints.get(id)).is_some_and(|endpoint| endpoint.disabled)
        });
        if !held.is_empty() {
            // An attempt that began before its endpoint was disabled has put them back.
            webhook_delivery::Entity::update_many()
                .col_expr(webhook_delivery::Column::NextAttemptAt, Expr::val(NEVER))
                .filter(webhook_delivery::Column::Id.is_in(held.into_iter().map(|row| row.id)))
                .exec(&tx)
                .await?;
        }
        let lease = Uuid::new_v4().simple().to_string();
        let claimed = take(&tx, rows, &endpoints, &lease, at).await?;
        tx.commit().await?;
        Ok(claimed)
    }
}

/// Leases locked rows and writes their attempts.
pub(super) async fn take(
    tx: &DatabaseTransaction,
    rows: Vec<webhook_delivery::Model>,
    endpoints: &HashMap<String, webhook_endpoint::Model>,
    lease: &str,
    at: Timestamp,
) -> Result<Vec<ClaimedDelivery>, StoreError> {
    let mut claimed = Vec::with_capacity(rows.len());
    for row in rows {
        let step = apply(delivery_of(&row)?, Input::Claimed)
            .map_err(|refused| StoreError::Corrupt(format!("a delivery without an attempt left: {refused}")))?;
        let endpoint = row.endpoint_id.as_ref().and_then(|id| endpoints.get(id));
        let signing = signing(row.endpoint_id.as_deref(), endpoint, row.secret, at);
        claimed.push(ClaimedDelivery {
            id: DeliveryId::from_text(row.id),
            batch_id: row.batch_id.map(BatchId::from_text),
            event: event_of(&row.event)?,
            url: row.url,
            target: row.target,
            signing,
            body: row.body.into(),
            generation: 0,
            attempt: step.attempts,
            number: step.attempts.into(),
            timeout: std::time::Duration::from_micros(u64::try_from(row.timeout).unwrap_or(0)),
            lease: lease.to_owned(),
            created_at: Timestamp(row.created_at),
        });
    }
    if claimed.is_empty() {
        return Ok(claimed);
    }
    webhook_delivery::Entity::update_many()
        .col_expr(webhook_delivery::Column::State, Expr::val(DeliveryState::Leased.as_str()))
        .col_expr(webhook_delivery::Column::Attempts, Expr::col(webhook_delivery::Column::Attempts).add(1))
        .col_expr(webhook_delivery::Column::LeaseToken, Expr::val(lease))
        .col_expr(
            webhook_delivery::Column::LeaseExpiresAt,
            Expr::col(webhook_delivery::Column::Timeout).add(at.0 + LEASE_MARGIN_MICROS),
        )
        .filter(webhook_delivery::Column::Id.is_in(claimed.iter().map(|one| one.id.as_str())))
        .exec(tx)
        .await?;
    fault::point(Fault::DeliveryClaimed);
    let attempts = claimed.iter().map(|one| started(&one.id, one.generation, one.attempt, at).into_active_model());
    webhook_attempt::Entity::insert_many(attempts).exec_without_returning(tx).await?;
    Ok(claimed)
}

/// An attempt that is about to begin.
pub(super) fn started(id: &DeliveryId, generation: i32, attempt: i32, at: Timestamp) -> webhook_attempt::Model {
    webhook_attempt::Model {
        delivery_id: id.as_str().to_owned(),
        generation,
        attempt,
        started_at: at.0,
        finished_at: None,
        outcome: outcome::STARTED.to_owned(),
        error_kind: None,
        http_status: None,
        error_message: None,
        response_excerpt: None,
        request_id: None,
        forced: false,
    }
}

/// What the state machine knows of a row.
pub(super) fn delivery_of(row: &webhook_delivery::Model) -> Result<Delivery, StoreError> {
    Ok(Delivery {
        state: state_of(&row.state)?,
        attempts: row.attempts,
        max_attempts: row.max_attempts,
        disposable: event_of(&row.event)?.is_disposable(),
    })
}

/// What signs a delivery at this moment.
pub(super) fn signing(
    endpoint_id: Option<&str>,
    endpoint: Option<&webhook_endpoint::Model>,
    secret: Option<Vec<u8>>,
    at: Timestamp,
) -> Signing {
    match (endpoint_id, endpoint, secret) {
        (None, _, None) => Signing::Global,
        (None, _, Some(secret)) => Signing::Batch(SealedSecret::from_bytes(secret)),
        (Some(_), None, _) => Signing::EndpointDeleted,
        (Some(_), Some(endpoint), _) => {
            let previous = endpoint.previous_secret.as_ref().filter(|_| endpoint.previous_secret_until > Some(at.0));
            let secrets: Vec<_> =
                endpoint.secret.iter().chain(previous).cloned().map(SealedSecret::from_bytes).collect();
            if secrets.is_empty() {
                return Signing::Global;
            }
            Signing::Endpoint(WebhookEndpointId::from_text(&endpoint.id), secrets)
        }
    }
}

/// The endpoints that rows name, by id.
async fn endpoints_of(
    tx: &DatabaseTransaction,
    rows: &[webhook_delivery::Model],
) -> Result<HashMap<String, webhook_endpoint::Model>, StoreError> {
    let ids: Vec<_> = rows.iter().filter_map(|row| row.endpoint_id.clone()).collect();
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    let found = webhook_endpoint::Entity::find().filter(webhook_endpoint::Column::Id.is_in(ids)).all(tx).await?;
    Ok(found.into_iter().map(|endpoint| (endpoint.id.clone(), endpoint)).collect())
}
