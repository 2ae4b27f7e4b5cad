//! What one PostgreSQL carries: nodes on one database, each with a simulated worker of its own, and what the database
//! servers' processes cost.
//!
//!     cargo bench --bench sizing [-- REQUESTS [NODES]]
//!
//! Two paces. Fast: REQUESTS requests a node on workers that answer at once, so that a part is full before its two seconds
//! are over. Slow: workers that take two seconds, with a thousand requests in flight, as with long answers: parts are
//! written by the clock. Each number of nodes from 1 to NODES has a database of its own on a throwaway PostgreSQL, which
//! does not fsync: what is measured is its CPU, not its disk. All share this machine's cores, so it is the CPU for a
//! request, a part and a commit that says what larger machines carry. Writes `target/bench/sizing.json`.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
#[path = "../tests/support/direct.rs"]
mod direct;
#[path = "../tests/support/postgres.rs"]
mod postgres;

use std::{
    fs,
    time::{Duration, Instant},
};

use common::{Process, TICKS_PER_SECOND, machine, report, upload};
use sea_orm::{ConnectionTrait, DatabaseConnection, Statement};
use tidemill::pb::{
    BatchStatus, CreateBatchRequest, GetBatchRequest, batch_service_client::BatchServiceClient,
    create_batch_request::Input,
};

/// Of the slow pace: a request's time, how many are in flight on each node, and how many of these rounds a run has.
const SLOW: (Duration, usize, usize) = (Duration::from_secs(2), 1_000, 12);

/// What a run came to.
struct Run {
    requests: usize,
    seconds: f64,
    nodes_cpu: f64,
    postgres_cpu: f64,
    commits: f64,
}

fn main() {
    let numbers = common::arguments().0;
    let (requests, most) = (numbers.first().copied().unwrap_or(300_000), numbers.get(1).copied().unwrap_or(3));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    println!("sizing: {requests} requests a node, 1 to {most} nodes on one PostgreSQL, {}", machine());
    println!(
        "| pace | nodes | requests/s | nodes, µs of CPU a request | PostgreSQL, µs a request | commits/s | PostgreSQL, µs a commit | PostgreSQL, % of a core |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    let mut figures = Vec::new();
    for slow in [false, true] {
        for nodes in 1..=most {
            let pace = if slow { "slow" } else { "fast" };
            let all = nodes * if slow { SLOW.1 * SLOW.2 } else { requests };
            let run = runtime.block_on(measure(nodes, all, slow));
            let per_request = |seconds: f64| seconds * 1e6 / run.requests as f64;
            let (rate, commits) = (run.requests as f64 / run.seconds, run.commits / run.seconds);
            let (own, theirs) = (per_request(run.nodes_cpu), per_request(run.postgres_cpu));
            let (a_commit, share) = (run.postgres_cpu * 1e6 / run.commits, run.postgres_cpu / run.seconds);
            println!(
                "| {pace} | {nodes} | {rate:.0} | {own:.1} | {theirs:.2} | {commits:.0} | {a_commit:.0} | {:.1} |",
                share * 100.0
            );
            figures.push(serde_json::json!({
                "pace": pace, "nodes": nodes, "requests": run.requests, "requests_per_second": rate,
                "nodes_cpu_us_per_request": own, "postgres_cpu_us_per_request": theirs, "commits_per_second": commits,
                "postgres_cpu_us_per_commit": a_commit, "postgres_share_of_a_core": share,
            }));
        }
    }
    report("sizing", serde_json::json!({ "runs": figures }));
}

async fn measure(nodes: usize, requests: usize, slow: bool) -> Run {
    let folder = tempfile::tempdir_in("target").unwrap();
    let folder_of = |name: &str| fs::canonicalize(folder.path()).unwrap().join(name);
    let database = postgres::database().await.expect("PostgreSQL's server programs");
    let objects = format!("file://{}", folder_of("objects").display());
    let latency = if slow { SLOW.0.as_millis() } else { 0 }.to_string();
    let mut running = Vec::new();
    let in_flight = SLOW.1.to_string();
    for node in 0..nodes {
        let sim =
            ["--models", "sim", "--tokens-per-second", "0", "--latency-ms", &latency, "--max-num-seqs", &in_flight];
        let sim = Process::sim(&sim);
        let worker = format!("http://{}", sim.address);
        let mut flags = vec!["--database-url", &database, "--blobs", &objects, "--worker", &worker];
        if slow {
            flags.extend(["--worker-max-in-flight", &in_flight]);
        }
        let server = Process::serve(&folder_of(&format!("node{node}")), &flags);
        let channel = server.serving().await;
        running.push((sim, server, channel));
    }
    let raw = direct::connect(&database).await;
    let mut client = BatchServiceClient::new(running[0].2.clone());
    let file = upload(&mut client, requests).await;
    let nodes_cpu = || running.iter().map(|(_, server, _)| server.cpu_seconds()).sum::<f64>();
    let (nodes_before, postgres_before, commits_before) = (nodes_cpu(), postgres_cpu(), commits(&raw).await);
    let began = Instant::now();
    let input = Some(Input::InputFileId(file.id));
    let batch = client.create_batch(CreateBatchRequest { input, ..Default::default() }).await.unwrap().into_inner().id;
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let batch = client.get_batch(GetBatchRequest { batch_id: batch.clone() }).await.unwrap().into_inner();
        if batch.status() == BatchStatus::Completed {
            assert_eq!(batch.request_counts.unwrap().completed, requests as i64);
            break;
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    let (nodes_cpu, postgres_cpu) = (nodes_cpu() - nodes_before, postgres_cpu() - postgres_before);
    // Backends tell what they have done when they have been idle for a second.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let commits = commits(&raw).await - commits_before;
    raw.close().await.unwrap();
    Run { requests, seconds, nodes_cpu, postgres_cpu, commits }
}

/// Transactions of this database, those of the measurement too: a few.
async fn commits(raw: &DatabaseConnection) -> f64 {
    let sql = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()";
    let statement = Statement::from_string(raw.get_database_backend(), sql);
    raw.query_one_raw(statement).await.unwrap().unwrap().try_get::<i64>("", "xact_commit").unwrap() as f64
}

/// Seconds of CPU of all processes of PostgreSQL on this machine, those that have ended too.
fn postgres_cpu() -> f64 {
    let mut ticks = 0.0;
    for process in fs::read_dir("/proc").unwrap().flatten() {
        // A process may end while it is looked at.
        let Ok(text) = fs::read_to_string(process.path().join("stat")) else { continue };
        let Some((name, fields)) = text.rsplit_once(')') else { continue };
        if name.ends_with("(postgres") {
            // Its own, and that of its children that have ended.
            let fields = fields.split_whitespace().skip(11).take(4);
            ticks += fields.map(|field| field.parse::<f64>().unwrap()).sum::<f64>();
        }
    }
    ticks / TICKS_PER_SECOND
}
