//! Who is served next: sends go round the targets, no target and no host takes more than its share of those in flight, and
//! one that fails again and again is only probed. Pure: time is an argument.
//!
//! A delivery is claimed before it is sent, and a claim is a transaction. So that sends don't wait for the database, some are
//! claimed ahead and stand in line for a free send. How many follows what was delivered lately: as much as is gone in a
//! moment. A target that answers slowly, fails or is new has nothing in line but what can be sent at once.
//!
//! A delivery passes through here as: [`shares`](Fairness::shares) (to be claimed), [`claimed`](Fairness::claimed) (in line) or
//! [`give_back`](Fairness::give_back), [`next`](Fairness::next) (in flight) or [`unsent`](Fairness::unsent), then
//! [`succeeded`](Fairness::succeeded) or [`failed`](Fairness::failed).

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use super::pace::Pace;

/// Sends in flight to one target.
pub const PER_TARGET: usize = 4;
/// Sends in flight in all.
pub const IN_FLIGHT: usize = 64;
/// Deliveries in line in all, at most: those of some 30 ms at full speed, which is what a commit may take. And never more than
/// twice what was delivered in the last moment ([`super::pace`]).
pub const AHEAD: usize = 1_024;
/// The longest that a claimed delivery stands in line; then it is given back. Its lease is longer than its attempt's timeout
/// by 30 s, in which this and writing down what came of it must have room.
pub const MAX_WAIT: Duration = Duration::from_secs(5);
/// Failures in a row after which a target is only probed.
pub const FAILURES_BEFORE_PROBING: u32 = 5;
/// The first and the longest wait between two probes.
pub const PROBE_WAIT: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// A target with deliveries that are due.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Due {
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
    /// Its key.
    pub target: String,
    /// At least one.
    pub count: usize,
    /// So many of them are sent as soon as the target has its turn. Only these may be the last attempt of a delivery: a crash
    /// would have used it up in line.
    pub at_once: usize,
}

struct Target<T> {
    key: Arc<str>,
    host: Arc<str>,
    in_flight: usize,
    /// To be claimed: it is not known yet whether they are there.
    asked: usize,
    /// Claimed, with the time from which they wait.
    line: VecDeque<(T, Instant)>,
    /// It is in [`Fairness::turns`], or parked at its host.
    has_turn: bool,
    pace: Pace,
    failures: u32,
    /// The wait before the next probe, while only probed.
    probe_wait: Duration,
    not_before: Option<Instant>,
    last_used: Option<Instant>,
}

impl<T> Target<T> {
    fn new(key: Arc<str>, host: Arc<str>) -> Self {
        Self {
            key,
            host,
            in_flight: 0,
            asked: 0,
            line: VecDeque::new(),
            has_turn: false,
            pace: Pace::default(),
            failures: 0,
            probe_wait: Duration::ZERO,
            not_before: None,
            last_used: None,
        }
    }

    fn is_held(&self, now: Instant) -> bool {
        self.not_before.is_some_and(|at| at > now)
    }

    /// Sends that may be in flight.
    fn limit(&self, per_target: usize) -> usize {
        if self.failures >= FAILURES_BEFORE_PROBING { 1 } else { per_target }
    }
}

#[derive(Default)]
struct Host {
    in_flight: usize,
    /// Asked for or in line.
    ahead: usize,
    /// Targets that wait for it to have room.
    parked: Vec<Arc<str>>,
}

/// The state of all targets that are not at rest, with what is claimed of each and not yet sent.
pub struct Fairness<T> {
    per_target: usize,
    per_host: usize,
    in_flight_limit: usize,
    targets: HashMap<Arc<str>, Target<T>>,
    hosts: HashMap<Arc<str>, Host>,
    /// Targets with something in line, in the order of their turns.
    turns: VecDeque<Arc<str>>,
    in_flight: usize,
    /// Asked for or in line.
    ahead: usize,
    pace: Pace,
    /// Not to be sent any more.
    unsent: Vec<T>,
    /// The target claimed for last: the round goes on after it.
    last: String,
}

impl<T> Default for Fairness<T> {
    fn default() -> Self {
        Self::new(PER_TARGET, IN_FLIGHT)
    }
}

impl<T> Fairness<T> {
    /// With these limits on sends in flight. One host gets at most half of all, however many targets it has.
    #[must_use]
    pub fn new(per_target: usize, in_flight_limit: usize) -> Self {
        Self {
            per_target: per_target.max(1),
            per_host: (in_flight_limit / 2).max(1),
            in_flight_limit: in_flight_limit.max(1),
            targets: HashMap::new(),
            hosts: HashMap::new(),
            turns: VecDeque::new(),
            in_flight: 0,
            ahead: 0,
            pace: Pace::default(),
            unsent: Vec::new(),
            last: String::new(),
        }
    }

