//! Who gets which worker's next free slot: the pure core of dispatch. No clock, no locks, no IO.
//!
//! A slot is one request that a worker may have in flight. Whoever wants one names a model and a [`Rank`]; free slots go to
//! the best rank first, then to who asked first or was given slots longest ago, and among the workers that serve the model to
//! the least loaded one.
//!
//! Within a priority, and among interactive calls, tenants share: the next slot goes to the one that has the fewest of the model's slots for its weight
//! ([`shares`]). So each gets its share while it has enough to send, a small batch is not stuck behind a large one of
//! somebody else, and what one does not use the others have. A tenant's own batches go by their deadlines.
//!
//! A request that may be what kills workers is sent alone: it gets a worker that has nothing else in flight, and nothing
//! else goes there until it is back. If all are at work, one of them is reserved: it gets nothing new until it is idle.

mod shares;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    hash::BuildHasher,
    sync::Arc,
};

use smallvec::SmallVec;

use super::names;
use crate::domain::{Priority, Timestamp, Weight};
use shares::Shares;

/// Which worker, on this node, for as long as this process knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerKey(pub u32);

/// Whose work it is: a fingerprint of the owner's name, for the board need not know the name; and how large its share is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tenant {
    name: u64,
    weight: Weight,
}

impl Tenant {
    /// The tenant of that name. It weighs 1.
    #[must_use]
    pub fn named(owner: &str) -> Self {
        Self { name: foldhash::quality::FixedState::default().hash_one(owner), weight: Weight::default() }
    }

    /// The same, with another weight. A name has the same one wherever it is used on a board.
    #[must_use]
    pub fn weighing(self, weight: Weight) -> Self {
        Self { weight, ..self }
    }

    /// How large its share is.
    #[must_use]
    pub fn weight(self) -> Weight {
        self.weight
    }
}

/// Who goes first: interactive calls, then higher priority, then the earlier deadline; between tenants see [`Board`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    batch: bool,
    priority: Reverse<Priority>,
    expires_at: Timestamp,
    tenant: Tenant,
}

impl Rank {
    /// Ahead of all batch work.
    #[must_use]
    pub fn interactive() -> Self {
        Self {
            batch: false,
            priority: Reverse(Priority::default()),
            expires_at: Timestamp(0),
            tenant: Tenant::default(),
        }
    }

    /// A batch's.
    #[must_use]
    pub fn batch(priority: Priority, expires_at: Timestamp) -> Self {
        Self { batch: true, priority: Reverse(priority), expires_at, tenant: Tenant::default() }
    }

    /// The same, of a tenant.
    #[must_use]
    pub fn of(self, tenant: Tenant) -> Self {
        Self { tenant, ..self }
    }

    /// Whose it is.
    #[must_use]
    pub fn tenant(self) -> Tenant {
        self.tenant
    }

    /// Whether it goes before the other whoever's they are.
    #[must_use]
    pub fn is_before_any(self, other: Self) -> bool {
        (self.batch, self.priority) < (other.batch, other.priority)
    }
}

/// A wish for a slot.
#[derive(Clone, Debug)]
pub struct Want {
    /// The model that the worker must serve.
    pub model: Arc<str>,
    /// Who goes first.
    pub rank: Rank,
    /// Workers that have failed this request: taken only if no other serves the model.
    pub avoid: SmallVec<[WorkerKey; 4]>,
    /// The worker must have nothing else in flight meanwhile.
    pub alone: bool,
}

/// One in so many workers, and at least one, may be kept free for requests that must be alone.
const ISOLATION_SHARE: usize = 4;

/// What a slot counts for: a tenant's share of a model, for interactive calls and for batches apart.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    batch: bool,
    tenant: Tenant,
    model: Arc<str>,
}

impl Want {
    /// Who holds the slot that it gets.
    #[must_use]
    pub fn holder(&self) -> Holder {
        Holder { batch: self.rank.batch, tenant: self.rank.tenant, model: self.model.clone() }
    }
}

/// A waiting [`Want`].
pub type Ticket = (Rank, u64);

/// What waits under a ticket.
#[derive(Clone, Debug)]
struct Wish {
    want: Want,
    /// How many slots it still waits for, 1 or more.
    slots: u32,
    /// When it has its turn among those of the same rank: the smaller first.
    turn: u64,
}

