//! The senders of webhooks, step by step, on the real outbox: claims, attempts, what came of them, the reaper, and retries of
//! dead letters by hand, with a model in plain maps of what each call must answer and what the database must hold after it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use rand::{RngExt, rngs::StdRng};
use tidemill::{
    domain::{
        DeadLetterId, DeliveryId, Scope,
        webhook::{AttemptResult, DeliveryState, ErrorKind, PROGRESS_LIFETIME, WebhookEvent, target_of},
    },
    store::{
        BeginRetry, ClaimShare, ClaimedDelivery, DeadLetterFilter, DeliveryFilter, DeliveryRecord, SettledAs,
        Settlement, Store,
    },
};

/// How long a lease outlives the time of its attempt (docs/webhooks.md).
const MARGIN: i64 = 30_000_000;
/// The reaper's wait before the next attempt.
const REAPED_WAIT: Duration = Duration::from_secs(7);

/// Whoever has a lease, and until when.
#[derive(Clone, Debug)]
struct Lease {
    token: String,
    until: i64,
}

/// A delivery as it is meant to be.
#[derive(Debug)]
struct Known {
    state: DeliveryState,
    target: String,
    body: Vec<u8>,
    attempts: i32,
    max_attempts: i32,
    disposable: bool,
    due: i64,
    expires: Option<i64>,
    lease: Option<Lease>,
    /// Generation, attempt, outcome.
    log: BTreeMap<(i32, i32), &'static str>,
    /// The receiver has said that it has it.
    answered: bool,
    dead: Option<Dead>,
}

/// A dead letter as it is meant to be.
#[derive(Debug, Default)]
struct Dead {
    lease: Option<Lease>,
    retries: i32,
    delivered: bool,
}

impl Known {
    fn new(record: &DeliveryRecord) -> Self {
        let disposable = record.event == WebhookEvent::Progress;
        Self {
            state: DeliveryState::Pending,
            target: target_of(&record.url),
            body: record.body.clone(),
            attempts: 0,
            max_attempts: record.max_attempts,
            disposable,
            due: record.created_at.0,
            expires: disposable.then(|| record.created_at.plus(PROGRESS_LIFETIME).0),
            lease: None,
            log: BTreeMap::new(),
            answered: false,
            dead: None,
        }
    }

    fn is_due(&self, now: i64) -> bool {
        self.state == DeliveryState::Pending && self.due <= now && self.expires.is_none_or(|at| at > now)
    }

    fn fail(&mut self, for_good: bool, wait: Duration, now: i64) -> SettledAs {
        if !for_good && self.attempts < self.max_attempts {
            self.state = DeliveryState::Pending;
            self.due = now + wait.as_micros() as i64;
            SettledAs::Pending
        } else if self.disposable {
            self.state = DeliveryState::Cancelled;
            SettledAs::Cancelled
        } else {
            self.state = DeliveryState::Dead;
            self.dead = Some(Dead::default());
            SettledAs::Dead
        }
    }

    fn settle(&mut self, one: &Settlement, now: i64) -> SettledAs {
        if self.lease.as_ref().is_none_or(|lease| lease.token != one.lease) {
            return SettledAs::LeaseLost;
        }
        self.lease = None;
        let at = (0, one.attempt);
        match &one.result {
            None => {
                self.log.remove(&at);
                self.attempts -= 1;
                self.state = DeliveryState::Pending;
                SettledAs::Pending
            }
            Some(AttemptResult { error: None, .. }) => {
                self.log.insert(at, "succeeded");
                self.state = DeliveryState::Delivered;
                SettledAs::Delivered
            }
            Some(AttemptResult { error: Some(error), .. }) => {
                self.log.insert(at, "failed");
                self.fail(error.kind == ErrorKind::Gone, one.wait, now)
            }
        }
    }

