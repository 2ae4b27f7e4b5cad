//! Why a database call failed: the database is unreachable, or it refuses.
//!
//! The difference decides what follows. A database that is away is waited for, by runs without an end. What it refuses
//! (a value that it can't hold, a broken constraint, a query that is wrong) it would refuse again, so it is final: the
//! error fails what asked for it, is logged as a bug of tidemill, and holds nobody up.

use sea_orm::{DbErr, RuntimeErr};
use sqlx::postgres::{PgDatabaseError, PgSeverity};

use crate::telemetry::seldom;

/// Counter of statements that the database refused for good.
const REJECTIONS: &str = "tidemill_database_rejections_total";

/// Registers the help text of this module's metric.
pub(super) fn describe_metrics() {
    metrics::describe_counter!(REJECTIONS, "statements that the database has refused for good; each is a bug");
}

/// Why a database call failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database is unreachable, busy or full: a retry may help.
    #[error("database: {0}")]
    Unavailable(#[source] DbErr),
    /// The database refused the statement, and would refuse it again: a bug of tidemill.
    #[error("the database refuses a statement: {0}")]
    Rejected(#[source] DbErr),
    /// The database contains something that this version can't have written.
    #[error("database holds {0}")]
    Corrupt(String),
    /// The data directory is in use or can't be created.
    #[error("{0}")]
    Open(String),
}

impl StoreError {
    /// Whether a retry can't help.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            Self::Unavailable(_) => false,
            Self::Rejected(_) | Self::Corrupt(_) | Self::Open(_) => true,
        }
    }

    /// What keeps the database from doing what it was asked, if that is one of the things that an operator can mend.
    #[must_use]
    pub fn obstacle(&self) -> Option<&'static str> {
        match self {
            Self::Unavailable(error) if is_locked(error) => Some(LOCKED),
            Self::Unavailable(error) if is_full(error) => Some("no space is left on the database's disk"),
            _ => None,
        }
    }
}

impl From<DbErr> for StoreError {
    fn from(error: DbErr) -> Self {
        if is_away(&error) {
            return Self::Unavailable(error);
        }
        metrics::counter!(REJECTIONS).increment(1);
        // Logged here, because all of them pass here; the caller says what fails because of it.
        seldom!(error, %error, "the database refuses a statement for good: this is a bug in tidemill, please report it");
        Self::Rejected(error)
    }
}

/// The text of [`locked`].
const LOCKED: &str = "another process has locked the database file";

/// A write that was not begun, because another process has the SQLite file's lock.
pub(super) fn locked() -> DbErr {
    DbErr::Conn(RuntimeErr::Internal(LOCKED.to_owned()))
}

/// Whether another process had the SQLite file's lock: SQLITE_BUSY in any of its forms, or [`locked`].
pub(super) fn is_locked(error: &DbErr) -> bool {
    match error {
        DbErr::Conn(RuntimeErr::Internal(text)) => text == LOCKED,
        DbErr::Conn(RuntimeErr::SqlxError(error))
        | DbErr::Exec(RuntimeErr::SqlxError(error))
        | DbErr::Query(RuntimeErr::SqlxError(error)) => {
            error.as_database_error().is_some_and(|error| error.message().contains("database is locked"))
        }
        _ => false,
    }
}

/// Whether the database was unreachable or unable, rather than unwilling.
fn is_away(error: &DbErr) -> bool {
    match error {
        DbErr::ConnectionAcquire(_) | DbErr::Conn(RuntimeErr::Internal(_)) => true,
        DbErr::Conn(RuntimeErr::SqlxError(error))
        | DbErr::Exec(RuntimeErr::SqlxError(error))
        | DbErr::Query(RuntimeErr::SqlxError(error)) => is_sqlx_away(error),
        _ => false,
    }
}

fn is_sqlx_away(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::BeginFailed => true,
        // What came from the network makes no sense, so the connection is of no use; but a statement with too many values
        // is reported in the same way, before anything is sent.
        sqlx::Error::Protocol(message) => !message.contains("too many"),
        sqlx::Error::Database(error) => match error.try_downcast_ref::<PgDatabaseError>() {
            // A fatal error ends the connection, not the statement: the server stops, starts, or has no place for it.
            Some(postgres) => {
                matches!(postgres.severity(), PgSeverity::Fatal | PgSeverity::Panic)
                    || is_away_in_postgres(postgres.code())
            }
            None => error.code().and_then(|code| code.parse().ok()).is_some_and(is_away_in_sqlite),
        },
        _ => false,
    }
}

