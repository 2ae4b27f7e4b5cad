//! Objects that no row names any more: recorded in the transaction that releases them, and deleted later. An upload's
//! object is recorded before its first byte is written, so an interrupted upload leaves nothing behind even after `kill
//! -9`.

use std::time::Duration;

use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseBackend, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Set, Statement,
    sea_query::OnConflict,
};

use super::{Store, StoreError, convert, entity::garbage, now, write::commit};
use crate::domain::Timestamp;

/// Time for readers that have begun to finish reading a released object.
const GRACE: Duration = Duration::from_secs(600);
/// Time until an object that could not be deleted is offered again: 5 minutes after the first try. It doubles each
/// time, up to [`DOUBLINGS`] times.
const TAKEN: Duration = Duration::from_secs(300);
/// The longest time is 2^6 times as long: 5 hours and 20 minutes.
const DOUBLINGS: u32 = 6;
/// The longest time of an upload.
const UPLOAD: Duration = Duration::from_secs(24 * 3_600);

impl Store {
    /// Records an object that is about to be written and that nothing names yet.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn begin_upload(&self, key: &str) -> Result<(), StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            note(&tx, [key.to_owned()], at.plus(UPLOAD)).await?;
            commit(tx, ())
        })
        .await
    }

    /// Makes an object due whose upload broke off.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn abandon_upload(&self, key: &str) -> Result<(), StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let noted =
                garbage::ActiveModel { object_key: Set(key.to_owned()), delete_after: Set(at.0), tries: Set(0) };
            garbage::Entity::insert(noted)
                .on_conflict(
                    OnConflict::column(garbage::Column::ObjectKey)
                        .update_column(garbage::Column::DeleteAfter)
                        .to_owned(),
                )
                .exec_without_returning(&tx)
                .await?;
            commit(tx, ())
        })
        .await
    }

    /// At most `limit` objects that are due for deletion, the longest due first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn due_garbage(&self, limit: u64) -> Result<Vec<String>, StoreError> {
        let at = now(self.read()).await?;
        Ok(garbage::Entity::find()
            .select_only()
            .column(garbage::Column::ObjectKey)
            .filter(garbage::Column::DeleteAfter.lte(at.0))
            .order_by_asc(garbage::Column::DeleteAfter)
            .limit(limit)
            .into_tuple()
            .all(self.read())
            .await?)
    }

    /// Takes at most `limit` objects to delete, the longest due first. Unless they are forgotten, they are offered
    /// again after a while, each time after a longer one. So nodes don't take the same ones, and objects that can't be
    /// deleted block no others.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn take_garbage(&self, limit: u64) -> Result<Vec<String>, StoreError> {
        // Usually there are none, and SQLite's only writer should not be used for that.
        if self.due_garbage(1).await?.is_empty() {
            return Ok(Vec::new());
        }
        let backend = self.read().get_database_backend();
        let due = "SELECT object_key FROM garbage WHERE delete_after <= $2 ORDER BY delete_after LIMIT $3";
        let of_these = match backend {
            DatabaseBackend::Sqlite => format!("IN ({due})"),
            // As an array it is evaluated once, whatever the plan.
            _ => format!("= ANY(ARRAY({due} FOR UPDATE SKIP LOCKED))"),
        };
        let wait = convert::micros(TAKEN);
        let sql = &format!(
            "UPDATE garbage SET delete_after = $2 + ($1 << CASE WHEN tries < {DOUBLINGS} THEN tries ELSE {DOUBLINGS} END), \
             tries = tries + 1 WHERE object_key {of_these} RETURNING object_key"
        );
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let values = [wait.into(), at.0.into(), limit.into()];
            let rows = tx.query_all_raw(Statement::from_sql_and_values(backend, sql, values)).await?;
            let keys = rows.iter().map(|row| row.try_get("", "object_key")).collect::<Result<_, _>>()?;
            commit(tx, keys)
        })
        .await
    }

    /// Forgets objects that have been deleted.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forget_garbage(&self, keys: &[String]) -> Result<(), StoreError> {
        self.write(|tx| async move {
            let these = garbage::Column::ObjectKey.is_in(keys.iter().cloned());
            garbage::Entity::delete_many().filter(these).exec(&tx).await?;
            commit(tx, ())
        })
        .await
    }
}

/// Records objects that nothing names any more.
pub(super) async fn add<C: ConnectionTrait>(
    tx: &C,
    keys: impl IntoIterator<Item = String>,
    at: Timestamp,
) -> Result<(), StoreError> {
    note(tx, keys, at.plus(GRACE)).await
}

async fn note<C: ConnectionTrait>(
    connection: &C,
    keys: impl IntoIterator<Item = String>,
    delete_after: Timestamp,
) -> Result<(), StoreError> {
    let rows: Vec<_> = keys
        .into_iter()
        .map(|key| garbage::ActiveModel { object_key: Set(key), delete_after: Set(delete_after.0), tries: Set(0) })
        .collect();
    for some in rows.chunks(1_000) {
        garbage::Entity::insert_many(some.to_vec())
            .on_conflict(OnConflict::column(garbage::Column::ObjectKey).do_nothing().to_owned())
            .exec_without_returning(connection)
            .await?;
    }
    Ok(())
}
