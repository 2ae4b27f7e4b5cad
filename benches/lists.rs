//! Claim "lists": showing and listing takes under 10 ms (p99) with a million batches, and an idle server with ten thousand
//! uses under 0.5% of a core.
//!
//!     cargo bench --bench lists [-- BATCHES [CALLS]] [postgres]
//!
//! The database is filled with finished batches by SQL; then the calls go through the real `tidemill serve` and the queries
//! of its loops through the store. On SQLite, or with the word `postgres` on a throwaway PostgreSQL. Some calls are the
//! worst there are: what they look for is only among the very oldest. Writes `target/bench/lists.json`.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;
#[path = "../tests/support/direct.rs"]
mod direct;
#[path = "../tests/support/postgres.rs"]
mod postgres;

use std::{
    future::Future,
    path::Path,
    time::{Duration, Instant},
};

use common::{Process, machine, percentile, report};
use sea_orm::{ConnectionTrait, DatabaseConnection, TransactionTrait};
use sha2::{Digest, Sha256};
use tidemill::{
    domain::{BatchId, Scope, Sequence},
    pb::{
        BatchStatus, GetBatchRequest, ListBatchesRequest, ListBatchesResponse, ListFilesRequest,
        batch_service_client::BatchServiceClient,
    },
    store::Store,
};
use tonic::{Request, transport::Channel};

const GOAL_MS: f64 = 10.0;
const IDLE_GOAL: f64 = 0.005;
/// Batches of the idle server, and how long it is watched.
const IDLE: (usize, Duration) = (10_000, Duration::from_secs(20));
/// Whose nearly all batches are, whose the ten oldest, and who sees all.
const OWNERS: [&str; 3] = ["large", "small", "all"];

/// Where the database is.
struct Place {
    folder: tempfile::TempDir,
    url: Option<String>,
}

impl Place {
    async fn new(postgres: bool) -> Self {
        let url = if postgres { Some(postgres::database().await.expect("PostgreSQL's server programs")) } else { None };
        Self { folder: tempfile::tempdir_in("target").unwrap(), url }
    }

    async fn store(&self) -> Store {
        match &self.url {
            Some(url) => Store::postgres(url, 10).await.unwrap(),
            None => Store::sqlite(&self.folder.path().join("tidemill.db")).await.unwrap(),
        }
    }

    async fn raw(&self) -> DatabaseConnection {
        let url = self.url.clone().unwrap_or_else(|| format!("sqlite://{}/tidemill.db", self.folder.path().display()));
        direct::connect(url).await
    }

    fn serve(&self) -> Process {
        let tokens = self.folder.path().join("tokens");
        let line = |name: &str| {
            let role = if name == "all" { "admin" } else { "submit" };
            format!("{name} {role} sha256:{}\n", hex::encode(Sha256::digest(name)))
        };
        std::fs::write(&tokens, OWNERS.map(line).concat()).unwrap();
        let mut flags = vec!["--tokens", tokens.to_str().unwrap()];
        if let Some(url) = &self.url {
            flags.extend(["--database-url", url]);
        }
        Process::serve(self.folder.path(), &flags)
    }
}

fn main() {
    let (numbers, words) = common::arguments();
    let (batches, calls) = (numbers.first().copied().unwrap_or(1_000_000), numbers.get(1).copied().unwrap_or(200));
    let on_postgres = words.iter().any(|word| word == "postgres");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let place = Place::new(on_postgres).await;
        let kind = if on_postgres { "PostgreSQL" } else { "SQLite" };
        let began = Instant::now();
        let store = place.store().await;
        fill(&place.raw().await, 1, batches).await;
        println!("lists: {batches} finished batches on {kind}, {calls} calls of each, {}", machine());
        println!("filled in {:.0} s, {:.0} MB", began.elapsed().as_secs_f64(), megabytes(place.folder.path()));
        println!("| call | p50 ms | p99 ms |\n| --- | --- | --- |");
        let mut figures = Vec::new();
        through_the_server(&place, batches, calls, &mut figures).await;
        of_the_loops(&store, batches, calls, &mut figures).await;
        // The goal is for a page of the default size; a thousand batches are as much work as twenty of those.
        let pages = figures.iter().filter(|(name, ..)| !name.contains("1,000"));
        let worst = pages.map(|(_, _, p99)| *p99).fold(0.0, f64::max);
        println!("worst p99: {worst:.2} ms; goal: under {GOAL_MS} ms");
        let idle = idle(on_postgres).await;
        println!(
            "idle with {} finished batches: {:.3}% of a core; goal: under {}%",
            IDLE.0,
            idle * 100.0,
            IDLE_GOAL * 100.0
        );
        let calls: serde_json::Map<_, _> = figures
            .into_iter()
            .map(|(name, p50, p99)| (name, serde_json::json!({ "p50_ms": p50, "p99_ms": p99 })))
            .collect();
        report(
            "lists",
            serde_json::json!({ "database": kind, "batches": batches, "calls": calls, "worst_p99_ms": worst,
                "goal_ms": GOAL_MS, "idle_batches": IDLE.0, "idle_share_of_a_core": idle, "idle_goal": IDLE_GOAL }),
        );
        store.close().await;
    });
}

