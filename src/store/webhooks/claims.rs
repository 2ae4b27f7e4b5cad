//! Finds targets with due deliveries, and claims those.

use std::collections::HashMap;

use bytes::Bytes;
use sea_orm::{
    ColumnTrait, Condition, ConnectionTrait, EntityTrait, IntoActiveModel, QueryFilter, QueryOrder, QueryResult,
    QuerySelect, Statement,
    sea_query::{Expr, LockBehavior, LockType},
};
use uuid::Uuid;

use super::{
    LEASE_MARGIN_MICROS, NEVER, UNREADABLE_MICROS, in_state, is,
    steps::{self, Change},
};
use crate::{
    domain::{
        BatchId, DeliveryId, Owner, Timestamp, WebhookEndpointId,
        webhook::{AttemptOutcome, DeliveryState, DeliveryTrigger, SealedSecret, WebhookEvent},
    },
    fault::{self, Fault},
    store::{
        DatabaseTransaction, Store, StoreError, convert,
        entity::{webhook_attempt, webhook_delivery, webhook_endpoint},
        now,
        write::commit,
    },
};

/// Targets of one owner per query: an owner with more of them waits for its own next page, and no other owner does.
const TARGETS_AT_A_LOOK: usize = 1_000;

/// A target with waiting deliveries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    pub owner: Owner,
    /// The target's key ([`crate::domain::webhook::target_of`]).
    pub target: String,
    /// When the first of them is due, in microseconds since the Unix epoch.
    pub due: i64,
}

/// The result of one query for waiting deliveries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DueTargets {
    /// The targets, by owner, then by target.
    pub targets: Vec<Due>,
    /// The database's time.
    pub at: Timestamp,
    /// Owners that may have more targets, each with the last target returned: the next query begins after it.
    pub more: Vec<(Owner, String)>,
}

/// How many of a target's deliveries to claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimShare {
    pub owner: Owner,
    /// The target's key ([`crate::domain::webhook::target_of`]).
    pub target: String,
    /// The most deliveries to claim.
    pub count: usize,
}

impl ClaimShare {
    /// Claims at most `count` deliveries.
    #[must_use]
    pub fn new(owner: impl Into<Owner>, target: impl Into<String>, count: usize) -> Self {
        Self { owner: owner.into(), target: target.into(), count }
    }
}

/// The secrets that sign a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signing {
    /// The server's own secret, if it has one.
    Global,
    Batch(SealedSecret),
    /// The endpoint's current secrets, newest first, so that a rotation also applies to deliveries that wait.
    Endpoint(WebhookEndpointId, Vec<SealedSecret>),
    /// The endpoint was deleted.
    EndpointDeleted,
}

/// A delivery that this node has leased. Its attempt is already recorded.
#[derive(Clone, Debug)]
pub struct ClaimedDelivery {
    /// The `webhook-id`.
    pub id: DeliveryId,
    /// The batch that the event is about. `None` for a test event.
    pub batch_id: Option<BatchId>,
    pub owner: Owner,
    pub event: WebhookEvent,
    pub url: String,
    /// The target's key.
    pub target: String,
    /// The secrets that sign it.
    pub signing: Signing,
    /// The body, sent unchanged.
    pub body: Bytes,
    /// 0 for the automatic attempts; each retry by hand has the next number.
    pub generation: i32,
    /// The number of the attempt within its generation, from 1.
    pub attempt: i32,
    /// The value of `X-Webhook-Attempt`: counts the attempts of all generations, from 1.
    pub number: i64,
    /// The time limit of the attempt.
    pub timeout: std::time::Duration,
    /// The fencing token of its writes.
    pub lease: String,
    /// When it was created.
    pub created_at: Timestamp,
}

