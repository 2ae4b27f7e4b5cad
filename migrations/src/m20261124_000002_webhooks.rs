//! The webhook outbox: endpoints, deliveries, attempts, dead letters, and jobs that retry them.

use sea_orm_migration::prelude::*;

use crate::columns::{Table, index};

#[derive(DeriveMigrationName)]
pub(crate) struct Migration;

#[async_trait::async_trait]
impl MigrationTrait for Migration {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // Secrets are sealed; `previous_secret` signs too until `previous_secret_until`.
        Table::new("webhook_endpoints")
            .text("id")
            .text("owner")
            .text("url")
            .text("events")
            .opt_blob("secret")
            .opt_blob("previous_secret")
            .opt_big("previous_secret_until")
            .int("max_attempts")
            .big("timeout")
            .flag("disabled")
            .opt_text("disabled_reason")
            .big("created_at")
            .big("updated_at")
            .key(&["id"])
            .create(manager)
            .await?;
        index(manager, "webhook_endpoints", &["owner", "id"], false).await?;

        // The outbox: written in the transaction that changes the batch; the body never changes afterwards. `target` is
        // what deliveries to the same receiver share.
        Table::new("webhook_deliveries")
            .text("id")
            .opt_text("batch_id")
            .opt_text("endpoint_id")
            .text("owner")
            .text("event")
            .text("url")
            .text("target")
            .opt_blob("secret")
            .blob("body")
            .int("max_attempts")
            .big("timeout")
            .text("state")
            .int("attempts")
            .big("next_attempt_at")
            .opt_big("expires_at")
            .opt_text("lease_token")
            .opt_big("lease_expires_at")
            .opt_int("http_status")
            .opt_text("error_message")
            .big("created_at")
            .opt_big("settled_at")
            .key(&["id"])
            .create(manager)
            .await?;
        index(manager, "webhook_deliveries", &["state", "target", "next_attempt_at"], false).await?;
        index(manager, "webhook_deliveries", &["state", "lease_expires_at"], false).await?;
        index(manager, "webhook_deliveries", &["state", "settled_at"], false).await?;
        index(manager, "webhook_deliveries", &["batch_id", "event"], false).await?;
        index(manager, "webhook_deliveries", &["endpoint_id", "state"], false).await?;
        index(manager, "webhook_deliveries", &["owner", "id"], false).await?;

        // Inserted before the request is sent, so that a crash leaves a trace. Generation 0 is the automatic chain; each
        // retry by hand is a generation of its own.
        Table::new("webhook_attempts")
            .text("delivery_id")
            .int("generation")
            .int("attempt")
            .big("started_at")
            .opt_big("finished_at")
            .text("outcome")
            .opt_text("error_kind")
            .opt_int("http_status")
            .opt_text("error_message")
            .opt_text("response_excerpt")
            .opt_text("request_id")
            .flag("forced")
            .key(&["delivery_id", "generation", "attempt"])
            .create(manager)
            .await?;
        index(manager, "webhook_attempts", &["request_id"], false).await?;

        Table::new("webhook_dead_letters")
            .text("id")
            .text("owner")
            .opt_text("batch_id")
            .text("delivery_id")
            .opt_text("endpoint_id")
            .text("webhook_url")
            .text("host")
            .text("event")
            .blob("payload")
            .text("error_kind")
            .text("error_message")
            .int("attempts")
            .big("last_attempt_at")
            .big("created_at")
            .opt_big("retried_at")
            .flag("retry_success")
            .count("retry_count")
            .opt_text("lease_token")
            .opt_big("lease_expires_at")
            .key(&["id"])
            .create(manager)
            .await?;
        index(manager, "webhook_dead_letters", &["owner", "id"], false).await?;
        index(manager, "webhook_dead_letters", &["batch_id"], false).await?;
        index(manager, "webhook_dead_letters", &["delivery_id"], true).await?;
        index(manager, "webhook_dead_letters", &["created_at"], false).await?;
        index(manager, "webhook_dead_letters", &["lease_expires_at"], false).await?;

        // Retries of many dead letters: `position` is the last one looked at, `last` the newest one that it is for.
        Table::new("webhook_retry_jobs")
            .text("id")
            .text("owner")
            .text("filter")
            .text("state")
            .text("position")
            .text("last")
            .count("matched")
            .count("succeeded")
            .count("failed")
            .count("skipped")
            .opt_text("lease_token")
            .opt_big("lease_expires_at")
            .big("created_at")
            .opt_big("finished_at")
            .key(&["id"])
            .create(manager)
            .await?;
        index(manager, "webhook_retry_jobs", &["state", "id"], false).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        Table::drop(
            manager,
            &[
                "webhook_retry_jobs",
                "webhook_dead_letters",
                "webhook_attempts",
                "webhook_deliveries",
                "webhook_endpoints",
            ],
        )
        .await
    }
}
