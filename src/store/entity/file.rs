//! A file. Table `files`; the columns are explained in the migration and in `domain`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "files")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    pub owner: String,
    pub kind: String,
    pub batch_id: Option<String>,
    pub filename: String,
    pub bytes: i64,
    pub line_count: i64,
    pub models: String,
    pub endpoint: Option<String>,
    pub object_key: Option<String>,
    pub crc32c: Option<i64>,
    pub request_id: Option<String>,
    pub created_at: i64,
    pub expires_at: Option<i64>,
    pub deleted_at: Option<i64>,
    pub problems: Option<String>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
