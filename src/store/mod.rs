//! The database: SQLite by default, PostgreSQL for many nodes. Every query and every transaction of tidemill is in this
//! module; callers see domain types only.
//!
//! SQLite has one writer at a time: write transactions take turns on one connection and begin IMMEDIATE (a deferred one
//! that reads and then writes fails with SQLITE_BUSY whatever the busy timeout); readers have connections of their own
//! and, thanks to WAL, never wait for the writer.

mod batches;
mod bounded;
mod claims;
mod convert;
mod entity;
mod error;
mod events;
mod files;
mod garbage;
mod identity;
mod leftovers;
mod nodes;
mod notify;
mod opening;
mod pages;
mod parameters;
mod parts;
mod queue;
mod reach;
mod schema;
mod scoped;
mod sweeps;
mod turns;
mod uploads;
mod wanted;
mod webhooks;
mod workers;
mod write;

use std::{
    future::Future,
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use sea_orm::{
    ConnectOptions, ConnectionTrait, Database, DatabaseBackend, DbErr, RuntimeErr, SqliteTransactionMode, Statement,
    TransactionOptions,
};
use sqlx::{Connection, SqliteConnection, pool::PoolConnectionMetadata};
use tokio::sync::{broadcast, watch};
use tokio_util::task::AbortOnDropHandle;

pub use batches::{COMES_WITH_BATCH, CancelledBatch, ClosedWindows, CreatedBatch, DeletedBatch};
pub use claims::{Candidate, ClaimedSegment, HeldSegment, Renewed, SegmentRecord};
pub use error::StoreError;
pub use events::StateEvent;
pub use files::{DeletedFile, InsertedFile, Origin};
pub use nodes::NodeRecord;
pub use pages::{BatchFilter, FileFilter, PageOrder};
pub use parts::{Commit, FinalObject, NewPart, Part};
pub use sweeps::{SweepRow, WantedSweep};
pub use uploads::{CancelledUpload, EndedUploads, InsertedPart, NewPartedUpload};
pub use webhooks::{
    AttemptRecord, BeginRetry, ClaimShare, ClaimedDelivery, ClaimedJob, DeadLetter, DeadLetterFilter,
    DeletedDeadLetter, DeletedEndpoint, DeliveryFilter, DeliveryRecord, Due, DueTargets, EndpointChange,
    EndpointRecord, NewEndpoint, Purged, Reaped, RetryJob, RetryJobState, SecretOf, Settled, SettledAs, Settlement,
    Signing,
};
pub use workers::{RemovedWorker, WorkerRecord};

use bounded::{Bounds, DatabaseTransaction, Pool, Silence, Writer};
use turns::Turns;

use crate::domain::{BatchId, Timestamp};

/// Time that a SQLite statement waits for another process's lock, such as that of `tidemill migrate`.
const SQLITE_BUSY: Duration = bounded::LOCKED;
/// Time that a call waits for its turn on a connection that reads from SQLite. A file is never unreachable: the wait means
/// that other calls are running, and a call that failed would only be repeated. Its client's deadline may end it earlier.
const SQLITE_TURN: Duration = Duration::from_secs(600);
/// Rows of a result that may be buffered ahead of the reader. With fewer, SQLite's thread and the reader wait for each
/// other in turns: a claim of the outbox has several hundred rows.
const SQLITE_ROWS: usize = 1_024;
/// Sizes of the page caches in SQLite's terms (negative: KiB). The writer's holds the pages that a large transaction
/// changes, so that they are not written twice; the readers' has the default size.
const SQLITE_WRITE_CACHE: &str = "-16384";
const SQLITE_READ_CACHE: &str = "-2000";
/// Wait between two attempts to open a SQLite file that another process has locked.
const SQLITE_RETRY: Duration = Duration::from_millis(20);
/// Time that a call waits for a connection to PostgreSQL while the database answers no call: it is unreachable, or all
/// connections are in use and blocked.
const ACQUIRE: Duration = Duration::from_secs(5);
/// Changes that a slow listener may lag behind before it must read everything again.
const CHANGES: usize = 4_096;

/// Without the task of the driver's pool that closes connections which are old or idle. It may loop for ever, on a thread
/// that then does nothing else, and a process with it never ends: a pool counts an idle connection only after it has given it
/// back, so for a moment that count may fall below nothing, and the task visits as many connections as the count says (sqlx
/// 0.9.0, `pool/inner.rs`: `release`, `spawn_maintenance_tasks`; its issue 3645). [`Silence::watch`] closes old connections to
/// PostgreSQL instead; those to a file don't age.
fn unattended(options: &mut ConnectOptions) -> &mut ConnectOptions {
    options.idle_timeout(None::<Duration>).max_lifetime(None::<Duration>)
}

/// Whether a connection to SQLite may be used again. SQLite undoes a transaction by itself when the disk is full or fails; the
/// driver's own ROLLBACK fails then, and it goes on counting the transaction as open. What it begins on such a connection is
/// part of that one, so a commit would be none. Closing the connection undoes what is open.
fn whole(connection: &mut SqliteConnection, _: PoolConnectionMetadata) -> BoxFuture<'_, Result<bool, sqlx::Error>> {
    Box::pin(async move {
        // A transaction that was dropped is rolled back before this is answered.
        connection.ping().await?;
        Ok(!connection.is_in_transaction())
    })
}

