//! Claim "front door": over HTTP as over gRPC. A live call takes less than 0.5 ms longer than at the worker (median); an
//! upload has at least 0.9 of gRPC's rate on the same file; its memory does not grow with the file.
//!
//!     cargo bench --bench frontdoor [-- MEGABYTES [ROUNDS [CALLS [LARGE_MEGABYTES]]]]
//!
//! The real `tidemill serve` (SQLite, local directory) and `tidemill sim`, which answers at once. Calls go one after the other,
//! in turns to the worker and through tidemill, over one connection each. Uploads take turns, too; over HTTP the form comes
//! in chunks without a length, which is the harder way. A last upload of LARGE_MEGABYTES, made on the way, goes through a
//! server of its own, beside one of a tenth. Writes `target/bench/frontdoor.json`.
//!
//!     cargo bench --bench frontdoor -- throughput URL MODEL [CALLS [AT_ONCE [ROUNDS]]]
//!
//! Requests/s of a worker that runs already, such as a real vLLM, through tidemill over without it, in turns: at least 0.97.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::time::Instant;

use bytes::Bytes;
use common::{Process, chunks, machine, median, percentile, report};
use futures::{StreamExt, stream};
use reqwest::Client;
use serde_json::{Value, json};
use tidemill::pb::{
    FileSpec, UploadFileRequest, batch_service_client::BatchServiceClient, upload_file_request::Payload,
};

const GOAL_MS: f64 = 0.5;
const GOAL_RATE: f64 = 0.9;
const GOAL_THROUGHPUT: f64 = 0.97;
const BOUNDARY: &str = "----the-boundary";
/// Characters of a request's content, and how it is called.
const SIZES: [(&str, usize); 2] = [("short lines", 20), ("chat", 600)];

fn main() {
    let (numbers, words) = common::arguments();
    let number = |at: usize, default: usize| numbers.get(at).copied().unwrap_or(default);
    tidemill::telemetry::install_tls_provider();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    if let [mode, url, model] = &words[..] {
        assert_eq!(mode, "throughput");
        return runtime.block_on(throughput(url, model, number(0, 1_000), number(1, 32), number(2, 3)));
    }
    let (megabytes, rounds, calls, large) = (number(0, 100), number(1, 5), number(2, 3_000), number(3, 2_000));
    println!("front door: {}", machine());
    let live = runtime.block_on(latency(calls));
    let uploads = runtime.block_on(uploads(megabytes, rounds));
    let memory = runtime.block_on(memory(large));
    report("frontdoor", json!({ "live": live, "uploads": uploads, "memory": memory }));
}

/// A client as the SDKs are: HTTP/1.1, connections kept.
fn client() -> Client {
    Client::builder().no_proxy().http1_only().tcp_nodelay(true).build().unwrap()
}

