//! Files, batches, segments, parts, events, workers, nodes.

use sea_orm_migration::prelude::*;

use crate::columns::{Table, index};

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // One run of one process. Nodes find each other only here.
        Table::new("nodes")
            .text("id")
            .text("version")
            .text("roles")
            .big("started_at")
            .big("heartbeat_at")
            .key(&["id"])
            .create(manager)
            .await?;

        // Inputs have an object; results are spread over their batch's segments.
        Table::new("files")
            .text("id")
            .text("owner")
            .text("kind")
            .opt_text("batch_id")
            .text("filename")
            .big("bytes")
            .big("line_count")
            .text("models")
            .opt_text("endpoint")
            .opt_text("object_key")
            .opt_big("crc32c")
            .opt_text("request_id")
            .big("created_at")
            .opt_big("expires_at")
            .key(&["id"])
            .create(manager)
            .await?;
        index(manager, "files", &["owner", "request_id"], true).await?;
        index(manager, "files", &["owner", "id"], false).await?;
        index(manager, "files", &["batch_id"], false).await?;
        index(manager, "files", &["expires_at"], false).await?;

        // The segment index of an input file: copied into `segments` when a batch is created from it.
        Table::new("file_segments")
            .text("file_id")
            .int("idx")
            .big("first_line")
            .int("line_span")
            .int("requests")
            .big("byte_offset")
            .big("byte_length")
            .big("models")
            .key(&["file_id", "idx"])
            .create(manager)
            .await?;

        Table::new("batches")
            .text("id")
            .text("owner")
            .text("status")
            .opt_text("ending")
            .text("endpoint")
            .text("models")
            .text("input_file_id")
            .text("input_object_key")
            .opt_text("output_file_id")
            .opt_text("error_file_id")
            .count("total")
            .count("completed")
            .count("failed")
            .count("input_tokens")
            .count("cached_input_tokens")
            .count("output_tokens")
            .count("reasoning_tokens")
            .count("total_tokens")
            .text("errors")
            .text("metadata")
            .int("priority")
            .big("completion_window")
            .opt_text("request_id")
            .opt_text("webhook")
            .opt_text("webhook_endpoint_id")
            .count("progress_done")
            .count("progress_at")
            .big("created_at")
            .big("expires_at")
            .opt_big("in_progress_at")
            .opt_big("finalizing_at")
            .opt_big("completed_at")
            .opt_big("failed_at")
            .opt_big("expired_at")
            .opt_big("cancelling_at")
            .opt_big("cancelled_at")
            .int("segments")
            .int("segments_done")
            .big("revision")
            .key(&["id"])
            .create(manager)
            .await?;
        index(manager, "batches", &["owner", "request_id"], true).await?;
        index(manager, "batches", &["owner", "id"], false).await?;
        index(manager, "batches", &["status", "priority", "expires_at"], false).await?;
        index(manager, "batches", &["status", "expires_at"], false).await?;
        index(manager, "batches", &["input_file_id"], false).await?;

        // What ListBatches filters by.
        Table::new("batch_metadata")
            .text("batch_id")
            .text("name")
            .text("value")
            .key(&["batch_id", "name"])
            .create(manager)
            .await?;
        index(manager, "batch_metadata", &["name", "value", "batch_id"], false).await?;
        Table::new("batch_models").text("batch_id").text("model").key(&["batch_id", "model"]).create(manager).await?;
        index(manager, "batch_models", &["model", "batch_id"], false).await?;

        // The unit of durable work. `models` is the mask of the models whose lines are still to be run.
        Table::new("segments")
            .text("batch_id")
            .int("idx")
            .big("first_line")
            .int("line_span")
            .int("requests")
            .big("byte_offset")
            .big("byte_length")
            .big("models")
            .text("state")
            .opt_text("lease_owner")
            .opt_big("lease_expires_at")
            .big("epoch")
            .opt_text("object_key")
            .count("output_bytes")
            .count("error_bytes")
            .count("output_lines")
            .count("error_lines")
            .opt_big("crc32c")
            .key(&["batch_id", "idx"])
            .create(manager)
            .await?;
        index(manager, "segments", &["batch_id", "state", "idx"], false).await?;
        index(manager, "segments", &["lease_owner"], false).await?;
        index(manager, "segments", &["state", "lease_expires_at"], false).await?;

        // Results of some lines of a segment. `seq` is the batch's revision at that commit, so parts are in commit order.
        Table::new("parts")
            .text("batch_id")
            .big("seq")
            .int("segment_idx")
            .big("epoch")
            .text("object_key")
            .big("output_bytes")
            .big("error_bytes")
            .big("crc32c")
            .blob("completed_lines")
            .blob("failed_lines")
            .count("input_tokens")
            .count("cached_input_tokens")
            .count("output_tokens")
            .count("reasoning_tokens")
            .count("total_tokens")
            .big("created_at")
            .key(&["batch_id", "seq"])
            .create(manager)
            .await?;
        index(manager, "parts", &["batch_id", "segment_idx"], false).await?;

        // Every state change, written in the transaction that makes it.
        Table::new("batch_events")
            .big("sequence")
            .text("batch_id")
            .big("revision")
            .text("status")
            .text("snapshot")
            .big("created_at")
            .key(&["sequence"])
            .create(manager)
            .await?;
        index(manager, "batch_events", &["batch_id", "revision"], true).await?;

        // Numbers that must be handed out in commit order: a row lock, unlike a PostgreSQL sequence, gives that.
        Table::new("counters").text("name").big("value").key(&["name"]).create(manager).await?;
        manager
            .exec_stmt(
                Query::insert()
                    .into_table(Alias::new("counters"))
                    .columns([Alias::new("name"), Alias::new("value")])
                    .values_panic(["batch_events".into(), 0.into()])
                    .to_owned(),
            )
            .await?;

        Table::new("workers")
            .text("id")
            .text("url")
            .flag("draining")
            .flag("from_config")
            .big("created_at")
            .key(&["id"])
            .create(manager)
            .await?;
        index(manager, "workers", &["url"], true).await?;

        // Objects that no row names any more, to be deleted once readers have let go of them.
        Table::new("garbage").text("object_key").big("delete_after").key(&["object_key"]).create(manager).await?;
        index(manager, "garbage", &["delete_after"], false).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        Table::drop(
            manager,
            &[
                "garbage",
                "workers",
                "counters",
                "batch_events",
                "parts",
                "segments",
                "batch_models",
                "batch_metadata",
                "batches",
                "file_segments",
                "files",
                "nodes",
            ],
        )
        .await
    }
}
