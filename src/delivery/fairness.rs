//! Decides whose delivery is sent next: sends rotate over owners, then over each owner's hosts, then over each host's
//! targets. Pure: time is an argument.
//!
//! **Shares.** An owner may have as many sends in flight as there are free places, so a single owner gets half of all
//! places, two get a third each, and so on. A host gets as many of the owner's places as it leaves to the owner's other
//! hosts. Receivers that have not accepted a delivery lately may be slow or hang: together they get a quarter of what
//! is free for an owner, a fifth of all places if there is no other owner. So an owner whose receivers all hang, on
//! however many hosts and paths, delays neither other owners nor its own receivers that answer. A target that fails
//! repeatedly is only probed.
//!
//! **Line.** A delivery is claimed before it is sent, and a claim is a transaction. So that sends don't wait for the
//! database, some deliveries are claimed in advance and wait in line for a free place. Their number follows recent
//! throughput: what is sent within a moment. For a target that answers slowly, fails or is new, only what can be sent
//! at once is claimed.
//!
//! The life of a delivery here: [`shares`](Fairness::shares) (to be claimed), [`claimed`](Fairness::claimed) (in line)
//! or [`give_back`](Fairness::give_back), [`next`](Fairness::next) (in flight) or [`unsent`](Fairness::unsent), then
//! [`succeeded`](Fairness::succeeded) or [`failed`](Fairness::failed).

mod owner;
mod plan;
mod target;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use self::{owner::Owner, plan::Plan, target::Target};
use super::pace::Pace;

/// The most sends in flight to one target of one owner.
pub const PER_TARGET: usize = 4;
/// The default of the most sends in flight in all.
pub const IN_FLIGHT: usize = 256;
/// The most deliveries in line: those of about 30 ms at full speed, which is the time of a commit. Also limited to
/// twice what was delivered in the last moment ([`super::pace`]), or a few hundred.
pub const AHEAD: usize = 1_024;
/// The longest time that a claimed delivery waits in line; then it is released. Its lease is 30 s longer than its
/// attempt's timeout, which must cover this wait and recording the result.
pub const MAX_WAIT: Duration = Duration::from_secs(5);
/// Failures in a row after which a target is only probed.
pub const FAILURES_BEFORE_PROBING: u32 = 5;
/// The first and the longest wait between two probes.
pub const PROBE_WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// A target that has accepted a delivery within this time, and has not failed since, is likely to accept the next.
pub const LATELY: Duration = Duration::from_secs(30);

/// A target with deliveries that are due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// The owner.
    pub owner: String,
    /// The target's key.
    pub target: String,
    /// The target's host and port, which several targets may share.
    pub host: String,
    /// The number of due deliveries, or an upper bound.
    pub count: usize,
    /// Whether some of them may wait in line.
    pub ahead: bool,
}

/// How many of a target's deliveries to claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// The owner.
    pub owner: String,
    /// The target's key.
    pub target: String,
    /// The number of deliveries to claim, at least one.
    pub count: usize,
    /// The number of them that can be sent at the target's next turn. Only these may be a delivery's last attempt,
    /// because a crash uses up the attempts of those in line.
    pub at_once: usize,
}

/// The counts of an owner or of one of its hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Sends in flight; in a plan also those planned.
    sends: usize,
    /// The sends in flight to targets that have not answered lately.
    unsure: usize,
    /// Deliveries being claimed or in line.
    ahead: usize,
}

/// Whether there is room for one more send, if `taken` of `limit` are in flight in all.
fn has_room(limit: usize, taken: usize, owner: Counts, host: Counts, is_sure: bool) -> bool {
    let free = limit.saturating_sub(taken);
    if host.sends >= free.saturating_sub(owner.sends) {
        return false;
    }
    is_sure || host.unsure < (free / 4).max(1).saturating_sub(owner.unsure)
}

