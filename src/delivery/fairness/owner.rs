//! An owner's targets and hosts, and their turns.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Instant,
};

use super::{Counts, Due, MAX_WAIT, has_room, target::Target};

pub(super) struct Owner<T> {
    pub(super) counts: Counts,
    /// When deliveries were last claimed for it, on [`Fairness`](super::Fairness)'s clock.
    pub(super) asked_at: u64,
    pub(super) targets: HashMap<Arc<str>, Target<T>>,
    pub(super) hosts: HashMap<Arc<str>, Host>,
    /// Hosts with something in line, in the order of their turns.
    pub(super) turns: VecDeque<Arc<str>>,
    /// Whether it is in the turns of all owners.
    pub(super) has_turn: bool,
}

impl<T> Default for Owner<T> {
    fn default() -> Self {
        Self {
            counts: Counts::default(),
            asked_at: 0,
            targets: HashMap::new(),
            hosts: HashMap::new(),
            turns: VecDeque::new(),
            has_turn: false,
        }
    }
}

#[derive(Default)]
pub(super) struct Host {
    pub(super) counts: Counts,
    pub(super) asked_at: u64,
    /// Targets with something in line, in the order of their turns.
    turns: VecDeque<Arc<str>>,
    has_turn: bool,
}

impl<T> Owner<T> {
    pub(super) fn ask(&mut self, due: &Due, count: usize, clock: u64, now: Instant) {
        if !self.targets.contains_key(&*due.target) {
            self.targets.insert(due.target.as_str().into(), Target::new(due.host.as_str().into()));
        }
        let Some(target) = self.targets.get_mut(&*due.target) else { return };
        target.asked += count;
        target.asked_at = clock;
        target.last_used = Some(now);
        let host = self.hosts.entry(target.host.clone()).or_default();
        host.counts.ahead += count;
        host.asked_at = clock;
        self.counts.ahead += count;
        self.asked_at = clock;
    }

    /// Gives a target a turn if it has something in line. Returns whether the owner has anything in line then.
    pub(super) fn give_turn(&mut self, target: &str) -> bool {
        if let Some((key, state)) = self.targets.get_key_value(target)
            && !state.line.is_empty()
        {
            let (key, host_key) = (key.clone(), state.host.clone());
            let host = self.hosts.entry(host_key.clone()).or_default();
            if let Some(state) = self.targets.get_mut(target)
                && !std::mem::replace(&mut state.has_turn, true)
            {
                host.turns.push_back(key);
            }
            if !std::mem::replace(&mut host.has_turn, true) {
                self.turns.push_back(host_key);
            }
        }
        !self.turns.is_empty()
    }

    /// The next delivery to send, which from now on counts as in flight; `taken` are in flight in all. Deliveries that
    /// have waited too long go to `unsent`.
    pub(super) fn next(
        &mut self,
        in_flight: usize,
        limit: usize,
        per_target: usize,
        now: Instant,
        unsent: &mut Vec<T>,
    ) -> Option<T> {
        for _ in 0..self.turns.len() {
            // Then none of its hosts has room.
            if self.counts.sends >= limit.saturating_sub(in_flight) {
                return None;
            }
            let host_key = self.turns.pop_front()?;
            let Some(host) = self.hosts.get_mut(&host_key) else { continue };
            let mut next = None;
            for _ in 0..host.turns.len() {
                let Some(key) = host.turns.pop_front() else { break };
                let Some(target) = self.targets.get_mut(&key) else { continue };
                let is_sure = target.is_sure(now);
                if target.may_send(per_target, now) && has_room(limit, in_flight, self.counts, host.counts, is_sure) {
                    while let Some((one, since)) = target.line.pop_front() {
                        host.counts.ahead -= 1;
                        self.counts.ahead -= 1;
                        if now.saturating_duration_since(since) <= MAX_WAIT {
                            next = Some(one);
                            break;
                        }
                        unsent.push(one);
                    }
                    if next.is_some() {
                        target.sent(is_sure, now);
                        for counts in [&mut host.counts, &mut self.counts] {
                            counts.sends += 1;
                            counts.unsure += usize::from(!is_sure);
                        }
                    }
                }
                // Otherwise the end of a send gives it another turn; deliveries of a held target do not stay in line.
                target.has_turn = target.may_send(per_target, now) && !target.line.is_empty();
                if target.has_turn {
                    host.turns.push_back(key);
                }
                if next.is_some() {
                    break;
                }
            }
            host.has_turn = !host.turns.is_empty();
            if host.has_turn {
                self.turns.push_back(host_key);
            }
            if next.is_some() {
                return next;
            }
        }
        None
    }

    /// Records the end of a send. Returns false if none was in flight.
    pub(super) fn finish(&mut self, target: &str) -> bool {
        let Some(state) = self.targets.get_mut(target) else { return false };
        let Some(was_sure) = state.finished() else { return false };
        let host = self.hosts.get_mut(&state.host);
        for counts in host.map(|host| &mut host.counts).into_iter().chain([&mut self.counts]) {
            counts.sends -= 1;
            counts.unsure -= usize::from(!was_sure);
        }
        true
    }

    pub(super) fn left_line(&mut self, host: &str, count: usize) {
        self.counts.ahead -= count;
        if let Some(host) = self.hosts.get_mut(host) {
            host.counts.ahead -= count;
        }
    }

    pub(super) fn leave_line(&mut self, leaves: &impl Fn(&Target<T>, Instant) -> bool, left: &mut Vec<T>) {
        for state in self.targets.values_mut() {
            let mut count = 0;
            // The one that has waited longest is in front.
            while let Some(since) = state.line.front().map(|(_, since)| *since)
                && leaves(state, since)
                && let Some((one, _)) = state.line.pop_front()
            {
                left.push(one);
                count += 1;
            }
            self.counts.ahead -= count;
            if let Some(host) = self.hosts.get_mut(&state.host) {
                host.counts.ahead -= count;
            }
        }
    }

    pub(super) fn forget_idle(&mut self, now: Instant) {
        self.targets.retain(|_, target| !target.is_at_rest(now));
        let used: HashSet<&str> = self.targets.values().map(|target| &*target.host).collect();
        self.hosts.retain(|key, _| used.contains(&**key));
    }

    pub(super) fn is_at_rest(&self) -> bool {
        self.targets.is_empty()
    }
}
