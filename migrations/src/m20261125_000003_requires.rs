//! Which programs may run on the database.

use sea_orm_migration::prelude::*;

use crate::{columns::Table, requires::TABLE};

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // No row, or the one with id 1.
        Table::new(TABLE).int("id").text("migration").key(&["id"]).create(manager).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        Table::drop(manager, &[TABLE]).await
    }
}
