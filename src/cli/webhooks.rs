//! `tidemill webhooks …`

use std::{fs, io::Read, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use axum::{Router, body::Bytes, extract::State, http::HeaderMap, routing::post};
use clap::{Args, Subcommand};
use http::{HeaderName, HeaderValue, StatusCode};
use serde_json::Value;
use tokio::net::TcpListener;

use super::{
    client::{Client, retry},
    json,
    meter::note_terminal,
    out,
};
use crate::{
    config::{SecretParser, parse_address, parse_span, parse_webhook_secret},
    delivery::signature::{Verified, VerifyError, verify},
    domain::{Timestamp, webhook::Secret},
    pb,
};

/// The most bytes of a body that `listen` accepts.
const MAX_BODY: usize = 1024 * 1024;

/// Commands for webhooks.
#[derive(Debug, Subcommand)]
pub enum WebhooksCommand {
    /// Webhooks that could not be delivered.
    #[command(subcommand)]
    DeadLetters(DeadLettersCommand),
    /// Every event for every receiver, with its outcome.
    #[command(subcommand)]
    Deliveries(DeliveriesCommand),
    /// Registered receivers.
    #[command(subcommand)]
    Endpoints(EndpointsCommand),
    /// Check a request's signature: headers from a file, the body from a file or stdin.
    #[command(after_help = "Example:\n  tidemill webhooks verify --headers headers.txt --secret whsec_… < body.json")]
    Verify(VerifyArgs),
    /// Run a small receiver that verifies and prints webhooks, for trying things out.
    #[command(
        after_help = "Example:\n  tidemill webhooks listen --secret whsec_… &\n  tidemill batch submit in.jsonl \
                            --webhook-url http://127.0.0.1:9000/ --webhook-secret whsec_…"
    )]
    Listen(ListenArgs),
}

/// Commands for dead letters.
#[derive(Debug, Subcommand)]
pub enum DeadLettersCommand {
    /// List dead letters, newest first.
    List(DeadLetterFilter),
    /// Show a dead letter with all its attempts.
    Get(Id),
    /// Send a dead letter again, once, now.
    Retry {
        /// The dead letter's id: dl_…
        #[arg(value_name = "ID")]
        id: String,
        /// Send it even if an earlier retry has delivered it.
        #[arg(long)]
        force: bool,
    },
    /// Delete one.
    Delete(Id),
    /// Send all matching dead letters again, in the background.
    RetryAll {
        #[command(flatten)]
        filter: DeadLetterFilter,
        /// Only count the matching dead letters.
        #[arg(long)]
        dry_run: bool,
    },
    /// Delete dead letters by age.
    Purge {
        /// Delete those older than this, such as 30d.
        #[arg(long, value_name = "SPAN", value_parser = parse_span)]
        older_than: Duration,
    },
    /// Show the progress of a retry-all.
    Job(Id),
}

/// Filters for dead letters.
#[derive(Debug, Args)]
pub struct DeadLetterFilter {
    /// Only those of this batch.
    #[arg(long, value_name = "BATCH", default_value = "", hide_default_value = true)]
    batch: String,
    /// Only those of this event.
    #[arg(long, value_name = "EVENT", default_value = "", hide_default_value = true)]
    event: String,
    /// Only those to this host.
    #[arg(long, value_name = "HOST", default_value = "", hide_default_value = true)]
    host: String,
}

/// Commands for deliveries.
#[derive(Debug, Subcommand)]
pub enum DeliveriesCommand {
    /// List the newest deliveries.
    List {
        /// Only those of this batch.
        #[arg(long, value_name = "BATCH", default_value = "", hide_default_value = true)]
        batch: String,
    },
    /// Show a delivery with its body and all attempts.
    Get(Id),
}

/// Commands for registered endpoints.
#[derive(Debug, Subcommand)]
pub enum EndpointsCommand {
    /// Register an endpoint. Its secret is printed only once.
    Create {
        /// The endpoint's URL.
        url: String,
        /// The events to send. Default: every end of a batch.
        #[arg(long, value_name = "EVENT,…", value_delimiter = ',')]
        events: Vec<String>,
    },
    /// List endpoints.
    List,
    /// Show an endpoint.
    Get(Id),
    /// Suspend sending to an endpoint; its deliveries wait.
    Disable {
        /// The endpoint's id: we_…
        #[arg(value_name = "ID")]
        id: String,
        /// The reason, for people.
        #[arg(long, default_value = "", hide_default_value = true)]
        reason: String,
    },
    /// Resume sending to an endpoint, with the waiting deliveries at once.
    Enable(Id),
    /// Delete an endpoint. Fails while deliveries wait for it.
    Delete(Id),
    /// Give an endpoint a new secret, which is printed only once. The old one also signs for a while.
    RotateSecret {
        /// The endpoint's id: we_…
        #[arg(value_name = "ID")]
        id: String,
        /// How long the old secret also signs. 0s if it was stolen.
        #[arg(long, value_name = "SPAN", default_value = "24h", value_parser = parse_span)]
        overlap: Duration,
    },
    /// Send an endpoint a test event.
    Test(Id),
}