    /// Sends that may be started now, to whomever.
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
        let line = self.line_limit(now);
        let mut room = (self.free() + line).saturating_sub(self.ahead);
        if room == 0 {
            return Vec::new();
        }
        let mut order: Vec<&Due> = due.iter().filter(|due| due.count > 0).collect();
        order.sort_by(|a, b| a.target.cmp(&b.target));
        let start = order.partition_point(|due| due.target <= self.last);
        order.rotate_left(start);
        // What each may have at once, and in all.
        let rooms: Vec<(usize, usize)> = order.iter().map(|due| self.room(due, line, now)).collect();
        let mut hosts: HashMap<&str, (usize, usize)> = HashMap::new();
        for due in &order {
            hosts.entry(&due.host).or_insert_with(|| {
                let (in_flight, ahead) = self.hosts.get(&*due.host).map_or((0, 0), |host| (host.in_flight, host.ahead));
                let taken = in_flight + ahead;
                (self.per_host.saturating_sub(taken), (self.per_host + line / 2).saturating_sub(taken))
            });
        }
        let mut given: Vec<(usize, usize)> = vec![(0, 0); order.len()];
        let mut last = None;
        // First what can be sent at once, of everyone; then what stands in line.
        for at_once in [true, false] {
            loop {
                let mut gave = false;
                for ((due, of), given) in order.iter().zip(&rooms).zip(&mut given) {
                    let Some(host) = hosts.get_mut(&*due.host) else { continue };
                    let fits =
                        if at_once { given.0 < of.0 && host.0 > 0 } else { given.0 + given.1 < of.1 && host.1 > 0 };
                    if room == 0 || !fits {
                        continue;
                    }
                    if at_once {
                        given.0 += 1;
                        host.0 -= 1;
                    } else {
                        given.1 += 1;
                    }
                    room -= 1;
                    host.1 = host.1.saturating_sub(1);
                    last = Some(&due.target);
                    gave = true;
                }
                if !gave {
                    break;
                }
            }
        }
        if let Some(last) = last {
            self.last.clone_from(last);
        }
        let mut shares = Vec::new();
        for (due, (at_once, more)) in order.into_iter().zip(given) {
            let count = at_once + more;
            if count > 0 {
                self.ask(due, count, now);
                shares.push(Share { target: due.target.clone(), count, at_once });
            }
        }
        shares
    }

    /// One that was asked for is there, and stands in line.
    pub fn claimed(&mut self, target: &str, one: T, now: Instant) {
        let Some(state) = self.targets.get_mut(target).filter(|state| state.asked > 0) else {
            // Nobody asked for it.
            self.unsent.push(one);
            return;
        };
        state.asked -= 1;
        state.line.push_back((one, now));
        if !std::mem::replace(&mut state.has_turn, true) {
            self.turns.push_back(state.key.clone());
        }
    }

    /// So many that were asked for are not there.
    pub fn give_back(&mut self, target: &str, count: usize) {
        if let Some(state) = self.targets.get_mut(target) {
            let count = count.min(state.asked);
            state.asked -= count;
            let host = state.host.clone();
            self.left_line(&host, count);
        }
    }

    /// The next to be sent, counted as in flight from now on. None: all sends are busy, or nothing in line may be sent.
    pub fn next(&mut self, now: Instant) -> Option<T> {
        while self.in_flight < self.in_flight_limit {
            let key = self.turns.pop_front()?;
            let Some(state) = self.targets.get_mut(&key) else { continue };
            state.has_turn = false;
            let limit = state.limit(self.per_target);
            if state.in_flight >= limit || state.line.is_empty() || state.is_held(now) {
                // The end of a send gives it another turn; what is held back does not stay in line.
                continue;
            }
            let host = self.hosts.entry(state.host.clone()).or_default();
            if host.in_flight >= self.per_host {
                state.has_turn = true;
                host.parked.push(key);
                continue;
            }
            let Some((one, since)) = state.line.pop_front() else { continue };
            let fresh = now.saturating_duration_since(since) <= MAX_WAIT;
            if fresh {
                state.in_flight += 1;
                state.last_used = Some(now);
                host.in_flight += 1;
                self.in_flight += 1;
            }
            if !state.line.is_empty() && state.in_flight < limit {
                state.has_turn = true;
                self.turns.push_back(key);
            }
            let host = state.host.clone();
            self.left_line(&host, 1);
            if fresh {
                return Some(one);
            }
            self.unsent.push(one);
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
    pub fn succeeded(&mut self, target: &str, now: Instant) {
        self.finish(target);
        self.pace.count(now);
        if let Some(state) = self.targets.get_mut(target) {
            state.pace.count(now);
            state.failures = 0;
            state.probe_wait = Duration::ZERO;
            state.not_before = None;
        }
    }

    /// A send has failed. The receiver may have asked for a pause: it holds back the whole target.
    pub fn failed(&mut self, target: &str, retry_after: Option<Duration>, now: Instant) {
        self.finish(target);
        let Some(state) = self.targets.get_mut(target) else { return };
        state.failures = state.failures.saturating_add(1);
        // What was in flight when the first of them failed says nothing new.
        let held = state.is_held(now);
        let probing = (state.failures >= FAILURES_BEFORE_PROBING && !held).then(|| {
            let (first, longest) = PROBE_WAIT;
            state.probe_wait = (state.probe_wait * 2).clamp(first, longest);
            state.probe_wait
        });
        if let Some(wait) = probing.into_iter().chain(retry_after).max() {
            state.not_before = state.not_before.max(Some(now + wait));
        }
    }

    /// When this target may be sent to again, if it is held back.
    #[must_use]
    pub fn held_until(&self, target: &str, now: Instant) -> Option<Instant> {
        self.targets.get(target)?.not_before.filter(|at| *at > now)
    }

    /// Targets that are held back or only probed.
    #[must_use]
    pub fn held(&self, now: Instant) -> usize {
        self.targets.values().filter(|state| state.failures >= FAILURES_BEFORE_PROBING || state.is_held(now)).count()
    }

    /// Forgets targets at rest, so that memory does not grow with the number of targets ever seen. One that only ever
    /// failed is forgotten an hour after its last send.
    pub fn forget_idle(&mut self, now: Instant) {
        const LONG: Duration = Duration::from_secs(3_600);
        self.targets.retain(|_, state| {
            let recent = state.last_used.is_some_and(|at| now.saturating_duration_since(at) < LONG);
            let busy = state.in_flight > 0 || state.asked > 0 || !state.line.is_empty();
            busy || state.is_held(now) || (state.failures > 0 && recent) || state.pace.recent(now) > 0
        });
        self.hosts.retain(|_, host| host.in_flight > 0 || host.ahead > 0 || !host.parked.is_empty());
    }

    /// How many may stand in line. None while all sends are busy and none ends.
    fn line_limit(&self, now: Instant) -> usize {
        let recent = self.pace.recent(now);
        if recent == 0 && self.free() == 0 { 0 } else { (recent * 2).max(self.in_flight_limit * 4).min(AHEAD) }
    }

    /// How many a target may have more: at once, and in all.
    fn room(&self, due: &Due, line: usize, now: Instant) -> (usize, usize) {
        let (at_once, in_all) = match self.targets.get(&*due.target) {
            None => (self.per_target, self.per_target),
            Some(state) if state.is_held(now) => (0, 0),
            Some(state) => {
                let limit = state.limit(self.per_target);
                let taken = state.in_flight + state.asked + state.line.len();
                let line = if state.failures > 0 || !due.ahead { 0 } else { (state.pace.recent(now) * 2).min(line) };
                (limit.saturating_sub(taken), (limit + line).saturating_sub(taken))
            }
        };
        (at_once.min(due.count), in_all.min(due.count))
    }

    fn ask(&mut self, due: &Due, count: usize, now: Instant) {
        if !self.targets.contains_key(&*due.target) {
            let key: Arc<str> = due.target.as_str().into();
            self.targets.insert(key.clone(), Target::new(key, due.host.as_str().into()));
        }
        let Some(state) = self.targets.get_mut(&*due.target) else { return };
        state.asked += count;
        state.last_used = Some(now);
        self.hosts.entry(state.host.clone()).or_default().ahead += count;
        self.ahead += count;
    }

    fn left_line(&mut self, host: &str, count: usize) {
        self.ahead -= count;
        if let Some(host) = self.hosts.get_mut(host) {
            host.ahead -= count;
        }
    }

    fn leave_line(&mut self, leaves: impl Fn(&Target<T>, Instant) -> bool) -> Vec<T> {
        let mut left = std::mem::take(&mut self.unsent);
        for state in self.targets.values_mut() {
            let mut count = 0;
            // Whoever has waited longest is in front.
            while let Some(since) = state.line.front().map(|(_, since)| *since)
                && leaves(state, since)
                && let Some((one, _)) = state.line.pop_front()
            {
                left.push(one);
                count += 1;
            }
            self.ahead -= count;
            if let Some(host) = self.hosts.get_mut(&state.host) {
                host.ahead -= count;
            }
        }
        left
    }

    fn finish(&mut self, target: &str) {
        let Some(state) = self.targets.get_mut(target) else { return };
        if state.in_flight == 0 {
            return;
        }
        state.in_flight -= 1;
        self.in_flight -= 1;
        if let Some(host) = self.hosts.get_mut(&state.host) {
            host.in_flight -= 1;
            self.turns.extend(host.parked.drain(..));
        }
        if !state.line.is_empty() && !std::mem::replace(&mut state.has_turn, true) {
            self.turns.push_back(state.key.clone());
        }
    }
}

#[cfg(test)]
mod tests;
