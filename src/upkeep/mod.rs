//! Everything periodic over the tables and objects, as one list of sweeps.
//!
//! A [`Sweep`] says what it is called, how often it looks, and does a bounded amount of work per tick. [`Upkeep`] runs
//! them: each at its own pace, and each on one node at a time, by a lease in the database. [`plan`] decides when a sweep
//! is due, purely.
//!
//! To add a sweep: implement [`Sweep`] in a file of its own, and add it to [`of_batches`] or [`of_webhooks`] (or to [`all`],
//! if it concerns neither). It need not be exclusive to be correct: a node that was frozen may go on with a tick after its
//! lease has expired.

mod clock;
mod expired;
mod garbage;
mod half_written;
mod keeper;
mod leftovers;
mod nodes;
pub mod plan;
mod rests;
mod webhooks;
mod windows;

use std::time::Duration;

use futures::future::BoxFuture;

pub use keeper::Upkeep;

use crate::{
    blobs::Blobs,
    delivery::Webhooks,
    store::{Store, StoreError},
};

/// What one tick of a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Things done: windows closed, objects deleted.
    pub done: u64,
    /// Things that could not be done. The sweep leaves them alone for a while.
    pub failed: u64,
    /// Whether more is due, so that the next tick follows at once.
    pub more: bool,
}

impl Swept {
    /// All that was due is done.
    #[must_use]
    pub fn all(done: u64) -> Self {
        Self { done, ..Self::default() }
    }
}

/// Why a tick did nothing or not all of it. The next one tries again.
#[derive(Debug, thiserror::Error)]
pub enum SweepError {
    /// The database failed, for every node alike.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// This node can't do it, and another one might: it can't reach or change the objects.
    #[error("{0}")]
    Here(String),
}

/// Periodic work.
pub trait Sweep: Send {
    /// The name, in the database, the log and the metrics. It never changes, because nodes of two releases share the
    /// lease.
    fn name(&self) -> &'static str;

    /// Time between two looks when nothing is left to do.
    fn every(&self) -> Duration;

    /// Does a bounded amount of work. May be dropped at any moment, and may run on two nodes at once.
    fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>>;
}

/// The sweeps of a server.
#[must_use]
pub fn all(store: &Store, blobs: &Blobs, webhooks: &Webhooks, lease: Duration) -> Vec<Box<dyn Sweep>> {
    let mut all = of_batches(store, blobs, lease);
    all.extend(of_webhooks(webhooks));
    all.push(Box::new(nodes::DeadNodes::new(store)));
    all
}

/// The sweeps of batches and their objects. `lease` is this server's lease of segments.
#[must_use]
pub fn of_batches(store: &Store, blobs: &Blobs, lease: Duration) -> Vec<Box<dyn Sweep>> {
    vec![
        Box::new(windows::Windows::new(store)),
        Box::new(expired::Expired::new(store)),
        Box::new(clock::Leases::new(store, lease)),
        Box::new(garbage::Garbage::new(store, blobs)),
        Box::new(leftovers::Leftovers::new(store, blobs)),
        Box::new(half_written::HalfWritten::new(blobs)),
    ]
}

#[must_use]
pub fn of_webhooks(webhooks: &Webhooks) -> Vec<Box<dyn Sweep>> {
    vec![
        Box::new(webhooks::Attempts::new(webhooks)),
        Box::new(clock::DueTimes::new(webhooks)),
        Box::new(webhooks::Retention::new(webhooks)),
    ]
}
