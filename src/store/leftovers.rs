//! Objects of results that no row names: a server was killed after it had written one, or lost its lease, or its blob store
//! wrote one and said that it had not. The next claim of the segment deletes what older epochs left; what is left when the
//! batch has ended is found here, by a look at the batch's folder.
//!
//! After a batch has ended nothing of it is committed, so an object that no row names then will never be named.

use std::time::Duration;

use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseBackend, EntityTrait, QueryFilter, QuerySelect, Set, Statement,
    sea_query::OnConflict,
};

use super::{
    Store, StoreError, convert,
    entity::{batch, garbage, leftover, part, segment},
    now,
    write::commit,
};
use crate::domain::{BatchId, Timestamp, result_keys::segment_of};

/// How long after the end of a batch its folder is looked through. A server that was cut off or frozen may write an object
/// that late; one that is frozen for longer notes its batch once more when it finds that it has lost its lease.
const AFTER: Duration = Duration::from_secs(3_600);
/// Time until a batch that was taken is offered again, while its folder is searched.
const TAKEN: Duration = Duration::from_secs(900);

impl Store {
    /// Records that a batch may have objects that no row names.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn note_leftovers(&self, of: &BatchId) -> Result<(), StoreError> {
        self.write(|tx| async move {
            note(&tx, of.as_str(), now(&tx).await?).await?;
            commit(tx, ())
        })
        .await
    }

    /// Takes at most `limit` ended batches whose folders are to be searched. Unless they are forgotten, they are
    /// offered again after a while, so that one node searches each, and another one if that node dies.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn take_leftovers(&self, limit: u64) -> Result<Vec<BatchId>, StoreError> {
        let at = now(self.read()).await?;
        // Usually there are none, and SQLite's only writer should not be used for that.
        let due = leftover::Entity::find().filter(leftover::Column::LookAfter.lte(at.0)).one(self.read()).await?;
        if due.is_none() {
            return Ok(Vec::new());
        }
        let backend = self.read().get_database_backend();
        let due = "SELECT batch_id FROM leftovers WHERE look_after <= $2 ORDER BY look_after LIMIT $3";
        let of_these = match backend {
            DatabaseBackend::Sqlite => format!("IN ({due})"),
            // As an array it is evaluated once, whatever the plan.
            _ => format!("= ANY(ARRAY({due} FOR UPDATE SKIP LOCKED))"),
        };
        let sql = &format!("UPDATE leftovers SET look_after = $1 WHERE batch_id {of_these} RETURNING batch_id");
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let values = [at.plus(TAKEN).0.into(), at.0.into(), i64::try_from(limit).unwrap_or(i64::MAX).into()];
            let rows = tx.query_all_raw(Statement::from_sql_and_values(backend, sql, values)).await?;
            let ids = rows.iter().map(|row| Ok(BatchId::from_text(row.try_get::<String>("", "batch_id")?)));
            commit(tx, ids.collect::<Result<_, StoreError>>()?)
        })
        .await
    }

    /// Records that a batch's folder has been searched. A record made since then stays.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forget_leftovers(&self, of: &BatchId) -> Result<(), StoreError> {
        self.write(|tx| async move {
            let taken = leftover::Column::LookAfter.lte(now(&tx).await?.plus(TAKEN).0);
            leftover::Entity::delete_by_id(of.as_str()).filter(taken).exec(&tx).await?;
            commit(tx, ())
        })
        .await
    }

    /// Those of these objects of a batch's folder that no row names and none will; none while the batch has not ended.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn unnamed_objects(&self, of: &BatchId, found: Vec<String>) -> Result<Vec<String>, StoreError> {
        // Before the names are read: what is committed later than this would be taken for unnamed.
        let status: Option<String> = batch::Entity::find_by_id(of.as_str())
            .select_only()
            .column(batch::Column::Status)
            .into_tuple()
            .one(self.read())
            .await?;
        match status {
            Some(status) if convert::status(&status)?.is_terminal() => {}
            // The batch was deleted: nothing of it will be named.
            None => {}
            Some(_) => return Ok(Vec::new()),
        }
        // An object with another kind of name was not written by a run.
        let found: Vec<(String, i32)> =
            found.into_iter().filter_map(|key| Some((segment_of(of, &key)?, key))).map(|(i, k)| (k, i)).collect();
        let mut segments: Vec<i32> = found.iter().map(|(_, index)| *index).collect();
        segments.dedup();
        let mut named: Vec<String> = Vec::new();
        // In the order in which a name may move from one to the next.
        for some in segments.chunks(1_000) {
            let of_parts = part::Entity::find()
                .select_only()
                .column(part::Column::ObjectKey)
                .filter(part::Column::BatchId.eq(of.as_str()))
                .filter(part::Column::SegmentIdx.is_in(some.iter().copied()));
            named.extend(of_parts.into_tuple::<String>().all(self.read()).await?);
            let of_segments = segment::Entity::find()
                .select_only()
                .column(segment::Column::ObjectKey)
                .filter(segment::Column::BatchId.eq(of.as_str()))
                .filter(segment::Column::Idx.is_in(some.iter().copied()))
                .filter(segment::Column::ObjectKey.is_not_null());
            named.extend(of_segments.into_tuple::<String>().all(self.read()).await?);
        }
        let keys: Vec<&str> = found.iter().map(|(key, _)| key.as_str()).collect();
        for some in keys.chunks(1_000) {
            // Readers may still use these; they are deleted when due.
            let let_go = garbage::Entity::find()
                .select_only()
                .column(garbage::Column::ObjectKey)
                .filter(garbage::Column::ObjectKey.is_in(some.iter().copied()));
            named.extend(let_go.into_tuple::<String>().all(self.read()).await?);
        }
        let named: std::collections::HashSet<String> = named.into_iter().collect();
        Ok(found.into_iter().map(|(key, _)| key).filter(|key| !named.contains(key)).collect())
    }
}

/// Notes a batch, to be looked at when what may still be written has been written.
pub(super) async fn note<C: ConnectionTrait>(tx: &C, batch: &str, at: Timestamp) -> Result<(), StoreError> {
    let row = leftover::ActiveModel { batch_id: Set(batch.to_owned()), look_after: Set(at.plus(AFTER).0) };
    leftover::Entity::insert(row)
        .on_conflict(
            OnConflict::column(leftover::Column::BatchId).update_column(leftover::Column::LookAfter).to_owned(),
        )
        .exec_without_returning(tx)
        .await?;
    Ok(())
}
