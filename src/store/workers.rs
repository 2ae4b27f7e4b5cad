//! Workers that were registered at run time or named by the configuration.

use sea_orm::{ActiveModelTrait, ColumnTrait, EntityTrait, QueryFilter, QueryOrder, Set, sea_query::OnConflict};

use super::{
    Store, StoreError,
    entity::worker,
    now,
    write::{commit, roll_back},
};
use crate::domain::{HealthChange, HealthInterval, HealthPath, OwnHealth, Timestamp, WorkerId};

/// A worker as stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerRecord {
    pub id: WorkerId,
    /// Base URL.
    pub url: String,
    /// Whether it gets no new requests.
    pub draining: bool,
    /// Whether the server's configuration names it.
    pub from_config: bool,
    /// How it is asked whether it is well, where that is not the server's setting.
    pub health: OwnHealth,
    /// When it was first known.
    pub created_at: Timestamp,
}

/// The outcome of a removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemovedWorker {
    /// It was removed.
    Removed,
    /// There is no such worker.
    NotFound,
    /// The configuration names it: it would be back at the next start.
    FromConfig,
}

impl Store {
    /// All workers, in the order in which they were added.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn workers(&self) -> Result<Vec<WorkerRecord>, StoreError> {
        let rows = worker::Entity::find().order_by_asc(worker::Column::Id).all(self.read()).await?;
        Ok(rows.into_iter().map(from_row).collect())
    }

    /// Adds a worker, or ends the draining of the one with that URL.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn register_worker(&self, url: &str) -> Result<WorkerRecord, StoreError> {
        self.register_worker_with(url, &HealthChange::default()).await
    }

    /// The same, and changes the worker's own settings.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn register_worker_with(&self, url: &str, health: &HealthChange) -> Result<WorkerRecord, StoreError> {
        self.upsert(url, false, health).await
    }

    /// Adds the workers that the configuration names. With SQLite, where there is one configuration, workers that it no
    /// longer names are removed; with PostgreSQL, where other nodes may name others, they stay as if registered.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn configure_workers(&self, urls: &[String]) -> Result<(), StoreError> {
        if self.is_sqlite() {
            self.write(|tx| async move {
                worker::Entity::delete_many()
                    .filter(worker::Column::FromConfig.eq(true))
                    .filter(worker::Column::Url.is_not_in(urls.iter().cloned()))
                    .exec(&tx)
                    .await?;
                commit(tx, ())
            })
            .await?;
        }
        for url in urls {
            self.upsert(url, true, &HealthChange::default()).await?;
        }
        Ok(())
    }

    async fn upsert(&self, url: &str, configured: bool, health: &HealthChange) -> Result<WorkerRecord, StoreError> {
        let from_config = configured && self.is_sqlite();
        self.write(|tx| async move {
            let at = now(&tx).await?;
            let row = worker::ActiveModel {
                id: Set(WorkerId::generate().into_string()),
                url: Set(url.to_owned()),
                draining: Set(false),
                from_config: Set(from_config),
                created_at: Set(at.0),
                health_path: Set(None),
                health_interval: Set(None),
            };
            worker::Entity::insert(row)
                .on_conflict(OnConflict::column(worker::Column::Url).do_nothing().to_owned())
                .exec_without_returning(&tx)
                .await?;
            let found = worker::Entity::find().filter(worker::Column::Url.eq(url)).one(&tx).await?;
            let mut row = found.ok_or_else(|| StoreError::Corrupt("no worker after its insert".into()))?;
            // A restart does not end the draining of a configured worker; registering it does.
            row.draining &= configured;
            row.from_config |= from_config;
            let health = own_health(&row).changed(health);
            row.health_path = health.path.as_ref().map(|path| path.as_str().to_owned());
            row.health_interval = health.interval.map(HealthInterval::micros);
            let change = worker::ActiveModel {
                id: Set(row.id.clone()),
                draining: Set(row.draining),
                from_config: Set(row.from_config),
                health_path: Set(row.health_path.clone()),
                health_interval: Set(row.health_interval),
                ..Default::default()
            };
            change.update(&tx).await?;
            commit(tx, from_row(row))
        })
        .await
    }

    /// Marks a worker as draining. `None`: there is no such worker.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn drain_worker(&self, id: &WorkerId) -> Result<Option<WorkerRecord>, StoreError> {
        self.write(|tx| async move {
            let Some(mut row) = worker::Entity::find_by_id(id.as_str()).one(&tx).await? else { return roll_back(None) };
            row.draining = true;
            let change = worker::ActiveModel { id: Set(row.id.clone()), draining: Set(true), ..Default::default() };
            change.update(&tx).await?;
            commit(tx, Some(from_row(row)))
        })
        .await
    }

    /// Removes a worker.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn remove_worker(&self, id: &WorkerId) -> Result<RemovedWorker, StoreError> {
        self.write(|tx| async move {
            match worker::Entity::find_by_id(id.as_str()).one(&tx).await? {
                None => roll_back(RemovedWorker::NotFound),
                Some(row) if row.from_config => roll_back(RemovedWorker::FromConfig),
                Some(row) => {
                    worker::Entity::delete_by_id(row.id).exec(&tx).await?;
                    commit(tx, RemovedWorker::Removed)
                }
            }
        })
        .await
    }
}

/// What a later version has written and this one can't read counts as not set.
fn own_health(row: &worker::Model) -> OwnHealth {
    OwnHealth {
        path: row.health_path.as_deref().and_then(|path| path.parse::<HealthPath>().ok()),
        interval: row.health_interval.and_then(HealthInterval::from_micros),
    }
}

fn from_row(row: worker::Model) -> WorkerRecord {
    let health = own_health(&row);
    WorkerRecord {
        health,
        id: WorkerId::from_text(row.id),
        url: row.url,
        draining: row.draining,
        from_config: row.from_config,
        created_at: Timestamp(row.created_at),
    }
}
