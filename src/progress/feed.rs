//! One watched batch: read once per change, shared by all that watch it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{Mutex, watch},
    time::Instant,
};

use super::Progress;
use crate::{
    domain::{Batch, BatchId, BatchStatus, Revision, Scope, Sequence, Timestamp},
    store::{StateEvent, Store, StoreError},
};

/// A batch is read at most this often.
pub(super) const READ_GAP: Duration = Duration::from_millis(50);

/// A batch as it was read at one moment.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) batch: Batch,
    /// All its state changes, oldest first. The newest may be ahead of `batch`, never behind.
    pub(super) events: Arc<[StateEvent]>,
    pub(super) progress: Progress,
    pub(super) read_at: Timestamp,
}

impl Snapshot {
    /// The newest revision that it knows of.
    pub(super) fn newest(&self) -> Revision {
        self.events.last().map_or(self.batch.revision, |event| event.batch.revision.max(self.batch.revision))
    }

    /// The newest state.
    pub(super) fn status(&self) -> BatchStatus {
        self.events.last().map_or(self.batch.status, |event| event.batch.status)
    }

    /// The sequence of the newest state change.
    pub(super) fn sequence(&self) -> Sequence {
        self.events.last().map_or(Sequence(0), |event| event.sequence)
    }

    /// The batch and its events, as they are now. None: there is no such batch.
    pub(super) async fn read(
        store: &Store,
        id: &BatchId,
        before: Option<&Self>,
    ) -> Result<Option<(Batch, Arc<[StateEvent]>)>, StoreError> {
        if let Some(before) = before {
            let Some(batch) = store.batch(id, &Scope::All).await? else { return Ok(None) };
            // No state is entered twice, so the same state means that there is no new event.
            if batch.status == before.status() {
                return Ok(Some((batch, before.events.clone())));
            }
        }
        Ok(store.history(id).await?.map(|(batch, events)| (batch, events.into())))
    }
}

/// What all watchers of one batch share.
pub(super) struct Feed {
    pub(super) id: BatchId,
    /// The newest snapshot; none before the first.
    snapshots: watch::Sender<Option<Arc<Snapshot>>>,
    /// Changes only with a new state: what a watcher waits for while it may not send progress.
    states: watch::Sender<Revision>,
    /// The batch has changed since the last read, or may have.
    dirty: AtomicBool,
    /// A read is already on its way.
    pub(super) scheduled: AtomicBool,
    /// Readers take turns; when the last read began.
    pub(super) turn: Mutex<Option<Instant>>,
}

impl Feed {
    pub(super) fn new(id: BatchId) -> Self {
        Self {
            id,
            snapshots: watch::Sender::new(None),
            states: watch::Sender::new(Revision(0)),
            dirty: AtomicBool::new(true),
            scheduled: AtomicBool::new(false),
            turn: Mutex::new(None),
        }
    }

    pub(super) fn current(&self) -> Option<Arc<Snapshot>> {
        self.snapshots.borrow().clone()
    }

    pub(super) fn is_watched(&self) -> bool {
        self.snapshots.receiver_count() > 0
    }

    /// Whether the newest snapshot says that something has ended lately, which is true for some seconds only.
    pub(super) fn is_moving(&self) -> bool {
        self.snapshots.borrow().as_ref().is_some_and(|snapshot| snapshot.progress.rates.moving())
    }

    pub(super) fn set_dirty(&self) {
        self.dirty.store(true, Ordering::Release);
    }

    /// Whether the batch may have changed. The caller is going to read it.
    pub(super) fn take_dirty(&self) -> bool {
        self.dirty.swap(false, Ordering::AcqRel)
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }

    /// Shows a snapshot to all watchers. Returns whether it has a new state.
    pub(super) fn publish(&self, snapshot: Snapshot) -> bool {
        let newest = snapshot.events.last().map_or(Revision(0), |event| event.batch.revision);
        self.snapshots.send_replace(Some(Arc::new(snapshot)));
        // After the snapshot, so that who is woken finds the new state in it.
        self.states.send_if_modified(|known| {
            let new = newest > *known;
            *known = newest.max(*known);
            new
        })
    }

    /// Tells the watchers that the batch is no more.
    pub(super) fn close(&self) {
        self.snapshots.send_replace(None);
        self.states.send_modify(|known| *known = Revision(i64::MAX));
    }

    pub(super) fn subscribe(self: &Arc<Self>) -> Subscription {
        Subscription { feed: self.clone(), snapshots: self.snapshots.subscribe(), states: self.states.subscribe() }
    }
}

/// One watcher's end of a [`Feed`]. While there is one, the feed is kept up to date.
pub(super) struct Subscription {
    pub(super) feed: Arc<Feed>,
    pub(super) snapshots: watch::Receiver<Option<Arc<Snapshot>>>,
    pub(super) states: watch::Receiver<Revision>,
}

impl Subscription {
    /// The newest snapshot, marked as seen. None: the batch is no more.
    pub(super) fn take(&mut self) -> Option<Arc<Snapshot>> {
        self.snapshots.borrow_and_update().clone()
    }

    /// The newest snapshot. None: the batch is no more.
    pub(super) fn peek(&self) -> Option<Arc<Snapshot>> {
        self.snapshots.borrow().clone()
    }
}
