//! Claim "watch": five thousand `WatchBatch` streams on one busy batch hear of a change within 250 ms (p99, from its commit to
//! the event received) and slow the batch by less than 3%.
//!
//!     cargo bench --bench watch [-- WATCHERS [REQUESTS [ROUNDS]]]
//!
//! The real `tidemill serve` and a real `tidemill sim` that takes 20 ms a request, each a process of its own; the streams are
//! real ones, 100 on a connection, at the default interval. Runs with and without watchers take turns; the worker is
//! registered when all watch. What the watchers cost the server is its CPU time with them less that without. The watchers'
//! own process shares the machine's cores, and its share is in the figures. Writes `target/bench/watch.json`.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{Process, machine, median, percentile, report, upload};
use futures::future::join_all;
use tidemill::pb::{
    BatchEvent, BatchStatus, CancelBatchRequest, CreateBatchRequest, RegisterWorkerRequest, RemoveWorkerRequest,
    WatchBatchRequest, batch_event::Event, batch_service_client::BatchServiceClient, create_batch_request::Input,
    worker_admin_client::WorkerAdminClient,
};
use tokio::task::JoinSet;
use tonic::{Streaming, transport::Channel};

const GOALS: (f64, f64) = (250.0, 0.03);
const STREAMS_PER_CONNECTION: usize = 100;
/// Between the end of a run's preparations and its begin.
const CALM: Duration = Duration::from_millis(500);

/// Milliseconds from a commit or a read on the server to the event's receipt.
#[derive(Default)]
struct Heard {
    states: Vec<f64>,
    progress: Vec<f64>,
}

struct Run {
    seconds: f64,
    server_cpu: f64,
    own_cpu: f64,
    heard: Heard,
}

fn main() {
    let numbers = common::arguments().0;
    let number = |at: usize, default: usize| numbers.get(at).copied().unwrap_or(default);
    let (watchers, requests, rounds) = (number(0, 5_000), number(1, 60_000), number(2, 5));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let folder = tempfile::tempdir_in("target").unwrap();
        let sim = Process::sim(&["--models", "sim", "--latency-ms", "20", "--tokens-per-second", "0"]);
        let server = Process::serve(folder.path(), &[]);
        let world = World::new(&sim, &server, watchers, requests).await;
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            without.push(world.run(0).await);
            with.push(world.run(watchers).await);
        }
        let (mut states, mut progress) = (world.cancelled().await.states, Vec::new());
        for run in &mut with {
            states.append(&mut run.heard.states);
            progress.append(&mut run.heard.progress);
        }
        let of = |runs: &[Run], what: fn(&Run) -> f64| median(&mut runs.iter().map(what).collect::<Vec<_>>());
        let (slow, plain) = (of(&with, |run| run.seconds), of(&without, |run| run.seconds));
        let cpu = of(&with, |run| run.server_cpu / run.seconds) - of(&without, |run| run.server_cpu / run.seconds);
        let own = of(&with, |run| run.own_cpu / run.seconds);
        let slower = slow / plain - 1.0;
        println!("watch: {watchers} streams, {requests} requests a run, {rounds} rounds, {}", machine());
        println!("| | p50 ms | p99 ms | worst ms | events |\n| --- | --- | --- | --- | --- |");
        let mut figures = serde_json::json!({
            "watchers": watchers, "requests": requests, "rounds": rounds, "goal_p99_ms": GOALS.0, "goal_slower": GOALS.1,
            "seconds_with": slow, "seconds_without": plain, "slower": slower,
            "server_cpu_share_of_a_core": cpu, "server_cpu_us_per_watcher_second": cpu / watchers as f64 * 1e6,
            "own_cpu_share_of_a_core": own, "server_peak_mb": server.peak_mb(),
        });
        for (name, times) in [("states, from their commit", &mut states), ("progress, from its read", &mut progress)] {
            let [p50, p99, worst] = [0.5, 0.99, 1.0].map(|share| percentile(times, share));
            println!("| {name} | {p50:.1} | {p99:.1} | {worst:.1} | {} |", times.len());
            figures[name] = serde_json::json!({ "p50_ms": p50, "p99_ms": p99, "worst_ms": worst, "events": times.len() });
        }
        println!("| batch with watchers | without | slower by |\n| --- | --- | --- |");
        println!("| {slow:.2} s | {plain:.2} s | {:.1}% |", slower * 100.0);
        println!(
            "the server: {:.1}% of a core for all watchers, {:.1} µs a second for each; their own process: {:.1}%",
            cpu * 100.0,
            cpu / watchers as f64 * 1e6,
            own * 100.0
        );
        report("watch", figures);
    });
}

