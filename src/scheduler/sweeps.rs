//! What happens by itself: windows close, garbage goes.

use std::time::Duration;

use tokio::time::MissedTickBehavior;

use crate::{
    blobs::Blobs,
    fault,
    store::{Store, StoreError},
    supervise::Part,
};

/// How late a window may close.
const WINDOWS: Duration = Duration::from_secs(1);
/// How long garbage may lie around.
const GARBAGE: Duration = Duration::from_secs(10);
/// Windows and objects at a time.
const SOME: u64 = 500;

/// Sweeps for ever: it may be dropped at any moment.
pub(super) async fn run(store: Store, blobs: Blobs) {
    let mut windows = tokio::time::interval(WINDOWS);
    let mut garbage = tokio::time::interval(GARBAGE);
    windows.set_missed_tick_behavior(MissedTickBehavior::Delay);
    garbage.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        fault::panic_in(Part::Sweeps);
        let swept = tokio::select! {
            _ = windows.tick() => store.close_windows(SOME).await.map(|closed| {
                for batch in closed {
                    tracing::info!(%batch, "the completion window has closed");
                }
            }),
            _ = garbage.tick() => collect(&store, &blobs).await,
        };
        if let Err(error) = swept {
            tracing::warn!(%error, "a sweep failed; the next one tries again");
        }
    }
}

async fn collect(store: &Store, blobs: &Blobs) -> Result<(), StoreError> {
    let due = store.due_garbage(SOME).await?;
    let mut gone = Vec::with_capacity(due.len());
    for key in due {
        match blobs.delete(&key).await {
            Ok(()) => gone.push(key),
            Err(error) => tracing::warn!(%key, %error, "an object could not be deleted; the next sweep tries again"),
        }
    }
    if gone.is_empty() { Ok(()) } else { store.forget_garbage(&gone).await }
}
