//! Leases of periodic work: which node does which sweep. And how often an object could not be deleted, so that it is tried
//! less and less often.

use sea_orm_migration::prelude::*;

use crate::columns;

const TABLE: &str = "sweeps";
const GARBAGE: &str = "garbage";
/// How often the object was taken for deletion.
const TRIES: &str = "tries";

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        columns::Table::new(TABLE)
            .text("name")
            .opt_text("holder")
            .big("lease_expires_at")
            .big("created_at")
            // When the sweep last had nothing left to do.
            .opt_big("caught_up_at")
            .key(&["name"])
            .create(manager)
            .await?;
        if !manager.has_column(GARBAGE, TRIES).await? {
            let tries = ColumnDef::new(Alias::new(TRIES)).integer().not_null().default(0).take();
            let add = Table::alter().table(Alias::new(GARBAGE)).add_column(tries).to_owned();
            manager.alter_table(add).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let drop = Table::alter().table(Alias::new(GARBAGE)).drop_column(Alias::new(TRIES)).to_owned();
        manager.alter_table(drop).await?;
        columns::Table::drop(manager, &[TABLE]).await
    }
}
