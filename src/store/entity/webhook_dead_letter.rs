//! A webhook that could not be delivered. Table `webhook_dead_letters`; the columns are explained in the migration and in `domain`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "webhook_dead_letters")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    pub owner: String,
    pub batch_id: Option<String>,
    pub delivery_id: String,
    pub endpoint_id: Option<String>,
    pub webhook_url: String,
    pub host: String,
    pub event: String,
    pub payload: Vec<u8>,
    pub error_kind: String,
    pub error_message: String,
    pub attempts: i32,
    pub last_attempt_at: i64,
    pub created_at: i64,
    pub retried_at: Option<i64>,
    pub retry_success: bool,
    pub retry_count: i64,
    pub lease_token: Option<String>,
    pub lease_expires_at: Option<i64>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
