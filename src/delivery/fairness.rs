//! Decides which deliveries are claimed and sent next: places go round the owners, then round each owner's hosts, then
//! round each host's targets. Pure: time is an argument.
//!
//! An owner may have as many sends in flight as there are free places, so a single owner gets half of all places, two get
//! a third each, and so on. A host gets as many of the owner's places as it leaves to the owner's other hosts. Receivers
//! that have not accepted a delivery lately may be slow or hang: together they get a quarter of what is free for an
//! owner, a fifth of all places if there is no other owner. So an owner whose receivers all hang, on however many hosts
//! and paths, delays neither other owners nor its own receivers that answer. A target that fails repeatedly is only
//! probed.
//!
//! A delivery takes its place when it is claimed, and gives it back with [`succeeded`](Fairness::succeeded),
//! [`failed`](Fairness::failed), or [`give_back`](Fairness::give_back) if nothing was sent.

mod target;

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use self::target::Target;
use crate::{domain::Owner, store::ClaimShare};

/// The most sends in flight to one target of one owner.
pub const PER_TARGET: usize = 4;
/// The default of the most sends in flight in all.
pub const IN_FLIGHT: usize = 256;
/// Failures in a row after which a target is only probed.
pub const FAILURES_BEFORE_PROBING: u32 = 5;
/// The first and the longest wait between two probes.
pub const PROBE_WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// A target that has accepted a delivery within this time, and has not failed since, is likely to accept the next.
pub const LATELY: Duration = Duration::from_secs(30);

/// A target with deliveries that are due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    pub owner: Owner,
    /// The target's key.
    pub target: String,
    /// The target's host and port, which several targets may share.
    pub host: String,
}

/// The sends in flight of an owner or of one of its hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    sends: usize,
    /// The sends to targets that have not answered lately.
    unsure: usize,
}

impl Counts {
    fn begin(&mut self, is_sure: bool) {
        self.sends += 1;
        self.unsure += usize::from(!is_sure);
    }

    fn end(&mut self, was_sure: bool) {
        self.sends -= 1;
        self.unsure -= usize::from(!was_sure);
    }
}

#[derive(Default)]
struct OfOwner {
    counts: Counts,
    /// When it was last given a place, on [`Fairness`]'s clock.
    served_at: u64,
    hosts: HashMap<String, Host>,
    targets: HashMap<String, Target>,
}

#[derive(Default)]
struct Host {
    counts: Counts,
    served_at: u64,
}

/// The state of all owners and targets that are not idle.
pub struct Fairness {
    per_target: usize,
    limit: usize,
    in_flight: usize,
    owners: HashMap<Owner, OfOwner>,
    /// Counts the places given. The owner, host or target that was served longest ago is next.
    clock: u64,
}

impl Default for Fairness {
    fn default() -> Self {
        Self::new(PER_TARGET, IN_FLIGHT)
    }
}

impl Fairness {
    /// Starts with these limits on sends in flight: to one target, and in all.
    #[must_use]
    pub fn new(per_target: usize, limit: usize) -> Self {
        Self { per_target: per_target.max(1), limit: limit.max(1), in_flight: 0, owners: HashMap::new(), clock: 0 }
    }

    /// The number of free places.
    #[must_use]
    pub fn free(&self) -> usize {
        self.limit - self.in_flight
    }

    /// Gives the free places to these targets, one each in turn. They are taken from now on.
    pub fn shares(&mut self, due: &[Due], now: Instant) -> Vec<ClaimShare> {
        if self.free() == 0 || due.is_empty() {
            return Vec::new();
        }
        let mut given: BTreeMap<(&Owner, &str), usize> = BTreeMap::new();
        let mut owners = self.in_order(due);
        while self.in_flight < self.limit
            && let Some(mut hosts) = owners.pop_front()
        {
            // Whatever has no room now has none later either: places are only taken here.
            if let Some(one) = self.give(&mut hosts, now) {
                *given.entry((&one.owner, &one.target)).or_default() += 1;
                owners.push_back(hosts);
            }
        }
        given.into_iter().map(|((owner, target), count)| ClaimShare::new(owner.clone(), target, count)).collect()
    }

