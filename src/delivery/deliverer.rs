//! A server's work for webhooks: the outbox and retries of many dead letters. What is periodic is `upkeep`'s.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Webhooks, jobs, metrics, outbox::Outbox, send::batch_context};
use crate::{
    domain::Scope,
    fault,
    store::{Purged, SecretOf, StoreError},
    supervise::{Part, named},
};

/// Delivers this node's part of the outbox until its shutdown.
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
            warn!("no master key: webhook secrets are stored unencrypted; set TIDEMILL_MASTER_KEY");
        }
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
                () = self.webhooks.reseal() => {}
                () = self.shutdown.cancelled() => {}
            }
        };
        tokio::join!(
            named(Part::Webhooks, outbox.run()),
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
            let reap = async || {
                loop {
                    match self.reap(true).await {
                        Ok(Purged { more: true, .. }) => {}
                        Ok(_) => return,
                        Err(error) => return warn!(%error, "the leases of webhooks can't be read; they expire"),
                    }
                }
            };
            self.inner.taken_over.get_or_init(reap).await;
        }
    }

    /// Ends some attempts whose lease has expired, or `all`, and expires progress events. Counts the attempts.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) async fn reap(&self, all: bool) -> Result<Purged, StoreError> {
        let inner = &self.inner;
        let schedule = &inner.options.schedule;
        let reaped = inner.store.reap_deliveries(all, |attempts| schedule.nominal(attempts)).await?;
        let count = reaped.pending + reaped.dead;
        if count > 0 {
            info!(again = reaped.pending, dead = reaped.dead, "webhooks whose server stopped during the attempt");
            metrics::reaped(count);
            inner.wake.notify_one();
        }
        metrics::oldest_due(inner.store.oldest_due().await?.unwrap_or_default());
        Ok(Purged { count, more: reaped.more })
    }

    /// Time between two checks for expired leases and for a clock that was set back.
    pub(crate) fn reap_interval(&self) -> Duration {
        self.inner.options.reap
    }

    /// Shortens waits and leases after the database's clock was set back. Returns the number of deliveries.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) async fn mend_due_times(&self) -> Result<u64, StoreError> {
        let mended = self.inner.store.mend_due_times().await?;
        if mended > 0 {
            warn!(mended, "the database's clock was set back; the times of waiting webhooks are corrected");
            self.inner.wake.notify_one();
        }
        Ok(mended)
    }

    /// Deletes some dead letters and settled deliveries that have been kept long enough.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) async fn purge(&self) -> Result<Purged, StoreError> {
        let inner = &self.inner;
        let dead_letters = inner.store.purge_dead_letters(inner.options.keep_dead_letters, &Scope::All).await?;
        let deliveries = inner.store.purge_deliveries(inner.options.keep_deliveries).await?;
        let count = dead_letters.count + deliveries.count;
        if count > 0 {
            info!(dead_letters = dead_letters.count, deliveries = deliveries.count, "old webhooks deleted");
        }
        Ok(Purged { count, more: dead_letters.more || deliveries.more })
    }

    /// Encrypts stored secrets with the current master key, so that the previous one can be removed.
    async fn reseal(&self) {
        fault::panic_in(Part::Resealing);
        let inner = &self.inner;
        if !inner.vault.is_sealing() {
            return;
        }
        let mut unopened = 0u64;
        let resealed = inner.store.reseal_secrets(|of, sealed| {
            let resealed = match of {
                SecretOf::Endpoint(id) => inner.vault.reseal(sealed, id),
                SecretOf::Webhook(url) => inner.vault.reseal(sealed, &batch_context(url)),
            };
            resealed.unwrap_or_else(|_| {
                unopened += 1;
                None
            })
        });
        match resealed.await {
            Ok(0) => {}
            Ok(count) => info!(count, "webhook secrets are now encrypted with the current master key"),
            Err(error) => {
                warn!(%error, "webhook secrets can't be encrypted with the current master key; the next start tries again");
            }
        }
        if unopened > 0 {
            warn!(
                count = unopened,
                "webhook secrets can't be decrypted: neither --master-key nor --previous-master-key is theirs"
            );
        }
    }
}

/// Waits until the time for sends in flight at the shutdown is over.
async fn overdue(shutdown: &CancellationToken, drain: Duration) {
    shutdown.cancelled().await;
    tokio::time::sleep(drain).await;
}
