//! Ends the attempts of dead senders, and deletes old webhooks.

use std::time::Duration;

use futures::{FutureExt, future::BoxFuture};

use super::{Sweep, SweepError, Swept};
use crate::{delivery::Webhooks, store::Purged};

/// Time between two deletions of old webhooks.
const RETENTION: Duration = Duration::from_secs(3_600);

impl From<Purged> for Swept {
    fn from(Purged { count, more }: Purged) -> Self {
        Self { done: count, failed: 0, more }
    }
}

/// Attempts whose sender is gone, and progress events that are too old to be sent.
pub(super) struct Attempts {
    webhooks: Webhooks,
}

impl Attempts {
    pub(super) fn new(webhooks: &Webhooks) -> Self {
        Self { webhooks: webhooks.clone() }
    }
}

impl Sweep for Attempts {
    fn name(&self) -> &'static str {
        "webhook-attempts"
    }

    fn every(&self) -> Duration {
        self.webhooks.reap_interval()
    }

    fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>> {
        async { Ok(self.webhooks.reap(false).await?.into()) }.boxed()
    }
}

/// Settled deliveries, their attempts, and dead letters, once they are old.
pub(super) struct Retention {
    webhooks: Webhooks,
}

impl Retention {
    pub(super) fn new(webhooks: &Webhooks) -> Self {
        Self { webhooks: webhooks.clone() }
    }
}

impl Sweep for Retention {
    fn name(&self) -> &'static str {
        "webhook-retention"
    }

    fn every(&self) -> Duration {
        RETENTION
    }

    fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>> {
        async { Ok(self.webhooks.purge().await?.into()) }.boxed()
    }
}