impl Store {
    /// Targets with waiting deliveries, and when the first of each is due: at most a thousand per owner, after the one
    /// that `after` names for it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn due_targets(&self, after: &[(Owner, String)]) -> Result<DueTargets, StoreError> {
        let at = now(self.read()).await?;
        let (backend, rows) = (self.read().get_database_backend(), steps::rows(self.read()));
        let waits = format!("webhook_deliveries d WHERE d.{}", in_state(DeliveryState::Pending));
        // One index probe an owner and a target, however many rows each has (neither database skips through an index by
        // itself). A step without a target stands between two owners.
        let sql = format!(
            "WITH RECURSIVE page(owner, target) AS (SELECT v.value ->> 0, v.value ->> 1 FROM {rows}), \
             scan(owner, target, n) AS ( \
             SELECT MIN(d.owner), CAST(NULL AS TEXT), 0 FROM {waits} \
             UNION ALL \
             SELECT CASE WHEN scan.n >= $2 OR (scan.target IS NULL AND scan.n > 0) THEN \
             (SELECT MIN(d.owner) FROM {waits} AND d.owner > scan.owner) \
             ELSE scan.owner END, \
             CASE WHEN scan.n >= $2 OR (scan.target IS NULL AND scan.n > 0) THEN NULL ELSE \
             (SELECT MIN(d.target) FROM {waits} AND d.owner = scan.owner AND \
             d.target > COALESCE(scan.target, (SELECT page.target FROM page WHERE page.owner = scan.owner), '')) END, \
             CASE WHEN scan.n >= $2 OR (scan.target IS NULL AND scan.n > 0) THEN 0 ELSE scan.n + 1 END \
             FROM scan WHERE scan.owner IS NOT NULL) \
             SELECT owner, target, (SELECT MIN(d.next_attempt_at) FROM {waits} \
             AND d.owner = scan.owner AND d.target = scan.target) AS due FROM scan \
             WHERE owner IS NOT NULL AND target IS NOT NULL"
        );
        let most = i32::try_from(TARGETS_AT_A_LOOK).unwrap_or(i32::MAX);
        let after = steps::json(after.iter().map(|(owner, target)| (owner.as_str(), target)))?;
        let statement = Statement::from_sql_and_values(backend, sql, [after.into(), most.into()]);
        let rows = self.read().query_all_raw(statement).await?;
        let targets = rows.iter().map(Due::from_row).collect::<Result<Vec<_>, _>>()?;
        let more = targets
            .chunk_by(|a, b| a.owner == b.owner)
            .filter(|of_owner| of_owner.len() >= TARGETS_AT_A_LOOK)
            .filter_map(|of_owner| of_owner.last())
            .map(|last| (last.owner.clone(), last.target.clone()))
            .collect();
        Ok(DueTargets { targets, at, more })
    }

    /// Claims due deliveries, of each target at most as many as given, the longest due first. Their attempts are
    /// recorded before this returns, so that a crash leaves a trace.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn claim_deliveries(&self, shares: &[ClaimShare]) -> Result<Vec<ClaimedDelivery>, StoreError> {
        if shares.is_empty() {
            return Ok(Vec::new());
        }
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let mut due = Vec::new();
            for share in shares {
                due.extend(due_of(&tx, share, at).await?);
            }
            let claimed = claim(&tx, due, at).await?;
            commit(tx, claimed)
        })
        .await
    }
}

impl Due {
    fn from_row(row: &QueryResult) -> Result<Self, StoreError> {
        let (owner, target, due): (String, String, i64) = row.try_get_many_by_index()?;
        Ok(Self { owner: owner.into(), target, due })
    }
}

/// Finds and locks the due deliveries of a target, the longest due first. Rows that others have locked are skipped.
async fn due_of(
    tx: &DatabaseTransaction,
    share: &ClaimShare,
    at: Timestamp,
) -> Result<Vec<webhook_delivery::Model>, StoreError> {
    use webhook_delivery::Column;
    let is_wanted = Condition::any().add(Column::ExpiresAt.is_null()).add(Column::ExpiresAt.gt(at.0));
    Ok(webhook_delivery::Entity::find()
        .filter(is(DeliveryState::Pending))
        .filter(Column::Owner.eq(share.owner.as_str()))
        .filter(Column::Target.eq(&share.target))
        .filter(Column::NextAttemptAt.lte(at.0))
        .filter(is_wanted)
        .order_by_asc(Column::NextAttemptAt)
        .order_by_asc(Column::Id)
        .limit(u64::try_from(share.count).unwrap_or(u64::MAX))
        .lock_with_behavior(LockType::Update, LockBehavior::SkipLocked)
        .all(tx)
        .await?)
}

