//! Who is served next: picks go round the targets, no target and no host takes more than its share of the sends in flight,
//! and one that fails again and again is only probed. Pure: time is an argument.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// Sends in flight to one target.
pub const PER_TARGET: usize = 4;
/// Sends in flight in all.
pub const IN_FLIGHT: usize = 64;
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
    /// How many are due; more than can be sent at once need not be counted.
    pub count: usize,
}

/// How many of a target's deliveries to take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its key.
    pub target: String,
    /// At least one.
    pub count: usize,
}

#[derive(Default)]
struct Target {
    host: String,
    in_flight: usize,
    failures: u32,
    /// The wait before the next probe, while only probed.
    probe_wait: Duration,
    not_before: Option<Instant>,
    last_used: Option<Instant>,
}

/// The state of all targets that are not at rest.
pub struct Fairness {
    per_target: usize,
    per_host: usize,
    in_flight_limit: usize,
    targets: HashMap<String, Target>,
    /// Sends in flight to each host.
    hosts: HashMap<String, usize>,
    in_flight: usize,
    /// The target served last: the round goes on after it.
    last: String,
}

impl Default for Fairness {
    fn default() -> Self {
        Self::new(PER_TARGET, IN_FLIGHT)
    }
}

impl Fairness {
    /// With these limits on sends in flight. One host gets at most half of all, however many targets it has.
    #[must_use]
    pub fn new(per_target: usize, in_flight_limit: usize) -> Self {
        Self {
            per_target: per_target.max(1),
            per_host: (in_flight_limit / 2).max(1),
            in_flight_limit: in_flight_limit.max(1),
            targets: HashMap::new(),
            hosts: HashMap::new(),
            in_flight: 0,
            last: String::new(),
        }
    }

    /// Sends that may be started now, to whomever.
    #[must_use]
    pub fn free(&self) -> usize {
        self.in_flight_limit - self.in_flight
    }

    /// Divides the free sends among the targets, one each in turn, and counts them as in flight.
    pub fn take(&mut self, due: &[Due], now: Instant) -> Vec<Share> {
        let mut order: Vec<&Due> = due.iter().filter(|due| due.count > 0).collect();
        order.sort_by(|a, b| a.target.cmp(&b.target));
        let start = order.partition_point(|due| due.target <= self.last);
        order.rotate_left(start);
        let mut shares: Vec<usize> = vec![0; order.len()];
        loop {
            let mut gave = false;
            for (due, share) in order.iter().zip(&mut shares) {
                if self.free() == 0 {
                    break;
                }
                if *share < due.count && self.has_room(due, now) {
                    self.start(due, now);
                    *share += 1;
                    gave = true;
                }
            }
            if !gave {
                break;
            }
        }
        order
            .into_iter()
            .zip(shares)
            .filter(|(_, count)| *count > 0)
            .map(|(due, count)| Share { target: due.target.clone(), count })
            .collect()
    }

    /// Gives back what was taken but not sent.
    pub fn give_back(&mut self, target: &str, count: usize) {
        for _ in 0..count {
            self.finish(target);
        }
    }