async fn healthy(client: &Client, server: &Process) {
    loop {
        let models = client.get(format!("http://{}/v1/models", server.address)).send().await.unwrap();
        let models: Value = serde_json::from_slice(&models.bytes().await.unwrap()).unwrap();
        if !models["data"].as_array().unwrap().is_empty() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

async fn call(client: &Client, base: &str, body: String) {
    let url = format!("{base}/v1/chat/completions");
    let answer = client.post(url).header("content-type", "application/json").body(body).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    answer.bytes().await.unwrap();
}

fn body(model: &str, number: usize) -> String {
    format!(
        r#"{{"model":"{model}","messages":[{{"role":"user","content":"What is the answer to question number {number}?"}}],"max_tokens":16}}"#
    )
}

async fn latency(calls: usize) -> Value {
    let folder = tempfile::tempdir_in("target").unwrap();
    let sim = Process::sim(&["--models", "sim", "--latency-ms", "0", "--tokens-per-second", "0"]);
    let worker = format!("http://{}", sim.address);
    let server = Process::serve(folder.path(), &["--worker", &worker]);
    drop(server.serving().await);
    let (direct, through) = (client(), client());
    healthy(&through, &server).await;
    let base = format!("http://{}", server.address);
    let (mut times, mut longer) = ((Vec::new(), Vec::new()), Vec::new());
    for number in 0..calls + 200 {
        let began = Instant::now();
        call(&direct, &worker, body("sim", number)).await;
        let one = began.elapsed().as_secs_f64() * 1e3;
        let began = Instant::now();
        call(&through, &base, body("sim", number)).await;
        let two = began.elapsed().as_secs_f64() * 1e3;
        // The first ones open connections.
        if number >= 200 {
            times.0.push(one);
            times.1.push(two);
            longer.push(two - one);
        }
    }
    let of = |values: &mut Vec<f64>| (median(values), percentile(values, 0.99));
    let ((direct, direct_p99), (through, through_p99)) = (of(&mut times.0), of(&mut times.1));
    let (added, _) = of(&mut longer);
    println!(
        "| {calls} live calls, ms | p50 | p99 |\n| --- | --- | --- |\n| to the worker | {direct:.3} | {direct_p99:.3} |\n\
         | through tidemill | {through:.3} | {through_p99:.3} |\nadded: {added:.3} ms (median of the pairs), goal: {GOAL_MS}"
    );
    json!({"calls": calls, "direct_ms": direct, "through_ms": through, "added_ms": added, "goal_ms": GOAL_MS,
        "direct_p99_ms": direct_p99, "through_p99_ms": through_p99})
}

async fn uploads(megabytes: usize, rounds: usize) -> Value {
    let mut figures = json!({"megabytes": megabytes, "rounds": rounds, "goal": GOAL_RATE});
    println!("| lines | HTTP MB/s | gRPC MB/s | ratio |\n| --- | --- | --- | --- |");
    for (name, content) in SIZES {
        let file: Vec<Bytes> = chunks(content, megabytes * 1_000_000, usize::MAX).collect();
        let total: usize = file.iter().map(Bytes::len).sum();
        let per_second = |began: Instant| total as f64 / 1e6 / began.elapsed().as_secs_f64();
        let folder = tempfile::tempdir_in("target").unwrap();
        let server = Process::serve(folder.path(), &["--max-file-lines", "1000000000"]);
        let (http, mut grpc) = (client(), BatchServiceClient::new(server.serving().await));
        let (mut over_http, mut over_grpc) = (Vec::new(), Vec::new());
        // The first round of each finds a cold server.
        for round in 0..=rounds {
            let began = Instant::now();
            let one = post(&http, &server, file.clone().into_iter()).await;
            let http_rate = per_second(began);
            let began = Instant::now();
            let spec = UploadFileRequest { payload: Some(Payload::Spec(FileSpec::default())) };
            let messages: Vec<_> = file.iter().cloned().map(Payload::Chunk).collect();
            let messages = messages.into_iter().map(|chunk| UploadFileRequest { payload: Some(chunk) });
            let two = grpc.upload_file(stream::iter(std::iter::once(spec).chain(messages))).await.unwrap().into_inner();
            let grpc_rate = per_second(began);
            if round > 0 {
                over_http.push(http_rate);
                over_grpc.push(grpc_rate);
            }
            assert_eq!(one["bytes"], two.bytes);
            // So that the disk does not fill up.
            for id in [one["id"].as_str().unwrap(), &two.id] {
                let gone = http.delete(format!("http://{}/v1/files/{id}", server.address)).send().await.unwrap();
                assert_eq!(gone.status(), 200);
            }
        }
        let (http, grpc) = (median(&mut over_http), median(&mut over_grpc));
        println!("| {name} | {http:.0} | {grpc:.0} | {:.2} |", http / grpc);
        figures[name] = json!({"http_mb_per_second": http, "grpc_mb_per_second": grpc, "ratio": http / grpc});
    }
    println!("goal: at least {GOAL_RATE}");
    figures
}

/// Uploads as a form that comes in chunks.
async fn post(client: &Client, server: &Process, file: impl Iterator<Item = Bytes> + Send + 'static) -> Value {
    let before = format!(
        "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"in.jsonl\"\r\n\
         Content-Type: application/octet-stream\r\n\r\n"
    );
    let after = format!(
        "\r\n--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n--{BOUNDARY}--\r\n"
    );
    let pieces = std::iter::once(Bytes::from(before)).chain(file).chain(std::iter::once(Bytes::from(after)));
    let body = reqwest::Body::wrap_stream(stream::iter(pieces.map(Ok::<_, std::io::Error>)));
    let kind = format!("multipart/form-data; boundary={BOUNDARY}");
    let url = format!("http://{}/v1/files", server.address);
    let answer = client.post(url).header("content-type", kind).body(body).send().await.unwrap();
    let status = answer.status();
    let said: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
    assert_eq!(status, 200, "{said}");
    said
}

async fn memory(megabytes: usize) -> Value {
    println!("| HTTP upload, MB | lines | seconds | peak |\n| --- | --- | --- | --- |");
    let mut figures = Vec::new();
    for megabytes in [megabytes / 10, megabytes] {
        let folder = tempfile::tempdir_in("target").unwrap();
        let limits = ["--max-file-lines", "1000000000", "--max-file-bytes", "1TB"];
        let server = Process::serve(folder.path(), &limits);
        drop(server.serving().await);
        let began = Instant::now();
        let file = post(&client(), &server, chunks(600, megabytes * 1_000_000, usize::MAX)).await;
        let (seconds, peak, lines) = (began.elapsed().as_secs_f64(), server.peak_mb(), &file["tidemill"]["line_count"]);
        println!("| {megabytes} | {lines} | {seconds:.1} | {peak:.0} MB |");
        figures.push(json!({"megabytes": megabytes, "lines": lines, "seconds": seconds, "peak_mb": peak}));
    }
    figures.into()
}

async fn throughput(worker: &str, model: &str, calls: usize, at_once: usize, rounds: usize) {
    let folder = tempfile::tempdir_in("target").unwrap();
    let server = Process::serve(folder.path(), &["--worker", worker]);
    drop(server.serving().await);
    let client = client();
    healthy(&client, &server).await;
    let through = format!("http://{}", server.address);
    let mut rates = [Vec::new(), Vec::new()];
    let mut number = 0;
    // The first round warms the worker up.
    for round in 0..=rounds {
        for (base, rates) in [worker, &through].into_iter().zip(&mut rates) {
            let began = Instant::now();
            let bodies = (number..number + calls).map(|number| body(model, number));
            number += calls;
            stream::iter(bodies.map(|body| call(&client, base, body))).buffer_unordered(at_once).count().await;
            if round > 0 {
                rates.push(calls as f64 / began.elapsed().as_secs_f64());
            }
        }
    }
    let [direct, through] = rates.each_mut().map(|rates| median(rates));
    let ratio = through / direct;
    println!(
        "{calls} calls, {at_once} at once, {rounds} rounds, requests/s: {direct:.0} to the worker, {through:.0} through \
         tidemill: {ratio:.3}, goal: {GOAL_THROUGHPUT}"
    );
    let figures = json!({"calls": calls, "at_once": at_once, "rounds": rounds, "direct_per_second": direct,
        "through_per_second": through, "ratio": ratio, "goal": GOAL_THROUGHPUT});
    report("frontdoor_throughput", figures);
}
