//! The place of a request at a worker: a slot of its own, or with other suspects the only slot in use at a worker.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use crate::fleet::Slot;

/// The slot that a request holds while it is sent.
pub(super) enum Seat {
    Own(Slot),
    /// A worker apart from all others, together with other suspects.
    Apart(Arc<Apart>),
}

/// A worker that has only suspects. It is free for others when the last of them is back.
pub(super) struct Apart {
    slot: Slot,
    count: u32,
    joined: AtomicBool,
}

impl Apart {
    pub(super) fn new(slot: Slot, count: u32) -> Self {
        Self { slot, count, joined: AtomicBool::new(false) }
    }

    /// Allows other requests to the worker.
    pub(super) fn let_others_join(&self) {
        if !self.joined.swap(true, Ordering::AcqRel) {
            self.slot.let_others_join();
        }
    }
}

impl Seat {
    pub(super) fn slot(&self) -> &Slot {
        match self {
            Self::Own(slot) => slot,
            Self::Apart(apart) => &apart.slot,
        }
    }

    /// The number of suspects at the worker apart from others; 0: it is among others.
    pub(super) fn apart(&self) -> u32 {
        match self {
            Self::Apart(apart) if !apart.joined.load(Ordering::Acquire) => apart.count,
            Self::Own(_) | Self::Apart(_) => 0,
        }
    }
}
