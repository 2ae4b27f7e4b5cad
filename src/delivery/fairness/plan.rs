//! A round of claims: divides what is due among owners, their hosts and their targets.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use super::{
    Counts, Due, Share, has_room,
    owner::{Host, Owner},
    target::Target,
};

/// The limits of a round, and what is taken.
pub(super) struct Plan {
    /// The most sends to one target, and in all.
    pub(super) per_target: usize,
    pub(super) limit: usize,
    /// Sends in flight, and planned.
    pub(super) taken: usize,
    /// The part of them that is being claimed or in line.
    pub(super) ahead: usize,
    /// The most deliveries in line.
    pub(super) line: usize,
}

impl Plan {
    /// First everyone's deliveries that can be sent at once, then those for the line.
    pub(super) fn divide<'a, T>(
        mut self,
        due: &'a [Due],
        known: &HashMap<Arc<str>, Owner<T>>,
        now: Instant,
    ) -> Vec<(&'a Due, Share)> {
        let in_flight = self.taken - self.ahead;
        let mut room = (self.limit.saturating_sub(in_flight) + self.line).saturating_sub(self.ahead);
        if room == 0 {
            return Vec::new();
        }
        let mut order = self.in_order(due, known, now);
        for at_once in [true, false] {
            order.iter_mut().for_each(OwnerDue::rewind);
            let mut turns: VecDeque<usize> = (0..order.len()).collect();
            while room > 0
                && let Some(at) = turns.pop_front()
            {
                let gave = if at_once { order[at].give_at_once(&self) } else { order[at].give_line(&self) };
                if gave {
                    room -= 1;
                    self.taken += 1;
                    self.ahead += 1;
                    turns.push_back(at);
                }
            }
        }
        let targets = order.into_iter().flat_map(|owner| owner.hosts).flat_map(|host| host.targets);
        targets.filter_map(TargetDue::share).collect()
    }

    /// What is due, by owner and host, in the order of the last claim.
    fn in_order<'a, T>(&self, due: &'a [Due], known: &HashMap<Arc<str>, Owner<T>>, now: Instant) -> Vec<OwnerDue<'a>> {
        let mut owners: BTreeMap<&str, BTreeMap<&str, Vec<TargetDue<'a>>>> = BTreeMap::new();
        for due in due.iter().filter(|due| due.count > 0) {
            let state = known.get(&*due.owner).and_then(|owner| owner.targets.get(&*due.target));
            let target = TargetDue::new(due, state, self.per_target, self.line, now);
            if target.room > 0 {
                owners.entry(&due.owner).or_default().entry(&due.host).or_default().push(target);
            }
        }
        let mut order: Vec<_> = owners
            .into_iter()
            .map(|(name, hosts)| {
                let known = known.get(name);
                let mut hosts: Vec<_> = hosts
                    .into_iter()
                    .map(|(name, targets)| HostDue::new(known.and_then(|owner| owner.hosts.get(name)), targets))
                    .collect();
                // The sort is stable: those never claimed for stay in the order of their names.
                hosts.sort_by_key(|host| host.asked_at);
                OwnerDue::new(known, hosts)
            })
            .collect();
        order.sort_by_key(|owner| owner.asked_at);
        order
    }
}

/// A target in a round of claims.
struct TargetDue<'a> {
    due: &'a Due,
    asked_at: u64,
    is_sure: bool,
    /// How many more it may have at once, and in all.
    at_once_room: usize,
    room: usize,
    /// Deliveries given to it.
    at_once: usize,
    in_line: usize,
}

impl<'a> TargetDue<'a> {
    fn new<T>(due: &'a Due, state: Option<&Target<T>>, per_target: usize, line: usize, now: Instant) -> Self {
        let line = if due.ahead { line } else { 0 };
        let (at_once, in_all) = state.map_or((per_target, per_target), |state| state.room(per_target, line, now));
        Self {
            due,
            asked_at: state.map_or(0, |state| state.asked_at),
            is_sure: state.is_some_and(|state| state.is_sure(now)),
            at_once_room: at_once.min(due.count),
            room: in_all.min(due.count),
            at_once: 0,
            in_line: 0,
        }
    }