    /// Attempts that are not known to have ended.
    fn lose(&mut self, by_hand: bool) {
        let open = self
            .log
            .iter_mut()
            .filter(|((generation, _), outcome)| (*generation > 0) == by_hand && **outcome == "started");
        open.for_each(|(_, outcome)| *outcome = "unknown");
    }

    fn is_settled(&self) -> bool {
        self.lease.is_none()
            && self.dead.as_ref().is_none_or(|dead| dead.lease.is_none())
            && !matches!(self.state, DeliveryState::Pending | DeliveryState::Leased)
    }
}

/// An attempt under way.
#[derive(Debug)]
struct Flight {
    node: usize,
    claim: ClaimedDelivery,
    /// What is to be written down, once that is known.
    settlement: Option<Settlement>,
}

/// A retry by hand under way.
#[derive(Debug)]
struct ByHand {
    node: usize,
    id: DeadLetterId,
    claim: ClaimedDelivery,
}

#[derive(Default)]
pub struct Outbox {
    flights: Vec<Flight>,
    by_hand: Vec<ByHand>,
    /// What processes that are gone, or were frozen, may still write down.
    late: Vec<Settlement>,
    known: BTreeMap<DeliveryId, Known>,
    /// Those that the step was about.
    touched: BTreeSet<DeliveryId>,
}

impl Outbox {
    /// One step of one of the nodes that are awake.
    pub async fn step(&mut self, store: &Store, awake: &[usize], now: i64, faults: bool, random: &mut StdRng) {
        match random.random_range(0..16) {
            0..4 => self.claim(store, awake, now, faults, random).await,
            4..8 => self.send(awake, faults, random),
            8..12 => self.settle(store, awake, now, faults, random).await,
            12 => self.reap(store, false, now).await,
            13 => self.begin_by_hand(store, awake, now, faults, random).await,
            14 => self.finish_by_hand(store, awake, faults, random).await,
            _ => self.haunt(store, now, random).await,
        }
        if !self.touched.is_empty() {
            let touched = std::mem::take(&mut self.touched);
            self.check(store, &touched).await;
        }
    }

    /// `kill -9` of one node.
    pub fn crash(&mut self, node: usize) {
        self.by_hand.retain(|one| one.node != node);
        let (gone, left) = std::mem::take(&mut self.flights).into_iter().partition(|flight| flight.node == node);
        self.flights = left;
        let gone: Vec<Flight> = gone;
        self.late.extend(gone.into_iter().filter_map(|flight| flight.settlement));
    }

    /// The one process of a small installation is killed, and takes over from itself.
    pub async fn restart_all(&mut self, store: &Store, now: i64) {
        self.flights.clear();
        self.by_hand.clear();
        self.late.clear();
        self.reap(store, true, now).await;
        let touched = std::mem::take(&mut self.touched);
        self.check(store, &touched).await;
    }

    /// Nothing waits and nothing is being sent.
    pub async fn is_all_settled(&mut self, store: &Store) -> bool {
        self.observe(store).await;
        self.known.values().all(Known::is_settled)
    }

    /// Finds deliveries that have been written since, and progress that was superseded.
    async fn observe(&mut self, store: &Store) -> Vec<DeliveryRecord> {
        let records = store.deliveries(&DeliveryFilter::within(Scope::All), None, 1_000).await.unwrap();
        for record in &records {
            let known = self.known.entry(record.id.clone()).or_insert_with(|| Known::new(record));
            if record.state == DeliveryState::Cancelled && known.state == DeliveryState::Pending && known.disposable {
                known.state = DeliveryState::Cancelled;
            }
        }
        assert_eq!(records.len(), self.known.len(), "no delivery is ever gone");
        records
    }

