//! The outbox loop: takes what is due, sends it, writes down what came of it.

use std::{
    collections::HashMap,
    time::{Duration, Instant as StdInstant},
};

use rand::{SeedableRng, rngs::StdRng};
use tokio::{
    sync::broadcast::{self, error::RecvError},
    task::{Id, JoinError, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use url::{Position, Url};

use super::{
    Webhooks,
    fairness::{self, Fairness},
    jobs, metrics,
    send::{Sent, batch_context},
};
use crate::{
    domain::{BatchId, DeliveryId, Timestamp},
    fault::{self, Fault},
    store::{ClaimedDelivery, SecretOf, Settled, SettledAs, Settlement, StoreError},
};

/// How often senders that are gone are looked for.
const REAP_EVERY: Duration = Duration::from_secs(10);
/// How often what is old enough is deleted.
const PURGE_EVERY: Duration = Duration::from_secs(3_600);

/// Delivers this node's share of the outbox until it is told to stop.
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

    /// Delivers. Returns after the shutdown, when what was in flight has ended and is written down, or the time for that is
    /// over: then leases are left to run out, and the receiver hears of those events again.
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
        tokio::join!(outbox.run(), keeping.run(), resealing, jobs);
    }
}

/// What the loop must remember of a send in flight.
struct InFlight {
    target: String,
    created_at: Timestamp,
}

struct Outbox {
    webhooks: Webhooks,
    shutdown: CancellationToken,
    fairness: Fairness,
    random: StdRng,
    sends: JoinSet<(ClaimedDelivery, Sent)>,
    in_flight: HashMap<Id, InFlight>,
    /// What came of attempts and is not written down yet: it is kept until the database takes it.
    unsettled: Vec<(Settlement, Timestamp)>,
}

impl Outbox {
    fn new(webhooks: Webhooks, shutdown: CancellationToken) -> Self {
        let options = &webhooks.inner.options;
        Self {
            fairness: Fairness::new(options.per_target, options.in_flight),
            random: options.seed.map_or_else(|| StdRng::seed_from_u64(rand::random()), StdRng::seed_from_u64),
            sends: JoinSet::new(),
            in_flight: HashMap::new(),
            unsettled: Vec::new(),
            shutdown,
            webhooks,
        }
    }

    async fn run(mut self) {
        let poll = self.webhooks.inner.options.poll;
        let mut changes = self.webhooks.inner.store.changes();
        let mut stop_by = None;
        loop {
            // A database that is away is asked again at the next poll, not at the next event.
            let mut next = Instant::now() + poll;
            let mut away = false;
            if let Err(error) = self.settle().await {
                warn!(%error, waiting = self.unsettled.len(), "webhook results can't be written down yet");
                away = true;
            }
            if self.shutdown.is_cancelled() {
                let by = *stop_by.get_or_insert_with(|| Instant::now() + self.webhooks.inner.options.drain);
                if (self.sends.is_empty() && self.unsettled.is_empty()) || Instant::now() >= by {
                    break;
                }
                next = next.min(by);
            } else if !away {
                match self.claim().await {
                    Ok(due) => next = due.map_or(next, |due| next.min(due)),
                    Err(error) => warn!(%error, "the webhook outbox can't be read"),
                }
            }
            metrics::state(self.in_flight.len(), self.fairness.held(now()));
            tokio::select! {
                Some(ended) = self.sends.join_next_with_id() => {
                    self.ended(ended);
                    while let Some(ended) = self.sends.try_join_next_with_id() {
                        self.ended(ended);
                    }
                }
                () = changed(&mut changes), if stop_by.is_none() => {}
                () = self.webhooks.inner.wake.notified(), if stop_by.is_none() => {}
                () = self.shutdown.cancelled(), if stop_by.is_none() => {}
                () = sleep_until(next) => {}
            }
        }
        if !self.sends.is_empty() {
            warn!(count = self.sends.len(), "webhooks still in flight at shutdown; they will be sent again");
        }
    }