/// Batches `from` to `to`, finished, with all the rows that they leave. The ten oldest are what is hard to find.
async fn fill(raw: &DatabaseConnection, from: usize, to: usize) {
    let sqlite = raw.get_database_backend() == sea_orm::DatabaseBackend::Sqlite;
    let id = |prefix: &str, number: &str| {
        if sqlite {
            format!("printf('{prefix}%032x', {number})")
        } else {
            format!("'{prefix}' || lpad(to_hex({number}), 32, '0')")
        }
    };
    let (batch, input, output) = (id("batch_", "i"), id("file-", "2 * i"), id("file-", "2 * i + 1"));
    let (delivery, empty) = (id("msg_", "i"), if sqlite { "x''" } else { "''::bytea" });
    let status = "CASE WHEN i <= 10 THEN 'failed' WHEN i % 20 = 0 THEN 'expired' WHEN i % 20 = 1 THEN 'cancelled' \
                  ELSE 'completed' END";
    let owner = "CASE WHEN i <= 10 THEN 'small' ELSE 'large' END";
    let rare = "CASE WHEN i <= 10 THEN 'rare' ELSE 'common' END";
    let some = 100_000;
    for first in (from..=to).step_by(some) {
        let last = (first + some - 1).min(to);
        let numbers = if sqlite {
            format!("WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last})")
        } else {
            format!("WITH n(i) AS (SELECT generate_series({first}::bigint, {last}::bigint))")
        };
        // SQLite takes a WITH before the INSERT's SELECT only inside it; so does PostgreSQL.
        let insert = |table: &str, columns: &str, select: &str| {
            format!("INSERT INTO {table} ({columns}) {numbers} SELECT {select} FROM n")
        };
        let all = [
            insert(
                "batches",
                "id, owner, status, endpoint, models, input_file_id, input_object_key, output_file_id, total, completed, \
                 errors, metadata, priority, completion_window, created_at, expires_at, in_progress_at, finalizing_at, \
                 completed_at, segments, segments_done, revision",
                &format!(
                    "{batch}, {owner}, {status}, '/v1/chat/completions', '[\"m\"]', {input}, 'inputs/x', {output}, 1000, 1000, \
                     '[]', '{{\"team\":\"a\",\"kind\":\"x\"}}', 0, 86400000000, i, i + 86400000000, i, i, i, 1, 1, 4"
                ),
            ),
            insert(
                "files",
                "id, owner, kind, filename, bytes, line_count, models, endpoint, object_key, created_at",
                &format!(
                    "{input}, {owner}, 'input', 'in.jsonl', 1000, 1000, '[\"m\"]', '/v1/chat/completions', 'inputs/x', i"
                ),
            ),
            insert(
                "files",
                "id, owner, kind, batch_id, filename, bytes, line_count, models, created_at",
                &format!(
                    "{output}, {owner}, CASE WHEN i <= 10 THEN 'error' ELSE 'output' END, {batch}, 'out.jsonl', 1000, 1000, \
                     '[]', i"
                ),
            ),
            insert("batch_models", "batch_id, model", &format!("{batch}, {rare}")),
            insert("batch_metadata", "batch_id, name, value", &format!("{batch}, 'team', 'a'")),
            insert("batch_metadata", "batch_id, name, value", &format!("{batch}, 'kind', {rare}")),
            insert(
                "file_segments",
                "file_id, idx, first_line, line_span, requests, byte_offset, byte_length, models",
                &format!("{input}, 0, 1, 1000, 1000, 0, 1000, 1"),
            ),
            insert(
                "segments",
                "batch_id, idx, first_line, line_span, requests, byte_offset, byte_length, models, state, epoch, object_key, \
                 output_bytes, output_lines",
                &format!("{batch}, 0, 1, 1000, 1000, 0, 1000, 1, 'done', 1, 'results/x', 1000, 1000"),
            ),
            insert(
                "batch_events",
                "sequence, batch_id, revision, status, snapshot, created_at",
                &format!(
                    "4 * i + r, {batch}, r + 1, CASE r WHEN 0 THEN 'validating' WHEN 1 THEN 'in_progress' \
                     WHEN 2 THEN 'finalizing' ELSE {status} END, \
                     '{{\"completed\":0,\"failed\":0,\"usage\":[0,0,0,0,0],\"output_file_id\":null,\"error_file_id\":null}}', i"
                ),
            ) + ", (SELECT 0 AS r UNION ALL SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3) AS r",
            insert(
                "webhook_deliveries",
                "id, batch_id, owner, event, url, target, body, max_attempts, timeout, state, attempts, next_attempt_at, \
                 created_at, settled_at",
                &format!(
                    "{delivery}, {batch}, {owner}, 'completed', 'https://example.com/', 'https://example.com', {empty}, 10, \
                     30000000, 'delivered', 1, i, i, {}",
                    tidemill::domain::Timestamp::now().0
                ),
            ) + " WHERE i % 10 = 0",
        ];
        let tx = raw.begin().await.unwrap();
        for sql in all {
            tx.execute_unprepared(&sql).await.unwrap();
        }
        tx.execute_unprepared(&format!("UPDATE counters SET value = {}", 4 * last + 3)).await.unwrap();
        tx.commit().await.unwrap();
    }
    if !sqlite {
        // As autovacuum does by itself a little later.
        raw.execute_unprepared("VACUUM ANALYZE").await.unwrap();
    }
}