    /// A send has ended well.
    pub fn succeeded(&mut self, target: &str) {
        self.finish(target);
        if let Some(state) = self.targets.get_mut(target) {
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
        let held = state.not_before.is_some_and(|at| at > now);
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
        self.targets
            .values()
            .filter(|state| state.failures >= FAILURES_BEFORE_PROBING || state.not_before.is_some_and(|at| at > now))
            .count()
    }

    /// Forgets targets at rest, so that memory does not grow with the number of targets ever seen. One that only ever
    /// failed is forgotten an hour after its last send.
    pub fn forget_idle(&mut self, now: Instant) {
        const LONG: Duration = Duration::from_secs(3_600);
        self.targets.retain(|_, state| {
            let recent = state.last_used.is_some_and(|at| now.saturating_duration_since(at) < LONG);
            state.in_flight > 0 || state.not_before.is_some_and(|at| at > now) || (state.failures > 0 && recent)
        });
    }

    fn has_room(&self, due: &Due, now: Instant) -> bool {
        if self.hosts.get(&due.host).is_some_and(|in_flight| *in_flight >= self.per_host) {
            return false;
        }
        let Some(state) = self.targets.get(&due.target) else { return true };
        let limit = if state.failures >= FAILURES_BEFORE_PROBING { 1 } else { self.per_target };
        state.in_flight < limit && state.not_before.is_none_or(|at| at <= now)
    }

    fn start(&mut self, due: &Due, now: Instant) {
        let state = self.targets.entry(due.target.clone()).or_default();
        state.host.clone_from(&due.host);
        state.in_flight += 1;
        state.last_used = Some(now);
        *self.hosts.entry(due.host.clone()).or_default() += 1;
        self.in_flight += 1;
        self.last.clone_from(&due.target);
    }

    fn finish(&mut self, target: &str) {
        if let Some(state) = self.targets.get_mut(target)
            && state.in_flight > 0
        {
            state.in_flight -= 1;
            self.in_flight -= 1;
            if let Some(on_host) = self.hosts.get_mut(&state.host) {
                *on_host -= 1;
                if *on_host == 0 {
                    self.hosts.remove(&state.host);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn due(target: &str, count: usize) -> Due {
        Due { target: target.into(), host: target.into(), count }
    }

    fn counts(shares: &[Share]) -> Vec<(&str, usize)> {
        let mut all: Vec<_> = shares.iter().map(|share| (share.target.as_str(), share.count)).collect();
        all.sort_unstable();
        all
    }

    #[test]
    fn four_a_target_and_no_more_than_there_are() {
        let (mut fairness, now) = (Fairness::new(4, 64), Instant::now());
        assert_eq!(counts(&fairness.take(&[due("a", 100), due("b", 2), due("c", 0)], now)), [("a", 4), ("b", 2)]);
        assert_eq!(fairness.take(&[due("a", 96)], now), []);
        fairness.succeeded("a");
        assert_eq!(counts(&fairness.take(&[due("a", 96)], now)), [("a", 1)]);
    }

    #[test]
    fn scarce_sends_go_round() {
        let (mut fairness, now) = (Fairness::new(4, 2), Instant::now());
        let all: Vec<_> = ["a", "b", "c", "d", "e"].map(|name| due(name, 10)).to_vec();
        let mut served = Vec::new();
        for _ in 0..5 {
            for share in fairness.take(&all, now) {
                assert_eq!(share.count, 1);
                fairness.succeeded(&share.target);
                served.push(share.target);
            }
        }
        assert_eq!(served.join(""), "abcdeabcde");
    }

    #[test]
    fn a_host_with_many_targets_leaves_half_to_others() {
        let (mut fairness, now) = (Fairness::new(4, 8), Instant::now());
        let one = |path: usize| Due { target: format!("https://one/{path}"), host: "one".into(), count: 9 };
        let all: Vec<_> = (0..20).map(one).collect();
        let taken: usize = fairness.take(&all, now).iter().map(|share| share.count).sum();
        assert_eq!(taken, 4);
        assert_eq!(counts(&fairness.take(&[due("two", 9)], now)), [("two", 4)]);
    }

    #[test]
    fn five_failures_in_a_row_then_probes_from_a_second_to_a_minute() {
        let (mut fairness, mut now) = (Fairness::default(), Instant::now());
        for _ in 0..5 {
            assert_eq!(counts(&fairness.take(&[due("a", 1)], now)), [("a", 1)]);
            fairness.failed("a", None, now);
        }
        for wait in [1, 2, 4, 8, 16, 32, 60, 60] {
            let wait = Duration::from_secs(wait);
            assert_eq!(fairness.held_until("a", now), Some(now + wait));
            assert_eq!(fairness.take(&[due("a", 9)], now + wait - Duration::from_millis(1)), []);
            now += wait;
            assert_eq!(counts(&fairness.take(&[due("a", 9)], now)), [("a", 1)], "one probe at a time");
            fairness.failed("a", None, now);
        }
        now += Duration::from_secs(60);
        fairness.take(&[due("a", 9)], now);
        fairness.succeeded("a");
        assert_eq!(counts(&fairness.take(&[due("a", 9)], now)), [("a", 4)]);
    }

    #[test]
    fn retry_after_holds_the_target_back() {
        let (mut fairness, now) = (Fairness::default(), Instant::now());
        fairness.take(&[due("a", 1), due("b", 1)], now);
        fairness.failed("a", Some(Duration::from_secs(30)), now);
        assert_eq!(counts(&fairness.take(&[due("a", 9), due("b", 9)], now + Duration::from_secs(29))), [("b", 3)]);
        assert_eq!(counts(&fairness.take(&[due("a", 9)], now + Duration::from_secs(30))), [("a", 4)]);
    }

    #[test]
    fn targets_at_rest_are_forgotten() {
        let (mut fairness, now) = (Fairness::default(), Instant::now());
        fairness.take(&[due("a", 1), due("b", 1), due("c", 1)], now);
        fairness.succeeded("a");
        fairness.failed("b", None, now);
        fairness.forget_idle(now);
        assert_eq!(fairness.targets.len(), 2);
        fairness.give_back("c", 1);
        fairness.forget_idle(now + Duration::from_secs(3_600));
        assert_eq!(fairness.targets.len(), 0);
        assert_eq!(fairness.free(), IN_FLIGHT);
    }

    proptest! {
        #[test]
        fn limits_always_hold_and_all_sends_come_back(
            steps in proptest::collection::vec((0usize..6, 0usize..9, 0u64..90, any::<bool>()), 1..120),
        ) {
            let (mut fairness, start) = (Fairness::new(4, 10), Instant::now());
            let mut now = start;
            let mut flying: Vec<String> = Vec::new();
            for (which, count, later, good) in steps {
                now += Duration::from_secs(later);
                let all: Vec<_> = (0..6).map(|name| due(&name.to_string(), if name == which { count } else { 1 })).collect();
                for share in fairness.take(&all, now) {
                    flying.extend(std::iter::repeat_n(share.target, share.count));
                }
                prop_assert_eq!(flying.len() + fairness.free(), 10);
                for name in 0..6 {
                    prop_assert!(flying.iter().filter(|target| **target == name.to_string()).count() <= 4);
                }
                if !flying.is_empty() {
                    let target = flying.swap_remove(which % flying.len());
                    if good { fairness.succeeded(&target) } else { fairness.failed(&target, None, now) }
                }
                fairness.forget_idle(now);
            }
            for target in flying { fairness.give_back(&target, 1) }
            prop_assert_eq!(fairness.free(), 10);
        }
    }
}
