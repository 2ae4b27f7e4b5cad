//! Decides which segments a node claims. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use crate::fleet::{Rank, Tenant};

/// The fewest lines that a node wants at hand for a served model, so that the next segment is there before the present
/// one is sent, even with workers that answer at once.
const AT_HAND: u32 = 2_000;
/// The most segments that one node runs at a time.
pub const MAX_SEGMENTS: usize = 512;
/// The most bytes of input that one node holds at a time; one segment is always allowed.
pub const MAX_BYTES: u64 = 96 * 1024 * 1024;
/// One part in this many of both is reserved for tenants that run nothing, so that their first segment starts at once,
/// whatever others have taken.
const KEPT: u64 = 8;
/// A tenant may hold this many times what is still free, so that something stays free for others: one tenant alone
/// takes three quarters of what tenants share, each further one three quarters of what is left.
const OF_FREE: u64 = 3;

/// The lines of each served model that this node still wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    wanted: BTreeMap<Arc<str>, u64>,
    /// The number of tenants, and the sum of their weights.
    tenants: (u64, u64),
    at_hand: Vec<(Arc<str>, Rank, u64)>,
    running: Room,
    running_of: BTreeMap<Tenant, Room>,
}

/// Running segments and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Room {
    segments: usize,
    bytes: u64,
}

impl Room {
    fn add(&mut self, bytes: u64) {
        self.segments += 1;
        self.bytes += bytes;
    }
}

impl Demand {
    /// A plan without served models and running segments.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the tenants that have lines for this node. Each gets lines at hand, and together not many more than one
    /// alone would get.
    pub fn share(&mut self, tenants: &BTreeSet<Tenant>) {
        self.tenants = (tenants.len() as u64, tenants.iter().map(|tenant| u64::from(tenant.weight().get())).sum());
    }

    /// A tenant's part: by its weight, and at least an even part. Even a tenant that is to have few slots has lines at
    /// hand for all of them, because it may soon be the only one.
    fn part(&self, tenant: Tenant, of: u64) -> u64 {
        let (count, weight) = self.tenants;
        let by_weight = of.saturating_mul(tenant.weight().get().into()).div_ceil(weight.max(1));
        by_weight.max(of.div_ceil(count.max(1))).min(of)
    }

    /// Adds a served model whose workers can take `capacity` requests at once.
    pub fn serve(&mut self, model: Arc<str>, capacity: u32) {
        *self.wanted.entry(model).or_default() += u64::from(capacity.saturating_mul(2).max(AT_HAND));
    }

    /// Adds a running segment of `bytes` of a tenant.
    pub fn running(&mut self, tenant: Tenant, bytes: u64) {
        self.running.add(bytes);
        self.running_of.entry(tenant).or_default().add(bytes);
    }

    /// Adds `lines` of a model at hand, with this rank.
    pub fn at_hand(&mut self, model: Arc<str>, rank: Rank, lines: usize) {
        self.at_hand.push((model, rank, lines as u64));
    }

