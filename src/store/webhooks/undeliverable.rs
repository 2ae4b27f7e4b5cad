//! Makes dead letters of deliveries that have failed for the last time.

use sea_orm::{EntityTrait, IntoActiveModel};

use crate::{
    domain::{DeadLetterId, Timestamp, webhook::AttemptError},
    store::{
        DatabaseTransaction, StoreError,
        entity::{webhook_dead_letter, webhook_delivery},
    },
};

/// Creates a delivery's dead letter in the transaction that ends the delivery.
pub(super) async fn insert(
    tx: &DatabaseTransaction,
    of: &webhook_delivery::Model,
    error: &AttemptError,
    at: Timestamp,
) -> Result<(), StoreError> {
    let host = url::Url::parse(&of.url).ok().and_then(|url| url.host_str().map(str::to_owned)).unwrap_or_default();
    let row = webhook_dead_letter::Model {
        id: DeadLetterId::generate().into_string(),
        owner: of.owner.clone(),
        batch_id: of.batch_id.clone(),
        delivery_id: of.id.clone(),
        endpoint_id: of.endpoint_id.clone(),
        webhook_url: of.url.clone(),
        host,
        event: of.event.clone(),
        payload: of.body.clone(),
        error_kind: error.kind.as_str().to_owned(),
        error_message: error.message.clone(),
        attempts: of.attempts,
        last_attempt_at: at.0,
        created_at: at.0,
        retried_at: None,
        retry_success: false,
        retry_count: 0,
        lease_token: None,
        lease_expires_at: None,
    };
    webhook_dead_letter::Entity::insert(row.into_active_model()).exec_without_returning(tx).await?;
    Ok(())
}
