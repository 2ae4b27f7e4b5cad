//! Finds targets with due deliveries, and claims those.

use std::collections::HashMap;

use bytes::Bytes;
use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseBackend, EntityTrait, FromQueryResult, QueryFilter, QueryResult, Statement,
    sea_query::Expr,
};
use uuid::Uuid;

use super::{LEASE_MARGIN_MICROS, NEVER, UNREADABLE_MICROS, event_of, groups, outcome, state_of};
use crate::{
    domain::{
        BatchId, DeliveryId, Timestamp, WebhookEndpointId,
        webhook::{Delivery, DeliveryState, Input, SealedSecret, Step, WebhookEvent, apply},
    },
    fault::{self, Fault},
    store::{
        DatabaseTransaction, Store, StoreError, convert,
        entity::{webhook_attempt, webhook_delivery, webhook_endpoint},
        now,
    },
};

/// Targets of one owner per query: an owner with more of them waits for its own next page, and no other owner does.
const TARGETS_AT_A_LOOK: usize = 1_000;

/// A target with waiting deliveries.
#[derive(Clone, Debug, PartialEq, Eq, FromQueryResult)]
pub struct Due {
    /// The owner.
    pub owner: String,
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
    pub more: Vec<(String, String)>,
}

/// How many of a target's deliveries to claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClaimShare {
    /// The owner.
    pub owner: String,
    /// The target's key ([`crate::domain::webhook::target_of`]).
    pub target: String,
    /// The most deliveries to claim.
    pub count: usize,
    /// The most of those for which this is the last attempt. Others of them are not claimed before they can be sent at
    /// once, so that a crash can't make a dead letter of a delivery that was never sent.
    pub at_once: usize,
}

impl ClaimShare {
    /// Claims `count` deliveries to send at once.
    #[must_use]
    pub fn at_once(owner: impl Into<String>, target: impl Into<String>, count: usize) -> Self {
        Self { owner: owner.into(), target: target.into(), count, at_once: count }
    }
}

/// The secrets that sign a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Signing {
    /// The server's own secret, if it has one.
    Global,
    /// The batch's secret.
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
    /// The owner.
    pub owner: String,
    /// The event.
    pub event: WebhookEvent,
    /// The URL.
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
    pub async fn due_targets(&self, after: &[(String, String)]) -> Result<DueTargets, StoreError> {
        let at = now(self.read()).await?;
        let (backend, rows) = (self.read().get_database_backend(), groups::rows(self.read()));
        // One index probe an owner and a target, however many rows each has (neither database skips through an index by
        // itself). A step without a target stands between two owners.
        let sql = format!(
            "WITH RECURSIVE page(owner, target) AS (SELECT v.value ->> 0, v.value ->> 1 FROM {rows}), \
             scan(owner, target, n) AS ( \
             SELECT MIN(d.owner), CAST(NULL AS TEXT), 0 FROM webhook_deliveries d WHERE d.state = 'pending' \
             UNION ALL \
             SELECT CASE WHEN scan.n >= $2 OR (scan.target IS NULL AND scan.n > 0) THEN \
             (SELECT MIN(d.owner) FROM webhook_deliveries d WHERE d.state = 'pending' AND d.owner > scan.owner) \
             ELSE scan.owner END, \
             CASE WHEN scan.n >= $2 OR (scan.target IS NULL AND scan.n > 0) THEN NULL ELSE \
             (SELECT MIN(d.target) FROM webhook_deliveries d WHERE d.state = 'pending' AND d.owner = scan.owner AND \
             d.target > COALESCE(scan.target, (SELECT page.target FROM page WHERE page.owner = scan.owner), '')) END, \
             CASE WHEN scan.n >= $2 OR (scan.target IS NULL AND scan.n > 0) THEN 0 ELSE scan.n + 1 END \
             FROM scan WHERE scan.owner IS NOT NULL) \
             SELECT owner, target, (SELECT MIN(d.next_attempt_at) FROM webhook_deliveries d WHERE d.state = 'pending' \
             AND d.owner = scan.owner AND d.target = scan.target) AS due FROM scan \
             WHERE owner IS NOT NULL AND target IS NOT NULL"
        );
        let most = i32::try_from(TARGETS_AT_A_LOOK).unwrap_or(i32::MAX);
        let values = [groups::json(after.iter())?.into(), most.into()];
        let targets =
            Due::find_by_statement(Statement::from_sql_and_values(backend, sql, values)).all(self.read()).await?;
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
        self.turn_deliveries(&[], shares).await.map(|turn| turn.claimed)
    }
}