/// What the board knows of a worker.
#[derive(Clone, Debug, Default)]
struct Desk {
    /// As listed, patterns too.
    models: BTreeSet<Arc<str>>,
    /// Those of them that are patterns.
    patterns: Vec<Arc<str>>,
    /// Healthy and not draining: it is worth waiting for.
    serving: bool,
    /// Serving, and not held back for the moment.
    open: bool,
    limit: u32,
    in_flight: u32,
    /// The limit was reached since somebody asked last.
    was_full: bool,
    /// What is in flight there must be there alone.
    alone: bool,
    /// It is on trial: it gets requests to find out whether it answers again.
    trial: Option<Trial>,
    /// Who gets it as soon as nothing is in flight there.
    reserved: Option<Ticket>,
}

/// How many requests a worker on trial gets.
#[derive(Clone, Copy, Debug)]
struct Trial {
    allowed: u32,
    given: u32,
}

/// All workers and all who wait for one.
#[derive(Debug, Default)]
pub struct Board {
    desks: BTreeMap<WorkerKey, Desk>,
    waiting: BTreeMap<Ticket, Wish>,
    /// Models that batches want, for those that list patterns.
    wanted: BTreeSet<Arc<str>>,
    shares: Shares,
    next: u64,
}

impl Board {
    /// Takes a free slot at once. None if there is none, or if somebody of the same or a better rank waits for that model.
    pub fn take(&mut self, want: &Want) -> Option<WorkerKey> {
        let fits = |desk: &Desk| if want.alone { desk.trial.is_none() && desk.idle(None) } else { desk.free() };
        if !self.desks.values().any(fits) {
            return None;
        }
        let rivals = |(_, other, _): &(Ticket, &Want, u64)| other.model == want.model && other.alone == want.alone;
        let mine = (want.rank, u64::MAX);
        if self.waiting().any(|wish| rivals(&wish)) {
            let all = self.waiting().filter(rivals).chain([(mine, want, u64::MAX)]);
            if self.shares.in_turn(all).first() != Some(&mine) {
                return None;
            }
        }
        self.seat(want, None)
    }

    /// Who waits, whose turn it is first.
    fn in_turn(&self) -> SmallVec<[Ticket; 16]> {
        let mut tenants = self.waiting.keys().map(|(rank, _)| rank.tenant);
        let first = tenants.next();
        if tenants.all(|tenant| Some(tenant) == first) {
            // One tenant's go by their ranks.
            let mut tickets: SmallVec<[Ticket; 16]> = self.waiting.keys().copied().collect();
            tickets.sort_unstable_by_key(|ticket| (ticket.0, self.waiting[ticket].turn));
            return tickets;
        }
        self.shares.in_turn(self.waiting())
    }

    /// Who waits, and when it has its turn among its equals.
    fn waiting(&self) -> impl Iterator<Item = (Ticket, &Want, u64)> {
        self.waiting.iter().map(|(ticket, wish)| (*ticket, &wish.want, wish.turn))
    }

    /// Whether a ticket waits for one more slot.
    #[must_use]
    pub fn is_waiting(&self, ticket: Ticket) -> bool {
        self.waiting.contains_key(&ticket)
    }

    /// Waits for a slot: [`Board::grant`] will name the ticket.
    pub fn queue(&mut self, want: Want) -> Ticket {
        self.queue_for(want, 1)
    }

    /// Waits for so many slots, 1 or more: [`Board::grant`] will name the ticket for each. Whoever has many to wait for
    /// does so at once: who asked again after each would be passed over by those who are quicker, whatever the shares.
    pub fn queue_for(&mut self, want: Want, slots: u32) -> Ticket {
        let ticket = (want.rank, self.next);
        self.next += 1;
        self.shares.wish(&want);
        self.waiting.insert(ticket, Wish { want, slots: slots.max(1), turn: ticket.1 });
        ticket
    }

    /// Waits for one slot more under a ticket that still waits.
    pub fn more(&mut self, ticket: Ticket) {
        if let Some(wish) = self.waiting.get_mut(&ticket) {
            wish.slots += 1;
        }
    }

    /// Waits for one slot less, and no more if that was the last. Returns whether slots have become free by that.
    pub fn fewer(&mut self, ticket: Ticket) -> bool {
        match self.waiting.get_mut(&ticket) {
            Some(wish) if wish.slots > 1 => {
                wish.slots -= 1;
                false
            }
            Some(_) | None => self.leave(ticket),
        }
    }

    /// Waits no more. Returns whether slots have become free by that.
    pub fn leave(&mut self, ticket: Ticket) -> bool {
        let Some(Wish { want, .. }) = self.waiting.remove(&ticket) else { return false };
        self.note_idle(&want.holder());
        want.alone && self.unreserve(ticket)
    }