    /// Compares the database with the model; the attempts of some deliveries only.
    async fn check(&mut self, store: &Store, of: &BTreeSet<DeliveryId>) {
        for record in self.observe(store).await {
            let known = &self.known[&record.id];
            assert_eq!((record.state, record.attempts), (known.state, known.attempts), "{known:?}");
            assert_eq!(record.body, known.body, "the same bytes for every attempt");
            assert_eq!(
                record.settled_at.is_some(),
                !matches!(known.state, DeliveryState::Pending | DeliveryState::Leased)
            );
            if known.state == DeliveryState::Pending {
                assert_eq!(record.next_attempt_at.map(|at| at.0), Some(known.due));
            }
            assert!(known.state != DeliveryState::Delivered || known.answered, "delivered, and nobody has it");
            if !of.contains(&record.id) {
                continue;
            }
            let log = store.attempts(&record.id, &Scope::All).await.unwrap();
            let log: Vec<_> = log.iter().map(|one| ((one.generation, one.attempt), one.outcome.as_str())).collect();
            assert_eq!(log, known.log.iter().map(|(at, outcome)| (*at, *outcome)).collect::<Vec<_>>());
        }
        if of.iter().all(|id| self.known[id].state != DeliveryState::Dead) {
            return;
        }
        let letters = store.dead_letters(&DeadLetterFilter::within(Scope::All), None, 1_000).await.unwrap();
        let mut found: Vec<_> = letters
            .iter()
            .map(|letter| (&letter.delivery_id, letter.attempts, letter.retry_count, letter.retry_success))
            .collect();
        found.sort();
        let dead = self.known.iter().filter_map(|(id, known)| {
            known.dead.as_ref().map(|dead| (id, known.attempts, i64::from(dead.retries), dead.delivered))
        });
        assert_eq!(found, dead.collect::<Vec<_>>(), "one dead letter for each delivery that was given up");
    }

    /// At the end: each is delivered or a dead letter, and of every attempt there is an outcome.
    pub async fn check_end(&mut self, store: &Store) {
        let all = self.known.keys().cloned().collect();
        self.check(store, &all).await;
        for known in self.known.values() {
            assert!(known.is_settled());
            assert_eq!(known.dead.is_some(), known.state == DeliveryState::Dead);
            assert!(known.disposable || known.state != DeliveryState::Cancelled, "dropped: {known:?}");
            assert!(known.log.values().all(|outcome| *outcome != "started"), "it says it is still going on: {known:?}");
        }
    }

    async fn claim(&mut self, store: &Store, awake: &[usize], now: i64, faults: bool, random: &mut StdRng) {
        let Some(node) = pick(awake, random).copied() else { return };
        self.observe(store).await;
        let due = store.due_targets(&[]).await.unwrap().targets;
        let mut expected: BTreeMap<&str, i64> = BTreeMap::new();
        for known in self.known.values().filter(|known| known.state == DeliveryState::Pending) {
            let first = expected.entry(&known.target).or_insert(i64::MAX);
            *first = known.due.min(*first);
        }
        assert!(due.iter().map(|due| (due.target.as_str(), due.due)).eq(expected), "{due:?}");
        let shares: Vec<_> =
            due.into_iter().map(|due| ClaimShare::new(due.owner, due.target, random.random_range(1..=2))).collect();
        let mut wanted = Vec::new();
        for ClaimShare { target, count, .. } in &shares {
            let mut ready: Vec<_> = self
                .known
                .iter()
                .filter(|(_, known)| known.target == *target && known.is_due(now))
                .map(|(id, known)| (known.due, id.clone()))
                .collect();
            ready.sort();
            wanted.extend(ready.into_iter().take(*count).map(|(_, id)| id));
        }
        let claimed = store.claim_deliveries(&shares).await.unwrap();
        assert_eq!(claimed.iter().map(|claim| claim.id.clone()).collect::<Vec<_>>(), wanted, "claim");
        let lost = faults && random.random_bool(0.1);
        for claim in claimed {
            self.touched.insert(claim.id.clone());
            let known = self.known.get_mut(&claim.id).unwrap();
            known.state = DeliveryState::Leased;
            known.attempts += 1;
            known.lease =
                Some(Lease { token: claim.lease.clone(), until: now + claim.timeout.as_micros() as i64 + MARGIN });
            known.log.insert((0, claim.attempt), "started");
            assert_eq!((claim.attempt, &claim.body[..]), (known.attempts, &known.body[..]));
            // Lost: the node does not know what it has.
            if !lost {
                self.flights.push(Flight { node, claim, settlement: None });
            }
        }
    }

