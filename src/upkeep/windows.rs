//! Closes completion windows.

use std::time::Duration;

use futures::{FutureExt, future::BoxFuture};

use super::{Sweep, SweepError, Swept};
use crate::store::Store;

/// How late a window may close.
const EVERY: Duration = Duration::from_secs(1);
/// The most windows per tick.
const SOME: u64 = 500;

pub(super) struct Windows {
    store: Store,
}

impl Windows {
    pub(super) fn new(store: &Store) -> Self {
        Self { store: store.clone() }
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
            let closed = self.store.close_windows(SOME).await?;
            closed.iter().for_each(|batch| tracing::info!(%batch, "the completion window has closed"));
            let done = closed.len() as u64;
            Ok(Swept { done, failed: 0, more: done == SOME })
        }
        .boxed()
    }
}
