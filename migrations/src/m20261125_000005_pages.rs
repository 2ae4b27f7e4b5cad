//! Indexes for pages of batches in one state and of files of one kind, and for the batches with a webhook, whose secrets every
//! start looks at: without them the whole table is read.

use sea_orm_migration::prelude::*;

use crate::columns::index;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

const INDEXES: [(&str, &[&str]); 4] = [
    ("batches", &["status", "id"]),
    ("batches", &["owner", "status", "id"]),
    ("files", &["kind", "id"]),
    ("files", &["owner", "kind", "id"]),
];

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for (table, columns) in INDEXES {
            index(manager, table, columns, false).await?;
        }
        manager
            .get_connection()
            .execute_unprepared(
                "CREATE INDEX IF NOT EXISTS batches_with_webhook ON batches (id) WHERE webhook IS NOT NULL",
            )
            .await?;
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.get_connection().execute_unprepared("DROP INDEX IF EXISTS batches_with_webhook").await?;
        for (table, columns) in INDEXES {
            let name = format!("{table}_by_{}", columns.join("_"));
            let drop = Index::drop().name(name).table(Alias::new(table)).if_exists().to_owned();
            manager.drop_index(drop).await?;
        }
        Ok(())
    }
}
