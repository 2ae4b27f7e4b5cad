//! Objects that no row names: noted in the transaction that lets go of them, deleted later. An upload's object is noted
//! before its first byte is written, so an interrupted upload leaves nothing behind even after `kill -9`.

use std::time::Duration;

use sea_orm::{ColumnTrait, ConnectionTrait, EntityTrait, QueryFilter, QuerySelect, Set, sea_query::OnConflict};

use super::{Store, StoreError, again::again, entity::garbage, now};
use crate::domain::Timestamp;

/// How long readers that have begun may go on reading an object that is no longer named.
const GRACE: Duration = Duration::from_secs(600);
/// How long an upload may take from its first byte to its last.
const UPLOAD: Duration = Duration::from_secs(24 * 3_600);

impl Store {
    /// Notes an object that is about to be written and that nothing names yet.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn begin_upload(&self, key: &str) -> Result<(), StoreError> {
        let at = now(self.read()).await?;
        again(|| note(&self.inner.write, [key.to_owned()], at.plus(UPLOAD))).await
    }

    /// Lets the next sweep delete an object whose upload broke off.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn abandon_upload(&self, key: &str) -> Result<(), StoreError> {
        again(|| self.abandon_upload_once(key)).await
    }

    async fn abandon_upload_once(&self, key: &str) -> Result<(), StoreError> {
        garbage::Entity::delete_by_id(key).exec(&self.inner.write).await?;
        let at = now(self.read()).await?;
        note(&self.inner.write, [key.to_owned()], at).await
    }

    /// Objects to delete now, at most `limit`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn due_garbage(&self, limit: u64) -> Result<Vec<String>, StoreError> {
        let at = now(self.read()).await?;
        Ok(garbage::Entity::find()
            .select_only()
            .column(garbage::Column::ObjectKey)
            .filter(garbage::Column::DeleteAfter.lte(at.0))
            .limit(limit)
            .into_tuple()
            .all(self.read())
            .await?)
    }

    /// Forgets objects that have been deleted.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forget_garbage(&self, keys: &[String]) -> Result<(), StoreError> {
        again(|| self.forget_garbage_once(keys)).await
    }

    async fn forget_garbage_once(&self, keys: &[String]) -> Result<(), StoreError> {
        garbage::Entity::delete_many()
            .filter(garbage::Column::ObjectKey.is_in(keys.iter().cloned()))
            .exec(&self.inner.write)
            .await?;
        Ok(())
    }
}

/// Notes objects that nothing names any more.
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
        .map(|key| garbage::ActiveModel { object_key: Set(key), delete_after: Set(delete_after.0) })
        .collect();
    for some in rows.chunks(1_000) {
        garbage::Entity::insert_many(some.to_vec())
            .on_conflict(OnConflict::column(garbage::Column::ObjectKey).do_nothing().to_owned())
            .exec_without_returning(connection)
            .await?;
    }
    Ok(())
}
