//! One event for one target. Table `webhook_deliveries`; the columns are explained in the migration and in `domain`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "webhook_deliveries")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    pub batch_id: Option<String>,
    pub endpoint_id: Option<String>,
    pub owner: String,
    pub event: String,
    pub url: String,
    pub target: String,
    pub secret: Option<Vec<u8>>,
    pub body: Vec<u8>,
    pub max_attempts: i32,
    pub timeout: i64,
    pub state: String,
    pub attempts: i32,
    pub next_attempt_at: i64,
    pub scheduled_at: Option<i64>,
    pub expires_at: Option<i64>,
    pub lease_token: Option<String>,
    pub lease_expires_at: Option<i64>,
    pub error_message: Option<String>,
    pub created_at: i64,
    pub settled_at: Option<i64>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
