//! One node and its workers, in this process.

use std::{collections::BTreeMap, net::SocketAddr, path::Path, time::Duration};

use bytes::Bytes;
use futures::TryStreamExt;
use serde_json::Value;
use tidemill::{
    blobs::Blobs,
    domain::{
        Batch, BatchId, Endpoint, File, FileId, FileKind, NewBatch, NodeId, Priority, Scope, SegmentIndex, SegmentSpan,
        Timestamp, Weights, WorkerPriority, batch::DEFAULT_WINDOW,
    },
    fleet::{Fleet, FleetOptions, InFlight},
    progress::Hub,
    results::Reader,
    scheduler::{Scheduler, SchedulerOptions, TryPolicy},
    sim::{Sim, SimConfig},
    store::{CreatedBatch, InsertedFile, Store},
    upkeep::{self, Upkeep},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Longer than anything here takes; a test that waits for it has failed.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// A worker that listens.
pub struct Worker {
    pub sim: Sim,
    pub address: SocketAddr,
    stop: CancellationToken,
    served: Option<JoinHandle<std::io::Result<()>>>,
}

impl Worker {
    pub async fn start(config: SimConfig) -> Self {
        Self::start_at(config, "127.0.0.1:0".parse().unwrap()).await
    }

    pub async fn start_at(config: SimConfig, address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sim, stop) = (Sim::new(config).unwrap(), CancellationToken::new());
        let served = Some(tokio::spawn(sim.clone().serve(listener, stop.clone())));
        Self { sim, address, stop, served }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// As if it had been killed.
    pub async fn kill(&mut self) {
        self.stop.cancel();
        self.served.take().unwrap().await.unwrap().unwrap();
    }
}

/// Short spans, so that tests are quick.
pub fn options() -> SchedulerOptions {
    SchedulerOptions {
        lease: Duration::from_secs(30),
        flush_interval: Duration::from_millis(50),
        request_timeout: Duration::from_secs(20),
        tries: TryPolicy { base: Duration::from_millis(10), patience: Duration::ZERO, ..TryPolicy::default() },
        drain: Duration::from_secs(5),
        worker_priority: WorkerPriority::Off,
        weights: Weights::default(),
    }
}

/// A node without its API.
pub struct Node {
    pub store: Store,
    pub blobs: Blobs,
    pub fleet: Fleet,
    pub reader: Reader,
    pub hub: Hub,
    shutdown: CancellationToken,
    scheduler: JoinHandle<()>,
    upkeep: JoinHandle<()>,
    /// The workers are looked after until the scheduler has stopped.
    fleet_shutdown: CancellationToken,
}

impl Node {
    pub async fn start(folder: &Path, workers: &[&Worker]) -> Self {
        Self::start_with(folder, workers, options(), 64).await
    }

    pub async fn start_with(folder: &Path, workers: &[&Worker], options: SchedulerOptions, limit: u32) -> Self {
        let blobs = Blobs::directory(&folder.join("blobs")).unwrap();
        Self::start_on(folder, blobs, workers, options, limit).await
    }

    /// With its objects somewhere else.
    pub async fn start_on(
        folder: &Path,
        blobs: Blobs,
        workers: &[&Worker],
        options: SchedulerOptions,
        limit: u32,
    ) -> Self {
        Self::start_limited(folder, blobs, workers, options, InFlight::Fixed(limit)).await
    }

    /// With a limit of any kind.
    pub async fn start_limited(
        folder: &Path,
        blobs: Blobs,
        workers: &[&Worker],
        options: SchedulerOptions,
        limit: InFlight,
    ) -> Self {
        let fleet = FleetOptions { limit, ..FleetOptions::default() };
        Self::start_fleet(folder, blobs, workers, options, fleet).await
    }

    /// With a fleet of any kind.
    pub async fn start_fleet(
        folder: &Path,
        blobs: Blobs,
        workers: &[&Worker],
        options: SchedulerOptions,
        fleet: FleetOptions,
    ) -> Self {
        let store = Store::sqlite(&folder.join("db")).await.unwrap();
        store.release_all().await.unwrap();
        store.free_sweeps().await.unwrap();
        let (shutdown, fleet_shutdown) = (CancellationToken::new(), CancellationToken::new());
        let urls: Vec<String> = workers.iter().map(|worker| worker.url()).collect();
        Fleet::configure(&store, &urls).await.unwrap();
        let fleet = Fleet::start(store.clone(), fleet, &TaskTracker::new(), fleet_shutdown.clone()).await.unwrap();
        let (node, sweeps) = (NodeId::generate(), upkeep::of_batches(&store, &blobs, options.lease));
        let upkeep = Upkeep::new(store.clone(), node.clone(), sweeps);
        let upkeep = tokio::spawn(upkeep.run(shutdown.clone()));
        let scheduler = Scheduler::new(store.clone(), blobs.clone(), fleet.clone(), node, options, shutdown.clone());
        let hub = Hub::new(store.clone(), fleet.clone(), scheduler.troubles(), shutdown.clone());
        let scheduler = tokio::spawn(scheduler.run());
        let reader = Reader::new(store.clone(), blobs.clone());
        Self { store, blobs, fleet, reader, hub, shutdown, scheduler, upkeep, fleet_shutdown }
    }

    /// Stops in order.
    pub async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(PATIENCE, self.scheduler).await.expect("the scheduler stops").unwrap();
        tokio::time::timeout(PATIENCE, self.upkeep).await.expect("the upkeep stops").unwrap();
        self.fleet_shutdown.cancel();
        self.store.close().await;
    }

    /// A batch of these lines, in segments of `per_segment`.
    pub async fn submit(&self, lines: &[String], per_segment: usize) -> BatchId {
        self.submit_as(lines, per_segment, 0).await
    }

    pub async fn submit_as(&self, lines: &[String], per_segment: usize, priority: i32) -> BatchId {
        self.submit_by("", lines, per_segment, priority).await
    }

    /// A batch of somebody's.
    pub async fn submit_of(&self, owner: &str, lines: &[String], per_segment: usize) -> BatchId {
        self.submit_by(owner, lines, per_segment, 0).await
    }

    async fn submit_by(&self, owner: &str, lines: &[String], per_segment: usize, priority: i32) -> BatchId {
        let file = self.upload(owner, lines, per_segment).await;
        let new = NewBatch {
            owner: owner.into(),
            input_file_id: file,
            endpoint: endpoint_of(lines),
            completion_window: DEFAULT_WINDOW,
            priority: Priority::new(priority).unwrap(),
            metadata: BTreeMap::new(),
            request_id: None,
            request_hash: None,
            webhook: None,
            webhook_endpoint_id: None,
            output_expires_after: None,
        };
        match self.store.create_batch(new).await.unwrap() {
            CreatedBatch::New(batch) => batch.id,
            other => panic!("{other:?}"),
        }
    }

    async fn upload(&self, owner: &str, lines: &[String], per_segment: usize) -> FileId {
        let id = FileId::generate();
        let key = format!("inputs/{id}");
        let (mut text, mut segments, mut models) = (String::new(), Vec::new(), Vec::<String>::new());
        for (index, some) in lines.chunks(per_segment).enumerate() {
            let (offset, mut mask) = (text.len(), 0);
            for line in some {
                let value: Value = serde_json::from_str(line).unwrap();
                let model = value["body"]["model"].as_str().unwrap().to_owned();
                let bit = models.iter().position(|other| *other == model).unwrap_or_else(|| {
                    models.push(model);
                    models.len() - 1
                });
                mask |= 1 << bit;
                text.push_str(line);
                text.push('\n');
            }
            segments.push(SegmentSpan {
                index: SegmentIndex(index as i32),
                first_line: (index * per_segment + 1) as i64,
                line_span: some.len() as i32,
                requests: some.len() as i32,
                offset: offset as i64,
                length: (text.len() - offset) as i64,
                models: mask,
                crc32c: Some(crc32c::crc32c(&text.as_bytes()[offset..])),
            });
        }
        let file = File {
            id: id.clone(),
            owner: owner.into(),
            kind: FileKind::Input,
            filename: "test.jsonl".into(),
            bytes: text.len() as i64,
            line_count: lines.len() as i64,
            models,
            endpoint: Some(endpoint_of(lines)),
            created_at: Timestamp::now(),
            expires_at: None,
            object_key: Some(key.clone()),
            crc32c: Some(crc32c::crc32c(text.as_bytes())),
        };
        self.blobs.put(&key, text.into()).await.unwrap();
        assert!(matches!(self.store.insert_file(&file, None, &segments).await.unwrap(), InsertedFile::New));
        id
    }

    /// The batch, once `until` holds of it.
    pub async fn when(&self, id: &BatchId, until: impl Fn(&Batch) -> bool) -> Batch {
        let mut changes = self.store.changes();
        let wait = async {
            loop {
                let batch = self.store.batch(id, &Scope::All).await.unwrap().unwrap();
                if until(&batch) {
                    return batch;
                }
                let _ = tokio::time::timeout(Duration::from_millis(200), changes.recv()).await;
            }
        };
        match tokio::time::timeout(PATIENCE, wait).await {
            Ok(batch) => batch,
            Err(_) => panic!(
                "the batch did not get there: {:?}, with workers {:?}",
                self.store.batch(id, &Scope::All).await,
                self.fleet.workers()
            ),
        }
    }

    /// What the batch says it waits for, once `until` holds of it.
    pub async fn waits(&self, id: &BatchId, until: impl Fn(Option<&str>) -> bool) -> Option<String> {
        let wait = async {
            loop {
                let batch = self.store.batch(id, &Scope::All).await.unwrap().unwrap();
                let reason = self.hub.progress(&batch).await.unwrap().waiting_reason;
                if until(reason.as_deref()) {
                    return reason;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("it says so")
    }

    pub async fn ended(&self, id: &BatchId) -> Batch {
        self.when(id, |batch| batch.status.is_terminal()).await
    }

    /// The lines of a batch's output and error files.
    pub async fn results(&self, batch: &Batch) -> (Vec<Value>, Vec<Value>) {
        let mut files = [Vec::new(), Vec::new()];
        for (lines, id) in files.iter_mut().zip([&batch.output_file_id, &batch.error_file_id]) {
            let Some(id) = id else { continue };
            let file = self.store.file(id, &Scope::All).await.unwrap().unwrap();
            let pieces: Vec<Bytes> = self.reader.download(&file, 0).await.unwrap().try_collect().await.unwrap();
            let bytes = pieces.concat();
            assert_eq!(bytes.len() as i64, file.bytes, "a result file is as long as it says");
            lines
                .extend(bytes.split_inclusive(|byte| *byte == b'\n').map(|line| serde_json::from_slice(line).unwrap()));
            assert_eq!(lines.len() as i64, file.line_count);
        }
        let [output, errors] = files;
        (output, errors)
    }
}

/// The endpoint that the lines name.
fn endpoint_of(lines: &[String]) -> Endpoint {
    let first: Value = serde_json::from_str(&lines[0]).unwrap();
    first["url"].as_str().unwrap().parse().unwrap()
}

/// A chat request for a model.
pub fn chat(id: &str, model: &str) -> String {
    format!(
        r#"{{"custom_id":"{id}","method":"POST","url":"/v1/chat/completions","body":{{"model":"{model}","messages":[{{"role":"user","content":"{id}"}}],"max_tokens":4}}}}"#
    )
}

/// Chat requests `0..count` for the model `sim`.
pub fn chats(count: usize) -> Vec<String> {
    (0..count).map(|number| chat(&format!("r{number}"), "sim")).collect()
}

/// The `custom_id`s of result lines.
pub fn ids(lines: &[Value]) -> Vec<String> {
    lines.iter().map(|line| line["custom_id"].as_str().unwrap().to_owned()).collect()
}

/// The first promise: every request has exactly one line, and the lines are in input order.
pub fn assert_one_line_each(lines: &[String], output: &[Value], errors: &[Value]) {
    let wanted: Vec<String> = lines
        .iter()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["custom_id"].as_str().unwrap().to_owned())
        .collect();
    for part in [output, errors] {
        let mut from = wanted.iter();
        for id in ids(part) {
            assert!(from.any(|wanted| *wanted == id), "{id} is not in input order, or twice");
        }
    }
    let mut all = [ids(output), ids(errors)].concat();
    let mut sorted = wanted;
    all.sort();
    sorted.sort();
    assert_eq!(all, sorted, "lines lost or doubled");
}
