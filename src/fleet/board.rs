//! Who gets which worker's next free slot: the pure core of dispatch. No clock, no locks, no IO.
//!
//! A slot is one request that a worker may have in flight. Whoever wants one names a model and a [`Rank`]; free slots go to
//! the best rank first, then to who asked first, and among the workers that serve the model to the least loaded one.
//!
//! A request that may be what kills workers is sent alone: it gets a worker that has nothing else in flight, and nothing
//! else goes there until it is back. If all are at work, one of them is reserved: it gets nothing new until it is idle.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use smallvec::SmallVec;

use crate::domain::{Priority, Timestamp};

/// Which worker, on this node, for as long as this process knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerKey(pub u32);

/// Who goes first: interactive calls, then higher priority, then the earlier deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    batch: bool,
    priority: Reverse<Priority>,
    expires_at: Timestamp,
}

impl Rank {
    /// Ahead of all batch work.
    #[must_use]
    pub fn interactive() -> Self {
        Self { batch: false, priority: Reverse(Priority::default()), expires_at: Timestamp(0) }
    }

    /// A batch's.
    #[must_use]
    pub fn batch(priority: Priority, expires_at: Timestamp) -> Self {
        Self { batch: true, priority: Reverse(priority), expires_at }
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

/// A waiting [`Want`].
pub type Ticket = (Rank, u64);

/// What the board knows of a worker.
#[derive(Clone, Debug, Default)]
struct Desk {
    models: BTreeSet<Arc<str>>,
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
    /// Who gets it as soon as nothing is in flight there.
    reserved: Option<Ticket>,
}

/// All workers and all who wait for one.
#[derive(Debug, Default)]
pub struct Board {
    desks: BTreeMap<WorkerKey, Desk>,
    waiting: BTreeMap<Ticket, Want>,
    next: u64,
}

impl Board {
    /// Takes a free slot at once. None if there is none, or if somebody of the same or a better rank waits for that model.
    pub fn take(&mut self, want: &Want) -> Option<WorkerKey> {
        let ahead = self
            .waiting
            .range(..=(want.rank, u64::MAX))
            .any(|(_, other)| other.model == want.model && other.alone == want.alone);
        if ahead { None } else { self.seat(want, None) }
    }

    /// Waits for a slot: [`Board::grant`] will name the ticket.
    pub fn queue(&mut self, want: Want) -> Ticket {
        let ticket = (want.rank, self.next);
        self.next += 1;
        self.waiting.insert(ticket, want);
        ticket
    }

    /// Waits no more. Returns whether slots have become free by that.
    pub fn leave(&mut self, ticket: Ticket) -> bool {
        self.waiting.remove(&ticket).is_some_and(|want| want.alone) && self.unreserve(ticket)
    }

    /// Gives a slot back.
    pub fn release(&mut self, worker: WorkerKey) {
        if let Some(desk) = self.desks.get_mut(&worker) {
            desk.in_flight = desk.in_flight.saturating_sub(1);
            desk.alone = desk.alone && desk.in_flight > 0;
        }
    }

    /// Gives free slots to those who wait, best first, until nothing fits.
    pub fn grant(&mut self) -> SmallVec<[(Ticket, WorkerKey); 4]> {
        let mut granted = SmallVec::new();
        if self.waiting.is_empty() {
            return granted;
        }
        let tickets: SmallVec<[Ticket; 16]> = self.waiting.keys().copied().collect();
        let mut again = true;
        while std::mem::take(&mut again) {
            for ticket in &tickets {
                let Some(want) = self.waiting.get(ticket) else { continue };
                if !want.alone && !self.desks.values().any(Desk::free) {
                    continue;
                }
                let want = want.clone();
                if let Some(worker) = self.seat(&want, Some(*ticket)) {
                    self.waiting.remove(ticket);
                    granted.push((*ticket, worker));
                    // Another worker was kept free for it: that is for the others now.
                    again |= want.alone && self.unreserve(*ticket);
                } else if want.alone {
                    self.reserve(*ticket, &want);
                }
            }
        }
        granted
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
        desk.serving = serving;
        desk.open = serving && open;
        desk.limit = limit;
        let stays = |ticket: &Ticket| desk.open && waiting.get(ticket).is_some_and(|w| desk.models.contains(&w.model));
        desk.reserved = desk.reserved.filter(stays);
    }

    /// Changes how many requests a worker takes at a time. Those that are more than that stay out until they come back.
    /// Returns whether there are more slots than before.
    pub fn relimit(&mut self, worker: WorkerKey, limit: u32) -> bool {
        let Some(desk) = self.desks.get_mut(&worker) else { return false };
        std::mem::replace(&mut desk.limit, limit) < limit
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
        self.desks.values().filter(|desk| desk.serving && desk.models.contains(model)).map(|desk| desk.limit).sum()
    }

    /// The models that are served now.
    #[must_use]
    pub fn served(&self) -> BTreeSet<Arc<str>> {
        self.desks.values().filter(|desk| desk.serving).flat_map(|desk| desk.models.iter().cloned()).collect()
    }

    fn seat(&mut self, want: &Want, ticket: Option<Ticket>) -> Option<WorkerKey> {
        let fits = |desk: &Desk| if want.alone { desk.idle(ticket) } else { desk.free() };
        let (key, desk) = self.best(want, fits)?;
        desk.in_flight += 1;
        desk.was_full |= desk.in_flight >= desk.limit;
        if want.alone {
            desk.alone = true;
            desk.reserved = None;
        }
        Some(key)
    }

    /// The least loaded worker for a request, of those that fit.
    fn best(&mut self, want: &Want, fits: impl Fn(&Desk) -> bool) -> Option<(WorkerKey, &mut Desk)> {
        let serves = |desk: &Desk| desk.open && desk.models.contains(&want.model);
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
    fn free(&self) -> bool {
        self.open && self.in_flight < self.limit && !self.alone && self.reserved.is_none()
    }

    /// Nothing is in flight there, and it is not kept free for anybody else.
    fn idle(&self, ticket: Option<Ticket>) -> bool {
        self.open && self.in_flight == 0 && self.limit > 0 && self.reserved.is_none_or(|other| Some(other) == ticket)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn want(model: &str, rank: Rank, avoid: &[u32]) -> Want {
        Want { model: model.into(), rank, avoid: avoid.iter().map(|key| WorkerKey(*key)).collect(), alone: false }
    }

    fn alone(model: &str) -> Want {
        Want { alone: true, ..want(model, rank(0, 5), &[]) }
    }

    fn rank(priority: i32, expires_at: i64) -> Rank {
        Rank::batch(Priority::new(priority).unwrap(), Timestamp(expires_at))
    }

    fn board(workers: &[(u32, &[&str], u32)]) -> Board {
        let mut board = Board::default();
        for (key, models, limit) in workers {
            board.set(WorkerKey(*key), models.iter().map(|model| Arc::from(*model)), true, true, *limit);
        }
        board
    }

    #[test]
    fn the_best_rank_goes_first_then_who_asked_first() {
        let mut board = board(&[(1, &["m"], 1)]);
        assert_eq!(board.take(&want("m", rank(0, 5), &[])), Some(WorkerKey(1)));
        let late = board.queue(want("m", rank(0, 9), &[]));
        let low = board.queue(want("m", rank(-1, 1), &[]));
        let early = board.queue(want("m", rank(0, 2), &[]));
        let early_too = board.queue(want("m", rank(0, 2), &[]));
        let high = board.queue(want("m", rank(1, 99), &[]));
        let now = board.queue(want("m", Rank::interactive(), &[]));
        let mut order = Vec::new();
        for _ in 0..6 {
            board.release(WorkerKey(1));
            order.extend(board.grant().into_iter().map(|(ticket, _)| ticket));
        }
        assert_eq!(order, [now, high, early, early_too, late, low]);
    }

    #[test]
    fn a_limit_that_falls_takes_no_slot_back_and_one_that_grows_gives_more() {
        let mut board = board(&[(1, &["m"], 3)]);
        let any = want("m", rank(0, 5), &[]);
        let take = |board: &mut Board| board.take(&any).is_some();
        assert!(take(&mut board) && take(&mut board) && !board.was_full(WorkerKey(1)));
        assert!(take(&mut board) && !take(&mut board));
        board.release(WorkerKey(1));
        assert!(board.was_full(WorkerKey(1)) && !board.was_full(WorkerKey(1)), "since the last question");
        assert!(!board.relimit(WorkerKey(1), 1));
        assert_eq!(board.load(WorkerKey(1)), (2, 1));
        board.release(WorkerKey(1));
        assert!(!take(&mut board));
        assert!(board.relimit(WorkerKey(1), 4));
        assert!(take(&mut board) && take(&mut board) && take(&mut board) && !take(&mut board));
        assert!(!board.relimit(WorkerKey(9), 4), "there is no such worker");
    }

    #[test]
    fn nobody_jumps_the_queue() {
        let mut board = board(&[(1, &["m"], 1), (2, &["other"], 1)]);
        board.take(&want("m", rank(0, 5), &[])).unwrap();
        board.queue(want("m", rank(0, 5), &[]));
        board.release(WorkerKey(1));
        assert_eq!(board.take(&want("m", rank(0, 5), &[])), None, "somebody of the same rank waits");
        assert_eq!(board.take(&want("other", rank(0, 5), &[])), Some(WorkerKey(2)), "for another model nobody waits");
        assert_eq!(board.take(&want("m", Rank::interactive(), &[])), Some(WorkerKey(1)), "a better rank may");
    }

    #[test]
    fn a_worker_that_failed_it_is_the_last_choice() {
        let mut board = board(&[(1, &["m"], 2), (2, &["m"], 1)]);
        assert_eq!(board.take(&want("m", rank(0, 1), &[1])), Some(WorkerKey(2)));
        assert_eq!(board.take(&want("m", rank(0, 1), &[1])), None, "better to wait for the other one");
        assert_eq!(board.take(&want("m", rank(0, 1), &[1, 2])), Some(WorkerKey(1)), "all have failed it");
        board.open(WorkerKey(2), false);
        assert_eq!(board.take(&want("m", rank(0, 1), &[1])), Some(WorkerKey(1)), "no other is there");
    }

    #[test]
    fn a_closed_worker_gets_nothing_and_opens_to_those_who_wait() {
        let mut board = board(&[(1, &["m"], 8)]);
        assert!(board.open(WorkerKey(1), false));
        assert!(!board.open(WorkerKey(1), false));
        assert_eq!(board.take(&want("m", rank(0, 1), &[])), None);
        assert_eq!(board.capacity("m"), 0);
        let ticket = board.queue(want("m", rank(0, 1), &[]));
        assert!(board.grant().is_empty());
        board.open(WorkerKey(1), true);
        assert_eq!(board.grant().as_slice(), [(ticket, WorkerKey(1))]);
        assert_eq!(board.capacity("m"), 8);
    }

    #[test]
    fn who_must_be_alone_gets_an_idle_worker_for_itself() {
        let mut board = board(&[(1, &["m"], 4)]);
        let normal = want("m", rank(0, 5), &[]);
        board.take(&normal).unwrap();
        board.take(&normal).unwrap();
        assert_eq!(board.take(&alone("m")), None);
        let ticket = board.queue(alone("m"));
        assert!(board.grant().is_empty());
        assert_eq!(board.take(&normal), None, "it is kept free: otherwise it would never be idle");
        let next = board.queue(want("m", Rank::interactive(), &[]));
        assert!(board.grant().is_empty());
        board.release(WorkerKey(1));
        assert!(board.grant().is_empty());
        board.release(WorkerKey(1));
        assert_eq!(board.grant().as_slice(), [(ticket, WorkerKey(1))]);
        assert_eq!(board.take(&normal), None, "nothing else goes there meanwhile");
        board.release(WorkerKey(1));
        assert_eq!(board.grant().as_slice(), [(next, WorkerKey(1))]);
    }

    #[test]
    fn a_kept_worker_that_is_not_needed_is_for_all_again() {
        let mut board = board(&[(1, &["m"], 2), (2, &["m"], 1)]);
        let normal = want("m", rank(0, 5), &[]);
        for _ in 0..3 {
            board.take(&normal).unwrap();
        }
        let first = board.queue(alone("m"));
        let second = board.queue(alone("m"));
        assert!(board.grant().is_empty());
        board.release(WorkerKey(1));
        let kept = if board.take(&normal).is_some() { WorkerKey(2) } else { WorkerKey(1) };
        assert!(board.leave(first));
        assert!(!board.leave(second), "one at a time is kept");
        board.grant();
        board.release(kept);
        assert!(board.take(&normal).is_some());
        let last = board.queue(alone("m"));
        board.grant();
        for key in [1, 2] {
            board.open(WorkerKey(key), false);
            board.open(WorkerKey(key), true);
        }
        assert!(
            board.take(&normal).is_some() || board.desks[&WorkerKey(1)].in_flight == 2,
            "a closed worker is not kept"
        );
        board.leave(last);
    }

    proptest! {
        #[test]
        fn limits_hold_and_no_slot_is_idle_while_somebody_waits(steps in proptest::collection::vec((0u8..5, 0u32..3, 0i32..3, proptest::bool::weighted(0.2)), 1..200)) {
            let mut board = board(&[(0, &["a"], 2), (1, &["a", "b"], 3), (2, &["b"], 1)]);
            let mut out: Vec<WorkerKey> = Vec::new();
            let mut tickets = Vec::new();
            for (step, pick, priority, sole) in steps {
                let model = if pick == 0 { "a" } else { "b" };
                let wish = Want { alone: sole, ..want(model, rank(priority - 1, i64::from(pick)), &[pick]) };
                match step {
                    0 => out.extend(board.take(&wish)),
                    1 => tickets.push(board.queue(wish)),
                    2 if !out.is_empty() => board.release(out.swap_remove(pick as usize % out.len())),
                    3 if !tickets.is_empty() => {
                        board.leave(tickets.swap_remove(0));
                    }
                    _ => {
                        let open = priority != 0;
                        board.open(WorkerKey(pick), open);
                    }
                }
                for (ticket, worker) in board.grant() {
                    tickets.retain(|other| *other != ticket);
                    out.push(worker);
                }
                for (key, desk) in &board.desks {
                    prop_assert!(desk.in_flight <= desk.limit);
                    prop_assert!(!desk.alone || desk.in_flight == 1);
                    prop_assert!(desk.reserved.is_none_or(|ticket| desk.open && board.waiting.contains_key(&ticket)));
                    prop_assert_eq!(desk.in_flight as usize, out.iter().filter(|worker| *worker == key).count());
                }
                for wish in board.waiting.values() {
                    let fits = board.desks.iter().any(|(key, desk)| (if wish.alone { desk.idle(None) } else { desk.free() }) && desk.models.contains(&wish.model) && !wish.avoid.contains(key));
                    prop_assert!(!fits, "a fitting slot is idle");
                }
            }
        }
    }
}
