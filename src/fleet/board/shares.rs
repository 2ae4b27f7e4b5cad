//! Who has how many of a model's slots, and whose turn that makes it.
//!
//! Of two tenants the one goes first that would still have no more slots for its weight than the other has now. So shares
//! are right to within one slot whatever requests take, a tenant who comes late is level at once, and nobody who is idle
//! saves anything up. Where one slot more or less is what is left to decide (with few slots, or with weights far apart, that
//! is often) they take turns by stride scheduling: a clock goes on with each slot that is given out, as fast as all together
//! have turns, and each has its turns at distances of one over its weight. So a weight of 3 has 3 turns to another's one, and
//! a weight of 1 beside one of 1,000 has one in 1,001, but has it.

use std::{cmp::Ordering, collections::BTreeMap, sync::Arc};

use smallvec::SmallVec;

use super::{Holder, Rank, Tenant, Ticket, Want};

/// What a turn of a tenant of weight 1 takes of the clock: enough that no division by weights matters.
const TURN: u128 = 1 << 48;
/// Turns that a tenant may be behind the clock: those that it did not get while it had a slot more than was due to it.
/// Enough that nothing is lost by that; few enough that who had no wish for a while, but a slot, has not saved up much.
const BEHIND: u128 = 16;
/// Turns that a tenant may be ahead of the clock, by slots that others had no use for at the time; then the clock is put
/// on. Few, so that nobody has to wait long for having taken them.
const AHEAD: u128 = 2;

/// The slots that tenants have, by model: for interactive calls, and for batches. They are counted apart, so that whoever
/// runs a large batch is not last with a call.
#[derive(Clone, Debug, Default)]
pub(super) struct Shares {
    classes: [Models; 2],
}

type Models = BTreeMap<Arc<str>, Model>;

#[derive(Clone, Debug)]
struct Model {
    clock: u128,
    /// Of those who are active, together.
    weight: u64,
    tenants: BTreeMap<Tenant, Share>,
}

impl Default for Model {
    fn default() -> Self {
        // So that there is a time before it.
        Self { clock: (BEHIND + 1) * TURN, weight: 0, tenants: BTreeMap::new() }
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Share {
    held: u32,
    /// When its next turn is to be.
    next: u128,
    /// It has slots, or wishes.
    active: bool,
}

/// How far apart a tenant's turns are.
fn distance(tenant: Tenant) -> u128 {
    TURN / u128::from(tenant.weight().get())
}

impl Model {
    /// When the tenant's next turn is: for one who was idle not before now.
    fn due(&self, tenant: Tenant) -> u128 {
        let share = self.tenants.get(&tenant).copied().unwrap_or_default();
        let earliest = if share.active { self.clock - BEHIND * distance(tenant) } else { self.clock };
        share.next.max(earliest)
    }

    /// A tenant has a wish, or gets a slot.
    fn wake(&mut self, tenant: Tenant) {
        let due = self.due(tenant);
        let share = self.tenants.entry(tenant).or_default();
        if !share.active {
            (share.active, share.next) = (true, due);
            self.weight += u64::from(tenant.weight().get());
        }
    }
}

/// Slots for a weight.
#[derive(Clone, Copy, Debug)]
struct Level {
    slots: u32,
    weight: u16,
}

impl Ord for Level {
    fn cmp(&self, other: &Self) -> Ordering {
        // slots / weight, without dividing.
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

/// A wish, and where its tenant stands.
#[derive(Clone, Copy, Debug)]
struct Standing<'a> {
    ticket: Ticket,
    /// When it has its turn among those of the same rank.
    turn: u64,
    model: &'a str,
    level: Level,
    /// How far its next turn is ahead of the clock, or behind it.
    ahead: i128,
    /// It would have more than another one has who wants a slot too.
    over: bool,
}

impl Standing<'_> {
    /// Of its model, whose turn it is: the smallest's.
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

    /// Somebody waits for a slot.
    pub(super) fn wish(&mut self, want: &Want) {
        self.model_mut(want).wake(want.rank.tenant);
    }

    /// A slot is given out.
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

    /// A slot has come back. Returns whether that was the last one of its holder.
    pub(super) fn give_back(&mut self, holder: &Holder) -> bool {
        let model = self.models_mut(holder.batch).get_mut(&holder.model);
        model.and_then(|model| model.tenants.get_mut(&holder.tenant)).is_some_and(|share| {
            share.held = share.held.saturating_sub(1);
            share.held == 0
        })
    }

    /// A tenant has no wish for a slot of that model. If it has none either, it is idle: what it is behind is gone, but
    /// whoever has just had a turn does not get another one by going away and coming back.
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
            // So that models that come and go are not remembered for ever.
            models.retain(|_, model| model.tenants.values().any(|share| share.active || share.held > 0));
        }
        models.entry(want.model.clone()).or_default()
    }

    /// The wishes in the order in which they are to be granted.
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
            // Models may have workers in common: there, too, the lower level goes first.
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

    /// What each has.
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

/// Brings the wishes for one model, of one priority, into their order.
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