/// Selects a record.
#[derive(Debug, Args)]
pub struct Id {
    /// The id.
    #[arg(value_name = "ID")]
    id: String,
}

/// Arguments of `verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// File with the request's headers, one "name: value" per line.
    #[arg(long, value_name = "FILE")]
    headers: PathBuf,
    /// File with the body, byte for byte. Default: stdin.
    #[arg(long, value_name = "FILE")]
    body: Option<PathBuf>,
    /// The secret.
    #[arg(long, env = "TIDEMILL_WEBHOOK_SECRET", hide_env_values = true, allow_hyphen_values = true,
        value_parser = SecretParser(parse_webhook_secret))]
    secret: Secret,
    /// The receiver's clock in Unix seconds. Default: now.
    #[arg(long, value_name = "SECONDS")]
    at: Option<i64>,
}

/// Arguments of `listen`.
#[derive(Debug, Args)]
pub struct ListenArgs {
    /// The address to listen on.
    #[arg(long, default_value = "127.0.0.1:9000", value_parser = parse_address)]
    listen: SocketAddr,
    /// The secret. Without one, signatures are not verified.
    #[arg(long, env = "TIDEMILL_WEBHOOK_SECRET", hide_env_values = true, allow_hyphen_values = true,
        value_parser = SecretParser(parse_webhook_secret))]
    secret: Option<Secret>,
}

/// Runs a command.
///
/// # Errors
/// What went wrong, for people.
pub async fn run(command: WebhooksCommand, client: &Client) -> anyhow::Result<()> {
    match command {
        WebhooksCommand::DeadLetters(command) => dead_letters(command, client).await,
        WebhooksCommand::Deliveries(command) => deliveries(command, client).await,
        WebhooksCommand::Endpoints(command) => endpoints(command, client).await,
        WebhooksCommand::Verify(args) => check(&args),
        WebhooksCommand::Listen(args) => listen(args).await,
    }
}

async fn dead_letters(command: DeadLettersCommand, client: &Client) -> anyhow::Result<()> {
    let mut hooks = client.webhooks();
    match command {
        DeadLettersCommand::List(filter) => {
            let mut request = pb::ListDeadLettersRequest {
                batch_id: filter.batch,
                event: filter.event,
                url_host: filter.host,
                page_size: 1_000,
                ..Default::default()
            };
            let mut all = Vec::new();
            loop {
                let page = retry(|| async { client.webhooks().list_dead_letters(request.clone()).await }).await?;
                all.extend(page.dead_letters);
                if page.next_page_token.is_empty() {
                    break;
                }
                request.page_token = page.next_page_token;
            }
            if client.json {
                return Ok(all.iter().try_for_each(|one| out::line(json::of(one)))?);
            }
            let rows: Vec<_> = all
                .into_iter()
                .map(|one| {
                    let delivered = if one.retry_success { "yes" } else { "no" };
                    [one.id, one.batch_id, one.event, one.attempts.to_string(), delivered.into(), one.error_message]
                })
                .collect();
            out::table(["DEAD LETTER", "BATCH", "EVENT", "ATTEMPTS", "DELIVERED SINCE", "ERROR"], &rows)?;
        }
        DeadLettersCommand::Get(Id { id }) => {
            let request = pb::GetDeadLetterRequest { dead_letter_id: id };
            out::line(pretty(&json::of(&hooks.get_dead_letter(request).await?.into_inner()))?)?;
        }
        DeadLettersCommand::Retry { id, force } => {
            // The id makes a repeated call after a lost answer harmless.
            let request_id = uuid::Uuid::new_v4().to_string();
            let request = pb::RetryDeadLetterRequest { dead_letter_id: id, force, request_id };
            let came = retry(|| async { client.webhooks().retry_dead_letter(request.clone()).await }).await?;
            out::line(json::of(&came))?;
            if !came.retry_success {
                bail!("the receiver did not accept it: {}", came.error_message);
            }
        }
        DeadLettersCommand::Delete(Id { id }) => {
            hooks.delete_dead_letter(pb::DeleteDeadLetterRequest { dead_letter_id: id }).await?;
        }
        DeadLettersCommand::RetryAll { filter, dry_run } => {
            let request = pb::RetryDeadLettersRequest {
                batch_id: filter.batch,
                event: filter.event,
                url_host: filter.host,
                dry_run,
                ..Default::default()
            };
            let made = hooks.retry_dead_letters(request).await?.into_inner();
            out::line(json::of(&made))?;
        }
        DeadLettersCommand::Purge { older_than } => {
            let older_than = Some(prost_types::Duration::try_from(older_than)?);
            let purged = hooks.purge_dead_letters(pb::PurgeDeadLettersRequest { older_than }).await?.into_inner();
            out::line(json::of(&purged))?;
        }
        DeadLettersCommand::Job(Id { id }) => {
            out::line(json::of(&hooks.get_retry_job(pb::GetRetryJobRequest { retry_job_id: id }).await?.into_inner()))?;
        }
    }
    Ok(())
}

