//! What the run of a segment needs, and how it ends.

use std::sync::{Arc, atomic::AtomicUsize};

use tokio::sync::watch;

use super::{Control, SchedulerOptions, stages::Stages, troubles::Troubles};
use crate::{
    blobs::Blobs,
    fleet::Fleet,
    store::{ClaimedSegment, Store},
};

/// How a run of a segment ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// A step failed, and may fail in another run too: the segment is left to its lease.
    Broken(&'static str),
    /// All its lines have their result.
    Finished,
    /// It was released: its other lines wait for a worker, or for another node.
    Released,
    /// It is no longer this node's.
    Lost,
    /// Its input was not found: it was released, and this node leaves its batch alone for a while.
    Missing,
    /// Not even its batch's failure can be written: the segment is left to its lease.
    Stuck,
}

/// The ready lines of a running segment by model, for the scheduler's plan.
pub type Remaining = Arc<[AtomicUsize]>;

/// Everything a run needs.
pub struct Run {
    /// The database.
    pub store: Store,
    /// The objects.
    pub blobs: Blobs,
    /// The workers.
    pub fleet: Fleet,
    /// The settings.
    pub options: Arc<SchedulerOptions>,
    /// The segment and its lease.
    pub claimed: ClaimedSegment,
    /// The scheduler's command.
    pub control: watch::Receiver<Control>,
    /// How often this node has released the batch because its input was not found.
    pub missed: u32,
    /// The ready lines, for the plan.
    pub remaining: Remaining,
    /// What the node's runs are stuck on.
    pub troubles: Troubles,
    /// Measures the stages of its requests.
    pub stages: Stages,
}
