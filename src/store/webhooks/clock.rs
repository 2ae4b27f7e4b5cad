//! Due times and leases are times of the database's clock. If it is set back, they would be further away by as much.

use sea_orm::{ConnectionTrait, Statement};

use super::{LEASE_MARGIN_MICROS, NEVER, in_state};
use crate::{
    domain::{
        Timestamp,
        webhook::{DeliveryState, TIMEOUT_RANGE},
    },
    store::{Store, StoreError, convert, now, write::commit},
};

impl Store {
    /// The database's time.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn clock(&self) -> Result<Timestamp, StoreError> {
        now(self.read()).await
    }

    /// Takes back what the database's clock can't have meant: a wait that was fixed in the future begins now, and a lease ends
    /// after its whole time from now at the latest. Right at any time, and any number of nodes may do it. Looks at everything
    /// that waits, so it is for when the clock was set back. Returns how many waits and leases were changed.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn mend_due_times(&self) -> Result<u64, StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let backend = tx.get_database_backend();
            let longest = convert::micros(TIMEOUT_RANGE.1) + LEASE_MARGIN_MICROS;
            let mut changed = 0;
            let (waits, leased) = (in_state(DeliveryState::Pending), in_state(DeliveryState::Leased));
            for (sql, values) in [
                (
                    format!(
                        "UPDATE webhook_deliveries SET \
                         next_attempt_at = next_attempt_at - (COALESCE(scheduled_at, created_at) - $1), \
                         scheduled_at = $1 WHERE ({waits} OR {leased}) AND next_attempt_at <> $2 \
                         AND COALESCE(scheduled_at, created_at) > $1"
                    ),
                    vec![at.0, NEVER],
                ),
                (
                    format!(
                        "UPDATE webhook_deliveries SET lease_expires_at = timeout + $1 \
                         WHERE {leased} AND lease_expires_at > timeout + $1"
                    ),
                    vec![at.0 + LEASE_MARGIN_MICROS],
                ),
                (
                    "UPDATE webhook_dead_letters SET lease_expires_at = $1 WHERE lease_expires_at > $1".to_owned(),
                    vec![at.0 + longest],
                ),
            ] {
                let values: Vec<sea_orm::Value> = values.into_iter().map(Into::into).collect();
                changed += tx.execute_raw(Statement::from_sql_and_values(backend, sql, values)).await?.rows_affected();
            }
            commit(tx, changed)
        })
        .await
    }
}
