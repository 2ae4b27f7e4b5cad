//! Health v1, with watches that end when the server stops.

use futures::{StreamExt, stream::BoxStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, HealthCheckResponse, health_server::Health},
    server::{HealthReporter, HealthService},
};

use crate::service::ServiceError;

/// The names that health is asked for: the server as a whole, and each service.
const NAMES: [&str; 4] = ["", "tidemill.v1.BatchService", "tidemill.v1.WorkerAdmin", "tidemill.v1.WebhookAdmin"];

/// Sets the health of every name.
pub(in crate::api) async fn set(reporter: &HealthReporter, status: ServingStatus) {
    for name in NAMES {
        reporter.set_service_status(name, status).await;
    }
}

/// tonic's health service, except that its watches end some time: an open stream would hold up the shutdown.
pub(super) struct Healthy {
    inner: HealthService,
    /// Cancelled once NOT_SERVING has been set.
    stopped: CancellationToken,
}

impl Healthy {
    pub(super) fn new(reporter: HealthReporter, stopped: CancellationToken) -> Self {
        Self { inner: HealthService::from_health_reporter(reporter), stopped }
    }
}

#[tonic::async_trait]
impl Health for Healthy {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        self.inner.check(request).await
    }

    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let mut inner = self.inner.watch(request).await?.into_inner();
        let stopped = self.stopped.clone();
        let stream = async_stream::try_stream! {
            loop {
                let next = tokio::select! {
                    // The last status first.
                    biased;
                    next = inner.next() => next,
                    () = stopped.cancelled() => Some(Err(ServiceError::shutting_down().into())),
                };
                let Some(next) = next else { break };
                yield next?;
            }
        };
        Ok(Response::new(stream.boxed()))
    }
}