    /// The receiver gets it and answers, or not; or it is not sent at all, because the node is stopping.
    fn send(&mut self, awake: &[usize], faults: bool, random: &mut StdRng) {
        let ready: Vec<usize> = (0..self.flights.len())
            .filter(|at| self.flights[*at].settlement.is_none() && awake.contains(&self.flights[*at].node))
            .collect();
        let Some(at) = pick(&ready, random) else { return };
        let claim = &self.flights[*at].claim;
        let known = self.known.get_mut(&claim.id).unwrap();
        let result = answer(faults, random);
        known.answered |= result.as_ref().is_some_and(AttemptResult::succeeded);
        let settlement = Settlement {
            id: claim.id.clone(),
            lease: claim.lease.clone(),
            attempt: claim.attempt,
            result,
            wait: Duration::from_secs(random.random_range(0..60)),
        };
        self.flights[*at].settlement = Some(settlement);
    }

    /// One node writes down what it knows, all at once, and maybe does not hear that it was written.
    async fn settle(&mut self, store: &Store, awake: &[usize], now: i64, faults: bool, random: &mut StdRng) {
        let Some(node) = pick(awake, random).copied() else { return };
        let mine = |flight: &Flight| flight.node == node && flight.settlement.is_some();
        let settlements: Vec<_> =
            self.flights.iter().filter(|flight| mine(flight)).filter_map(|flight| flight.settlement.clone()).collect();
        if settlements.is_empty() {
            return;
        }
        self.write(store, &settlements, now).await;
        if !(faults && random.random_bool(0.2)) {
            self.flights.retain(|flight| !mine(flight));
        }
    }

    async fn write(&mut self, store: &Store, settlements: &[Settlement], now: i64) {
        let settled = store.settle_deliveries(settlements).await.unwrap();
        assert_eq!(settled.len(), settlements.len());
        for (one, settled) in settlements.iter().zip(settled) {
            assert_eq!(settled.id, one.id);
            self.touched.insert(one.id.clone());
            let expected = self.known.get_mut(&one.id).unwrap().settle(one, now);
            assert_eq!(settled.now, expected, "{one:?}");
        }
    }

    async fn haunt(&mut self, store: &Store, now: i64, random: &mut StdRng) {
        if !self.late.is_empty() {
            let late = self.late.swap_remove(random.random_range(0..self.late.len()));
            self.write(store, &[late], now).await;
        }
    }

    async fn reap(&mut self, store: &Store, all: bool, now: i64) {
        self.observe(store).await;
        let reaped = store.reap_deliveries(all, |_| REAPED_WAIT).await.unwrap();
        let over = |lease: &Option<Lease>| lease.as_ref().is_some_and(|lease| all || lease.until < now);
        let (mut pending, mut dead, mut expired) = (0, 0, 0);
        for (id, known) in &mut self.known {
            if over(&known.lease) || known.dead.as_ref().is_some_and(|dead| over(&dead.lease)) {
                self.touched.insert(id.clone());
            }
            if known.state == DeliveryState::Pending && known.expires.is_some_and(|at| at <= now) {
                known.state = DeliveryState::Cancelled;
                expired += 1;
            }
            if known.dead.as_ref().is_some_and(|dead| over(&dead.lease)) {
                known.dead.as_mut().unwrap().lease = None;
                known.lose(true);
            }
            if over(&known.lease) {
                known.lease = None;
                known.lose(false);
                match known.fail(false, REAPED_WAIT, now) {
                    SettledAs::Pending => pending += 1,
                    SettledAs::Dead => dead += 1,
                    _ => {}
                }
            }
        }
        assert_eq!((reaped.pending, reaped.dead, reaped.expired), (pending, dead, expired), "reaped");
    }

