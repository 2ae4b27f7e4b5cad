//! What is shown of workers: by the API and by the command line.

use std::time::{Duration, Instant};

use serde_json::Value;
use tidemill::{
    pb::{self, worker_admin_client::WorkerAdminClient},
    sim::{Fault, SimConfig},
};

use crate::{create, server::Server, support::patience::until, upload, watch, worker};

/// Chats with a long beginning in common.
fn alike(count: usize) -> String {
    let system = "You are a patient teacher of mathematics. ".repeat(40);
    (0..count)
        .map(|number| {
            format!(
                r#"{{"custom_id":"r{number}","method":"POST","url":"/v1/chat/completions","body":{{"model":"sim","messages":[{{"role":"system","content":"{system}"}},{{"role":"user","content":"number {number}"}}],"max_tokens":3}}}}"#
            ) + "\n"
        })
        .collect()
}

async fn said(server: &Server, arguments: &[&str]) -> String {
    let mut program = tokio::process::Command::new(env!("CARGO_BIN_EXE_tidemill"));
    let url = format!("http://{}", server.address());
    let output = program.args(arguments).args(["--server", &url]).output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn how_a_worker_does_and_where_time_goes_is_shown() {
    // Long beside what a busy machine takes to send a request.
    let latency = Duration::from_millis(200);
    let (_, url) = worker(SimConfig { latency, max_num_seqs: 32, ..SimConfig::default() }).await;
    let mut server = Server::start(&["--worker", &url, "--flush-interval", "100ms"]).await;
    let mut workers = WorkerAdminClient::connect(format!("http://{}", server.address())).await.unwrap();
    let mut list = async || workers.list_workers(pb::ListWorkersRequest {}).await.unwrap().into_inner();
    let fresh = list().await;
    assert_eq!(fresh.request_stages, Some(pb::RequestStages::default()), "nothing was sent yet");
    assert_eq!((fresh.workers[0].prefix_hit_rate, fresh.workers[0].request_time), (None, None));

    let file = upload(&mut server.client().await, alike(500)).await;
    let batch = create(&mut server.client().await, &file, "").await;
    watch(server.clone(), batch).await;
    let mut all = fresh;
    until("the worker's figures are there", async || {
        all = list().await;
        all.workers[0].prefix_hit_rate.is_some() && all.workers[0].request_time.is_some()
    })
    .await;
    let (shown, stages) = (all.workers.remove(0), all.request_stages.unwrap());
    assert!(shown.prefix_hit_rate.unwrap() > 0.9 && shown.prefix_hit_rate.unwrap() <= 1.0, "{shown:?}");
    let time = |of: Option<prost_types::Duration>| Duration::try_from(of.unwrap()).unwrap();
    assert!(time(shown.request_time) >= latency && time(stages.worker) >= latency, "{shown:?} {stages:?}");
    assert!(time(stages.dispatch) < time(stages.worker), "{stages:?}");
    // Hundreds of requests, 32 at a time: a line waits longer than it is at the worker.
    assert!(time(stages.queue) > latency && time(stages.persist) > Duration::ZERO, "{stages:?}");

    let listed: Value = serde_json::from_str(&said(&server, &["workers", "list", "--json"]).await).unwrap();
    assert!(listed["prefix_hit_rate"].as_f64().unwrap() > 0.9 && listed["request_time"].is_string(), "{listed}");
    let register = ["workers", "register", &url, "--health-path", "none", "--health-interval", "2s500ms", "--json"];
    let own: Value = serde_json::from_str(&said(&server, &register).await).unwrap();
    assert_eq!((&own["health_path"], &own["health_interval"]), (&"none".into(), &"2.5s".into()), "{own}");
    let listed: Value = serde_json::from_str(&said(&server, &["workers", "list", "--json"]).await).unwrap();
    assert_eq!((&listed["health_path"], &listed["health_interval"]), (&own["health_path"], &own["health_interval"]));
    let back = ["workers", "register", &url, "--health-path", "default", "--health-interval", "default", "--json"];
    let back: Value = serde_json::from_str(&said(&server, &back).await).unwrap();
    assert!(back.get("health_path").is_none() && back.get("health_interval").is_none(), "{back}");
    let percent = |text: &str| text.split_whitespace().any(|cell| cell.ends_with('%') && cell != "0%");
    let text = said(&server, &["workers", "list"]).await;
    assert!(text.lines().next().unwrap().contains("HITS") && percent(text.lines().nth(1).unwrap()), "{text}");
    let text = said(&server, &["top", "--once"]).await;
    for shown in ["a request takes ", " in line, ", " at the worker, ", "HITS", "WAITING", "KV", "TIME"] {
        assert!(text.contains(shown), "{shown}: {text}");
    }
    let seen: Value = serde_json::from_str(&said(&server, &["top", "--once", "--json"]).await).unwrap();
    assert!(seen["request_stages"]["worker"].is_string() && seen["workers"][0]["prefix_hit_rate"].is_f64(), "{seen}");
    assert!(server.metric("tidemill_worker_prefix_hit_rate").await.is_some());
    server.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_answers_cost_bounded_memory() {
    const MIB: usize = 1024 * 1024;
    let (sim, url) = worker(SimConfig::default()).await;
    let flags = ["--worker", &url, "--worker-max-in-flight", "40", "--worker-answer-memory", "32MiB"];
    let server = Server::start(&flags).await;
    let mut client = server.client().await;
    let file = upload(&mut client, alike(40)).await;
    let before = server.memory("VmRSS");
    // All of them are asked for at once, and are ten times the memory.
    for sized in [true, false] {
        sim.faults().next(20, Fault::Big { bytes: 8 * MIB, sized });
    }
    let batch = create(&mut client, &file, "").await;
    watch(server.clone(), batch.clone()).await;
    let done = client.get_batch(pb::GetBatchRequest { batch_id: batch }).await.unwrap().into_inner();
    assert_eq!(done.request_counts.unwrap().completed, 40);
    let grown = server.memory("VmHWM").saturating_sub(before);
    println!("40 answers of 8 MiB: {} MiB", grown / MIB);
    assert!(grown < 120 * MIB, "{} MiB", grown / MIB);
    let waits = server.metric("tidemill_answer_memory_waits_total").await.unwrap();
    assert!(waits.parse::<u64>().unwrap() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_answer_is_in_the_log_with_all_that_helps_and_not_a_thousand_times() {
    let (sim, url) = worker(SimConfig::default()).await;
    sim.faults().always(Some(Fault::Body("text/html", b"<html>please log in</html>")));
    let server = Server::start(&["--worker", &url, "--max-tries", "2"]).await;
    let mut client = server.client().await;
    let file = upload(&mut client, alike(100)).await;
    let batch = create(&mut client, &file, "").await;
    let began = Instant::now();
    until("the answer is logged", async || server.log().contains("please log in")).await;
    // Until it answers otherwise, the worker is held and no line ends.
    sim.faults().clear();
    watch(server.clone(), batch).await;
    let log = server.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("please log in")).collect();
    // One every ten seconds, and the first.
    let most = 2 + usize::try_from(began.elapsed().as_secs() / 10).unwrap();
    assert!((1..=most).contains(&lines.len()), "many bad answers, at most {most} of them logged: {lines:?}");
    for word in ["WARN", "HTML", "status 200", "text/html", "26 bytes", &url] {
        assert!(lines[0].contains(word), "{} does not say {word}", lines[0]);
    }
}
