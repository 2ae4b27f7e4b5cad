//! `tidemill batch submit`

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use clap::Args;
use uuid::Uuid;

use super::{
    client::{Client, retry},
    upload::Upload,
};
use crate::{
    config::{SecretParser, parse_span, parse_webhook_secret},
    domain::{batch::EXPIRY_RANGE, webhook::Secret},
    pb::{self, create_batch_request::Input},
};

/// Exit codes and examples at the end of the command's help.
pub const HELP: &str = "\
Exit codes: 0 submitted, or with --watch completed; 3 completed, but some lines failed; 4 failed, expired or cancelled; \
1 any other error.

Examples:
  tidemill batch submit requests.jsonl --watch
  generate | tidemill batch submit - --window 1h --priority 1 --metadata team=search
  id=$(tidemill batch submit requests.jsonl)
  tidemill batch watch $id && tidemill batch results $id > out.jsonl";

/// Arguments of `batch submit`.
#[derive(Debug, Args)]
pub struct SubmitArgs {
    /// JSONL file of requests, "-" for stdin, or the id of an uploaded file: file-…
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Follow the batch to its end.
    #[arg(long)]
    pub watch: bool,
    /// The requests' url. Default: as in the file.
    #[arg(long, value_name = "PATH", default_value = "", hide_default_value = true)]
    endpoint: String,
    /// The completion window, 1h to 14d [default: 24h].
    #[arg(long, value_name = "SPAN", value_parser = window)]
    window: Option<Duration>,
    /// Priority: -1, 0 or 1; a higher one goes first.
    #[arg(long, value_name = "N", default_value_t = 0, allow_hyphen_values = true,
        value_parser = clap::value_parser!(i32).range(-1..=1))]
    priority: i32,
    /// Metadata to store with the batch. Repeatable, up to 16.
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    metadata: Vec<(String, String)>,
    /// Delete the batch's output and error files this long after its end, 1h to 30d [default: never].
    #[arg(long, value_name = "SPAN", value_parser = expiry)]
    output_expires_after: Option<Duration>,
    /// Makes the command safe to repeat: the same id returns the same batch, even if the file has changed.
    #[arg(long, value_name = "ID")]
    request_id: Option<String>,
    #[command(flatten)]
    webhook: WebhookArgs,
}

/// Webhook arguments of `batch submit`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Webhook")]
pub struct WebhookArgs {
    /// Send webhooks to this URL.
    #[arg(long, value_name = "URL", conflicts_with = "webhook_endpoint")]
    webhook_url: Option<String>,
    /// Sign the webhooks with this secret.
    #[arg(long, env = "TIDEMILL_WEBHOOK_SECRET", value_name = "SECRET", hide_env_values = true,
        allow_hyphen_values = true, value_parser = SecretParser(parse_webhook_secret))]
    webhook_secret: Option<Secret>,
    /// Events to send: completed, failed, progress, cancelled, expired. Default: all but progress.
    #[arg(long, value_name = "EVENT,…", value_delimiter = ',', requires = "webhook_url")]
    webhook_events: Vec<String>,
    /// Send webhooks to this registered endpoint: we_…
    #[arg(long, value_name = "ENDPOINT")]
    webhook_endpoint: Option<String>,
}

/// Uploads the file and creates the batch.
///
/// # Errors
/// What went wrong, for people.
pub async fn submit(args: SubmitArgs, client: &Client) -> anyhow::Result<pb::Batch> {
    let uploaded = args.file.to_str().filter(|name| name.starts_with("file-") && !args.file.exists());
    let input = match uploaded {
        Some(id) => id.to_owned(),
        None => Upload::open(&args.file).await?.send(client, args.request_id.clone()).await?.id,
    };
    let webhook = args.webhook.webhook_url.map(|url| pb::WebhookConfig {
        url,
        secret: args.webhook.webhook_secret.map(|secret| secret.expose().to_owned()).unwrap_or_default(),
        events: args.webhook.webhook_events,
        ..pb::WebhookConfig::default()
    });
    let request = pb::CreateBatchRequest {
        input: Some(Input::InputFileId(input)),
        endpoint: args.endpoint,
        completion_window: span(args.window)?,
        priority: args.priority,
        metadata: args.metadata.into_iter().collect(),
        webhook,
        webhook_endpoint_id: args.webhook.webhook_endpoint.unwrap_or_default(),
        request_id: args.request_id.unwrap_or_else(|| Uuid::new_v4().to_string()),
        output_expires_after: span(args.output_expires_after)?,
    };
    Ok(retry(|| async { client.batches().create_batch(request.clone()).await }).await?)
}

/// A span as a protobuf duration.
///
/// # Errors
/// It is longer than any duration there.
pub fn span(span: Option<Duration>) -> anyhow::Result<Option<prost_types::Duration>> {
    span.map(prost_types::Duration::try_from).transpose().context("the time span is too long")
}

/// Parses `--window`, so that an error is reported before the file is uploaded.
///
/// # Errors
/// It is no time span, or not 1 hour to 14 days.
pub fn window(text: &str) -> Result<Duration, String> {
    let span = parse_span(text)?;
    let hours = 60 * 60;
    if (Duration::from_secs(hours)..=Duration::from_secs(14 * 24 * hours)).contains(&span) {
        Ok(span)
    } else {
        Err("expected 1h to 14d".to_owned())
    }
}

/// Parses when a file expires, so that an error is reported before the file is uploaded.
///
/// # Errors
/// It is no time span, or not 1 hour to 30 days.
pub fn expiry(text: &str) -> Result<Duration, String> {
    let span = parse_span(text)?;
    let (least, most) = EXPIRY_RANGE;
    if (least..=most).contains(&span) { Ok(span) } else { Err("expected 1h to 30d".to_owned()) }
}

/// `KEY=VALUE`.
///
/// # Errors
/// It is not that.
pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_an_hour_to_two_weeks() {
        assert_eq!(window("90m"), Ok(Duration::from_secs(5_400)));
        assert!(window("1h").is_ok() && window("14d").is_ok());
        assert!(expiry("1h").is_ok() && expiry("30d").is_ok() && expiry("31d").is_err() && expiry("1m").is_err());
        assert!(window("59m 59s").is_err() && window("14d 1s").is_err() && window("soon").is_err());
    }

    #[test]
    fn pairs_are_read() {
        assert_eq!(pair("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert_eq!(pair("a="), Ok(("a".into(), String::new())));
        assert!(pair("=b").is_err() && pair("ab").is_err());
    }
}