type Figures = Vec<(String, f64, f64)>;

/// Times a call again and again.
async fn time<T, F: Future<Output = T>>(
    name: &str,
    calls: usize,
    figures: &mut Figures,
    mut call: impl FnMut(usize) -> F,
) {
    let mut times = Vec::with_capacity(calls);
    // The first ones open connections and read pages.
    for call_number in 0..calls + 3 {
        let began = Instant::now();
        call(call_number).await;
        if call_number >= 3 {
            times.push(began.elapsed().as_secs_f64() * 1_000.0);
        }
        // Whoever is far too slow is known soon.
        if times.iter().sum::<f64>() > 20_000.0 {
            break;
        }
    }
    let (p50, p99) = (percentile(&mut times, 0.5), percentile(&mut times, 0.99));
    println!("| {name} | {p50:.2} | {p99:.2} |");
    figures.push((name.to_owned(), p50, p99));
}

fn request<T>(of: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {of}").parse().unwrap());
    request
}

async fn list(channel: &Channel, of: &str, request_: ListBatchesRequest) -> ListBatchesResponse {
    BatchServiceClient::new(channel.clone()).list_batches(request(of, request_)).await.unwrap().into_inner()
}

async fn through_the_server(place: &Place, batches: usize, calls: usize, figures: &mut Figures) {
    let server = place.serve();
    let channel = server.serving().await;
    let id = |number: usize| format!("batch_{number:032x}");
    time("GetBatch", calls, figures, |n| {
        let mut client = BatchServiceClient::new(channel.clone());
        let get = GetBatchRequest { batch_id: id(1 + (n * 7_919) % batches) };
        async move { client.get_batch(request("all", get)).await.unwrap() }
    })
    .await;
    // A deep page: half-way down, by the token of the page before.
    let deep = |of: &'static str| {
        let channel = channel.clone();
        async move {
            let first = list(&channel, of, ListBatchesRequest { page_size: 1, ..Default::default() }).await;
            use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
            let token = URL_SAFE_NO_PAD.decode(first.next_page_token).unwrap();
            URL_SAFE_NO_PAD.encode([&token[..9], id(batches / 2).as_bytes()].concat())
        }
    };
    for of in OWNERS {
        let plain = ListBatchesRequest::default();
        let status = |status: BatchStatus| ListBatchesRequest { statuses: vec![status.into()], ..plain.clone() };
        let pair = |name: &str, value: &str| ListBatchesRequest {
            metadata: [(name.to_owned(), value.to_owned())].into(),
            ..plain.clone()
        };
        let both = |one: ListBatchesRequest, two: ListBatchesRequest| ListBatchesRequest {
            metadata: one.metadata.into_iter().chain(two.metadata).collect(),
            statuses: [one.statuses, two.statuses].concat(),
            model: one.model + &two.model,
            ..ListBatchesRequest::default()
        };
        let rare_model = ListBatchesRequest { model: "rare".into(), ..plain.clone() };
        let unfinished =
            [BatchStatus::Validating, BatchStatus::InProgress, BatchStatus::Finalizing, BatchStatus::Cancelling];
        let all = [
            ("first page", plain.clone()),
            ("1,000 of them", ListBatchesRequest { page_size: 1_000, ..plain.clone() }),
            ("deep page", ListBatchesRequest { page_token: deep(of).await, ..plain.clone() }),
            ("status, common", status(BatchStatus::Completed)),
            ("status, rare", status(BatchStatus::Failed)),
            ("status, none", status(BatchStatus::InProgress)),
            ("unfinished", ListBatchesRequest { statuses: unfinished.map(Into::into).to_vec(), ..plain.clone() }),
            ("ended otherwise", both(status(BatchStatus::Failed), status(BatchStatus::Cancelled))),
            ("metadata, common", pair("team", "a")),
            ("metadata, rare", pair("kind", "rare")),
            ("metadata, none", pair("kind", "none")),
            ("metadata, common and rare", both(pair("team", "a"), pair("kind", "rare"))),
            ("metadata, common, status, rare", both(pair("team", "a"), status(BatchStatus::Failed))),
            ("metadata, common, status, none", both(pair("team", "a"), status(BatchStatus::InProgress))),
            ("metadata, rare, status, common", both(pair("kind", "rare"), status(BatchStatus::Completed))),
            ("model, common", ListBatchesRequest { model: "common".into(), ..plain.clone() }),
            ("model, rare", rare_model.clone()),
            ("model, rare, metadata, common", both(rare_model, pair("team", "a"))),
        ];
        for (name, asked) in all {
            // 1,000 batches are some 300 KB on the wire.
            let calls = if name.starts_with("1,000") { calls / 10 } else { calls };
            time(&format!("ListBatches of {of}: {name}"), calls, figures, |_| list(&channel, of, asked.clone())).await;
        }
        for purpose in ["", "batch", "batch_output"] {
            time(&format!("ListFiles of {of}: {purpose:?}"), calls, figures, |_| {
                let mut client = BatchServiceClient::new(channel.clone());
                let asked = ListFilesRequest { purpose: purpose.into(), ..Default::default() };
                async move { client.list_files(request(of, asked)).await.unwrap() }
            })
            .await;
        }
    }
    server.stop();
}

