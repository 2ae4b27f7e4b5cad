//! Repeats transactions that the database aborted in favour of another one. Callers do not notice.

use std::{future::Future, time::Duration};

use sea_orm::{DbErr, RuntimeErr};

use super::StoreError;

/// Attempts of a transaction in all.
const TRIES: u32 = 10;
/// The longest wait before the second try; it doubles each time, up to [`WAIT_CAP`]. The waits are random, so that two
/// that were in each other's way are not again.
const WAIT: Duration = Duration::from_millis(10);
const WAIT_CAP: Duration = Duration::from_millis(500);

const REPEATED: &str = "tidemill_transactions_repeated_total";

/// Registers the help text of this module's metric.
pub(super) fn describe_metrics() {
    metrics::describe_counter!(REPEATED, "transactions that were begun again because the database had given them up");
}

/// Runs a whole transaction, and repeats it if the database aborted it in favour of another one. `act` must begin it
/// anew each time.
pub(super) async fn again<T, F: Future<Output = Result<T, StoreError>>>(act: impl Fn() -> F) -> Result<T, StoreError> {
    let mut wait = WAIT;
    for _ in 1..TRIES {
        match act().await {
            Err(StoreError::Unavailable(error)) if was_given_up(&error) => {
                metrics::counter!(REPEATED).increment(1);
                tokio::time::sleep(wait.mul_f64(rand::random())).await;
                wait = (wait * 2).min(WAIT_CAP);
            }
            done => return done,
        }
    }
    act().await
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
