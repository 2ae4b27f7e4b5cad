//! One watched batch, which is read once per change and shared by all its watchers.

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

/// The shortest time between two reads of a batch.
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

    /// Reads the batch and its events. `None`: the batch does not exist.
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

/// The state that all watchers of one batch share.
pub(super) struct Feed {
    pub(super) id: BatchId,
    /// The newest snapshot. `None` before the first read.
    snapshots: watch::Sender<Option<Arc<Snapshot>>>,
    /// Changes only with a new state. A watcher waits for it while it may not send progress.
    states: watch::Sender<Revision>,
    /// Whether the batch has or may have changed since the last read.
    dirty: AtomicBool,
    /// Whether a read is already scheduled.
    pub(super) scheduled: AtomicBool,
    /// Held during a read, so that readers take turns. The time is the start of the last read.
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

    /// Whether the newest snapshot says that requests have ended lately, which holds only for some seconds.
    pub(super) fn is_moving(&self) -> bool {
        self.snapshots.borrow().as_ref().is_some_and(|snapshot| snapshot.progress.rates.moving())
    }

    pub(super) fn set_dirty(&self) {
        self.dirty.store(true, Ordering::Release);
    }

    /// Whether the batch may have changed. Resets that, because the caller is going to read it.
    pub(super) fn take_dirty(&self) -> bool {
        self.dirty.swap(false, Ordering::AcqRel)
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }

    /// Publishes a snapshot to all watchers. Returns whether it has a new state.
    pub(super) fn publish(&self, snapshot: Snapshot) -> bool {
        let newest = snapshot.events.last().map_or(Revision(0), |event| event.batch.revision);
        self.snapshots.send_replace(Some(Arc::new(snapshot)));
        // After the snapshot, so that a woken watcher finds the new state in it.
        self.states.send_if_modified(|known| {
            let new = newest > *known;
            *known = newest.max(*known);
            new
        })
    }

    /// Tells the watchers that the batch no longer exists.
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
    /// The newest snapshot, which is marked as seen. `None`: the batch no longer exists.
    pub(super) fn take(&mut self) -> Option<Arc<Snapshot>> {
        self.snapshots.borrow_and_update().clone()
    }

    /// The newest snapshot. `None`: the batch no longer exists.
    pub(super) fn peek(&self) -> Option<Arc<Snapshot>> {
        self.snapshots.borrow().clone()
    }
}
