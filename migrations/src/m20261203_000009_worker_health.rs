//! A worker's own health path and interval. None: the server's settings, which suits servers of the release before this.

use sea_orm_migration::prelude::*;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

const TABLE: &str = "workers";
/// A path or "none"; microseconds.
const PATH: &str = "health_path";
const INTERVAL: &str = "health_interval";

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let path = ColumnDef::new(Alias::new(PATH)).text().null().take();
        let interval = ColumnDef::new(Alias::new(INTERVAL)).big_integer().null().take();
        for (name, column) in [(PATH, path), (INTERVAL, interval)] {
            if !manager.has_column(TABLE, name).await? {
                let add = Table::alter().table(Alias::new(TABLE)).add_column(column).to_owned();
                manager.alter_table(add).await?;
            }
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for name in [PATH, INTERVAL] {
            let drop = Table::alter().table(Alias::new(TABLE)).drop_column(Alias::new(name)).to_owned();
            manager.alter_table(drop).await?;
        }
        Ok(())
    }
}
