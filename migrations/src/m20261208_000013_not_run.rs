//! How many requests of a batch were not run because it was cancelled or expired, and the indexes for lists of the batches
//! of one endpoint. A server of the release before this does not count them: they are failed ones to it.

use sea_orm_migration::prelude::*;

use crate::columns::index;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

const TABLES: [&str; 2] = ["batches", "parts"];
const COLUMN: &str = "not_run";
const INDEXES: [&[&str]; 2] = [&["endpoint", "id"], &["owner", "endpoint", "id"]];

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in TABLES {
            if !manager.has_column(table, COLUMN).await? {
                let new = ColumnDef::new(Alias::new(COLUMN)).big_integer().not_null().default(0).take();
                let add = Table::alter().table(Alias::new(table)).add_column(new).to_owned();
                manager.alter_table(add).await?;
            }
        }
        for columns in INDEXES {
            index(manager, "batches", columns, false).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for columns in INDEXES {
            let name = format!("batches_by_{}", columns.join("_"));
            manager.drop_index(Index::drop().name(name).table(Alias::new("batches")).to_owned()).await?;
        }
        for table in TABLES {
            let drop = Table::alter().table(Alias::new(table)).drop_column(Alias::new(COLUMN)).to_owned();
            manager.alter_table(drop).await?;
        }
        Ok(())
    }
}
