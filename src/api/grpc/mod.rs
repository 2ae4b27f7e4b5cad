//! gRPC: wire types to the service's and back, and nothing else.
//!
//! - `batch_service`, `upload`, `webhook_admin`, `worker_admin`, `health`: the services. `read`: wire types to what the
//!   service takes. `convert`, `webhooks`: what it gives, to wire types. `status`: its errors on the wire.
//! - `gate`: what every RPC passes: who calls, a span, a count and a time. `timely`: how slow a message may come.

mod batch_service;
mod convert;
mod gate;
pub(super) mod health;
mod kind;
mod read;
mod status;
mod timely;
mod times;
mod upload;
mod webhook_admin;
mod webhooks;
mod worker_admin;

use std::sync::Arc;

use axum::{Router, middleware};
use tonic::{codec::CompressionEncoding, service::Routes};
use tonic_health::{pb::health_server::HealthServer, server::HealthReporter};
use tonic_web::GrpcWebLayer;

use self::{batch_service::Batches, gate::Methods, health::Healthy, webhook_admin::Hooks, worker_admin::Workers};
pub(super) use self::{
    gate::unknown_method,
    kind::is_grpc,
    status::{crashed, response},
};
use super::{LONGEST_MESSAGE, MESSAGE_LIMIT, gate::Gate, http::panics};
use crate::{
    pb::{
        self, batch_service_server::BatchServiceServer, webhook_admin_server::WebhookAdminServer,
        worker_admin_server::WorkerAdminServer,
    },
    service::Service,
};

/// The gRPC services. `rpcs`: those of tidemill too, besides health and reflection.
pub(super) fn routes(
    service: Service,
    gate: Arc<Gate>,
    rpcs: bool,
    health: (HealthReporter, tokio_util::sync::CancellationToken),
) -> Result<Router, tonic_reflection::server::Error> {
    /// Every service takes and gives gzip and zstd, and has the same limit.
    macro_rules! sized {
        ($service:expr) => {
            $service
                .accept_compressed(CompressionEncoding::Zstd)
                .accept_compressed(CompressionEncoding::Gzip)
                .send_compressed(CompressionEncoding::Zstd)
                .send_compressed(CompressionEncoding::Gzip)
                .max_decoding_message_size(MESSAGE_LIMIT)
                .max_encoding_message_size(MESSAGE_LIMIT)
        };
    }
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let (reporter, not_serving) = health;
    let mut grpc = Routes::new(HealthServer::new(Healthy::new(reporter, not_serving)));
    if rpcs {
        grpc = grpc
            // Results as long as the client wants them; all else is cut or refused before it is sent.
            .add_service(
                sized!(BatchServiceServer::new(Batches { service: service.clone() }))
                    .max_encoding_message_size(LONGEST_MESSAGE),
            )
            .add_service(sized!(WorkerAdminServer::new(Workers { service: service.clone() })))
            .add_service(sized!(WebhookAdminServer::new(Hooks { service })));
    }
    let grpc = grpc
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .into_axum_router()
        .reset_fallback()
        .layer(middleware::from_fn(panics::caught))
        .layer(middleware::from_fn_with_state(Arc::new(Methods::new(gate)), gate::pass))
        // Outside the gate, so that a browser is told of refusals in its own way.
        .layer(GrpcWebLayer::new())
        .layer(middleware::from_fn(gate::only_grpc));
    Ok(grpc)
}
