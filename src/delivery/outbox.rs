//! The outbox loop: claims due deliveries, sends them and records the results.
//!
//! The database is asked in turns, one at a time: a transaction that settles all attempts that have ended and claims what the
//! line has room for, then a look at what is due. While a turn is under way sends go on, from the line, and what they come to
//! is gathered for the next turn. So the busier it is the more deliveries share a commit, and no send waits for one.

use std::{
    collections::HashMap,
    time::{Duration, Instant as StdInstant},
};

use futures::{FutureExt, future::BoxFuture};
use rand::{RngExt, SeedableRng, rngs::StdRng};
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
    fairness::{AHEAD, Due, Fairness, Share},
    metrics,
    send::Sent,
};
use crate::{
    domain::{BatchId, DeliveryId, Timestamp, webhook::AttemptResult},
    fault::{self, Fault},
    store::{self, ClaimShare, ClaimedDelivery, DueTargets, Settled, SettledAs, Settlement, Store, StoreError, Turn},
    supervise::Part,
};

/// While sends are in flight, this many results are collected before they are recorded.
const GATHER: usize = AHEAD / 2;
/// The longest wait of the first collected result.
const GATHER_FOR: Duration = Duration::from_millis(10);
/// How long a result is kept that the database refuses, because the database may be under repair. Shorter than the time
/// by which the lease exceeds the attempt.
const KEPT: Duration = Duration::from_secs(20);
/// How long a target is skipped whose deliveries the database refuses to claim.
const REFUSED: Duration = Duration::from_secs(60);
/// If an owner has more targets than one query returns, the next query follows after this time.
const NEXT_PAGE: Duration = Duration::from_millis(50);

/// The loop's state of a send in flight.
struct InFlight {
    owner: String,
    target: String,
    created_at: Timestamp,
}

/// The outcome of an attempt that is not recorded yet.
struct Unsettled {
    settlement: Settlement,
    created_at: Timestamp,
}

/// One turn's work.
struct Work {
    settlements: Vec<Settlement>,
    /// When their deliveries were created, in the same order.
    created: Vec<Timestamp>,
    shares: Vec<Share>,
    /// Whether to query due deliveries in any case.
    look: bool,
    /// Where the query continues for owners with very many targets.
    after: Vec<(String, String)>,
}

/// The results: of the transaction, and of the query if there was one.
struct Done {
    work: Work,
    turn: Result<Turn, StoreError>,
    look: Option<Result<DueTargets, StoreError>>,
}

