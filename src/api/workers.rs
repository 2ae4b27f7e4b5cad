//! The `WorkerAdmin` service.

use tonic::{Request, Response, Status};

use super::{convert, gate::caller_of, status, validate};
use crate::{
    fleet::Fleet,
    pb::{self, worker_admin_server::WorkerAdmin},
    scheduler::Stages,
};

/// Adds, shows, drains and removes workers.
pub(super) struct Workers {
    pub(super) fleet: Fleet,
    pub(super) stages: Stages,
}

#[tonic::async_trait]
impl WorkerAdmin for Workers {
    async fn list_workers(
        &self,
        request: Request<pb::ListWorkersRequest>,
    ) -> Result<Response<pb::ListWorkersResponse>, Status> {
        let admin = caller_of(&request)?.require_admin().is_ok();
        let shown = if admin { convert::worker } else { convert::public_worker };
        let workers = self.fleet.workers().into_iter().map(shown).collect();
        let request_stages = Some(convert::stages(&self.stages));
        Ok(Response::new(pb::ListWorkersResponse { workers, request_stages }))
    }

    async fn register_worker(
        &self,
        request: Request<pb::RegisterWorkerRequest>,
    ) -> Result<Response<pb::Worker>, Status> {
        caller_of(&request)?.require_admin().map_err(status::denied)?;
        let url = request.into_inner().url;
        let worker = self.fleet.register(&url).await.map_err(status::fleet)?;
        Ok(Response::new(convert::worker(worker)))
    }

    async fn drain_worker(&self, request: Request<pb::DrainWorkerRequest>) -> Result<Response<pb::Worker>, Status> {
        caller_of(&request)?.require_admin().map_err(status::denied)?;
        let id = validate::worker_id(&request.get_ref().worker_id)?;
        let worker = self.fleet.drain(&id).await.map_err(status::fleet)?;
        Ok(Response::new(convert::worker(worker)))
    }

    async fn remove_worker(&self, request: Request<pb::RemoveWorkerRequest>) -> Result<Response<()>, Status> {
        caller_of(&request)?.require_admin().map_err(status::denied)?;
        let id = validate::worker_id(&request.get_ref().worker_id)?;
        self.fleet.remove(&id).await.map_err(status::fleet)?;
        Ok(Response::new(()))
    }
}
