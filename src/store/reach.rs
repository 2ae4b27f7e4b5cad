//! How PostgreSQL is reached: directly, or through a pooler such as pgbouncer, which refuses most start-up parameters.
//! So there are none, and a session is set up after it is there.

use std::{str::FromStr, time::Duration};

use sqlx::{
    Connection, Executor, PgConnection,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio::time::{Instant, sleep, timeout_at};

use super::{StoreError, opening::in_words};

/// Wait between two attempts at a start.
const AGAIN: Duration = Duration::from_millis(250);
/// PostgreSQL ends a transaction whose node says nothing for 5 s: a node that is frozen or cut off in the middle of one
/// would keep its row locks, and with them every other node's batches, for as long as it is gone. A node whose machine
/// is gone says no goodbye: it takes 10 s and 3 times 5 s until PostgreSQL notices. No query here takes long, but PostgreSQL's
/// guess at some of them makes it compile them first (`jit`), each time they run: that took 0.7 s of each look for work and of
/// each look at thousands of waiting batches, which take some milliseconds.
const SESSION: &str = "SET jit = off; SET idle_in_transaction_session_timeout = 5000; SET tcp_keepalives_idle = 10; \
                       SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3";

/// Removes the start-up parameter that the driver adds.
pub(super) fn plain(options: PgConnectOptions) -> PgConnectOptions {
    options.extra_float_digits(None)
}

/// Connection options for a separate connection.
pub(super) fn options(url: &str) -> Result<PgConnectOptions, sqlx::Error> {
    Ok(plain(PgConnectOptions::from_str(url)?))
}

/// Sets up each session of a pool.
pub(super) fn settle(pool: PgPoolOptions) -> PgPoolOptions {
    pool.after_connect(|connection, _| {
        Box::pin(async move {
            connection.execute(SESSION).await?;
            Ok(())
        })
    })
}

/// Waits until PostgreSQL accepts a connection, because it may be starting at the same time. The error has the last
/// reason; a pool would only say that it has waited.
pub(super) async fn wait_for(url: &str, limit: Duration) -> Result<(), StoreError> {
    let options = options(url).map_err(|error| failed(limit, &in_words(&error)))?;
    let by = Instant::now() + limit;
    let mut last = "it does not answer".to_owned();
    loop {
        match timeout_at(by, PgConnection::connect_with(&options)).await {
            Ok(Ok(connection)) => {
                // It was only a test.
                let _ = timeout_at(by, connection.close()).await;
                return Ok(());
            }
            Ok(Err(error)) => last = in_words(&error),
            Err(_) => return Err(failed(limit, &last)),
        }
        if Instant::now() + AGAIN >= by {
            return Err(failed(limit, &last));
        }
        sleep(AGAIN).await;
    }
}

fn failed(limit: Duration, why: &str) -> StoreError {
    let limit = limit.as_secs();
    StoreError::Open(format!(
        "no connection to PostgreSQL within {limit} s: is the database URL right, and does the server accept \
         connections? ({why})"
    ))
}
