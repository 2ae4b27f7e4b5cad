//! What happens by itself: windows close, garbage goes.

use std::time::Duration;

use futures::StreamExt;
use tokio::time::MissedTickBehavior;

use crate::{
    blobs::Blobs,
    domain::BatchId,
    fault, results,
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
/// Ended batches a sweep whose folders are looked through for objects that no row names.
const FOLDERS: u64 = 16;
/// Objects of such a folder at a time.
const OBJECTS: usize = 500;

/// Sweeps for ever: it may be dropped at any moment. Each sweep goes at its own pace, so a blob store that is slow to delete
/// keeps no window open.
pub(super) async fn run(store: Store, blobs: Blobs) {
    tokio::join!(windows(&store), garbage(&store, &blobs), leftovers(&store, &blobs), half_written(&blobs));
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
    if taken.is_empty() {
        return Ok(0);
    }
    let deleted = blobs.delete_all(taken).await;
    if let Some(error) = deleted.error {
        let objects = count.saturating_sub(deleted.gone.len() as u64);
        tracing::warn!(objects, %error, "objects could not be deleted; they are tried again later");
    }
    if !deleted.gone.is_empty() {
        store.forget_garbage(&deleted.gone).await?;
    }
    Ok(count)
}

async fn leftovers(store: &Store, blobs: &Blobs) {
    let mut ticks = every(GARBAGE);
    loop {
        ticks.tick().await;
        let batches = match store.take_leftovers(FOLDERS).await {
            Ok(batches) => batches,
            Err(error) => {
                tracing::warn!(%error, "leftovers could not be looked for; the next sweep tries again");
                continue;
            }
        };
        for batch in batches {
            match look_through(store, blobs, &batch).await {
                Ok(0) => {}
                Ok(objects) => tracing::info!(%batch, objects, "objects that nothing names are deleted"),
                Err(error) => {
                    tracing::warn!(%batch, error, "leftovers could not be deleted; they are looked for later")
                }
            }
        }
    }
}

/// Deletes the objects of an ended batch that no row names. Returns how many.
async fn look_through(store: &Store, blobs: &Blobs, batch: &BatchId) -> Result<usize, String> {
    let mut found = blobs.walk(&results::prefix(batch)).chunks(OBJECTS);
    let (mut count, mut failed) = (0, None);
    while let Some(some) = found.next().await {
        let some: Vec<String> = some.into_iter().collect::<Result<_, _>>().map_err(|error| error.to_string())?;
        let unnamed = store.unnamed_objects(batch, some).await.map_err(|error| error.to_string())?;
        if !unnamed.is_empty() {
            let deleted = blobs.delete_all(unnamed).await;
            count += deleted.gone.len();
            failed = failed.or(deleted.error);
        }
    }
    if let Some(error) = failed {
        return Err(error.to_string());
    }
    store.forget_leftovers(batch).await.map_err(|error| error.to_string())?;
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
