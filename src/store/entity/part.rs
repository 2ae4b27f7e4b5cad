//! Results of some lines of a segment. Table `parts`; the columns are explained in the migration and in `domain`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "parts")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub batch_id: String,
    #[sea_orm(primary_key, auto_increment = false)]
    pub seq: i64,
    pub segment_idx: i32,
    pub epoch: i64,
    pub object_key: String,
    pub output_bytes: i64,
    pub error_bytes: i64,
    pub crc32c: i64,
    pub completed_lines: Vec<u8>,
    pub failed_lines: Vec<u8>,
    pub not_run: i64,
    pub input_tokens: i64,
    pub cached_input_tokens: i64,
    pub output_tokens: i64,
    pub reasoning_tokens: i64,
    pub total_tokens: i64,
    pub created_at: i64,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
