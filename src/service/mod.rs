//! The use cases: what a caller can ask of a server, whichever door the request comes through. Domain types go in and
//! come out, and one [`ServiceError`] says why not; a door only translates. Every rule is here: what a request may say,
//! who sees what, idempotency, quotas.
//!
//! - [`files`]: upload, show, list, delete, read. [`uploads`]: uploads in parts. [`batches`]: create, show, list, cancel. [`retry`]: a batch's failed
//!   requests once more. [`infer`], [`live`]: one request at once. [`watch`]: live events. [`results`]: results one by one.
//! - [`webhooks`]: endpoints, deliveries, dead letters, retry jobs. [`workers`]: the workers.
//! - `message_batches`: batches of Anthropic's clients.
//! - `rules`: what fields may hold. [`page`]: page tokens. [`ServiceError`]: every error of the rooms below.

pub mod batches;
mod error;
pub mod files;
mod filters;
pub mod infer;
pub mod live;
mod message_batches;
pub mod page;
pub mod results;
pub mod retry;
mod rules;
mod text;
pub mod uploads;
pub mod watch;
pub mod webhooks;
pub mod workers;

use std::{sync::Arc, time::Duration};

use tokio_util::sync::CancellationToken;

#[cfg(test)]
pub(crate) use self::error::{ingest as ingest_error, line_name};
pub use self::{
    batches::Shown,
    error::{BadLines, Code, ServiceError, Violation, bad_lines, shortened},
    message_batches::Beside,
    page::{Found, Page},
    rules::{NotASpan, Span},
    text::{not_json, short},
};
use crate::{
    access::{Account, Admitted, Caller, CallerLimits, Limiter, Work},
    blobs::Blobs,
    delivery::Webhooks,
    domain::Weights,
    fleet::Fleet,
    ingest::Ingest,
    progress::Hub,
    results::Reader,
    scheduler::Stages,
    store::Store,
    telemetry::seldom,
};

/// The parts of a server that the use cases need.
#[derive(Clone)]
pub struct Parts {
    /// The database.
    pub store: Store,
    /// The objects.
    pub blobs: Blobs,
    /// Validates and stores uploads.
    pub ingest: Ingest,
    /// Reads files and results.
    pub reader: Reader,
    /// The batches' progress.
    pub hub: Hub,
    /// The workers.
    pub fleet: Fleet,
    /// The times that this process's requests spend in each stage.
    pub stages: Stages,
    /// The webhooks.
    pub webhooks: Webhooks,
}

/// The use cases of one server. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    parts: Parts,
    limits: Arc<Limiter>,
    /// The owners' shares of the workers.
    weights: Weights,
    /// Ends streams at the shutdown.
    shutdown: CancellationToken,
}

impl Service {
    /// `shutdown` must be the token that ends the hub's streams, or a parent of it.
    #[must_use]
    pub fn new(parts: Parts, limits: CallerLimits, weights: Weights, shutdown: CancellationToken) -> Self {
        Self { parts, limits: Arc::new(Limiter::new(limits)), weights, shutdown }
    }

    /// The limits of callers, for the protocols' gates.
    #[must_use]
    pub fn limits(&self) -> &Arc<Limiter> {
        &self.limits
    }

    /// Checks whether this server can accept work now.
    ///
    /// # Errors
    /// The reason why not, for people.
    pub async fn ready(&self, within: Duration) -> Result<(), &'static str> {
        if self.shutdown.is_cancelled() {
            return Err("shutting down");
        }
        if self.parts.blobs.foreign().is_some() {
            return Err("the blob store does not belong to this database");
        }
        match tokio::time::timeout(within, self.parts.store.ping()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                seldom!(warn, %error, "not ready: the database failed");
                Err("the database is not available")
            }
            Err(_) => Err("the database does not answer"),
        }
    }

    /// The waits between a delivery's attempts, if it has this many, and the time from the first to the last.
    #[must_use]
    pub fn webhook_schedule(&self, max_attempts: i32) -> (Vec<Duration>, Duration) {
        (self.parts.webhooks.schedule(max_attempts), self.parts.webhooks.horizon(max_attempts))
    }

    /// Lets a call make work, which every way to make some passes: its lines, bytes and turn count as those of an
    /// upload and a batch. What is not allowed is refused before anything is written; [`Self::insert`] counts the lines
    /// once more, with the batch, so that batches created at the same moment can't pass the limit together.
    async fn admit(
        &self,
        caller: &Caller,
        account: &Account,
        lines: i64,
        work: Work,
    ) -> Result<Admitted, ServiceError> {
        if lines > 0 && self.limits.most_lines().is_some() {
            let queued = self.parts.store.queued_lines(&caller.owner).await?;
            self.limits.lines(queued, lines)?;
        }
        Ok(self.limits.admit(&caller.owner, account, work).await?)
    }
}