/// What the server's own loops ask the database.
async fn of_the_loops(store: &Store, batches: usize, calls: usize, figures: &mut Figures) {
    let served = ["m".to_owned()];
    let last = Sequence(i64::try_from(4 * batches + 3).unwrap());
    let watched: Vec<_> =
        (1..=1_000).map(|n| BatchId::from_text(format!("batch_{:032x}", n * batches / 1_000))).collect();
    let week = Duration::from_secs(7 * 24 * 3_600);
    let owner = tidemill::domain::Owner::named("large");
    let large = Scope::Of("large".into());
    time("scheduler: candidates", calls, figures, |_| store.candidates(&served, 64)).await;
    time("sweep: windows", calls, figures, |_| store.close_windows(500)).await;
    time("sweep: garbage", calls, figures, |_| store.take_garbage(500)).await;
    time("sweep: old deliveries", calls, figures, |_| store.purge_deliveries(week)).await;
    time("sweep: old dead letters", calls, figures, |_| store.purge_dead_letters(week, &Scope::All)).await;
    time("webhooks: due", calls, figures, |_| store.due_targets(&[])).await;
    time("webhooks: reap", calls, figures, |_| store.reap_deliveries(false, |_| Duration::ZERO)).await;
    time("webhooks: oldest due", calls, figures, |_| store.oldest_due()).await;
    time("hub: revisions of 1,000", calls, figures, |_| store.revisions(&watched)).await;
    time("hub: last sequence", calls, figures, |_| store.last_sequence()).await;
    time("hub: events after", calls, figures, |_| store.events_after(&large, last, 500)).await;
    time("hub: unfinished", calls, figures, |_| store.unfinished(&large, 10_000)).await;
    time("hub: history", calls, figures, |n| store.history(&watched[n % watched.len()])).await;
    time("limits: queued lines", calls, figures, |_| store.queued_lines(&owner)).await;
}

/// The share of a core that an idle server uses.
async fn idle(on_postgres: bool) -> f64 {
    let place = Place::new(on_postgres).await;
    let store = place.store().await;
    fill(&place.raw().await, 1, IDLE.0).await;
    store.close().await;
    let server = place.serve();
    server.serving().await;
    // What a start does is over by then.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = server.cpu_seconds();
    tokio::time::sleep(IDLE.1).await;
    let used = server.cpu_seconds() - before;
    server.stop();
    used / IDLE.1.as_secs_f64()
}

fn megabytes(folder: &Path) -> f64 {
    let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().metadata().unwrap().len());
    files.sum::<u64>() as f64 / 1e6
}