async fn deliveries(command: DeliveriesCommand, client: &Client) -> anyhow::Result<()> {
    match command {
        DeliveriesCommand::List { batch } => {
            let request = pb::ListDeliveriesRequest { batch_id: batch, page_size: 100, ..Default::default() };
            let page = retry(|| async { client.webhooks().list_deliveries(request.clone()).await }).await?;
            if client.json {
                return Ok(page.deliveries.iter().try_for_each(|one| out::line(json::of(one)))?);
            }
            let rows: Vec<_> = page
                .deliveries
                .into_iter()
                .map(|one| {
                    let attempts = format!("{}/{}", one.attempts, one.max_attempts);
                    [delivery_state(&one).to_owned(), one.id, one.event, attempts, one.webhook_url, one.error_message]
                })
                .collect();
            out::table(["STATE", "DELIVERY", "EVENT", "ATTEMPTS", "URL", "ERROR"], &rows)?;
        }
        DeliveriesCommand::Get(Id { id }) => {
            let request = pb::GetDeliveryRequest { delivery_id: id };
            out::line(pretty(&json::of(&client.webhooks().get_delivery(request).await?.into_inner()))?)?;
        }
    }
    Ok(())
}

async fn endpoints(command: EndpointsCommand, client: &Client) -> anyhow::Result<()> {
    let mut hooks = client.webhooks();
    match command {
        EndpointsCommand::Create { url, events } => {
            let request = pb::CreateEndpointRequest { url, events, ..Default::default() };
            let made = hooks.create_endpoint(request).await?.into_inner();
            out::line(json::of(&made))?;
        }
        EndpointsCommand::List => {
            let request = pb::ListEndpointsRequest { page_size: 1_000, ..Default::default() };
            let page = hooks.list_endpoints(request).await?.into_inner();
            page.endpoints.iter().try_for_each(|one| out::line(json::of(one)))?;
        }
        EndpointsCommand::Get(Id { id }) => {
            let found = hooks.get_endpoint(pb::GetEndpointRequest { endpoint_id: id }).await?.into_inner();
            out::line(json::of(&found))?;
        }
        EndpointsCommand::Disable { id, reason } => {
            out::line(json::of(&switch(client, id, true, reason).await?))?;
        }
        EndpointsCommand::Enable(Id { id }) => out::line(json::of(&switch(client, id, false, String::new()).await?))?,
        EndpointsCommand::Delete(Id { id }) => {
            hooks.delete_endpoint(pb::DeleteEndpointRequest { endpoint_id: id }).await?;
        }
        EndpointsCommand::RotateSecret { id, overlap } => {
            let overlap = Some(prost_types::Duration::try_from(overlap)?);
            let request = pb::RotateSecretRequest { endpoint_id: id, overlap, ..Default::default() };
            let made = hooks.rotate_secret(request).await?.into_inner();
            out::line(json::of(&made))?;
        }
        EndpointsCommand::Test(Id { id }) => {
            let came = hooks.send_test_event(pb::SendTestEventRequest { endpoint_id: id }).await?.into_inner();
            out::line(json::of(&came))?;
            if !came.success {
                bail!("the endpoint did not accept it: {}", came.error_message);
            }
        }
    }
    Ok(())
}

async fn switch(client: &Client, id: String, off: bool, reason: String) -> anyhow::Result<pb::WebhookEndpoint> {
    let request = pb::UpdateEndpointRequest {
        endpoint_id: id,
        disabled: Some(off),
        disabled_reason: reason,
        ..Default::default()
    };
    Ok(client.webhooks().update_endpoint(request).await?.into_inner())
}

fn check(args: &VerifyArgs) -> anyhow::Result<()> {
    let text = fs::read_to_string(&args.headers).with_context(|| format!("--headers {}", args.headers.display()))?;
    let headers = headers_of(&text).with_context(|| format!("--headers {}", args.headers.display()))?;
    let mut body = Vec::new();
    match &args.body {
        Some(path) => body = fs::read(path).with_context(|| format!("--body {}", path.display()))?,
        None => {
            note_terminal();
            std::io::stdin().read_to_end(&mut body).context("stdin")?;
        }
    }
    let now = args.at.unwrap_or_else(|| Timestamp::now().unix_seconds());
    out::line(describe(judge(&args.secret, &headers, &body, now)?))?;
    Ok(())
}

