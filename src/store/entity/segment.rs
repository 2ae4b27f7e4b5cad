//! A segment of a batch. Table `segments`; the columns are explained in the migration and in `domain`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "segments")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub batch_id: String,
    #[sea_orm(primary_key, auto_increment = false)]
    pub idx: i32,
    pub first_line: i64,
    pub line_span: i32,
    pub requests: i32,
    pub byte_offset: i64,
    pub byte_length: i64,
    pub models: i64,
    pub state: String,
    pub lease_owner: Option<String>,
    pub lease_expires_at: Option<i64>,
    pub epoch: i64,
    pub object_key: Option<String>,
    pub output_bytes: i64,
    pub error_bytes: i64,
    pub output_lines: i64,
    pub error_lines: i64,
    pub crc32c: Option<i64>,
    pub input_crc32c: Option<i64>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
