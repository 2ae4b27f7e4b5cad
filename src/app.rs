//! Starts a server's parts and stops them in order.
//!
//! The start goes from the bottom up: the data directory's lock, blobs, database, workers, scheduler, API. The stop
//! goes from the top down: calls and segments first, then webhooks, then the monitoring of workers, and last the node's
//! own row. Every step has its part of one deadline, so that the whole ends in time whatever hangs.

use std::{fs::File, io, net::SocketAddr, path::PathBuf, pin::pin, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use tokio::{
    net::TcpListener,
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use crate::{
    access::{CallerLimits, Tokens, TokensError},
    api::{self, ServeError, ServerOptions, TlsFiles},
    blobs::{self, BlobError, Blobs},
    config::{BlobStore, Database, NodeRole, ServeConfig},
    delivery::{
        Deliverer, Options as WebhookOptions, Webhooks,
        egress::{Guard, Policy},
        schedule::Schedule,
        secrets::{BadMasterKey, MasterKey, Vault},
    },
    domain::NodeId,
    fault,
    fleet::{Fleet, FleetError, FleetOptions, HealthCheck, InFlight},
    ingest::{Ingest, Limits},
    objects::{self, ObjectsError},
    progress::Hub,
    results::Reader,
    scheduler::{Scheduler, SchedulerOptions, TryPolicy},
    service::{Parts, Service},
    store::{Store, StoreError},
    supervise::{Died, Part, Supervisor},
    upkeep::{self, Upkeep},
    words,
};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Time between two heartbeats in the database.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Time that a stop may take beyond [`ServeConfig::drain_timeout`].
pub const FAREWELL: Duration = Duration::from_secs(5);
/// The part of it after which the scheduler and the deliverer must have recorded their work.
const WRITTEN: Duration = Duration::from_secs(3);
/// The part of it after which everything must be done. The rest is for the process to end.
const LAST: Duration = Duration::from_millis(4_300);
/// Time for the monitoring of workers and the other small tasks to end.
const BACKGROUND: Duration = Duration::from_millis(500);

/// Why a server did not start or stopped.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The address is in use, or is not an address of this machine.
    #[error("can't listen on {}: {}", .0, words::file(.1))]
    Listen(SocketAddr, #[source] io::Error),
    /// The data directory can't be created or written.
    #[error("data directory {}: {}", .0.display(), words::file(.1))]
    DataDir(PathBuf, #[source] io::Error),
    /// Another server uses the data directory.
    #[error("data directory {0} is in use by another tidemill: stop that one, or give this one its own --data-dir")]
    InUse(PathBuf),
    /// The tokens file can't be read.
    #[error("tokens file {}: {}", .0.display(), words::file(.1))]
    ReadTokens(PathBuf, #[source] io::Error),
    /// The tokens file is invalid.
    #[error("tokens file {0}: {1}")]
    Tokens(PathBuf, #[source] TokensError),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The blob store failed.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The blob store is not there, can't be used, or is not the database's.
    #[error(transparent)]
    Objects(#[from] ObjectsError),
    /// The workers' state could not be read.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// The master key is invalid.
    #[error("the master key: {0}")]
    MasterKey(#[source] BadMasterKey),
    /// The master key's file can't be read.
    #[error("master key file {}: {}", .0.display(), words::file(.1))]
    ReadMasterKey(PathBuf, #[source] io::Error),
    /// The webhooks' HTTP client could not be made.
    #[error("webhooks: {0}")]
    Webhooks(#[source] reqwest::Error),
    /// The gRPC server failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// A part of the server has died, because of a bug or because something that it needs is gone for good.
    #[error(transparent)]
    Died(#[from] Died),
}

/// A running server.
pub struct App {
    addr: SocketAddr,
    tls: bool,
    /// Time for work in flight at the stop.
    drain: Duration,
    /// Ends the API and the progress streams.
    serving: CancellationToken,
    server: JoinHandle<()>,
    /// Ends the scheduler and the upkeep, once calls are over.
    scheduling: CancellationToken,
    scheduler: JoinHandle<()>,
    /// Ends the delivery of webhooks.
    delivering: CancellationToken,
    deliverer: JoinHandle<()>,
    /// Ends the monitoring of workers, once nothing is sent to them any more.
    watching: CancellationToken,
    /// Runs all of it.
    supervisor: Supervisor,
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
        // Errors in files are found before anything is changed.
        let options = server_options(&config)?;
        options.check().await?;
        let webhooks = webhook_options(&config)?;
        let lock = lock(&config.data_dir)?;
        let listener =
            TcpListener::bind(config.listen).await.map_err(|error| AppError::Listen(config.listen, error))?;
        let addr = listener.local_addr().map_err(|error| AppError::Listen(config.listen, error))?;
        let blobs = match config.blob_store() {
            // Files that a predecessor left half written are searched for in the whole directory.
            BlobStore::Directory(path) => {
                let opened = tokio::task::spawn_blocking(move || Blobs::directory(&path)).await;
                opened.map_err(|panic| AppError::DataDir(config.data_dir.clone(), panic.into()))??
            }
            BlobStore::Url(url) => Blobs::url(&url)?,
        };
        let place = config.blob_store().to_string();
        let store_id = objects::probe(&blobs, &place).await?;
        let store = open(&config).await?;
        let node = NodeId::generate();
        let roles = config.role_names();
        // Before the objects are settled: a server with other objects that starts now sees this one.
        store.heartbeat(&node, VERSION, &roles).await?;
        if let Err(error) = objects::establish(&store, &blobs, &place, &node, store_id).await {
            if let Err(error) = store.leave(&node).await {
                tracing::warn!(%error, "the node's row could not be removed");
            }
            return Err(error.into());
        }

        let (serving, scheduling, watching) =
            (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        let supervisor = Supervisor::default();
        let urls: Vec<String> = config.worker.iter().map(ToString::to_string).collect();
        Fleet::configure(&store, &urls).await?;
        let fleet = FleetOptions {
            limit: match config.worker_max_in_flight {
                Some(limit) => InFlight::Fixed(limit),
                None => InFlight::Adaptive { cap: config.worker_max_in_flight_cap },
            },
            api_key: config.worker_api_key.clone(),
            answer_memory: config.worker_answer_memory,
            health: HealthCheck {
                path: config.worker_health_path.path().map(str::to_owned),
                interval: config.worker_health_interval,
            },
            ..FleetOptions::default()
        };
        let fleet = Fleet::start(store.clone(), fleet, supervisor.clone(), watching.clone()).await?;
        let scheduler = Scheduler::new(
            store.clone(),
            blobs.clone(),
            fleet.clone(),
            node.clone(),
            scheduler_options(&config, options.tokens.as_ref()),
            scheduling.clone(),
        );
        let (troubles, stages) = (scheduler.troubles(), scheduler.stages());
        let run_if = |has_role, part, stop: &CancellationToken, run: BoxFuture<'static, ()>| {
            // Without its role, a part only waits for its end.
            let run = if has_role { run } else { stop.clone().cancelled_owned().boxed() };
            supervisor.spawn(part, stop, run)
        };
        let has_scheduler = config.has_role(NodeRole::Scheduler);
        let scheduler = run_if(has_scheduler, Part::Scheduler, &scheduling, scheduler.run().boxed());
        let hub = Hub::new(store.clone(), fleet.clone(), troubles, serving.clone());
        let hub_runs = hub.clone();
        supervisor.spawn(Part::Hub, &serving, async move { hub_runs.run().await });
        let heartbeat = heartbeat(store.clone(), node.clone(), roles.clone(), watching.clone());
        supervisor.spawn(Part::Heartbeat, &watching, heartbeat);
        supervisor.spawn(Part::StoreCheck, &watching, objects::watch(store.clone(), blobs.clone(), watching.clone()));
        let (heard, stop) = (store.clone(), watching.clone());
        supervisor.spawn(Part::Listener, &watching, async move {
            tokio::select! {
                died = heard.listener_died() => died,
                () = stop.cancelled() => Ok(()),
            }
        });

        let webhooks = Webhooks::new(store.clone(), webhooks).map_err(AppError::Webhooks)?;
        let delivering = CancellationToken::new();
        let deliverer = Deliverer::new(webhooks.clone(), delivering.clone());
        let sweeps = upkeep::all(&store, &blobs, &webhooks, config.lease);
        let upkeep = Upkeep::new(store.clone(), node.clone(), sweeps);
        supervisor.spawn(Part::Upkeep, &scheduling, upkeep.run(scheduling.clone()));
        let deliverer =
            run_if(config.has_role(NodeRole::Delivery), Part::Webhooks, &delivering, deliverer.run().boxed());

        let limits = Limits { max_lines: config.max_file_lines, max_bytes: config.max_file_bytes, ..Limits::default() };
        let parts = Parts {
            store: store.clone(),
            blobs: blobs.clone(),
            ingest: Ingest::new(store.clone(), blobs.clone(), limits, config.data_dir.join("tmp")),
            reader: Reader::new(store.clone(), blobs),
            hub,
            fleet,
            stages,
            webhooks,
        };
        let weights = options.tokens.as_ref().map(Tokens::weights).unwrap_or_default();
        let service = Service::new(parts, caller_limits(&config), weights, serving.clone());
        let tls = options.tls.is_some();
        let server = api::serve(listener, service, options, serving.clone());
        let server = supervisor.spawn(Part::Api, &serving, async move {
            fault::panic_in(Part::Api);
            server.await
        });
        let app = Self {
            addr,
            tls,
            drain: config.drain_timeout,
            serving,
            server,
            scheduling,
            scheduler,
            delivering,
            deliverer,
            watching,
            supervisor,
            store,
            node,
            _lock: lock,
        };
        tracing::info!(url = app.url(), node = %app.node, version = VERSION, roles, "serving gRPC and HTTP");
        Ok(app)
    }

    /// The address on which it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    #[must_use]
    pub fn url(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.addr)
    }

    /// Serves until `shutdown` is cancelled or a part dies, then stops in order.
    ///
    /// # Errors
    /// [`AppError::Died`].
    pub async fn run_until(self, shutdown: CancellationToken) -> Result<(), AppError> {
        let died = tokio::select! {
            () = shutdown.cancelled() => None,
            died = self.supervisor.died() => Some(died),
        };
        // The other parts' work is released as at any stop.
        self.stop().await;
        died.map_or(Ok(()), |died| Err(died.into()))
    }

    /// Stops in order: streams and calls, segments, webhooks, workers, the node's row. Ends within the drain timeout
    /// and [`FAREWELL`], whatever hangs; work that can't be released in that time is left to the leases.
    pub async fn stop(self) {
        tracing::info!("stopping");
        let drained = Instant::now() + self.drain;
        self.serving.cancel();
        self.scheduling.cancel();
        let mut top = pin!(async { tokio::join!(self.server, self.scheduler) });
        // What they end is still told to receivers, as long as there is time.
        let top_ended = timeout_at(drained, &mut top).await.is_ok();
        self.delivering.cancel();
        let aborted = self.deliverer.abort_handle();
        let rest = async {
            // Each part logs itself how it died.
            if !top_ended {
                let _ = top.await;
            }
            let _ = self.deliverer.await;
        };
        if timeout_at(drained + WRITTEN, rest).await.is_err() {
            tracing::warn!(
                "not all results could be written before the stop: the requests of those that are missing run again"
            );
            // Its sends end, and so do their connections.
            aborted.abort();
        }
        self.watching.cancel();
        if timeout(BACKGROUND, self.supervisor.ended()).await.is_err() {
            tracing::debug!("background tasks did not end in time");
        }
        let farewell = async {
            if let Err(error) = self.store.leave(&self.node).await {
                tracing::warn!(%error, "the node's row could not be removed");
            }
            self.store.close().await;
        };
        if timeout_at(drained + LAST, farewell).await.is_err() {
            tracing::warn!(
                "the database does not answer: other servers count this one as running until its row expires"
            );
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
            store.free_sweeps().await?;
            if released > 0 {
                tracing::info!(
                    segments = released,
                    "the last run of this server did not stop cleanly; taking over its work"
                );
            }
            Ok(store)
        }
        Database::Postgres(url) => Ok(Store::postgres(url.expose(), config.database_connections).await?),
    }
}

/// Locks the data directory for this process. The lock ends with the process, however that ends.
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

/// The options of webhook delivery.
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
        drain: config.drain_timeout,
        in_flight: config.webhook_max_in_flight,
        // Validation has refused other values.
        schedule: Schedule::try_new(config.webhook_retry_schedule.clone()).unwrap_or_default(),
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

fn caller_limits(config: &ServeConfig) -> CallerLimits {
    CallerLimits {
        requests_per_second: config.limit_requests_per_second,
        bytes_per_day: config.limit_bytes_per_day,
        queued_lines: config.limit_queued_lines,
        concurrent_uploads: config.limit_concurrent_uploads,
        infer_calls: config.limit_infer_calls,
        watches: config.limit_watches,
        downloads: config.limit_downloads,
        ..CallerLimits::default()
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
        rpcs: config.has_role(NodeRole::Api),
        tls,
        tokens,
        max_connection_age: Some(config.max_connection_age),
        drain_timeout: config.drain_timeout,
        max_connections: config.max_connections,
        public_hosts: config.public_host.clone(),
        bad_files: config.openai_bad_files,
    })
}

async fn heartbeat(store: Store, node: NodeId, roles: String, shutdown: CancellationToken) {
    let mut tick = tokio::time::interval(HEARTBEAT);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        fault::panic_in(Part::Heartbeat);
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = tick.tick() => {
                if let Err(error) = store.heartbeat(&node, VERSION, &roles).await {
                    tracing::warn!(%error, "the heartbeat could not be written");
                }
            }
        }
    }
}
