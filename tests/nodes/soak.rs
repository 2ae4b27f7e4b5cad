//! Much work, and a node killed every few seconds while it lasts: nothing lost, nothing doubled, every webhook settled.
//! By default as short as a test must be. A million requests, three minutes:
//!
//! ```text
//! cargo build --release
//! TIDEMILL_BIN=target/release/tidemill TIDEMILL_SOAK_REQUESTS=1000000 TIDEMILL_SOAK_SECONDS=180 \
//!   TIDEMILL_SOAK_KILL_EVERY=5 cargo test --release --test nodes soak -- --nocapture
//! ```

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde::Deserialize;
use tidemill::pb::{Batch, BatchStatus, DownloadFileRequest};
use tokio::{task::JoinSet, time::Instant};

use crate::{
    alone,
    calls::{Anybody, of_file},
    cluster::{Cluster, WorkerProcess},
    history::{self, answer_tokens, check_states},
    hooks::{self, Hooks, Via},
    setting,
    support::{patience::HANG, postgres},
};

const NODES: usize = 3;
const WORKERS: usize = 3;
const BATCHES: usize = 10;
/// What a request takes at a worker.
const LATENCY: Duration = Duration::from_millis(200);

/// What is looked at of a result line.
#[derive(Deserialize)]
struct Line<'a> {
    custom_id: &'a str,
    response: Option<Response>,
}

#[derive(Deserialize)]
struct Response {
    status_code: u16,
    body: Body,
}

#[derive(Deserialize)]
struct Body {
    usage: Usage,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: u64,
    completion_tokens: u64,
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_killed_every_few_seconds_lose_and_double_nothing() {
    let _turn = alone().await;
    let Some(database) = postgres::database().await else { return };
    let requests: usize = setting("TIDEMILL_SOAK_REQUESTS", 4_000);
    let seconds: u64 = setting("TIDEMILL_SOAK_SECONDS", 8);
    let every = Duration::from_secs_f64(setting("TIDEMILL_SOAK_KILL_EVERY", 2.0));
    let seed: u64 = setting("TIDEMILL_CHAOS_SEED", 1);
    let mut random = StdRng::seed_from_u64(seed);
    // The workers set the pace: so many requests at once that all of them take a little longer than the kills.
    let rate = requests as f64 / (seconds as f64 * 1.15);
    let at_once = ((rate * LATENCY.as_secs_f64() / WORKERS as f64).ceil() as usize).max(1).to_string();
    let latency = LATENCY.as_millis().to_string();
    let worker_flags = ["--latency-ms", &latency, "--tokens-per-second", "0", "--max-num-seqs", &at_once];
    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        workers.push(WorkerProcess::start(&worker_flags).await);
    }
    let urls = workers.iter().map(WorkerProcess::url).collect::<Vec<_>>().join(",");
    // One node alone keeps the workers busy, so the pace does not depend on how many are alive.
    let mut flags = vec!["--worker", &urls, "--worker-max-in-flight", &at_once];
    flags.extend(hooks::FLAGS);
    let mut cluster = Cluster::start(&database, NODES, &flags).await;
    let anybody = Anybody::new(cluster.addresses());
    let hooks = Hooks::start(cluster.nodes[0].address, seed).await;

    let lines = requests.div_ceil(BATCHES);
    let file = anybody.upload(&history::input(lines), "input").await;
    let (began, mut batches, mut watchers) = (Instant::now(), Vec::new(), JoinSet::new());
    for number in 0..BATCHES {
        let via = [Via::Progress, Via::Endpoint, Via::Inline][number % 3];
        let id = anybody.create_from(&hooks.on(via, of_file(&file, &format!("batch-{number}")))).await;
        let (watcher, watched) = (anybody.clone(), id.clone());
        watchers.spawn(async move { watcher.watch(watched).await });
        batches.push((id, via));
    }
    let (mut kills, all_there) = (0, Instant::now());
    loop {
        tokio::time::sleep_until(all_there + every * (kills + 1)).await;
        while let Some(ended) = watchers.try_join_next() {
            check_states(&ended.unwrap(), BatchStatus::Completed);
        }
        if watchers.is_empty() || all_there.elapsed() > Duration::from_secs(seconds) + every / 2 {
            break;
        }
        let victim = &mut cluster.nodes[random.random_range(0..NODES)];
        victim.kill().await;
        victim.restart().await;
        kills += 1;
    }
    let killed_for = all_there.elapsed();
    let patience = HANG + Duration::from_secs(3 * seconds);
    let all_ended = async {
        while let Some(ended) = watchers.join_next().await {
            check_states(&ended.unwrap(), BatchStatus::Completed);
        }
    };
    if tokio::time::timeout(patience, all_ended).await.is_err() {
        cluster.print_logs();
        panic!("not all batches end");
    }
    let took = began.elapsed();
    hooks.calm();
    // A long run has the time to wait until the leases of killed senders run out by themselves.
    hooks.settle(&database, HANG, seconds < 60).await;
    let settled = began.elapsed();

