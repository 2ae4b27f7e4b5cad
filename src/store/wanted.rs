//! The models that unfinished batches name, which a gateway that lists patterns may have to serve.

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, QuerySelect, sea_query::Query};

use super::{
    Store, StoreError,
    entity::{batch, batch_model},
};
use crate::domain::BatchStatus;

/// The most names read.
const MOST: u64 = 10_000;

impl Store {
    /// The models of batches that still run requests, each once.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn wanted_models(&self) -> Result<Vec<String>, StoreError> {
        let unfinished = Query::select()
            .column(batch::Column::Id)
            .from(batch::Entity)
            .and_where(batch::Column::Status.eq(BatchStatus::InProgress.as_str()))
            .to_owned();
        Ok(batch_model::Entity::find()
            .select_only()
            .column(batch_model::Column::Model)
            .distinct()
            .filter(batch_model::Column::BatchId.in_subquery(unfinished))
            .order_by_asc(batch_model::Column::Model)
            .limit(MOST)
            .into_tuple::<String>()
            .all(self.read())
            .await?)
    }
}
