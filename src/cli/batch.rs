//! `tidemill batch …`

use std::{path::PathBuf, time::Duration};

use anyhow::bail;
use clap::{Args, Subcommand};
use uuid::Uuid;

use super::{
    client::{Client, retry},
    interrupt::or_interrupted,
    json,
    meter::note,
    out,
    results::{self, Output, Sinks},
    submit::{self, SubmitArgs, pair, span},
    watch,
};
use crate::pb;

const EXIT_CODES: &str = "Exit codes: 0 completed; 3 completed, but some lines failed; 4 failed, expired or cancelled; \
                          1 any other error.";

/// Commands for batches.
#[derive(Debug, Subcommand)]
pub enum BatchCommand {
    /// Upload a file of requests and create a batch from it. Prints the batch's id.
    #[command(after_help = submit::HELP)]
    Submit(SubmitArgs),
    /// Follow a batch to its end, through restarts of the server.
    #[command(after_help = EXIT_CODES)]
    Watch(Id),
    /// Show a batch.
    Get(Id),
    /// List batches, newest first.
    List(ListArgs),
    /// Cancel a batch. Finished results are kept.
    Cancel(Id),
    /// Delete a batch that has ended, with its results. Its input file stays.
    Delete(Id),
    /// Write a batch's results.
    #[command(after_help = RESULTS_HELP)]
    Results(ResultsArgs),
    /// Create a new batch from the failed lines of an ended batch. Prints the new batch's id.
    #[command(after_help = EXIT_CODES)]
    RetryFailed(RetryArgs),
}

const RESULTS_HELP: &str = "\
Examples:
  tidemill batch results batch_… > out.jsonl
  tidemill batch results batch_… --output out.jsonl --errors errors.jsonl
  tidemill batch results batch_… --follow | jq -r .response.body.choices[0].message.content

Without --follow the lines are in input order and the batch must have ended. With --follow they come as requests \
finish, and the exit code is that of `tidemill batch watch`.";

/// Selects a batch.
#[derive(Debug, Args)]
pub struct Id {
    /// The batch's id: batch_…
    #[arg(value_name = "BATCH")]
    id: String,
}

/// Filters for `batch list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only batches in this state, such as in_progress. Repeatable.
    #[arg(long, value_name = "STATE", value_parser = status, value_delimiter = ',')]
    status: Vec<pb::BatchStatus>,
    /// Only batches that use this model.
    #[arg(long, default_value = "", hide_default_value = true)]
    model: String,
    /// Only batches with this metadata pair. Repeatable.
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// The most batches to list.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
}

/// Arguments of `batch results`.
#[derive(Debug, Args)]
pub struct ResultsArgs {
    /// The batch's id: batch_…
    #[arg(value_name = "BATCH")]
    id: String,
    /// File for the successful lines. Default: stdout.
    #[arg(long, short, value_name = "FILE")]
    output: Option<PathBuf>,
    /// File for the failed lines. Default: they are only counted.
    #[arg(long, value_name = "FILE")]
    errors: Option<PathBuf>,
    /// Write lines as they finish, until the batch ends.
    #[arg(long)]
    follow: bool,
}

/// Arguments of `batch retry-failed`.
#[derive(Debug, Args)]
pub struct RetryArgs {
    /// The id of a batch that has ended: batch_…
    #[arg(value_name = "BATCH")]
    id: String,
    /// Follow the new batch to its end.
    #[arg(long)]
    watch: bool,
    /// The new batch's completion window, 1h to 14d [default: 24h].
    #[arg(long, value_name = "SPAN", value_parser = super::submit::window)]
    window: Option<Duration>,
    /// Makes the command safe to repeat: the same id returns the same batch.
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
}

/// Runs a command. Returns the exit code.
///
/// # Errors
/// What went wrong, for people.
pub async fn run(command: BatchCommand, client: &Client) -> anyhow::Result<u8> {
    match command {
        BatchCommand::Submit(args) => {
            let watch = args.watch;
            created(&submit::submit(args, client).await?, watch, client).await
        }
        BatchCommand::Watch(Id { id }) => follow(&id, false, client).await,
        BatchCommand::Get(Id { id }) => {
            show(&get(&id, client).await?, client)?;
            Ok(0)
        }
        BatchCommand::List(args) => list(args, client).await,
        BatchCommand::Cancel(Id { id }) => {
            let request = pb::CancelBatchRequest { batch_id: id };
            let batch = retry(|| async { client.batches().cancel_batch(request.clone()).await }).await?;
            show(&batch, client)?;
            Ok(0)
        }
        BatchCommand::Delete(Id { id }) => {
            // Not repeated, because after a lost answer the second call would not find the batch.
            client.batches().delete_batch(pb::DeleteBatchRequest { batch_id: id }).await?;
            Ok(0)
        }
        BatchCommand::Results(args) => write_results(args, client).await,
        BatchCommand::RetryFailed(args) => {
            let request = pb::RetryFailedRequestsRequest {
                batch_id: args.id,
                completion_window: span(args.window)?,
                request_id: args.request_id.unwrap_or_else(|| Uuid::new_v4().to_string()),
            };
            let batch = retry(|| async { client.batches().retry_failed_requests(request.clone()).await }).await?;
            created(&batch, args.watch, client).await
        }
    }
}

