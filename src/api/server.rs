//! The server: assembled here, and stopped in order.

use std::{path::PathBuf, sync::Arc, time::Duration};

use axum::{Router, middleware};
use futures::StreamExt;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    codec::CompressionEncoding,
    service::Routes,
    transport::{Certificate, Identity, Server, ServerTlsConfig},
};
use tonic_health::{ServingStatus, pb::health_server::HealthServer, server::HealthReporter};
use tonic_web::GrpcWebLayer;

use super::{
    MESSAGE_LIMIT, Services,
    auth::Tokens,
    connection::Connection,
    gate::{self, Gate},
    health::{self, Healthy},
    http,
    limits::{CallerLimits, Limiter},
    service::Api,
    webhook_admin::Admin,
    workers::Workers,
};
use crate::pb::{
    self, batch_service_server::BatchServiceServer, webhook_admin_server::WebhookAdminServer,
    worker_admin_server::WorkerAdminServer,
};

/// A silent connection is asked whether it still lives this often, and cut if no answer comes in this time.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));
/// RPCs at a time on one connection.
const STREAMS: u32 = 1_024;
/// What one upload may send ahead, and all on one connection together: 15 that stand still don't stop the sixteenth.
const WINDOWS: (u32, u32) = (1024 * 1024, 16 * 1024 * 1024);
/// The most bytes of a frame: with HTTP/2's least of 16 KiB an upload would be read in as many pieces.
const FRAME: u32 = 256 * 1024;
/// The most bytes of a request's headers.
const HEADERS: u32 = 16 * 1024;
/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
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
            Server::builder().tls_config(tls(files).await?)?;
        }
        Ok(())
    }
}

/// Why the server can't serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A TLS file can't be read.
    #[error("can't read {}: {source}", path.display())]
    TlsFile {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The transport failed; most often the TLS files are not what they should be.
    #[error("the server failed: {}", chain(.0))]
    Transport(#[from] tonic::transport::Error),
    /// The descriptors for reflection are broken.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// tonic's own message is just "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Serves gRPC and HTTP on `listener` until `shutdown`, then in this order: health says NOT_SERVING, streams that would not
/// end by themselves end with UNAVAILABLE, no more connections are taken, RPCs have `drain_timeout` to end, and what is left
/// is cut. `shutdown` must be the token that ends the hub's streams, or a parent of it.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(
    listener: TcpListener,
    services: Services,
    options: ServerOptions,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let reporter = HealthReporter::new();
    let not_serving = CancellationToken::new();
    let routes =
        routes(services, options.rpcs, options.tokens.clone(), options.limits, &reporter, &not_serving, &shutdown)?;
    let mut server = Server::builder()
        .accept_http1(true)
        .http2_keepalive_interval(Some(KEEPALIVE.0))
        .http2_keepalive_timeout(Some(KEEPALIVE.1))
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(WINDOWS.0)
        .initial_connection_window_size(WINDOWS.1)
        .max_frame_size(FRAME)
        .http2_max_header_list_size(HEADERS);
    if let Some(age) = options.max_connection_age {
        server = server.max_connection_age(age.mul_f64(rand::random_range(0.9..1.1)));
    }
    if let Some(files) = &options.tls {
        server = server.tls_config(tls(files).await?)?;
    }
    let cut = CancellationToken::new();
    let connections = TcpListenerStream::new(listener).map({
        let cut = cut.clone();
        move |tcp| {
            tcp.and_then(|tcp| {
                tcp.set_nodelay(true)?;
                Ok(Connection::new(tcp, cut.clone()))
            })
        }
    });
    health::set(&reporter, ServingStatus::Serving).await;
    let stop = async {
        shutdown.cancelled().await;
        health::set(&reporter, ServingStatus::NotServing).await;
        not_serving.cancel();
    };
    let serving = server.add_routes(Routes::from(routes)).serve_with_incoming_shutdown(connections, stop);
    let mut serving = std::pin::pin!(serving);
    let deadline = async {
        shutdown.cancelled().await;
        tokio::time::sleep(options.drain_timeout).await;
    };
    tokio::select! {
        ended = &mut serving => return Ok(ended?),
        () = deadline => {}
    }
    tracing::warn!("some RPCs have not ended within {:?} and are cut off", options.drain_timeout);
    cut.cancel();
    match tokio::time::timeout(CUT, serving).await {
        Ok(ended) => Ok(ended?),
        Err(_) => Ok(()),
    }
}

/// Everything on the port.
fn routes(
    services: Services,
    rpcs: bool,
    tokens: Option<Tokens>,
    limits: CallerLimits,
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
    let limits = Arc::new(Limiter::new(limits));
    let batches = Api { services: services.clone(), limits: limits.clone(), shutdown: shutdown.clone() };
    let workers = Workers { fleet: services.fleet.clone(), stages: services.stages.clone() };
    let hooks = Admin { webhooks: services.webhooks.clone() };
    let mut grpc = Routes::new(HealthServer::new(Healthy::new(reporter.clone(), not_serving.clone())));
    if rpcs {
        grpc = grpc
            .add_service(sized!(BatchServiceServer::new(batches)))
            .add_service(sized!(WorkerAdminServer::new(workers)))
            .add_service(sized!(WebhookAdminServer::new(hooks)));
    }
    let grpc = grpc
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .into_axum_router()
        .reset_fallback()
        .layer(middleware::from_fn_with_state(Arc::new(Gate::new(tokens.clone(), limits.clone())), gate::pass))
        // Outside the gate, so that a browser is told of refusals in its own way.
        .layer(GrpcWebLayer::new());
    Ok(grpc.merge(http::routes(services, tokens, limits, shutdown.clone())))
}

async fn tls(files: &TlsFiles) -> Result<ServerTlsConfig, ServeError> {
    async fn read(path: &PathBuf) -> Result<Vec<u8>, ServeError> {
        tokio::fs::read(path).await.map_err(|source| ServeError::TlsFile { path: path.clone(), source })
    }
    let identity = Identity::from_pem(read(&files.cert).await?, read(&files.key).await?);
    let mut config = ServerTlsConfig::new().identity(identity).timeout(HANDSHAKE);
    if let Some(ca) = &files.client_ca {
        config = config.client_ca_root(Certificate::from_pem(read(ca).await?));
    }
    Ok(config)
}
