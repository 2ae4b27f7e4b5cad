//! Follows a batch to its end, through restarts of the server and lost connections.

use std::time::Duration;

use tokio::time::timeout;
use tonic::Status;

use super::{client::Client, error, json, meter::Meter, meter::View, out};
use crate::pb::{self, BatchStatus, batch_event::Event};

/// Attempts to read a batch that this command has not seen yet before the server counts as unreachable.
const FIRST_TRIES: u32 = 4;
/// A stream that is silent for this long is dead: a live one has a heartbeat every 15 s.
const SILENCE: Duration = Duration::from_secs(50);

/// The exit code for a batch's end: 0 completed, 3 completed with failed lines, 4 failed, expired or cancelled. `None`:
/// it has not ended.
#[must_use]
pub fn exit_code(batch: &pb::Batch) -> Option<u8> {
    let failed = batch.request_counts.unwrap_or_default().failed;
    match BatchStatus::try_from(batch.status).unwrap_or_default() {
        BatchStatus::Completed if failed == 0 => Some(0),
        BatchStatus::Completed => Some(3),
        BatchStatus::Failed | BatchStatus::Expired | BatchStatus::Cancelled => Some(4),
        BatchStatus::Unspecified
        | BatchStatus::Validating
        | BatchStatus::InProgress
        | BatchStatus::Finalizing
        | BatchStatus::Cancelling => None,
    }
}

/// Follows a batch and shows its progress. `exists`: the server is known to have the batch, so the command waits
/// however long the server is unreachable. Returns the batch in its terminal state.
///
/// # Errors
/// There is no such batch, the caller may not see it, or a server never answered.
pub async fn follow(client: &Client, batch_id: &str, exists: bool) -> anyhow::Result<pb::Batch> {
    let mut meter = Meter::requests(client.json);
    let ended = Follower { client, batch_id, meter: &mut meter, view: View::default(), revision: 0 }.run(exists).await;
    meter.finish();
    ended
}

struct Follower<'a> {
    client: &'a Client,
    batch_id: &'a str,
    meter: &'a mut Meter,
    view: View,
    /// The last event's revision, where to resume.
    revision: i64,
}

impl Follower<'_> {
    async fn run(&mut self, exists: bool) -> anyhow::Result<pb::Batch> {
        let mut attempt = 0;
        loop {
            let before = self.revision;
            let lost = match self.stream().await? {
                Ok(batch) => return Ok(batch),
                Err(status) => status,
            };
            attempt = if self.revision > before { 1 } else { attempt + 1 };
            if !error::is_transient(&lost) || (!exists && self.revision == 0 && attempt >= FIRST_TRIES) {
                return Err(lost.into());
            }
            if attempt == 2 {
                self.meter.say(&format!("the server can't be reached ({}), trying again", error::brief(&lost)));
            }
            tokio::time::sleep(error::delay(&lost, attempt, rand::random())).await;
        }
    }

    /// Reads one stream until the batch or the stream ends. The outer error means that stdout is gone.
    async fn stream(&mut self) -> anyhow::Result<Result<pb::Batch, Status>> {
        let request = pb::WatchBatchRequest {
            batch_id: self.batch_id.to_owned(),
            after_revision: self.revision,
            min_interval: prost_types::Duration::try_from(Duration::from_millis(250)).ok(),
        };
        let mut batches = self.client.batches();
        let mut events = match timeout(SILENCE, batches.watch_batch(request)).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return Ok(Err(status)),
            Err(_) => return Ok(Err(silent())),
        };
        loop {
            let event = match timeout(SILENCE, events.message()).await {
                Ok(Ok(Some(event))) => event,
                Ok(Ok(None)) => return Ok(Err(Status::unavailable("the stream ended before the batch did"))),
                Ok(Err(status)) => return Ok(Err(status)),
                Err(_) => return Ok(Err(silent())),
            };
            if let Some(batch) = self.take(&event)? {
                return Ok(Ok(batch));
            }
        }
    }

    /// Applies an event. Returns the batch if it has ended.
    fn take(&mut self, event: &pb::BatchEvent) -> anyhow::Result<Option<pb::Batch>> {
        self.revision = self.revision.max(event.revision);
        let Some(what) = &event.event else { return Ok(None) };
        self.view.apply(what);
        self.meter.show(&self.view);
        if self.client.json && !matches!(what, Event::Heartbeat(_)) {
            out::line(json::of(event))?;
        }
        match what {
            Event::StateChanged(batch) if exit_code(batch).is_some() => Ok(Some(batch.clone())),
            Event::StateChanged(_) | Event::Progress(_) | Event::Heartbeat(_) => Ok(None),
        }
    }
}