/// Prints a new batch's id and, if wanted, follows the batch.
async fn created(batch: &pb::Batch, watch: bool, client: &Client) -> anyhow::Result<u8> {
    if watch {
        if !client.json {
            note(&format!("{}: {} requests", batch.id, batch.request_counts.unwrap_or_default().total));
        }
        return follow(&batch.id, true, client).await;
    }
    if client.json {
        out::line(json::of(batch))?;
    } else {
        // Only the id goes to stdout, where scripts read it.
        out::line(&batch.id)?;
        note(&format!("follow it: tidemill batch watch {}", batch.id));
    }
    Ok(0)
}

async fn follow(id: &str, exists: bool, client: &Client) -> anyhow::Result<u8> {
    let following = async {
        let batch = watch::follow(client, id, exists).await?;
        if !client.json {
            out::line(watch::summary(&batch))?;
        }
        Ok(watch::exit_code(&batch).unwrap_or(1))
    };
    or_interrupted(id, following).await
}

async fn get(id: &str, client: &Client) -> anyhow::Result<pb::Batch> {
    let request = pb::GetBatchRequest { batch_id: id.to_owned() };
    Ok(retry(|| async { client.batches().get_batch(request.clone()).await }).await?)
}

fn show(batch: &pb::Batch, client: &Client) -> anyhow::Result<()> {
    if client.json {
        out::line(json::of(batch))?;
    } else {
        out::line(out::batch(batch))?;
    }
    Ok(())
}

async fn list(args: ListArgs, client: &Client) -> anyhow::Result<u8> {
    let mut request = pb::ListBatchesRequest {
        page_size: 0,
        page_token: String::new(),
        statuses: args.status.into_iter().map(Into::into).collect(),
        model: args.model,
        metadata: args.metadata.into_iter().collect(),
    };
    let (mut left, mut rows) = (args.limit, Vec::new());
    while left > 0 {
        request.page_size = i32::try_from(left.min(1_000))?;
        let page = retry(|| async { client.batches().list_batches(request.clone()).await }).await?;
        left = left.saturating_sub(u32::try_from(page.batches.len())?);
        for batch in &page.batches {
            if client.json {
                out::line(json::of(batch))?;
            } else {
                rows.push(row(batch));
            }
        }
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    if !client.json {
        out::table(["BATCH", "STATUS", "DONE", "FAILED", "CREATED", "MODELS"], &rows)?;
    }
    Ok(0)
}

fn row(batch: &pb::Batch) -> [String; 6] {
    let counts = batch.request_counts.unwrap_or_default();
    [
        batch.id.clone(),
        out::words(json::batch_status(batch.status)),
        format!("{}/{}", counts.completed.saturating_add(counts.failed), counts.total),
        counts.failed.to_string(),
        json::time(batch.create_time.as_ref()).unwrap_or_default(),
        batch.models.join(","),
    ]
}

async fn write_results(args: ResultsArgs, client: &Client) -> anyhow::Result<u8> {
    // Checked before any call and any write.
    if let (Some(output), Some(errors)) = (&args.output, &args.errors) {
        results::ensure_different(output, errors)?;
    }
    if args.follow {
        return or_interrupted(&args.id, follow_results(&args, client)).await;
    }
    let batch = get(&args.id, client).await?;
    if watch::exit_code(&batch).is_none() {
        let state = out::words(json::batch_status(batch.status));
        bail!(
            "{} is {state}: its results are not complete. Wait with `tidemill batch watch`, or add --follow",
            args.id
        );
    }
    write_file(&batch.output_file_id, Output::open(args.output.as_deref())?, client).await?;
    match args.errors {
        Some(path) => write_file(&batch.error_file_id, Output::open(Some(&path))?, client).await?,
        None if !batch.error_file_id.is_empty() => {
            let failed = batch.request_counts.unwrap_or_default().failed;
            note(&format!("{failed} requests failed; --errors FILE writes their lines"));
        }
        None => {}
    }
    Ok(0)
}

/// Writes lines as they finish. Returns the exit code of `tidemill batch watch`.
async fn follow_results(args: &ResultsArgs, client: &Client) -> anyhow::Result<u8> {
    let errors = args.errors.as_deref().map(|path| Output::open(Some(path))).transpose()?;
    let output = Output::open(args.output.as_deref())?;
    let mut sinks = Sinks { output, errors, json: client.json, failed: 0 };
    results::stream(client, &args.id, &mut sinks).await?;
    sinks.output.finish()?;
    sinks.errors.map_or(Ok(()), Output::finish)?;
    if sinks.failed > 0 && args.errors.is_none() && !client.json {
        note(&format!("{} requests failed; --errors FILE writes their lines", sinks.failed));
    }
    Ok(watch::exit_code(&get(&args.id, client).await?).unwrap_or(1))
}

/// A batch without such lines has no file for them: write an empty file.
async fn write_file(file_id: &str, output: Output, client: &Client) -> anyhow::Result<()> {
    if file_id.is_empty() {
        return Ok(output.finish()?);
    }
    results::download(client, file_id, output).await
}

fn status(text: &str) -> Result<pb::BatchStatus, String> {
    let name = format!("BATCH_STATUS_{}", text.to_uppercase().replace([' ', '-'], "_"));
    match pb::BatchStatus::from_str_name(&name) {
        Some(status) if status != pb::BatchStatus::Unspecified => Ok(status),
        _ => Err("expected validating, in_progress, finalizing, completed, failed, expired, cancelling or cancelled"
            .to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_read() {
        assert_eq!(status("in-progress"), Ok(pb::BatchStatus::InProgress));
        assert_eq!(status("COMPLETED"), Ok(pb::BatchStatus::Completed));
        assert!(status("unspecified").is_err() && status("done").is_err());
    }
}
