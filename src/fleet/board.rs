//! Decides who gets a worker's next free slot. Pure: no clock, no locks, no IO.
//!
//! A slot is the right to have one request in flight at a worker. A [`Want`] names a model and a [`Rank`]. Free slots
//! go to the best rank first, among equals to the one that has waited longest since it asked or was last given slots;
//! among the workers that serve the model the least loaded one is used.
//!
//! Within a priority, and among interactive calls, tenants share: the next slot goes to the tenant with the fewest of
//! the model's slots per weight ([`shares`]). So each gets its share while it has enough to send, a small batch does
//! not wait behind a large one of another tenant, and unused slots go to the others. A tenant's own batches go by their
//! deadlines.
//!
//! A request that may be what kills workers is sent alone: it gets a worker that has nothing else in flight, and
//! nothing else goes there until it is back. If all workers are busy, one of them is reserved: it gets nothing new
//! until it is idle.

mod desk;
mod shares;
mod want;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use smallvec::SmallVec;

use super::names;
use desk::{Desk, Trial};
use shares::Shares;
pub use want::{Holder, Rank, Tenant, Ticket, Want, WorkerKey};

/// One in this many workers, and at least one, may be reserved for requests that must be alone.
const ISOLATION_SHARE: usize = 4;

/// A waiting [`Want`].
#[derive(Clone, Debug)]
struct Wish {
    want: Want,
    /// The slots it still waits for, 1 or more.
    slots: u32,
    /// Its turn among wishes of the same rank; the smallest goes first.
    turn: u64,
}

/// All workers and all waiting wishes.
#[derive(Debug, Default)]
pub struct Board {
    desks: BTreeMap<WorkerKey, Desk>,
    waiting: BTreeMap<Ticket, Wish>,
    /// The models that batches need, matched against patterns.
    wanted: BTreeSet<Arc<str>>,
    shares: Shares,
    next: u64,
}

impl Board {
    /// Takes a free slot at once. `None` if there is none, or if a wish of the same or a better rank waits for the
    /// model.
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

    /// The tickets in the order in which they get slots.
    fn in_turn(&self) -> SmallVec<[Ticket; 16]> {
        let mut tenants = self.waiting.keys().map(|(rank, _)| rank.tenant);
        let first = tenants.next();
        if tenants.all(|tenant| Some(tenant) == first) {
            // A single tenant's wishes go by rank.
            let mut tickets: SmallVec<[Ticket; 16]> = self.waiting.keys().copied().collect();
            tickets.sort_unstable_by_key(|ticket| (ticket.0, self.waiting[ticket].turn));
            return tickets;
        }
        self.shares.in_turn(self.waiting())
    }

    /// The waiting wishes with their turns.
    fn waiting(&self) -> impl Iterator<Item = (Ticket, &Want, u64)> {
        self.waiting.iter().map(|(ticket, wish)| (*ticket, &wish.want, wish.turn))
    }

    /// Whether a ticket waits for one more slot.
    #[must_use]
    pub fn is_waiting(&self, ticket: Ticket) -> bool {
        self.waiting.contains_key(&ticket)
    }

    /// Waits for a slot: [`Board::grant`] will return the ticket.
    pub fn queue(&mut self, want: Want) -> Ticket {
        self.queue_for(want, 1)
    }

    /// Waits for this many slots, at least 1: [`Board::grant`] returns the ticket once for each. A caller that needs
    /// many slots must ask for all of them at once: if it asked again after each, quicker callers would overtake it
    /// regardless of the shares.
    pub fn queue_for(&mut self, want: Want, slots: u32) -> Ticket {
        let ticket = (want.rank, self.next);
        self.next += 1;
        self.shares.wish(&want);
        self.waiting.insert(ticket, Wish { want, slots: slots.max(1), turn: ticket.1 });
        ticket
    }

    /// Adds a slot to a wish that still waits.
    pub fn more(&mut self, ticket: Ticket) {
        if let Some(wish) = self.waiting.get_mut(&ticket) {
            wish.slots += 1;
        }
    }

    /// Removes a slot from a wish, and the wish if that was its last. Returns whether that has freed slots.
    pub fn fewer(&mut self, ticket: Ticket) -> bool {
        match self.waiting.get_mut(&ticket) {
            Some(wish) if wish.slots > 1 => {
                wish.slots -= 1;
                false
            }
            Some(_) | None => self.leave(ticket),
        }
    }

    /// Removes a wish. Returns whether that has freed slots.
    pub fn leave(&mut self, ticket: Ticket) -> bool {
        let Some(Wish { want, .. }) = self.waiting.remove(&ticket) else { return false };
        self.note_idle(&want.holder());
        want.alone && self.unreserve(ticket)
    }

