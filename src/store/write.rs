//! Write transactions: begin, change, commit, notify. What the database gave up in favour of another transaction is
//! begun again; callers do not notice.

use std::{future::Future, time::Duration};

use sea_orm::{DbErr, RuntimeErr};
use tokio::time::Instant;

use super::{DatabaseTransaction, Store, StoreError, bounded::LOCKED, error::is_locked};
use crate::domain::BatchId;

/// Attempts of a transaction in all.
const TRIES: u32 = 10;
/// The longest wait before the second try; it doubles each time, up to [`WAIT_CAP`]. The waits are random, so that two
/// that were in each other's way are not again.
const WAIT: Duration = Duration::from_millis(10);
const WAIT_CAP: Duration = Duration::from_millis(500);

const REPEATED: &str = "tidemill_transactions_repeated_total";

/// Registers the help text of this module's metric.
pub(super) fn describe_metrics() {
    metrics::describe_counter!(REPEATED, "transactions that were repeated because the database had aborted them");
}

/// How a transaction ends, with the result for its caller. Every return names it, so no early return commits half of a
/// change.
pub(super) enum Outcome<T> {
    /// What was written stays.
    Commit(DatabaseTransaction, T),
    /// What was written stays, and the listeners of [`Store::changes`] learn that this batch has changed.
    Announce(DatabaseTransaction, BatchId, T),
    /// Nothing was written, or what was written is undone.
    RollBack(T),
}

/// Ends a transaction and keeps what it wrote.
pub(super) fn commit<T>(tx: DatabaseTransaction, result: T) -> Result<Outcome<T>, StoreError> {
    Ok(Outcome::Commit(tx, result))
}

/// Ends a transaction that has changed a batch, keeps what it wrote and notifies.
pub(super) fn announce<T>(tx: DatabaseTransaction, batch: &BatchId, result: T) -> Result<Outcome<T>, StoreError> {
    Ok(Outcome::Announce(tx, batch.clone(), result))
}

/// Ends a transaction and undoes what it wrote, if it wrote anything.
pub(super) fn roll_back<T>(result: T) -> Result<Outcome<T>, StoreError> {
    Ok(Outcome::RollBack(result))
}

impl Store {
    /// Runs `change` in a transaction and ends that as it says. What the database gave up in favour of another
    /// transaction is begun again, so `change` may run several times; only the last time counts.
    ///
    /// `change` uses the database only through its transaction: SQLite has one connection that writes, and a small pool
    /// of PostgreSQL may have no other one left.
    pub(super) async fn write<T, F>(&self, change: impl Fn(DatabaseTransaction) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<Outcome<T>, StoreError>>,
    {
        let (began, mut wait) = (Instant::now(), WAIT);
        for _ in 1..TRIES {
            match self.write_once(&change).await {
                // Its caller says so to whoever waits, and tries again later if nobody does.
                Err(StoreError::Unavailable(error)) if is_locked(&error) && began.elapsed() >= LOCKED => {
                    return Err(StoreError::Unavailable(error));
                }
                Err(StoreError::Unavailable(error)) if was_given_up(&error) => {
                    metrics::counter!(REPEATED).increment(1);
                    tokio::time::sleep(wait.mul_f64(rand::random())).await;
                    wait = (wait * 2).min(WAIT_CAP);
                }
                done => return done,
            }
        }
        self.write_once(&change).await
    }

    async fn write_once<T, F>(&self, change: &impl Fn(DatabaseTransaction) -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<Outcome<T>, StoreError>>,
    {
        // A transaction that is dropped is rolled back, after an error too.
        // In a box, because the futures of some changes are large.
        match Box::pin(change(self.begin().await?)).await? {
            Outcome::Commit(tx, result) => {
                tx.commit().await?;
                Ok(result)
            }
            Outcome::Announce(tx, batch, result) => {
                self.notify_with(&tx, &batch).await?;
                tx.commit().await?;
                self.changed(&batch);
                Ok(result)
            }
            Outcome::RollBack(result) => Ok(result),
        }
    }
}

/// Whether the database rolled the transaction back because of another one, so that it would work alone.
fn was_given_up(error: &DbErr) -> bool {
    // PostgreSQL: serialization_failure, deadlock_detected. SQLite: SQLITE_BUSY, _BUSY_RECOVERY, _BUSY_SNAPSHOT.
    has_code(error, &["40001", "40P01", "5", "261", "517"])
}

/// Whether the database gave one of these codes.
pub(super) fn has_code(error: &DbErr, codes: &[&str]) -> bool {
    let (DbErr::Conn(RuntimeErr::SqlxError(error))
    | DbErr::Exec(RuntimeErr::SqlxError(error))
    | DbErr::Query(RuntimeErr::SqlxError(error))) = error
    else {
        return false;
    };
    error.as_database_error().and_then(sqlx::error::DatabaseError::code).is_some_and(|code| codes.contains(&&*code))
}
