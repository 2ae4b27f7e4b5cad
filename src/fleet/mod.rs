//! The workers: their state, their slots, and one HTTP request to one of them.
//!
//! [`board`] decides who gets a worker's next slot, [`limit`] how many slots it has, [`health`] when it is down,
//! [`outage`] when it is at fault for failures, [`load`] reads its metrics: all pure. [`probe`], [`adapt`] and
//! [`dispatch`] talk to workers, [`judge`] passes on the outcomes of requests; this file connects them.

mod adapt;
#[doc(hidden)]
pub mod board;
mod body;
mod cuts;
mod dispatch;
mod extras;
#[doc(hidden)]
pub mod health;
mod infer;
mod judge;
#[doc(hidden)]
pub mod limit;
mod listing;
mod live;
mod load;
mod memory;
mod names;
#[doc(hidden)]
pub mod outage;
mod outages;
mod outcome;
mod passage;
mod probe;
mod reasons;
mod slots;
mod sockets;
mod status;
mod worker;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use reqwest::Client;
use tokio::{
    sync::{Semaphore, watch},
    time::MissedTickBehavior,
};
use tokio_util::sync::CancellationToken;

pub use board::{Rank, Tenant, Want, WorkerKey};
pub use body::MAX_ANSWER;
pub use cuts::Cut;
pub use dispatch::{Call, may_refuse_priority};
pub use extras::Extras;
pub use infer::Inferred;
pub use live::{LiveCall, Passing};
pub use memory::Held;
pub use outage::Blame;
pub use outcome::{Answer, Failure, FailureKind};
pub use passage::Broken;
pub use probe::HealthCheck;
pub use slots::{Acquire, NoSlot, Slot};
pub use worker::{Worker, base_url};

use crate::{
    config::SecretSetting,
    domain::{HealthChange, OwnHealth, Timestamp, WorkerId},
    fault, https,
    store::{RemovedWorker, Store, StoreError, WorkerRecord},
    supervise::{Part, Supervisor},
    telemetry::{self, Seldom},
};
use memory::AnswerMemory;
use slots::Desks;

/// Time between two reads of the workers in the database, where other nodes register some too.
const SYNC: Duration = Duration::from_secs(1);
/// Tries of an interactive call, over different workers.
const INFER_TRIES: usize = 3;
/// Idle connections are closed before vLLM's server closes them (5 s), so that no request meets a closing one.
const POOL_IDLE: Duration = Duration::from_secs(3);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerState {
    /// It has not passed a health check yet.
    Starting,
    /// It takes requests.
    Healthy,
    /// It gets no new requests, because it is being drained.
    Draining,
    /// It does not pass its health check.
    Down,
}

/// A worker as clients see it.
#[derive(Clone, Debug)]
pub struct WorkerView {
    pub id: WorkerId,
    /// Base URL, without `/v1`.
    pub url: String,
    /// The models that its `/v1/models` lists.
    pub models: Vec<String>,
    pub state: WorkerState,
    /// Requests that this node has in flight at it.
    pub in_flight: u32,
    /// Those of them that are live calls, of no batch.
    pub live: u32,
    /// The most requests that this node has in flight at it.
    pub limit: u32,
    /// Its metrics. `None` if it has none with vLLM's names.
    pub load: Option<Load>,
    /// Generated tokens per second over the last seconds, as seen from here.
    pub output_tokens_per_second: f64,
    /// Requests answered per second over the last seconds, as seen from here.
    pub requests_per_second: f64,
    /// The share of prompt tokens found in its prefix cache, 0 to 1, in the last second with any. `None` if it does not
    /// report that.
    pub prefix_hit_rate: Option<f64>,
    /// The mean time from sending a request to its complete answer, over the last seconds with answers.
    pub request_time: Option<Duration>,
    /// Why it is down.
    pub last_error: Option<String>,
    /// How it fails all requests, or all requests for a model, while it is at fault.
    pub complaints: Vec<Complaint>,
    /// How it is asked whether it is well, where that is not the server's setting.
    pub health: OwnHealth,
    /// When it was registered.
    pub created_at: Timestamp,
}

impl WorkerView {
    /// Whether it lists the model or a pattern that matches it.
    #[must_use]
    pub fn serves(&self, model: &str) -> bool {
        self.models.iter().any(|listed| names::stands_for(listed, model))
    }

    /// How it fails all requests for the model, if it does.
    #[must_use]
    pub fn complaint_of(&self, model: &str) -> Option<&Complaint> {
        self.complaints.iter().find(|complaint| complaint.model.as_deref().is_none_or(|of| of == model))
    }
}

