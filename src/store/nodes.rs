//! The nodes' own rows: who is there, and since when.

use sea_orm::{ActiveModelTrait, EntityTrait, Set};

use super::{Store, StoreError, entity::node, now};
use crate::domain::NodeId;

impl Store {
    /// Makes this node known.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn join(&self, id: &NodeId, version: &str, roles: &str) -> Result<(), StoreError> {
        let at = now(self.read()).await?.0;
        let row = node::ActiveModel {
            id: Set(id.as_str().to_owned()),
            version: Set(version.to_owned()),
            roles: Set(roles.to_owned()),
            started_at: Set(at),
            heartbeat_at: Set(at),
        };
        node::Entity::insert(row).exec_without_returning(&self.inner.write).await?;
        Ok(())
    }

    /// Says that this node lives.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn heartbeat(&self, id: &NodeId) -> Result<(), StoreError> {
        let at = now(self.read()).await?.0;
        let change = node::ActiveModel { id: Set(id.as_str().to_owned()), heartbeat_at: Set(at), ..Default::default() };
        change.update(&self.inner.write).await?;
        Ok(())
    }

    /// Takes this node's row away at an orderly stop.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn leave(&self, id: &NodeId) -> Result<(), StoreError> {
        node::Entity::delete_by_id(id.as_str()).exec(&self.inner.write).await?;
        Ok(())
    }
}
