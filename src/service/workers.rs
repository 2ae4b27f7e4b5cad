//! The workers: list, add, drain, remove.

use super::{Service, ServiceError, rules};
use crate::{
    access::{Caller, Role},
    fleet::WorkerView,
    scheduler::Stages,
};

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

    /// Where the time of this process's requests goes.
    #[must_use]
    pub fn stages(&self) -> &Stages {
        &self.parts.stages
    }

    /// Adds a worker.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn register_worker(&self, caller: &Caller, url: &str) -> Result<WorkerView, ServiceError> {
        caller.require_admin()?;
        Ok(self.parts.fleet.register(url).await?)
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
    WorkerView { url: String::new(), last_error: None, complaints: Vec::new(), ..of }
}
