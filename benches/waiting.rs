//! Claim "waiting": one `WatchBatches` over ten thousand batches that all wait for a worker costs the server and its database
//! under 2% of a core each.
//!
//!     cargo bench --bench waiting [-- BATCHES [SECONDS]] [postgres]
//!
//! The real `tidemill serve` on SQLite, or with the word `postgres` on a throwaway PostgreSQL. No worker is registered, so
//! every batch waits. The same server is measured without a watcher first. Writes `target/bench/waiting.json`.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
#[path = "../tests/support/direct.rs"]
mod direct;
#[path = "../tests/support/postgres.rs"]
mod postgres;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use common::{Process, cpu_seconds, machine, report};
use futures::future::join_all;
use sea_orm::{ConnectionTrait, Statement};
use tidemill::pb::{
    CreateBatchRequest, InlineRequest, InlineRequests, WatchBatchesRequest, batch_service_client::BatchServiceClient,
    create_batch_request::Input,
};
use tonic::transport::Channel;

const GOAL: f64 = 0.02;
const CREATORS: usize = 16;
/// After the last batch was created, and after the watcher has seen them all.
const CALM: Duration = Duration::from_secs(20);

fn main() {
    let (numbers, words) = common::arguments();
    let (batches, seconds) = (numbers.first().copied().unwrap_or(10_000), numbers.get(1).copied().unwrap_or(30));
    let on_postgres = words.iter().any(|word| word == "postgres");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let folder = tempfile::tempdir_in("target").unwrap();
        let url = if on_postgres { Some(postgres::database().await.expect("PostgreSQL's programs")) } else { None };
        let blobs = format!("file://{}/blobs", folder.path().canonicalize().unwrap().display());
        std::fs::create_dir(folder.path().join("blobs")).unwrap();
        let mut flags = Vec::new();
        if let Some(url) = &url {
            flags.extend(["--database-url", url, "--blobs", &blobs]);
        }
        let server = Process::serve(folder.path(), &flags);
        let channel = server.serving().await;
        let database = match &url {
            Some(url) => Some(postmaster(url).await),
            None => None,
        };
        let kind = if on_postgres { "PostgreSQL" } else { "SQLite" };
        println!("waiting: {batches} batches on {kind}, {seconds} s each, {}", machine());
        let began = Instant::now();
        create(&channel, batches).await;
        println!("created in {:.0} s", began.elapsed().as_secs_f64());
        tokio::time::sleep(CALM).await;
        let seconds = Duration::from_secs(seconds as u64);
        let without = shares(&server, database.as_deref(), seconds).await;
        let first = Instant::now();
        let events = watch(&channel, batches).await;
        let first = first.elapsed();
        tokio::time::sleep(CALM).await;
        let before = events.load(Ordering::Relaxed);
        let with = shares(&server, database.as_deref(), seconds).await;
        let heard = events.load(Ordering::Relaxed) - before;
        println!("the first states of all after {:.1} s; {heard} events while it was measured", first.as_secs_f64());
        println!("| | server | database |\n| --- | --- | --- |");
        for (what, (server, database)) in [("no watcher", without), ("one watcher", with)] {
            println!("| {what} | {:.2}% | {:.2}% |", server * 100.0, database * 100.0);
        }
        println!("goal: under {}% of a core each", GOAL * 100.0);
        report(
            "waiting",
            serde_json::json!({ "database": kind, "batches": batches, "goal": GOAL,
                "server_without": without.0, "server": with.0,
                "database_without": without.1, "database_share": with.1 }),
        );
    });
}

async fn create(channel: &Channel, batches: usize) {
    let creators = (0..CREATORS).map(|number| {
        let mut client = BatchServiceClient::new(channel.clone());
        async move {
            for _ in (number..batches).step_by(CREATORS) {
                let request =
                    InlineRequest { custom_id: "a".into(), body: br#"{"model":"nobody-serves-it"}"#.to_vec().into() };
                let request = CreateBatchRequest {
                    endpoint: "/v1/chat/completions".into(),
                    input: Some(Input::InlineRequests(InlineRequests { requests: vec![request] })),
                    ..CreateBatchRequest::default()
                };
                client.create_batch(request).await.unwrap();
            }
        }
    });
    join_all(creators).await;
}

/// Starts the watcher, which goes on; returns once it has heard of all batches.
async fn watch(channel: &Channel, batches: usize) -> Arc<AtomicUsize> {
    let mut stream = BatchServiceClient::new(channel.clone())
        .max_decoding_message_size(64 << 20)
        .watch_batches(WatchBatchesRequest::default())
        .await
        .unwrap()
        .into_inner();
    let events = Arc::new(AtomicUsize::new(0));
    for _ in 0..batches {
        stream.message().await.unwrap().unwrap();
        events.fetch_add(1, Ordering::Relaxed);
    }
    let counter = Arc::clone(&events);
    tokio::spawn(async move {
        while let Ok(Some(_)) = stream.message().await {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    });
    events
}

/// The shares of a core that the server and PostgreSQL's processes take.
async fn shares(server: &Process, database: Option<&str>, time: Duration) -> (f64, f64) {
    let of_database = || database.map_or(0.0, cpu_of_family);
    let (of_server, before, began) = (server.cpu_seconds(), of_database(), Instant::now());
    tokio::time::sleep(time).await;
    let took = began.elapsed().as_secs_f64();
    ((server.cpu_seconds() - of_server) / took, (of_database() - before) / took)
}

/// The process that started the one that serves this connection.
async fn postmaster(url: &str) -> String {
    let connection = direct::connect(url).await;
    let question = Statement::from_string(connection.get_database_backend(), "SELECT pg_backend_pid() AS pid");
    let row = connection.query_one_raw(question).await.unwrap().unwrap();
    parent(&row.try_get::<i32>("", "pid").unwrap().to_string()).unwrap()
}

fn parent(process: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    Some(text.rsplit(')').next()?.split_whitespace().nth(1)?.to_owned())
}

/// Seconds of CPU of a process and those that it has started and that still run.
fn cpu_of_family(process: &str) -> f64 {
    let all = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let children =
        all.filter(|id| id.bytes().all(|byte| byte.is_ascii_digit()) && parent(id).as_deref() == Some(process));
    children.map(|id| cpu_seconds(&id)).sum::<f64>() + cpu_seconds(process)
}