    /// The due targets by owner and host; those that were served longest ago come first.
    fn in_order<'a>(&self, due: &'a [Due]) -> VecDeque<VecDeque<VecDeque<&'a Due>>> {
        let mut owners: BTreeMap<&Owner, BTreeMap<&str, Vec<&Due>>> = BTreeMap::new();
        for one in due {
            owners.entry(&one.owner).or_default().entry(&one.host).or_default().push(one);
        }
        // The sorts are stable: those that were never served stay in the order of their names.
        let mut owners: Vec<_> = owners.into_iter().collect();
        owners.sort_by_key(|(owner, _)| self.owners.get(*owner).map_or(0, |of| of.served_at));
        let of_owner = |(owner, hosts): (&Owner, BTreeMap<&str, Vec<&'a Due>>)| {
            let known = self.owners.get(owner);
            let mut hosts: Vec<_> = hosts.into_iter().collect();
            hosts.sort_by_key(|(host, _)| known.and_then(|of| of.hosts.get(*host)).map_or(0, |host| host.served_at));
            let of_host = |(_, mut targets): (&str, Vec<&'a Due>)| {
                targets.sort_by(|a, b| a.target.cmp(&b.target));
                targets.sort_by_key(|due| {
                    known.and_then(|of| of.targets.get(&due.target)).map_or(0, |target| target.served_at)
                });
                VecDeque::from(targets)
            };
            hosts.into_iter().map(of_host).collect()
        };
        owners.into_iter().map(of_owner).collect()
    }

    /// Gives one place to the next of an owner's targets that may have one.
    fn give<'a>(&mut self, hosts: &mut VecDeque<VecDeque<&'a Due>>, now: Instant) -> Option<&'a Due> {
        while let Some(mut targets) = hosts.pop_front() {
            while let Some(next) = targets.pop_front() {
                if self.take(next, now) {
                    targets.push_back(next);
                    hosts.push_back(targets);
                    return Some(next);
                }
            }
        }
        None
    }

    /// Takes a place for a target, if all limits allow one more.
    fn take(&mut self, due: &Due, now: Instant) -> bool {
        let free = self.limit - self.in_flight;
        let of = self.owners.entry(due.owner.clone()).or_default();
        let target = of.targets.entry(due.target.clone()).or_insert_with(|| Target::new(due.host.clone()));
        let host = of.hosts.entry(target.host.clone()).or_default();
        let is_sure = target.is_sure(now);
        let has_room = target.has_room(self.per_target, now)
            && host.counts.sends < free.saturating_sub(of.counts.sends)
            && (is_sure || host.counts.unsure < (free / 4).max(1).saturating_sub(of.counts.unsure));
        if has_room {
            self.clock += 1;
            (of.served_at, host.served_at, target.served_at) = (self.clock, self.clock, self.clock);
            target.begin(is_sure, now);
            host.counts.begin(is_sure);
            of.counts.begin(is_sure);
            self.in_flight += 1;
        }
        has_room
    }

    /// Gives back places for which there was nothing to send.
    pub fn give_back(&mut self, owner: &Owner, target: &str, count: usize) {
        for _ in 0..count {
            let _ = self.end(owner, target);
        }
    }

    /// Records a successful send.
    pub fn succeeded(&mut self, owner: &Owner, target: &str, now: Instant) {
        if let Some(target) = self.end(owner, target) {
            target.succeeded(now);
        }
    }

    /// Records a failed send. If the receiver asked for a pause, the whole target is held.
    pub fn failed(&mut self, owner: &Owner, target: &str, retry_after: Option<Duration>, now: Instant) {
        if let Some(target) = self.end(owner, target) {
            target.failed(retry_after, now);
        }
    }

    /// Until when this target is held. `None` if it is not held.
    #[must_use]
    pub fn held_until(&self, owner: &Owner, target: &str, now: Instant) -> Option<Instant> {
        self.owners.get(owner)?.targets.get(target)?.not_before.filter(|at| *at > now)
    }

    /// The number of targets that are held or only probed.
    #[must_use]
    pub fn held(&self, now: Instant) -> usize {
        let targets = self.owners.values().flat_map(|owner| owner.targets.values());
        targets.filter(|target| target.is_probed() || target.is_held(now)).count()
    }

    /// Forgets idle targets, so that memory does not grow with the number of targets ever seen. A target that only ever
    /// failed is forgotten an hour after its last send.
    pub fn forget_idle(&mut self, now: Instant) {
        self.owners.retain(|_, of| {
            of.targets.retain(|_, target| !target.is_at_rest(now));
            let used: HashSet<&str> = of.targets.values().map(|target| target.host.as_str()).collect();
            of.hosts.retain(|host, _| used.contains(host.as_str()));
            !of.targets.is_empty()
        });
    }

    fn end(&mut self, owner: &Owner, target: &str) -> Option<&mut Target> {
        let OfOwner { counts, hosts, targets, .. } = self.owners.get_mut(owner)?;
        let target = targets.get_mut(target)?;
        if let Some(was_sure) = target.end() {
            counts.end(was_sure);
            if let Some(host) = hosts.get_mut(&target.host) {
                host.counts.end(was_sure);
            }
            self.in_flight -= 1;
        }
        Some(target)
    }
}

#[cfg(test)]
mod tests;
