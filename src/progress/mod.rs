//! Progress: durable changes in, event streams out.
//!
//! The [`Hub`] reads a batch once per change, however many watch it, and shares what it read as an [`Arc`] in a
//! [`tokio::sync::watch`] channel. It learns of this node's commits at once, and of other nodes' by PostgreSQL's
//! notifications; it also polls the database for revisions every second. Polling guarantees delivery; notifications
//! only reduce latency.
//!
//! [`Arc`]: std::sync::Arc

mod feed;
mod hub;
mod rate;
mod waiting;
mod watch;
mod watch_all;

#[cfg(test)]
mod tests;

use std::time::Duration;

pub use hub::Hub;
pub use rate::{Rates, Window};
pub use waiting::{Situation, waiting_reason};

use crate::{
    domain::{Batch, BatchId, Counts, Revision, Sequence, Timestamp, TokenUsage},
    store::StoreError,
};

/// A heartbeat is sent after this much silence, because some proxies cut streams that are idle for longer.
pub const HEARTBEAT: Duration = Duration::from_secs(15);
/// The shortest and the longest time between two progress events of a batch that a watcher may ask for.
pub const INTERVAL_RANGE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(60));
/// The default of the time between two progress events.
pub const DEFAULT_INTERVAL: Duration = Duration::from_millis(500);
/// [`Hub::watch_all`] shows the progress of at most this many unfinished batches, the oldest, and state changes of all.
pub const WATCH_ALL_LIMIT: u64 = 10_000;

/// How much of a batch is done.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Sums over the results that are durable so far.
    pub counts: Counts,
    /// Sums over the results that are durable so far.
    pub usage: TokenUsage,
    /// The speed over the last seconds.
    pub rates: Rates,
    /// The time until the batch ends at the present speed. `None` while it can't be estimated.
    pub eta: Option<Duration>,
    /// The number of unfinished batches ahead of it.
    pub queue_position: i64,
    /// Why the batch makes no progress. `None` while it does. For admins, because it may name workers.
    pub waiting_reason: Option<String>,
    /// The same reason for other callers, without workers' addresses.
    pub public_reason: Option<String>,
}

impl Progress {
    /// The progress as callers who are not admins may see it.
    #[must_use]
    pub fn public(self) -> Self {
        Self { waiting_reason: self.public_reason.clone(), ..self }
    }
}

/// An event for a watcher.
#[derive(Clone, Debug)]
pub struct Event {
    /// The batch. `None` in a heartbeat of [`Hub::watch_all`].
    pub batch: Option<BatchId>,
    /// The revision from which [`Hub::watch`] resumes after this event.
    pub revision: Revision,
    /// The sequence from which [`Hub::watch_all`] resumes after this event.
    pub sequence: Sequence,
    /// When it happened.
    pub at: Timestamp,
    pub kind: EventKind,
}

#[derive(Clone, Debug)]
pub enum EventKind {
    /// The batch entered a state, or this is its state when the stream begins.
    StateChanged {
        /// The batch at that moment.
        batch: Box<Batch>,
        /// The batch's progress, if this state is the current one.
        progress: Option<Box<Progress>>,
    },
    /// The newest progress.
    Progress(Box<Progress>),
    /// Nothing has happened for [`HEARTBEAT`].
    Heartbeat,
}

/// Why a batch can't be watched, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// There is no such batch.
    #[error("no batch {0}")]
    NotFound(BatchId),
    /// The client asks to resume after an event that has not happened on this server.
    #[error("{asked} lies ahead of the newest, {newest}")]
    Ahead {
        /// The revision or sequence that the client gave.
        asked: i64,
        newest: i64,
    },
    /// The server is stopping.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}