    /// Takes and sends what is due, as much as there is room for. Returns when to look again.
    async fn claim(&mut self) -> Result<Option<Instant>, StoreError> {
        loop {
            let (targets, at) = self.webhooks.inner.store.due_targets().await?;
            let now = now();
            let due: Vec<fairness::Due> = targets
                .iter()
                .filter(|target| target.due <= at.0)
                .map(|target| fairness::Due {
                    target: target.target.clone(),
                    host: host(&target.target),
                    count: self.webhooks.inner.options.per_target,
                })
                .collect();
            let shares = self.fairness.take(&due, now);
            let taken = if shares.is_empty() { 0 } else { self.take(shares).await? };
            if taken == 0 {
                self.fairness.forget_idle(now);
                // What is due now and was not taken waits for room, which comes with the end of a send.
                let next = targets.iter().filter_map(|target| {
                    let due = now + Timestamp(target.due).since(at);
                    let ready = self.fairness.held_until(&target.target, now).map_or(due, |held| due.max(held));
                    (ready > now).then_some(ready)
                });
                return Ok(next.min().map(Instant::from_std));
            }
        }
    }

    async fn take(&mut self, shares: Vec<fairness::Share>) -> Result<usize, StoreError> {
        let wanted: Vec<_> = shares.iter().map(|share| (share.target.clone(), share.count)).collect();
        let claimed = self.webhooks.inner.store.claim_deliveries(&wanted).await;
        let mut left: HashMap<String, usize> = wanted.into_iter().collect();
        let count = claimed.as_ref().map_or(0, Vec::len);
        for claim in claimed.as_deref().unwrap_or_default() {
            if let Some(left) = left.get_mut(&claim.target) {
                *left -= 1;
            }
        }
        for (target, unused) in left {
            self.fairness.give_back(&target, unused);
        }
        for claim in claimed? {
            if self.shutdown.is_cancelled() {
                self.give_back(claim);
            } else {
                self.send(claim);
            }
        }
        Ok(count)
    }

    fn send(&mut self, claim: ClaimedDelivery) {
        let known = InFlight { target: claim.target.clone(), created_at: claim.created_at };
        let webhooks = self.webhooks.clone();
        let task = self.sends.spawn(async move {
            let sent = webhooks.send(&claim).await;
            (claim, sent)
        });
        self.in_flight.insert(task.id(), known);
    }

    /// Nothing was sent, so nothing is charged.
    fn give_back(&mut self, claim: ClaimedDelivery) {
        self.fairness.give_back(&claim.target, 1);
        let settlement =
            Settlement { id: claim.id, lease: claim.lease, attempt: claim.attempt, result: None, wait: Duration::ZERO };
        self.unsettled.push((settlement, claim.created_at));
    }

    fn ended(&mut self, ended: Result<(Id, (ClaimedDelivery, Sent)), JoinError>) {
        let (claim, sent) = match ended {
            Ok((id, ended)) => {
                self.in_flight.remove(&id);
                ended
            }
            Err(error) => {
                // Its lease runs out, and the attempt is counted.
                if let Some(known) = self.in_flight.remove(&error.id()) {
                    warn!(%error, target = known.target, created_at = known.created_at.0, "a webhook's sender died");
                    self.fairness.failed(&known.target, None, now());
                }
                return;
            }
        };
        match &sent.result.error {
            None => self.fairness.succeeded(&claim.target),
            Some(_) => self.fairness.failed(&claim.target, sent.retry_after, now()),
        }
        let wait = self.webhooks.inner.options.backoff.wait(claim.attempt, sent.retry_after, &mut self.random);
        let settlement =
            Settlement { id: claim.id, lease: claim.lease, attempt: claim.attempt, result: Some(sent.result), wait };
        self.unsettled.push((settlement, claim.created_at));
    }

