//! Closes completion windows.

use std::time::Duration;

use futures::{FutureExt, future::BoxFuture};
use tokio::time::Instant;

use super::{Sweep, SweepError, Swept, rests::Rests};
use crate::{domain::BatchId, store::Store};

/// How late a window may close.
const EVERY: Duration = Duration::from_secs(1);
/// The most windows per tick.
const SOME: u64 = 500;

pub(super) struct Windows {
    store: Store,
    /// Batches whose windows can't be closed.
    stuck: Rests<BatchId>,
}

impl Windows {
    pub(super) fn new(store: &Store) -> Self {
        Self { store: store.clone(), stuck: Rests::default() }
    }
}

impl Sweep for Windows {
    fn name(&self) -> &'static str {
        "windows"
    }

    fn every(&self) -> Duration {
        EVERY
    }

    fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>> {
        async {
            let rest = self.stuck.resting(Instant::now());
            let windows = self.store.close_windows_but(&rest, SOME).await?;
            let (done, failed) = (windows.closed.len() as u64, windows.stuck.len() as u64);
            windows.closed.iter().for_each(|batch| tracing::info!(%batch, "the completion window has closed"));
            windows.stuck.into_iter().for_each(|batch| self.stuck.failed(batch, Instant::now()));
            Ok(Swept { done, failed, more: windows.more })
        }
        .boxed()
    }
}