    /// Gives a slot back: of that worker, and of who had it.
    pub fn release(&mut self, worker: WorkerKey, holder: &Holder) {
        if self.shares.give_back(holder) {
            self.note_idle(holder);
        }
        if let Some(desk) = self.desks.get_mut(&worker) {
            desk.in_flight = desk.in_flight.saturating_sub(1);
            desk.alone = desk.alone && desk.in_flight > 0;
        }
    }

    /// Notes whether a tenant has no wish for a model's slots.
    fn note_idle(&mut self, holder: &Holder) {
        let wishes = |want: &Want| {
            (want.rank.batch, want.rank.tenant, &want.model) == (holder.batch, holder.tenant, &holder.model)
        };
        if !self.waiting.values().any(|wish| wishes(&wish.want)) {
            self.shares.rest(holder);
        }
    }

    /// Gives free slots to those who wait, best first, until nothing fits.
    pub fn grant(&mut self) -> SmallVec<[(Ticket, WorkerKey); 4]> {
        let mut granted = self.grant_trials();
        granted.extend(self.grant_in_turn());
        // The next are for others of the same rank first: segments of a batch go on side by side, each in a task of its own,
        // so that all cores have something to do.
        for (ticket, _) in &granted {
            if let Some(wish) = self.waiting.get_mut(ticket) {
                wish.turn = self.next;
                self.next += 1;
            }
        }
        granted
    }

    /// Requests that find out whether a worker answers again are taken from those who wait in turns, whatever their rank
    /// among batches: those of the first may be what it fails, and must not be in the way of all others.
    fn grant_trials(&mut self) -> SmallVec<[(Ticket, WorkerKey); 4]> {
        let mut granted = SmallVec::new();
        let on_trial: SmallVec<[WorkerKey; 2]> =
            self.desks.iter().filter(|(_, desk)| desk.trial.is_some()).map(|(key, _)| *key).collect();
        for key in on_trial {
            while let Some((ticket, want)) = self.next_on_trial(key) {
                if let Some(desk) = self.desks.get_mut(&key) {
                    desk.give(want.alone);
                }
                self.shares.take(&want);
                granted.push((ticket, key));
                self.serve(ticket);
                if let Some(wish) = self.waiting.get_mut(&ticket) {
                    wish.turn = self.next;
                    self.next += 1;
                }
                if want.alone {
                    self.unreserve(ticket);
                }
            }
        }
        granted
    }

    /// Whose request finds out next whether a worker answers again.
    fn next_on_trial(&self, key: WorkerKey) -> Option<(Ticket, Want)> {
        let desk = self.desks.get(&key)?;
        let fits = |ticket: &Ticket, want: &Want| {
            let place = if want.alone { desk.idle(Some(*ticket)) } else { desk.has_place() && !desk.alone };
            place && desk.lists(&want.model)
        };
        let waiting = self.waiting.iter().filter(|(ticket, wish)| fits(ticket, &wish.want));
        let next = waiting.min_by_key(|(_, wish)| (wish.want.rank.batch, wish.turn));
        next.map(|(ticket, wish)| (*ticket, wish.want.clone()))
    }

