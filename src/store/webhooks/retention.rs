//! Deletes old webhooks: some rows per transaction, so that nobody waits long for the database.

use std::time::Duration;

use sea_orm::{
    ColumnTrait, Condition, EntityTrait, QueryFilter, QuerySelect,
    sea_query::{Expr, ExprTrait, Query},
};

use crate::{
    domain::{Scope, webhook::DeliveryState},
    store::{
        Store, StoreError,
        entity::{webhook_attempt, webhook_dead_letter, webhook_delivery, webhook_retry_job},
        now,
        scoped::within,
        write::commit,
    },
};

const AT_ONCE: u64 = 500;

impl Store {
    /// Deletes dead letters older than `age`, except those that are being retried. Returns the number.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn purge_dead_letters(&self, age: Duration, scope: &Scope) -> Result<u64, StoreError> {
        let mut purged = 0;
        loop {
            let (deleted, last) = self.purge_some_dead_letters(age, scope).await?;
            purged += deleted;
            if last {
                return Ok(purged);
            }
        }
    }

    /// Returns the number deleted, and whether they were the last.
    async fn purge_some_dead_letters(&self, age: Duration, scope: &Scope) -> Result<(u64, bool), StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let before = at.0.saturating_sub(i64::try_from(age.as_micros()).unwrap_or(i64::MAX));
            let idle = Condition::any()
                .add(webhook_dead_letter::Column::LeaseExpiresAt.is_null())
                .add(webhook_dead_letter::Column::LeaseExpiresAt.lt(at.0));
            let find = webhook_dead_letter::Entity::find()
                .select_only()
                .column(webhook_dead_letter::Column::Id)
                .filter(webhook_dead_letter::Column::CreatedAt.lte(before))
                .filter(idle.clone())
                .limit(AT_ONCE);
            let find = within(find, webhook_dead_letter::Column::Owner, scope);
            let ids: Vec<String> = find.into_tuple().all(&tx).await?;
            let last = (ids.len() as u64) < AT_ONCE;
            // The condition is repeated, because a retry may have begun since.
            let deleted = webhook_dead_letter::Entity::delete_many()
                .filter(webhook_dead_letter::Column::Id.is_in(ids))
                .filter(idle)
                .exec(&tx)
                .await?;
            commit(tx, (deleted.rows_affected, last))
        })
        .await
    }

    /// Deletes deliveries that were settled longer ago than `age`, with their attempts, and finished retry jobs of that age.
    /// What a dead letter still names stays. Returns how many deliveries.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn purge_deliveries(&self, age: Duration) -> Result<u64, StoreError> {
        let mut purged = 0;
        loop {
            let count = self.purge_some_deliveries(age).await?;
            purged += count;
            if count < AT_ONCE {
                return Ok(purged);
            }
        }
    }

    async fn purge_some_deliveries(&self, age: Duration) -> Result<u64, StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let before = at.0.saturating_sub(i64::try_from(age.as_micros()).unwrap_or(i64::MAX));
            let named = Query::select()
                .expr(Expr::val(1))
                .from(webhook_dead_letter::Entity)
                .and_where(
                    Expr::col((webhook_dead_letter::Entity, webhook_dead_letter::Column::DeliveryId))
                        .equals((webhook_delivery::Entity, webhook_delivery::Column::Id)),
                )
                .to_owned();
            let settled = [DeliveryState::Delivered, DeliveryState::Cancelled, DeliveryState::Dead];
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
            webhook_retry_job::Entity::delete_many()
                .filter(webhook_retry_job::Column::FinishedAt.lte(before))
                .exec(&tx)
                .await?;
            commit(tx, count)
        })
        .await
    }
}
