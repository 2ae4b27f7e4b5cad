//! Assembles the server, and stops it in order.

use std::{path::PathBuf, sync::Arc, time::Duration};

use axum::{Router, middleware};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use super::{
    gate::Gate,
    grpc::{self, health},
    http::{
        self,
        hosts::{self, Hosts},
        listener::{self, Listener},
        panics,
    },
};
use crate::{access::Tokens, config::BadFiles, service::Service, words};

/// How long cut connections have to end.
const CUT: Duration = Duration::from_secs(1);

/// The paths of the PEM files.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// The server's certificate chain.
    pub cert: PathBuf,
    /// The certificate's key.
    pub key: PathBuf,
    /// The authorities for clients' certificates. `None`: clients need no certificate.
    pub client_ca: Option<PathBuf>,
}

/// How the server serves.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Whether tidemill's services are served, or only health, metrics and reflection.
    pub rpcs: bool,
    /// `None`: no TLS.
    pub tls: Option<TlsFiles>,
    /// The access tokens. `None`: every caller is admin.
    pub tokens: Option<Tokens>,
    /// A connection is asked to end after this time, ±10% (so that nodes that started together don't move their clients
    /// together), so that load balancers can rebalance. Its streams go on to their end. `None`: never.
    pub max_connection_age: Option<Duration>,
    /// How long a shutdown waits for RPCs to end.
    pub drain_timeout: Duration,
    /// The most connections at a time. `None`: half of the process's limit of open files, at most 10,000.
    pub max_connections: Option<u32>,
    /// Names, besides addresses and local names, by which clients may call a server without access tokens.
    pub public_hosts: Vec<String>,
    /// What becomes of files with bad lines that come over OpenAI's API.
    pub bad_files: BadFiles,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            rpcs: true,
            tls: None,
            tokens: None,
            max_connection_age: Some(Duration::from_secs(30 * 60)),
            drain_timeout: Duration::from_secs(10),
            max_connections: None,
            public_hosts: Vec::new(),
            bad_files: BadFiles::default(),
        }
    }
}

impl ServerOptions {
    /// Checks that the TLS files can be used.
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
        /// The file.
        path: PathBuf,
        source: std::io::Error,
    },
    /// A TLS file is not what it should be.
    #[error("{}: {problem}", path.display())]
    Tls {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The descriptors for reflection are broken.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Serves gRPC and HTTP on `listener` until `shutdown`, then in this order: health says NOT_SERVING, streams that would
/// not end by themselves end with UNAVAILABLE, no more connections are taken, RPCs have `drain_timeout` to end, and
/// what is left is cut. `shutdown` must be the token that ends the hub's streams, or a parent of it.
///
/// # Errors
/// [`ServeError`].
pub async fn serve(
    socket: TcpListener,
    service: Service,
    options: ServerOptions,
    shutdown: CancellationToken,
) -> Result<(), ServeError> {
    let reporter = HealthReporter::new();
    let not_serving = CancellationToken::new();
    let routes = routes(service, &options, &reporter, &not_serving, &shutdown)?;
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
    tracing::warn!("some RPCs did not end within {:?} and are aborted", options.drain_timeout);
    listener.cut();
    if tokio::time::timeout(CUT, listener.ended()).await.is_err() {
        tracing::warn!("some connections did not close after they were aborted");
    }
    Ok(())
}

/// Everything on the port.
fn routes(
    service: Service,
    options: &ServerOptions,
    reporter: &HealthReporter,
    not_serving: &CancellationToken,
    shutdown: &CancellationToken,
) -> Result<Router, ServeError> {
    metrics::describe_counter!("tidemill_calls_crashed_total", "calls that ended with a panic: bugs");
    let gate = Arc::new(Gate::new(options.tokens.clone(), service.limits().clone()));
    let health = (reporter.clone(), not_serving.clone());
    let grpc = grpc::routes(service.clone(), gate.clone(), options.rpcs, health)?;
    let http = http::routes(service, gate, options.rpcs.then_some(options.bad_files), shutdown.clone())
        .layer(middleware::from_fn(panics::caught));
    let hosts = Hosts::new(&options.public_hosts, options.tokens.is_some(), options.tls.is_some());
    Ok(grpc.merge(http).layer(middleware::from_fn_with_state(Arc::new(hosts), hosts::pass)))
}