pub(super) struct Outbox {
    webhooks: Webhooks,
    shutdown: CancellationToken,
    fairness: Fairness<ClaimedDelivery>,
    random: StdRng,
    sends: JoinSet<(ClaimedDelivery, Sent)>,
    in_flight: HashMap<Id, InFlight>,
    /// Results that are kept until the database accepts them.
    unsettled: Vec<Unsettled>,
    /// When the first of them was added.
    gathering_since: Option<Instant>,
    /// The targets that were due at the last query.
    due: Vec<Due>,
    /// Where the next query continues for owners with very many targets.
    after: Vec<(String, String)>,
    /// Whether it is time for another query.
    look: bool,
    /// The time of the next query at the latest.
    look_at: Instant,
    /// Until when the database counts as unreachable: the next attempt is at the next poll, not at the next event.
    away_until: Option<Instant>,
    /// Set when a turn that both claimed and settled has failed: then they take separate turns until a claim works
    /// again, so that a row that can't be claimed does not keep others from being settled.
    apart: bool,
    /// If they are separate, whether claims are next.
    claims_next: bool,
    /// After the database has refused a turn of several things for good, this many turns handle one thing each, so that
    /// the refused one is found and keeps nothing else from being written.
    one_by_one: usize,
    /// Results that were refused on their own, and since when.
    unwritten: HashMap<DeliveryId, Instant>,
    /// Targets whose claim was refused on its own, and until when they are skipped.
    refused: HashMap<(String, String), Instant>,
    /// Targets that had fewer deliveries than asked for: none (false), or none that may wait in line (true). They are
    /// not asked again before there is news or the next query.
    spent: HashMap<(String, String), bool>,
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
            gathering_since: None,
            due: Vec::new(),
            after: Vec::new(),
            look: true,
            look_at: Instant::now(),
            away_until: None,
            apart: false,
            claims_next: false,
            one_by_one: 0,
            unwritten: HashMap::new(),
            refused: HashMap::new(),
            spent: HashMap::new(),
            shutdown,
            webhooks,
        }
    }

    /// Delivers until the shutdown, and then until sends in flight have ended and are recorded, or their time is over.
    pub(super) async fn run(mut self) {
        let mut changes = self.webhooks.inner.store.changes();
        let mut turn: Option<BoxFuture<'static, Done>> = None;
        let mut stop_by = None;
        loop {
            fault::panic_in(Part::Webhooks);
            if self.shutdown.is_cancelled() {
                let by = *stop_by.get_or_insert_with(|| Instant::now() + self.webhooks.inner.options.drain);
                for claim in self.fairness.drain() {
                    self.release(claim);
                }
                let done = self.sends.is_empty() && self.unsettled.is_empty() && turn.is_none();
                if done || Instant::now() >= by {
                    break;
                }
            } else {
                while let Some(claim) = self.fairness.next(now()) {
                    self.send(claim);
                }
            }
            if turn.is_none() {
                turn = self.work().map(|work| act(self.webhooks.inner.store.clone(), work).boxed());
            }
            let wake_at = self.wake_at(turn.is_some(), stop_by);
            tokio::select! {
                Some(ended) = self.sends.join_next_with_id() => {
                    self.ended(ended);
                    while let Some(ended) = self.sends.try_join_next_with_id() {
                        self.ended(ended);
                    }
                }
                done = act_on(&mut turn) => {
                    turn = None;
                    self.done(done);
                }
                () = changed(&mut changes), if stop_by.is_none() => self.look = true,
                () = self.webhooks.inner.wake.notified(), if stop_by.is_none() => self.look = true,
                () = self.shutdown.cancelled(), if stop_by.is_none() => {}
                () = sleep_until(wake_at) => {}
            }
        }
        if !self.sends.is_empty() {
            warn!(count = self.sends.len(), "webhooks still in flight at shutdown; they will be sent again");
        }
    }

    /// When to wake up if nothing happens.
    fn wake_at(&self, turning: bool, stop_by: Option<Instant>) -> Instant {
        let soon = Instant::now() + self.webhooks.inner.options.poll;
        // During a turn the loop waits for its end; after the shutdown it makes no further queries.
        let look_at = if turning || stop_by.is_some() { soon } else { self.look_at };
        let gathered = self.gathering_since.map(|since| since + GATHER_FOR).filter(|_| !turning);
        let next = gathered.map_or(look_at, |gathered| gathered.min(look_at));
        let next = self.away_until.map_or(next, |away| next.max(away));
        stop_by.map_or(next, |by| next.min(by))
    }

    /// The work of the next turn. `None` if there is none now.
    fn work(&mut self) -> Option<Work> {
        let at = Instant::now();
        if self.away_until.is_some_and(|until| until > at) {
            return None;
        }
        for claim in self.fairness.unsent(now()) {
            self.release(claim);
        }
        let stopping = self.shutdown.is_cancelled();
        let news = !stopping && (self.look || at >= self.look_at);
        if news {
            self.spent.clear();
        }
        let claiming = !stopping && (!self.apart || self.claims_next || self.unsettled.is_empty());
        let gathered = !self.unsettled.is_empty()
            && (self.unsettled.len() >= GATHER
                || self.gathering_since.is_some_and(|since| at >= since + GATHER_FOR)
                || self.sends.is_empty()
                || stopping);
        // Every turn settles and claims as much as it can.
        let due = gathered || news || self.fairness.is_low(now());
        let mut shares = if claiming && due { self.fairness.shares(&self.due, now()) } else { Vec::new() };
        let settling = if self.apart { shares.is_empty() } else { gathered || !shares.is_empty() };
        let mut unsettled = if settling { std::mem::take(&mut self.unsettled) } else { Vec::new() };
        if self.one_by_one > 0 {
            // At random, because the first may be the same each time.
            if !shares.is_empty() {
                let at = self.random.random_range(0..shares.len());
                shares.swap(0, at);
            }
            for share in shares.drain(shares.len().min(1)..) {
                self.fairness.give_back(&share.owner, &share.target, share.count);
            }
            self.unsettled.extend(unsettled.drain(unsettled.len().min(1)..));
        }
        if self.unsettled.is_empty() {
            self.gathering_since = None;
        }
        if unsettled.is_empty() && shares.is_empty() && !news {
            return None;
        }
        self.claims_next = shares.is_empty();
        self.look = false;
        let (settlements, created) = unsettled.into_iter().map(|one| (one.settlement, one.created_at)).unzip();
        Some(Work { settlements, created, shares, look: news, after: self.after.clone() })
    }

    /// Applies the results of a turn.
    fn done(&mut self, done: Done) {
        let Done { work: Work { settlements, created, shares, look, .. }, turn, look: looked } = done;
        let poll = self.webhooks.inner.options.poll;
        self.away_until = None;
        match turn {
            Ok(Turn { settled, claimed }) => {
                self.one_by_one = self.one_by_one.saturating_sub(settlements.len() + shares.len());
                // If they are separate, claims have a turn of their own.
                self.apart &= shares.is_empty();
                if !self.unwritten.is_empty() {
                    for one in &settlements {
                        self.unwritten.remove(&one.id);
                    }
                }
                settle_metrics(&settlements, &created, &settled);
                self.line_up(&shares, claimed);
            }
            Err(error) if error.is_final() && settlements.len() + shares.len() <= 1 => {
                self.one_by_one = self.one_by_one.saturating_sub(1);
                self.look = true;
                for (settlement, created_at) in settlements.into_iter().zip(created) {
                    let since = *self.unwritten.entry(settlement.id.clone()).or_insert_with(Instant::now);
                    if since.elapsed() >= KEPT || self.shutdown.is_cancelled() {
                        // Its lease expires, and the attempt counts.
                        error!(%error, delivery = %settlement.id, "what came of a webhook can't be written; it is sent again");
                        self.unwritten.remove(&settlement.id);
                        continue;
                    }
                    warn!(%error, delivery = %settlement.id, "what came of a webhook is refused; another try follows");
                    if self.unsettled.is_empty() {
                        self.away_until = Some(Instant::now() + poll);
                    }
                    // Behind the others.
                    self.unsettled.push(Unsettled { settlement, created_at });
                    self.gathering_since.get_or_insert_with(Instant::now);
                }
                for share in &shares {
                    error!(%error, target = share.target, "a receiver's webhooks can't be claimed; they wait");
                    self.fairness.give_back(&share.owner, &share.target, share.count);
                    self.refused.insert((share.owner.clone(), share.target.clone()), Instant::now() + REFUSED);
                    self.due.retain(|due| due.owner != share.owner || due.target != share.target);
                }
            }
            Err(error) => {
                warn!(%error, waiting = settlements.len(), "the webhook outbox can't be written");
                if error.is_final() {
                    self.one_by_one = settlements.len() + shares.len();
                }
                let both = !settlements.is_empty() && !shares.is_empty();
                self.apart |= both;
                self.away_until = (!both && !error.is_final()).then(|| Instant::now() + poll);
                for share in &shares {
                    self.fairness.give_back(&share.owner, &share.target, share.count);
                }
                let unsettled = settlements.into_iter().zip(created);
                let unsettled =
                    unsettled.map(|(settlement, created_at)| Unsettled { settlement, created_at }).collect();
                let since = std::mem::replace(&mut self.unsettled, unsettled);
                self.unsettled.extend(since);
                if !self.unsettled.is_empty() {
                    self.gathering_since.get_or_insert_with(Instant::now);
                }
                self.look |= look || !shares.is_empty();
            }
        }
        match looked {
            Some(Ok(looked)) => self.looked(looked),
            Some(Err(error)) => {
                warn!(%error, "the webhook outbox can't be read");
                self.look = true;
                self.away_until = Some(Instant::now() + poll);
            }
            None => {}
        }
        metrics::state(self.in_flight.len(), self.fairness.ahead(), self.fairness.held(now()));
    }

    /// Applies a query of due deliveries.
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
        self.refused.retain(|_, until| *until > Instant::now());
        self.due = targets
            .into_iter()
            .filter(|target| target.due <= at.0)
            .filter_map(|store::Due { owner, target, .. }| {
                let key = (owner, target);
                if self.refused.contains_key(&key) {
                    return None;
                }
                let ahead = match self.spent.get(&key).copied() {
                    None => true,
                    Some(true) => false,
                    Some(false) => return None,
                };
                let (owner, target) = key;
                Some(Due { host: host(&target), owner, target, count: usize::MAX, ahead })
            })
            .collect();
        if self.due.is_empty() {
            self.fairness.forget_idle(now);
        }
    }

    /// Puts claimed deliveries in line, and records which were asked for and do not exist.
    fn line_up(&mut self, shares: &[Share], claimed: Vec<ClaimedDelivery>) {
        let mut there: HashMap<(String, String), usize> = HashMap::with_capacity(shares.len());
        let now = now();
        for claim in claimed {
            let key = (claim.owner.clone(), claim.target.clone());
            self.fairness.claimed(&key.0, &key.1, claim, now);
            *there.entry(key).or_default() += 1;
        }
        for share in shares {
            let key = (share.owner.clone(), share.target.clone());
            let there = there.get(&key).copied().unwrap_or(0);
            self.fairness.give_back(&share.owner, &share.target, share.count.saturating_sub(there));
            let spent = if there == 0 && share.at_once > 0 {
                false
            } else if there <= share.at_once && there < share.count {
                true
            } else {
                continue;
            };
            self.spent.insert(key, spent);
        }
    }

    fn send(&mut self, claim: ClaimedDelivery) {
        let known = InFlight { owner: claim.owner.clone(), target: claim.target.clone(), created_at: claim.created_at };
        let webhooks = self.webhooks.clone();
        let task = self.sends.spawn(async move {
            let sent = webhooks.send(&claim).await;
            (claim, sent)
        });
        self.in_flight.insert(task.id(), known);
    }

    /// Nothing was sent, so the attempt does not count.
    fn release(&mut self, claim: ClaimedDelivery) {
        self.settle(claim, None, Duration::ZERO);
    }

    fn ended(&mut self, ended: Result<(Id, (ClaimedDelivery, Sent)), JoinError>) {
        let (claim, sent) = match ended {
            Ok((id, ended)) => {
                self.in_flight.remove(&id);
                ended
            }
            Err(error) => {
                // Its lease expires, and the attempt counts.
                if let Some(known) = self.in_flight.remove(&error.id()) {
                    warn!(%error, target = known.target, created_at = known.created_at.0, "a webhook's sender died");
                    self.fairness.failed(&known.owner, &known.target, None, now());
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
        self.unsettled.push(Unsettled { settlement: Settlement { id, lease, attempt, result, wait }, created_at });
        self.gathering_since.get_or_insert_with(Instant::now);
    }
}

/// One turn with the database.
async fn act(store: Store, work: Work) -> Done {
    let shares: Vec<_> = work
        .shares
        .iter()
        .map(|share| ClaimShare {
            owner: share.owner.clone(),
            target: share.target.clone(),
            count: share.count,
            at_once: share.at_once,
        })
        .collect();
    let asked = shares.iter().map(|share| share.count).sum();
    let turn = store.turn_deliveries(&work.settlements, &shares).await;
    if turn.is_ok() && !work.settlements.is_empty() {
        fault::point(Fault::DeliverySettled);
    }
    let look = match &turn {
        Ok(turn) if work.look || is_to_look(asked, turn.claimed.len(), &turn.settled) => {
            Some(store.due_targets(&work.after).await)
        }
        // A refused claim does not prevent the query of other due deliveries.
        Err(error) if work.look && error.is_final() => Some(store.due_targets(&work.after).await),
        Ok(_) | Err(_) => None,
    };
    Done { work, turn, look }
}

/// Whether other deliveries may be due than at the last query after a claim: a target had fewer than asked for, or
/// something waits again. As long as all targets have what is asked for, they may have more.
fn is_to_look(asked: usize, claimed: usize, settled: &[Settled]) -> bool {
    asked > 0 && (claimed < asked || settled.iter().any(|one| one.now != SettledAs::Delivered))
}

/// Waits for the end of the current turn; for ever if there is none.
async fn act_on(turn: &mut Option<BoxFuture<'static, Done>>) -> Done {
    match turn {
        Some(turn) => turn.await,
        None => std::future::pending().await,
    }
}

fn settle_metrics(settlements: &[Settlement], created: &[Timestamp], settled: &[Settled]) {
    let arrived = Timestamp::now();
    // In the same order.
    for ((one, created_at), Settled { id, now }) in settlements.iter().zip(created).zip(settled) {
        match now {
            SettledAs::Delivered => metrics::delivered(arrived.since(*created_at)),
            SettledAs::Dead => {
                let error = one.result.as_ref().and_then(|result| result.error.as_ref());
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
    use super::*;

    #[test]
    fn after_a_claim_is_looked_unless_all_got_what_they_asked_for_and_nothing_waits_again() {
        let settled = |now: &[SettledAs]| -> Vec<_> {
            now.iter().map(|now| Settled { id: DeliveryId::generate(), now: *now }).collect()
        };
        let delivered = settled(&[SettledAs::Delivered, SettledAs::Delivered]);
        assert!(!is_to_look(4, 4, &delivered) && !is_to_look(4, 4, &[]));
        assert!(is_to_look(4, 3, &delivered) && is_to_look(4, 0, &[]));
        for now in [SettledAs::Pending, SettledAs::Dead, SettledAs::Cancelled, SettledAs::LeaseLost] {
            assert!(is_to_look(4, 4, &settled(&[SettledAs::Delivered, now])), "{now:?}");
            // Nothing was claimed: who settles without a claim looks when there is news.
            assert!(!is_to_look(0, 0, &settled(&[now])));
        }
    }
}
