//! Deletes files that have expired, or that were hidden while a batch read them, and ends uploads in parts whose time is
//! up.

use std::time::Duration;

use futures::{FutureExt, future::BoxFuture};

use super::{Sweep, SweepError, Swept};
use crate::store::Store;

/// How long after its time a file's bytes may stay. Nobody finds it any more from then on.
const EVERY: Duration = Duration::from_secs(10);
/// The most files per tick.
const SOME: u64 = 500;

pub(super) struct Expired {
    store: Store,
}

impl Expired {
    pub(super) fn new(store: &Store) -> Self {
        Self { store: store.clone() }
    }
}

impl Sweep for Expired {
    fn name(&self) -> &'static str {
        "expired"
    }

    fn every(&self) -> Duration {
        EVERY
    }

    fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>> {
        async {
            let deleted = self.store.delete_due_files(SOME).await?;
            deleted.iter().for_each(|file| tracing::info!(%file, "the file has expired"));
            let uploads = self.store.end_due_uploads(SOME).await?;
            if uploads.expired > 0 {
                tracing::info!(uploads = uploads.expired, "uploads in parts were not completed in time");
            }
            let files = deleted.len() as u64;
            let more = files >= SOME || uploads.expired >= SOME || uploads.forgotten >= SOME;
            Ok(Swept { done: files + uploads.expired + uploads.forgotten, failed: 0, more })
        }
        .boxed()
    }
}