    let (mut checked, mut prompt_tokens) = (Vec::new(), 0);
    for (id, via) in batches {
        let batch = anybody.get(&id).await;
        prompt_tokens = check(&anybody, &batch, lines).await;
        checked.push((id, batch.status(), via));
    }
    let states: Vec<_> = checked[1..].iter().map(|(id, status, _)| (id.clone(), *status)).collect();
    history::check_events(&anybody, &states).await;
    history::check_epochs(&database).await;
    let tally = hooks.check(&database, &cluster.addresses(), &checked).await;
    cluster.assert_no_panics();
    let mut run = 0;
    for worker in &workers {
        run += prompt_tokens_of(worker).await / prompt_tokens;
    }
    let total = (lines * BATCHES) as u64;
    assert!(run >= total, "every answer is a worker's");
    eprintln!(
        "{kills} kills in {killed_for:.1?}; {total} requests in {took:.1?}, each answered once; webhooks settled after \
         {settled:.1?}; the workers ran {run} requests, {} of them again; {} segments were taken over; {tally}",
        run - total,
        history::claimed_again(&database).await
    );
    assert!(kills > 0, "the work is over too soon to kill anybody");
}

/// That each line of a batch has its own answer once, in order. Returns the tokens of a prompt.
async fn check(anybody: &Anybody, batch: &Batch, lines: usize) -> u64 {
    assert_eq!((batch.status(), batch.error_file_id.as_str()), (BatchStatus::Completed, ""), "{batch:?}");
    let counts = batch.request_counts.unwrap();
    assert_eq!((counts.total, counts.completed, counts.failed), (lines as i64, lines as i64, 0), "{batch:?}");
    let mut client = anybody.connect().await;
    let request = DownloadFileRequest { file_id: batch.output_file_id.clone(), offset: 0 };
    let mut stream = client.download_file(request).await.unwrap().into_inner();
    // Of the output only the line that is being read is held.
    let (mut rest, mut next, mut prompt_tokens): (Vec<u8>, usize, u64) = (Vec::new(), 0, 0);
    while let Some(chunk) = stream.message().await.unwrap() {
        rest.extend_from_slice(&chunk.data);
        let whole = rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        for text in rest[..whole].split_inclusive(|byte| *byte == b'\n') {
            let line: Line = serde_json::from_slice(text).unwrap();
            // Lines come in input order: the next one is neither missing nor there twice.
            assert_eq!(line.custom_id, format!("r{next}"), "{}", batch.id);
            let response = line.response.unwrap();
            let usage = response.body.usage;
            assert_eq!((response.status_code, usage.completion_tokens), (200, answer_tokens(next) as u64), "its own");
            prompt_tokens = usage.prompt_tokens;
            next += 1;
        }
        rest.drain(..whole);
    }
    assert_eq!((next, rest.len()), (lines, 0), "{}: every line", batch.id);
    prompt_tokens
}

/// The tokens of all prompts that this worker has begun to run.
async fn prompt_tokens_of(worker: &WorkerProcess) -> u64 {
    let text = reqwest::get(format!("{}/metrics", worker.url())).await.unwrap().text().await.unwrap();
    let line = text.lines().find(|line| line.starts_with("vllm:prompt_tokens_total")).unwrap();
    line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() as u64
}