/// Claims locked deliveries, except those that this version can't read and those of disabled endpoints.
async fn claim(
    tx: &DatabaseTransaction,
    due: Vec<webhook_delivery::Model>,
    at: Timestamp,
) -> Result<Vec<ClaimedDelivery>, StoreError> {
    let endpoints = endpoints_of(tx, &due).await?;
    let (mut held, mut unreadable, mut changes) = (Vec::new(), Vec::new(), Vec::with_capacity(due.len()));
    for row in due {
        let id = row.id.clone();
        let endpoint = row.endpoint_id.as_ref().and_then(|id| endpoints.get(id));
        if endpoint.is_some_and(|endpoint| endpoint.disabled) {
            // An attempt that began before its endpoint was disabled has returned it.
            held.push(id);
            continue;
        }
        match convert::readable("webhook delivery", &id, Change::new(row, DeliveryTrigger::Claimed, at)) {
            Some(change) => changes.push(change),
            None => unreadable.push(id),
        }
    }
    put_off(tx, held, NEVER).await?;
    // Otherwise they would be the first due ones at every claim, and leave no room for others.
    put_off(tx, unreadable, at.0.saturating_add(UNREADABLE_MICROS)).await?;
    take(tx, changes, &endpoints, at).await
}

async fn put_off(tx: &DatabaseTransaction, ids: Vec<String>, until: i64) -> Result<(), StoreError> {
    if !ids.is_empty() {
        webhook_delivery::Entity::update_many()
            .col_expr(webhook_delivery::Column::NextAttemptAt, Expr::val(until))
            .filter(webhook_delivery::Column::Id.is_in(ids))
            .exec(tx)
            .await?;
    }
    Ok(())
}

/// Leases deliveries and records their attempts.
pub(super) async fn take(
    tx: &DatabaseTransaction,
    changes: Vec<Change>,
    endpoints: &HashMap<String, webhook_endpoint::Model>,
    at: Timestamp,
) -> Result<Vec<ClaimedDelivery>, StoreError> {
    let lease = Uuid::new_v4().simple().to_string();
    let changes: Vec<_> = changes
        .into_iter()
        .map(|change| {
            let until = at.0 + change.row.timeout + LEASE_MARGIN_MICROS;
            change.leased(&lease, until)
        })
        .collect();
    steps::write(tx, &changes, at).await?;
    fault::point(Fault::DeliveryClaimed);
    let mut claimed = Vec::with_capacity(changes.len());
    for Change { row, .. } in changes {
        let endpoint = row.endpoint_id.as_ref().and_then(|id| endpoints.get(id));
        claimed.push(ClaimedDelivery {
            signing: signing(row.endpoint_id.as_deref(), endpoint, row.secret, at),
            id: DeliveryId::from_text(row.id),
            batch_id: row.batch_id.map(BatchId::from_text),
            owner: row.owner.into(),
            event: convert::name("webhook event", &row.event)?,
            url: row.url,
            target: row.target,
            body: row.body.into(),
            generation: 0,
            attempt: row.attempts,
            number: row.attempts.into(),
            timeout: convert::duration(row.timeout),
            lease: lease.clone(),
            created_at: Timestamp(row.created_at),
        });
    }
    // Each row has twelve values, and a statement at most 32,766 of them.
    for some in claimed.chunks(1_000) {
        let attempts = some.iter().map(|one| started(&one.id, 0, one.attempt, at).into_active_model());
        webhook_attempt::Entity::insert_many(attempts).exec_without_returning(tx).await?;
    }
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
        outcome: AttemptOutcome::Started.as_str().to_owned(),
        error_kind: None,
        http_status: None,
        error_message: None,
        response_excerpt: None,
        request_id: None,
        forced: false,
    }
}

/// The secrets that sign a delivery now.
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
