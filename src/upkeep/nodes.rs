//! Deletes the rows of dead nodes.

use std::time::Duration;

use futures::{FutureExt, future::BoxFuture};

use super::{Sweep, SweepError, Swept};
use crate::store::Store;

const EVERY: Duration = Duration::from_secs(60);

pub(super) struct DeadNodes {
    store: Store,
}

impl DeadNodes {
    pub(super) fn new(store: &Store) -> Self {
        Self { store: store.clone() }
    }
}

impl Sweep for DeadNodes {
    fn name(&self) -> &'static str {
        "dead-nodes"
    }

    fn every(&self) -> Duration {
        EVERY
    }

    fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>> {
        async {
            let dead = self.store.forget_dead_nodes().await?;
            if dead > 0 {
                tracing::info!(nodes = dead, "servers without a heartbeat for 10 minutes are forgotten");
            }
            Ok(Swept::all(dead))
        }
        .boxed()
    }
}
