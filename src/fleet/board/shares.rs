//! Counts each tenant's slots of a model, and decides who is next.
//!
//! The next slot goes to the tenant with the lowest (slots + 1) / weight: a tenant is in front if, with one slot more,
//! it would have no more per weight than another one has now. So shares are exact to within one slot whatever requests
//! take, a tenant who arrives late catches up as slots become free, and an idle tenant saves nothing up. Where one slot
//! more or less decides (with few slots, or with weights far apart, that is often), tenants take turns by stride
//! scheduling: a clock advances with each slot that is given out, and each tenant has its turns at distances of 1 /
//! weight. So a weight of 3 has three turns to another's one, and a weight of 1 next to one of 1,000 has one turn in
//! 1,001.

use std::{cmp::Ordering, collections::BTreeMap, sync::Arc};

use smallvec::SmallVec;

use super::want::{Holder, Rank, Tenant, Ticket, Want};

/// The distance between two turns of a tenant of weight 1, in ticks of the clock. Large, so that rounding in divisions
/// by weights does not matter.
const TURN: u128 = 1 << 48;
/// The most turns that a tenant may be behind the clock. It falls behind while it holds a slot more than its share. The
/// bound is high enough that no turn is lost by that, and low enough that a tenant that held a slot but wanted no more
/// has not saved up many turns.
const BEHIND: u128 = 16;
/// The most turns that a tenant may be ahead of the clock, by slots that others did not want at the time; beyond that
/// the clock is advanced. Low, so that nobody has to wait long for having taken them.
const AHEAD: u128 = 2;

/// Tenants' slots by model, counted separately for interactive calls and for batches, so that a tenant with a large
/// batch is not last with a call.
#[derive(Clone, Debug, Default)]
pub(super) struct Shares {
    classes: [Models; 2],
}

type Models = BTreeMap<Arc<str>, Model>;

#[derive(Clone, Debug)]
struct Model {
    clock: u128,
    /// The sum of the active tenants' weights.
    weight: u64,
    tenants: BTreeMap<Tenant, Share>,
}

