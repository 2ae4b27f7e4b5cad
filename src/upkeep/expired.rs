//! Deletes files that have expired, or that were hidden while a batch read them.

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
            let done = deleted.len() as u64;
            Ok(Swept { done, failed: 0, more: done >= SOME })
        }
        .boxed()
    }
}
