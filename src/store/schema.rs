//! Finds the database's schema, and whether this program may run on it.
//!
//! A release's migrations only add (`tidemill_migrations::requires`). So a program that finds migrations newer than itself
//! runs on them, unless one of them has said that it may not: nodes of two releases share a database while one is rolled
//! out, and a node of the earlier one may be restarted meanwhile.

use std::time::Duration;

use sea_orm::{ConnectionTrait, Statement};
use tidemill_migrations::{Migrator, MigratorTrait, requires};

use super::{Store, StoreError, write::has_code};

/// PostgreSQL's advisory lock for migrating: the bytes of "tidemill" as a number.
const MIGRATION_LOCK: i64 = i64::from_be_bytes(*b"tidemill");
/// How long a migration waits for one table while nodes of the release before work on it: everything that comes after it
/// waits behind it meanwhile. Shorter than PostgreSQL's `deadlock_timeout` (1 s), so that it is the migration that gives
/// way, and not a node.
const LOCK_WAIT: &str = "500ms";
/// Attempts in all, and the longest pause between two: about a minute.
const TRIES: u32 = 60;
const PAUSE: Duration = Duration::from_secs(1);
/// PostgreSQL: lock_not_available, deadlock_detected, serialization_failure. SQLite: SQLITE_BUSY, _BUSY_RECOVERY,
/// _BUSY_SNAPSHOT.
const IN_THE_WAY: [&str; 6] = ["55P03", "40P01", "40001", "5", "261", "517"];
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What to do with a database at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Apply what is pending, if anything.
    Migrate,
    /// A newer program has migrated it: leave it as it is.
    Leave,
}

/// Decides by the migrations that this program knows, those that the database has, and the one that it requires to be known.
///
/// # Errors
/// Why this program must not run on it, and what to do.
fn judge(known: &[String], applied: &[String], required: Option<&str>) -> Result<Step, String> {
    if let Some(required) = required.filter(|required| known.iter().all(|one| one != required)) {
        return Err(format!(
            "the database was migrated by a newer tidemill, and {required} has changed what version {VERSION} relies on: \
             start the newer version; to go back, restore the backup made before the upgrade"
        ));
    }
    let unknown: Vec<&str> = applied.iter().filter(|one| !known.contains(one)).map(String::as_str).collect();
    let pending: Vec<&str> = known.iter().filter(|one| !applied.contains(one)).map(String::as_str).collect();
    match (unknown.is_empty(), pending.is_empty()) {
        (true, _) => Ok(Step::Migrate),
        (false, true) => Ok(Step::Leave),
        (false, false) => Err(format!(
            "the database has migrations that tidemill {VERSION} does not know ({}) and lacks others ({}): neither an older \
             nor a newer version has made it; is this the right database?",
            unknown.join(", "),
            pending.join(", ")
        )),
    }
}

fn known() -> Vec<String> {
    Migrator::migrations().iter().map(|one| one.name().to_owned()).collect()
}

/// The migrations that the database has, oldest first.
async fn applied<C: ConnectionTrait>(connection: &C) -> Result<Vec<String>, StoreError> {
    Ok(Migrator::get_migration_models(connection).await?.into_iter().map(|one| one.version).collect())
}

impl Store {
    /// All migrations in one transaction, one process at a time: nodes start together on an empty database. Nodes that run
    /// on it may be in the way, and it in theirs: then it gives way and is tried again.
    pub(super) async fn migrated(self) -> Result<Self, StoreError> {
        for _ in 1..TRIES {
            match self.migrate_once().await {
                Err(StoreError::Unavailable(error)) if has_code(&error, &IN_THE_WAY) => {
                    tracing::info!(%error, "other nodes block a migration; trying again");
                    tokio::time::sleep(PAUSE.mul_f64(rand::random())).await;
                }
                done => return done.map(|()| self),
            }
        }
        self.migrate_once().await.map(|()| self)
    }

    async fn migrate_once(&self) -> Result<(), StoreError> {
        let tx = self.begin().await?;
        if !self.is_sqlite() {
            // A process that waited for the lock must see what was done meanwhile, whatever isolation the database is
            // set to.
            tx.execute_unprepared("SET TRANSACTION ISOLATION LEVEL READ COMMITTED").await?;
            // Without a bound, as the migrations: whoever migrates a large database takes its time.
            tx.unbounded().execute_unprepared(&format!("SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")).await?;
            // Not for the lock before it, for that reason.
            tx.execute_unprepared(&format!("SET LOCAL lock_timeout = '{LOCK_WAIT}'")).await?;
        }
        let (known, applied) = (known(), applied(&tx).await?);
        let required = if applied.iter().all(|one| one != requires::SINCE) {
            None
        } else {
            let sql = format!("SELECT migration FROM {}", requires::TABLE);
            let row = tx.query_one_raw(Statement::from_string(tx.get_database_backend(), sql)).await?;
            row.map(|row| row.try_get::<String>("", "migration")).transpose()?
        };
        match judge(&known, &applied, required.as_deref()).map_err(StoreError::Open)? {
            Step::Migrate => Migrator::up(tx.unbounded(), None).await?,
            Step::Leave => tracing::info!(
                newest = applied.last(),
                version = VERSION,
                "a newer tidemill has migrated the database; this one may still run on it"
            ),
        }
        tx.commit().await?;
        Ok(())
    }

    /// The migrations that this program knows and those that a newer one has applied, and whether each is applied.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`].
    pub async fn migrations(&self) -> Result<Vec<(String, bool)>, StoreError> {
        let (known, applied) = (known(), applied(&self.inner.write).await?);
        let newer: Vec<_> = applied.iter().filter(|one| !known.contains(one)).map(|one| (one.clone(), true)).collect();
        let all = known.into_iter().map(|one| {
            let is_applied = applied.contains(&one);
            (one, is_applied)
        });
        Ok(all.chain(newer).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn older_programs_run_on_what_newer_ones_have_added_to() {
        let judge = |known: &str, applied: &str, required| judge(&names(known), &names(applied), required);
        assert_eq!(judge("a b c", "", None), Ok(Step::Migrate));
        assert_eq!(judge("a b c", "a b", None), Ok(Step::Migrate));
        assert_eq!(judge("a b c", "a b c", Some("b")), Ok(Step::Migrate));
        assert_eq!(judge("a b c", "a b c d", None), Ok(Step::Leave));
        assert_eq!(judge("a b c", "a b c d", Some("c")), Ok(Step::Leave));
        let refusal = judge("a b c", "a b c d", Some("d")).unwrap_err();
        assert!(refusal.contains("and d has changed") && refusal.contains("start the newer version"), "{refusal}");
        let refusal = judge("a b c", "a b x", None).unwrap_err();
        assert!(refusal.contains("(x)") && refusal.contains("(c)"), "{refusal}");
    }
}
