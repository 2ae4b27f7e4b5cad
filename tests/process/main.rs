//! The real program, killed with SIGKILL and started again on the same data: nothing that was answered is lost, nothing
//! is doubled, and a watcher that comes back with its last revision misses no state change.

#![allow(clippy::unwrap_used, missing_docs)]

mod again;
mod certificates;
#[cfg(target_os = "linux")]
mod commands;
mod crowds;
#[cfg(target_os = "linux")]
mod disk;
#[cfg(target_os = "linux")]
mod doors;
// Only debug builds have points to die at.
#[cfg(debug_assertions)]
mod faults;
mod identity;
mod nodes;
mod objects;
mod page;
#[cfg(debug_assertions)]
mod parted;
#[cfg(target_os = "linux")]
mod power;
mod receiver;
#[path = "../support/s3.rs"]
mod s3;
mod secrets;
mod server;
mod starting;
mod stopping;
#[cfg(debug_assertions)]
mod supervised;
#[path = "../support/mod.rs"]
mod support;
mod tenants;
mod upgrade;
mod workers;

use std::{collections::BTreeMap, time::Duration};

use serde_json::Value;
use tidemill::{
    pb::{
        BatchStatus, CreateBatchRequest, DownloadFileRequest, FileSpec, GetBatchRequest, GetFileRequest,
        StreamResultsRequest, UploadFileRequest, WatchBatchRequest, batch_event::Event, create_batch_request::Input,
        upload_file_request::Payload,
    },
    sim::{Sim, SimConfig},
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use server::{Client, Server};
use support::patience::{ends, until};

const LINES: usize = 3_000;

async fn worker(config: SimConfig) -> (Sim, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let sim = Sim::new(config).unwrap();
    tokio::spawn(sim.clone().serve(listener, CancellationToken::new()));
    (sim, url)
}

fn input(count: usize) -> String {
    (0..count)
        .map(|number| {
            format!(
                r#"{{"custom_id":"r{number}","method":"POST","url":"/v1/chat/completions","body":{{"model":"sim","messages":[{{"role":"user","content":"number {number}"}}],"max_tokens":3}}}}"#
            ) + "\n"
        })
        .collect()
}

async fn upload(client: &mut Client, text: String) -> String {
    try_upload(client, text, "").await.unwrap()
}

async fn try_upload(client: &mut Client, text: String, request_id: &str) -> Result<String, tonic::Status> {
    let spec = FileSpec { filename: "input.jsonl".into(), request_id: request_id.to_owned(), ..FileSpec::default() };
    let mut messages = vec![UploadFileRequest { payload: Some(Payload::Spec(spec)) }];
    for chunk in text.into_bytes().chunks(100_000) {
        messages.push(UploadFileRequest { payload: Some(Payload::Chunk(chunk.to_vec().into())) });
    }
    Ok(client.upload_file(tokio_stream::iter(messages)).await?.into_inner().id)
}

async fn create(client: &mut Client, file: &str, request_id: &str) -> String {
    let request = CreateBatchRequest {
        input: Some(Input::InputFileId(file.to_owned())),
        request_id: request_id.to_owned(),
        ..CreateBatchRequest::default()
    };
    client.create_batch(request).await.unwrap().into_inner().id
}

async fn download(client: &mut Client, file_id: &str) -> Vec<Value> {
    let mut stream = client
        .download_file(DownloadFileRequest { file_id: file_id.to_owned(), offset: 0 })
        .await
        .unwrap()
        .into_inner();
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.message().await.unwrap() {
        assert_eq!(chunk.offset, bytes.len() as i64);
        bytes.extend_from_slice(&chunk.data);
    }
    bytes.split_inclusive(|byte| *byte == b'\n').map(|line| serde_json::from_slice(line).unwrap()).collect()
}

/// Watches to the end over every restart: the states in order, each once.
async fn watch(server: Server, batch_id: String) -> Vec<BatchStatus> {
    let mut states = Vec::new();
    let mut after_revision = 0;
    loop {
        let mut client = server.client().await;
        let request = WatchBatchRequest { batch_id: batch_id.clone(), after_revision, min_interval: None };
        let Ok(stream) = client.watch_batch(request).await else { continue };
        let mut stream = stream.into_inner();
        loop {
            match stream.message().await {
                Ok(Some(event)) => {
                    if let Some(Event::StateChanged(batch)) = event.event {
                        assert!(event.revision > after_revision || states.is_empty());
                        states.push(batch.status());
                    }
                    after_revision = after_revision.max(event.revision);
                }
                Ok(None) => return states,
                Err(_) => break,
            }
        }
    }
}

/// Waits until the batch is completed.
async fn completed(client: &mut Client, batch_id: &str) {
    let get = GetBatchRequest { batch_id: batch_id.to_owned() };
    let is_completed =
        async || client.get_batch(get.clone()).await.unwrap().into_inner().status() == BatchStatus::Completed;
    until("the batch completes", is_completed).await;
}

/// Every line exactly once, in input order, each with its own answer.
async fn assert_complete(client: &mut Client, batch_id: &str, count: usize) {
    let batch = client.get_batch(GetBatchRequest { batch_id: batch_id.to_owned() }).await.unwrap().into_inner();
    assert_eq!(batch.status(), BatchStatus::Completed, "{batch:?}");
    assert_eq!(batch.error_file_id, "");
    let output = download(client, &batch.output_file_id).await;
    let ids: Vec<&str> = output.iter().map(|line| line["custom_id"].as_str().unwrap()).collect();
    let wanted: Vec<String> = (0..count).map(|number| format!("r{number}")).collect();
    assert_eq!(ids, wanted, "every line once, in input order");
    let total: i64 =
        output.iter().map(|line| line["response"]["body"]["usage"]["total_tokens"].as_i64().unwrap()).sum();
    assert_eq!(batch.usage.unwrap().total_tokens, total);
    let counts = batch.request_counts.unwrap();
    assert_eq!((counts.total, counts.completed, counts.failed), (count as i64, count as i64, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_kills_lose_and_double_nothing_and_a_watcher_misses_nothing() {
    let config = SimConfig { latency: Duration::from_millis(60), max_num_seqs: 32, ..SimConfig::default() };
    let (_sim, url) = worker(config).await;
    let mut server = Server::start(&["--worker", &url, "--flush-interval", "100ms"]).await;
    let mut client = server.client().await;
    let file = upload(&mut client, input(LINES)).await;
    let batch = create(&mut client, &file, "once").await;
    let watcher = tokio::spawn(watch(server.clone(), batch.clone()));
    for round in 0..10u64 {
        // Different places in the cycle of claims, parts and merges.
        tokio::time::sleep(Duration::from_millis(150 + 37 * round)).await;
        server.kill().await;
        server.restart().await;
        let mut client = server.client().await;
        assert_eq!(create(&mut client, &file, "once").await, batch, "the same request id is the same batch");
    }
    let states = ends("the batch ends", watcher).await.unwrap();
    assert_eq!(
        states,
        [BatchStatus::InProgress, BatchStatus::Finalizing, BatchStatus::Completed],
        "the snapshot, then every state once"
    );
    let mut client = server.client().await;
    assert_complete(&mut client, &batch, LINES).await;
    let seen = stream_results(&mut client, &batch).await;
    assert_eq!(seen.len(), LINES, "the stream of results has every line too");
    assert!(seen.values().all(|times| *times == 1));
    server.kill().await;
}

async fn stream_results(client: &mut Client, batch_id: &str) -> BTreeMap<String, usize> {
    let request = StreamResultsRequest { batch_id: batch_id.to_owned(), follow: true, ..Default::default() };
    let mut stream = client.stream_results(request).await.unwrap().into_inner();
    let mut seen = BTreeMap::new();
    while let Some(result) = stream.message().await.unwrap() {
        *seen.entry(result.custom_id).or_default() += 1;
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_survives_a_kill_at_once() {
    let mut server = Server::start(&[]).await;
    let mut client = server.client().await;
    let file = upload(&mut client, input(50)).await;
    server.kill().await;
    server.restart().await;
    let mut client = server.client().await;
    let found = client.get_file(GetFileRequest { file_id: file.clone() }).await.unwrap().into_inner();
    assert_eq!(found.line_count, 50);
    let batch = create(&mut client, &file, "").await;
    server.kill().await;
    server.restart().await;
    let mut client = server.client().await;
    let found = client.get_batch(GetBatchRequest { batch_id: batch }).await.unwrap().into_inner();
    assert_eq!(found.status(), BatchStatus::InProgress);
    assert!(found.waiting_reason.contains("worker"), "{found:?}");
    server.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_killed_leaves_nothing_behind() {
    let mut server = Server::start(&[]).await;
    let inputs = server.folder().join("blobs/inputs");
    killed_half_way(&mut server, &inputs).await;
    server.restart().await;
    assert_eq!(entries(&inputs), 0, "what was half written is gone");
    let mut client = server.client().await;
    let files = client.list_files(tidemill::pb::ListFilesRequest::default()).await.unwrap().into_inner();
    assert!(files.files.is_empty());
    server.kill().await;
}

/// A directory that others use as well: what is half written there may be theirs, until nobody has added to it for an hour.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_killed_on_a_shared_directory_goes_within_hours() {
    let shared = tempfile::tempdir().unwrap();
    let url = format!("file://{}", shared.path().display());
    let mut server = Server::start(&["--blobs", &url]).await;
    let inputs = shared.path().join("inputs");
    killed_half_way(&mut server, &inputs).await;
    server.restart().await;
    assert_eq!(entries(&inputs), 1, "another server may be at it");
    server.kill().await;
    for entry in std::fs::read_dir(&inputs).unwrap() {
        let file = std::fs::File::options().write(true).open(entry.unwrap().path()).unwrap();
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(2 * 3_600)).unwrap();
    }
    server.restart().await;
    until("it is gone", async || entries(&inputs) == 0).await;
    server.kill().await;
}

fn entries(folder: &std::path::Path) -> usize {
    std::fs::read_dir(folder).map(Iterator::count).unwrap_or(0)
}

/// The server is killed while it has half an upload, of which these are the objects.
async fn killed_half_way(server: &mut Server, inputs: &std::path::Path) {
    let mut client = server.client().await;
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let spec = FileSpec { filename: "half.jsonl".into(), ..FileSpec::default() };
    sender.send(UploadFileRequest { payload: Some(Payload::Spec(spec)) }).await.unwrap();
    let half = input(60_000).into_bytes();
    let sending = tokio::spawn(async move {
        for chunk in half.chunks(500_000) {
            if sender.send(UploadFileRequest { payload: Some(Payload::Chunk(chunk.to_vec().into())) }).await.is_err() {
                break;
            }
        }
        // Not the end of the stream: the client just says nothing more.
        std::future::pending::<()>().await;
    });
    let uploading = tokio::spawn(async move {
        client.upload_file(tokio_stream::wrappers::ReceiverStream::new(receiver)).await.map(|_| ())
    });
    until("the upload is under way", async || entries(inputs) > 0).await;
    server.kill().await;
    assert!(uploading.await.unwrap().is_err());
    sending.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_drains_and_ends_with_success() {
    let config = SimConfig { latency: Duration::from_millis(300), ..SimConfig::default() };
    let (sim, url) = worker(config).await;
    let mut server = Server::start(&["--worker", &url]).await;
    let mut client = server.client().await;
    let file = upload(&mut client, input(500)).await;
    let batch = create(&mut client, &file, "").await;
    let mut events = client
        .watch_batch(WatchBatchRequest { batch_id: batch.clone(), after_revision: 0, min_interval: None })
        .await
        .unwrap()
        .into_inner();
    events.message().await.unwrap();
    until("requests are sent", async || sim.faults().in_flight() > 0).await;
    assert!(server.terminate().await.success());
    let end = loop {
        match events.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the batch has not ended"),
            Err(status) => break status,
        }
    };
    assert_eq!(end.code(), tonic::Code::Unavailable, "{end:?}");
    server.restart().await;
    completed(&mut server.client().await, &batch).await;
    assert_complete(&mut server.client().await, &batch, 500).await;
    assert_eq!(sim.faults().received(), 500, "requests in flight were waited for, so none ran twice");
    server.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_on_one_data_directory_is_one_too_many() {
    let mut server = Server::start(&[]).await;
    let second = server.second().await;
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("in use by another tidemill") && said.contains("--data-dir"), "{said}");
    server.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn json_is_one_object_a_line_without_a_server_too() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().to_str().unwrap();
    for arguments in [&["token", "new", "--name", "ana"][..], &["migrate", "--data-dir", data]] {
        let mut program = tokio::process::Command::new(env!("CARGO_BIN_EXE_tidemill"));
        let output = program.arg("--json").args(arguments).output().await.unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(!text.is_empty());
        for line in text.lines() {
            assert!(serde_json::from_str::<Value>(line).unwrap().is_object(), "{arguments:?}: {line}");
        }
    }
}