/// One header per line; lines without a colon, such as the request line, are skipped.
fn headers_of(text: &str) -> anyhow::Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    for (at, line) in text.lines().enumerate() {
        let Some((name, value)) = line.split_once(':') else { continue };
        let (Ok(name), Ok(value)) = (name.trim().parse::<HeaderName>(), HeaderValue::from_str(value.trim())) else {
            bail!("line {} is not a header: expected \"name: value\"", at + 1);
        };
        headers.insert(name, value);
    }
    Ok(headers)
}

/// Verifies a request. Editors, `echo` and here-documents append a line feed; if only that prevents a match, the error
/// says so.
fn judge(secret: &Secret, headers: &HeaderMap, body: &[u8], now: i64) -> anyhow::Result<Verified> {
    let secrets = std::slice::from_ref(secret);
    let refused = match verify(secrets, headers, body, now) {
        Ok(verified) => return Ok(verified),
        Err(refused) => refused,
    };
    let cut = body.strip_suffix(b"\n").map(|body| body.strip_suffix(b"\r").unwrap_or(body));
    if let (VerifyError::Mismatch, Some(cut)) = (refused, cut)
        && verify(secrets, headers, cut, now).is_ok()
    {
        bail!(
            "no signature matches, but one does without the line feed (newline) at the end of the body; an editor \
             or echo may have added it to the file"
        );
    }
    Err(refused.into())
}

fn describe(verified: Verified) -> &'static str {
    match verified {
        Verified::Standard => "valid: webhook-signature covers id, timestamp and body",
        Verified::BodyOnly => "valid: X-Webhook-Signature covers the body; nothing covers the timestamp",
    }
}

async fn listen(args: ListenArgs) -> anyhow::Result<()> {
    let listener = TcpListener::bind(args.listen).await.with_context(|| args.listen.to_string())?;
    out::line(format!("listening on http://{}/", listener.local_addr()?))?;
    let app = Router::new()
        .route("/", post(receive))
        .route("/{*path}", post(receive))
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY))
        .with_state(args.secret);
    axum::serve(listener, app).await?;
    Ok(())
}

async fn receive(State(secret): State<Option<Secret>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("-").to_owned();
    let verdict = match secret {
        None => "not verified: no --secret".to_owned(),
        Some(secret) => match verify(&[secret], &headers, &body, Timestamp::now().unix_seconds()) {
            Ok(verified) => describe(verified).to_owned(),
            Err(error) => format!("INVALID: {error}"),
        },
    };
    let bad = verdict.starts_with("INVALID");
    let (event, id, attempt) = (header("x-webhook-event"), header("webhook-id"), header("x-webhook-attempt"));
    let printed = out::line(format!("{event} {id} attempt {attempt}: {verdict}"))
        .and_then(|()| out::data(&String::from_utf8_lossy(&body)));
    // The sender must not notice that this terminal is gone.
    let _ = printed;
    if bad { StatusCode::UNAUTHORIZED } else { StatusCode::NO_CONTENT }
}

fn pretty(value: &Value) -> serde_json::Result<String> {
    serde_json::to_string_pretty(value)
}

fn delivery_state(of: &pb::Delivery) -> &'static str {
    of.state().as_str_name().trim_start_matches("DELIVERY_STATE_")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::signature::sign_standard;

    #[test]
    fn a_line_feed_that_was_added_to_the_body_is_named() {
        let secret = Secret::try_new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let body = br#"{"a": 1}"#;
        let signature = sign_standard(std::slice::from_ref(&secret), "msg_1", 1_700_000_000, body);
        let mut headers = HeaderMap::new();
        for (name, value) in
            [("webhook-id", "msg_1"), ("webhook-timestamp", "1700000000"), ("webhook-signature", &signature)]
        {
            headers.insert(name, value.parse().unwrap());
        }
        let judged = |body: &[u8], secret: &Secret| judge(secret, &headers, body, 1_700_000_000);
        assert_eq!(judged(body, &secret).unwrap(), Verified::Standard);
        for end in ["\n", "\r\n"] {
            let error = judged(&[body, end.as_bytes()].concat(), &secret).unwrap_err().to_string();
            assert!(error.contains("without the line feed (newline) at the end"), "{error}");
        }
        let another = Secret::try_new("another").unwrap();
        for (body, secret) in
            [(&b"{\"a\": 1}\n\n"[..], &secret), (b"{\"a\": 1}\n", &another), (b"{\"a\":1}\n", &secret), (b"", &secret)]
        {
            let error = judged(body, secret).unwrap_err().to_string();
            assert!(!error.contains("line feed"), "{error}");
        }
    }
}