/// What is wrong with a worker that passes its health check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// Such as "answers 502 to every request".
    pub what: String,
    /// The only model that this is about.
    pub model: Option<String>,
    /// Since when, by this machine's clock.
    pub since: Timestamp,
    /// Whether enough requests have failed that the worker is at fault; otherwise the requests may be.
    pub is_certain: bool,
}

/// A worker's load, as it reports it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// `vllm:num_requests_running`
    pub running: f64,
    /// `vllm:num_requests_waiting`
    pub waiting: f64,
    /// `vllm:kv_cache_usage_perc`, 0 to 1.
    pub kv_cache_usage: f64,
    /// `vllm:num_preemptions_total`
    pub preemptions: f64,
    /// `vllm:prefix_cache_queries_total`, tokens.
    pub prefix_queries: f64,
    /// `vllm:prefix_cache_hits_total`, tokens.
    pub prefix_hits: f64,
}

/// Why a worker could not be added or changed.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// The URL can't be a worker's.
    #[error("{0}")]
    BadUrl(String),
    /// There is no such worker.
    #[error("no worker {0}")]
    NotFound(WorkerId),
    /// The server's configuration names it.
    #[error("worker {0} comes from the server's configuration: remove it there")]
    FromConfig(WorkerId),
    /// The HTTP client can't be made.
    #[error("the HTTP client for workers can't be created: {0}")]
    Client(String),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why a request was not answered by any worker.
#[derive(Debug, thiserror::Error)]
pub enum InferError {
    /// No healthy worker serves the model.
    #[error("no healthy worker serves the model {0:?}")]
    NoWorker(String),
    /// No worker answered in time.
    #[error("no worker answered within {0:?}")]
    Timeout(Duration),
    /// The workers that took it failed.
    #[error("{0}")]
    Failed(String),
}

/// How the limit of requests in flight at one worker is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InFlight {
    /// This fixed limit, at least 1.
    Fixed(u32),
    /// The number that keeps the worker full, found by measuring.
    Adaptive {
        /// The upper bound, at least 1.
        cap: u32,
    },
}

impl InFlight {
    /// The first limit of a new worker.
    fn first(self) -> u32 {
        match self {
            Self::Fixed(limit) => limit,
            Self::Adaptive { cap } => limit::LimitFinder::new(cap).limit(),
        }
    }
}

/// The options for workers.
#[derive(Clone, Debug)]
pub struct FleetOptions {
    /// The limit of requests in flight per worker.
    pub limit: InFlight,
    /// Sent to every worker as a bearer token: what `vllm serve --api-key` asks for.
    pub api_key: Option<SecretSetting>,
    /// Bytes that answers may hold from their first byte until their result line is durable; one answer more at most.
    pub answer_memory: u64,
    /// How workers' health is checked.
    pub health: HealthCheck,
    /// How long the client of a live call may take hardly anything of its answer while requests wait for the worker.
    pub slow_client: Duration,
}

impl Default for FleetOptions {
    fn default() -> Self {
        Self {
            limit: InFlight::Adaptive { cap: 1_024 },
            api_key: None,
            answer_memory: 512 * 1024 * 1024,
            health: HealthCheck::default(),
            slow_client: passage::CROWDED,
        }
    }
}

/// The workers of this node. Cheap to clone.
#[derive(Clone)]
pub struct Fleet {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    client: Client,
    options: FleetOptions,
    memory: AnswerMemory,
    desks: Mutex<Desks>,
    workers: Mutex<BTreeMap<WorkerKey, Arc<Worker>>>,
    syncing: tokio::sync::Mutex<()>,
    /// The permits for connections to workers: a part of the files that this process may have open.
    sockets: Semaphore,
    /// When this server's own faults were logged.
    own_faults: Seldom,
    /// Counts changes of the served models; wakes the scheduler.
    topology: watch::Sender<u64>,
    supervisor: Supervisor,
    shutdown: CancellationToken,
}