impl Default for Model {
    fn default() -> Self {
        // Leaves room for times before it.
        Self { clock: (BEHIND + 1) * TURN, weight: 0, tenants: BTreeMap::new() }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Share {
    held: u32,
    /// The clock's time of its next turn.
    next: u128,
    /// Whether it has slots or wishes.
    active: bool,
}

/// The distance between two turns of a tenant.
fn distance(tenant: Tenant) -> u128 {
    TURN / u128::from(tenant.weight().get())
}

impl Model {
    /// The time of the tenant's next turn; for an idle tenant, not before now.
    fn due(&self, tenant: Tenant) -> u128 {
        let share = self.tenants.get(&tenant).copied().unwrap_or_default();
        let earliest = if share.active { self.clock - BEHIND * distance(tenant) } else { self.clock };
        share.next.max(earliest)
    }

    /// Marks a tenant as active.
    fn wake(&mut self, tenant: Tenant) {
        let due = self.due(tenant);
        let share = self.tenants.entry(tenant).or_default();
        if !share.active {
            (share.active, share.next) = (true, due);
            self.weight += u64::from(tenant.weight().get());
        }
    }
}

/// Slots per weight, as a fraction.
#[derive(Clone, Copy, Debug)]
struct Level {
    slots: u32,
    weight: u16,
}

impl Ord for Level {
    fn cmp(&self, other: &Self) -> Ordering {
        // Compares slots / weight without dividing.
        let times = |slots: u32, weight: u16| u64::from(slots) * u64::from(weight);
        times(self.slots, other.weight).cmp(&times(other.slots, self.weight))
    }
}

impl PartialOrd for Level {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Level {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Level {}

/// A wish, and its tenant's position.
#[derive(Clone, Copy, Debug)]
struct Standing<'a> {
    ticket: Ticket,
    /// Its turn among wishes of the same rank.
    turn: u64,
    model: &'a str,
    level: Level,
    /// How far the tenant's next turn is ahead of the clock; negative: behind it.
    ahead: i128,
    /// Whether, with one slot more, the tenant would have more per weight than another waiting tenant has.
    over: bool,
}

impl Standing<'_> {
    /// The key by which the wishes for a model are ordered; the smallest goes first.
    fn turn(&self) -> (bool, Option<Level>, i128, Rank, u64) {
        (self.over, self.over.then_some(self.level), self.ahead, self.ticket.0, self.turn)
    }
}

impl Shares {
    fn models(&self, batch: bool) -> &Models {
        &self.classes[usize::from(batch)]
    }

    fn models_mut(&mut self, batch: bool) -> &mut Models {
        &mut self.classes[usize::from(batch)]
    }

    /// Records that a tenant waits for a slot.
    pub(super) fn wish(&mut self, want: &Want) {
        self.model_mut(want).wake(want.rank.tenant);
    }

    /// Records that a slot is given out.
    pub(super) fn take(&mut self, want: &Want) {
        let tenant = want.rank.tenant;
        let model = self.model_mut(want);
        model.wake(tenant);
        let (next, distance) = (model.due(tenant) + distance(tenant), distance(tenant));
        model.clock = (model.clock + TURN / u128::from(model.weight.max(1))).max(next - AHEAD * distance);
        let share = model.tenants.entry(tenant).or_default();
        share.next = next;
        share.held += 1;
    }

    /// Records that a slot is returned. Returns whether it was the last one of its holder.
    pub(super) fn give_back(&mut self, holder: &Holder) -> bool {
        let model = self.models_mut(holder.batch).get_mut(&holder.model);
        model.and_then(|model| model.tenants.get_mut(&holder.tenant)).is_some_and(|share| {
            share.held = share.held.saturating_sub(1);
            share.held == 0
        })
    }

    /// Records that a tenant has no wish for a model. If it has no slot either, it is idle: turns that it is behind are
    /// forgotten, but a tenant that has just had a turn does not get another one by leaving and coming back.
    pub(super) fn rest(&mut self, holder: &Holder) {
        let Some(model) = self.models_mut(holder.batch).get_mut(&holder.model) else { return };
        let Some(share) = model.tenants.get_mut(&holder.tenant) else { return };
        if share.held == 0 && share.active {
            share.active = false;
            model.weight -= u64::from(holder.tenant.weight().get());
            let clock = model.clock;
            model.tenants.retain(|_, share| share.active || share.held > 0 || share.next > clock);
        }
    }

    fn model_mut(&mut self, want: &Want) -> &mut Model {
        let models = self.models_mut(want.rank.batch);
        if !models.contains_key(&want.model) {
            // Models without tenants are forgotten.
            models.retain(|_, model| model.tenants.values().any(|share| share.active || share.held > 0));
        }
        models.entry(want.model.clone()).or_default()
    }

    /// The wishes in the order in which they get slots.
    pub(super) fn in_turn<'a>(&self, wishes: impl Iterator<Item = (Ticket, &'a Want, u64)>) -> SmallVec<[Ticket; 16]> {
        let mut all: SmallVec<[Standing<'a>; 16]> =
            wishes.map(|(ticket, want, turn)| self.standing(ticket, &want.model, turn)).collect();
        let class = |of: &Standing<'_>| (of.ticket.0.batch, of.ticket.0.priority);
        all.sort_unstable_by(|a, b| (class(a), a.model).cmp(&(class(b), b.model)));
        let mut tickets = SmallVec::with_capacity(all.len());
        for equals in all.chunk_by_mut(|a, b| class(a) == class(b)) {
            let mut models: SmallVec<[&[Standing<'a>]; 4]> = SmallVec::new();
            for model in equals.chunk_by_mut(|a, b| a.model == b.model) {
                arrange(model);
                models.push(model);
            }
            // Models may share workers: between models, too, the lower level goes first.
            while let Some(first) = first_of(&models) {
                let (head, rest) = models[first].split_at(1);
                tickets.extend(head.iter().map(|standing| standing.ticket));
                models[first] = rest;
                models.retain(|model| !model.is_empty());
            }
        }
        tickets
    }

    fn standing<'a>(&self, ticket: Ticket, model: &'a Arc<str>, turn: u64) -> Standing<'a> {
        let (rank, _) = ticket;
        let known = self.models(rank.batch).get(model);
        let share = known.and_then(|known| known.tenants.get(&rank.tenant));
        let level = Level { slots: share.map_or(0, |share| share.held), weight: rank.tenant.weight().get() };
        let ahead = known.map_or(0, |known| known.due(rank.tenant).cast_signed() - known.clock.cast_signed());
        Standing { ticket, turn, model, level, ahead, over: false }
    }

    /// The slots of each holder.
    #[cfg(test)]
    pub(super) fn held(&self) -> impl Iterator<Item = (Holder, u32)> {
        [false, true].into_iter().flat_map(|batch| {
            self.models(batch).iter().flat_map(move |(model, known)| {
                let held = known.tenants.iter().filter(|(_, share)| share.held > 0);
                held.map(move |(tenant, share)| (Holder { batch, tenant: *tenant, model: model.clone() }, share.held))
            })
        })
    }
}

/// Sorts the wishes for one model and one priority.
fn arrange(model: &mut [Standing<'_>]) {
    let with_one_more = |of: &Standing<'_>| Level { slots: of.level.slots + 1, ..of.level };
    let Some(least) = model.iter().map(with_one_more).min() else { return };
    for standing in &mut *model {
        standing.over = standing.level >= least;
    }
    model.sort_unstable_by_key(Standing::turn);
}

/// The model whose first wish goes first.
fn first_of(models: &[&[Standing<'_>]]) -> Option<usize> {
    let heads = models.iter().enumerate().filter_map(|(at, model)| model.first().map(|head| (at, head)));
    heads.min_by_key(|(_, head)| (head.level, head.ahead, head.ticket.0, head.turn)).map(|(at, _)| at)
}

#[cfg(test)]
mod tests;