    /// Returns a holder's slot at a worker.
    pub fn release(&mut self, worker: WorkerKey, holder: &Holder) {
        if self.shares.give_back(holder) {
            self.note_idle(holder);
        }
        if let Some(desk) = self.desks.get_mut(&worker) {
            desk.in_flight = desk.in_flight.saturating_sub(1);
            desk.live = desk.live.saturating_sub(u32::from(!holder.batch));
            desk.alone = desk.alone && desk.in_flight > 0;
        }
    }

    /// Marks the holder as idle if its tenant has no wish for the model.
    fn note_idle(&mut self, holder: &Holder) {
        let wishes = |want: &Want| {
            (want.rank.batch, want.rank.tenant, &want.model) == (holder.batch, holder.tenant, &holder.model)
        };
        if !self.waiting.values().any(|wish| wishes(&wish.want)) {
            self.shares.rest(holder);
        }
    }

    /// Gives free slots to waiting wishes, best first, until no free slot fits a wish.
    pub fn grant(&mut self) -> SmallVec<[(Ticket, WorkerKey); 4]> {
        let mut granted = self.grant_trials();
        granted.extend(self.grant_in_turn());
        // Other wishes of the same rank go next: the segments of a batch advance side by side, each in a task of its
        // own, so that all cores have work.
        for (ticket, _) in &granted {
            if let Some(wish) = self.waiting.get_mut(ticket) {
                wish.turn = self.next;
                self.next += 1;
            }
        }
        granted
    }

