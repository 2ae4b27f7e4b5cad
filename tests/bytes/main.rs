//! Any byte, anywhere: a whole server on either database is called with odd text in every text field of every RPC (found in
//! the protos themselves, so a new field is covered by itself), in headers, and from workers and receivers. Every call
//! answers with something that is not the server's fault, every batch ends, and the server stops when it is told.
//!
//! What is odd where is by chance: a failure shows the seed, and `TIDEMILL_BYTES_SEED` repeats it.

#![allow(clippy::unwrap_used, missing_docs)]

mod calls;
#[path = "../support/raw.rs"]
mod raw;
mod strangers;
#[path = "../support/mod.rs"]
mod support;

use std::time::Duration;

use clap::Parser;
use rand::{SeedableRng, rngs::StdRng};
use tidemill::{
    app::App,
    config::ServeConfig,
    pb::{
        self, batch_service_client::BatchServiceClient, upload_file_request::Payload,
        webhook_admin_client::WebhookAdminClient,
    },
};
use tokio::time::{Instant, timeout};
use tonic::{Code, transport::Channel};

/// Longer than anything here takes; a test that waits for it has failed.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long a server may take to stop.
const STOP: Duration = Duration::from_secs(300);

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    config: ServeConfig,
}

/// What exists on the server, for calls of which only one field is odd.
pub struct Known {
    pub batch: String,
    pub file: String,
    pub endpoint: String,
    pub hook: String,
}

#[tokio::test(flavor = "multi_thread")]
async fn no_text_hurts_anybody_on_sqlite() {
    run(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_text_hurts_anybody_on_postgres() {
    if let Some(url) = support::postgres::database().await {
        run(&["--database-url", &url]).await;
    }
}

async fn run(flags: &[&str]) {
    let seed = std::env::var("TIDEMILL_BYTES_SEED").map_or_else(|_| rand::random(), |text| text.parse().unwrap());
    // Shown if the test fails.
    println!("TIDEMILL_BYTES_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let (worker, hook) = (strangers::worker(seed).await, strangers::receiver(seed).await);
    let folder = tempfile::tempdir().unwrap();
    let (data, blobs) = (folder.path().join("data"), folder.path().join("blobs"));
    std::fs::create_dir(&blobs).unwrap();
    let blobs = format!("file://{}", blobs.display());
    let always = [
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        data.to_str().unwrap(),
        "--blobs",
        &blobs,
        "--worker",
        &worker,
        "--webhook-allow-cidr",
        "127.0.0.0/8",
        "--flush-interval",
        "100ms",
        "--drain-timeout",
        "2s",
    ];
    let config = Flags::try_parse_from(always.iter().chain(flags)).unwrap().config;
    let app = App::start(config).await.unwrap();
    let channel = Channel::from_shared(app.url()).unwrap().connect().await.unwrap();
    let known = known(channel.clone(), &hook).await;

    let mut batches = calls::all_fields(&channel, &known, &mut random).await;
    calls::headers(&channel, &known, &mut random).await;
    batches.extend(odd_lines(channel.clone(), &hook, &mut random).await);
    all_end(channel.clone(), batches).await;

    drop(channel);
    timeout(STOP, app.stop()).await.expect("the server stops when it is told");
}

async fn known(channel: Channel, hook: &str) -> Known {
    let mut api = BatchServiceClient::new(channel.clone());
    let lines: String = (0..3).map(|number| line(&format!("\"{number}\""), "\"m\"")).collect();
    let file = upload(&mut api, lines.into_bytes()).await.unwrap().id;
    let request = pb::CreateBatchRequest {
        input: Some(pb::create_batch_request::Input::InputFileId(file.clone())),
        ..Default::default()
    };
    let batch = api.create_batch(request).await.unwrap().into_inner().id;
    let mut admin = WebhookAdminClient::new(channel);
    let request = pb::CreateEndpointRequest { url: hook.to_owned(), ..Default::default() };
    let created = admin.create_endpoint(request).await.unwrap().into_inner();
    Known { batch, file, endpoint: created.endpoint.unwrap().id, hook: hook.to_owned() }
}

/// A line whose `custom_id` and model are these JSON texts.
fn line(custom_id: &str, model: &str) -> String {
    format!(
        r#"{{"custom_id":{custom_id},"method":"POST","url":"/v1/chat/completions","body":{{"model":{model},"messages":[]}}}}"#
    ) + "\n"
}

async fn upload(api: &mut BatchServiceClient<Channel>, content: Vec<u8>) -> Result<pb::File, tonic::Status> {
    let spec = pb::FileSpec { filename: "in.jsonl".into(), purpose: "batch".into(), ..Default::default() };
    let messages = [Payload::Spec(spec), Payload::Chunk(content.into())];
    let messages = messages.map(|payload| pb::UploadFileRequest { payload: Some(payload) });
    Ok(api.upload_file(futures::stream::iter(messages)).await?.into_inner())
}

/// Files whose lines are odd, and batches of those that were accepted.
async fn odd_lines(channel: Channel, hook: &str, random: &mut StdRng) -> Vec<String> {
    let mut api = BatchServiceClient::new(channel);
    let mut batches = Vec::new();
    for text in calls::odd_texts(random) {
        let written = serde_json::Value::from(text.as_str()).to_string();
        let escaped: String = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
        let escaped = format!("\"{escaped}\"");
        for json in [written.as_str(), &escaped, "\"\\ud800\"", &text] {
            for content in [line(json, "\"m\""), line("\"a\"", json)] {
                match upload(&mut api, content.clone().into_bytes()).await {
                    Ok(file) => {
                        let request = pb::CreateBatchRequest {
                            input: Some(pb::create_batch_request::Input::InputFileId(file.id)),
                            webhook: Some(pb::WebhookConfig { url: hook.to_owned(), ..Default::default() }),
                            ..Default::default()
                        };
                        batches.push(api.create_batch(request).await.unwrap().into_inner().id);
                    }
                    Err(status) => assert_eq!(status.code(), Code::InvalidArgument, "{status:?} for {content:?}"),
                }
            }
        }
    }
    batches
}

/// Those of which nobody serves a model are cancelled.
async fn all_end(channel: Channel, batches: Vec<String>) {
    assert!(batches.len() > 20, "only {} batches were accepted", batches.len());
    let mut api = BatchServiceClient::new(channel);
    let until = Instant::now() + PATIENCE;
    for batch_id in batches {
        let mut cancelled = false;
        loop {
            let request = pb::GetBatchRequest { batch_id: batch_id.clone() };
            let batch = api.get_batch(request).await.unwrap().into_inner();
            match batch.status() {
                pb::BatchStatus::Completed | pb::BatchStatus::Cancelled => break,
                pb::BatchStatus::Failed => panic!("no text is a reason to fail: {batch:?}"),
                _ if !cancelled && batch.models != ["m"] => {
                    cancelled = true;
                    api.cancel_batch(pb::CancelBatchRequest { batch_id: batch_id.clone() }).await.unwrap();
                }
                _ => {}
            }
            assert!(Instant::now() < until, "a batch does not end: {batch:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
