//! The server: assembled here, and stopped in order.

use std::{path::PathBuf, sync::Arc, time::Duration};

use axum::{Router, middleware};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{codec::CompressionEncoding, service::Routes};
use tonic_health::{ServingStatus, pb::health_server::HealthServer, server::HealthReporter};
use tonic_web::GrpcWebLayer;

use super::{
    LONGEST_MESSAGE, MESSAGE_LIMIT, Services,
    gate::{self, Gate},
    health::{self, Healthy},
    hosts::{self, Hosts},
    http,
    listener::{self, Listener},
    panics,
    service::Api,
    webhook_admin::Admin,
    workers::Workers,
};
use crate::access::{CallerLimits, Limiter, Tokens};
use crate::pb::{
    self, batch_service_server::BatchServiceServer, webhook_admin_server::WebhookAdminServer,
    worker_admin_server::WorkerAdminServer,
};
use crate::words;

/// How long connections that were cut have to notice.
const CUT: Duration = Duration::from_secs(1);

/// PEM files.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The server's certificate chain.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Who must have signed a client's certificate; none: clients need no certificate.
    pub client_ca: Option<PathBuf>,
}

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Whether the services of tidemill are there, or only health, metrics and reflection.
    pub rpcs: bool,
    /// None: no TLS.
    pub tls: Option<TlsFiles>,
    /// None: whoever gets through is admin.
    pub tokens: Option<Tokens>,
    /// A connection is asked to make place for a new one after this time, more or less 10% (so that nodes that started
    /// together don't move their clients together), for load balancers to rebalance. Streams on it go on to their end.
    /// None: never.
    pub max_connection_age: Option<Duration>,
    /// How long a shutdown waits for RPCs to end.
    pub drain_timeout: Duration,
    /// How much one caller may ask.
    pub limits: CallerLimits,
    /// Connections at a time; none: half of the descriptors that the process may have, at most 10,000.
    pub max_connections: Option<u32>,
    /// Names, besides addresses and local names, by which clients may call a server without access tokens.
    pub public_hosts: Vec<String>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            rpcs: true,
            tls: None,
            tokens: None,
            max_connection_age: Some(Duration::from_secs(30 * 60)),
            drain_timeout: Duration::from_secs(10),
            limits: CallerLimits::default(),
            max_connections: None,
            public_hosts: Vec::new(),
        }
    }
}

impl ServerOptions {
    /// Reads the TLS files, and forgets them.
    ///
    /// # Errors
    /// [`ServeError`] if they can't be used.
    pub async fn check(&self) -> Result<(), ServeError> {
        if let Some(files) = &self.tls {
            listener::tls::acceptor(files).await?;
        }
        Ok(())
    }
}

/// Why the server can't serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A TLS file can't be read.
    #[error("can't read {}: {}", path.display(), words::file(source))]
    TlsFile {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A TLS file is not what it should be.
    #[error("{}: {problem}", path.display())]
    Tls {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The descriptors for reflection are broken.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves gRPC and HTTP on `listener` until `shutdown`, then in this order: health says NOT_SERVING, streams that would not
/// end by themselves end with UNAVAILABLE, no more connections are taken, RPCs have `drain_timeout` to end, and what is left
/// is cut. `shutdown` must be the token that ends the hub's streams, or a parent of it.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(
    socket: TcpListener,
    services: Services,
    options: ServerOptions,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let reporter = HealthReporter::new();
    let not_serving = CancellationToken::new();
    let routes = routes(services, &options, &reporter, &not_serving, &shutdown)?;
    let tls = match &options.tls {
        Some(files) => Some(listener::tls::acceptor(files).await?),
        None => None,
    };
    let listening =
        listener::Options { max_connections: options.max_connections, max_age: options.max_connection_age, tls };
    let listener = Listener::new(routes, listening);
    health::set(&reporter, ServingStatus::Serving).await;
    let stop = CancellationToken::new();
    let told = async {
        shutdown.cancelled().await;
        health::set(&reporter, ServingStatus::NotServing).await;
        not_serving.cancel();
        stop.cancel();
    };
    tokio::join!(listener.run(socket, stop.clone()), told);
    if tokio::time::timeout(options.drain_timeout, listener.ended()).await.is_ok() {
        return Ok(());
    }
    tracing::warn!("some RPCs have not ended within {:?} and are cut off", options.drain_timeout);
    listener.cut();
    if tokio::time::timeout(CUT, listener.ended()).await.is_err() {
        tracing::warn!("some connections have not noticed that they were cut off");
    }
    Ok(())
}

/// Everything on the port.
fn routes(
    services: Services,
    options: &ServerOptions,
    reporter: &HealthReporter,
    not_serving: &CancellationToken,
    shutdown: &CancellationToken,
) -> Result<Router, ServeError> {
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
    metrics::describe_counter!("tidemill_calls_crashed_total", "calls that ended with a panic: bugs");
    let tokens = options.tokens.clone();
    let limits = Arc::new(Limiter::new(options.limits));
    let batches = Api::new(services.clone(), tokens.as_ref(), limits.clone(), shutdown.clone());
    let gate = Arc::new(Gate::new(tokens, limits.clone()));
    let workers = Workers { fleet: services.fleet.clone(), stages: services.stages.clone() };
    let hooks = Admin { webhooks: services.webhooks.clone() };
    let mut grpc = Routes::new(HealthServer::new(Healthy::new(reporter.clone(), not_serving.clone())));
    if options.rpcs {
        grpc = grpc
            // Results as long as the client wants them; all else is cut or refused before it is sent.
            .add_service(sized!(BatchServiceServer::new(batches)).max_encoding_message_size(LONGEST_MESSAGE))
            .add_service(sized!(WorkerAdminServer::new(workers)))
            .add_service(sized!(WebhookAdminServer::new(hooks)));
    }
    let grpc = grpc
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .into_axum_router()
        .reset_fallback()
        .layer(middleware::from_fn(panics::caught))
        .layer(middleware::from_fn_with_state(gate.clone(), gate::pass))
        // Outside the gate, so that a browser is told of refusals in its own way.
        .layer(GrpcWebLayer::new())
        .layer(middleware::from_fn(gate::only_grpc));
    let hosts = Hosts::new(&options.public_hosts, options.tokens.is_some(), options.tls.is_some());
    let http = http::routes(services, gate, limits, shutdown.clone()).layer(middleware::from_fn(panics::caught));
    let all = grpc.merge(http);
    Ok(all.layer(middleware::from_fn_with_state(Arc::new(hosts), hosts::pass)))
}
