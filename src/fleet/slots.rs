//! Gives slots out and takes them back: the board under its lock, and the waiting requests.

use std::{
    collections::BTreeMap,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use reqwest::RequestBuilder;
use smallvec::SmallVec;
use tokio::{
    sync::{
        mpsc::{self, error::TryRecvError},
        oneshot,
    },
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{
    Inner, Worker, WorkerKey,
    board::{Board, Holder, Tenant, Ticket, Want},
    outage::Gate,
};
use crate::config::SecretSetting;

/// The board and the waiting requests.
#[derive(Default)]
pub(super) struct Desks {
    pub(super) board: Board,
    waiting: BTreeMap<Ticket, (Waiter, Holder)>,
    lines: BTreeMap<LineKey, Ticket>,
    next_call: u64,
    pub(super) next_key: u32,
}

/// The receiver of the slots that a ticket gets.
enum Waiter {
    /// A segment that waits for many slots with one ticket.
    Many(mpsc::UnboundedSender<Slot>),
    /// Calls that wait for one each, first come, first served. They wait with one ticket, so that the board's work does not
    /// grow with the number of calls.
    Line(LineKey, BTreeMap<u64, oneshot::Sender<Slot>>),
}

/// Calls with the same of these are the same to the board.
type LineKey = (Tenant, Arc<str>, SmallVec<[WorkerKey; 4]>);

/// The receiver of one granted slot.
enum Receiver {
    Many(mpsc::UnboundedSender<Slot>),
    Call(oneshot::Sender<Slot>),
}

impl Receiver {
    /// If the waiter is gone, the slot is dropped, which returns it.
    fn send(self, slot: Slot) {
        match self {
            Self::Many(sender) => drop(sender.send(slot)),
            Self::Call(sender) => drop(sender.send(slot)),
        }
    }
}

impl Desks {
    /// Removes a ticket.
    fn forget(&mut self, ticket: Ticket) {
        if let Some((Waiter::Line(key, _), _)) = self.waiting.remove(&ticket) {
            self.lines.remove(&key);
        }
    }
}

impl Inner {
    pub(super) fn bearer(&self) -> Option<&str> {
        self.options.api_key.as_ref().map(SecretSetting::expose)
    }

    pub(super) fn authorized(&self, request: RequestBuilder) -> RequestBuilder {
        match self.bearer() {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// The slot that the board has just given out.
    pub(super) fn slot(self: &Arc<Self>, key: WorkerKey, holder: Holder) -> Option<Slot> {
        let worker = self.workers.lock().get(&key).cloned();
        match worker {
            Some(worker) => {
                Some(Slot { abandoned: worker.abandoned(), fleet: self.clone(), worker, holder, out: true })
            }
            None => {
                self.desks.lock().board.release(key, &holder);
                None
            }
        }
    }

    /// Gives free slots to waiting requests.
    pub(super) fn grant(self: &Arc<Self>) {
        let granted: SmallVec<[(Receiver, Holder, WorkerKey); 4]> = {
            let mut desks = self.desks.lock();
            let granted = desks.board.grant();
            // Both are entered and left together.
            let slots = granted.iter().filter_map(|(ticket, key)| {
                let (waiter, holder) = desks.waiting.get_mut(ticket)?;
                let receiver = match waiter {
                    Waiter::Many(sender) => Receiver::Many(sender.clone()),
                    Waiter::Line(_, calls) => Receiver::Call(calls.pop_first()?.1),
                };
                Some((receiver, holder.clone(), *key))
            });
            let slots = slots.collect();
            for (ticket, _) in granted {
                if !desks.board.is_waiting(ticket) {
                    desks.forget(ticket);
                }
            }
            slots
        };
        for (receiver, holder, key) in granted {
            if let Some(slot) = self.slot(key, holder) {
                receiver.send(slot);
            }
        }
    }

    /// Tells the board how a worker is now. One that is forgotten stays so: a probe may be under way meanwhile, and slots of a
    /// worker that nobody knows are no use to who waits.
    pub(super) fn refresh(self: &Arc<Self>, worker: &Worker) {
        let (models, serving, gate, held) = {
            let (state, now) = (worker.state.lock(), Instant::now());
            (state.models.clone(), state.is_serving(), state.gate(now), state.outages.held(now))
        };
        let held = held.into_iter().map(|(model, gate)| match gate {
            Gate::Trial(requests) => (model, requests),
            Gate::Open | Gate::Closed => (model, 0),
        });
        let (moved, opened) = {
            let mut desks = self.desks.lock();
            if worker.gone.is_cancelled() {
                return;
            }
            let (before, was_serving) = (desks.board.served(), desks.board.is_serving(worker.key));
            desks.board.set(worker.key, models, serving, gate != Gate::Closed, worker.limit());
            let opened = match gate {
                Gate::Closed => false,
                Gate::Open => desks.board.trial(worker.key, None),
                Gate::Trial(requests) => desks.board.trial(worker.key, Some(requests)),
            };
            let opened = desks.board.hold(worker.key, held.collect()) || opened;
            (was_serving != serving || before != desks.board.served(), opened)
        };
        if moved {
            self.topology.send_modify(|version| *version += 1);
        }
        if moved || opened {
            self.grant();
        }
    }

    /// Changes a worker's limit.
    pub(super) fn relimit(self: &Arc<Self>, worker: &Worker, limit: u32) {
        worker.set_limit(limit);
        if self.desks.lock().board.relimit(worker.key, limit) {
            self.grant();
        }
    }

    /// Sends a worker nothing until a probe has reached it.
    pub(super) fn suspect(self: &Arc<Self>, worker: &Worker, error: &str) {
        {
            let mut state = worker.state.lock();
            state.suspect = true;
            state.last_error = Some(error.to_owned());
        }
        self.refresh(worker);
        worker.probe_now.notify_one();
    }

    /// A worker has more than it can take: it gets nothing for as long as it asks, or for a moment.
    pub(super) fn pushed_back(self: &Arc<Self>, slot: &Slot, asked: Option<Duration>, sent: Instant) {
        let worker = &slot.worker;
        worker.pushed_back();
        worker.state.lock().outages.pushed_back(slot.holder.model(), asked, sent, Instant::now());
        self.refresh(worker);
        worker.gate_moved.notify_one();
    }

    pub(super) fn forget(self: &Arc<Self>, worker: &Worker) {
        self.workers.lock().remove(&worker.key);
        {
            // Together, for whoever looks at the one before it changes the other.
            let mut desks = self.desks.lock();
            worker.gone.cancel();
            desks.board.remove(worker.key);
        }
        worker.unpublish();
        self.topology.send_modify(|version| *version += 1);
        tracing::info!(worker = %worker.id, url = %worker.url, "worker removed");
    }
}

/// The right to have one request in flight at a worker.
pub struct Slot {
    pub(super) fleet: Arc<Inner>,
    pub worker: Arc<Worker>,
    /// The tenant's share that it counts towards.
    pub(super) holder: Holder,
    pub(super) abandoned: CancellationToken,
    /// Whether it has not been returned yet.
    out: bool,
}

impl Slot {
    /// Whether what is sent here finds out whether the worker answers again: it was held, and nothing has succeeded since.
    #[must_use]
    pub fn is_doubted(&self) -> bool {
        self.worker.state.lock().outages.is_doubted(self.holder.model())
    }

    /// Others may be sent to a worker that was given out for requests that must be alone.
    pub fn let_others_join(&self) {
        if self.fleet.desks.lock().board.join(self.worker.key) {
            self.fleet.grant();
        }
    }

    /// Gives slots back together, as dropping each would: then those who wait are given what is free once, not after each.
    pub fn give_back(mut slots: Vec<Self>) {
        let Some(fleet) = slots.first().map(|slot| slot.fleet.clone()) else { return };
        {
            let mut desks = fleet.desks.lock();
            for slot in &mut slots {
                slot.out = false;
                desks.board.release(slot.worker.key, &slot.holder);
            }
        }
        fleet.grant();
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.out {
            self.fleet.desks.lock().board.release(self.worker.key, &self.holder);
            self.fleet.grant();
        }
    }
}

/// Waits for [`Slot`]s.
pub struct Acquire {
    inner: Arc<Inner>,
    ticket: Ticket,
    receiver: mpsc::UnboundedReceiver<Slot>,
    /// What [`Acquire::poll_ready`] has found: a slot, or that no more come.
    found: Option<Option<Slot>>,
}

/// Why there is no slot at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoSlot {
    /// It has not come yet.
    Yet,
    /// All have come, or the fleet is gone.
    Ended,
}

impl Acquire {
    pub(super) fn new(inner: Arc<Inner>, want: Want, slots: u32) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        let holder = want.holder();
        let ticket = {
            let mut desks = inner.desks.lock();
            let ticket = desks.board.queue_for(want, slots);
            desks.waiting.insert(ticket, (Waiter::Many(sender), holder));
            ticket
        };
        inner.grant();
        Self { inner, ticket, receiver, found: None }
    }

    /// Waits for the next slot. `None`: all that were wanted have come, or the fleet is gone.
    pub async fn next(&mut self) -> Option<Slot> {
        match self.found.take() {
            Some(found) => found,
            None => self.receiver.recv().await,
        }
    }

    /// The next slot, if one has been granted.
    ///
    /// # Errors
    /// [`NoSlot`]: it is not.
    pub fn try_next(&mut self) -> Result<Slot, NoSlot> {
        match self.found.take() {
            Some(found) => found.ok_or(NoSlot::Ended),
            None => self.receiver.try_recv().map_err(|error| match error {
                TryRecvError::Empty => NoSlot::Yet,
                TryRecvError::Disconnected => NoSlot::Ended,
            }),
        }
    }

    /// Ready when [`Acquire::try_next`] has something else to say than [`NoSlot::Yet`].
    pub fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.found.is_none() {
            self.found = Some(std::task::ready!(self.receiver.poll_recv(context)));
        }
        Poll::Ready(())
    }
}

impl Drop for Acquire {
    fn drop(&mut self) {
        let freed = {
            let mut desks = self.inner.desks.lock();
            desks.waiting.remove(&self.ticket);
            desks.board.leave(self.ticket)
        };
        if freed {
            self.inner.grant();
        }
        // Slots that are in the channel already come back as the receiver is dropped.
    }
}

/// Waits for one [`Slot`], in line behind the calls that came before with the same wish.
pub(super) struct Call {
    inner: Arc<Inner>,
    ticket: Ticket,
    id: u64,
    receiver: oneshot::Receiver<Slot>,
}

impl Call {
    pub(super) fn new(inner: Arc<Inner>, want: Want) -> Self {
        let (sender, receiver) = oneshot::channel();
        let (ticket, id) = {
            let mut desks = inner.desks.lock();
            let id = desks.next_call;
            desks.next_call += 1;
            let key = (want.rank.tenant(), want.model.clone(), want.avoid.clone());
            let ticket = match desks.lines.get(&key).copied() {
                Some(ticket) => {
                    desks.board.more(ticket);
                    ticket
                }
                None => {
                    let holder = want.holder();
                    let ticket = desks.board.queue(want);
                    desks.lines.insert(key.clone(), ticket);
                    desks.waiting.insert(ticket, (Waiter::Line(key, BTreeMap::new()), holder));
                    ticket
                }
            };
            if let Some((Waiter::Line(_, calls), _)) = desks.waiting.get_mut(&ticket) {
                calls.insert(id, sender);
            }
            (ticket, id)
        };
        inner.grant();
        Self { inner, ticket, id, receiver }
    }

    /// Waits for the slot. `None`: the fleet is gone.
    pub(super) async fn slot(&mut self) -> Option<Slot> {
        (&mut self.receiver).await.ok()
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let freed = {
            let mut desks = self.inner.desks.lock();
            let waits = match desks.waiting.get_mut(&self.ticket) {
                Some((Waiter::Line(_, calls), _)) => calls.remove(&self.id).is_some(),
                Some((Waiter::Many(_), _)) | None => false,
            };
            let freed = waits && desks.board.fewer(self.ticket);
            if waits && !desks.board.is_waiting(self.ticket) {
                desks.forget(self.ticket);
            }
            freed
        };
        if freed {
            self.inner.grant();
        }
        // A slot that is in the channel already comes back as the receiver is dropped.
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::{
        fleet::{Fleet, FleetOptions, InFlight, Rank},
        store::Store,
    };

    fn call(fleet: &Fleet, name: &str) -> Call {
        let rank = Rank::interactive().of(Tenant::named(name));
        Call::new(fleet.inner.clone(), Want { model: "m".into(), rank, avoid: SmallVec::new(), alone: false })
    }

    #[tokio::test]
    async fn calls_of_one_tenant_are_one_wish_and_leave_without_a_trace() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::sqlite(&folder.path().join("db")).await.unwrap();
        let options = FleetOptions { limit: InFlight::Fixed(1), ..FleetOptions::default() };
        let fleet = Fleet::start(store, options, &TaskTracker::new(), CancellationToken::new()).await.unwrap();
        let mut calls: Vec<Call> = (0..5_000).map(|_| call(&fleet, "ana")).collect();
        calls.push(call(&fleet, "bob"));
        let counts = || {
            let desks = fleet.inner.desks.lock();
            (desks.waiting.len(), desks.lines.len())
        };
        assert_eq!(counts(), (2, 2), "the board sees a wish each");
        let waiting = |at: usize| match fleet.inner.desks.lock().waiting.get(&calls[at].ticket) {
            Some((Waiter::Line(_, calls), _)) => calls.len(),
            _ => 0,
        };
        assert_eq!((waiting(0), waiting(5_000)), (5_000, 1));
        calls.truncate(1);
        assert_eq!(counts(), (1, 1));
        drop(calls);
        assert_eq!(counts(), (0, 0));
    }
}
