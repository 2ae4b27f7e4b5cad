//! Indexes over what waits, what is leased and what is settled, each over its own rows only: a delivery changes its state
//! twice, and every index over all states costs four steps in a tree for that.

use sea_orm_migration::prelude::*;

use crate::columns::index;

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

/// Name, table, columns, which rows.
const PARTIAL: [[&str; 4]; 5] = [
    ["webhook_deliveries_pending", "webhook_deliveries", "target, next_attempt_at, id", "state = 'pending'"],
    ["webhook_deliveries_leased", "webhook_deliveries", "lease_expires_at", "state = 'leased'"],
    ["webhook_deliveries_settled", "webhook_deliveries", "settled_at", "settled_at IS NOT NULL"],
    ["webhook_deliveries_of_endpoint", "webhook_deliveries", "endpoint_id, state", "endpoint_id IS NOT NULL"],
    ["webhook_attempts_of_request", "webhook_attempts", "request_id", "request_id IS NOT NULL"],
];

/// The indexes in whose place they come.
const FULL: [(&str, &[&str]); 5] = [
    ("webhook_deliveries", &["state", "target", "next_attempt_at"]),
    ("webhook_deliveries", &["state", "lease_expires_at"]),
    ("webhook_deliveries", &["state", "settled_at"]),
    ("webhook_deliveries", &["endpoint_id", "state"]),
    ("webhook_attempts", &["request_id"]),
];

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        for (table, columns) in FULL {
            connection.execute_unprepared(&format!("DROP INDEX IF EXISTS {table}_by_{}", columns.join("_"))).await?;
        }
        for [name, table, columns, rows] in PARTIAL {
            let sql = format!("CREATE INDEX IF NOT EXISTS {name} ON {table} ({columns}) WHERE {rows}");
            connection.execute_unprepared(&sql).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for [name, ..] in PARTIAL {
            manager.get_connection().execute_unprepared(&format!("DROP INDEX IF EXISTS {name}")).await?;
        }
        for (table, columns) in FULL {
            index(manager, table, columns, false).await?;
        }
        Ok(())
    }
}
