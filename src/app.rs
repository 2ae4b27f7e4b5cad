//! Wires everything and stops it in order.
//!
//! Started from the bottom up: the data directory's lock, blobs, database, workers, scheduler, API. Stopped from the top down:
//! calls first, then segments, then the watch over the workers, at last the node's own row; each with a deadline.

use std::{fs::File, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use tokio::{net::TcpListener, task::JoinHandle, time::MissedTickBehavior};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use zeroize::Zeroizing;

use crate::{
    api::{self, CallerLimits, ServeError, ServerOptions, Services, TlsFiles, Tokens, TokensError},
    blobs::{self, BlobError, Blobs},
    config::{BlobStore, Database, Role, ServeConfig},
    delivery::{
        Deliverer, Options as WebhookOptions, Webhooks,
        egress::{Guard, Policy},
        secrets::{BadMasterKey, MasterKey, Vault},
    },
    domain::NodeId,
    fleet::{Fleet, FleetError, FleetOptions, InFlight},
    ingest::{Ingest, Limits},
    progress::Hub,
    results::Reader,
    scheduler::{Scheduler, SchedulerOptions, TryPolicy},
    store::{Store, StoreError},
    telemetry,
};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Between two signs of life in the database.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How long the last writes of a stop may take.
const FAREWELL: Duration = Duration::from_secs(5);

/// Why a server did not start, or did not go on.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The address is taken, or not this machine's.
    #[error("can't listen on {0}: {1}")]
    Listen(SocketAddr, #[source] io::Error),
    /// The data directory can't be made or written.
    #[error("data directory {0}: {1}")]
    DataDir(PathBuf, #[source] io::Error),
    /// Another server has it.
    #[error("data directory {0} is in use by another tidemill: stop that one, or give this one its own --data-dir")]
    InUse(PathBuf),
    /// The tokens file can't be read.
    #[error("tokens file {0}: {1}")]
    ReadTokens(PathBuf, #[source] io::Error),
    /// The tokens file is not in order.
    #[error("tokens file {0}: {1}")]
    Tokens(PathBuf, #[source] TokensError),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The blob store.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The workers.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// The master key is none.
    #[error("the master key: {0}")]
    MasterKey(#[source] BadMasterKey),
    /// The master key's file can't be read.
    #[error("master key file {0}: {1}")]
    ReadMasterKey(PathBuf, #[source] io::Error),
    /// The webhooks' HTTP client.
    #[error("webhooks: {0}")]
    Webhooks(#[source] reqwest::Error),
    /// The gRPC server.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A part of the server has panicked: it is a bug.
    #[error("the server has crashed: {0}")]
    Crashed(String),
}

/// A running server.
pub struct App {
    addr: SocketAddr,
    tls: bool,
    /// Ends the API and the progress streams.
    serving: CancellationToken,
    server: JoinHandle<Result<(), ServeError>>,
    /// Ends the scheduler, once calls are over.
    scheduling: CancellationToken,
    scheduler: JoinHandle<()>,
    /// Ends the delivery of webhooks.
    delivering: CancellationToken,
    deliverer: JoinHandle<()>,
    /// Ends the watch over the workers, once nothing is sent to them any more.
    watching: CancellationToken,
    background: TaskTracker,
    store: Store,
    node: NodeId,
    /// Held until the process ends.
    _lock: File,
}

impl App {
    /// Starts a server. When this returns it answers.
    ///
    /// # Errors
    /// [`AppError`].
    pub async fn start(config: ServeConfig) -> Result<Self, AppError> {
        // What can be wrong with files is found before anything is touched.
        let options = server_options(&config)?;
        options.check().await?;
        let lock = lock(&config.data_dir)?;
        let listener =
            TcpListener::bind(config.listen).await.map_err(|error| AppError::Listen(config.listen, error))?;
        let addr = listener.local_addr().map_err(|error| AppError::Listen(config.listen, error))?;
        let blobs = match config.blob_store() {
            BlobStore::Directory(path) => Blobs::directory(&path)?,
            BlobStore::Url(url) => Blobs::url(&url)?,
        };
        let store = open(&config).await?;
        let node = NodeId::generate();
        let roles = config.role_names();
        store.heartbeat(&node, VERSION, &roles).await?;

        let (serving, scheduling, watching) =
            (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        let background = TaskTracker::new();
        let urls: Vec<String> = config.worker.iter().map(ToString::to_string).collect();
        Fleet::configure(&store, &urls).await?;
        let fleet = FleetOptions {
            limit: match config.worker_max_in_flight {
                Some(limit) => InFlight::Fixed(limit),
                None => InFlight::Adaptive { cap: config.worker_max_in_flight_cap },
            },
            api_key: config.worker_api_key.as_ref().map(|key| key.expose().to_owned()),
            answer_memory: config.worker_answer_memory,
        };
        let fleet = Fleet::start(store.clone(), fleet, &background, watching.clone()).await?;
        let scheduler = Scheduler::new(
            store.clone(),
            blobs.clone(),
            fleet.clone(),
            node.clone(),
            scheduler_options(&config, options.tokens.as_ref()),
            scheduling.clone(),
        );
        let (troubles, stages) = (scheduler.troubles(), scheduler.stages());
        let scheduler = run_if(config.has_role(Role::Scheduler), scheduler.run(), &scheduling);
        let hub = Hub::new(store.clone(), fleet.clone(), troubles, serving.clone());
        let hub_runs = hub.clone();
        background.spawn(async move { hub_runs.run().await });
        background.spawn(heartbeat(store.clone(), node.clone(), roles.clone(), watching.clone()));

        let webhooks = Webhooks::new(store.clone(), webhook_options(&config)?).map_err(AppError::Webhooks)?;
        let delivering = CancellationToken::new();
        let deliverer = Deliverer::new(webhooks.clone(), delivering.clone());
        let deliverer = run_if(config.has_role(Role::Delivery), deliverer.run(), &delivering);

        let limits = Limits { max_lines: config.max_file_lines, max_bytes: config.max_file_bytes, ..Limits::default() };
        let services = Services {
            store: store.clone(),
            blobs: blobs.clone(),
            ingest: Ingest::new(store.clone(), blobs.clone(), limits, config.data_dir.join("tmp")),
            reader: Reader::new(store.clone(), blobs),
            hub,
            fleet,
            stages,
            webhooks,
            metrics: Arc::new(telemetry::render),
        };
        let tls = options.tls.is_some();
        let server = tokio::spawn(api::serve(listener, services, options, serving.clone()));
        let app = Self {
            addr,
            tls,
            serving,
            server,
            scheduling,
            scheduler,
            delivering,
            deliverer,
            watching,
            background,
            store,
            node,
            _lock: lock,
        };
        tracing::info!(url = app.url(), node = %app.node, version = VERSION, roles, "serving gRPC and HTTP");
        Ok(app)
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.addr)
    }

    /// Serves until told to stop, then stops in order.
    ///
    /// # Errors
    /// [`AppError::Serve`] or [`AppError::Crashed`] if it ended by itself.
    pub async fn run_until(mut self, shutdown: CancellationToken) -> Result<(), AppError> {
        let ended = tokio::select! {
            () = shutdown.cancelled() => None,
            ended = &mut self.server => Some(ended),
            ended = &mut self.scheduler => Some(ended.map(|()| Ok(()))),
        };
        let Some(ended) = ended else {
            self.stop().await;
            return Ok(());
        };
        self.serving.cancel();
        self.scheduling.cancel();
        self.delivering.cancel();
        self.watching.cancel();
        match ended {
            Ok(Ok(())) => Err(AppError::Crashed("it stopped without being told to".into())),
            Ok(Err(error)) => Err(error.into()),
            Err(panic) => Err(AppError::Crashed(panic.to_string())),
        }
    }

    /// Stops in order: streams and calls, segments, workers, the node's row.
    pub async fn stop(self) {
        tracing::info!("stopping");
        self.serving.cancel();
        self.scheduling.cancel();
        // Both have deadlines of their own.
        let (server, scheduler) = tokio::join!(self.server, self.scheduler);
        // After both: what they ended is still told, if there is time, and else at the next start.
        self.delivering.cancel();
        if let Err(panic) = self.deliverer.await {
            tracing::error!(%panic, "the delivery of webhooks has crashed");
        }
        if let Err(error) =
            server.map_err(|panic| panic.to_string()).and_then(|ended| ended.map_err(|error| error.to_string()))
        {
            tracing::error!(error, "the API ended with an error");
        }
        if let Err(panic) = scheduler {
            tracing::error!(%panic, "the scheduler has crashed");
        }
        self.watching.cancel();
        self.background.close();
        let farewell = async {
            self.background.wait().await;
            if let Err(error) = self.store.leave(&self.node).await {
                tracing::warn!(%error, "the node's row could not be removed");
            }
            self.store.close().await;
        };
        if tokio::time::timeout(FAREWELL, farewell).await.is_err() {
            tracing::warn!("background work did not end in time");
        }
        tracing::info!("stopped");
    }
}

/// The database, migrated. A SQLite database has one node, this one: whatever was leased was its dead predecessor's.
async fn open(config: &ServeConfig) -> Result<Store, AppError> {
    match config.database() {
        Database::Sqlite(path) => {
            let store = Store::sqlite(&path).await?;
            let released = store.release_all().await?;
            if released > 0 {
                tracing::info!(segments = released, "taking over from a run that did not end in order");
            }
            Ok(store)
        }
        Database::Postgres(url) => Ok(Store::postgres(url.expose(), config.database_connections).await?),
    }
}

/// Makes the data directory this process's own. The lock goes with the process, however it ends.
fn lock(data_dir: &std::path::Path) -> Result<File, AppError> {
    let failed = |error: io::Error| AppError::DataDir(data_dir.to_owned(), error);
    blobs::make_folder(&data_dir.join("tmp")).map_err(failed)?;
    let file = File::options().create(true).truncate(false).write(true).open(data_dir.join("lock")).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(AppError::InUse(data_dir.to_owned())),
        Err(std::fs::TryLockError::Error(error)) => Err(failed(error)),
    }
}

/// How webhooks are delivered.
fn webhook_options(config: &ServeConfig) -> Result<WebhookOptions, AppError> {
    let key = |text: &str| MasterKey::from_base64(text).map_err(AppError::MasterKey);
    let current = match (&config.master_key, &config.master_key_file) {
        (Some(text), _) => Some(key(text.expose())?),
        (None, Some(path)) => {
            let text = std::fs::read_to_string(path).map(Zeroizing::new);
            Some(key(&text.map_err(|error| AppError::ReadMasterKey(path.clone(), error))?)?)
        }
        (None, None) => None,
    };
    let previous = config.previous_master_key.as_ref().map(|text| key(text.expose())).transpose()?;
    let policy = Policy { allow: config.webhook_allow_cidr.clone(), https_only: config.webhook_https_only };
    Ok(WebhookOptions {
        secrets: config.webhook_secret.iter().cloned().collect(),
        sole_node: matches!(config.database(), Database::Sqlite(_)),
        ..WebhookOptions::new(Guard::new(policy), Vault::new(current, previous))
    })
}

fn scheduler_options(config: &ServeConfig, tokens: Option<&Tokens>) -> SchedulerOptions {
    SchedulerOptions {
        worker_priority: config.worker_priority,
        weights: tokens.map(Tokens::weights).unwrap_or_default(),
        lease: config.lease,
        flush_interval: config.flush_interval,
        request_timeout: config.request_timeout,
        tries: TryPolicy { max_tries: config.max_tries, ..TryPolicy::default() },
        drain: config.drain_timeout,
    }
}

fn server_options(config: &ServeConfig) -> Result<ServerOptions, AppError> {
    let tokens = match &config.tokens {
        None => None,
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(|error| AppError::ReadTokens(path.clone(), error))?;
            Some(Tokens::parse(&text).map_err(|error| AppError::Tokens(path.clone(), error))?)
        }
    };
    let tls = match (&config.tls_cert, &config.tls_key) {
        (Some(cert), Some(key)) => {
            Some(TlsFiles { cert: cert.clone(), key: key.clone(), client_ca: config.tls_client_ca.clone() })
        }
        _ => None,
    };
    Ok(ServerOptions {
        rpcs: config.has_role(Role::Api),
        tls,
        tokens,
        max_connection_age: Some(config.max_connection_age),
        drain_timeout: config.drain_timeout,
        limits: CallerLimits {
            requests_per_second: config.limit_requests_per_second,
            bytes_per_day: config.limit_bytes_per_day,
            queued_lines: config.limit_queued_lines,
            concurrent_uploads: config.limit_concurrent_uploads,
            infer_calls: config.limit_infer_calls,
            watches: config.limit_watches,
            downloads: config.limit_downloads,
        },
        max_connections: config.max_connections,
        public_hosts: config.public_host.clone(),
    })
}

/// Runs a part of the server; without its role it only waits for its end.
fn run_if(
    has_role: bool,
    part: impl Future<Output = ()> + Send + 'static,
    shutdown: &CancellationToken,
) -> JoinHandle<()> {
    if has_role { tokio::spawn(part) } else { tokio::spawn(shutdown.clone().cancelled_owned()) }
}

async fn heartbeat(store: Store, node: NodeId, roles: String, shutdown: CancellationToken) {
    let mut tick = tokio::time::interval(HEARTBEAT);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = tick.tick() => {
                if let Err(error) = store.heartbeat(&node, VERSION, &roles).await {
                    tracing::warn!(%error, "no sign of life could be written");
                }
            }
        }
    }
}
