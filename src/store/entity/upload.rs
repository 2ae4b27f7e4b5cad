//! An upload in parts. Table `uploads`; the columns are explained in the migration and in `domain`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "uploads")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    pub owner: String,
    pub filename: String,
    pub bytes: i64,
    pub file_expires_after: Option<i64>,
    pub status: String,
    pub file_id: Option<String>,
    pub made_of: Option<String>,
    pub parts: i64,
    pub part_bytes: i64,
    pub created_at: i64,
    pub expires_at: i64,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