    /// Gives trial slots. Trial requests come from all waiting wishes in turn, whatever their rank: the first wish's
    /// requests may be what the worker fails, and must not block the others.
    fn grant_trials(&mut self) -> SmallVec<[(Ticket, WorkerKey); 4]> {
        let mut granted = SmallVec::new();
        let on_trial: SmallVec<[WorkerKey; 2]> =
            self.desks.iter().filter(|(_, desk)| desk.tries_something()).map(|(key, _)| *key).collect();
        for key in on_trial {
            while let Some((ticket, want)) = self.next_on_trial(key) {
                if let Some(desk) = self.desks.get_mut(&key) {
                    desk.give(&want);
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

    /// The wish whose request goes to a worker on trial next.
    fn next_on_trial(&self, key: WorkerKey) -> Option<(Ticket, Want)> {
        let desk = self.desks.get(&key)?;
        let fits = |ticket: &Ticket, want: &Want| {
            let place = if want.alone { desk.idle(Some(*ticket)) } else { desk.has_place() && !desk.alone };
            let on_trial = match desk.held.get(&want.model) {
                Some(trial) => trial.given < trial.allowed,
                None => desk.trial.is_some(),
            };
            place && on_trial && desk.lists(&want.model)
        };
        let waiting = self.waiting.iter().filter(|(ticket, wish)| fits(ticket, &wish.want));
        let next = waiting.min_by_key(|(_, wish)| wish.turn);
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
                    // A worker that was reserved for it is free for others now.
                    let freed = want.alone && self.unreserve(ticket);
                    // Its share has grown, so another tenant may be next.
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

    /// Takes one slot off a wish.
    fn serve(&mut self, ticket: Ticket) {
        if let Some(wish) = self.waiting.get_mut(&ticket) {
            wish.slots -= 1;
            if wish.slots == 0 {
                self.waiting.remove(&ticket);
            }
        }
    }

    /// Reserves a worker for a request that must be alone, unless enough are reserved: most of the fleet keeps working.
    fn reserve(&mut self, ticket: Ticket, want: &Want) {
        if self.desks.values().any(|desk| desk.reserved == Some(ticket)) {
            return;
        }
        let serving = self.desks.values().filter(|desk| desk.open).count();
        let kept = self.desks.values().filter(|desk| desk.reserved.is_some()).count();
        if kept >= (serving / ISOLATION_SHARE).max(1) {
            return;
        }
        if let Some(desk) = self.best(want, true, |desk| !desk.alone && desk.reserved.is_none()) {
            desk.1.reserved = Some(ticket);
        }
    }

    /// Ends a reservation. Returns whether there was one.
    fn unreserve(&mut self, ticket: Ticket) -> bool {
        let kept = self.desks.values_mut().find(|desk| desk.reserved == Some(ticket));
        kept.map(|desk| desk.reserved = None).is_some()
    }

    /// Sets a worker's models, whether it takes requests in general and at the moment, and its limit.
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

    /// Changes a worker's limit. Slots in use above it stay in use until they are returned. Returns whether there are
    /// more slots than before.
    pub fn relimit(&mut self, worker: WorkerKey, limit: u32) -> bool {
        let Some(desk) = self.desks.get_mut(&worker) else { return false };
        std::mem::replace(&mut desk.limit, limit) < limit
    }

    /// Puts a worker on trial: it gets this many requests in all until it is closed or no longer on trial, regardless
    /// of earlier ones still in flight. `None` ends the trial. Returns whether it may have free slots now.
    pub fn trial(&mut self, worker: WorkerKey, requests: Option<u32>) -> bool {
        let Some(desk) = self.desks.get_mut(&worker) else { return false };
        let given = desk.trial.map_or(0, |trial| trial.given);
        desk.trial = requests.map(|allowed| Trial { allowed, given });
        desk.open
    }

    /// Says for which models of a worker not everything may be sent, and how many requests find out whether they are answered
    /// again, in all until the model is closed (0) or no longer held. Returns whether there may be free slots now.
    pub fn hold(&mut self, worker: WorkerKey, models: Vec<(Arc<str>, u32)>) -> bool {
        let Some(desk) = self.desks.get_mut(&worker) else { return false };
        let moved = !models.is_empty() || !desk.held.is_empty();
        let before = std::mem::take(&mut desk.held);
        let hold = |(model, allowed): (Arc<str>, u32)| {
            let given = before.get(&model).map_or(0, |trial| trial.given);
            (model, Trial { allowed, given: if allowed == 0 { 0 } else { given } })
        };
        desk.held = models.into_iter().map(hold).collect();
        // A request that is to be alone keeps the worker from the other models no longer than it may be sent.
        let may_be_sent = |ticket: &Ticket| {
            let model = self.waiting.get(ticket).map(|wish| &wish.want.model);
            model.is_some_and(|model| desk.held.get(model).is_none_or(|trial| trial.given < trial.allowed))
        };
        desk.reserved = desk.reserved.filter(may_be_sent);
        moved
    }

    /// Allows other requests next to one that was alone at a worker. Returns whether that frees slots.
    pub fn join(&mut self, worker: WorkerKey) -> bool {
        self.desks.get_mut(&worker).is_some_and(|desk| std::mem::take(&mut desk.alone))
    }

    /// Whether all slots of a worker were in use at some time since the last call.
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

    /// Removes a worker. Returning its slots in use has no effect then.
    pub fn remove(&mut self, worker: WorkerKey) {
        self.desks.remove(&worker);
    }

    /// A worker's slots in use, and its slots in all.
    #[must_use]
    pub fn load(&self, worker: WorkerKey) -> (u32, u32) {
        self.desks.get(&worker).map_or((0, 0), |desk| (desk.in_flight, desk.limit))
    }

    /// How many of a worker's slots in use are of no batch.
    #[must_use]
    pub fn live(&self, worker: WorkerKey) -> u32 {
        self.desks.get(&worker).map_or(0, |desk| desk.live)
    }

    /// Whether a request waits that this worker could take, had it a free slot.
    #[must_use]
    pub fn is_wanted(&self, worker: WorkerKey) -> bool {
        let desk = self.desks.get(&worker).filter(|desk| desk.serving);
        desk.is_some_and(|desk| self.waiting.values().any(|wish| desk.lists(&wish.want.model)))
    }

    /// The number of requests for a model that can be in flight at once. 0: no worker serves it now.
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

    /// Whether any serving worker lists patterns.
    #[must_use]
    pub fn lists_patterns(&self) -> bool {
        self.desks.values().any(|desk| desk.serving && !desk.patterns.is_empty())
    }

    /// Sets the models that batches need. Returns whether they changed.
    pub fn want(&mut self, models: BTreeSet<Arc<str>>) -> bool {
        let changed = self.wanted != models;
        self.wanted = models;
        changed
    }

    fn seat(&mut self, want: &Want, ticket: Option<Ticket>) -> Option<WorkerKey> {
        let fits = |desk: &Desk| if want.alone { desk.trial.is_none() && desk.idle(ticket) } else { desk.free() };
        let (key, desk) = self.best(want, false, fits)?;
        desk.give(want);
        self.shares.take(want);
        Some(key)
    }

    /// The least loaded worker for a request, of those that fit. `trial`: also one where its model is held, if the request
    /// may find out whether that is answered again.
    fn best(&mut self, want: &Want, trial: bool, fits: impl Fn(&Desk) -> bool) -> Option<(WorkerKey, &mut Desk)> {
        let takes = |desk: &Desk| desk.held.get(&want.model).is_none_or(|held| trial && held.given < held.allowed);
        let serves = |desk: &Desk| desk.open && desk.lists(&want.model) && takes(desk);
        // A worker that failed the request is used only if no other serves the model.
        let fresh = self.desks.iter().any(|(key, desk)| serves(desk) && !want.avoid.contains(key));
        let (key, desk) = self
            .desks
            .iter_mut()
            .filter(|(key, desk)| serves(desk) && fits(desk) && !(fresh && want.avoid.contains(key)))
            .min_by(|(_, a), (_, b)| {
                // Compares in_flight / limit without dividing.
                (u64::from(a.in_flight) * u64::from(b.limit)).cmp(&(u64::from(b.in_flight) * u64::from(a.limit)))
            })?;
        Some((*key, desk))
    }
}

#[cfg(test)]
mod tests;