struct World<'a> {
    server: &'a Process,
    worker: String,
    client: BatchServiceClient<Channel>,
    workers: WorkerAdminClient<Channel>,
    connections: Vec<BatchServiceClient<Channel>>,
    file: String,
}

impl<'a> World<'a> {
    async fn new(sim: &Process, server: &'a Process, watchers: usize, requests: usize) -> Self {
        let channel = server.serving().await;
        let mut client = BatchServiceClient::new(channel.clone());
        let file = upload(&mut client, requests).await;
        let connections = (0..watchers.div_ceil(STREAMS_PER_CONNECTION)).map(|_| server.channel());
        let connections = join_all(connections).await.into_iter().map(BatchServiceClient::new).collect();
        Self {
            server,
            worker: format!("http://{}", sim.address),
            client,
            workers: WorkerAdminClient::new(channel),
            connections,
            file: file.id,
        }
    }

    /// A batch that begins when all watch it. Nobody counts the state in which a stream begins.
    async fn begin(&self, watchers: usize) -> (String, Vec<Streaming<BatchEvent>>, String) {
        let input = Some(Input::InputFileId(self.file.clone()));
        let batch = self.client.clone().create_batch(CreateBatchRequest { input, ..Default::default() }).await;
        let batch = batch.unwrap().into_inner().id;
        // The first watches in any run: it tells the end.
        let streams = join_all((0..watchers.max(1)).map(|at| {
            let mut client = self.connections[at % self.connections.len()].clone();
            let request = WatchBatchRequest { batch_id: batch.clone(), ..Default::default() };
            async move {
                let mut stream = client.watch_batch(request).await.unwrap().into_inner();
                stream.message().await.unwrap().unwrap();
                stream
            }
        }))
        .await;
        tokio::time::sleep(CALM).await;
        let worker = self
            .workers
            .clone()
            .register_worker(RegisterWorkerRequest { url: self.worker.clone(), ..Default::default() })
            .await;
        (batch, streams, worker.unwrap().into_inner().id)
    }

    async fn run(&self, watchers: usize) -> Run {
        let (_, streams, worker) = self.begin(watchers).await;
        let (began, cpu, own) = (now_ms(), self.server.cpu_seconds(), own_cpu_seconds());
        let (heard, ended) = hear(streams, BatchStatus::Completed).await;
        let run = Run {
            seconds: (ended - began) / 1_000.0,
            server_cpu: self.server.cpu_seconds() - cpu,
            own_cpu: own_cpu_seconds() - own,
            heard,
        };
        self.workers.clone().remove_worker(RemoveWorkerRequest { worker_id: worker }).await.unwrap();
        run
    }

    /// One that is cancelled while it is busy.
    async fn cancelled(&self) -> Heard {
        let watchers = self.connections.len() * STREAMS_PER_CONNECTION;
        let (batch, streams, worker) = self.begin(watchers).await;
        let mut client = self.client.clone();
        let cancel = async move {
            tokio::time::sleep(Duration::from_secs(2)).await;
            client.cancel_batch(CancelBatchRequest { batch_id: batch }).await.unwrap();
        };
        let (heard, ()) = tokio::join!(hear(streams, BatchStatus::Cancelled), cancel);
        self.workers.clone().remove_worker(RemoveWorkerRequest { worker_id: worker }).await.unwrap();
        heard.0
    }
}

/// Reads all streams to their ends; also when the batch ended, by the server's clock, which is this machine's.
async fn hear(streams: Vec<Streaming<BatchEvent>>, end: BatchStatus) -> (Heard, f64) {
    let mut all = JoinSet::new();
    for mut stream in streams {
        all.spawn(async move {
            let (mut heard, mut ended) = (Heard::default(), None);
            while let Some(event) = stream.message().await.unwrap() {
                let now = now_ms();
                let at = event.event_time.unwrap();
                let at = at.seconds as f64 * 1_000.0 + f64::from(at.nanos) / 1e6;
                match event.event.unwrap() {
                    Event::StateChanged(batch) => {
                        heard.states.push(now - at);
                        if batch.status() == end {
                            ended = Some(at);
                        }
                    }
                    Event::Progress(_) => heard.progress.push(now - at),
                    Event::Heartbeat(_) => {}
                }
            }
            (heard, ended.expect("every stream has the end"))
        });
    }
    let (mut heard, mut ended) = (Heard::default(), 0.0);
    for (mut one, at) in all.join_all().await {
        heard.states.append(&mut one.states);
        heard.progress.append(&mut one.progress);
        ended = at;
    }
    (heard, ended)
}

fn now_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64() * 1_000.0
}

fn own_cpu_seconds() -> f64 {
    common::cpu_seconds("self")
}
