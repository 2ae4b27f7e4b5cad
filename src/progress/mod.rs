//! Progress: durable changes in, event streams out.
//!
//! The [`Hub`] reads a batch once per change, however many watch it, and shares what it read as an [`Arc`] in a
//! [`tokio::sync::watch`] channel. Commits of this node are heard of at once, and those of other nodes too
//! as long as PostgreSQL's word comes through; the database is asked for revisions every second. Asking is the guarantee,
//! hearing only makes it quick.
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

/// A heartbeat goes out after this much silence: some proxies cut streams that are idle for longer.
pub const HEARTBEAT: Duration = Duration::from_secs(15);
/// The least and the most that a watcher may ask for as the time between two progress events of a batch.
pub const INTERVAL_RANGE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(60));
/// The time between two progress events where none is given.
pub const DEFAULT_INTERVAL: Duration = Duration::from_millis(500);
/// [`Hub::watch_all`] shows the progress of at most this many unfinished batches, the oldest; state changes of all.
pub const WATCH_ALL_LIMIT: u64 = 10_000;

/// How far a batch is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    /// Durable so far.
    pub counts: Counts,
    /// Durable so far.
    pub usage: TokenUsage,
    /// Over the last seconds.
    pub rates: Rates,
    /// Until the end at the present speed; none while unknown.
    pub eta: Option<Duration>,
    /// How many unfinished batches go before it.
    pub queue_position: i64,
    /// Why nothing moves; none while it does. For admins: it may name workers.
    pub waiting_reason: Option<String>,
    /// The same for everybody else.
    pub public_reason: Option<String>,
}

impl Progress {
    /// As it may be shown to somebody who is no admin.
    #[must_use]
    pub fn public(self) -> Self {
        Self { waiting_reason: self.public_reason.clone(), ..self }
    }
}

/// Something to tell a watcher.
#[derive(Clone, Debug)]
pub struct Event {
    /// Of which batch; none in a heartbeat of [`Hub::watch_all`].
    pub batch: Option<BatchId>,
    /// Resumes [`Hub::watch`] after it.
    pub revision: Revision,
    /// Resumes [`Hub::watch_all`] after it.
    pub sequence: Sequence,
    /// When it happened.
    pub at: Timestamp,
    /// What happened.
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum EventKind {
    /// The batch entered a state, or this is the state it is in when the stream begins.
    StateChanged {
        /// As it was then.
        batch: Box<Batch>,
        /// How far it is, if that state is its present one.
        progress: Option<Box<Progress>>,
    },
    /// The newest progress.
    Progress(Box<Progress>),
    /// Nothing has happened for [`HEARTBEAT`].
    Heartbeat,
}

/// Why a batch can't be watched, or not any longer.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// There is no such batch.
    #[error("no batch {0}")]
    NotFound(BatchId),
    /// The client has seen what has not happened here.
    #[error("{asked} lies ahead of the newest, {newest}")]
    Ahead {
        /// What the client has seen.
        asked: i64,
        /// The newest there is.
        newest: i64,
    },
    /// The server stops.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}
