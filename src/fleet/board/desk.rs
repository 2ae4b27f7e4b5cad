//! The board's knowledge of one worker.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::{
    super::names,
    want::{Ticket, Want},
};

/// The board's knowledge of a worker.
#[derive(Clone, Debug, Default)]
pub(super) struct Desk {
    /// The models as listed, including patterns.
    pub(super) models: BTreeSet<Arc<str>>,
    /// The listed patterns.
    pub(super) patterns: Vec<Arc<str>>,
    /// Whether it is healthy and not draining, so that it is worth waiting for.
    pub(super) serving: bool,
    /// Whether it is serving and not held.
    pub(super) open: bool,
    pub(super) limit: u32,
    pub(super) in_flight: u32,
    /// Those of them that are of no batch.
    pub(super) live: u32,
    /// Whether the limit was reached since the last call of [`Board::was_full`].
    pub(super) was_full: bool,
    /// Whether its request in flight must be alone.
    pub(super) alone: bool,
    /// Set while it is on trial: it gets a few requests that find out whether it answers again.
    pub(super) trial: Option<Trial>,
    /// The models that are held there, each with its trial; none are allowed while it is closed.
    pub(super) held: BTreeMap<Arc<str>, Trial>,
    /// The ticket that gets it as soon as nothing is in flight there.
    pub(super) reserved: Option<Ticket>,
}

/// The requests of a worker or model on trial: how many are allowed in all, and how many it was given.
#[derive(Clone, Copy, Debug)]
pub(super) struct Trial {
    pub(super) allowed: u32,
    pub(super) given: u32,
}

impl Desk {
    /// Whether it lists the model or a matching pattern.
    pub(super) fn lists(&self, model: &str) -> bool {
        self.models.contains(model) || self.patterns.iter().any(|pattern| names::stands_for(pattern, model))
    }

    /// Whether it or one of its models gets requests on trial.
    pub(super) fn tries_something(&self) -> bool {
        self.trial.is_some() || self.held.values().any(|trial| trial.given < trial.allowed)
    }

    /// Adds a request in flight.
    pub(super) fn give(&mut self, want: &Want) {
        self.in_flight += 1;
        self.live += u32::from(!want.rank.batch);
        if let Some(trial) = self.held.get_mut(&want.model) {
            trial.given += 1;
        }
        match &mut self.trial {
            // On trial the allowance counts, not the limit.
            Some(trial) => trial.given += 1,
            None => self.was_full |= self.in_flight >= self.limit,
        }
        if want.alone {
            self.alone = true;
            self.reserved = None;
        }
    }

    pub(super) fn free(&self) -> bool {
        self.trial.is_none() && self.has_place() && !self.alone && self.reserved.is_none()
    }

    /// On trial, earlier requests may hang and must not block.
    pub(super) fn has_place(&self) -> bool {
        self.open
            && match self.trial {
                None => self.in_flight < self.limit,
                Some(trial) => trial.given < trial.allowed && self.in_flight < self.limit.saturating_add(trial.allowed),
            }
    }

    /// Whether nothing is in flight there and it is not reserved for another ticket.
    pub(super) fn idle(&self, ticket: Option<Ticket>) -> bool {
        self.has_place()
            && self.in_flight == 0
            && self.limit > 0
            && self.reserved.is_none_or(|other| Some(other) == ticket)
    }
}
