//! Dead letters: created with the last failed attempt, retried by hand, deleted.

use bytes::Bytes;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, Condition, EntityTrait, IntoActiveModel, PaginatorTrait, QueryFilter, QueryOrder,
    QuerySelect, sea_query::Expr,
};
use uuid::Uuid;

use super::{
    LEASE_MARGIN_MICROS,
    claims::{ClaimedDelivery, Signing, signing, started},
    log::AttemptRecord,
    steps,
};
use crate::{
    domain::{
        BatchId, DeadLetterId, DeliveryId, Owner, Scope, Timestamp,
        webhook::{AttemptOutcome, AttemptResult, ErrorKind, WebhookEvent, target_of},
    },
    store::{
        DatabaseTransaction, Store, StoreError, convert,
        entity::{webhook_attempt, webhook_dead_letter, webhook_delivery, webhook_endpoint},
        now,
        pages::readable_page,
        scoped::within,
        write::{commit, roll_back},
    },
};

/// A webhook that could not be delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    pub id: DeadLetterId,
    pub owner: Owner,
    /// The batch that the event is about.
    pub batch_id: Option<BatchId>,
    /// The delivery that failed.
    pub delivery_id: DeliveryId,
    /// The URL to which it was sent.
    pub url: String,
    pub event: WebhookEvent,
    /// The body, byte for byte.
    pub payload: Vec<u8>,
    /// The kind of the last failure.
    pub error_kind: ErrorKind,
    /// The message of the last failure.
    pub error_message: String,
    /// The number of automatic attempts.
    pub attempts: i32,
    /// When the last of those was made.
    pub last_attempt_at: Timestamp,
    /// When it became a dead letter.
    pub created_at: Timestamp,
    /// When it was last retried by hand.
    pub retried_at: Option<Timestamp>,
    /// Whether a retry by hand has succeeded.
    pub retry_success: bool,
    /// The number of retries by hand.
    pub retry_count: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DeadLetterFilter {
    /// Only those within this scope. Stored with retry jobs under its older name.
    #[serde(rename = "owner")]
    pub scope: Scope,
    /// Only those of this batch.
    pub batch_id: Option<String>,
    /// Only those of this event.
    pub event: Option<String>,
    /// Only those to this host.
    pub host: Option<String>,
    /// Only those that a retry has, or has not, delivered.
    pub delivered: Option<bool>,
    /// Only those that became one at this time (microseconds since the Unix epoch) or later.
    pub created_from: Option<i64>,
    /// Only those that became one before this time.
    pub created_before: Option<i64>,
}

/// The outcome of beginning a retry.
#[derive(Debug)]
pub enum BeginRetry {
    /// The caller must send it.
    Started {
        /// The delivery to send.
        claim: Box<ClaimedDelivery>,
        /// Whether it had been delivered before.
        forced: bool,
    },
    /// A call with the same request id has retried it before, with this outcome.
    Repeated(Box<DeadLetter>, Box<AttemptRecord>),
    /// An earlier retry has delivered it, and `force` is not set.
    AlreadyDelivered,
    /// Another retry is running.
    Busy,
    /// There is no such dead letter.
    NotFound,
    /// Its endpoint was deleted, so there is neither an address nor a secret any more.
    EndpointDeleted,
}

/// The outcome of a deletion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeletedDeadLetter {
    /// It was deleted.
    Deleted,
    /// There is no such dead letter.
    NotFound,
    /// A retry is running.
    Busy,
}

impl DeadLetterFilter {
    #[must_use]
    pub fn within(scope: Scope) -> Self {
        Self {
            scope,
            batch_id: None,
            event: None,
            host: None,
            delivered: None,
            created_from: None,
            created_before: None,
        }
    }

    pub(super) fn condition(&self) -> Condition {
        use webhook_dead_letter::Column;
        Condition::all()
            .add_option(self.scope.owner().map(|owner| Column::Owner.eq(owner.as_str())))
            .add_option(self.batch_id.as_ref().map(|id| Column::BatchId.eq(id)))
            .add_option(self.event.as_ref().map(|event| Column::Event.eq(event)))
            .add_option(self.host.as_ref().map(|host| Column::Host.eq(host)))
            .add_option(self.delivered.map(|delivered| Column::RetrySuccess.eq(delivered)))
            .add_option(self.created_from.map(|from| Column::CreatedAt.gte(from)))
            .add_option(self.created_before.map(|before| Column::CreatedAt.lt(before)))
    }
}