    async fn begin_by_hand(&mut self, store: &Store, awake: &[usize], now: i64, faults: bool, random: &mut StdRng) {
        let Some(node) = pick(awake, random).copied() else { return };
        if self.known.values().all(|known| known.dead.is_none()) {
            return;
        }
        let letters = store.dead_letters(&DeadLetterFilter::within(Scope::All), None, 1_000).await.unwrap();
        let Some(letter) = pick(&letters, random) else { return };
        self.touched.insert(letter.delivery_id.clone());
        let known = self.known.get_mut(&letter.delivery_id).unwrap();
        let (busy, over) = match &known.dead.as_ref().unwrap().lease {
            Some(lease) => (lease.until >= now, lease.until < now),
            None => (false, false),
        };
        let delivered = known.dead.as_ref().unwrap().delivered;
        match store.begin_retry(&letter.id, &Scope::All, false, None).await.unwrap() {
            BeginRetry::Busy => assert!(busy),
            BeginRetry::AlreadyDelivered => assert!(!busy && delivered),
            BeginRetry::Started { claim, forced } => {
                assert!(!busy && !delivered && !forced);
                if over {
                    known.lose(true);
                }
                let dead = known.dead.as_mut().unwrap();
                dead.retries += 1;
                let until = now + claim.timeout.as_micros() as i64 + MARGIN;
                dead.lease = Some(Lease { token: claim.lease.clone(), until });
                known.log.insert((dead.retries, 1), "started");
                assert_eq!((claim.generation, &claim.body[..]), (dead.retries, &known.body[..]));
                if !(faults && random.random_bool(0.3)) {
                    self.by_hand.push(ByHand { node, id: letter.id.clone(), claim: *claim });
                }
            }
            other => panic!("{other:?}"),
        }
    }

    async fn finish_by_hand(&mut self, store: &Store, awake: &[usize], faults: bool, random: &mut StdRng) {
        let ready: Vec<usize> = (0..self.by_hand.len()).filter(|at| awake.contains(&self.by_hand[*at].node)).collect();
        let Some(at) = pick(&ready, random) else { return };
        let one = self.by_hand.swap_remove(*at);
        self.touched.insert(one.claim.id.clone());
        let known = self.known.get_mut(&one.claim.id).unwrap();
        let dead = known.dead.as_mut().unwrap();
        let result = answer(faults, random).unwrap_or_else(|| AttemptResult::failed(ErrorKind::Connect, "refused"));
        let held = dead.lease.as_ref().is_some_and(|lease| lease.token == one.claim.lease);
        let finished = store.finish_retry(&one.id, &one.claim, &result).await.unwrap();
        assert_eq!(finished.is_some(), held, "whoever lost its lease writes nothing");
        if held {
            dead.lease = None;
            dead.delivered |= result.succeeded();
            let outcome = if result.succeeded() { "succeeded" } else { "failed" };
            known.log.insert((one.claim.generation, 1), outcome);
        }
    }
}

/// None: it is not sent.
fn answer(faults: bool, random: &mut StdRng) -> Option<AttemptResult> {
    let success = AttemptResult { error: None, http_status: Some(204), response_excerpt: None };
    match if faults { random.random_range(0..20) } else { 0 } {
        0..10 => Some(success),
        10..17 => Some(AttemptResult::failed(ErrorKind::Status, "503")),
        17 => Some(AttemptResult::failed(ErrorKind::Gone, "410")),
        _ => None,
    }
}

fn pick<'a, T>(from: &'a [T], random: &mut StdRng) -> Option<&'a T> {
    (!from.is_empty()).then(|| &from[random.random_range(0..from.len())])
}
