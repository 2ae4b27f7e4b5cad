//! Whose delivery is sent next: sends go round the owners, then round each one's hosts, then round each host's targets. Pure:
//! time is an argument.
//!
//! **Shares.** Who takes many places leaves some to others, however many take many: an owner may have as many sends in flight
//! as are free, so one alone gets half of all places, of two each gets a third, and so on. Of that an owner's host gets as
//! much as it leaves to the owner's other hosts. Receivers that have not taken a delivery lately may be slow, or hang: an owner
//! gets a quarter of what is free for all of those together, a fifth of all places if it is alone. So whoever has only
//! receivers that hang, on however many hosts and paths, holds up neither others nor its own receivers that answer. A target
//! that fails again and again is only probed.
//!
//! **Line.** A delivery is claimed before it is sent, and a claim is a transaction. So that sends don't wait for the database,
//! some are claimed ahead and stand in line for a free send. How many follows what was delivered lately: as much as is gone in
//! a moment. A target that answers slowly, fails or is new has nothing in line but what can be sent at once.
//!
//! A delivery passes through here as: [`shares`](Fairness::shares) (to be claimed), [`claimed`](Fairness::claimed) (in line) or
//! [`give_back`](Fairness::give_back), [`next`](Fairness::next) (in flight) or [`unsent`](Fairness::unsent), then
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

/// Sends in flight to one target of one owner.
pub const PER_TARGET: usize = 4;
/// Sends in flight in all, where nobody sets another number.
pub const IN_FLIGHT: usize = 256;
/// Deliveries in line in all, at most: those of some 30 ms at full speed, which is what a commit may take. And never more than
/// twice what was delivered in the last moment ([`super::pace`]), or a few hundred.
pub const AHEAD: usize = 1_024;
/// The longest that a claimed delivery stands in line; then it is given back. Its lease is longer than its attempt's timeout
/// by 30 s, in which this and writing down what came of it must have room.
pub const MAX_WAIT: Duration = Duration::from_secs(5);
/// Failures in a row after which a target is only probed.
pub const FAILURES_BEFORE_PROBING: u32 = 5;
/// The first and the longest wait between two probes.
pub const PROBE_WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));
/// A target that has taken a delivery within this time, and has not failed since, is likely to take the next.
pub const LATELY: Duration = Duration::from_secs(30);

/// A target with deliveries that are due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
    /// Whose they are.
    pub owner: String,
    /// Its key.
    pub target: String,
    /// Its host and port: what targets share.
    pub host: String,
    /// How many are due, or more if that is not known.
    pub count: usize,
    /// Some of them may stand in line.
    pub ahead: bool,
}

/// How many of a target's deliveries to claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Whose they are.
    pub owner: String,
    /// Its key.
    pub target: String,
    /// At least one.
    pub count: usize,
    /// So many of them are sent as soon as the target has its turn. Only these may be the last attempt of a delivery: a crash
    /// would have used it up in line.
    pub at_once: usize,
}

/// What is taken of an owner or of one of its hosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Sends in flight; in a plan also what is ahead of them.
    sends: usize,
    /// Of the sends in flight, those to targets that have not answered lately.
    unsure: usize,
    /// Asked for or in line.
    ahead: usize,
}

/// Whether one more send may be, with so many of `limit` taken in all.
fn has_room(limit: usize, taken: usize, owner: Counts, host: Counts, is_sure: bool) -> bool {
    let free = limit.saturating_sub(taken);
    if host.sends >= free.saturating_sub(owner.sends) {
        return false;
    }
    is_sure || host.unsure < (free / 4).max(1).saturating_sub(owner.unsure)
}

/// The state of all owners and targets that are not at rest, with what is claimed of each and not yet sent.
pub struct Fairness<T> {
    per_target: usize,
    in_flight_limit: usize,
    owners: HashMap<Arc<str>, Owner<T>>,
    /// Owners with something in line, in the order of their turns.
    turns: VecDeque<Arc<str>>,
    in_flight: usize,
    /// Asked for or in line.
    ahead: usize,
    pace: Pace,
    /// Not to be sent any more.
    unsent: Vec<T>,
    /// Counts what was asked for: whoever was served longest ago is asked first.
    clock: u64,
}

impl<T> Default for Fairness<T> {
    fn default() -> Self {
        Self::new(PER_TARGET, IN_FLIGHT)
    }
}

impl<T> Fairness<T> {
    /// With these limits on sends in flight.
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

    /// Sends that may be started now, by whomever.
    #[must_use]
    pub fn free(&self) -> usize {
        self.in_flight_limit - self.in_flight
    }

    /// What is to be claimed or is claimed, and is not in flight yet.
    #[must_use]
    pub fn ahead(&self) -> usize {
        self.ahead
    }

    /// Whether it is time to claim: a send is free with nobody to take it, or half of the line is empty. Later would be too late,
    /// and sooner would be many small claims instead of a large one.
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

    /// One that was asked for is there, and stands in line.
    pub fn claimed(&mut self, owner: &str, target: &str, one: T, now: Instant) {
        let Some(of) = self.owners.get_mut(owner) else {
            self.unsent.push(one);
            return;
        };
        let Some(state) = of.targets.get_mut(target).filter(|state| state.asked > 0) else {
            // Nobody asked for it.
            self.unsent.push(one);
            return;
        };
        state.asked -= 1;
        state.line.push_back((one, now));
        self.give_turn(owner, target);
    }

    /// So many that were asked for are not there.
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

    /// The next to be sent, counted as in flight from now on. None: all sends are busy, or nothing in line may be sent.
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

    /// What is not to be sent now after all, to be given back: it has stood in line for too long, or its target is held back.
    pub fn unsent(&mut self, now: Instant) -> Vec<T> {
        self.leave_line(|state, since| state.is_held(now) || now.saturating_duration_since(since) > MAX_WAIT)
    }

    /// Everything in line, to be given back.
    pub fn drain(&mut self) -> Vec<T> {
        self.leave_line(|_, _| true)
    }

    /// A send has ended well.
    pub fn succeeded(&mut self, owner: &str, target: &str, now: Instant) {
        self.finish(owner, target);
        self.pace.count(now);
        if let Some(state) = self.target_mut(owner, target) {
            state.succeeded(now);
        }
    }

    /// A send has failed. The receiver may have asked for a pause: it holds back the whole target.
    pub fn failed(&mut self, owner: &str, target: &str, retry_after: Option<Duration>, now: Instant) {
        self.finish(owner, target);
        if let Some(state) = self.target_mut(owner, target) {
            state.failed(retry_after, now);
        }
    }

    /// When this target may be sent to again, if it is held back.
    #[must_use]
    pub fn held_until(&self, owner: &str, target: &str, now: Instant) -> Option<Instant> {
        self.owners.get(owner)?.targets.get(target)?.not_before.filter(|at| *at > now)
    }

    /// Targets that are held back or only probed.
    #[must_use]
    pub fn held(&self, now: Instant) -> usize {
        let targets = self.owners.values().flat_map(|owner| owner.targets.values());
        targets.filter(|state| state.is_probed() || state.is_held(now)).count()
    }

    /// Forgets targets at rest, so that memory does not grow with the number of targets ever seen. One that only ever
    /// failed is forgotten an hour after its last send.
    pub fn forget_idle(&mut self, now: Instant) {
        self.owners.retain(|_, owner| {
            owner.forget_idle(now);
            !owner.is_at_rest()
        });
    }

    /// How many may stand in line. None while all sends are busy and none ends.
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

    /// The target is among those that are sent to next, if it has something in line.
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