    async fn settle(&mut self) -> Result<(), StoreError> {
        if self.unsettled.is_empty() {
            return Ok(());
        }
        let settlements: Vec<_> = self.unsettled.iter().map(|(settlement, _)| settlement.clone()).collect();
        let settled = self.webhooks.inner.store.settle_deliveries(&settlements).await?;
        fault::point(Fault::DeliverySettled);
        let arrived = Timestamp::now();
        let known: HashMap<DeliveryId, (Settlement, Timestamp)> =
            self.unsettled.drain(..).map(|(one, created_at)| (one.id.clone(), (one, created_at))).collect();
        for Settled { id, now } in settled {
            let Some((settlement, created_at)) = known.get(&id) else { continue };
            let error = settlement.result.as_ref().and_then(|result| result.error.as_ref());
            match now {
                SettledAs::Delivered => metrics::delivered(arrived.since(*created_at)),
                SettledAs::Dead => {
                    let reason = error.map_or("none", |error| error.kind.as_str());
                    metrics::dead(reason);
                    info!(delivery = %id, reason, "a webhook could not be delivered and is a dead letter");
                }
                SettledAs::LeaseLost => {
                    metrics::lease_lost();
                    warn!(delivery = %id, "a webhook's result came after its lease was lost");
                }
                SettledAs::Pending | SettledAs::Cancelled => {}
            }
        }
        Ok(())
    }
}

impl Webhooks {
    /// Ends what a dead predecessor on this database has left under lease, once: before the outbox, a retry by hand or a test
    /// event leases anything here, for its own leases would look the same. Whoever comes first does it, the others wait.
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
        let backoff = inner.options.backoff;
        let reaped = inner.store.reap_deliveries(all, |attempts| backoff.nominal(attempts)).await?;
        if reaped.pending > 0 || reaped.dead > 0 {
            info!(again = reaped.pending, dead = reaped.dead, "webhooks whose sender is gone");
            metrics::reaped(reaped.pending + reaped.dead);
            inner.wake.notify_one();
        }
        metrics::oldest_due(inner.store.oldest_due().await?.unwrap_or_default());
        Ok(())
    }
}

/// What has to be done now and then.
struct Housekeeping {
    webhooks: Webhooks,
    shutdown: CancellationToken,
}

impl Housekeeping {
    async fn run(&self) {
        let mut purge_at = Instant::now();
        loop {
            self.webhooks.reap(false).await;
            if Instant::now() >= purge_at {
                purge_at = Instant::now() + PURGE_EVERY;
                if let Err(error) = self.purge().await {
                    warn!(%error, "old webhooks can't be deleted");
                }
            }
            tokio::select! {
                () = tokio::time::sleep(REAP_EVERY) => {}
                () = self.shutdown.cancelled() => return,
            }
        }
    }

    async fn purge(&self) -> Result<(), StoreError> {
        let inner = &self.webhooks.inner;
        let dead_letters = inner.store.purge_dead_letters(inner.options.keep_dead_letters, None).await?;
        let deliveries = inner.store.purge_deliveries(inner.options.keep_deliveries).await?;
        if dead_letters > 0 || deliveries > 0 {
            info!(dead_letters, deliveries, "old webhooks deleted");
        }
        Ok(())
    }

    /// Stored secrets go over to the present master key, so that the one before can be dropped.
    async fn reseal(&self) {
        let inner = &self.webhooks.inner;
        let mut unopened = 0u64;
        let resealed = inner.store.reseal_secrets(|of, sealed| {
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

/// Waits for a commit of this node, however many there were.
async fn changed(changes: &mut broadcast::Receiver<BatchId>) {
    match changes.recv().await {
        Ok(_) | Err(RecvError::Lagged(_)) => while changes.try_recv().is_ok() {},
        // The store lives as long as this loop.
        Err(RecvError::Closed) => std::future::pending().await,
    }
}

/// Waits until what is in flight at the shutdown has had its time.
async fn overdue(shutdown: &CancellationToken, drain: Duration) {
    shutdown.cancelled().await;
    tokio::time::sleep(drain).await;
}

/// What targets on the same host and port share.
pub(super) fn host(target: &str) -> String {
    Url::parse(target)
        .map_or_else(|_| target.to_owned(), |url| url[Position::BeforeHost..Position::AfterPort].to_owned())
}

/// The runtime's clock, which tests can stop.
fn now() -> StdInstant {
    Instant::now().into_std()
}
