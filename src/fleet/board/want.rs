//! Requests for slots, and their order.

use std::{cmp::Reverse, hash::BuildHasher, sync::Arc};

use smallvec::SmallVec;

use crate::domain::{Priority, Timestamp, Weight};

/// Identifies a worker on this node, for as long as this process knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerKey(pub u32);

/// The owner of work: a hash of the owner's name, because the board does not need the name, and its weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tenant {
    pub(super) name: u64,
    pub(super) weight: Weight,
}

impl Tenant {
    /// The tenant of that name, with weight 1.
    #[must_use]
    pub fn named(owner: &str) -> Self {
        Self { name: foldhash::quality::FixedState::default().hash_one(owner), weight: Weight::default() }
    }

    /// The same tenant with another weight. On one board, a name has the same weight everywhere.
    #[must_use]
    pub fn weighing(self, weight: Weight) -> Self {
        Self { weight, ..self }
    }

    #[must_use]
    pub fn weight(self) -> Weight {
        self.weight
    }
}

/// The order of requests: interactive calls, then higher priority, then the earlier deadline. Between tenants see
/// [`Board`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    pub(super) batch: bool,
    pub(super) priority: Reverse<Priority>,
    expires_at: Timestamp,
    pub(super) tenant: Tenant,
}

impl Rank {
    /// The rank of interactive calls, ahead of all batches.
    #[must_use]
    pub fn interactive() -> Self {
        Self {
            batch: false,
            priority: Reverse(Priority::default()),
            expires_at: Timestamp(0),
            tenant: Tenant::default(),
        }
    }

    /// The rank of a batch's requests.
    #[must_use]
    pub fn batch(priority: Priority, expires_at: Timestamp) -> Self {
        Self { batch: true, priority: Reverse(priority), expires_at, tenant: Tenant::default() }
    }

    /// The same rank for a tenant.
    #[must_use]
    pub fn of(self, tenant: Tenant) -> Self {
        Self { tenant, ..self }
    }

    #[must_use]
    pub fn tenant(self) -> Tenant {
        self.tenant
    }

    /// Whether it goes before the other, whatever the tenants.
    #[must_use]
    pub fn is_before_any(self, other: Self) -> bool {
        (self.batch, self.priority) < (other.batch, other.priority)
    }
}

/// What a request needs of a slot.
#[derive(Clone, Debug)]
pub struct Want {
    /// The model that the worker must serve.
    pub model: Arc<str>,
    /// Its place in the order of requests.
    pub rank: Rank,
    /// Workers that have failed this request. Used only if no other worker serves the model.
    pub avoid: SmallVec<[WorkerKey; 4]>,
    /// Whether the worker must have nothing else in flight meanwhile.
    pub alone: bool,
}

/// What a slot in use counts towards: a tenant's share of a model, counted separately for interactive calls and
/// batches.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    pub(super) batch: bool,
    pub(super) tenant: Tenant,
    pub(super) model: Arc<str>,
}

impl Want {
    /// The holder of the slot that it gets.
    #[must_use]
    pub fn holder(&self) -> Holder {
        Holder { batch: self.rank.batch, tenant: self.rank.tenant, model: self.model.clone() }
    }
}

/// Identifies a waiting [`Want`].
pub type Ticket = (Rank, u64);

impl Holder {
    /// The model that the slot is for.
    #[must_use]
    pub fn model(&self) -> &Arc<str> {
        &self.model
    }
}