/// Claims due deliveries in the caller's transaction: one statement finds them, one leases them and one records their
/// attempts, for any number of them.
pub(super) async fn claim(
    tx: &DatabaseTransaction,
    shares: &[ClaimShare],
    at: Timestamp,
) -> Result<Vec<ClaimedDelivery>, StoreError> {
    let found = due_of(tx, shares, at).await?;
    if found.is_empty() {
        return Ok(Vec::new());
    }
    let mut at_once: HashMap<&str, HashMap<&str, usize>> = HashMap::new();
    for share in shares {
        at_once.entry(&share.owner).or_default().insert(&share.target, share.at_once);
    }
    let endpoints = endpoints_of(tx, &found).await?;
    let (mut held, mut unreadable, mut rows) = (Vec::new(), Vec::new(), Vec::with_capacity(found.len()));
    for row in found {
        if convert::readable("webhook delivery", &row.id, row.claimable()).is_none() {
            unreadable.push(row.id);
            continue;
        }
        if row.endpoint_id.as_ref().and_then(|id| endpoints.get(id)).is_some_and(|endpoint| endpoint.disabled) {
            held.push(row.id);
            continue;
        }
        let of_owner = at_once.get_mut(row.owner.as_str());
        let at_once = of_owner.and_then(|targets| targets.get_mut(row.target.as_str()));
        let is_last = row.attempts + 1 >= row.max_attempts;
        match at_once {
            Some(at_once) if *at_once > 0 => *at_once -= 1,
            Some(_) | None if is_last => continue,
            Some(_) | None => {}
        }
        rows.push(row);
    }
    if !held.is_empty() {
        // An attempt that began before its endpoint was disabled has returned them.
        webhook_delivery::Entity::update_many()
            .col_expr(webhook_delivery::Column::NextAttemptAt, Expr::val(NEVER))
            .filter(webhook_delivery::Column::Id.is_in(held))
            .exec(tx)
            .await?;
    }
    if !unreadable.is_empty() {
        // Otherwise they would be the first due ones at every claim, and leave no room for others.
        webhook_delivery::Entity::update_many()
            .col_expr(webhook_delivery::Column::NextAttemptAt, Expr::val(at.0.saturating_add(UNREADABLE_MICROS)))
            .filter(webhook_delivery::Column::Id.is_in(unreadable))
            .exec(tx)
            .await?;
    }
    let lease = Uuid::new_v4().simple().to_string();
    take(tx, rows, &endpoints, &lease, at).await
}

/// Finds and locks the due deliveries of these targets. Rows that others have locked are skipped.
async fn due_of(tx: &DatabaseTransaction, shares: &[ClaimShare], at: Timestamp) -> Result<Vec<Candidate>, StoreError> {
    // All columns but the bytes in one value, because each value of a row is passed between threads, which costs more
    // than finding the row ([`Candidate::from_row`] takes it apart).
    const COLUMNS: &str = "(d.id, d.batch_id, d.endpoint_id, d.owner, d.event, d.url, d.target, d.timeout, \
         d.attempts, d.max_attempts, d.created_at)";
    // The state is a literal, because only then do the databases use the index of pending deliveries.
    const DUE: &str = "FROM webhook_deliveries w WHERE w.state = 'pending' AND w.owner = v.value ->> 0 \
         AND w.target = v.value ->> 1 AND w.next_attempt_at <= $2 AND (w.expires_at IS NULL OR w.expires_at > $2) ORDER BY w.next_attempt_at, w.id";
    // Of the rows that were found: a search by id does not keep the order that it got the ids in.
    const ORDER: &str = "ORDER BY d.owner, d.target, d.next_attempt_at, d.id";
    let rows = groups::rows(tx);
    let targets = groups::json(shares.iter().map(|share| (&share.owner, &share.target, share.count)))?;
    let most = shares.iter().map(|share| share.count).max().unwrap_or(0);
    let most = i64::try_from(most).unwrap_or(i64::MAX);
    let columns = match tx.get_database_backend() {
        DatabaseBackend::Sqlite => format!("json_array{COLUMNS}, d.secret, d.body"),
        _ => format!("CAST(json_build_array{COLUMNS} AS TEXT), d.secret, d.body"),
    };
    let statement = match tx.get_database_backend() {
        // Its LIMIT can't be a column of `v`.
        DatabaseBackend::Sqlite => Statement::from_sql_and_values(
            DatabaseBackend::Sqlite,
            format!(
                "SELECT {columns} FROM {rows} CROSS JOIN webhook_deliveries d WHERE d.id IN (SELECT id FROM \
                 (SELECT id, row_number() OVER () AS n FROM (SELECT w.id {DUE} LIMIT $3)) WHERE n <= v.value ->> 2) \
                 {ORDER}"
            ),
            [targets.into(), at.0.into(), most.into()],
        ),
        backend => Statement::from_sql_and_values(
            backend,
            format!(
                "SELECT {columns} FROM {rows} CROSS JOIN LATERAL (SELECT w.* {DUE} \
                 LIMIT CAST(v.value ->> 2 AS BIGINT) FOR UPDATE SKIP LOCKED) d {ORDER}"
            ),
            [targets.into(), at.0.into()],
        ),
    };
    tx.query_all_raw(statement).await?.iter().map(Candidate::from_row).collect()
}

