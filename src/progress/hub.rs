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
    fleet::{Complaint, Fleet, WorkerState, WorkerView},
    scheduler::Troubles,
    store::{Store, StoreError},
    supervise::Part,
};

/// The time between two polls of the database for changes.
pub(super) const POLL: Duration = Duration::from_secs(1);
/// Watched batches that are refreshed every [`POLL`]; each further so many add one [`POLL`] to the interval, so that
/// ten thousand waiting batches cost no more per second than one thousand. Running batches are refreshed at every poll.
const REFRESHED: usize = 1_000;
/// The factor by which that interval grows while no batch enters a state and no worker changes. Then a waiting batch's
/// place and reason stay the same, and the refresh only finds what was missed.
const STILL: u32 = 10;
/// The longest such interval.
const LONGEST_STILL: Duration = Duration::from_secs(60);
/// Batches that are read for the first time at once.
const FIRST_READS: usize = 500;
/// Unwatched batches that are read for their speed per [`POLL`]. Others that change meanwhile are skipped: if they go
/// on, they change again.
const UNWATCHED_READS: usize = 256;
/// The wait of a feed after a failed read.
const RETRY: Duration = Duration::from_secs(1);

/// Provides batches' progress to any number of watchers. Cheap to clone.
#[derive(Clone)]
pub struct Hub {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    fleet: Fleet,
    /// The runs of this node that are stuck, and on what.
    troubles: Troubles,
    /// Ends all streams.
    shutdown: CancellationToken,
    /// The start of the time that [`Window`]s use.
    started: Instant,
    feeds: Mutex<HashMap<BatchId, Arc<Feed>>>,
    /// The last seconds of unfinished batches, watched or not.
    windows: Mutex<HashMap<BatchId, Window>>,
    /// Changed batches without watchers, to be read for their speed.
    unwatched: Mutex<HashSet<BatchId>>,
    /// Increases whenever some batch may have entered a state.
    states: watch::Sender<u64>,
}

/// What the hub remembers from one poll to the next.
pub(super) struct Asked {
    /// The sequence of the newest state change.
    sequence: Sequence,
    /// The batches that were running.
    running: HashSet<BatchId>,
    /// The state of everything when all watched batches were last refreshed.
    known: (Sequence, Vec<Standing>),
    /// When all watched batches may be refreshed again, and when they are even if nothing seems to have changed.
    refresh_at: Instant,
    refresh_by: Instant,
}

impl Asked {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            sequence: Sequence(0),
            running: HashSet::new(),
            known: (Sequence(0), Vec::new()),
            refresh_at: now,
            refresh_by: now,
        }
    }
}

/// The facts about a worker that a waiting batch's reason may mention.
#[derive(PartialEq)]
struct Standing {
    url: String,
    models: Vec<String>,
    state: WorkerState,
    last_error: Option<String>,
    complaints: Vec<Complaint>,
}

/// Facts that all batches without progress share.
struct Around {
    running: HashSet<BatchId>,
    workers: Vec<WorkerView>,
}

impl Hub {
    /// A hub over this node's database and workers. It is updated only while [`Hub::run`] runs; `shutdown` ends its
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

