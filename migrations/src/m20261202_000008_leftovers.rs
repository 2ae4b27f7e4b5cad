//! Batches whose objects are to be compared with the rows that name them, once the batch has ended: a server that was
//! killed or lost its lease may have written objects that it did not live to name.

use sea_orm_migration::prelude::*;

use crate::columns::{Table, index};

const TABLE: &str = "leftovers";

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        Table::new(TABLE).text("batch_id").big("look_after").key(&["batch_id"]).create(manager).await?;
        index(manager, TABLE, &["look_after"], false).await?;
        // Batches that have ended already.
        let fill = "INSERT INTO leftovers (batch_id, look_after) SELECT id, 0 FROM batches \
                    WHERE status IN ('completed', 'failed', 'expired', 'cancelled') ON CONFLICT DO NOTHING";
        manager.get_connection().execute_unprepared(fill).await?;
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        Table::drop(manager, &[TABLE]).await
    }
}
