//! Which blob store holds the objects that the rows name.

use sea_orm_migration::prelude::*;

use crate::columns::Table;

const TABLE: &str = "blob_store";

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // No row, or the one with id 1.
        Table::new(TABLE).int("id").text("store_id").key(&["id"]).create(manager).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        Table::drop(manager, &[TABLE]).await
    }
}
