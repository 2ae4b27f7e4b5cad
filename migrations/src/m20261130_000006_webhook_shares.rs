//! What waits is found by its owner first: shares are dealt out among owners. When a wait was fixed is kept, so that a clock that
//! is set back is noticed. And progress that nobody wants any more is found without looking at all that waits.

use sea_orm_migration::prelude::*;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

const TABLE: &str = "webhook_deliveries";
const SCHEDULED_AT: &str = "scheduled_at";
/// Name, columns, which rows.
const INDEXES: [[&str; 3]; 2] = [
    ["webhook_deliveries_waiting", "owner, target, next_attempt_at, id", "state = 'pending'"],
    ["webhook_deliveries_expiring", "expires_at", "state = 'pending' AND expires_at IS NOT NULL"],
];
/// The index in whose place the first one comes. Earlier releases find what waits by the new one too, if more slowly.
const BEFORE: [&str; 3] = ["webhook_deliveries_pending", "target, next_attempt_at, id", "state = 'pending'"];

fn create([name, columns, rows]: [&str; 3]) -> String {
    format!("CREATE INDEX IF NOT EXISTS {name} ON {TABLE} ({columns}) WHERE {rows}")
}

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        if !manager.has_column(TABLE, SCHEDULED_AT).await? {
            connection.execute_unprepared(&format!("ALTER TABLE {TABLE} ADD COLUMN {SCHEDULED_AT} BIGINT")).await?;
        }
        for index in INDEXES {
            connection.execute_unprepared(&create(index)).await?;
        }
        connection.execute_unprepared(&format!("DROP INDEX IF EXISTS {}", BEFORE[0])).await?;
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        connection.execute_unprepared(&create(BEFORE)).await?;
        for [name, ..] in INDEXES {
            connection.execute_unprepared(&format!("DROP INDEX IF EXISTS {name}")).await?;
        }
        if manager.has_column(TABLE, SCHEDULED_AT).await? {
            connection.execute_unprepared(&format!("ALTER TABLE {TABLE} DROP COLUMN {SCHEDULED_AT}")).await?;
        }
        Ok(())
    }
}
