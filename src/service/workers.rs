//! The workers: list, add, drain, remove.

use super::{Service, ServiceError, Span, rules};
use crate::{
    access::{Caller, Role},
    domain::OwnHealth,
    fleet::WorkerView,
    scheduler::Stages,
};

/// A worker to add.
#[derive(Clone, Copy, Debug)]
pub struct NewWorker<'a> {
    /// The base URL.
    pub url: &'a str,
    /// The path of its health check. Empty: the server's. None: a known worker keeps its path.
    pub health_path: Option<&'a str>,
    /// The time between two health checks. 0: the server's. None: a known worker keeps its interval.
    pub health_interval: Option<Span>,
}

impl Service {
    /// All workers. Who is no admin does not see where they are, nor what they answer.
    #[must_use]
    pub fn workers(&self, caller: &Caller) -> Vec<WorkerView> {
        let workers = self.parts.fleet.workers();
        match caller.role {
            Role::Admin => workers,
            Role::Submit => workers.into_iter().map(public).collect(),
        }
    }

    /// How long this server's requests spend in each stage.
    #[must_use]
    pub fn stages(&self) -> &Stages {
        &self.parts.stages
    }

    /// Adds a worker.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn register_worker(&self, caller: &Caller, worker: NewWorker<'_>) -> Result<WorkerView, ServiceError> {
        caller.require_admin()?;
        let health = rules::health_change(worker.health_path, worker.health_interval)?;
        Ok(self.parts.fleet.register_with(worker.url, &health).await?)
    }

    /// Sends a worker nothing more.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn drain_worker(&self, caller: &Caller, id: &str) -> Result<WorkerView, ServiceError> {
        caller.require_admin()?;
        Ok(self.parts.fleet.drain(&rules::worker_id(id)?).await?)
    }

    /// Removes a worker.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn remove_worker(&self, caller: &Caller, id: &str) -> Result<(), ServiceError> {
        caller.require_admin()?;
        Ok(self.parts.fleet.remove(&rules::worker_id(id)?).await?)
    }
}

/// A worker as somebody may see it who is no admin.
fn public(of: WorkerView) -> WorkerView {
    let health = OwnHealth { path: None, ..of.health };
    WorkerView { url: String::new(), last_error: None, complaints: Vec::new(), health, ..of }
}
