//! Bounds every call to PostgreSQL. A database that hangs, or a network that drops packets, closes no connection and
//! answers nothing, and no setting of the server or the socket helps. So each statement ends here after [`ANSWER`], and
//! a connection that does not recover after that is closed instead of returning to its pool.
//!
//! A transaction with a statement that timed out is never committed. If the COMMIT itself timed out, it may or may not
//! have happened, as with any lost answer.
//!
//! Calls wait for a connection in [`Turns`], as long as the database answers others.

use std::{
    future::Future,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use sea_orm::{
    ConnectionTrait, DatabaseBackend, DatabaseConnection, DbErr, ExecResult, QueryResult, RuntimeErr, Statement,
    TransactionOptions, TransactionTrait,
};
use sqlx::{Connection, PgConnection, postgres::PgPoolOptions};
use tokio::time::{Instant as Moment, timeout, timeout_at};

use super::{
    error,
    turns::{Turn, Turns},
};
use crate::telemetry::seldom;

/// Time limit of one statement. The wait for a connection counts from the database's last answer to any call. It is far
/// longer than any statement needs, and longer than the time for which a frozen node's transaction can hold a lock.
pub(super) const ANSWER: Duration = Duration::from_secs(15);
/// How long a write waits for another process's lock on the SQLite file, or for a write before it that waits for the lock.
pub(super) const LOCKED: Duration = Duration::from_secs(15);
/// Time for a connection to become usable again after a statement on it timed out.
const RECOVERY: Duration = Duration::from_secs(5);
/// After a statement has timed out, connections are checked before they return to their pool for this long.
const SUSPICIOUS: Duration = Duration::from_secs(60);

/// Age at which a connection to PostgreSQL is closed when it comes back, because a server's process keeps what it has once
/// allocated, and a server behind an address may have been replaced.
const LIFETIME: Duration = Duration::from_secs(1_800);

/// When a statement last timed out or was dropped, by this node's clock.
#[derive(Clone, Debug)]
pub(super) struct Silence {
    start: Instant,
    /// Milliseconds from `start`, plus one; 0: never.
    last: Arc<AtomicU64>,
}

impl Silence {
    pub(super) fn new() -> Self {
        Self { start: Instant::now(), last: Arc::default() }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1)
    }

    fn note(&self) {
        self.last.store(self.now(), Ordering::Release);
    }

    fn is_recent(&self) -> bool {
        let last = self.last.load(Ordering::Acquire);
        last > 0 && Duration::from_millis(self.now().saturating_sub(last)) < SUSPICIOUS
    }

    /// Makes the pool close connections that stay silent, and those older than [`LIFETIME`]. By itself the pool waits for
    /// silent ones, each in one of its places, until TCP gives up: a quarter of an hour, or for ever if some device on the
    /// path still acknowledges packets.
    pub(super) fn watch(&self, pool: PgPoolOptions) -> PgPoolOptions {
        let silence = self.clone();
        pool.after_release(move |connection: &mut PgConnection, of| {
            let suspicious = silence.is_recent();
            Box::pin(async move {
                if of.age > LIFETIME {
                    return Ok(false);
                }
                if suspicious {
                    timeout(RECOVERY, connection.ping()).await.map_err(std::io::Error::from)??;
                }
                Ok(true)
            })
        })
    }
}

/// Records a statement that is dropped before it has ended, because it timed out or its caller dropped it.
struct Unfinished<'a>(Option<&'a Silence>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(silence) = self.0 {
            silence.note();
        }
    }
}

/// The bounds of calls to PostgreSQL. A statement on SQLite has none, because a file does not hang; but its writers wait for
/// each other, and for other processes: [`Writer`].
#[derive(Clone, Debug)]
pub(super) struct Bounds {
    pub(super) silence: Silence,
    pub(super) turns: Turns,
}

impl Bounds {
    /// Waits for a statement until that moment.
    async fn until<T>(&self, by: Moment, statement: impl Future<Output = Result<T, DbErr>> + Send) -> Result<T, DbErr> {
        let statement = pin!(timeout_at(by, statement));
        // Dropped before the statement, and so before its connection goes back to the pool.
        let mut unfinished = Unfinished(Some(&self.silence));
        match statement.await {
            Ok(done) => {
                unfinished.0 = None;
                self.turns.note(&done);
                done
            }
            Err(_) => {
                let error = format!("no answer from PostgreSQL within {} s", ANSWER.as_secs());
                Err(DbErr::Conn(RuntimeErr::Internal(error)))
            }
        }
    }
}

/// The queue of those who write to a SQLite file, for which there is one connection.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    turns: Turns,
    /// Whether another process has the file's lock, as far as is known.
    is_locked: Arc<AtomicBool>,
}

impl Writer {
    pub(super) fn new() -> Self {
        Self { turns: Turns::new(1, LOCKED), is_locked: Arc::default() }
    }

    /// Waits for a turn, then for the lock.
    async fn begin<T>(&self, begin: impl Future<Output = Result<T, DbErr>>) -> Result<(T, Turn), DbErr> {
        // None of the calls before it gets the lock either.
        let Ok(turn) = self.turns.wait().await else { return Err(error::locked()) };
        let begun = begin.await;
        self.turns.note(&begun);
        let is_locked = begun.as_ref().is_err_and(error::is_locked);
        self.is_locked.store(is_locked, Ordering::Release);
        if is_locked {
            seldom!(
                warn,
                "another process has locked the database file: is a backup, a copy or the sqlite3 program at work?"
            );
        }
        Ok((begun?, turn))
    }
}

