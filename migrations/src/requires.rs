//! Old and new programs side by side on one database.
//!
//! A migration only adds: tables, indexes, columns that are null or have a default. So the programs of earlier releases run
//! on, and start again, while a later one is rolled out. A migration that can't keep to that calls [`require`], and whoever
//! does not know it refuses to start.

use sea_orm_migration::prelude::*;

/// The table that says so. It has a row at most.
pub const TABLE: &str = "schema_requires";
/// The migration that made it.
pub const SINCE: &str = "m20261125_000003_requires";

/// From here on only programs that know `migration` may run on the database. To be called in that migration's `up`; its
/// `down` calls [`release`].
///
/// # Errors
/// The database's.
pub async fn require(manager: &SchemaManager<'_>, migration: &str) -> Result<(), DbErr> {
    release(manager).await?;
    let mut insert = Query::insert();
    insert.into_table(Alias::new(TABLE)).columns([Alias::new("id"), Alias::new("migration")]);
    manager.exec_stmt(insert.values_panic([1.into(), migration.into()]).to_owned()).await
}

/// Every program may run on the database again.
///
/// # Errors
/// The database's.
pub async fn release(manager: &SchemaManager<'_>) -> Result<(), DbErr> {
    manager.exec_stmt(Query::delete().from_table(Alias::new(TABLE)).to_owned()).await
}