/// The state of all owners and targets that are not idle, with the deliveries that are claimed and not yet sent.
pub struct Fairness<T> {
    per_target: usize,
    in_flight_limit: usize,
    owners: HashMap<Arc<str>, Owner<T>>,
    /// Owners with something in line, in the order of their turns.
    turns: VecDeque<Arc<str>>,
    in_flight: usize,
    /// Deliveries being claimed or in line.
    ahead: usize,
    pace: Pace,
    /// Deliveries that are not to be sent now.
    unsent: Vec<T>,
    /// Counts claims: the owner that was served longest ago is next.
    clock: u64,
}

impl<T> Default for Fairness<T> {
    fn default() -> Self {
        Self::new(PER_TARGET, IN_FLIGHT)
    }
}

impl<T> Fairness<T> {
    /// Starts with these limits on sends in flight.
    #[must_use]
    pub fn new(per_target: usize, in_flight_limit: usize) -> Self {
        Self {
            per_target: per_target.max(1),
            in_flight_limit: in_flight_limit.max(1),
            owners: HashMap::new(),
            turns: VecDeque::new(),
            in_flight: 0,
            ahead: 0,
            pace: Pace::default(),
            unsent: Vec::new(),
            clock: 0,
        }
    }

    /// The number of sends that may be started now.
    #[must_use]
    pub fn free(&self) -> usize {
        self.in_flight_limit - self.in_flight
    }

    /// Deliveries being claimed or claimed, and not in flight yet.
    #[must_use]
    pub fn ahead(&self) -> usize {
        self.ahead
    }

    /// Whether it is time to claim: a place is free and nothing is in line for it, or half of the line is empty.
    /// Claiming later would leave places free, claiming sooner would mean many small claims.
    #[must_use]
    pub fn is_low(&self, now: Instant) -> bool {
        self.free() > self.ahead || self.ahead <= self.line_limit(now) / 2
    }

    /// Divides what may be claimed now among the targets, one each in turn.
    pub fn shares(&mut self, due: &[Due], now: Instant) -> Vec<Share> {
        let plan = Plan {
            per_target: self.per_target,
            limit: self.in_flight_limit,
            taken: self.in_flight + self.ahead,
            ahead: self.ahead,
            line: self.line_limit(now),
        };
        let shares = plan.divide(due, &self.owners, now);
        for (due, share) in &shares {
            self.ask(due, share.count, now);
        }
        shares.into_iter().map(|(_, share)| share).collect()
    }

    /// Adds a claimed delivery to the line.
    pub fn claimed(&mut self, owner: &str, target: &str, one: T, now: Instant) {
        let Some(of) = self.owners.get_mut(owner) else {
            self.unsent.push(one);
            return;
        };
        let Some(state) = of.targets.get_mut(target).filter(|state| state.asked > 0) else {
            // It was not asked for.
            self.unsent.push(one);
            return;
        };
        state.asked -= 1;
        state.line.push_back((one, now));
        self.give_turn(owner, target);
    }

    /// Returns places for deliveries that could not be claimed.
    pub fn give_back(&mut self, owner: &str, target: &str, count: usize) {
        if let Some(of) = self.owners.get_mut(owner)
            && let Some(state) = of.targets.get_mut(target)
        {
            let count = count.min(state.asked);
            state.asked -= count;
            let host = state.host.clone();
            of.left_line(&host, count);
            self.ahead -= count;
        }
    }

    /// The next delivery to send, which from now on counts as in flight. `None`: all places are taken, or nothing in
    /// line may be sent.
    pub fn next(&mut self, now: Instant) -> Option<T> {
        for _ in 0..self.turns.len() {
            if self.in_flight >= self.in_flight_limit {
                return None;
            }
            let key = self.turns.pop_front()?;
            let Some(owner) = self.owners.get_mut(&key) else { continue };
            let before = self.unsent.len();
            let next = owner.next(self.in_flight, self.in_flight_limit, self.per_target, now, &mut self.unsent);
            self.ahead -= self.unsent.len() - before + usize::from(next.is_some());
            owner.has_turn = !owner.turns.is_empty();
            if owner.has_turn {
                self.turns.push_back(key);
            }
            if next.is_some() {
                self.in_flight += 1;
                return next;
            }
        }
        None
    }

