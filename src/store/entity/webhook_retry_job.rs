//! A job that retries many dead letters. Table `webhook_retry_jobs`; the columns are explained in the migration and in `domain`.

use sea_orm::entity::prelude::*;

#[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
#[sea_orm(table_name = "webhook_retry_jobs")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: String,
    pub owner: String,
    pub filter: String,
    pub state: String,
    pub position: String,
    pub last: String,
    pub matched: i64,
    pub succeeded: i64,
    pub failed: i64,
    pub skipped: i64,
    pub lease_token: Option<String>,
    pub lease_expires_at: Option<i64>,
    pub created_at: i64,
    pub finished_at: Option<i64>,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}
