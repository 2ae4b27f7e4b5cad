//! The queue as clients see it: who goes before whom, and whose turn it is.

use std::collections::HashMap;

use sea_orm::{
    ColumnTrait, ConnectionTrait, EntityTrait, PaginatorTrait, QueryFilter, QuerySelect, Statement,
    sea_query::{Expr, ExprTrait},
};

use super::{
    Store, StoreError,
    claims::LEASED,
    entity::{batch, segment},
    now,
};
use crate::domain::{BatchId, BatchStatus};

impl Store {
    /// Of these batches, those that wait or run, each with how many such batches go before it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn queue_positions(&self, ids: &[BatchId]) -> Result<HashMap<BatchId, i64>, StoreError> {
        let backend = self.read().get_database_backend();
        let mut found = HashMap::with_capacity(ids.len());
        for some in ids.chunks(1_000) {
            let places = (2..2 + some.len()).map(|at| format!("${at}")).collect::<Vec<_>>().join(", ");
            // One pass over the unfinished batches, however many are asked for. RANK leaves those of the same priority
            // and deadline beside each other, as queue_position does.
            let sql = format!(
                "SELECT id, place FROM (SELECT id, RANK() OVER (ORDER BY priority DESC, expires_at ASC) - 1 AS place \
                 FROM batches WHERE status = $1) AS queue WHERE id IN ({places})"
            );
            let values = std::iter::once(BatchStatus::InProgress.as_str().into())
                .chain(some.iter().map(|id| id.as_str().to_owned().into()));
            for row in self.read().query_all_raw(Statement::from_sql_and_values(backend, sql, values)).await? {
                let id: String = row.try_get("", "id")?;
                found.insert(BatchId::from_text(id), row.try_get("", "place")?);
            }
        }
        Ok(found)
    }

    /// How many requests without a result an owner's unfinished batches have.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn queued_lines(&self, owner: &str) -> Result<i64, StoreError> {
        queued_lines_of(self.read(), owner).await
    }

    /// Whether some node runs a segment of this batch.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn is_running(&self, id: &BatchId) -> Result<bool, StoreError> {
        let at = now(self.read()).await?;
        let running = segment::Entity::find()
            .filter(segment::Column::BatchId.eq(id.as_str()))
            .filter(segment::Column::State.eq(LEASED))
            .filter(Expr::col(segment::Column::LeaseExpiresAt).gte(at.0))
            .count(self.read())
            .await?;
        Ok(running > 0)
    }
}

/// How many requests without a result an owner's unfinished batches have.
pub(super) async fn queued_lines_of<C: ConnectionTrait>(connection: &C, owner: &str) -> Result<i64, StoreError> {
    let unfinished = BatchStatus::ALL.into_iter().filter(|status| !status.is_terminal()).map(BatchStatus::as_str);
    let left: Vec<(i64, i64, i64)> = batch::Entity::find()
        .select_only()
        .columns([batch::Column::Total, batch::Column::Completed, batch::Column::Failed])
        .filter(batch::Column::Owner.eq(owner))
        .filter(batch::Column::Status.is_in(unfinished))
        .into_tuple()
        .all(connection)
        .await?;
    Ok(left.into_iter().map(|(total, completed, failed)| total - completed - failed).sum())
}