impl Store {
    /// Dead letters, newest first, those after `after` in that order, at most `limit`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn dead_letters(
        &self,
        filter: &DeadLetterFilter,
        after: Option<&DeadLetterId>,
        limit: u64,
    ) -> Result<Vec<DeadLetter>, StoreError> {
        let rows = |after: Option<String>| {
            let mut find = webhook_dead_letter::Entity::find()
                .filter(filter.condition())
                .order_by_desc(webhook_dead_letter::Column::Id)
                .limit(limit);
            if let Some(after) = after {
                find = find.filter(webhook_dead_letter::Column::Id.lt(after));
            }
            async move { Ok(find.all(self.read()).await?) }
        };
        let after = after.map(|after| after.as_str().to_owned());
        readable_page("dead letter", limit, after, rows, |row: &webhook_dead_letter::Model| &row.id).await
    }

    /// The number of dead letters that match.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn count_dead_letters(&self, filter: &DeadLetterFilter) -> Result<i64, StoreError> {
        let count = webhook_dead_letter::Entity::find().filter(filter.condition()).count(self.read()).await?;
        Ok(i64::try_from(count).unwrap_or(i64::MAX))
    }

    /// One dead letter.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn dead_letter(&self, id: &DeadLetterId, scope: &Scope) -> Result<Option<DeadLetter>, StoreError> {
        find(self.read(), id, scope).await?.map(DeadLetter::try_from).transpose()
    }

    /// Claims a dead letter for one retry and records its attempt, a generation of its own.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn begin_retry(
        &self,
        id: &DeadLetterId,
        scope: &Scope,
        force: bool,
        request_id: Option<&str>,
    ) -> Result<BeginRetry, StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let Some(mut row) = lock(&tx, id, scope).await? else { return roll_back(BeginRetry::NotFound) };
            if let Some(request_id) = request_id
                && let Some(attempt) = webhook_attempt::Entity::find()
                    .filter(webhook_attempt::Column::DeliveryId.eq(&row.delivery_id))
                    .filter(webhook_attempt::Column::RequestId.eq(request_id))
                    .one(&tx)
                    .await?
            {
                if attempt.finished_at.is_none() {
                    return roll_back(BeginRetry::Busy);
                }
                return roll_back(BeginRetry::Repeated(Box::new(row.try_into()?), Box::new(attempt.try_into()?)));
            }
            if row.lease_expires_at.is_some_and(|until| until >= at.0) {
                return roll_back(BeginRetry::Busy);
            }
            if row.retry_success && !force {
                return roll_back(BeginRetry::AlreadyDelivered);
            }
            let endpoint = match &row.endpoint_id {
                Some(endpoint) => webhook_endpoint::Entity::find_by_id(endpoint).one(&tx).await?,
                None => None,
            };
            let delivery = webhook_delivery::Entity::find_by_id(&row.delivery_id)
                .one(&tx)
                .await?
                .ok_or_else(|| StoreError::Corrupt("a dead letter without its delivery".into()))?;
            let signing = signing(row.endpoint_id.as_deref(), endpoint.as_ref(), delivery.secret, at);
            if signing == Signing::EndpointDeleted {
                return roll_back(BeginRetry::EndpointDeleted);
            }
            if row.lease_expires_at.is_some() {
                // Its sender is gone, and the reaper has not been here yet; afterwards it would not see that there was one.
                end_lost(&tx, &row.delivery_id, at).await?;
            }
            // An endpoint that has moved since: there.
            let url = endpoint.as_ref().map_or(&row.webhook_url, |endpoint| &endpoint.url).clone();
            let timeout = endpoint.as_ref().map_or(delivery.timeout, |endpoint| endpoint.timeout);
            let lease = Uuid::new_v4().simple().to_string();
            let forced = row.retry_success;
            row.retry_count += 1;
            row.retried_at = Some(at.0);
            row.lease_token = Some(lease.clone());
            row.lease_expires_at = Some(at.0 + timeout + LEASE_MARGIN_MICROS);
            let generation =
                i32::try_from(row.retry_count).map_err(|_| StoreError::Corrupt("too many retries".into()))?;
            let delivery_id = DeliveryId::from_text(&row.delivery_id);
            let mut attempt = started(&delivery_id, generation, 1, at);
            attempt.request_id = request_id.map(str::to_owned);
            attempt.forced = forced;
            webhook_attempt::Entity::insert(attempt.into_active_model()).exec_without_returning(&tx).await?;
            let claim = ClaimedDelivery {
                id: delivery_id,
                batch_id: row.batch_id.clone().map(BatchId::from_text),
                owner: row.owner.as_str().into(),
                event: convert::name("webhook event", &row.event)?,
                target: target_of(&url),
                url,
                signing,
                body: Bytes::from(row.payload.clone()),
                generation,
                attempt: 1,
                number: i64::from(row.attempts) + row.retry_count,
                timeout: convert::duration(timeout),
                lease,
                created_at: Timestamp(delivery.created_at),
            };
            row.into_active_model().reset_all().update(&tx).await?;
            commit(tx, BeginRetry::Started { claim: Box::new(claim), forced })
        })
        .await
    }

    /// Records the outcome of a retry. `None` if the lease was lost or the dead letter was deleted: then nothing was
    /// written.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn finish_retry(
        &self,
        id: &DeadLetterId,
        claim: &ClaimedDelivery,
        result: &AttemptResult,
    ) -> Result<Option<DeadLetter>, StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let Some(mut row) = lock(&tx, id, &Scope::All).await? else { return roll_back(None) };
            if row.lease_token.as_deref() != Some(&claim.lease) {
                return roll_back(None);
            }
            steps::end_attempts(&tx, &[(claim.id.as_str(), claim.generation, claim.attempt, result)], at).await?;
            row.lease_token = None;
            row.lease_expires_at = None;
            match &result.error {
                // A delivered dead letter stays delivered, whatever the outcome of a forced retry.
                None => row.retry_success = true,
                Some(error) => {
                    row.error_kind = error.kind.as_str().to_owned();
                    row.error_message.clone_from(&error.message);
                }
            }
            let row = row.into_active_model().reset_all().update(&tx).await?;
            // The outcome is kept even if this version can't read the rest.
            commit(tx, Some(DeadLetter::try_from(row)))
        })
        .await?
        .transpose()
    }

    /// Deletes a dead letter that nobody is retrying.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn delete_dead_letter(&self, id: &DeadLetterId, scope: &Scope) -> Result<DeletedDeadLetter, StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let Some(row) = lock(&tx, id, scope).await? else { return roll_back(DeletedDeadLetter::NotFound) };
            if row.lease_expires_at.is_some_and(|until| until >= at.0) {
                return roll_back(DeletedDeadLetter::Busy);
            }
            webhook_dead_letter::Entity::delete_by_id(id.as_str()).exec(&tx).await?;
            commit(tx, DeletedDeadLetter::Deleted)
        })
        .await
    }
}

