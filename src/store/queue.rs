//! The queue as clients see it: the order of batches, and which ones run.

use std::collections::{HashMap, HashSet};

use sea_orm::{
    ColumnTrait, ConnectionTrait, EntityTrait, QueryFilter, QuerySelect, Statement,
    sea_query::{Expr, ExprTrait},
};

use super::{
    Store, StoreError,
    claims::LEASED,
    entity::{batch, segment},
    now,
    parameters::{ids_parameter, texts_of},
};
use crate::domain::{BatchId, BatchStatus, Owner};

impl Store {
    /// Those of these batches that wait or run, each with the number of such batches ahead of it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn queue_positions(&self, ids: &[BatchId]) -> Result<HashMap<BatchId, i64>, StoreError> {
        let backend = self.read().get_database_backend();
        // One pass over the unfinished batches, however many are asked for. RANK leaves those of the same priority and
        // deadline beside each other, as queue_position does.
        let sql = format!(
            "SELECT id, place FROM (SELECT id, RANK() OVER (ORDER BY priority DESC, expires_at ASC) - 1 AS place \
             FROM batches WHERE status = $1) AS queue WHERE id IN {}",
            texts_of(backend, 2)
        );
        let values = [BatchStatus::InProgress.as_str().into(), ids_parameter(ids)?];
        let mut found = HashMap::with_capacity(ids.len());
        for row in self.read().query_all_raw(Statement::from_sql_and_values(backend, sql, values)).await? {
            let id: String = row.try_get("", "id")?;
            found.insert(BatchId::from_text(id), row.try_get("", "place")?);
        }
        Ok(found)
    }

    /// The number of requests without a result in an owner's unfinished batches.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn queued_lines(&self, owner: &Owner) -> Result<i64, StoreError> {
        queued_lines_of(self.read(), owner).await
    }

    /// The batches of which a node runs a segment: some hundreds at most per node, so they are read at once.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn running(&self) -> Result<HashSet<BatchId>, StoreError> {
        let at = now(self.read()).await?;
        let running: Vec<String> = segment::Entity::find()
            .select_only()
            .column(segment::Column::BatchId)
            .distinct()
            .filter(segment::Column::State.eq(LEASED))
            .filter(Expr::col(segment::Column::LeaseExpiresAt).gte(at.0))
            .into_tuple()
            .all(self.read())
            .await?;
        Ok(running.into_iter().map(BatchId::from_text).collect())
    }
}

/// The number of requests without a result in an owner's unfinished batches.
pub(super) async fn queued_lines_of<C: ConnectionTrait>(connection: &C, owner: &Owner) -> Result<i64, StoreError> {
    let unfinished = BatchStatus::ALL.into_iter().filter(|status| !status.is_terminal()).map(BatchStatus::as_str);
    let left: Vec<(i64, i64, i64)> = batch::Entity::find()
        .select_only()
        .columns([batch::Column::Total, batch::Column::Completed, batch::Column::Failed])
        .filter(batch::Column::Owner.eq(owner.as_str()))
        .filter(batch::Column::Status.is_in(unfinished))
        .into_tuple()
        .all(connection)
        .await?;
    Ok(left.into_iter().map(|(total, completed, failed)| total - completed - failed).sum())
}