    /// Takes deliveries that are not to be sent now and must be released: they have waited in line too long, or their
    /// target is held.
    pub fn unsent(&mut self, now: Instant) -> Vec<T> {
        self.leave_line(|state, since| state.is_held(now) || now.saturating_duration_since(since) > MAX_WAIT)
    }

    /// Takes everything in line, to be released.
    pub fn drain(&mut self) -> Vec<T> {
        self.leave_line(|_, _| true)
    }

    /// Records a successful send.
    pub fn succeeded(&mut self, owner: &str, target: &str, now: Instant) {
        self.finish(owner, target);
        self.pace.count(now);
        if let Some(state) = self.target_mut(owner, target) {
            state.succeeded(now);
        }
    }

    /// Records a failed send. If the receiver asked for a pause, the whole target is held.
    pub fn failed(&mut self, owner: &str, target: &str, retry_after: Option<Duration>, now: Instant) {
        self.finish(owner, target);
        if let Some(state) = self.target_mut(owner, target) {
            state.failed(retry_after, now);
        }
    }

    /// Until when this target is held. `None` if it is not held.
    #[must_use]
    pub fn held_until(&self, owner: &str, target: &str, now: Instant) -> Option<Instant> {
        self.owners.get(owner)?.targets.get(target)?.not_before.filter(|at| *at > now)
    }

    /// The number of targets that are held or only probed.
    #[must_use]
    pub fn held(&self, now: Instant) -> usize {
        let targets = self.owners.values().flat_map(|owner| owner.targets.values());
        targets.filter(|state| state.is_probed() || state.is_held(now)).count()
    }

    /// Forgets idle targets, so that memory does not grow with the number of targets ever seen. A target that only ever
    /// failed is forgotten an hour after its last send.
    pub fn forget_idle(&mut self, now: Instant) {
        self.owners.retain(|_, owner| {
            owner.forget_idle(now);
            !owner.is_at_rest()
        });
    }

    /// The most deliveries that may wait in line. Zero while all places are taken and no send ends.
    fn line_limit(&self, now: Instant) -> usize {
        let recent = self.pace.recent(now);
        let least = (self.in_flight_limit * 4).min(AHEAD / 4);
        if recent == 0 && self.free() == 0 { 0 } else { (recent * 2).max(least).min(AHEAD) }
    }

    fn ask(&mut self, due: &Due, count: usize, now: Instant) {
        if !self.owners.contains_key(&*due.owner) {
            self.owners.insert(due.owner.as_str().into(), Owner::default());
        }
        let Some(owner) = self.owners.get_mut(&*due.owner) else { return };
        self.clock += 1;
        owner.ask(due, count, self.clock, now);
        self.ahead += count;
    }

    fn target_mut(&mut self, owner: &str, target: &str) -> Option<&mut Target<T>> {
        self.owners.get_mut(owner)?.targets.get_mut(target)
    }

    /// Gives the target a turn if it has something in line.
    fn give_turn(&mut self, owner: &str, target: &str) {
        let Some((key, _)) = self.owners.get_key_value(owner) else { return };
        let key = key.clone();
        let Some(owner) = self.owners.get_mut(owner) else { return };
        if owner.give_turn(target) && !std::mem::replace(&mut owner.has_turn, true) {
            self.turns.push_back(key);
        }
    }

    fn leave_line(&mut self, leaves: impl Fn(&Target<T>, Instant) -> bool) -> Vec<T> {
        let mut left = std::mem::take(&mut self.unsent);
        let before = left.len();
        for owner in self.owners.values_mut() {
            owner.leave_line(&leaves, &mut left);
        }
        self.ahead -= left.len() - before;
        left
    }

    fn finish(&mut self, owner: &str, target: &str) {
        if self.owners.get_mut(owner).is_some_and(|owner| owner.finish(target)) {
            self.in_flight -= 1;
            self.give_turn(owner, target);
        }
    }
}

#[cfg(test)]
mod tests;