/// The parts of a delivery that are needed to send it.
pub(super) struct Candidate {
    id: String,
    batch_id: Option<String>,
    endpoint_id: Option<String>,
    owner: String,
    event: String,
    url: String,
    target: String,
    secret: Option<Vec<u8>>,
    body: Vec<u8>,
    timeout: i64,
    attempts: i32,
    max_attempts: i32,
    created_at: i64,
}

impl Candidate {
    /// From a row of [`due_of`]: the array of the other columns, the secret, the body.
    fn from_row(row: &QueryResult) -> Result<Self, StoreError> {
        type Packed = (String, Option<String>, Option<String>, String, String, String, String, i64, i32, i32, i64);
        let packed: String = row.try_get_by_index(0)?;
        let (id, batch_id, endpoint_id, owner, event, url, target, timeout, attempts, max_attempts, created_at): Packed =
            convert::json("delivery", &packed)?;
        let (secret, body) = (row.try_get_by_index(1)?, row.try_get_by_index(2)?);
        Ok(Self {
            id,
            batch_id,
            endpoint_id,
            owner,
            event,
            url,
            target,
            secret,
            body,
            timeout,
            attempts,
            max_attempts,
            created_at,
        })
    }
}

impl Candidate {
    /// Its event, and the result of claiming it.
    fn claimable(&self) -> Result<(WebhookEvent, Step), StoreError> {
        let event = event_of(&self.event)?;
        let of = Delivery {
            state: DeliveryState::Pending,
            attempts: self.attempts,
            max_attempts: self.max_attempts,
            disposable: event.is_disposable(),
        };
        let step = apply(of, Input::Claimed)
            .map_err(|refused| StoreError::Corrupt(format!("a delivery without an attempt left: {refused}")))?;
        Ok((event, step))
    }
}

impl From<webhook_delivery::Model> for Candidate {
    fn from(row: webhook_delivery::Model) -> Self {
        Self {
            id: row.id,
            batch_id: row.batch_id,
            endpoint_id: row.endpoint_id,
            owner: row.owner,
            event: row.event,
            url: row.url,
            target: row.target,
            secret: row.secret,
            body: row.body,
            timeout: row.timeout,
            attempts: row.attempts,
            max_attempts: row.max_attempts,
            created_at: row.created_at,
        }
    }
}

/// Leases locked pending rows and records their attempts.
pub(super) async fn take(
    tx: &DatabaseTransaction,
    rows: Vec<Candidate>,
    endpoints: &HashMap<String, webhook_endpoint::Model>,
    lease: &str,
    at: Timestamp,
) -> Result<Vec<ClaimedDelivery>, StoreError> {
    let mut claimed = Vec::with_capacity(rows.len());
    for row in rows {
        let (event, step) = row.claimable()?;
        let endpoint = row.endpoint_id.as_ref().and_then(|id| endpoints.get(id));
        let signing = signing(row.endpoint_id.as_deref(), endpoint, row.secret, at);
        claimed.push(ClaimedDelivery {
            id: DeliveryId::from_text(row.id),
            batch_id: row.batch_id.map(BatchId::from_text),
            owner: row.owner,
            event,
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
    let (backend, rows) = (tx.get_database_backend(), groups::rows(tx));
    let ids = groups::json(claimed.iter().map(|one| (one.id.as_str(), one.attempt)))?;
    let leased = format!(
        "UPDATE webhook_deliveries SET state = 'leased', attempts = attempts + 1, lease_token = $2, \
         lease_expires_at = timeout + $3 WHERE id IN (SELECT v.value ->> 0 FROM {rows})"
    );
    let values = [ids.as_str().into(), lease.into(), (at.0 + LEASE_MARGIN_MICROS).into()];
    tx.execute_raw(Statement::from_sql_and_values(backend, leased, values)).await?;
    fault::point(Fault::DeliveryClaimed);
    let started = format!(
        "INSERT INTO webhook_attempts (delivery_id, generation, attempt, started_at, outcome, forced) \
         SELECT v.value ->> 0, 0, CAST(v.value ->> 1 AS INTEGER), $2, '{}', FALSE FROM {rows}",
        outcome::STARTED
    );
    tx.execute_raw(Statement::from_sql_and_values(backend, started, [ids.into(), at.0.into()])).await?;
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

/// The state machine's view of a row.
pub(super) fn delivery_of(row: &webhook_delivery::Model) -> Result<Delivery, StoreError> {
    Ok(Delivery {
        state: state_of(&row.state)?,
        attempts: row.attempts,
        max_attempts: row.max_attempts,
        disposable: event_of(&row.event)?.is_disposable(),
    })
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
    rows: &[Candidate],
) -> Result<HashMap<String, webhook_endpoint::Model>, StoreError> {
    let ids: Vec<_> = rows.iter().filter_map(|row| row.endpoint_id.clone()).collect();
    if ids.is_empty() {
        return Ok(HashMap::new());
    }
    let found = webhook_endpoint::Entity::find().filter(webhook_endpoint::Column::Id.is_in(ids)).all(tx).await?;
    Ok(found.into_iter().map(|endpoint| (endpoint.id.clone(), endpoint)).collect())
}