/// Waits at most [`ANSWER`] for a statement on a connection that the caller holds.
async fn within<T>(
    bounds: Option<&Bounds>,
    statement: impl Future<Output = Result<T, DbErr>> + Send,
) -> Result<T, DbErr> {
    match bounds {
        Some(bounds) => bounds.until(Moment::now() + ANSWER, statement).await,
        None => statement.await,
    }
}

/// Waits for a turn on a connection, then for a statement that takes the connection from the pool.
async fn in_turn<T>(
    bounds: Option<&Bounds>,
    statement: impl Future<Output = Result<T, DbErr>> + Send,
) -> Result<(T, Option<Turn>), DbErr> {
    let Some(bounds) = bounds else { return Ok((statement.await?, None)) };
    let turn = bounds.turns.wait().await?;
    Ok((bounds.until(turn.alive + ANSWER, statement).await?, Some(turn)))
}

/// A pool of connections. Cheap to clone.
#[derive(Clone)]
pub(super) struct Pool {
    inner: DatabaseConnection,
    bounds: Option<Bounds>,
    /// Of the connection that writes to a SQLite file.
    writer: Option<Writer>,
    /// Statements sent so far, inside and outside of transactions.
    statements: Arc<AtomicU64>,
}

impl Pool {
    pub(super) fn new(inner: DatabaseConnection, bounds: Option<Bounds>, writer: Option<Writer>) -> Self {
        Self { inner, bounds, writer, statements: Arc::default() }
    }

    /// Whether another process keeps everybody here from writing to the SQLite file.
    pub(super) fn is_locked(&self) -> bool {
        self.writer.as_ref().is_some_and(|writer| writer.is_locked.load(Ordering::Acquire))
    }

    #[cfg(test)]
    pub(super) fn sqlite(&self) -> &sqlx::SqlitePool {
        self.inner.get_sqlite_connection_pool()
    }

    pub(super) fn statements(&self) -> u64 {
        self.statements.load(Ordering::Relaxed)
    }

    async fn bounded<T>(&self, statement: impl Future<Output = Result<T, DbErr>> + Send) -> Result<T, DbErr> {
        // The turn ends after the statement.
        Ok(in_turn(self.bounds.as_ref(), statement).await?.0)
    }

    pub(super) async fn begin(&self, options: TransactionOptions) -> Result<DatabaseTransaction, DbErr> {
        let begin = self.inner.begin_with_options(options);
        let (inner, turn) = match &self.writer {
            Some(writer) => writer.begin(begin).await.map(|(inner, turn)| (inner, Some(turn)))?,
            None => in_turn(self.bounds.as_ref(), begin).await?,
        };
        let (bounds, writer) = (self.bounds.clone(), self.writer.clone());
        Ok(DatabaseTransaction { inner, bounds, writer, statements: self.statements.clone(), _turn: turn })
    }

    pub(super) async fn ping(&self) -> Result<(), DbErr> {
        Box::pin(self.bounded(self.inner.ping())).await
    }

    /// Closes the connections. Waits at most [`RECOVERY`] for one that is in use.
    pub(super) async fn close(&self) {
        // If closing fails nothing is lost, because every answered write is committed.
        let _ = timeout(RECOVERY, self.inner.close_by_ref()).await;
    }
}

/// A transaction. Dropping it rolls it back.
#[derive(Debug)]
pub(super) struct DatabaseTransaction {
    inner: sea_orm::DatabaseTransaction,
    bounds: Option<Bounds>,
    writer: Option<Writer>,
    statements: Arc<AtomicU64>,
    /// Dropped after the transaction, so that the connection is back before the next turn begins.
    _turn: Option<Turn>,
}

impl DatabaseTransaction {
    /// The connections without time limits, for migrations.
    pub(super) fn unbounded(&self) -> &sea_orm::DatabaseTransaction {
        &self.inner
    }

    async fn bounded<T>(&self, statement: impl Future<Output = Result<T, DbErr>> + Send) -> Result<T, DbErr> {
        let done = within(self.bounds.as_ref(), statement).await;
        if let Some(writer) = &self.writer {
            // Those who wait for a turn learn that there is progress.
            writer.turns.note(&done);
        }
        done
    }

    pub(super) async fn commit(self) -> Result<(), DbErr> {
        let done = within(self.bounds.as_ref(), self.inner.commit()).await;
        if let Some(writer) = &self.writer {
            writer.turns.note(&done);
        }
        done
    }
}

macro_rules! bounded {
    ($($name:ty),*) => {$(
        #[async_trait::async_trait]
        impl ConnectionTrait for $name {
            fn get_database_backend(&self) -> DatabaseBackend {
                self.inner.get_database_backend()
            }

            async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
                self.statements.fetch_add(1, Ordering::Relaxed);
                self.bounded(self.inner.execute_raw(statement)).await
            }

            async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
                self.statements.fetch_add(1, Ordering::Relaxed);
                self.bounded(self.inner.execute_unprepared(sql)).await
            }

            async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
                self.statements.fetch_add(1, Ordering::Relaxed);
                self.bounded(self.inner.query_one_raw(statement)).await
            }

            async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
                self.statements.fetch_add(1, Ordering::Relaxed);
                self.bounded(self.inner.query_all_raw(statement)).await
            }
        }
    )*};
}

bounded!(Pool, DatabaseTransaction);
