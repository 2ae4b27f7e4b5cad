//! What happens by itself: windows close, garbage goes.

use std::time::Duration;

use futures::StreamExt;
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
/// How often a directory is looked through for files that a killed process left half written.
const HALF_WRITTEN: Duration = Duration::from_secs(3_600);
/// Windows and objects at a time.
const SOME: u64 = 500;
/// Objects that are deleted at the same time.
const DELETES: usize = 16;

/// Sweeps for ever: it may be dropped at any moment. Each sweep goes at its own pace, so a blob store that is slow to delete
/// keeps no window open.
pub(super) async fn run(store: Store, blobs: Blobs) {
    tokio::join!(windows(&store), garbage(&store, &blobs), half_written(&blobs));
}

fn every(period: Duration) -> tokio::time::Interval {
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

async fn windows(store: &Store) {
    let mut ticks = every(WINDOWS);
    loop {
        fault::panic_in(Part::Sweeps);
        ticks.tick().await;
        match store.close_windows(SOME).await {
            Ok(closed) => closed.iter().for_each(|batch| tracing::info!(%batch, "the completion window has closed")),
            Err(error) => tracing::warn!(%error, "windows could not be closed; the next sweep tries again"),
        }
    }
}

async fn garbage(store: &Store, blobs: &Blobs) {
    let mut ticks = every(GARBAGE);
    loop {
        ticks.tick().await;
        loop {
            match collect(store, blobs).await {
                // There may be more.
                Ok(taken) if taken == SOME => {}
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(%error, "garbage could not be collected; the next sweep tries again");
                    break;
                }
            }
        }
    }
}

/// Deletes some objects. Returns how many were taken up. What can't be deleted comes up again when its turn has run out.
async fn collect(store: &Store, blobs: &Blobs) -> Result<u64, StoreError> {
    let taken = store.take_garbage(SOME).await?;
    let count = taken.len() as u64;
    let deletes = futures::stream::iter(taken).map(|key| async move { (blobs.delete(&key).await, key) });
    let gone = deletes.buffer_unordered(DELETES).filter_map(async |(deleted, key)| match deleted {
        Ok(()) => Some(key),
        Err(error) => {
            tracing::warn!(%key, %error, "an object could not be deleted; it is tried again later");
            None
        }
    });
    let gone: Vec<String> = gone.collect().await;
    if !gone.is_empty() {
        store.forget_garbage(&gone).await?;
    }
    Ok(count)
}

async fn half_written(blobs: &Blobs) {
    let mut ticks = every(HALF_WRITTEN);
    loop {
        ticks.tick().await;
        match blobs.remove_half_written().await {
            Ok(0) => {}
            Ok(files) => tracing::info!(files, "files that a killed process had left half written are removed"),
            Err(error) => {
                tracing::warn!(%error, "the blob directory could not be looked through; the next sweep tries again");
            }
        }
    }
}
