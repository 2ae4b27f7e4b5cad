//! The nodes' rows: which nodes exist, their roles, and when they started.

use std::time::Duration;

use sea_orm::{ColumnTrait, EntityTrait, QueryFilter, QueryOrder, Set, sea_query::OnConflict};

use super::{Store, StoreError, convert, entity::node, now, write::commit};
use crate::domain::{NodeId, Timestamp};

/// A node without a heartbeat for this long is dead.
const DEAD: Duration = Duration::from_secs(600);

/// A node, as other nodes see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeRecord {
    /// The id, which is new for each run of a process.
    pub id: NodeId,
    /// The version of tidemill.
    pub version: String,
    /// Its roles, comma-separated.
    pub roles: String,
    pub started_at: Timestamp,
    /// Its last heartbeat.
    pub heartbeat_at: Timestamp,
}

impl Store {
    /// Registers this node or renews its heartbeat; also restores a row that other nodes deleted.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn heartbeat(&self, id: &NodeId, version: &str, roles: &str) -> Result<(), StoreError> {
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let row = node::ActiveModel {
                id: Set(id.as_str().to_owned()),
                version: Set(version.to_owned()),
                roles: Set(roles.to_owned()),
                started_at: Set(at.0),
                heartbeat_at: Set(at.0),
            };
            let known = OnConflict::column(node::Column::Id).update_column(node::Column::HeartbeatAt).to_owned();
            node::Entity::insert(row).on_conflict(known).exec_without_returning(&tx).await?;
            commit(tx, ())
        })
        .await
    }

    /// Deletes the rows of dead nodes. Returns how many.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn forget_dead_nodes(&self) -> Result<u64, StoreError> {
        let dead = node::Column::HeartbeatAt.lt(dead_since(now(self.read()).await?));
        // Usually there are none, and SQLite's only writer should not be used for that.
        if node::Entity::find().filter(dead.clone()).one(self.read()).await?.is_none() {
            return Ok(0);
        }
        let dead = &dead;
        self.write(|tx| async move {
            let deleted = node::Entity::delete_many().filter(dead.clone()).exec(&tx).await?;
            commit(tx, deleted.rows_affected)
        })
        .await
    }

    /// Deletes this node's row at an orderly stop.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn leave(&self, id: &NodeId) -> Result<(), StoreError> {
        self.write(|tx| async move {
            node::Entity::delete_by_id(id.as_str()).exec(&tx).await?;
            commit(tx, ())
        })
        .await
    }

    /// All nodes that are alive, or were a moment ago, oldest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn nodes(&self) -> Result<Vec<NodeRecord>, StoreError> {
        let rows = node::Entity::find()
            .order_by_asc(node::Column::StartedAt)
            .order_by_asc(node::Column::Id)
            .all(self.read())
            .await?;
        let record = |row: node::Model| NodeRecord {
            id: NodeId::from_text(row.id),
            version: row.version,
            roles: row.roles,
            started_at: Timestamp(row.started_at),
            heartbeat_at: Timestamp(row.heartbeat_at),
        };
        Ok(rows.into_iter().map(record).collect())
    }
}

/// A node is dead if its last heartbeat was before this.
pub(super) fn dead_since(at: Timestamp) -> i64 {
    at.0.saturating_sub(convert::micros(DEAD))
}
