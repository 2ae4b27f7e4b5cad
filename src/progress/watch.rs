//! One batch's event stream.

use futures::Stream;
use tokio::time::Instant;

use super::{Event, EventKind, HEARTBEAT, Hub, Progress, WatchError, feed::Snapshot};
use crate::{
    domain::{BatchId, Revision, Sequence, Timestamp},
    store::StateEvent,
};

/// What woke a stream.
enum Woken {
    Shutdown,
    /// There may be a new state, or progress that may be sent now.
    Look,
    Silence,
}

impl Hub {
    /// A batch's events. With `after` 0 the first is the present state; otherwise every state change after that
    /// revision comes first. All state changes are delivered; progress events carry the newest values, at most one per
    /// `interval`. The stream ends after the event of the terminal state.
    ///
    /// # Errors
    /// [`WatchError`].
    pub async fn watch(
        &self,
        id: &BatchId,
        after: Revision,
        interval: std::time::Duration,
    ) -> Result<impl Stream<Item = Result<Event, WatchError>> + Send + 'static + use<>, WatchError> {
        if self.shutdown().is_cancelled() {
            return Err(WatchError::ShuttingDown);
        }
        let mut subscription = self.subscribe(id).await?;
        let gone = {
            let id = id.clone();
            move || WatchError::NotFound(id.clone())
        };
        let mut first = subscription.peek().ok_or_else(&gone)?;
        if after > first.newest() {
            // The client may have seen it on another node, whose commit this node has not read yet.
            self.read(&subscription.feed, true).await?;
            first = subscription.peek().ok_or_else(&gone)?;
            if after > first.newest() && !first.status().is_terminal() {
                return Err(WatchError::Ahead { asked: after.0, newest: first.newest().0 });
            }
        }
        let shutdown = self.shutdown().clone();
        Ok(async_stream::try_stream! {
            let mut last = after;
            let mut told: Option<Progress> = None;
            let mut next_progress = Instant::now();
            if after == Revision(0) {
                last = first.batch.revision;
                told = Some(first.progress.clone());
                next_progress += interval;
                yield present(&first);
                if first.batch.status.is_terminal() {
                    return;
                }
            }
            drop(first);
            let mut heartbeat = Instant::now() + HEARTBEAT;
            loop {
                let due = Instant::now() >= next_progress;
                let snapshot = if due { subscription.take() } else { subscription.peek() };
                let snapshot = snapshot.ok_or_else(&gone)?;
                for event in snapshot.events.iter() {
                    if event.batch.revision > last {
                        last = event.batch.revision;
                        heartbeat = Instant::now() + HEARTBEAT;
                        yield entered(event, &snapshot);
                    }
                }
                if snapshot.status().is_terminal() {
                    return;
                }
                // From the same snapshot: the client resumes after its revision, so every state up to it must have been
                // sent.
                if due && snapshot.batch.revision >= last && told.as_ref() != Some(&snapshot.progress) {
                    let now = Instant::now();
                    (next_progress, heartbeat) = (now + interval, now + HEARTBEAT);
                    last = snapshot.batch.revision;
                    told = Some(snapshot.progress.clone());
                    yield progress(&snapshot);
                }
                let (snapshots, states) = (&mut subscription.snapshots, &mut subscription.states);
                let woken = tokio::select! {
                    biased;
                    () = shutdown.cancelled() => Woken::Shutdown,
                    _ = states.changed() => Woken::Look,
                    // While no progress may be sent, the stream does not wait for any, so that thousands of watchers
                    // need not wake for each.
                    () = async {
                        tokio::time::sleep_until(next_progress).await;
                        let _ = snapshots.changed().await;
                    } => Woken::Look,
                    () = tokio::time::sleep_until(heartbeat) => Woken::Silence,
                };
                match woken {
                    Woken::Look => {}
                    Woken::Shutdown => Err(WatchError::ShuttingDown)?,
                    Woken::Silence => {
                        heartbeat = Instant::now() + HEARTBEAT;
                        yield Event {
                            batch: Some(subscription.feed.id.clone()),
                            revision: last,
                            sequence: Sequence(0),
                            at: Timestamp::now(),
                            kind: EventKind::Heartbeat,
                        };
                    }
                }
            }
        })
    }
}

/// The event with the batch's present state.
pub(super) fn present(of: &Snapshot) -> Event {
    Event {
        batch: Some(of.batch.id.clone()),
        revision: of.batch.revision,
        sequence: of
            .events
            .iter()
            .rfind(|event| event.batch.revision <= of.batch.revision)
            .map_or_else(Default::default, |event| event.sequence),
        at: of.read_at,
        kind: EventKind::StateChanged {
            batch: Box::new(of.batch.clone()),
            progress: Some(Box::new(of.progress.clone())),
        },
    }
}

/// The event of a state change.
pub(super) fn entered(event: &StateEvent, of: &Snapshot) -> Event {
    let newest = event.batch.status == of.batch.status;
    Event {
        batch: Some(event.batch.id.clone()),
        revision: event.batch.revision,
        sequence: event.sequence,
        at: event.at,
        kind: EventKind::StateChanged {
            batch: Box::new(event.batch.clone()),
            progress: newest.then(|| {
                Box::new(Progress { counts: event.batch.counts, usage: event.batch.usage, ..of.progress.clone() })
            }),
        },
    }
}

/// The event with the newest progress.
pub(super) fn progress(of: &Snapshot) -> Event {
    Event {
        batch: Some(of.batch.id.clone()),
        revision: of.batch.revision,
        sequence: of.sequence(),
        at: of.read_at,
        kind: EventKind::Progress(Box::new(of.progress.clone())),
    }
}