    fn share(self) -> Option<(&'a Due, Share)> {
        let (at_once, count) = (self.at_once, self.at_once + self.in_line);
        let Due { owner, target, .. } = self.due;
        (count > 0).then(|| (self.due, Share { owner: owner.clone(), target: target.clone(), count, at_once }))
    }
}

/// A host in a round of claims.
struct HostDue<'a> {
    asked_at: u64,
    counts: Counts,
    targets: Vec<TargetDue<'a>>,
    turns: VecDeque<usize>,
}

impl<'a> HostDue<'a> {
    fn new(known: Option<&Host>, mut targets: Vec<TargetDue<'a>>) -> Self {
        targets.sort_by(|a, b| (a.asked_at, &a.due.target).cmp(&(b.asked_at, &b.due.target)));
        let asked_at = known.map_or(0, |host| host.asked_at);
        Self { asked_at, counts: planned(known.map(|host| host.counts)), targets, turns: VecDeque::new() }
    }
}

/// An owner in a round of claims.
struct OwnerDue<'a> {
    asked_at: u64,
    counts: Counts,
    hosts: Vec<HostDue<'a>>,
    turns: VecDeque<usize>,
}

impl<'a> OwnerDue<'a> {
    fn new<T>(known: Option<&Owner<T>>, hosts: Vec<HostDue<'a>>) -> Self {
        let asked_at = known.map_or(0, |owner| owner.asked_at);
        Self { asked_at, counts: planned(known.map(|owner| owner.counts)), hosts, turns: VecDeque::new() }
    }

    fn rewind(&mut self) {
        self.turns = (0..self.hosts.len()).collect();
        self.hosts.iter_mut().for_each(|host| host.turns = (0..host.targets.len()).collect());
    }

    /// Gives one delivery that can be sent at once to the next target that may have it. Returns false if there is none.
    fn give_at_once(&mut self, plan: &Plan) -> bool {
        self.give(|owner, host, target| {
            let fits =
                target.at_once < target.at_once_room && has_room(plan.limit, plan.taken, owner, host, target.is_sure);
            target.at_once += usize::from(fits);
            fits.then(|| usize::from(!target.is_sure))
        })
    }

    /// Gives one delivery for the line. As with sends, nobody may take more than is left free.
    fn give_line(&mut self, plan: &Plan) -> bool {
        let free = plan.line.saturating_sub(plan.ahead);
        self.give(|owner, host, target| {
            let fits = target.at_once + target.in_line < target.room && owner.ahead < free * 3 && host.ahead < free * 2;
            target.in_line += usize::from(fits);
            fits.then_some(0)
        })
    }

    /// Tries the hosts in turn, and each host's targets in turn, until one takes a delivery, and returns how many
    /// unsure sends that makes. A target that can't take one now can't later in the round, because what is taken only
    /// grows.
    fn give(&mut self, mut give: impl FnMut(Counts, Counts, &mut TargetDue<'a>) -> Option<usize>) -> bool {
        while let Some(at) = self.turns.pop_front() {
            let host = &mut self.hosts[at];
            while let Some(next) = host.turns.pop_front() {
                let Some(unsure) = give(self.counts, host.counts, &mut host.targets[next]) else { continue };
                for counts in [&mut self.counts, &mut host.counts] {
                    counts.sends += 1;
                    counts.unsure += unsure;
                    counts.ahead += 1;
                }
                host.turns.push_back(next);
                self.turns.push_back(at);
                return true;
            }
        }
        false
    }
}

/// Counts everything ahead as in flight.
fn planned(known: Option<Counts>) -> Counts {
    let known = known.unwrap_or_default();
    Counts { sends: known.sends + known.ahead, ..known }
}
