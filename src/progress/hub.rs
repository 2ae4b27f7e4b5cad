//! The hub: hears and asks what has changed, reads it once, and shows it to all that watch.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use tokio::{
    sync::{broadcast::error::RecvError, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

use super::{
    Progress, Rates, Situation, WatchError, Window,
    feed::{Feed, READ_GAP, Snapshot, Subscription},
    waiting_reason,
};
use crate::{
    domain::{Batch, BatchId, BatchStatus, Sequence, Timestamp},
    fault,
    fleet::Fleet,
    scheduler::Troubles,
    store::{Store, StoreError},
    supervise::Part,
};

/// How often the database is asked what has changed.
pub(super) const POLL: Duration = Duration::from_secs(1);
/// Batches that nobody watches are read for their speed at most this many a [`POLL`]; the others wait for the next.
const UNWATCHED_READS: usize = 64;
/// How long a feed waits after a failed read.
const RETRY: Duration = Duration::from_secs(1);

/// Shows batches' progress to any number of watchers. Cheap to clone.
#[derive(Clone)]
pub struct Hub {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    fleet: Fleet,
    /// What this node's runs are stuck on.
    troubles: Troubles,
    /// Ends every stream.
    shutdown: CancellationToken,
    /// What [`Window`]s measure time from.
    started: Instant,
    feeds: Mutex<HashMap<BatchId, Arc<Feed>>>,
    /// The last seconds of unfinished batches, watched or not.
    windows: Mutex<HashMap<BatchId, Window>>,
    /// Changed batches that nobody watches, to be read for their speed.
    unwatched: Mutex<HashSet<BatchId>>,
    /// Counts up whenever some batch may have entered a state.
    states: watch::Sender<u64>,
}

impl Hub {
    /// A hub over this node's database and workers. It shows nothing new until [`Hub::run`] runs; `shutdown` ends its
    /// streams with [`WatchError::ShuttingDown`].
    #[must_use]
    pub fn new(store: Store, fleet: Fleet, troubles: Troubles, shutdown: CancellationToken) -> Self {
        let inner = Inner {
            store,
            fleet,
            troubles,
            shutdown,
            started: Instant::now(),
            feeds: Mutex::default(),
            windows: Mutex::default(),
            unwatched: Mutex::default(),
            states: watch::Sender::new(0),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Keeps the hub up to date until the shutdown.
    pub async fn run(&self) {
        tokio::select! {
            () = self.inner.shutdown.cancelled() => {}
            () = self.listen() => {}
            () = self.ask() => {}
        }
    }

    /// How far a batch is.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn progress(&self, batch: &Batch) -> Result<Progress, StoreError> {
        Ok(self.progresses(std::slice::from_ref(batch)).await?.pop().unwrap_or_default())
    }

    /// How far each of these batches is.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn progresses(&self, batches: &[Batch]) -> Result<Vec<Progress>, StoreError> {
        let waiting: Vec<_> = batches
            .iter()
            .filter(|batch| batch.status == BatchStatus::InProgress)
            .map(|batch| batch.id.clone())
            .collect();
        let positions = match waiting.as_slice() {
            [] => HashMap::new(),
            some => self.inner.store.queue_positions(some).await?,
        };
        let mut all = Vec::with_capacity(batches.len());
        for batch in batches {
            let position = positions.get(&batch.id).copied().unwrap_or(0);
            all.push(self.measure(batch, position).await?);
        }
        Ok(all)
    }

    async fn measure(&self, batch: &Batch, queue_position: i64) -> Result<Progress, StoreError> {
        let rates = self.sample(batch);
        let counts = batch.counts;
        let mut progress = Progress {
            counts,
            usage: batch.usage,
            rates,
            eta: rates.eta(counts.total - counts.completed - counts.failed),
            queue_position,
            waiting_reason: None,
            public_reason: None,
        };
        if !rates.moving() && !batch.status.is_terminal() {
            let workers = self.inner.fleet.workers();
            let unserved = self.inner.fleet.unserved(&batch.models);
            let situation = Situation {
                status: batch.status,
                moving: false,
                running: queue_position > 0 && self.inner.store.is_running(&batch.id).await?,
                unserved: &unserved,
                models: &batch.models,
                workers: &workers,
                for_admins: true,
                queue_position,
            };
            progress.waiting_reason = waiting_reason(&situation);
            progress.public_reason = waiting_reason(&Situation { for_admins: false, ..situation });
        }
        // A run that is stuck is the best reason of all, even if another segment has just ended.
        if !batch.status.is_terminal()
            && let Some(trouble) = self.inner.troubles.of(&batch.id, Instant::now())
        {
            (progress.waiting_reason, progress.public_reason) = (Some(trouble.clone()), Some(trouble));
        }
        Ok(progress)
    }

    /// Adds what the batch says to its window.
    fn sample(&self, batch: &Batch) -> Rates {
        let mut windows = lock(&self.inner.windows);
        if batch.status.is_terminal() {
            windows.remove(&batch.id);
            return Rates::default();
        }
        let now = self.inner.started.elapsed();
        let window = windows.entry(batch.id.clone()).or_default();
        window.record(now, batch.counts.completed + batch.counts.failed, batch.usage.output);
        window.rates(now)
    }

    pub(super) fn store(&self) -> &Store {
        &self.inner.store
    }

    pub(super) fn shutdown(&self) -> &CancellationToken {
        &self.inner.shutdown
    }

    /// Changes whenever some batch may have entered a state.
    pub(super) fn states(&self) -> watch::Receiver<u64> {
        self.inner.states.subscribe()
    }

    /// Begins to watch a batch. What the subscription shows is as new as what this node has heard of.
    pub(super) async fn subscribe(&self, id: &BatchId) -> Result<Subscription, WatchError> {
        let subscription = {
            let mut feeds = lock(&self.inner.feeds);
            feeds.entry(id.clone()).or_insert_with(|| Arc::new(Feed::new(id.clone()))).subscribe()
        };
        if subscription.peek().is_none() || subscription.feed.is_dirty() {
            self.read(&subscription.feed, false).await?;
        }
        if subscription.peek().is_none() {
            return Err(WatchError::NotFound(id.clone()));
        }
        Ok(subscription)
    }

    /// Reads a batch and shows it. Without `again`, nothing is done if nobody has heard of a change since the last read.
    pub(super) async fn read(&self, feed: &Feed, again: bool) -> Result<(), StoreError> {
        let mut began = feed.turn.lock().await;
        let before = feed.current();
        if !feed.take_dirty() && before.is_some() && !again {
            return Ok(());
        }
        *began = Some(Instant::now());
        let read = async {
            let Some((batch, events)) = Snapshot::read(&self.inner.store, &feed.id, before.as_deref()).await? else {
                return Ok(None);
            };
            let progress = self.progress(&batch).await?;
            Ok::<_, StoreError>(Some(Snapshot { batch, events, progress, read_at: Timestamp::now() }))
        };
        match read.await {
            Ok(Some(snapshot)) => {
                if feed.publish(snapshot) {
                    self.state_entered();
                }
                Ok(())
            }
            Ok(None) => {
                feed.close();
                Ok(())
            }
            Err(error) => {
                feed.set_dirty();
                Err(error)
            }
        }
    }

    /// Has a feed read, soon, and as often as changes come but not more often than [`READ_GAP`].
    fn schedule(&self, feed: &Arc<Feed>) {
        feed.set_dirty();
        if feed.scheduled.swap(true, Ordering::AcqRel) {
            return;
        }
        let (hub, feed) = (self.clone(), feed.clone());
        // It ends with the next read, or with a wait before it.
        self.inner.fleet.supervisor().spawn_once(Part::HubRead, async move {
            fault::panic_in(Part::HubRead);
            let began = *feed.turn.lock().await;
            if let Some(began) = began {
                tokio::time::sleep_until(began + READ_GAP).await;
            }
            // From here on a change needs another read.
            feed.scheduled.store(false, Ordering::Release);
            if let Err(error) = hub.read(&feed, false).await {
                tracing::warn!(batch = %feed.id, %error, "can't read a watched batch");
                tokio::time::sleep(RETRY).await;
                if feed.is_watched() && !hub.inner.shutdown.is_cancelled() {
                    hub.schedule(&feed);
                }
            }
        });
    }

    fn state_entered(&self) {
        self.inner.states.send_modify(|count| *count += 1);
    }

    async fn listen(&self) {
        let mut changes = self.inner.store.changes();
        loop {
            match changes.recv().await {
                Ok(id) => self.heard_of(id),
                Err(RecvError::Lagged(_)) => {
                    let feeds: Vec<_> = lock(&self.inner.feeds).values().cloned().collect();
                    feeds.iter().for_each(|feed| self.schedule(feed));
                    self.state_entered();
                }
                // The hub holds the store: this can't happen, and asking covers it.
                Err(RecvError::Closed) => return std::future::pending().await,
            }
        }
    }

    fn heard_of(&self, id: BatchId) {
        let feed = lock(&self.inner.feeds).get(&id).cloned();
        if let Some(feed) = feed {
            self.schedule(&feed);
        } else {
            lock(&self.inner.unwatched).insert(id);
            // It may be new.
            self.state_entered();
        }
    }

    async fn ask(&self) {
        let mut ticks = tokio::time::interval(POLL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sequence = Sequence(0);
        loop {
            fault::panic_in(Part::Hub);
            ticks.tick().await;
            if let Err(error) = self.ask_once(&mut sequence).await {
                tracing::warn!(%error, "can't ask what has changed");
            }
        }
    }

    async fn ask_once(&self, sequence: &mut Sequence) -> Result<(), StoreError> {
        let feeds: HashMap<BatchId, Arc<Feed>> = {
            let mut feeds = lock(&self.inner.feeds);
            feeds.retain(|_, feed| feed.is_watched());
            feeds.clone()
        };
        if !feeds.is_empty() {
            self.refresh(&feeds).await?;
        }
        let now = self.inner.started.elapsed();
        lock(&self.inner.windows).retain(|_, window| !window.is_stale(now));
        self.sample_unwatched().await?;
        if self.inner.states.receiver_count() > 0 {
            let newest = self.inner.store.last_sequence().await?;
            if newest != *sequence {
                *sequence = newest;
                self.state_entered();
            }
        }
        Ok(())
    }

    /// Has the feeds of changed batches read, and brings up to date what changes without a change of the batch: its speed,
    /// its place in the queue, and what it waits for.
    async fn refresh(&self, feeds: &HashMap<BatchId, Arc<Feed>>) -> Result<(), StoreError> {
        let ids: Vec<_> = feeds.keys().cloned().collect();
        let mut revisions: HashMap<_, _> = self.inner.store.revisions(&ids).await?.into_iter().collect();
        let mut unchanged = Vec::new();
        for feed in feeds.values() {
            let Some(snapshot) = feed.current() else { continue };
            let revision = revisions.remove(&feed.id);
            if revision == Some(snapshot.batch.revision.0) {
                if !snapshot.batch.status.is_terminal() {
                    unchanged.push(snapshot.batch.clone());
                }
            } else {
                self.schedule(feed);
            }
        }
        for (batch, progress) in unchanged.iter().zip(self.progresses(&unchanged).await?) {
            let Some(feed) = feeds.get(&batch.id) else { continue };
            let _turn = feed.turn.lock().await;
            // Unless it has been read in between.
            if let Some(snapshot) = feed.current()
                && snapshot.batch.revision == batch.revision
                && snapshot.progress != progress
            {
                feed.publish(Snapshot { progress, read_at: Timestamp::now(), ..(*snapshot).clone() });
            }
        }
        Ok(())
    }

    async fn sample_unwatched(&self) -> Result<(), StoreError> {
        let some: Vec<_> = {
            let mut unwatched = lock(&self.inner.unwatched);
            let some: Vec<_> = unwatched.iter().take(UNWATCHED_READS).cloned().collect();
            some.iter().for_each(|id| {
                unwatched.remove(id);
            });
            some
        };
        for id in some {
            match self.inner.store.batch(&id).await {
                Ok(Some(batch)) => drop(self.sample(&batch)),
                Ok(None) => {}
                Err(error) if error.is_final() => tracing::error!(batch = %id, %error, "a batch can't be read"),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn feed_count(&self) -> usize {
        lock(&self.inner.feeds).len()
    }
}

/// None of the hub's locks is held across anything that can panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
