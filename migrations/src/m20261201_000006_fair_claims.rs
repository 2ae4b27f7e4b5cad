//! An index over the unfinished batches of each owner, in the order in which they are served: so that what is claimed next is
//! found owner by owner, however many batches one of them has.

use sea_orm_migration::prelude::*;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let sql = "CREATE INDEX IF NOT EXISTS batches_unfinished ON batches (owner, priority DESC, expires_at, id) \
                   WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')";
        manager.get_connection().execute_unprepared(sql).await?;
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.get_connection().execute_unprepared("DROP INDEX IF EXISTS batches_unfinished").await?;
        Ok(())
    }
}
