//! Periodic work: closes windows, deletes garbage.

use std::time::Duration;

use futures::StreamExt;
use tokio::time::{Instant, MissedTickBehavior};

use crate::{
    blobs::Blobs,
    domain::{BatchId, Clocks},
    fault, results,
    store::{Store, StoreError},
    supervise::Part,
};

/// The interval of closing windows: how late a window may close.
const WINDOWS: Duration = Duration::from_secs(1);
/// The interval of deleting garbage.
const GARBAGE: Duration = Duration::from_secs(10);
/// The interval of searching a directory for files that a killed process left half written.
const HALF_WRITTEN: Duration = Duration::from_secs(3_600);
/// The interval of checking whether the database's clock was set back.
const CLOCK: Duration = Duration::from_secs(10);
/// A server that has just started does not know whether the clock was set back. Others may have longer leases than its own: up
/// to this many times as long, they are left alone.
const OTHERS_LEASES: u32 = 10;
/// The most windows and objects per step.
const SOME: u64 = 500;
/// Ended batches per sweep whose folders are searched for objects that no row names.
const FOLDERS: u64 = 16;
/// The number of folders that are looked through at the same time.
const FOLDERS_AT_ONCE: usize = 4;
/// Objects of such a folder per step.
const OBJECTS: usize = 500;

/// Sweeps for ever: it may be dropped at any moment. Each sweep goes at its own pace, so a blob store that is slow to delete
/// keeps no window open.
pub(super) async fn run(store: Store, blobs: Blobs, lease: Duration) {
    tokio::join!(
        windows(&store),
        clock(&store, lease),
        garbage(&store, &blobs),
        leftovers(&store, &blobs),
        half_written(&blobs)
    );
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

async fn clock(store: &Store, lease: Duration) {
    let (mut ticks, mut clocks) = (every(CLOCK), Clocks::default());
    let mut longest = lease.saturating_mul(OTHERS_LEASES);
    loop {
        ticks.tick().await;
        match mend(store, &mut clocks, longest).await {
            Ok(0) => {}
            Ok(leases) => {
                tracing::warn!(leases, "the database's clock was set back; leases end when they would have ended");
            }
            Err(error) => {
                // The next check starts from scratch.
                (clocks, longest) = (Clocks::default(), lease.saturating_mul(OTHERS_LEASES));
                tracing::warn!(%error, "leases can't be compared with the database's clock");
                continue;
            }
        }
        longest = lease;
    }
}

/// A clock that was set back makes no lease last for as long as it was set back.
async fn mend(store: &Store, clocks: &mut Clocks, longest: Duration) -> Result<u64, StoreError> {
    let asked = Instant::now().into_std();
    let said = store.clock().await?;
    if clocks.may_be_back(asked, Instant::now().into_std(), said) { store.mend_leases(longest).await } else { Ok(0) }
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

/// Deletes some objects. Returns how many were taken. Those that can't be deleted are offered again later.
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
        loop {
            let batches = match store.take_leftovers(FOLDERS).await {
                Ok(batches) => batches,
                Err(error) => {
                    tracing::warn!(%error, "leftovers could not be looked for; the next sweep tries again");
                    break;
                }
            };
            let taken = batches.len() as u64;
            let looks = batches.into_iter().map(|batch| async move {
                match look_through(store, blobs, &batch).await {
                    Ok(0) => {}
                    Ok(objects) => tracing::info!(%batch, objects, "objects that nothing names are deleted"),
                    Err(error) => {
                        tracing::warn!(%batch, error, "leftovers could not be deleted; they are looked for later");
                    }
                }
            });
            futures::stream::iter(looks).buffer_unordered(FOLDERS_AT_ONCE).collect::<()>().await;
            // After a full page there may be more.
            if taken < FOLDERS {
                break;
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

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    };

    use sea_orm::{ConnectionTrait, Database, Statement};

    use super::*;
    use crate::{domain::Timestamp, store::with_clock};

    #[tokio::test]
    async fn a_clock_set_back_is_noticed_and_leases_are_cut() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("db");
        let store = Store::sqlite(&file).await.unwrap();
        let raw = Database::connect(format!("sqlite://{}", file.display())).await.unwrap();
        let (second, hour) = (1_000_000, 3_600_000_000);
        let start = Timestamp::now().0;
        let insert = format!(
            "INSERT INTO segments (batch_id, idx, first_line, line_span, requests, byte_offset, byte_length, models, state, \
             lease_owner, lease_expires_at, epoch) VALUES ('b', 0, 1, 1, 1, 0, 1, 1, 'leased', 'dead', {}, 1)",
            start + 30 * second
        );
        raw.execute_unprepared(&insert).await.unwrap();
        let ends = async || -> i64 {
            let sql = Statement::from_string(raw.get_database_backend(), "SELECT lease_expires_at FROM segments");
            raw.query_one_raw(sql).await.unwrap().unwrap().try_get_by_index(0).unwrap()
        };
        let lease = Duration::from_secs(30);
        let clock = Arc::new(AtomicI64::new(start));
        let mut clocks = Clocks::default();
        let mut look = async |longest| with_clock(clock.clone(), mend(&store, &mut clocks, longest)).await.unwrap();
        assert_eq!(look(10 * lease).await, 0, "the first look");
        clock.fetch_add(hour, Ordering::Relaxed);
        assert_eq!(look(lease).await, 0, "an hour ahead");
        clock.fetch_sub(2 * hour, Ordering::Relaxed);
        assert_eq!(look(lease).await, 1, "and two back");
        assert_eq!(ends().await, start - hour + 30 * second);
        assert_eq!(look(lease).await, 0, "once");
        // A server that starts then has seen nothing of it.
        raw.execute_unprepared(&format!("UPDATE segments SET lease_expires_at = {}", start + hour)).await.unwrap();
        let mut others = Clocks::default();
        let mended = with_clock(clock.clone(), mend(&store, &mut others, 10 * lease)).await.unwrap();
        assert_eq!((mended, ends().await), (1, start - hour + 300 * second));
    }
}
