//! The events of all batches, for dashboards.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use futures::Stream;
use tokio::{sync::watch, time::Instant};

use super::{
    Event, EventKind, HEARTBEAT, Hub, Progress, WATCH_ALL_LIMIT, WatchError,
    feed::{READ_GAP, Subscription},
    watch::{entered, present, progress},
};
use crate::{
    domain::{BatchId, Revision, Scope, Sequence, Timestamp},
    store::{StateEvent, StoreError},
};

/// State changes read at a time.
const PAGE: u64 = 500;

/// What one dashboard has been sent about one unfinished batch.
struct Shown {
    subscription: Subscription,
    /// The revision of the newest state sent.
    state: Revision,
    told: Option<Progress>,
}

/// What woke a stream.
enum Woken {
    Shutdown,
    States,
    ProgressDue,
    Silence,
}

/// One dashboard.
struct All {
    hub: Hub,
    scope: Scope,
    /// Every state change up to this one has been sent.
    after: Sequence,
    shown: HashMap<BatchId, Shown>,
    states: watch::Receiver<u64>,
}

impl Hub {
    /// The events of all batches, or of one owner's. With `after` 0 the present states of the unfinished ones come
    /// first; otherwise every state change after that sequence. Progress events carry the newest values, at most one
    /// per `interval` and batch. The stream does not end by itself.
    ///
    /// # Errors
    /// [`WatchError`].
    pub async fn watch_all(
        &self,
        scope: Scope,
        after: Sequence,
        interval: Duration,
    ) -> Result<impl Stream<Item = Result<Event, WatchError>> + Send + 'static + use<>, WatchError> {
        if self.shutdown().is_cancelled() {
            return Err(WatchError::ShuttingDown);
        }
        let states = self.states();
        // Read before the snapshots: changes that happen while they are read come again as events, and none is left
        // out.
        let newest = self.store().last_sequence().await?;
        if after > newest {
            return Err(WatchError::Ahead { asked: after.0, newest: newest.0 });
        }
        let fresh = after == Sequence(0);
        let mut all =
            All { hub: self.clone(), scope, after: if fresh { newest } else { after }, shown: HashMap::new(), states };
        let shutdown = self.shutdown().clone();
        Ok(async_stream::try_stream! {
            if fresh {
                for id in all.show_unfinished().await? {
                    if let Some(event) = all.first(&id) {
                        yield event;
                    }
                }
            }
            let mut begun = fresh;
            // There may be states that have not been read.
            let mut look = true;
            let mut due = Instant::now() + interval;
            let mut heartbeat = Instant::now() + HEARTBEAT;
            loop {
                while look {
                    all.states.mark_unchanged();
                    let before = all.after;
                    let (events, reached) = all.read_states().await?;
                    if begun {
                        all.show_new(&events).await?;
                    }
                    for event in events {
                        heartbeat = Instant::now() + HEARTBEAT;
                        if let Some(event) = all.state(event) {
                            yield event;
                        }
                    }
                    // Other owners' events are skipped.
                    all.after = reached;
                    look = reached != before;
                }
                if !begun {
                    begun = true;
                    all.show_unfinished().await?;
                }
                let woken = tokio::select! {
                    biased;
                    () = shutdown.cancelled() => Woken::Shutdown,
                    // Before the states, because on a busy node there are always new ones.
                    () = tokio::time::sleep_until(due) => Woken::ProgressDue,
                    () = tokio::time::sleep_until(heartbeat) => Woken::Silence,
                    _ = all.states.changed() => Woken::States,
                };
                match woken {
                    Woken::Shutdown => Err(WatchError::ShuttingDown)?,
                    // Changes come in bursts: one read per burst.
                    Woken::States => {
                        tokio::time::sleep(READ_GAP).await;
                        look = true;
                    }
                    Woken::ProgressDue => {
                        due = Instant::now() + interval;
                        for event in all.new_progress() {
                            heartbeat = Instant::now() + HEARTBEAT;
                            yield event;
                        }
                    }
                    Woken::Silence => {
                        heartbeat = Instant::now() + HEARTBEAT;
                        yield Event {
                            batch: None,
                            revision: Revision(0),
                            sequence: all.after,
                            at: Timestamp::now(),
                            kind: EventKind::Heartbeat,
                        };
                    }
                }
            }
        })
    }
}