tokio::task_local! {
    /// The database clock of a simulation, in microseconds since 1970.
    static CLOCK: Arc<AtomicI64>;
}

/// Runs `of` with this clock instead of SQLite's, in microseconds since 1970. Simulations move it as they need.
#[doc(hidden)]
pub async fn with_clock<F: Future>(clock: Arc<AtomicI64>, of: F) -> F::Output {
    CLOCK.scope(clock, of).await
}

/// The database. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    read: Pool,
    write: Pool,
    /// Ids of batches that a commit changed: by this node, and on PostgreSQL by any node.
    changes: broadcast::Sender<BatchId>,
    /// Tells this store's commits from others'.
    origin: String,
    /// The task that receives notifications of other nodes' commits.
    listener: OnceLock<AbortOnDropHandle<()>>,
    /// Why the listener has died. `None` while it runs.
    listener_died: watch::Sender<Option<String>>,
}

impl Store {
    /// Opens the SQLite file, creates it if it does not exist, and migrates it.
    ///
    /// # Errors
    /// [`StoreError`] if it can't be opened or migrated.
    pub async fn sqlite(file: &Path) -> Result<Self, StoreError> {
        Self::sqlite_busy_after(file, SQLITE_BUSY).await
    }

    /// As [`Store::sqlite`], with another time limit for waiting on another process's lock, for tests.
    #[doc(hidden)]
    pub async fn sqlite_busy_after(file: &Path, busy: Duration) -> Result<Self, StoreError> {
        Self::open_sqlite(file, busy).await?.migrated().await
    }

    /// Opens the SQLite file, or creates it, without migrating: for [`Store::migrations`] only.
    ///
    /// # Errors
    /// [`StoreError`] if it can't be opened.
    pub async fn sqlite_unmigrated(file: &Path) -> Result<Self, StoreError> {
        Self::open_sqlite(file, SQLITE_BUSY).await
    }

