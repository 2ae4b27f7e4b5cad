//! Uploads in parts, and what a batch was asked to be, so that another request under the same key is refused. A server of
//! the release before this does not know them: what expires waits for a newer one, and other requests are not noticed.

use sea_orm_migration::prelude::*;

use crate::columns::{Table, index};

const UPLOADS: &str = "uploads";
const PARTS: &str = "upload_parts";
/// A hash of the request, if it had an idempotency key.
const HASH: (&str, &str) = ("batches", "request_hash");

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        Table::new(UPLOADS)
            .text("id")
            .text("owner")
            .text("filename")
            // Announced by the client.
            .big("bytes")
            // Microseconds. Null: the file never expires.
            .opt_big("file_expires_after")
            // pending, completed, cancelled or expired.
            .text("status")
            // What it has become, and a hash of the list of parts that it was made of.
            .opt_text("file_id")
            .opt_text("made_of")
            // The number of its parts and of their bytes so far.
            .count("parts")
            .count("part_bytes")
            .big("created_at")
            .big("expires_at")
            .key(&["id"])
            .create(manager)
            .await?;
        index(manager, UPLOADS, &["status", "expires_at"], false).await?;
        Table::new(PARTS)
            .text("id")
            .text("upload_id")
            .big("bytes")
            .big("crc32c")
            .text("object_key")
            .big("created_at")
            .key(&["id"])
            .create(manager)
            .await?;
        index(manager, PARTS, &["upload_id"], false).await?;
        let (table, column) = HASH;
        if !manager.has_column(table, column).await? {
            let new = ColumnDef::new(Alias::new(column)).text().null().take();
            let add = sea_orm_migration::prelude::Table::alter().table(Alias::new(table)).add_column(new).to_owned();
            manager.alter_table(add).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let (table, column) = HASH;
        let drop = sea_orm_migration::prelude::Table::alter()
            .table(Alias::new(table))
            .drop_column(Alias::new(column))
            .to_owned();
        manager.alter_table(drop).await?;
        Table::drop(manager, &[PARTS, UPLOADS]).await
    }
}