    /// Whether this node may run one more segment of any tenant.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.running.segments == 0 || (self.running.segments < MAX_SEGMENTS && self.running.bytes < MAX_BYTES)
    }

    /// Whether this node may run one more segment of this tenant.
    ///
    /// A tenant that runs nothing may always run one segment while there is room at all. Others leave [`KEPT`] to
    /// those, and may hold at most [`OF_FREE`] times what is then free. So nobody can fill a node: segments can't be
    /// taken back from their workers, and later tenants would have to wait for the first one to end.
    #[must_use]
    pub fn has_room_for(&self, tenant: Tenant) -> bool {
        let Some(own) = self.running_of.get(&tenant) else { return self.has_room() };
        let fits = |all: u64, most: u64, own: u64| own < self.threshold(tenant, shared(most).saturating_sub(all));
        self.running.segments == 0
            || (fits(self.running.segments as u64, MAX_SEGMENTS as u64, own.segments as u64)
                && fits(self.running.bytes, MAX_BYTES, own.bytes))
    }

    /// The most that a tenant may hold while this much is free: more if its weight is above the average.
    fn threshold(&self, tenant: Tenant, free: u64) -> u64 {
        let (count, weight) = self.tenants;
        let even = free.saturating_mul(OF_FREE);
        let by_weight = even.saturating_mul(count).saturating_mul(tenant.weight().get().into()) / weight.max(1);
        by_weight.max(even)
    }

    /// Whether one more segment of a tenant is within the part of this node's room that is the tenant's own, of what tenants
    /// may take together. One that runs none may run one.
    #[must_use]
    pub fn has_room_of_its_own(&self, tenant: Tenant) -> bool {
        let Some(running) = self.running_of.get(&tenant) else { return true };
        let own = |most: u64| self.part(tenant, shared(most) * OF_FREE / (OF_FREE + 1));
        (running.segments as u64) < own(MAX_SEGMENTS as u64) && running.bytes < own(MAX_BYTES)
    }

    /// The models of which more lines of that rank are wanted, as a mask. Lines of the same tenant and rank count, and
    /// lines of any better priority. Lines of a worse rank don't count, so a batch that is to go first need not wait
    /// until those are used up; nor do lines of another tenant, which has its own share.
    #[must_use]
    pub fn wanted(&self, models: &[String], rank: Rank) -> i64 {
        let wants = |model: &String| {
            let counts = |at: Rank| at.is_before_any(rank) || (at.tenant() == rank.tenant() && at <= rank);
            let at_hand = self.at_hand.iter().filter(|(other, at, _)| **other == **model && counts(*at));
            self.wanted.get(model.as_str()).is_some_and(|wanted| {
                at_hand.map(|(_, _, lines)| lines).sum::<u64>() < self.part(rank.tenant(), *wanted)
            })
        };
        (0u32..).zip(models).filter(|(_, model)| wants(model)).fold(0, |mask, (bit, _)| mask | 1i64 << bit)
    }
}