    fn grant_in_turn(&mut self) -> SmallVec<[(Ticket, WorkerKey); 4]> {
        let mut granted = SmallVec::new();
        if self.waiting.is_empty() {
            return granted;
        }
        let mut again = true;
        while std::mem::take(&mut again) {
            'turns: for ticket in self.in_turn() {
                while let Some(Wish { want, .. }) = self.waiting.get(&ticket) {
                    if !want.alone && !self.desks.values().any(Desk::free) {
                        break;
                    }
                    let want = want.clone();
                    let Some(worker) = self.seat(&want, Some(ticket)) else {
                        if want.alone {
                            self.reserve(ticket, &want);
                        }
                        break;
                    };
                    granted.push((ticket, worker));
                    self.serve(ticket);
                    // Another worker was kept free for it: that is for the others now.
                    let freed = want.alone && self.unreserve(ticket);
                    // It has one more now: it may be another tenant's turn.
                    let others = self.waiting.keys().any(|(rank, _)| rank.tenant != want.rank.tenant);
                    if freed || others {
                        again = true;
                        break 'turns;
                    }
                }
            }
        }
        granted
    }

    /// One slot of those that a ticket waits for is there.
    fn serve(&mut self, ticket: Ticket) {
        if let Some(wish) = self.waiting.get_mut(&ticket) {
            wish.slots -= 1;
            if wish.slots == 0 {
                self.waiting.remove(&ticket);
            }
        }
    }

    /// Keeps a worker free for a request that must be alone, unless enough of them are kept free already: most of the
    /// fleet goes on with everything else.
    fn reserve(&mut self, ticket: Ticket, want: &Want) {
        if self.desks.values().any(|desk| desk.reserved == Some(ticket)) {
            return;
        }
        let serving = self.desks.values().filter(|desk| desk.open).count();
        let kept = self.desks.values().filter(|desk| desk.reserved.is_some()).count();
        if kept >= (serving / ISOLATION_SHARE).max(1) {
            return;
        }
        if let Some(desk) = self.best(want, |desk| desk.open && !desk.alone && desk.reserved.is_none()) {
            desk.1.reserved = Some(ticket);
        }
    }

    /// Returns whether a worker was kept free for it.
    fn unreserve(&mut self, ticket: Ticket) -> bool {
        let kept = self.desks.values_mut().find(|desk| desk.reserved == Some(ticket));
        kept.map(|desk| desk.reserved = None).is_some()
    }

    /// Says what a worker serves, whether it takes requests at all and at the moment, and how many at a time.
    pub fn set(
        &mut self,
        worker: WorkerKey,
        models: impl IntoIterator<Item = Arc<str>>,
        serving: bool,
        open: bool,
        limit: u32,
    ) {
        let waiting = &self.waiting;
        let desk = self.desks.entry(worker).or_default();
        desk.models = models.into_iter().collect();
        desk.patterns = desk.models.iter().filter(|model| names::is_pattern(model)).cloned().collect();
        desk.serving = serving;
        desk.open = serving && open;
        desk.limit = limit;
        if !desk.open {
            desk.trial = desk.trial.map(|trial| Trial { given: 0, ..trial });
        }
        let stays = |ticket: &Ticket| desk.open && waiting.get(ticket).is_some_and(|wish| desk.lists(&wish.want.model));
        desk.reserved = desk.reserved.filter(stays);
    }

    /// Changes how many requests a worker takes at a time. Those that are more than that stay out until they come back.
    /// Returns whether there are more slots than before.
    pub fn relimit(&mut self, worker: WorkerKey, limit: u32) -> bool {
        let Some(desk) = self.desks.get_mut(&worker) else { return false };
        std::mem::replace(&mut desk.limit, limit) < limit
    }

    /// Puts a worker on trial: it gets so many requests in all until it is closed or no longer on trial, whatever it still
    /// has of before. None: it is not on trial. Returns whether it may have free slots now.
    pub fn trial(&mut self, worker: WorkerKey, requests: Option<u32>) -> bool {
        let Some(desk) = self.desks.get_mut(&worker) else { return false };
        let given = desk.trial.map_or(0, |trial| trial.given);
        desk.trial = requests.map(|allowed| Trial { allowed, given });
        desk.open
    }

    /// What is in flight at a worker need not be there alone any longer. Returns whether that frees slots.
    pub fn join(&mut self, worker: WorkerKey) -> bool {
        self.desks.get_mut(&worker).is_some_and(|desk| std::mem::take(&mut desk.alone))
    }

    /// Whether all slots of a worker were out at some time since the last call.
    pub fn was_full(&mut self, worker: WorkerKey) -> bool {
        let Some(desk) = self.desks.get_mut(&worker) else { return false };
        let full = desk.in_flight >= desk.limit;
        std::mem::replace(&mut desk.was_full, full) || full
    }

    /// Opens or closes a worker. Returns whether that changed anything.
    #[cfg(test)]
    fn open(&mut self, worker: WorkerKey, open: bool) -> bool {
        match self.desks.get_mut(&worker) {
            Some(desk) if desk.open != open => {
                desk.open = open;
                desk.serving = open;
                desk.reserved = desk.reserved.filter(|_| open);
                true
            }
            Some(_) | None => false,
        }
    }

    /// Whether a worker takes requests at the moment.
    #[must_use]
    pub fn is_open(&self, worker: WorkerKey) -> bool {
        self.desks.get(&worker).is_some_and(|desk| desk.open)
    }

    /// Whether a worker takes requests at all.
    #[must_use]
    pub fn is_serving(&self, worker: WorkerKey) -> bool {
        self.desks.get(&worker).is_some_and(|desk| desk.serving)
    }

    /// Forgets a worker. Slots that are still out come back to nobody.
    pub fn remove(&mut self, worker: WorkerKey) {
        self.desks.remove(&worker);
    }

    /// Slots out and slots in all of a worker.
    #[must_use]
    pub fn load(&self, worker: WorkerKey) -> (u32, u32) {
        self.desks.get(&worker).map_or((0, 0), |desk| (desk.in_flight, desk.limit))
    }

    /// How many requests for a model can be in flight at once. 0: nobody serves it now.
    #[must_use]
    pub fn capacity(&self, model: &str) -> u32 {
        self.desks.values().filter(|desk| desk.serving && desk.lists(model)).map(|desk| desk.limit).sum()
    }

    /// The workers that serve a model now.
    pub fn serving<'a>(&'a self, model: &'a str) -> impl Iterator<Item = WorkerKey> + 'a {
        let serves = move |desk: &Desk| desk.serving && desk.lists(model);
        self.desks.iter().filter(move |(_, desk)| serves(desk)).map(|(key, _)| *key)
    }

    /// The models that are served now.
    #[must_use]
    pub fn served(&self) -> BTreeSet<Arc<str>> {
        let serving = self.desks.values().filter(|desk| desk.serving);
        let mut served: BTreeSet<Arc<str>> = serving.flat_map(|desk| desk.models.iter().cloned()).collect();
        if self.lists_patterns() {
            served.extend(self.wanted.iter().filter(|model| self.is_served(model)).cloned());
        }
        served
    }

    /// Whether a worker serves the model now.
    #[must_use]
    pub fn is_served(&self, model: &str) -> bool {
        self.serving(model).next().is_some()
    }

    /// Whether a worker that serves lists patterns.
    #[must_use]
    pub fn lists_patterns(&self) -> bool {
        self.desks.values().any(|desk| desk.serving && !desk.patterns.is_empty())
    }

    /// Says which models are wanted. Returns whether those are others than before.
    pub fn want(&mut self, models: BTreeSet<Arc<str>>) -> bool {
        let changed = self.wanted != models;
        self.wanted = models;
        changed
    }

    fn seat(&mut self, want: &Want, ticket: Option<Ticket>) -> Option<WorkerKey> {
        let fits = |desk: &Desk| if want.alone { desk.trial.is_none() && desk.idle(ticket) } else { desk.free() };
        let (key, desk) = self.best(want, fits)?;
        desk.give(want.alone);
        self.shares.take(want);
        Some(key)
    }

    /// The least loaded worker for a request, of those that fit.
    fn best(&mut self, want: &Want, fits: impl Fn(&Desk) -> bool) -> Option<(WorkerKey, &mut Desk)> {
        let serves = |desk: &Desk| desk.open && desk.lists(&want.model);
        // A worker that failed the request is better than none, but only if there is no other that serves the model.
        let fresh = self.desks.iter().any(|(key, desk)| serves(desk) && !want.avoid.contains(key));
        let (key, desk) = self
            .desks
            .iter_mut()
            .filter(|(key, desk)| serves(desk) && fits(desk) && !(fresh && want.avoid.contains(key)))
            .min_by(|(_, a), (_, b)| {
                // in_flight / limit, without dividing.
                (u64::from(a.in_flight) * u64::from(b.limit)).cmp(&(u64::from(b.in_flight) * u64::from(a.limit)))
            })?;
        Some((*key, desk))
    }
}

