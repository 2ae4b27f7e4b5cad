//! One attempt at a delivery. Table `webhook_attempts`; the columns are explained in the migration and in `domain`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "webhook_attempts")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub delivery_id: String,
    #[sea_orm(primary_key, auto_increment = false)]
    pub generation: i32,
    #[sea_orm(primary_key, auto_increment = false)]
    pub attempt: i32,
    pub started_at: i64,
    pub finished_at: Option<i64>,
    pub outcome: String,
    pub error_kind: Option<String>,
    pub http_status: Option<i32>,
    pub error_message: Option<String>,
    pub response_excerpt: Option<String>,
    pub request_id: Option<String>,
    pub forced: bool,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