impl All {
    /// Starts to show the unfinished batches that are not shown yet. Returns their ids, oldest first.
    async fn show_unfinished(&mut self) -> Result<Vec<BatchId>, WatchError> {
        let ids = self.hub.store().unfinished(&self.scope, WATCH_ALL_LIMIT).await?;
        let new: Vec<_> = ids.iter().filter(|id| !self.shown.contains_key(*id)).cloned().collect();
        self.show(&new).await?;
        Ok(ids)
    }

    /// Starts to show these batches, except those deleted meanwhile.
    async fn show(&mut self, new: &[BatchId]) -> Result<(), WatchError> {
        for (id, subscription) in self.hub.subscribe_all(new).await? {
            self.shown.insert(id, Shown { subscription, state: Revision(0), told: None });
        }
        Ok(())
    }

    /// Starts to show the batches that are new in these events, as far as the limit allows.
    async fn show_new(&mut self, events: &[StateEvent]) -> Result<(), WatchError> {
        let ended: HashSet<&BatchId> =
            events.iter().filter(|event| event.batch.status.is_terminal()).map(|event| &event.batch.id).collect();
        let mut new: Vec<BatchId> = events
            .iter()
            .map(|event| &event.batch.id)
            .filter(|id| !ended.contains(id) && !self.shown.contains_key(*id))
            .cloned()
            .collect();
        new.sort_unstable();
        new.dedup();
        let room = usize::try_from(WATCH_ALL_LIMIT).unwrap_or(usize::MAX).saturating_sub(self.shown.len());
        new.truncate(room);
        self.show(&new).await
    }

    /// The event that begins with a batch's present state.
    fn first(&mut self, id: &BatchId) -> Option<Event> {
        let shown = self.shown.get_mut(id)?;
        let snapshot = shown.subscription.take()?;
        shown.state = snapshot.batch.revision;
        shown.told = Some(snapshot.progress.clone());
        Some(Event { sequence: self.after, ..present(&snapshot) })
    }

    /// Reads the next state changes. Returns them, and the sequence up to which everything has been read.
    async fn read_states(&self) -> Result<(Vec<StateEvent>, Sequence), StoreError> {
        self.hub.store().events_after(&self.scope, self.after, PAGE).await
    }

    /// The event of a state change, unless the batch's first snapshot already included it.
    fn state(&mut self, of: StateEvent) -> Option<Event> {
        self.after = of.sequence;
        let id = &of.batch.id;
        if of.batch.status.is_terminal() {
            let told = self.shown.remove(id).map(|shown| shown.state);
            return (told < Some(of.batch.revision)).then(|| alone(of));
        }
        let Some(shown) = self.shown.get_mut(id) else { return Some(alone(of)) };
        if of.batch.revision <= shown.state {
            return None;
        }
        shown.state = of.batch.revision;
        Some(match shown.subscription.peek() {
            Some(snapshot) => entered(&of, &snapshot),
            None => alone(of),
        })
    }

    /// The newest progress of every batch that has some.
    fn new_progress(&mut self) -> Vec<Event> {
        let after = self.after;
        let news = self.shown.values_mut().filter_map(|shown| {
            if shown.told.is_some() && !shown.subscription.snapshots.has_changed().unwrap_or(false) {
                return None;
            }
            let snapshot = shown.subscription.take()?;
            if snapshot.status().is_terminal() || shown.told.as_ref() == Some(&snapshot.progress) {
                return None;
            }
            shown.told = Some(snapshot.progress.clone());
            Some(Event { sequence: after, ..progress(&snapshot) })
        });
        news.collect()
    }
}

/// The event of a state change of a batch that is not shown.
fn alone(of: StateEvent) -> Event {
    Event {
        batch: Some(of.batch.id.clone()),
        revision: of.batch.revision,
        sequence: of.sequence,
        at: of.at,
        kind: EventKind::StateChanged { batch: Box::new(of.batch), progress: None },
    }
}
