//! `tidemill workers …`

use std::time::Duration;

use clap::{Args, Subcommand};

use super::{
    client::{Client, retry},
    json, out,
};
use crate::{config::parse_span, pb};

/// Commands for workers.
#[derive(Debug, Subcommand)]
pub enum WorkersCommand {
    /// List workers with their state and load. HITS is the share of prompt tokens that a worker's prefix cache held
    /// recently.
    List,
    /// Add a worker, or end the draining of one.
    #[command(
        after_help = "Example:\n  vllm serve MODEL --port 8000 &\n  tidemill workers register http://127.0.0.1:8000"
    )]
    Register {
        /// The worker's base URL, such as http://10.0.0.5:8000.
        url: String,
        /// Path of its health check below its base URL, "none" to check only its list of models, or "default" for the
        /// server's --worker-health-path. Without this option a known worker keeps its path.
        #[arg(long, value_name = "PATH|none|default")]
        health_path: Option<String>,
        /// Time between two health checks of it, 100ms to 1h, or "default" for the server's --worker-health-interval.
        /// Without this option a known worker keeps its interval.
        #[arg(long, value_name = "SPAN|default", value_parser = parse_interval)]
        health_interval: Option<Duration>,
    },
    /// Send a worker no further requests. Its requests in flight finish.
    Drain(Id),
    /// Remove a worker. Its requests in flight run elsewhere.
    Remove(Id),
}

/// The word for the server's setting.
const DEFAULT: &str = "default";

/// A time span; zero for the server's setting.
fn parse_interval(text: &str) -> Result<Duration, String> {
    if text == DEFAULT { Ok(Duration::ZERO) } else { parse_span(text) }
}

/// Selects a worker.
#[derive(Debug, Args)]
pub struct Id {
    /// The worker's id: worker_…
    #[arg(value_name = "WORKER")]
    id: String,
}

/// Runs a command.
///
/// # Errors
/// What went wrong, for people.
pub async fn run(command: WorkersCommand, client: &Client) -> anyhow::Result<()> {
    let workers = match command {
        WorkersCommand::List => {
            retry(|| async { client.workers().list_workers(pb::ListWorkersRequest {}).await }).await?.workers
        }
        WorkersCommand::Register { url, health_path, health_interval } => {
            let health_path = health_path.map(|path| if path == DEFAULT { String::new() } else { path });
            // At most 36500 days, so it fits.
            let health_interval = health_interval.and_then(|span| prost_types::Duration::try_from(span).ok());
            let request = pb::RegisterWorkerRequest { url, health_path, health_interval };
            vec![retry(|| async { client.workers().register_worker(request.clone()).await }).await?]
        }
        WorkersCommand::Drain(Id { id }) => {
            let request = pb::DrainWorkerRequest { worker_id: id };
            vec![retry(|| async { client.workers().drain_worker(request.clone()).await }).await?]
        }
        WorkersCommand::Remove(Id { id }) => {
            // Not repeated, because after a lost answer the second call would not find the worker.
            client.workers().remove_worker(pb::RemoveWorkerRequest { worker_id: id }).await?;
            return Ok(());
        }
    };
    if client.json {
        for worker in &workers {
            out::line(json::of(worker))?;
        }
        return Ok(());
    }
    let rows: Vec<_> = workers.iter().map(row).collect();
    out::table(["WORKER", "STATE", "IN FLIGHT", "REQ/S", "TOK/S", "HITS", "URL", "MODELS"], &rows)?;
    for worker in workers.iter().filter(|worker| !worker.last_error.is_empty()) {
        out::line(format!("{}: {}", worker.url, worker.last_error))?;
    }
    Ok(())
}

fn row(worker: &pb::Worker) -> [String; 8] {
    [
        worker.id.clone(),
        out::words(json::worker_state(worker.state)),
        format!("{}/{}", worker.in_flight, worker.limit),
        out::short(worker.requests_per_second),
        out::short(worker.output_tokens_per_second),
        out::hits(worker),
        worker.url.clone(),
        worker.models.join(","),
    ]
}