/// The part of the room for tenants that already run something.
fn shared(most: u64) -> u64 {
    most - most / KEPT
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::domain::{Priority, Timestamp, Weight};

    fn rank(priority: i32) -> Rank {
        Rank::batch(Priority::new(priority).unwrap(), Timestamp(1))
    }

    #[test]
    fn what_is_served_and_not_at_hand_is_wanted() {
        let models = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let wanted = |demand: &Demand| demand.wanted(&models, rank(0));
        let mut demand = Demand::new();
        assert_eq!(wanted(&demand), 0);
        demand.serve("a".into(), 64);
        demand.serve("c".into(), 5_000);
        assert_eq!(wanted(&demand), 0b101);
        demand.at_hand("a".into(), rank(0), 1_999);
        demand.at_hand("b".into(), rank(0), 5);
        assert_eq!(wanted(&demand), 0b101);
        demand.at_hand("a".into(), rank(1), 1);
        demand.at_hand("c".into(), rank(0), 9_999);
        assert_eq!(wanted(&demand), 0b100);
        demand.at_hand("c".into(), rank(0), 1);
        assert_eq!(wanted(&demand), 0);
        assert_eq!(demand.wanted(&models, rank(1)), 0b101, "lines of a worse rank are no reason to wait");
    }

    #[test]
    fn every_tenant_has_lines_at_hand() {
        let models = ["m".to_owned()];
        let of = |name: &str, priority: i32| rank(priority).of(Tenant::named(name));
        let mut demand = Demand::new();
        demand.serve("m".into(), 64);
        demand.share(&["large", "small", "third", "fourth"].map(Tenant::named).into());
        demand.at_hand("m".into(), of("large", 0), 1_000_000);
        assert_eq!(demand.wanted(&models, of("large", 0)), 0);
        assert_eq!(demand.wanted(&models, of("small", 0)), 1, "what another one has is nothing to it");
        demand.at_hand("m".into(), of("small", 0), 499);
        assert_eq!(demand.wanted(&models, of("small", 0)), 1);
        demand.at_hand("m".into(), of("small", 0), 1);
        assert_eq!(demand.wanted(&models, of("small", 0)), 0, "a quarter of what one alone wants");
        demand.at_hand("m".into(), of("third", 1), 500);
        assert_eq!(demand.wanted(&models, of("fourth", 0)), 0, "a better priority goes first, whoever's it is");
    }

    #[test]
    fn who_weighs_more_has_more_at_hand_and_more_room() {
        let models = ["m".to_owned()];
        let heavy = Tenant::named("heavy").weighing(Weight::new(9).unwrap());
        let light = Tenant::named("light");
        let mut demand = Demand::new();
        demand.serve("m".into(), 10_000);
        demand.share(&[heavy, light].into());
        let wants = |demand: &Demand, tenant| demand.wanted(&models, rank(0).of(tenant)) == 1;
        demand.at_hand("m".into(), rank(0).of(heavy), 17_999);
        demand.at_hand("m".into(), rank(0).of(light), 9_999);
        assert!(wants(&demand, heavy) && wants(&demand, light), "nine tenths; a half, as if both weighed the same");
        demand.at_hand("m".into(), rank(0).of(heavy), 1);
        demand.at_hand("m".into(), rank(0).of(light), 1);
        assert!(!wants(&demand, heavy) && !wants(&demand, light));

        let all = shared(MAX_BYTES) * OF_FREE / (OF_FREE + 1);
        demand.running(light, all / 2);
        assert!(!demand.has_room_of_its_own(light), "it has its half");
        assert!(demand.has_room_for(light), "and may borrow");
        assert!(demand.has_room_for(heavy) && demand.has_room_of_its_own(heavy), "there is room for the other");
        demand.running(heavy, all / 2 + 1);
        assert!(demand.has_room_of_its_own(heavy) && demand.has_room_for(heavy), "nine tenths are its own");
        demand.running(heavy, shared(MAX_BYTES) - all);
        assert!(!demand.has_room_for(light) && !demand.has_room_for(heavy), "nothing is left to borrow");
        let third = Tenant::named("third");
        assert!(
            demand.has_room_of_its_own(third) && demand.has_room_for(third),
            "a tenant that runs nothing may run one"
        );
    }

    /// Claims for one tenant after the other, each as many one-line segments as it may. Returns how many each runs.
    fn greedy(tenants: &[Tenant]) -> Vec<usize> {
        let mut demand = Demand::new();
        let mut have = Vec::new();
        for tenant in tenants {
            demand.share(&tenants[..=have.len()].iter().copied().collect());
            let mut running = 0;
            while demand.has_room_for(*tenant) {
                demand.running(*tenant, 200);
                running += 1;
            }
            have.push(running);
        }
        have
    }

    #[test]
    fn one_tenant_alone_does_not_fill_a_node_and_leaves_room_for_many_more() {
        let tenants: Vec<Tenant> = (0..80).map(|name| Tenant::named(&name.to_string())).collect();
        let have = greedy(&tenants);
        assert!(have[0] > 300, "one tenant alone has most of the room: {have:?}");
        assert!(have[1] > 80, "the next one has room for many batches: {have:?}");
        let served = have.iter().take_while(|running| **running > 0).count();
        assert!(served >= 64, "{served} tenants run something although each took all it could get: {have:?}");
        assert!(have.iter().sum::<usize>() <= MAX_SEGMENTS);
    }

    #[test]
    fn memory_is_bounded_but_one_segment_always_runs() {
        let one = Tenant::named("one");
        let mut demand = Demand::new();
        assert!(demand.has_room());
        demand.running(one, MAX_BYTES - 1);
        assert!(demand.has_room());
        demand.running(one, 1);
        assert!(!demand.has_room());
        let mut demand = Demand::new();
        for _ in 0..MAX_SEGMENTS {
            demand.running(one, 0);
        }
        assert!(!demand.has_room());
    }

    proptest! {
        /// Whatever tenants have claimed, in any order and of any size, and whatever has ended since: a tenant that runs
        /// nothing gets a place until as many tenants run something as places are kept; nobody holds more than its
        /// threshold plus one segment; and the node holds no more than its room and one segment.
        #[test]
        fn nobody_keeps_a_tenant_that_runs_nothing_waiting(
            claims in prop::collection::vec((0usize..12, 1u64..512 * 1024, prop::bool::weighted(0.3)), 0..1_000),
            weights in prop::collection::vec(1u16..=1_000, 12),
        ) {
            let tenants: Vec<Tenant> = (0..12)
                .map(|at| Tenant::named(&at.to_string()).weighing(Weight::new(weights[at]).unwrap()))
                .collect();
            let newcomer = Tenant::named("newcomer");
            let all: BTreeSet<Tenant> = tenants.iter().copied().chain([newcomer]).collect();
            let mut running: Vec<(usize, u64)> = Vec::new();
            for (tenant, bytes, ends) in claims {
                if ends && !running.is_empty() {
                    running.remove(tenant % running.len());
                }
                let mut demand = Demand::new();
                demand.share(&all);
                running.iter().for_each(|(of, bytes)| demand.running(tenants[*of], *bytes));
                let first = running.iter().all(|(of, _)| *of != tenant);
                if demand.has_room_for(tenants[tenant]) {
                    prop_assert!(first || demand.has_room());
                    running.push((tenant, bytes));
                } else if first {
                    prop_assert!(false, "12 segments of 512 KiB at most don't use up what is kept");
                }
                prop_assert!(running.len() <= MAX_SEGMENTS);
                prop_assert!(running.iter().map(|(_, bytes)| bytes).sum::<u64>() < MAX_BYTES + 512 * 1024);
                let mut after = Demand::new();
                after.share(&all);
                running.iter().for_each(|(of, bytes)| after.running(tenants[*of], *bytes));
                prop_assert!(after.has_room_for(newcomer), "{} segments", running.len());
            }
        }

        /// Only what is served is wanted; a better rank wants all that a worse one wants; more lines at hand never make a
        /// model wanted, and enough of them of the rank itself always satisfy it.
        #[test]
        fn more_at_hand_is_never_wanted_more(
            served in prop::collection::vec((0usize..4, 0u32..5_000), 0..4),
            at_hand in prop::collection::vec((0usize..4, -1i32..=1, 0usize..6_000), 0..12),
            more in (0usize..4, -1i32..=1, 0usize..20_000),
        ) {
            let models = ["a", "b", "c", "d"].map(str::to_owned);
            let mut demand = Demand::new();
            for (model, capacity) in &served {
                demand.serve(models[*model].as_str().into(), *capacity);
            }
            for (model, priority, lines) in &at_hand {
                demand.at_hand(models[*model].as_str().into(), rank(*priority), *lines);
            }
            let before: Vec<i64> = (-1..=1).map(|priority| demand.wanted(&models, rank(priority))).collect();
            let is_served = served.iter().fold(0, |mask, (model, _)| mask | 1i64 << model);
            prop_assert!(before.iter().all(|mask| mask & !is_served == 0));
            prop_assert!(before[0] & !before[1] == 0 && before[1] & !before[2] == 0);
            demand.at_hand(models[more.0].as_str().into(), rank(more.1), more.2);
            for (priority, before) in (-1..=1).zip(&before) {
                let after = demand.wanted(&models, rank(priority));
                prop_assert_eq!(after & !before, 0);
                // Lines of a worse rank change nothing.
                if more.1 < priority { prop_assert_eq!(after, *before); }
            }
            demand.at_hand(models[more.0].as_str().into(), rank(1), 100_000);
            prop_assert_eq!(demand.wanted(&models, rank(0)) & 1 << more.0, 0);
        }
    }
}