/// Ends the leases of retries whose sender died, with an unknown outcome.
pub(super) async fn reap(tx: &DatabaseTransaction, all: bool, at: Timestamp, most: u64) -> Result<u64, StoreError> {
    let mut find = webhook_dead_letter::Entity::find()
        .filter(webhook_dead_letter::Column::LeaseExpiresAt.is_not_null())
        .order_by_asc(webhook_dead_letter::Column::Id)
        .limit(most)
        .lock_exclusive();
    if !all {
        find = find.filter(webhook_dead_letter::Column::LeaseExpiresAt.lt(at.0));
    }
    let lost = find.all(tx).await?;
    let count = lost.len() as u64;
    for mut row in lost {
        end_lost(tx, &row.delivery_id, at).await?;
        row.lease_token = None;
        row.lease_expires_at = None;
        row.into_active_model().reset_all().update(tx).await?;
    }
    Ok(count)
}

/// Ends the retries of a delivery whose sender died.
async fn end_lost(tx: &DatabaseTransaction, delivery_id: &str, at: Timestamp) -> Result<(), StoreError> {
    webhook_attempt::Entity::update_many()
        .col_expr(webhook_attempt::Column::Outcome, Expr::val(AttemptOutcome::Unknown.as_str()))
        .col_expr(webhook_attempt::Column::FinishedAt, Expr::val(at.0))
        .col_expr(webhook_attempt::Column::ErrorKind, Expr::val(ErrorKind::Unknown.as_str()))
        .filter(webhook_attempt::Column::DeliveryId.eq(delivery_id))
        .filter(webhook_attempt::Column::Generation.gt(0))
        .filter(webhook_attempt::Column::Outcome.eq(AttemptOutcome::Started.as_str()))
        .exec(tx)
        .await?;
    Ok(())
}

async fn lock(
    tx: &DatabaseTransaction,
    id: &DeadLetterId,
    scope: &Scope,
) -> Result<Option<webhook_dead_letter::Model>, StoreError> {
    let find = webhook_dead_letter::Entity::find_by_id(id.as_str()).lock_exclusive();
    Ok(within(find, webhook_dead_letter::Column::Owner, scope).one(tx).await?)
}

async fn find<C: sea_orm::ConnectionTrait>(
    connection: &C,
    id: &DeadLetterId,
    scope: &Scope,
) -> Result<Option<webhook_dead_letter::Model>, StoreError> {
    let find = webhook_dead_letter::Entity::find_by_id(id.as_str());
    Ok(within(find, webhook_dead_letter::Column::Owner, scope).one(connection).await?)
}

impl TryFrom<webhook_dead_letter::Model> for DeadLetter {
    type Error = StoreError;

    fn try_from(row: webhook_dead_letter::Model) -> Result<Self, StoreError> {
        Ok(Self {
            id: DeadLetterId::from_text(row.id),
            owner: row.owner.into(),
            batch_id: row.batch_id.map(BatchId::from_text),
            delivery_id: DeliveryId::from_text(row.delivery_id),
            url: row.webhook_url,
            event: convert::name("webhook event", &row.event)?,
            payload: row.payload,
            error_kind: convert::name("error kind", &row.error_kind)?,
            error_message: row.error_message,
            attempts: row.attempts,
            last_attempt_at: Timestamp(row.last_attempt_at),
            created_at: Timestamp(row.created_at),
            retried_at: row.retried_at.map(Timestamp),
            retry_success: row.retry_success,
            retry_count: row.retry_count,
        })
    }
}
