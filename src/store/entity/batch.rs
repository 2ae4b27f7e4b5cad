//! A batch. Table `batches`; the columns are explained in the migration and in `domain`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "batches")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    pub owner: String,
    pub status: String,
    pub ending: Option<String>,
    pub endpoint: String,
    pub models: String,
    pub input_file_id: String,
    pub input_object_key: String,
    pub output_file_id: Option<String>,
    pub error_file_id: Option<String>,
    pub total: i64,
    pub completed: i64,
    pub failed: i64,
    pub not_run: i64,
    pub input_tokens: i64,
    pub cached_input_tokens: i64,
    pub output_tokens: i64,
    pub reasoning_tokens: i64,
    pub total_tokens: i64,
    pub errors: String,
    pub metadata: String,
    pub priority: i32,
    pub completion_window: i64,
    pub request_id: Option<String>,
    pub request_hash: Option<String>,
    pub webhook: Option<String>,
    pub webhook_endpoint_id: Option<String>,
    pub progress_done: i64,
    pub progress_at: i64,
    pub created_at: i64,
    pub expires_at: i64,
    pub in_progress_at: Option<i64>,
    pub finalizing_at: Option<i64>,
    pub completed_at: Option<i64>,
    pub failed_at: Option<i64>,
    pub expired_at: Option<i64>,
    pub cancelling_at: Option<i64>,
    pub cancelled_at: Option<i64>,
    pub segments: i32,
    pub segments_done: i32,
    pub revision: i64,
    pub output_expires_after: Option<i64>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
