//! `tidemill demo`: a server, a simulated worker and a webhook receiver in this process, and a batch through the real gRPC
//! API.

mod receiver;

use std::{net::IpAddr, path::Path, time::Duration};

use anyhow::{Context, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use clap::Args;
use ipnet::IpNet;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use url::Url;
use uuid::Uuid;

use super::{
    client::{Client, ClientArgs, retry},
    infer, interrupt,
    meter::note,
    out,
    signals::on_signal,
    upload::Upload,
    watch,
};
use receiver::Receiver;

use crate::{
    app::App,
    config::{ServeConfig, parse_worker},
    domain::webhook::Secret,
    pb::{self, create_batch_request::Input},
    sim::{Sim, SimConfig},
};

/// The example that is shipped with the binary.
const EXAMPLE: &str = include_str!("../../examples/hello.jsonl");
/// The model in the example's requests.
const EXAMPLE_MODEL: &str = "sim-7b";
/// The number of results that the demo prints.
const SHOWN: usize = 3;

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Use this vLLM server, or any other with OpenAI's HTTP API, instead of the simulated one.
    #[arg(long, value_name = "URL", value_parser = parse_worker)]
    worker: Option<Url>,
    /// The number of requests to send.
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    requests: u32,
    /// Keep serving until Ctrl-C.
    #[arg(long)]
    keep: bool,
}

/// Runs the demo on a temporary directory and leaves nothing behind. Returns the exit code, as for `batch watch`.
///
/// # Errors
/// What went wrong, for people.
pub async fn run(args: DemoArgs) -> anyhow::Result<u8> {
    let folder = tempfile::Builder::new().prefix("tidemill-demo-").tempdir().context("temporary directory")?;
    let interrupted = on_signal(None)?;
    let worker = Worker::start(args.worker.as_ref()).await?;
    let mut receiver = Receiver::start().await?;
    let app = App::start(config(folder.path(), &worker.url)?).await?;
    let url = app.url();
    let (at, kind) = (worker.url.as_str().trim_end_matches('/'), worker.kind());
    out::line(format!("server  {url}\nworker  {at} ({kind}, model {})", worker.model))?;

    let client = ClientArgs::of(url.clone()).client()?;
    let shown = tokio::select! {
        shown = show(&client, folder.path(), &worker.model, args.requests, &mut receiver) => shown,
        () = interrupted.cancelled() => Ok(interrupt::EXIT_CODE),
    };
    if shown.is_ok() && args.keep && !interrupted.is_cancelled() {
        out::line(keep_text(&url))?;
        interrupted.cancelled().await;
    }
    app.stop().await;
    receiver.stop().await;
    worker.stop().await?;
    folder.close().context("temporary directory")?;
    let code = shown?;
    if code == interrupt::EXIT_CODE {
        note("the demo was interrupted: its server, its batch and its files are gone");
    }
    if !args.keep && !interrupted.is_cancelled() {
        out::line(NEXT)?;
    }
    Ok(code)
}

/// The steps that a user would take, through the same API.
async fn show(
    client: &Client,
    folder: &Path,
    model: &str,
    requests: u32,
    receiver: &mut Receiver,
) -> anyhow::Result<u8> {
    let path = folder.join("hello.jsonl");
    std::fs::write(&path, example(model, requests)?)?;
    let file = Upload::open(&path).await?.send(client, None).await?;
    out::line(format!("upload  {} ({} requests, {} bytes)", file.id, file.line_count, file.bytes))?;
    let request = pb::CreateBatchRequest {
        input: Some(Input::InputFileId(file.id)),
        webhook: Some(pb::WebhookConfig {
            url: receiver.url().to_owned(),
            secret: receiver.secret().expose().to_owned(),
            ..pb::WebhookConfig::default()
        }),
        request_id: Uuid::new_v4().to_string(),
        ..pb::CreateBatchRequest::default()
    };
    let batch = retry(|| async { client.batches().create_batch(request.clone()).await }).await?;
    out::line(format!("batch   {}\n", batch.id))?;
    let batch = watch::follow(client, &batch.id, true).await?;
    let counts = batch.request_counts.unwrap_or_default();
    out::line(format!("\n{} of {} requests completed, {} failed", counts.completed, counts.total, counts.failed))?;
    out::line(format!("tokens: {}\n", out::tokens(&batch.usage.unwrap_or_default())))?;
    if !batch.output_file_id.is_empty() {
        first_results(client, &batch.output_file_id).await?;
    }
    out::line(format!("\n{}", receiver.wait().await?))?;
    Ok(watch::exit_code(&batch).unwrap_or(1))
}

/// The first lines of the output file. Reads no more of the stream than they need.
async fn first_results(client: &Client, file_id: &str) -> anyhow::Result<()> {
    let request = pb::DownloadFileRequest { file_id: file_id.to_owned(), offset: 0 };
    let mut chunks = client.batches().download_file(request).await?.into_inner();
    let mut bytes = Vec::new();
    while memchr::memchr_iter(b'\n', &bytes).count() < SHOWN {
        let Some(chunk) = chunks.message().await? else { break };
        bytes.extend_from_slice(&chunk.data);
    }
    out::line(format!("the first {SHOWN} results, in the order of the input:"))?;
    for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).take(SHOWN) {
        out::line(result(line)?)?;
    }
    Ok(())
}

/// A result line: its id and what the model said.
fn result(line: &[u8]) -> anyhow::Result<String> {
    const WIDTH: usize = 90;
    let line: Value = serde_json::from_slice(line).context("a result line")?;
    let body = &line["response"]["body"];
    let said = infer::content(body.to_string().as_bytes()).unwrap_or_else(|| body.to_string());
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    let cut = if said.chars().count() > WIDTH { "…" } else { "" };
    let said: String = said.chars().take(WIDTH).collect();
    Ok(format!("  {}  {said}{cut}", line["custom_id"].as_str().unwrap_or("?")))
}