    async fn open_sqlite(file: &Path, busy: Duration) -> Result<Self, StoreError> {
        let connect = |connections: u32, cache: &'static str| {
            // The path is not put into the URL, where a `%` or a `?` would have another meaning.
            let mut options = ConnectOptions::new("sqlite://");
            let file = file.to_owned();
            options.max_connections(connections).min_connections(1).sqlx_logging(false).acquire_timeout(SQLITE_TURN);
            // A connection to a file does not break, and the test would cost a second trip to its thread per query.
            options.test_before_acquire(false);
            unattended(&mut options).map_sqlx_sqlite_pool_opts(|pool| pool.after_release(whole));
            options.map_sqlx_sqlite_opts(move |sqlite| {
                sqlite
                    .filename(&file)
                    .create_if_missing(true)
                    .pragma("journal_mode", "WAL")
                    .pragma("synchronous", "FULL")
                    .pragma("busy_timeout", busy.as_millis().to_string())
                    .pragma("temp_store", "MEMORY")
                    .pragma("cache_size", cache)
                    .row_buffer_size(SQLITE_ROWS)
            });
            // The process that turns a new file into WAL mode needs it exclusively. SQLite answers others SQLITE_BUSY
            // at once, whatever the busy timeout, because waiting could be a deadlock.
            async move {
                let by = tokio::time::Instant::now() + SQLITE_BUSY;
                loop {
                    match Database::connect(options.clone()).await {
                        Err(error) if error::is_locked(&error) && tokio::time::Instant::now() < by => {
                            tokio::time::sleep(SQLITE_RETRY).await;
                        }
                        opened => return opened,
                    }
                }
            }
        };
        let write = connect(1, SQLITE_WRITE_CACHE).await.map_err(|error| match is_no_database(&error) {
            true => StoreError::Open(format!(
                "{} is not a SQLite database, or it is damaged: check --data-dir; if it is right, restore a backup",
                file.display()
            )),
            false => error.into(),
        })?;
        let read = connect(4, SQLITE_READ_CACHE).await?;
        Ok(Self::of(Pool::new(read, None, None), Pool::new(write, None, Some(Writer::new()))))
    }

    /// Connects to PostgreSQL (`postgres://…`) and migrates it.
    ///
    /// # Errors
    /// [`StoreError`] if it can't be reached or migrated.
    pub async fn postgres(url: &str, connections: u32) -> Result<Self, StoreError> {
        let store = Self::postgres_unmigrated(url, connections).await?.migrated().await?;
        let Inner { origin, changes, listener, listener_died, .. } = &*store.inner;
        listener.get_or_init(|| notify::listen(url, origin.clone(), changes.clone(), listener_died.clone()));
        Ok(store)
    }

    /// Connects to PostgreSQL without migrating: for [`Store::migrations`] only.
    ///
    /// # Errors
    /// [`StoreError`] if it can't be reached.
    pub async fn postgres_unmigrated(url: &str, connections: u32) -> Result<Self, StoreError> {
        let mut options = ConnectOptions::new(url.to_owned());
        let silence = Silence::new();
        let watch = silence.clone();
        options.max_connections(connections).sqlx_logging(false).acquire_timeout(ACQUIRE);
        unattended(&mut options).map_sqlx_postgres_opts(reach::plain);
        options.map_sqlx_postgres_pool_opts(move |pool| reach::settle(watch.watch(pool)));
        reach::wait_for(url, ACQUIRE).await?;
        // The pool's error does not say what it has waited for.
        let pool = Database::connect(options).await.map_err(|error| match error {
            DbErr::Conn(_) | DbErr::ConnectionAcquire(_) => StoreError::Open(format!(
                "no connection to PostgreSQL within {} s: is the database URL right, and does the server accept connections? \
                 ({error})",
                ACQUIRE.as_secs()
            )),
            error => error.into(),
        })?;
        let pool = Pool::new(pool, Some(Bounds { silence, turns: Turns::new(connections, ACQUIRE) }), None);
        Ok(Self::of(pool.clone(), pool))
    }

    fn of(read: Pool, write: Pool) -> Self {
        error::describe_metrics();
        write::describe_metrics();
        let inner = Inner {
            read,
            write,
            changes: broadcast::Sender::new(CHANGES),
            origin: format!("{:016x}", rand::random::<u64>()),
            listener: OnceLock::new(),
            listener_died: watch::Sender::new(None),
        };
        Self { inner: Arc::new(inner) }
    }

    /// A stream of the ids of batches that commits change: on this node, and on PostgreSQL on all nodes, though
    /// notifications may get lost. A listener that lags must read everything again.
    #[must_use]
    pub fn changes(&self) -> broadcast::Receiver<BatchId> {
        self.inner.changes.subscribe()
    }

    /// Whether the database answers, and a write to it would not have to wait for another process.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn ping(&self) -> Result<(), StoreError> {
        if self.inner.write.is_locked() {
            return Err(StoreError::Unavailable(error::locked()));
        }
        self.inner.read.ping().await?;
        Ok(())
    }

    /// Closes the connections.
    pub async fn close(&self) {
        if let Some(listener) = self.inner.listener.get() {
            listener.abort();
        }
        self.inner.write.close().await;
        self.inner.read.close().await;
    }

    /// The number of statements that this store has sent. Tests use it to check that a query for many costs no more
    /// than a query for one.
    #[doc(hidden)]
    #[must_use]
    pub fn statements(&self) -> u64 {
        let Inner { read, write, .. } = &*self.inner;
        // PostgreSQL has one pool for both.
        if self.is_sqlite() { read.statements() + write.statements() } else { read.statements() }
    }

    fn read(&self) -> &Pool {
        &self.inner.read
    }

    fn is_sqlite(&self) -> bool {
        self.inner.write.get_database_backend() == DatabaseBackend::Sqlite
    }

    async fn begin(&self) -> Result<DatabaseTransaction, StoreError> {
        let options = TransactionOptions {
            sqlite_transaction_mode: self.is_sqlite().then_some(SqliteTransactionMode::Immediate),
            ..TransactionOptions::default()
        };
        Ok(self.inner.write.begin(options).await?)
    }

    /// Notifies the listeners of [`Store::changes`].
    fn changed(&self, batch: &BatchId) {
        // There may be no listener.
        let _ = self.inner.changes.send(batch.clone());
    }
}

/// SQLITE_NOTADB and SQLITE_CORRUPT.
fn is_no_database(error: &DbErr) -> bool {
    let DbErr::Conn(RuntimeErr::SqlxError(error)) = error else { return false };
    let Some(error) = error.as_database_error() else { return false };
    error.code().is_some_and(|code| code == "26" || code == "11")
}

/// The database's clock. Leases and windows are judged by it alone, so a node with a wrong clock does no harm.
async fn now<C: ConnectionTrait>(connection: &C) -> Result<Timestamp, StoreError> {
    if connection.get_database_backend() == DatabaseBackend::Postgres {
        let sql = "SELECT (EXTRACT(EPOCH FROM clock_timestamp()) * 1000000)::bigint AS now";
        let row = connection
            .query_one_raw(Statement::from_string(DatabaseBackend::Postgres, sql))
            .await?
            .ok_or_else(|| StoreError::Corrupt("no clock".into()))?;
        return Ok(Timestamp(row.try_get("", "now")?));
    }
    Ok(local_now())
}

/// This machine's clock, or that of a test.
fn local_now() -> Timestamp {
    CLOCK.try_with(|clock| Timestamp(clock.load(Ordering::Relaxed))).unwrap_or_else(|_| Timestamp::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_pool_has_the_task_that_may_loop_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::sqlite(&folder.path().join("tidemill.db")).await.unwrap();
        for pool in [&store.inner.read, &store.inner.write] {
            let options = pool.sqlite().options();
            assert_eq!((options.get_idle_timeout(), options.get_max_lifetime()), (None, None));
        }
        let mut postgres = ConnectOptions::new("postgres://");
        let options = unattended(&mut postgres);
        assert_eq!((options.get_idle_timeout(), options.get_max_lifetime()), (Some(None), Some(None)));
    }
}
