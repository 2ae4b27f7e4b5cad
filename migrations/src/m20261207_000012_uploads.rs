//! Uploads in parts. A server of the release before this does not know them: what expires waits for a newer one.

use sea_orm_migration::prelude::*;

use crate::columns::{Table, index};

const UPLOADS: &str = "uploads";
const PARTS: &str = "upload_parts";

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
        index(manager, PARTS, &["upload_id"], false).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        Table::drop(manager, &[PARTS, UPLOADS]).await
    }
}