/// The example's requests for a model, repeated as often as needed.
fn example(model: &str, requests: u32) -> anyhow::Result<String> {
    let lines: Vec<Value> = EXAMPLE.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let mut text = String::new();
    for (number, line) in (1..=requests).zip(lines.iter().cycle()) {
        let mut body = line["body"].clone();
        body["model"] = model.into();
        let line = json!({ "custom_id": format!("hello-{number}"), "method": line["method"], "url": line["url"], "body": body });
        text.push_str(&line.to_string());
        text.push('\n');
    }
    Ok(text)
}

fn config(folder: &Path, worker: &Url) -> anyhow::Result<ServeConfig> {
    let config = ServeConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        data_dir: folder.join("data"),
        worker: vec![worker.clone()],
        // Makes the bar move, because it counts durable requests.
        flush_interval: Duration::from_millis(200),
        // Encrypts the webhook's secret while the database exists.
        master_key: Some(Secret::try_new(STANDARD.encode(rand::random::<[u8; 32]>()))?),
        // The demo's receiver is on this machine.
        webhook_retry_schedule: [1, 2, 4].map(Duration::from_secs).to_vec(),
        webhook_allow_cidr: vec![IpNet::from(IpAddr::from([127, 0, 0, 1]))],
        ..ServeConfig::default()
    };
    Ok(config.validate()?)
}

/// The demo's worker: a simulated one in this process, or a real one.
struct Worker {
    url: Url,
    model: String,
    sim: Option<(JoinHandle<std::io::Result<()>>, CancellationToken)>,
}

impl Worker {
    async fn start(real: Option<&Url>) -> anyhow::Result<Self> {
        if let Some(url) = real {
            return Ok(Self { url: url.clone(), model: first_model(url).await?, sim: None });
        }
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = Url::parse(&format!("http://{}", listener.local_addr()?))?;
        let sim = Sim::new(SimConfig {
            models: vec![EXAMPLE_MODEL.to_owned()],
            // Few and slow enough to watch: about seven seconds for the example.
            latency: Duration::from_millis(300),
            tokens_per_second: 80.0,
            error_rate: 0.0,
            seed: 1,
            max_num_seqs: 4,
        })?;
        let stop = CancellationToken::new();
        let serving = tokio::spawn(sim.serve(listener, stop.clone()));
        Ok(Self { url, model: EXAMPLE_MODEL.to_owned(), sim: Some((serving, stop)) })
    }

    fn kind(&self) -> &'static str {
        if self.sim.is_some() { "simulated" } else { "yours" }
    }

    async fn stop(self) -> anyhow::Result<()> {
        if let Some((serving, stop)) = self.sim {
            stop.cancel();
            serving.await.context("simulated worker")??;
        }
        Ok(())
    }
}

/// The first model that a worker lists.
async fn first_model(worker: &Url) -> anyhow::Result<String> {
    let base = worker.as_str().trim_end_matches('/');
    let url = format!("{}/v1/models", base.strip_suffix("/v1").unwrap_or(base));
    let what = || format!("asking the worker for its models ({url})");
    let client = crate::https::client(|builder| builder.timeout(Duration::from_secs(10)))?;
    let response = client.get(&url).send().await.with_context(what)?.error_for_status().with_context(what)?;
    let models: Value = serde_json::from_slice(&response.bytes().await.with_context(what)?).with_context(what)?;
    let model = models["data"][0]["id"].as_str().map(str::to_owned);
    ensure!(model.is_some(), "{url} lists no model");
    Ok(model.unwrap_or_default())
}

const NEXT: &str = "
to go on:
  tidemill serve --worker http://127.0.0.1:8000      a server for your vLLM
  tidemill batch submit requests.jsonl --watch       a batch of your own
  tidemill batch results BATCH --output out.jsonl    its results
  tidemill demo --keep                               this server, to try clients on
  tidemill --help                                    all commands";

fn keep_text(url: &str) -> String {
    let addr = url.trim_start_matches("http://");
    format!(
        "\nserving until Ctrl-C; in another terminal:\n  \
         tidemill batch list --server {url}\n  \
         grpcurl -plaintext {addr} list\n  \
         grpcurl -plaintext {addr} tidemill.v1.BatchService/ListBatches\n  \
         curl {url}/metrics"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_for_any_model_and_number() {
        assert_eq!(EXAMPLE.lines().count(), 40);
        for requests in [1, 40, 95] {
            let text = example("org/model \"x\"", requests).unwrap();
            let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            assert_eq!(lines.len(), requests as usize);
            assert!(lines.iter().all(|line| line["body"]["model"] == "org/model \"x\"" && line["method"] == "POST"));
            let ids: std::collections::HashSet<_> = lines.iter().map(|line| line["custom_id"].to_string()).collect();
            assert_eq!(ids.len(), lines.len());
        }
    }

    #[test]
    fn the_demos_settings_are_valid() {
        let config = config(Path::new("/tmp/x"), &Url::parse("http://127.0.0.1:1").unwrap()).unwrap();
        assert_eq!(config.listen.port(), 0);
    }

    #[test]
    fn a_result_is_one_short_line() {
        let line =
            json!({"custom_id": "a", "response": {"body": {"choices": [{"message": {"content": "é\n".repeat(200)}}]}}});
        let text = result(line.to_string().as_bytes()).unwrap();
        assert!(text.starts_with("  a  é é ") && text.ends_with('…') && !text.contains('\n'), "{text}");
    }
}