impl Fleet {
    /// Starts monitoring the workers in the database. `tasks` runs the loops, `shutdown` ends them.
    ///
    /// # Errors
    /// [`FleetError`] if the workers can't be read.
    pub async fn start(
        store: Store,
        options: FleetOptions,
        tasks: impl Into<Supervisor>,
        shutdown: CancellationToken,
    ) -> Result<Self, FleetError> {
        telemetry::install_tls_provider();
        judge::describe_metrics();
        memory::describe_metrics();
        let client = https::client(|builder| {
            builder
                .no_proxy()
                .redirect(reqwest::redirect::Policy::none())
                .connect_timeout(probe::TIMEOUT)
                .pool_idle_timeout(POOL_IDLE)
                .pool_max_idle_per_host(usize::MAX)
                .tcp_nodelay(true)
        })
        .map_err(|error| FleetError::Client(error.to_string()))?;
        let inner = Inner {
            store,
            client,
            memory: AnswerMemory::new(options.answer_memory),
            options,
            desks: Mutex::default(),
            workers: Mutex::default(),
            syncing: tokio::sync::Mutex::default(),
            sockets: Semaphore::new(sockets::budget()),
            own_faults: Seldom::every(judge::SAY_AGAIN),
            topology: watch::Sender::new(0),
            supervisor: tasks.into(),
            shutdown,
        };
        let fleet = Self { inner: Arc::new(inner) };
        fleet.sync().await?;
        let looked_after = fleet.clone();
        let stop = fleet.inner.shutdown.clone();
        fleet.inner.supervisor.spawn(Part::Workers, &stop, async move { looked_after.look_after().await });
        Ok(fleet)
    }

    /// The task set of the fleet's loops, for loops of other parts that work with workers.
    #[must_use]
    pub fn supervisor(&self) -> &Supervisor {
        &self.inner.supervisor
    }