fn silent() -> Status {
    Status::unavailable(format!("it has sent nothing for {} s", SILENCE.as_secs()))
}

/// The summary of a batch that has ended.
#[must_use]
pub fn summary(batch: &pb::Batch) -> String {
    let counts = batch.request_counts.unwrap_or_default();
    let mut text = format!(
        "{} {}: {} of {} requests completed, {} failed; tokens: {}",
        batch.id,
        out::words(json::batch_status(batch.status)),
        counts.completed,
        counts.total,
        counts.failed,
        out::tokens(&batch.usage.unwrap_or_default())
    );
    for error in &batch.errors {
        text.push_str(&format!("\n  {} ({})", error.message, error.code));
    }
    if !batch.output_file_id.is_empty() {
        text.push_str(&format!("\nresults: tidemill batch results {}", batch.id));
    }
    if !batch.error_file_id.is_empty() {
        text.push_str(&format!("\nerrors:  tidemill files download {}", batch.error_file_id));
        text.push_str(&format!("\nagain:   tidemill batch retry-failed {}", batch.id));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{super::fake::*, *};

    #[tokio::test]
    async fn a_watch_resumes_after_the_last_revision() {
        let (fake, url) = Fake::start("").await;
        let batch = follow(&client(&url), "batch_1", false).await.unwrap();
        assert_eq!((batch.revision, exit_code(&batch)), (7, Some(0)));
        assert_eq!(fake.log().watches, [0, 3, 3, 5]);
    }

    #[tokio::test]
    async fn a_server_that_never_answered_is_an_error() {
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = follow(&client(&format!("http://{closed}")), "batch_1", false).await.unwrap_err();
        assert!(error::report(&error).unwrap().contains("tidemill serve"), "{error:#}");
    }

    fn batch(status: BatchStatus, failed: i64) -> pb::Batch {
        let request_counts = Some(pb::RequestCounts { total: 5, completed: 5 - failed, failed });
        pb::Batch { id: "batch_1".into(), status: status.into(), request_counts, ..pb::Batch::default() }
    }

    #[test]
    fn exit_codes_tell_the_end() {
        assert_eq!(exit_code(&batch(BatchStatus::Completed, 0)), Some(0));
        assert_eq!(exit_code(&batch(BatchStatus::Completed, 1)), Some(3));
        assert_eq!(exit_code(&batch(BatchStatus::Failed, 0)), Some(4));
        assert_eq!(exit_code(&batch(BatchStatus::Expired, 2)), Some(4));
        assert_eq!(exit_code(&batch(BatchStatus::Cancelled, 0)), Some(4));
        assert_eq!(exit_code(&batch(BatchStatus::Cancelling, 0)), None);
        assert_eq!(exit_code(&batch(BatchStatus::Finalizing, 0)), None);
    }

    #[test]
    fn the_summary_says_how_to_go_on() {
        let ended = pb::Batch {
            output_file_id: "file-o".into(),
            error_file_id: "file-e".into(),
            ..batch(BatchStatus::Completed, 2)
        };
        let text = summary(&ended);
        assert!(text.starts_with("batch_1 completed: 3 of 5 requests completed, 2 failed; tokens: 0 in"), "{text}");
        assert!(text.contains("tidemill batch results batch_1"), "{text}");
        assert!(text.contains("tidemill files download file-e"), "{text}");
    }
}
