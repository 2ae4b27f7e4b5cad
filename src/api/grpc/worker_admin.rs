//! The `WorkerAdmin` service.

use tonic::{Request, Response, Status};

use super::{convert, gate::caller_of, read};
use crate::{
    pb::{self, worker_admin_server::WorkerAdmin},
    service::{Service, workers::NewWorker},
};

/// Adds, shows, drains and removes workers.
pub(super) struct Workers {
    pub(super) service: Service,
}

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl WorkerAdmin for Workers {
    async fn list_workers(&self, request: Request<pb::ListWorkersRequest>) -> Reply<pb::ListWorkersResponse> {
        let workers = self.service.workers(&caller_of(&request)?).into_iter().map(convert::worker).collect();
        let request_stages = Some(convert::stages(self.service.stages()));
        Ok(Response::new(pb::ListWorkersResponse { workers, request_stages }))
    }

    async fn register_worker(&self, request: Request<pb::RegisterWorkerRequest>) -> Reply<pb::Worker> {
        let (caller, of) = (caller_of(&request)?, request.get_ref());
        let health_interval = read::span(of.health_interval);
        let worker = NewWorker { url: &of.url, health_path: of.health_path.as_deref(), health_interval };
        let worker = self.service.register_worker(&caller, worker).await?;
        Ok(Response::new(convert::worker(worker)))
    }

    async fn drain_worker(&self, request: Request<pb::DrainWorkerRequest>) -> Reply<pb::Worker> {
        let worker = self.service.drain_worker(&caller_of(&request)?, &request.get_ref().worker_id).await?;
        Ok(Response::new(convert::worker(worker)))
    }

    async fn remove_worker(&self, request: Request<pb::RemoveWorkerRequest>) -> Reply<()> {
        Ok(Response::new(self.service.remove_worker(&caller_of(&request)?, &request.get_ref().worker_id).await?))
    }
}
