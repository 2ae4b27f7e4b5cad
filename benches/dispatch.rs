//! Claim "dispatch": durable requests/s of the whole engine over requests/s of a bare loop of the same HTTP client that
//! keeps nothing, against a simulated worker with no latency on a thread of its own.
//!
//!     cargo bench --bench dispatch [-- REQUESTS [ROUNDS]]
//!
//! The two take turns; medians are compared. Writes `target/bench/dispatch.json`.

#![allow(clippy::unwrap_used, missing_docs)]

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};
use tidemill::{
    blobs::Blobs,
    domain::{
        BatchStatus, Endpoint, NewBatch, NodeId, Owner, Priority, Scope, Weights, WorkerPriority, batch::DEFAULT_WINDOW,
    },
    fleet::{Fleet, FleetOptions, InFlight},
    ingest::{Begun, Ingest, Limits, NewUpload},
    scheduler::{Scheduler, SchedulerOptions, TryPolicy},
    sim::{Sim, SimConfig},
    store::{CreatedBatch, Store},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

const IN_FLIGHT: u32 = 64;

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let (requests, rounds) = (numbers.first().copied().unwrap_or(100_000), numbers.get(1).copied().unwrap_or(5));
    let worker = worker();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (mut engine, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        bare.push(per_second(requests, || runtime.block_on(bare_loop(worker, requests))));
        let folder = tempfile::tempdir_in("target").unwrap();
        let (store, ingest) = runtime.block_on(prepare(folder.path(), worker));
        let batch = runtime.block_on(upload(&store, &ingest, requests));
        engine.push(per_second(requests, || runtime.block_on(run_batch(folder.path(), &store, batch.clone()))));
    }
    let (engine, bare) = (median(&mut engine), median(&mut bare));
    println!("dispatch: {requests} requests, {rounds} rounds, {IN_FLIGHT} in flight, one core each");
    println!("| engine, durable | bare loop | ratio |\n| --- | --- | --- |");
    println!("| {engine:.0} req/s | {bare:.0} req/s | {:.2} |", engine / bare);
    std::fs::create_dir_all("target/bench").unwrap();
    let report = serde_json::json!({
        "claim": "dispatch", "requests": requests, "rounds": rounds, "in_flight": IN_FLIGHT,
        "engine_per_second": engine, "bare_per_second": bare, "ratio": engine / bare,
    });
    std::fs::write("target/bench/dispatch.json", report.to_string()).unwrap();
}

fn worker() -> SocketAddr {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            let sim = Sim::new(SimConfig::default()).unwrap();
            sim.serve(listener, CancellationToken::new()).await.unwrap();
        });
    });
    receiver.recv().unwrap()
}

fn body(number: usize) -> String {
    format!(
        r#"{{"model":"sim","messages":[{{"role":"user","content":"What is the answer to question number {number}?"}}],"max_tokens":16}}"#
    )
}

async fn bare_loop(worker: SocketAddr, requests: usize) {
    tidemill::telemetry::install_tls_provider();
    let client =
        reqwest::Client::builder().no_proxy().tcp_nodelay(true).pool_max_idle_per_host(usize::MAX).build().unwrap();
    let url: reqwest::Url = format!("http://{worker}/v1/chat/completions").parse().unwrap();
    let mut in_flight = FuturesUnordered::new();
    let mut next = 0;
    let mut done = 0;
    while done < requests {
        while in_flight.len() < IN_FLIGHT as usize && next < requests {
            let request = client.post(url.clone()).header("content-type", "application/json").body(body(next));
            in_flight.push(async move { request.send().await.unwrap().bytes().await.unwrap().len() });
            next += 1;
        }
        in_flight.next().await.unwrap();
        done += 1;
    }
}

async fn prepare(folder: &Path, worker: SocketAddr) -> (Store, Ingest) {
    let store = Store::sqlite(&folder.join("db")).await.unwrap();
    Fleet::configure(&store, &[format!("http://{worker}")]).await.unwrap();
    let blobs = Blobs::directory(&folder.join("blobs")).unwrap();
    let ingest =
        Ingest::new(store.clone(), blobs, Limits { max_lines: u64::MAX, ..Limits::default() }, folder.to_owned());
    (store, ingest)
}

async fn upload(store: &Store, ingest: &Ingest, requests: usize) -> tidemill::domain::BatchId {
    let spec = NewUpload { filename: "bench.jsonl".into(), ..NewUpload::default() };
    let Begun::Upload(mut upload) = ingest.begin(spec).await.unwrap() else { unreachable!() };
    for some in (0..requests).collect::<Vec<_>>().chunks(2_000) {
        let text: String = some
            .iter()
            .map(|number| {
                format!(
                    "{{\"custom_id\":\"r{number}\",\"method\":\"POST\",\"url\":\"/v1/chat/completions\",\"body\":{}}}\n",
                    body(*number)
                )
            })
            .collect();
        upload.write(Bytes::from(text)).await.unwrap();
    }
    let file = upload.finish().await.unwrap();
    let new = NewBatch {
        owner: Owner::nobody(),
        input_file_id: file.id,
        endpoint: Endpoint::ChatCompletions,
        completion_window: DEFAULT_WINDOW,
        priority: Priority::default(),
        metadata: BTreeMap::new(),
        request_id: None,
        request_hash: None,
        webhook: None,
        webhook_endpoint_id: None,
        output_expires_after: None,
    };
    match store.create_batch(new).await.unwrap() {
        CreatedBatch::New(batch) => batch.id,
        other => panic!("{other:?}"),
    }
}

async fn run_batch(folder: &Path, store: &Store, batch: tidemill::domain::BatchId) {
    let (shutdown, fleet_shutdown) = (CancellationToken::new(), CancellationToken::new());
    let options = FleetOptions { limit: InFlight::Fixed(IN_FLIGHT), ..FleetOptions::default() };
    let fleet = Fleet::start(store.clone(), options, &TaskTracker::new(), fleet_shutdown.clone()).await.unwrap();
    let options = SchedulerOptions {
        lease: Duration::from_secs(30),
        flush_interval: Duration::from_secs(2),
        request_timeout: Duration::from_secs(600),
        tries: TryPolicy::default(),
        drain: Duration::from_secs(5),
        worker_priority: WorkerPriority::Off,
        weights: Weights::default(),
    };
    let blobs = Blobs::directory(&folder.join("blobs")).unwrap();
    let scheduler = Scheduler::new(store.clone(), blobs, fleet, NodeId::generate(), options, shutdown.clone());
    let running = tokio::spawn(scheduler.run());
    loop {
        let now = store.batch(&batch, &Scope::All).await.unwrap().unwrap();
        if now.status.is_terminal() {
            assert_eq!((now.status, now.counts.completed), (BatchStatus::Completed, now.counts.total));
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    shutdown.cancel();
    running.await.unwrap();
    fleet_shutdown.cancel();
}

fn per_second(requests: usize, run: impl FnOnce()) -> f64 {
    let started = Instant::now();
    run();
    requests as f64 / started.elapsed().as_secs_f64()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
