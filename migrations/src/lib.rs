//! tidemill's database schema, for SQLite and PostgreSQL. Migrations run at server start and by `tidemill migrate`.

pub use sea_orm_migration::prelude::*;

mod columns;
pub mod requires;

mod m20261124_000001_foundation;
mod m20261124_000002_webhooks;
mod m20261125_000003_requires;
mod m20261125_000004_webhook_indexes;
mod m20261125_000005_pages;
mod m20261130_000006_webhook_shares;
mod m20261130_000007_blob_store_id;
mod m20261201_000006_fair_claims;
mod m20261201_000007_checksums;
mod m20261202_000008_leftovers;
mod m20261203_000009_worker_health;
mod m20261205_000010_sweeps;
mod m20261206_000011_retention;
mod m20261207_000012_uploads;
mod m20261208_000013_not_run;

/// All migrations, oldest first.
pub struct Migrator;

#[async_trait::async_trait]
impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        vec![
            Box::new(m20261124_000001_foundation::Migration),
            Box::new(m20261124_000002_webhooks::Migration),
            Box::new(m20261125_000003_requires::Migration),
            Box::new(m20261125_000004_webhook_indexes::Migration),
            Box::new(m20261125_000005_pages::Migration),
            Box::new(m20261130_000006_webhook_shares::Migration),
            Box::new(m20261130_000007_blob_store_id::Migration),
            Box::new(m20261201_000006_fair_claims::Migration),
            Box::new(m20261201_000007_checksums::Migration),
            Box::new(m20261202_000008_leftovers::Migration),
            Box::new(m20261203_000009_worker_health::Migration),
            Box::new(m20261205_000010_sweeps::Migration),
            Box::new(m20261206_000011_retention::Migration),
            Box::new(m20261207_000012_uploads::Migration),
            Box::new(m20261208_000013_not_run::Migration),
        ]
    }
}