    async fn look_after(self) {
        let mut tick = tokio::time::interval(SYNC);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            fault::panic_in(Part::Workers);
            tokio::select! {
                () = self.inner.shutdown.cancelled() => return,
                _ = tick.tick() => {}
            }
            self.inner.memory.publish();
            if let Err(error) = self.sync().await {
                tracing::warn!(%error, "the list of workers could not be read");
            }
        }
    }

    /// Brings the workers in memory in line with those in the database.
    async fn sync(&self) -> Result<(), FleetError> {
        // One at a time: with a list that was read before another call has added a worker, that worker would be
        // removed.
        let _alone = self.inner.syncing.lock().await;
        let records = self.inner.store.workers().await?;
        let known: BTreeMap<WorkerId, Arc<Worker>> =
            self.inner.workers.lock().values().map(|worker| (worker.id.clone(), worker.clone())).collect();
        let wanted: BTreeSet<&WorkerId> = records.iter().map(|record| &record.id).collect();
        for worker in known.values().filter(|worker| !wanted.contains(&worker.id)) {
            self.inner.forget(worker);
        }
        for record in &records {
            match known.get(&record.id) {
                Some(worker) => {
                    worker.set_health(&record.health);
                    let changed =
                        std::mem::replace(&mut worker.state.lock().draining, record.draining) != record.draining;
                    if changed {
                        self.inner.refresh(worker);
                    }
                }
                None => self.add(record),
            }
        }
        Ok(())
    }

    fn add(&self, record: &WorkerRecord) {
        let Ok(base) = base_url(&record.url) else {
            tracing::error!(url = %record.url, "a stored worker has no usable URL");
            return;
        };
        let key = {
            let mut desks = self.inner.desks.lock();
            desks.next_key += 1;
            WorkerKey(desks.next_key)
        };
        let limit = self.inner.options.limit.first();
        let worker = Arc::new(Worker::new(key, record, &base, limit, self.inner.shutdown.child_token()));
        self.inner.workers.lock().insert(key, worker.clone());
        let (inner, gone) = (&self.inner, worker.gone.clone());
        inner.supervisor.spawn(Part::Limit, &gone, adapt::run(inner.clone(), worker.clone(), base.clone()));
        inner.supervisor.spawn(Part::Probe, &gone, judge::keep_gate(inner.clone(), worker.clone()));
        inner.supervisor.spawn(Part::Probe, &gone, probe::run(inner.clone(), worker, base));
    }

    /// All workers, in the order in which they were added.
    #[must_use]
    pub fn workers(&self) -> Vec<WorkerView> {
        let workers: Vec<_> = self.inner.workers.lock().values().cloned().collect();
        let mut views: Vec<_> = workers
            .into_iter()
            .map(|worker| {
                let (in_flight, live) = {
                    let board = &self.inner.desks.lock().board;
                    (board.load(worker.key).0, board.live(worker.key))
                };
                worker.view(in_flight, live, worker.limit())
            })
            .collect();
        views.sort_by(|a, b| a.id.cmp(&b.id));
        views
    }

    fn view(&self, id: &WorkerId) -> Result<WorkerView, FleetError> {
        self.workers().into_iter().find(|worker| worker.id == *id).ok_or_else(|| FleetError::NotFound(id.clone()))
    }

    /// Adds a worker, durably, or ends the draining of the one with that URL.
    ///
    /// # Errors
    /// [`FleetError::BadUrl`], [`FleetError::Store`].
    pub async fn register(&self, url: &str) -> Result<WorkerView, FleetError> {
        self.register_with(url, &HealthChange::default()).await
    }

    /// Like [`Self::register`]; also changes the worker's own health check settings.
    ///
    /// # Errors
    /// [`FleetError::BadUrl`], [`FleetError::Store`].
    pub async fn register_with(&self, url: &str, health: &HealthChange) -> Result<WorkerView, FleetError> {
        let base = base_url(url).map_err(FleetError::BadUrl)?;
        let record = self.inner.store.register_worker_with(&worker::canonical(&base), health).await?;
        self.sync().await?;
        self.view(&record.id)
    }

    /// Adds the workers that the configuration names; those that it no longer names are removed.
    ///
    /// # Errors
    /// [`FleetError::BadUrl`], [`FleetError::Store`].
    pub async fn configure(store: &Store, urls: &[String]) -> Result<(), FleetError> {
        let urls = urls
            .iter()
            .map(|url| base_url(url).map(|url| worker::canonical(&url)).map_err(FleetError::BadUrl))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(store.configure_workers(&urls).await?)
    }

    /// Drains a worker: it gets no new requests, and those in flight finish.
    ///
    /// # Errors
    /// [`FleetError`].
    pub async fn drain(&self, id: &WorkerId) -> Result<WorkerView, FleetError> {
        self.inner.store.drain_worker(id).await?.ok_or_else(|| FleetError::NotFound(id.clone()))?;
        self.sync().await?;
        self.view(id)
    }

    /// Removes a worker. Its requests in flight are abandoned and run elsewhere.
    ///
    /// # Errors
    /// [`FleetError`].
    pub async fn remove(&self, id: &WorkerId) -> Result<(), FleetError> {
        match self.inner.store.remove_worker(id).await? {
            RemovedWorker::Removed => Ok(self.sync().await?),
            RemovedWorker::NotFound => Err(FleetError::NotFound(id.clone())),
            RemovedWorker::FromConfig => Err(FleetError::FromConfig(id.clone())),
        }
    }

    /// The models that healthy, undraining workers serve.
    #[must_use]
    pub fn served(&self) -> BTreeSet<Arc<str>> {
        self.inner.desks.lock().board.served()
    }

    /// The given models that no healthy, undrained worker serves.
    #[must_use]
    pub fn unserved<'a>(&self, models: &'a [String]) -> Vec<&'a str> {
        let desks = self.inner.desks.lock();
        models.iter().map(String::as_str).filter(|model| !desks.board.is_served(model)).collect()
    }

    /// Whether a worker lists patterns of models: then [`Fleet::served`] has to know which models are wanted.
    #[must_use]
    pub fn lists_patterns(&self) -> bool {
        self.inner.desks.lock().board.lists_patterns()
    }

    /// Sets the models that batches need; those that match patterns count as served.
    pub fn want(&self, models: &[String]) {
        let models = models.iter().map(|model| Arc::from(model.as_str())).collect();
        if self.inner.desks.lock().board.want(models) {
            self.inner.topology.send_modify(|version| *version += 1);
        }
    }

    /// The number of requests for a model that can be in flight at once. 0: no worker serves it now.
    #[must_use]
    pub fn capacity(&self, model: &str) -> u32 {
        self.inner.desks.lock().board.capacity(model)
    }

    /// The workers that serve a model now, by [`Worker::affinity`].
    #[must_use]
    pub fn affinities(&self, model: &str) -> Vec<u64> {
        let keys: Vec<WorkerKey> = self.inner.desks.lock().board.serving(model).collect();
        let workers = self.inner.workers.lock();
        keys.iter().filter_map(|key| workers.get(key)).map(|worker| worker.affinity()).collect()
    }

    /// Requests that its workers have answered, of all of them together.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.inner.workers.lock().values().map(|worker| worker.answers()).sum()
    }

    /// A receiver that changes whenever the serving workers or their models change.
    #[must_use]
    pub fn topology(&self) -> watch::Receiver<u64> {
        self.inner.topology.subscribe()
    }

    /// Bytes that answers hold now, of [`FleetOptions::answer_memory`].
    #[must_use]
    pub fn answer_memory_used(&self) -> u64 {
        self.inner.memory.used()
    }

    /// A slot, if one is free and no request of the same rank waits for one.
    #[must_use]
    pub fn try_acquire(&self, want: &Want) -> Option<Slot> {
        let key = self.inner.desks.lock().board.take(want)?;
        self.inner.slot(key, want.holder())
    }

    /// Waits for this many slots, at least 1, as long as it takes. Dropping it ends the wait.
    #[must_use]
    pub fn acquire(&self, want: Want, slots: u32) -> Acquire {
        Acquire::new(self.inner.clone(), want, slots)
    }
}
