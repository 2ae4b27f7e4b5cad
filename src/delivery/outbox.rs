//! The outbox loop: claims due deliveries, sends them and records the results.
//!
//! The database is asked in rounds, one at a time: settle all attempts that have ended, claim what there are free places
//! for, and look for what is due if there may be news. Sends go on during a round, and what they come to waits for the
//! next one. So the busier the outbox is, the more deliveries share a commit.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant as StdInstant},
};

use futures::{FutureExt, future::BoxFuture};
use rand::{SeedableRng, rngs::StdRng};
use tokio::{
    sync::broadcast::{self, error::RecvError},
    task::{Id, JoinError, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use url::{Position, Url};

use super::{
    Webhooks,
    fairness::{Due, Fairness},
    metrics,
    send::Sent,
};
use crate::{
    domain::{BatchId, Owner, Timestamp, webhook::AttemptResult},
    fault::{self, Fault},
    store::{ClaimShare, ClaimedDelivery, DueTargets, SettledAs, Settlement, Store, StoreError},
    supervise::Part,
};

/// The most results that are recorded in one transaction.
const SETTLED_AT_ONCE: usize = 500;
/// How long a result is kept that the database refuses, because the database may be under repair. Shorter than the time
/// by which the lease exceeds the attempt.
const KEPT: Duration = Duration::from_secs(20);
/// How long a target is skipped whose deliveries the database refuses to claim.
const REFUSED: Duration = Duration::from_secs(60);
/// If an owner has more targets than one query returns, the next query follows after this time.
const NEXT_PAGE: Duration = Duration::from_millis(50);

/// The outcome of an attempt that is not recorded yet.
struct Unsettled {
    settlement: Settlement,
    created_at: Timestamp,
    /// Since when the database refuses it.
    refused_since: Option<Instant>,
}

/// The work of a round.
struct Work {
    settle: Vec<Unsettled>,
    /// Results that the database has refused; each is tried in a transaction of its own.
    refused: Vec<Unsettled>,
    claim: Vec<ClaimShare>,
    look: bool,
    /// The targets after which the query continues, for owners with very many targets.
    after: Vec<(Owner, String)>,
}

/// The results of a round.
#[derive(Default)]
struct Done {
    settled: Vec<(Unsettled, SettledAs)>,
    refused: Vec<Unsettled>,
    /// Results that could not be recorded because the database is away.
    unsettled: Vec<Unsettled>,
    claimed: Vec<(ClaimShare, Vec<ClaimedDelivery>)>,
    /// Targets whose deliveries the database refuses to claim.
    unclaimable: Vec<ClaimShare>,
    /// Targets that were not asked, because the database is away.
    unclaimed: Vec<ClaimShare>,
    looked: Option<DueTargets>,
    is_away: bool,
}

pub(super) struct Outbox {
    webhooks: Webhooks,
    shutdown: CancellationToken,
    fairness: Fairness,
    random: StdRng,
    sends: JoinSet<(ClaimedDelivery, Sent)>,
    /// The owner and target of each send in flight.
    in_flight: HashMap<Id, (Owner, String)>,
    /// Results to record.
    unsettled: Vec<Unsettled>,
    /// Results that the database has refused.
    refused: Vec<Unsettled>,
    /// When those are tried again.
    refused_again_at: Instant,
    /// Targets whose claims the database refuses, and until when they are skipped.
    unclaimable: HashMap<(Owner, String), Instant>,
    /// The targets with due deliveries, as far as is known.
    due: Vec<Due>,
    /// The targets after which the next query continues, for owners with very many targets.
    after: Vec<(Owner, String)>,
    /// Whether there may be due deliveries that are not known yet.
    look: bool,
    /// When due deliveries are queried next at the latest.
    look_at: Instant,
    /// Until when the database counts as away.
    away_until: Option<Instant>,
}

impl Outbox {
    pub(super) fn new(webhooks: Webhooks, shutdown: CancellationToken) -> Self {
        let options = &webhooks.inner.options;
        Self {
            fairness: Fairness::new(options.per_target, options.in_flight),
            random: options.seed.map_or_else(|| StdRng::seed_from_u64(rand::random()), StdRng::seed_from_u64),
            sends: JoinSet::new(),
            in_flight: HashMap::new(),
            unsettled: Vec::new(),
            refused: Vec::new(),
            refused_again_at: Instant::now(),
            unclaimable: HashMap::new(),
            due: Vec::new(),
            after: Vec::new(),
            look: true,
            look_at: Instant::now(),
            away_until: None,
            shutdown,
            webhooks,
        }
    }

    /// Delivers until the shutdown, and then until sends in flight have ended and are recorded, or their time is over.
    pub(super) async fn run(mut self) {
        let mut changes = self.webhooks.inner.store.changes();
        let mut round: Option<BoxFuture<'static, Done>> = None;
        let mut stop_by = None;
        loop {
            fault::panic_in(Part::Webhooks);
            if self.shutdown.is_cancelled() {
                let by = *stop_by.get_or_insert_with(|| Instant::now() + self.webhooks.inner.options.drain);
                let waiting = self.unsettled.len() + self.refused.len();
                if (self.sends.is_empty() && waiting == 0 && round.is_none()) || Instant::now() >= by {
                    break;
                }
            }
            if round.is_none() {
                round = self.work().map(|work| act(self.webhooks.inner.store.clone(), work).boxed());
            }
            let wake_at = self.wake_at(round.is_some(), stop_by);
            tokio::select! {
                Some(ended) = self.sends.join_next_with_id() => {
                    self.ended(ended);
                    while let Some(ended) = self.sends.try_join_next_with_id() {
                        self.ended(ended);
                    }
                }
                done = end_of(&mut round) => {
                    round = None;
                    self.done(done);
                }
                () = changed(&mut changes), if stop_by.is_none() => self.look = true,
                () = self.webhooks.inner.wake.notified(), if stop_by.is_none() => self.look = true,
                () = self.shutdown.cancelled(), if stop_by.is_none() => {}
                () = sleep_until(wake_at) => {}
            }
        }
        if !self.sends.is_empty() {
            warn!(count = self.sends.len(), "webhooks were still being sent at the stop; they will be sent again");
        }
    }

    /// When to wake up if nothing happens. It is never in the past, or the loop would not pause: what is due by now is in
    /// the round, or [`Outbox::work`] has found that there is none.
    fn wake_at(&self, in_round: bool, stop_by: Option<Instant>) -> Instant {
        let soon = Instant::now() + self.webhooks.inner.options.poll;
        let next = match self.away_until {
            // The loop waits for the round's end.
            _ if in_round => soon,
            Some(away) => away,
            // There are no further looks.
            None if stop_by.is_some() => soon,
            None => self.look_at,
        };
        stop_by.map_or(next, |by| next.min(by))
    }

    /// The work of the next round. `None` if there is none now.
    fn work(&mut self) -> Option<Work> {
        let (at, stopping) = (Instant::now(), self.shutdown.is_cancelled());
        if self.away_until.is_some_and(|until| until > at) {
            return None;
        }
        self.away_until = None;
        let settle = self.unsettled.drain(..self.unsettled.len().min(SETTLED_AT_ONCE)).collect();
        let refused =
            if stopping || at >= self.refused_again_at { std::mem::take(&mut self.refused) } else { Vec::new() };
        let look = !stopping && (self.look || at >= self.look_at);
        let claim = if stopping { Vec::new() } else { self.fairness.shares(&self.due, now()) };
        let work = Work { settle, refused, claim, look, after: self.after.clone() };
        self.look &= !look;
        let is_idle = work.settle.is_empty() && work.refused.is_empty() && work.claim.is_empty() && !look;
        (!is_idle).then_some(work)
    }

    /// Applies the results of a round.
    fn done(&mut self, done: Done) {
        let poll = self.webhooks.inner.options.poll;
        self.away_until = done.is_away.then(|| Instant::now() + poll);
        self.look |= done.is_away;
        for (one, now) in &done.settled {
            settle_metrics(one, *now);
        }
        // Before those that have come since.
        self.unsettled.splice(..0, done.unsettled);
        for mut one in done.refused {
            let since = *one.refused_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= KEPT || self.shutdown.is_cancelled() {
                // Its lease expires, and the attempt counts.
                error!(delivery = %one.settlement.id, "a webhook's result can't be recorded; the webhook is sent again");
                continue;
            }
            self.refused_again_at = Instant::now() + poll;
            self.refused.push(one);
        }
        for share in &done.unclaimed {
            self.fairness.give_back(&share.owner, &share.target, share.count);
        }
        for share in done.unclaimable {
            error!(target = share.target, "the database refuses to lease a receiver's webhooks; they wait");
            self.fairness.give_back(&share.owner, &share.target, share.count);
            self.due.retain(|due| due.owner != share.owner || due.target != share.target);
            self.unclaimable.insert((share.owner, share.target), Instant::now() + REFUSED);
        }
        for (share, claimed) in done.claimed {
            if claimed.len() < share.count {
                // There are no more until there is news.
                self.fairness.give_back(&share.owner, &share.target, share.count - claimed.len());
                self.due.retain(|due| due.owner != share.owner || due.target != share.target);
            }
            claimed.into_iter().for_each(|claim| self.send(claim));
        }
        if let Some(looked) = done.looked {
            self.looked(looked);
        }
        metrics::state(self.in_flight.len(), self.fairness.held(now()));
    }

    /// Applies a look at the due deliveries.
    fn looked(&mut self, DueTargets { targets, at, more }: DueTargets) {
        let now = now();
        // Due deliveries that were not claimed wait for a free place, which the end of a send brings.
        let next = targets.iter().filter_map(|target| {
            let due = now + Timestamp(target.due).since(at);
            let ready = self.fairness.held_until(&target.owner, &target.target, now).map_or(due, |held| due.max(held));
            (ready > now).then_some(ready)
        });
        let poll = Instant::now() + self.webhooks.inner.options.poll;
        self.look_at = next.min().map_or(poll, |next| poll.min(Instant::from_std(next)));
        if !more.is_empty() {
            self.look_at = self.look_at.min(Instant::now() + NEXT_PAGE);
        }
        self.after = more;
        self.unclaimable.retain(|_, until| *until > Instant::now());
        let due = targets.into_iter().filter(|target| target.due <= at.0);
        let due = due.map(|one| (one.owner, one.target)).filter(|key| !self.unclaimable.contains_key(key));
        self.due = due.map(|(owner, target)| Due { host: host(&target), owner, target }).collect();
        self.fairness.forget_idle(now);
    }

    fn send(&mut self, claim: ClaimedDelivery) {
        if self.shutdown.is_cancelled() {
            // Nothing was sent, so the attempt does not count.
            self.fairness.give_back(&claim.owner, &claim.target, 1);
            self.settle(claim, None, Duration::ZERO);
            return;
        }
        let key = (claim.owner.clone(), claim.target.clone());
        let webhooks = self.webhooks.clone();
        let task = self.sends.spawn(async move {
            let sent = webhooks.send(&claim).await;
            (claim, sent)
        });
        self.in_flight.insert(task.id(), key);
    }

    fn ended(&mut self, ended: Result<(Id, (ClaimedDelivery, Sent)), JoinError>) {
        let (claim, sent) = match ended {
            Ok((id, ended)) => {
                self.in_flight.remove(&id);
                ended
            }
            Err(error) => {
                // Its lease expires, and the attempt counts.
                if let Some((owner, target)) = self.in_flight.remove(&error.id()) {
                    warn!(%error, target, "the task that sent a webhook died");
                    self.fairness.failed(&owner, &target, None, now());
                }
                return;
            }
        };
        match &sent.result.error {
            None => self.fairness.succeeded(&claim.owner, &claim.target, now()),
            Some(_) => self.fairness.failed(&claim.owner, &claim.target, sent.retry_after, now()),
        }
        let wait = self.webhooks.inner.options.schedule.wait(claim.attempt, sent.retry_after, &mut self.random);
        self.settle(claim, Some(sent.result), wait);
    }

    fn settle(&mut self, claim: ClaimedDelivery, result: Option<AttemptResult>, wait: Duration) {
        let ClaimedDelivery { id, lease, attempt, created_at, .. } = claim;
        let settlement = Settlement { id, lease, attempt, result, wait };
        self.unsettled.push(Unsettled { settlement, created_at, refused_since: None });
    }
}

/// One round with the database.
async fn act(store: Store, work: Work) -> Done {
    let mut done = Done::default();
    let alone = work.refused.into_iter().map(|one| vec![one]);
    settle(&store, std::iter::once(work.settle).chain(alone), &mut done).await;
    claim(&store, work.claim, &mut done).await;
    // Something waits again, maybe not for long.
    let again = done.settled.iter().any(|(_, now)| *now == SettledAs::Pending);
    if (work.look || again) && !done.is_away {
        match store.due_targets(&work.after).await {
            Ok(looked) => done.looked = Some(looked),
            Err(error) => done.away(&error),
        }
    }
    done
}

/// Settles each group in one transaction; if the database refuses one, each of its results by itself, so that only what
/// is refused is not written.
async fn settle(store: &Store, groups: impl IntoIterator<Item = Vec<Unsettled>>, done: &mut Done) {
    let mut groups: VecDeque<_> = groups.into_iter().filter(|group| !group.is_empty()).collect();
    while let Some(group) = groups.pop_front() {
        if done.is_away {
            done.unsettled.extend(group);
            continue;
        }
        let settlements: Vec<_> = group.iter().map(|one| one.settlement.clone()).collect();
        match store.settle_deliveries(&settlements).await {
            Ok(settled) => {
                fault::point(Fault::DeliverySettled);
                done.settled.extend(group.into_iter().zip(settled.into_iter().map(|one| one.now)));
            }
            Err(error) if error.is_final() && group.len() == 1 => done.refused.extend(group),
            Err(error) if error.is_final() => groups.extend(group.into_iter().map(|one| vec![one])),
            Err(error) => {
                done.away(&error);
                done.unsettled.extend(group);
            }
        }
    }
}

/// Claims all shares in one transaction; if the database refuses that, each target by itself.
async fn claim(store: &Store, shares: Vec<ClaimShare>, done: &mut Done) {
    let mut groups = VecDeque::from([shares]);
    while let Some(group) = groups.pop_front() {
        if done.is_away {
            done.unclaimed.extend(group);
            continue;
        }
        match store.claim_deliveries(&group).await {
            Ok(claimed) => {
                let mut of: HashMap<(Owner, String), Vec<ClaimedDelivery>> = HashMap::new();
                for one in claimed {
                    of.entry((one.owner.clone(), one.target.clone())).or_default().push(one);
                }
                done.claimed.extend(group.into_iter().map(|share| {
                    let claimed = of.remove(&(share.owner.clone(), share.target.clone())).unwrap_or_default();
                    (share, claimed)
                }));
            }
            Err(error) if error.is_final() && group.len() == 1 => done.unclaimable.extend(group),
            Err(error) if error.is_final() => groups.extend(group.into_iter().map(|share| vec![share])),
            Err(error) => {
                done.away(&error);
                done.unclaimed.extend(group);
            }
        }
    }
}

impl Done {
    fn away(&mut self, error: &StoreError) {
        warn!(%error, "the webhook outbox can't be reached");
        self.is_away = true;
    }
}

/// Waits for the end of the current round. Never returns if there is none.
async fn end_of(round: &mut Option<BoxFuture<'static, Done>>) -> Done {
    match round {
        Some(round) => round.await,
        None => std::future::pending().await,
    }
}

fn settle_metrics(one: &Unsettled, now: SettledAs) {
    let Settlement { id, result, .. } = &one.settlement;
    match now {
        SettledAs::Delivered => metrics::delivered(Timestamp::now().since(one.created_at)),
        SettledAs::Dead => {
            let error = result.as_ref().and_then(|result| result.error.as_ref());
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

/// Waits for a commit of this node, and merges several.
async fn changed(changes: &mut broadcast::Receiver<BatchId>) {
    match changes.recv().await {
        Ok(_) | Err(RecvError::Lagged(_)) => while changes.try_recv().is_ok() {},
        // The store lives as long as this loop.
        Err(RecvError::Closed) => std::future::pending().await,
    }
}

/// The host and port of a target.
fn host(target: &str) -> String {
    Url::parse(target)
        .map_or_else(|_| target.to_owned(), |url| url[Position::BeforeHost..Position::AfterPort].to_owned())
}

/// The runtime's clock, which tests can pause.
fn now() -> StdInstant {
    Instant::now().into_std()
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            Options,
            egress::{Guard, Policy},
            secrets::Vault,
        },
        *,
    };

    /// The moments at which it wakes up, while the database is away and then while it answers nothing: each is ahead, so
    /// that the loop sleeps.
    #[tokio::test]
    async fn a_database_that_is_away_is_waited_for_and_not_asked_without_a_pause() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::sqlite(&folder.path().join("db")).await.unwrap();
        let webhooks =
            Webhooks::new(store, Options::new(Guard::new(Policy::default()), Vault::new(None, None))).unwrap();
        let mut outbox = Outbox::new(webhooks, CancellationToken::new());
        tokio::time::pause();
        let poll = outbox.webhooks.inner.options.poll;
        assert!(outbox.work().is_some());
        outbox.done(Done { is_away: true, ..Done::default() });
        assert!(outbox.work().is_none());
        assert_eq!(outbox.wake_at(false, None), Instant::now() + poll);
        tokio::time::advance(poll).await;
        assert!(outbox.work().is_some(), "it is asked again");
        for stop_by in [None, Some(Instant::now() + poll * 30)] {
            tokio::time::advance(poll).await;
            assert_eq!(outbox.wake_at(true, stop_by), Instant::now() + poll, "the round goes on");
        }
        // While it stops, and sends are still in flight.
        outbox.done(Done { is_away: true, ..Done::default() });
        outbox.shutdown.cancel();
        tokio::time::advance(poll * 2).await;
        assert!(outbox.work().is_none());
        assert_eq!(outbox.wake_at(false, Some(Instant::now() + poll * 30)), Instant::now() + poll);
    }
}
