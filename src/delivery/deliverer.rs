//! A server's work for webhooks: the outbox, retries of many dead letters, and housekeeping.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Webhooks, jobs, metrics, outbox::Outbox, send::batch_context};
use crate::{
    domain::{Clocks, Scope},
    fault,
    store::{SecretOf, StoreError},
    supervise::{Part, named},
};

/// Time between two deletions of old webhooks.
const PURGE_EVERY: Duration = Duration::from_secs(3_600);

/// Delivers this node's part of the outbox until it is told to stop.
pub struct Deliverer {
    webhooks: Webhooks,
    shutdown: CancellationToken,
}

impl Deliverer {
    /// A deliverer that [`run`](Self::run) starts and `shutdown` stops.
    #[must_use]
    pub fn new(webhooks: Webhooks, shutdown: CancellationToken) -> Self {
        Self { webhooks, shutdown }
    }

    /// Delivers until the shutdown. Returns when sends in flight have ended and are recorded, or their time is over;
    /// then their leases expire, and the receivers get those events again.
    pub async fn run(self) {
        if !self.webhooks.inner.vault.is_sealing() {
            warn!("no master key: webhook secrets are stored unsealed; set TIDEMILL_MASTER_KEY");
        }
        let keeping = Housekeeping { webhooks: self.webhooks.clone(), shutdown: self.shutdown.clone() };
        let outbox = Outbox::new(self.webhooks.clone(), self.shutdown.clone());
        self.webhooks.take_over().await;
        let jobs = async {
            tokio::select! {
                () = jobs::run(&self.webhooks, &self.shutdown) => {}
                () = overdue(&self.shutdown, self.webhooks.inner.options.drain) => {}
            }
        };
        let resealing = async {
            tokio::select! {
                () = keeping.reseal() => {}
                () = self.shutdown.cancelled() => {}
            }
        };
        tokio::join!(
            named(Part::Webhooks, outbox.run()),
            named(Part::WebhookUpkeep, keeping.run()),
            named(Part::Resealing, resealing),
            named(Part::RetryJobs, jobs)
        );
    }
}

impl Webhooks {
    /// Ends the attempts that a dead predecessor on this database left under lease, once. This comes before the outbox,
    /// a retry by hand or a test event leases anything here, because those leases would look the same. The first caller
    /// does it, the others wait.
    pub(super) async fn take_over(&self) {
        if self.inner.options.sole_node {
            self.inner.taken_over.get_or_init(|| self.reap(true)).await;
        }
    }

    async fn reap(&self, all: bool) {
        if let Err(error) = self.try_reap(all).await {
            warn!(%error, "leases of webhooks can't be looked at");
        }
    }

    async fn try_reap(&self, all: bool) -> Result<(), StoreError> {
        let inner = &self.inner;
        let schedule = &inner.options.schedule;
        let reaped = inner.store.reap_deliveries(all, |attempts| schedule.nominal(attempts)).await?;
        if reaped.pending > 0 || reaped.dead > 0 {
            info!(again = reaped.pending, dead = reaped.dead, "webhooks whose sender is gone");
            metrics::reaped(reaped.pending + reaped.dead);
            inner.wake.notify_one();
        }
        metrics::oldest_due(inner.store.oldest_due().await?.unwrap_or_default());
        Ok(())
    }
}

/// Periodic work.
struct Housekeeping {
    webhooks: Webhooks,
    shutdown: CancellationToken,
}

impl Housekeeping {
    async fn run(&self) {
        let mut purge_at = Instant::now();
        let mut clocks = Clocks::default();
        loop {
            fault::panic_in(Part::WebhookUpkeep);
            if let Err(error) = self.mend(&mut clocks).await {
                // The next check starts from scratch.
                clocks = Clocks::default();
                warn!(%error, "what is due can't be compared with the database's clock");
            }
            self.webhooks.reap(false).await;
            if Instant::now() >= purge_at {
                purge_at = Instant::now() + PURGE_EVERY;
                if let Err(error) = self.purge().await {
                    warn!(%error, "old webhooks can't be deleted");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(self.webhooks.inner.options.reap) => {}
                () = self.shutdown.cancelled() => return,
            }
        }
    }

    /// Shortens waits and leases if the database's clock was set back, so that they do not last longer for it.
    async fn mend(&self, clocks: &mut Clocks) -> Result<(), StoreError> {
        let inner = &self.webhooks.inner;
        let asked = Instant::now().into_std();
        let said = inner.store.clock().await?;
        if clocks.may_be_back(asked, Instant::now().into_std(), said) {
            let mended = inner.store.mend_due_times().await?;
            if mended > 0 {
                warn!(
                    mended,
                    "the database's clock was set back; webhooks that were due later than they can be are due anew"
                );
                inner.wake.notify_one();
            }
        }
        Ok(())
    }

    async fn purge(&self) -> Result<(), StoreError> {
        let inner = &self.webhooks.inner;
        let dead_letters = inner.store.purge_dead_letters(inner.options.keep_dead_letters, &Scope::All).await?;
        let deliveries = inner.store.purge_deliveries(inner.options.keep_deliveries).await?;
        if dead_letters > 0 || deliveries > 0 {
            info!(dead_letters, deliveries, "old webhooks deleted");
        }
        Ok(())
    }

    /// Encrypts stored secrets with the current master key, so that the previous one can be removed.
    async fn reseal(&self) {
        fault::panic_in(Part::Resealing);
        let inner = &self.webhooks.inner;
        // Without a key nothing can be encrypted.
        let Some(current) = inner.vault.mark() else { return };
        let mut unopened = 0u64;
        let resealed = inner.store.reseal_secrets(&current, |of, sealed| {
            let resealed = match of {
                SecretOf::Endpoint(id) => inner.vault.reseal(sealed, id.as_str()),
                SecretOf::Webhook(url) => inner.vault.reseal(sealed, &batch_context(url)),
            };
            resealed.unwrap_or_else(|_| {
                unopened += 1;
                None
            })
        });
        match resealed.await {
            Ok(0) => {}
            Ok(count) => info!(count, "webhook secrets sealed with the present master key"),
            Err(error) => warn!(%error, "webhook secrets can't be sealed anew; the next start tries again"),
        }
        if unopened > 0 {
            warn!(
                count = unopened,
                "webhook secrets can't be opened: their master key is neither the present nor the previous"
            );
        }
    }
}

/// Waits until the time for sends in flight at the shutdown is over.
async fn overdue(shutdown: &CancellationToken, drain: Duration) {
    shutdown.cancelled().await;
    tokio::time::sleep(drain).await;
}
