//! Files that are hidden until no batch reads them any more, how long a batch's result files stay, and the bad lines of
//! files that were kept all the same. A server of the release before this shows hidden files, keeps result files for ever,
//! and completes batches of bad files at once, without a line.

use sea_orm_migration::prelude::*;

use crate::columns::index;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

/// When the file was hidden. The sweep deletes it once no unfinished batch reads it.
const FILES: (&str, &str) = ("files", "deleted_at");
/// Microseconds from the end of the batch to the expiry of its result files.
const BATCHES: (&str, &str) = ("batches", "output_expires_after");
/// JSON: the first bad lines, as a batch's errors.
const PROBLEMS: (&str, &str) = ("files", "problems");

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for (table, column) in [FILES, BATCHES] {
            if !manager.has_column(table, column).await? {
                let new = ColumnDef::new(Alias::new(column)).big_integer().null().take();
                let add = Table::alter().table(Alias::new(table)).add_column(new).to_owned();
                manager.alter_table(add).await?;
            }
        }
        let (table, column) = PROBLEMS;
        if !manager.has_column(table, column).await? {
            let new = ColumnDef::new(Alias::new(column)).text().null().take();
            let add = Table::alter().table(Alias::new(table)).add_column(new).to_owned();
            manager.alter_table(add).await?;
        }
        index(manager, "files", &["deleted_at"], false).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_index(Index::drop().name("files_by_deleted_at").table(Alias::new("files")).to_owned()).await?;
        for (table, column) in [FILES, BATCHES, PROBLEMS] {
            let drop = Table::alter().table(Alias::new(table)).drop_column(Alias::new(column)).to_owned();
            manager.alter_table(drop).await?;
        }
        Ok(())
    }
}