    /// The progress of a batch.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn progress(&self, batch: &Batch) -> Result<Progress, StoreError> {
        Ok(self.progresses(std::slice::from_ref(batch)).await?.pop().unwrap_or_default())
    }

    /// The progress of each of these batches, with the same few statements for any number.
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
        let running = match positions.values().any(|position| *position > 0) {
            true => self.inner.store.running().await?,
            false => HashSet::new(),
        };
        let around = self.around(running);
        let measure = |batch: &Batch| self.measure(batch, positions.get(&batch.id).copied().unwrap_or(0), &around);
        Ok(batches.iter().map(measure).collect())
    }

    fn around(&self, running: HashSet<BatchId>) -> Around {
        Around { running, workers: self.inner.fleet.workers() }
    }

    fn measure(&self, batch: &Batch, queue_position: i64, around: &Around) -> Progress {
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
            let unserved = self.inner.fleet.unserved(&batch.models);
            let situation = Situation {
                status: batch.status,
                moving: false,
                running: around.running.contains(&batch.id),
                unserved: &unserved,
                models: &batch.models,
                workers: &around.workers,
                for_admins: true,
                queue_position,
            };
            progress.waiting_reason = waiting_reason(&situation);
            progress.public_reason = waiting_reason(&Situation { for_admins: false, ..situation });
        }
        // A run that is stuck is the best reason, even if another segment has just ended.
        if !batch.status.is_terminal()
            && let Some(trouble) = self.inner.troubles.of(&batch.id, Instant::now())
        {
            (progress.waiting_reason, progress.public_reason) = (Some(trouble.clone()), Some(trouble));
        }
        progress
    }

    /// Adds the batch's counts to its window and returns its speed.
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

    /// A receiver that changes whenever some batch may have entered a state.
    pub(super) fn states(&self) -> watch::Receiver<u64> {
        self.inner.states.subscribe()
    }

    /// Starts to watch a batch. The subscription includes all changes that this node knows of.
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

    /// Starts to watch many batches. Those without watchers are read together. Batches that don't exist are left out.
    pub(super) async fn subscribe_all(&self, ids: &[BatchId]) -> Result<Vec<(BatchId, Subscription)>, StoreError> {
        let mut all = Vec::with_capacity(ids.len());
        for some in ids.chunks(FIRST_READS) {
            let some: Vec<Subscription> = {
                let mut feeds = lock(&self.inner.feeds);
                let feed = |id: &BatchId| {
                    feeds.entry(id.clone()).or_insert_with(|| Arc::new(Feed::new(id.clone()))).subscribe()
                };
                some.iter().map(feed).collect()
            };
            let unread = some.iter().filter(|one| one.peek().is_none() || one.feed.is_dirty());
            self.read_all(unread.map(|one| &*one.feed).collect()).await?;
            all.extend(some.into_iter().filter(|one| one.peek().is_some()).map(|one| (one.feed.id.clone(), one)));
        }
        Ok(all)
    }

    /// Reads and publishes batches, except those that have been read since their last known change.
    async fn read_all(&self, mut feeds: Vec<&Feed>) -> Result<(), StoreError> {
        // Turns are taken in this order, so that there is no deadlock.
        feeds.sort_unstable_by(|one, other| one.id.cmp(&other.id));
        feeds.dedup_by(|one, other| one.id == other.id);
        let mut turns = Vec::with_capacity(feeds.len());
        for feed in feeds {
            let mut began = feed.turn.lock().await;
            if feed.take_dirty() || feed.current().is_none() {
                *began = Some(Instant::now());
                turns.push((feed, began));
            }
        }
        if turns.is_empty() {
            return Ok(());
        }
        let ids: Vec<BatchId> = turns.iter().map(|(feed, _)| feed.id.clone()).collect();
        let read = async {
            let (batches, events): (Vec<_>, Vec<_>) = self.inner.store.histories(&ids).await?.into_iter().unzip();
            let progresses = self.progresses(&batches).await?;
            let snapshots = batches.into_iter().zip(events).zip(progresses).map(|((batch, events), progress)| {
                let events = events.into();
                (batch.id.clone(), Snapshot { batch, events, progress, read_at: Timestamp::now() })
            });
            Ok::<HashMap<_, _>, StoreError>(snapshots.collect())
        };
        let mut read = read.await.inspect_err(|_| turns.iter().for_each(|(feed, _)| feed.set_dirty()))?;
        let mut entered = false;
        for (feed, _) in &turns {
            match read.remove(&feed.id) {
                Some(snapshot) => entered |= feed.publish(snapshot),
                None => feed.close(),
            }
        }
        if entered {
            self.state_entered();
        }
        Ok(())
    }

    /// Reads and publishes a batch. Without `again`, does nothing if no change is known since the last read.
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
            let progress = match &before {
                // Its place in the queue changes with others', and is refreshed with theirs.
                Some(before) if self.sample(&batch).moving() => {
                    self.measure(&batch, before.progress.queue_position, &self.around(HashSet::new()))
                }
                _ => self.progress(&batch).await?,
            };
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

    /// Schedules a read of a feed, soon, and not more often than every [`READ_GAP`].
    fn schedule(&self, feed: &Arc<Feed>) {
        feed.set_dirty();
        if feed.scheduled.swap(true, Ordering::AcqRel) {
            return;
        }
        let (hub, feed) = (self.clone(), feed.clone());
        // It ends after the next read, or after a wait before it.
        self.inner.fleet.supervisor().spawn_once(Part::HubRead, async move {
            fault::panic_in(Part::HubRead);
            let began = *feed.turn.lock().await;
            if let Some(began) = began {
                tokio::time::sleep_until(began + READ_GAP).await;
            }
            // Changes from here on need another read.
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
                // The hub holds the store, so this can't happen; polling would cover it.
                Err(RecvError::Closed) => return std::future::pending().await,
            }
        }
    }

    fn heard_of(&self, id: BatchId) {
        let feed = lock(&self.inner.feeds).get(&id).cloned();
        if let Some(feed) = feed {
            self.schedule(&feed);
        } else {
            let mut unwatched = lock(&self.inner.unwatched);
            if unwatched.len() < UNWATCHED_READS {
                unwatched.insert(id);
            }
            drop(unwatched);
            // It may be a new batch.
            self.state_entered();
        }
    }

    async fn ask(&self) {
        let mut ticks = tokio::time::interval(POLL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut asked = Asked::new();
        loop {
            fault::panic_in(Part::Hub);
            ticks.tick().await;
            if let Err(error) = self.ask_once(&mut asked).await {
                tracing::warn!(%error, "can't ask what has changed");
            }
        }
    }

    pub(super) async fn ask_once(&self, asked: &mut Asked) -> Result<(), StoreError> {
        let (watched, moving): (usize, Vec<Arc<Feed>>) = {
            let mut feeds = lock(&self.inner.feeds);
            feeds.retain(|_, feed| feed.is_watched());
            (feeds.len(), feeds.values().filter(|feed| feed.is_moving()).cloned().collect())
        };
        let streams = self.inner.states.receiver_count() > 0;
        // Read first, so that a change after it is seen at the next poll.
        let newest = match watched > 0 || streams {
            true => self.inner.store.last_sequence().await?,
            false => asked.sequence,
        };
        if watched > 0 {
            self.refresh(moving, newest, asked).await?;
        }
        let now = self.inner.started.elapsed();
        lock(&self.inner.windows).retain(|_, window| !window.is_stale(now));
        self.sample_unwatched().await?;
        if streams && newest != asked.sequence {
            asked.sequence = newest;
            self.state_entered();
        }
        Ok(())
    }

    /// Schedules reads of changed batches, and refreshes what changes without a change of the batch: its speed, its
    /// place in the queue, and what it waits for. Batches that run or make progress, did at the last poll, or are
    /// stuck, are refreshed every time; the others if some batch has entered a state or a worker has changed, as often
    /// as [`REFRESHED`] allows.
    async fn refresh(&self, moving: Vec<Arc<Feed>>, newest: Sequence, asked: &mut Asked) -> Result<(), StoreError> {
        let began = Instant::now();
        let running = self.inner.store.running().await?;
        let around = self.around(running);
        let known = (newest, standings(&around.workers));
        let all = began >= asked.refresh_by || (began >= asked.refresh_at && known != asked.known);
        let feeds: HashMap<BatchId, Arc<Feed>> = {
            let feeds = lock(&self.inner.feeds);
            if all {
                feeds.clone()
            } else {
                let stuck = self.inner.troubles.batches();
                let lively = around.running.iter().chain(&asked.running).chain(&stuck);
                let lively = lively.filter_map(|id| feeds.get(id).cloned());
                lively.chain(moving).map(|feed| (feed.id.clone(), feed)).collect()
            }
        };
        let ids: Vec<BatchId> = feeds.keys().cloned().collect();
        let mut revisions: HashMap<_, _> = match ids.as_slice() {
            [] => HashMap::new(),
            some => self.inner.store.revisions(some).await?.into_iter().collect(),
        };
        let mut unchanged = Vec::new();
        for feed in ids.iter().filter_map(|id| feeds.get(id)) {
            let Some(snapshot) = feed.current() else { continue };
            let revision = revisions.remove(&feed.id);
            if revision == Some(snapshot.batch.revision.0) {
                if !snapshot.batch.status.is_terminal() {
                    unchanged.push((feed, snapshot));
                }
            } else {
                self.schedule(feed);
            }
        }
        let waiting = unchanged.iter().filter(|(_, snapshot)| snapshot.batch.status == BatchStatus::InProgress);
        let waiting: Vec<BatchId> = waiting.map(|(feed, _)| feed.id.clone()).collect();
        let positions = match waiting.as_slice() {
            some @ [_, ..] if all => self.inner.store.queue_positions(some).await?,
            _ => HashMap::new(),
        };
        for (feed, snapshot) in unchanged {
            let known = if all { 0 } else { snapshot.progress.queue_position };
            let position = positions.get(&feed.id).copied().unwrap_or(known);
            let progress = self.measure(&snapshot.batch, position, &around);
            if snapshot.progress == progress {
                continue;
            }
            let _turn = feed.turn.lock().await;
            // Unless it has been read meanwhile.
            if let Some(now) = feed.current()
                && now.batch.revision == snapshot.batch.revision
            {
                feed.publish(Snapshot { progress, read_at: Timestamp::now(), ..(*now).clone() });
            }
        }
        asked.running = around.running;
        if all {
            asked.known = known;
            let pause = POLL * u32::try_from(feeds.len() / REFRESHED).unwrap_or(u32::MAX);
            asked.refresh_at = began + pause;
            asked.refresh_by = began + (pause.max(POLL) * STILL).min(LONGEST_STILL).max(pause);
        }
        Ok(())
    }

    async fn sample_unwatched(&self) -> Result<(), StoreError> {
        let some: Vec<_> = std::mem::take(&mut *lock(&self.inner.unwatched)).into_iter().collect();
        if !some.is_empty() {
            for batch in self.inner.store.batches_of(&some).await? {
                self.sample(&batch);
            }
        }
        Ok(())
    }

    /// One look into the database.
    #[cfg(test)]
    pub(super) async fn ask_now(&self) {
        self.ask_once(&mut Asked::new()).await.unwrap();
    }

    #[cfg(test)]
    pub(super) fn hears_of(&self, id: BatchId) {
        self.heard_of(id);
    }

    #[cfg(test)]
    pub(super) fn unwatched_count(&self) -> usize {
        lock(&self.inner.unwatched).len()
    }

    #[cfg(test)]
    pub(super) fn feed_count(&self) -> usize {
        lock(&self.inner.feeds).len()
    }
}

fn standings(workers: &[WorkerView]) -> Vec<Standing> {
    let standing = |of: &WorkerView| Standing {
        url: of.url.clone(),
        models: of.models.clone(),
        state: of.state,
        last_error: of.last_error.clone(),
        complaints: of.complaints.clone(),
    };
    workers.iter().map(standing).collect()
}

/// The hub holds none of its locks across code that can panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
