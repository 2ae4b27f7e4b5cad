//! Which blob store holds the objects that this database names.

use sea_orm::{
    ColumnTrait, ConnectionTrait, DatabaseBackend, EntityTrait, QueryFilter, QueryOrder, QuerySelect, Set, Statement,
};

use super::{
    DatabaseTransaction, Store, StoreError,
    entity::{batch, blob_store, file, node},
    nodes::dead_since,
    now,
    write::{commit, roll_back},
};
use crate::domain::NodeId;

/// The one row's.
const ROW: i32 = 1;
/// PostgreSQL's advisory lock for giving the store its id: the bytes of "tide-blo" as a number.
const LOCK: i64 = i64::from_be_bytes(*b"tide-blo");

impl Store {
    /// The id of the blob store. None: it has not been given one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn blob_store_id(&self) -> Result<Option<String>, StoreError> {
        let row = blob_store::Entity::find_by_id(ROW).one(self.read()).await?;
        Ok(row.map(|row| row.store_id))
    }

    /// The same, once no server is about to write another one: one that takes over a database that nobody has used looks
    /// for other servers first, and one that starts meanwhile must see what it has decided.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn settled_blob_store_id(&self) -> Result<Option<String>, StoreError> {
        self.write(|tx| async move {
            self.one_at_a_time(&tx).await?;
            roll_back(blob_store::Entity::find_by_id(ROW).one(&tx).await?.map(|row| row.store_id))
        })
        .await
    }

    /// Until the transaction ends no other server decides on the id.
    async fn one_at_a_time(&self, tx: &DatabaseTransaction) -> Result<(), StoreError> {
        if !self.is_sqlite() {
            // Whoever has waited must see what was written meanwhile.
            tx.execute_unprepared("SET TRANSACTION ISOLATION LEVEL READ COMMITTED").await?;
            let lock =
                Statement::from_string(DatabaseBackend::Postgres, format!("SELECT pg_advisory_xact_lock({LOCK})"));
            tx.execute_raw(lock).await?;
        }
        Ok(())
    }

    /// Whether the database names no file, has no batch, and no live node but this one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn is_unused_but_by(&self, own: &NodeId) -> Result<bool, StoreError> {
        is_unused_but_by(self.read(), own).await
    }

    /// Writes the id down, unless there is one that counts: any that a used database has. `give` gives it to the store
    /// itself before that: of nodes that start at the same time one does it, and the others wait for it. Returns the id
    /// that counts. `give` may be called several times.
    ///
    /// # Errors
    /// [`StoreError`], or what `give` fails with.
    pub async fn settle_blob_store_id<E, F>(&self, id: &str, own: &NodeId, give: impl Fn() -> F) -> Result<String, E>
    where
        E: From<StoreError>,
        F: Future<Output = Result<(), E>>,
    {
        let give = &give;
        self.write(|tx| async move {
            self.one_at_a_time(&tx).await?;
            if let Some(row) = blob_store::Entity::find_by_id(ROW).one(&tx).await? {
                if row.store_id == id || !is_unused_but_by(&tx, own).await? {
                    return roll_back(Ok(row.store_id));
                }
                blob_store::Entity::delete_by_id(ROW).exec(&tx).await?;
            }
            if let Err(error) = give().await {
                return roll_back(Err(error));
            }
            let row = blob_store::ActiveModel { id: Set(ROW), store_id: Set(id.to_owned()) };
            blob_store::Entity::insert(row).exec_without_returning(&tx).await?;
            commit(tx, Ok(id.to_owned()))
        })
        .await?
    }

    /// Some objects that must be in the blob store, the newest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn some_objects(&self, limit: u64) -> Result<Vec<String>, StoreError> {
        Ok(file::Entity::find()
            .select_only()
            .column(file::Column::ObjectKey)
            .filter(file::Column::ObjectKey.is_not_null())
            .order_by_desc(file::Column::CreatedAt)
            .limit(limit)
            .into_tuple()
            .all(self.read())
            .await?)
    }
}

async fn is_unused_but_by(connection: &impl ConnectionTrait, own: &NodeId) -> Result<bool, StoreError> {
    let others = node::Entity::find()
        .filter(node::Column::Id.ne(own.as_str()))
        .filter(node::Column::HeartbeatAt.gte(dead_since(now(connection).await?)));
    Ok(others.one(connection).await?.is_none()
        && file::Entity::find().one(connection).await?.is_none()
        && batch::Entity::find().one(connection).await?.is_none())
}