/// Whether the database's disk is full.
fn is_full(error: &DbErr) -> bool {
    let (DbErr::Conn(RuntimeErr::SqlxError(error))
    | DbErr::Exec(RuntimeErr::SqlxError(error))
    | DbErr::Query(RuntimeErr::SqlxError(error))) = error
    else {
        return false;
    };
    let sqlx::Error::Database(error) = &**error else { return false };
    match error.try_downcast_ref::<PgDatabaseError>() {
        Some(postgres) => postgres.code() == "53100",
        // SQLITE_FULL; SQLITE_IOERR_SHMSIZE: the file beside the log does not fit either.
        None => error.code().and_then(|code| code.parse::<i32>().ok()).is_some_and(|code| code == 13 || code == 4874),
    }
}

/// By PostgreSQL's SQLSTATE.
fn is_away_in_postgres(code: &str) -> bool {
    match code {
        // A standby that was connected to in a failover.
        "25006"
        // Transactions that took too long.
        | "25P03" | "25P04"
        // Objects that somebody else has locked or uses.
        | "55006" | "55P03"
        // No permission: an operator gives it back, and nothing is lost meanwhile.
        | "42501"
        // The database is being made anew.
        | "3D000" => true,
        // An integrity constraint is broken at the commit.
        "40002" => false,
        // Connections; logins; transactions given up; disk, memory and connections; operators; the operating system.
        _ => ["08", "28", "40", "53", "57", "58"].iter().any(|class| code.starts_with(class)),
    }
}

/// By SQLite's extended result code, whose low byte is the primary one.
fn is_away_in_sqlite(code: i32) -> bool {
    // PERM, BUSY, LOCKED, NOMEM, READONLY, INTERRUPT, IOERR, FULL, CANTOPEN, PROTOCOL (of locks), SCHEMA (it has changed
    // under the statement), NOLFS: of the file, its disk, or its other users.
    matches!(code & 0xff, 3 | 5 | 6 | 7 | 8 | 9 | 10 | 13 | 14 | 15 | 17 | 22)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgres_is_away_or_refuses() {
        for away in [
            "08006", "08P01", "25006", "25P03", "28P01", "3D000", "40001", "40P01", "42501", "53100", "53200", "53300",
            "55P03", "57014", "57P01", "57P03", "58030",
        ] {
            assert!(is_away_in_postgres(away), "{away}");
        }
        for refused in [
            "0A000", "21000", "22001", "22003", "22021", "22P02", "22P05", "23502", "23503", "23505", "23514", "25P02",
            "40002", "42601", "42703", "42P01", "54000", "XX000",
        ] {
            assert!(!is_away_in_postgres(refused), "{refused}");
        }
    }

    #[test]
    fn sqlite_is_away_or_refuses() {
        // SQLITE_BUSY_SNAPSHOT, SQLITE_IOERR_FSYNC, SQLITE_FULL, SQLITE_READONLY_DBMOVED, SQLITE_CANTOPEN.
        for away in [5, 517, 1034, 13, 1032, 14, 7] {
            assert!(is_away_in_sqlite(away), "{away}");
        }
        // SQLITE_ERROR, SQLITE_CONSTRAINT_UNIQUE, SQLITE_MISMATCH, SQLITE_TOOBIG, SQLITE_RANGE, SQLITE_CORRUPT.
        for refused in [1, 2067, 20, 18, 25, 11] {
            assert!(!is_away_in_sqlite(refused), "{refused}");
        }
    }

    #[tokio::test]
    async fn a_full_disk_is_named() {
        use sea_orm::ConnectionTrait;
        let mut options = sea_orm::ConnectOptions::new("sqlite::memory:");
        options.max_connections(1);
        let database = sea_orm::Database::connect(options).await.unwrap();
        let full = database
            .execute_unprepared(
                "PRAGMA max_page_count = 3; CREATE TABLE a (b BLOB); INSERT INTO a VALUES (zeroblob(100000))",
            )
            .await
            .unwrap_err();
        assert_eq!(StoreError::from(full).obstacle(), Some("no space is left on the database's disk"));
        let wrong = database.execute_unprepared("SELECT nothing FROM nowhere").await.unwrap_err();
        assert_eq!(StoreError::Unavailable(wrong).obstacle(), None);
    }

    #[test]
    fn what_did_not_reach_the_database_is_no_refusal() {
        let io = || sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
        for away in [
            DbErr::Query(RuntimeErr::SqlxError(io().into())),
            DbErr::Exec(RuntimeErr::SqlxError(sqlx::Error::PoolTimedOut.into())),
            DbErr::Conn(RuntimeErr::Internal("no answer from PostgreSQL within 15 s".into())),
            DbErr::ConnectionAcquire(sea_orm::ConnAcquireErr::Timeout),
        ] {
            assert!(!StoreError::from(away).is_final());
        }
        let too_many = sqlx::Error::Protocol("too many arguments for query: 70000".into());
        for refused in [
            DbErr::Query(RuntimeErr::SqlxError(too_many.into())),
            DbErr::Type("a null value was encountered".into()),
            DbErr::RecordNotUpdated,
        ] {
            assert!(StoreError::from(refused).is_final());
        }
    }
}