impl Desk {
    /// Whether it lists the model, or a pattern that stands for it.
    fn lists(&self, model: &str) -> bool {
        self.models.contains(model) || self.patterns.iter().any(|pattern| names::stands_for(pattern, model))
    }

    /// It gets one request more.
    fn give(&mut self, alone: bool) {
        self.in_flight += 1;
        match &mut self.trial {
            // On trial it has as few as it is given, whatever its limit.
            Some(trial) => trial.given += 1,
            None => self.was_full |= self.in_flight >= self.limit,
        }
        if alone {
            self.alone = true;
            self.reserved = None;
        }
    }

    fn free(&self) -> bool {
        self.trial.is_none() && self.has_place() && !self.alone && self.reserved.is_none()
    }

    /// On trial, what is left of before may hang and must not be in the way.
    fn has_place(&self) -> bool {
        self.open
            && match self.trial {
                None => self.in_flight < self.limit,
                Some(trial) => trial.given < trial.allowed && self.in_flight < self.limit.saturating_add(trial.allowed),
            }
    }

    /// Nothing is in flight there, and it is not kept free for anybody else.
    fn idle(&self, ticket: Option<Ticket>) -> bool {
        self.has_place()
            && self.in_flight == 0
            && self.limit > 0
            && self.reserved.is_none_or(|other| Some(other) == ticket)
    }
}

#[cfg(test)]
mod tests;
