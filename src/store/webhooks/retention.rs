//! Deletes old webhooks: a bounded number of rows per call, so that nobody waits long for the database.

use std::time::Duration;

use sea_orm::{
    ColumnTrait, Condition, EntityTrait, QueryFilter, QuerySelect,
    sea_query::{Expr, ExprTrait, Query},
};

use crate::{
    domain::{Scope, Timestamp, webhook::DeliveryState},
    store::{
        Store, StoreError, convert,
        entity::{webhook_attempt, webhook_dead_letter, webhook_delivery, webhook_retry_job},
        now,
        scoped::within,
        write::commit,
    },
};

/// Rows per call, and so per transaction.
const AT_ONCE: u64 = 500;

/// What one call deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// The number of dead letters or deliveries.
    pub count: u64,
    /// Whether there may be more, for the next call.
    pub more: bool,
}

impl Store {
    /// Deletes some dead letters older than `age`, except those that are being retried.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn purge_dead_letters(&self, age: Duration, scope: &Scope) -> Result<Purged, StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let idle = Condition::any()
                .add(webhook_dead_letter::Column::LeaseExpiresAt.is_null())
                .add(webhook_dead_letter::Column::LeaseExpiresAt.lt(at.0));
            let find = webhook_dead_letter::Entity::find()
                .select_only()
                .column(webhook_dead_letter::Column::Id)
                .filter(webhook_dead_letter::Column::CreatedAt.lte(before(at, age)))
                .filter(idle.clone())
                .limit(AT_ONCE);
            let find = within(find, webhook_dead_letter::Column::Owner, scope);
            let ids: Vec<String> = find.into_tuple().all(&tx).await?;
            let more = ids.len() as u64 == AT_ONCE;
            // The condition is repeated, because a retry may have begun since.
            let deleted = webhook_dead_letter::Entity::delete_many()
                .filter(webhook_dead_letter::Column::Id.is_in(ids))
                .filter(idle)
                .exec(&tx)
                .await?;
            commit(tx, Purged { count: deleted.rows_affected, more })
        })
        .await
    }

    /// Deletes some deliveries that were settled longer ago than `age`, with their attempts, and some finished retry jobs
    /// of that age. Keeps a delivery that a dead letter names. Counts only the deliveries.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn purge_deliveries(&self, age: Duration) -> Result<Purged, StoreError> {
        self.write(|tx| async move {
            let before = before(now(&tx).await?, age);
            let named = Query::select()
                .expr(Expr::val(1))
                .from(webhook_dead_letter::Entity)
                .and_where(
                    Expr::col((webhook_dead_letter::Entity, webhook_dead_letter::Column::DeliveryId))
                        .equals((webhook_delivery::Entity, webhook_delivery::Column::Id)),
                )
                .to_owned();
            let settled = DeliveryState::ALL.into_iter().filter(|state| state.is_settled());
            let ids: Vec<String> = webhook_delivery::Entity::find()
                .select_only()
                .column(webhook_delivery::Column::Id)
                .filter(webhook_delivery::Column::State.is_in(settled.map(DeliveryState::as_str)))
                .filter(webhook_delivery::Column::SettledAt.lte(before))
                .filter(Expr::exists(named).not())
                .limit(AT_ONCE)
                .into_tuple()
                .all(&tx)
                .await?;
            let count = ids.len() as u64;
            webhook_attempt::Entity::delete_many()
                .filter(webhook_attempt::Column::DeliveryId.is_in(ids.iter().cloned()))
                .exec(&tx)
                .await?;
            webhook_delivery::Entity::delete_many().filter(webhook_delivery::Column::Id.is_in(ids)).exec(&tx).await?;
            let old_jobs: Vec<String> = webhook_retry_job::Entity::find()
                .select_only()
                .column(webhook_retry_job::Column::Id)
                .filter(webhook_retry_job::Column::FinishedAt.lte(before))
                .limit(AT_ONCE)
                .into_tuple()
                .all(&tx)
                .await?;
            let more = count == AT_ONCE || old_jobs.len() as u64 == AT_ONCE;
            webhook_retry_job::Entity::delete_many()
                .filter(webhook_retry_job::Column::Id.is_in(old_jobs))
                .exec(&tx)
                .await?;
            commit(tx, Purged { count, more })
        })
        .await
    }
}

/// The time `age` ago, in microseconds since the Unix epoch.
fn before(at: Timestamp, age: Duration) -> i64 {
    at.0.saturating_sub(convert::micros(age))
}
