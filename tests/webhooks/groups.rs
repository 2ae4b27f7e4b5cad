//! Many deliveries in one transaction, against the state machine; and an outbox that is busy, stopped and killed.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use sea_orm::{ConnectionTrait, Statement};
use tidemill::{
    delivery::fairness::PER_TARGET,
    domain::Scope,
    domain::webhook::{AttemptResult, Delivery, DeliveryState, DeliveryTrigger, ErrorKind, apply},
    store::{ClaimShare, ClaimedDelivery, DeliveryFilter, DeliveryRecord, SettledAs, Settlement},
};

use crate::{
    fixture::Db,
    receiver::{Gate, Receiver, Reply},
};

crate::on_both!(
    any_order_of_results_settles_each_lease_once,
    the_longest_due_are_claimed_and_no_more_than_asked,
    a_row_that_cannot_be_claimed_keeps_none_from_being_settled,
    a_busy_outbox_that_is_stopped_has_charged_what_it_has_sent,
    a_busy_outbox_that_is_killed_delivers_the_rest,
);

/// Writes deliveries that are due, as a batch's end does.
async fn enqueue(db: &Db, prefix: &str, target: &str, count: usize, max_attempts: i32) -> Vec<String> {
    let ids: Vec<_> = (0..count).map(|n| format!("msg_{prefix}{n:04}")).collect();
    for ids in ids.chunks(100) {
        let rows: Vec<_> = (0..ids.len())
            .map(|n| {
                let [id, target, body] = [1, 2, 3].map(|at| format!("${}", n * 3 + at));
                format!(
                    "({id}, '', 'completed', {target}, {target}, {body}, {max_attempts}, 5000000, 'pending', 0, 1, 1)"
                )
            })
            .collect();
        let sql = format!(
            "INSERT INTO webhook_deliveries (id, owner, event, url, target, body, max_attempts, timeout, state, attempts, \
             next_attempt_at, created_at) VALUES {}",
            rows.join(", ")
        );
        let values: Vec<sea_orm::Value> =
            ids.iter().flat_map(|id| [id.clone().into(), target.into(), b"{}".to_vec().into()]).collect();
        let statement = Statement::from_sql_and_values(db.raw.get_database_backend(), sql, values);
        db.raw.execute_raw(statement).await.unwrap();
    }
    ids
}

async fn all(db: &Db) -> BTreeMap<String, DeliveryRecord> {
    let all = db.store.deliveries(&DeliveryFilter::within(Scope::All), None, 10_000).await.unwrap();
    all.into_iter().map(|one| (one.id.to_string(), one)).collect()
}

fn settlement(claim: &ClaimedDelivery, result: Option<AttemptResult>) -> Settlement {
    Settlement {
        id: claim.id.clone(),
        lease: claim.lease.clone(),
        attempt: claim.attempt,
        result,
        wait: Duration::ZERO,
    }
}

fn success() -> AttemptResult {
    AttemptResult { error: None, http_status: Some(204), response_excerpt: Some("it's \"fine\" é".into()) }
}

/// What the test knows of a delivery.
struct Known {
    is: Delivery,
    lease: Option<String>,
    /// The outcome of each attempt.
    log: Vec<&'static str>,
}

impl Known {
    /// The same input as the store had, through the pure state machine.
    fn step(&mut self, input: DeliveryTrigger, outcome: Option<&'static str>) {
        let step = apply(self.is, input).unwrap();
        (self.is.state, self.is.attempts) = (step.state, step.attempts);
        self.lease = None;
        match outcome {
            Some(outcome) => *self.log.last_mut().unwrap() = outcome,
            None => drop(self.log.pop()),
        }
    }
}

struct World<'a> {
    db: &'a Db,
    random: StdRng,
    known: BTreeMap<String, Known>,
    /// Claims whose result is still to come; of some the lease is lost by then.
    flying: Vec<ClaimedDelivery>,
    /// Claims that have been settled: somebody may try it again.
    over: Vec<ClaimedDelivery>,
    targets: Vec<String>,
}

impl World<'_> {
    async fn turn(&mut self, calm: bool) {
        self.flying.shuffle(&mut self.random);
        let count = if calm { self.flying.len() } else { self.random.random_range(0..=self.flying.len()) };
        let mut landing = self.flying.split_off(self.flying.len() - count);
        if !self.over.is_empty() && self.random.random_bool(0.5) {
            let at = self.random.random_range(0..self.over.len());
            landing.insert(self.random.random_range(0..=landing.len()), self.over[at].clone());
        }
        let settlements: Vec<_> = landing
            .iter()
            .map(|claim| {
                let result = match self.random.random_range(0..10) {
                    _ if calm => Some(success()),
                    0..5 => Some(success()),
                    5 => None,
                    6 => Some(AttemptResult::failed(ErrorKind::Gone, "410")),
                    _ => Some(AttemptResult::failed(ErrorKind::Connect, "refused")),
                };
                settlement(claim, result)
            })
            .collect();
        let shares: Vec<_> = self
            .targets
            .iter()
            .filter(|_| self.random.random_bool(0.7))
            .map(|target| ClaimShare::new("", target.as_str(), 3))
            .collect();
        let settled = self.db.store.settle_deliveries(&settlements).await.unwrap();
        assert_eq!(settled.len(), settlements.len());
        for (one, settled) in settlements.iter().zip(&settled) {
            assert_eq!(one.id, settled.id);
            let known = self.known.get_mut(one.id.as_str()).unwrap();
            if known.lease.as_ref() != Some(&one.lease) {
                assert_eq!(settled.now, SettledAs::LeaseLost);
                continue;
            }
            match &one.result {
                None => known.step(DeliveryTrigger::Released, None),
                Some(result) => match &result.error {
                    None => known.step(DeliveryTrigger::Succeeded, Some("succeeded")),
                    Some(error) if error.kind == ErrorKind::Gone => {
                        known.step(DeliveryTrigger::FailedForGood, Some("failed"));
                    }
                    Some(_) => known.step(DeliveryTrigger::Failed, Some("failed")),
                },
            }
            let expected = match known.is.state {
                DeliveryState::Pending => SettledAs::Pending,
                DeliveryState::Delivered => SettledAs::Delivered,
                DeliveryState::Dead => SettledAs::Dead,
                DeliveryState::Leased | DeliveryState::Cancelled => unreachable!(),
            };
            assert_eq!(settled.now, expected);
        }
        for claim in self.db.store.claim_deliveries(&shares).await.unwrap() {
            let known = self.known.get_mut(claim.id.as_str()).unwrap();
            let step = apply(known.is, DeliveryTrigger::Claimed).unwrap();
            (known.is.state, known.is.attempts) = (step.state, step.attempts);
            assert_eq!(claim.attempt, step.attempts);
            known.lease = Some(claim.lease.clone());
            known.log.push("started");
            self.flying.push(claim);
        }
        self.over.extend(landing);
    }

    /// Some leases run out, whether their sender is gone or only slow.
    async fn expire(&mut self) {
        let leased: Vec<_> =
            self.known.iter().filter(|(_, known)| known.lease.is_some()).map(|(id, _)| id.clone()).collect();
        for id in leased.into_iter().filter(|_| self.random.random_bool(0.4)) {
            self.db.execute(&format!("UPDATE webhook_deliveries SET lease_expires_at = 1 WHERE id = '{id}'")).await;
            self.known.get_mut(&id).unwrap().step(DeliveryTrigger::LeaseExpired, Some("unknown"));
        }
        self.db.store.reap_deliveries(false, |_| Duration::ZERO).await.unwrap();
        if self.random.random_bool(0.3) {
            // The sender crashes: of what it has in flight nothing will be heard.
            self.flying.retain(|claim| self.known[claim.id.as_str()].lease.as_ref() == Some(&claim.lease));
        }
    }

    async fn check(&self) {
        let found = all(self.db).await;
        for (id, known) in &self.known {
            let found = &found[id];
            assert_eq!((found.state, found.attempts), (known.is.state, known.is.attempts), "{id}");
            let log = self.db.attempts(&found.id).await;
            let outcomes: Vec<_> = log.iter().map(|one| one.outcome.as_str()).collect();
            assert_eq!(outcomes, known.log, "{id}");
            for one in log {
                assert_eq!(one.finished_at.is_some(), one.outcome.as_str() != "started");
                let answered = one.outcome.as_str() == "succeeded";
                assert_eq!(one.http_status, answered.then_some(204));
                assert_eq!(one.response_excerpt, success().response_excerpt.filter(|_| answered));
            }
        }
    }
}

/// Results come in any order, late, twice, or never; leases run out in between. Every step does to each delivery what the state
/// machine says, and in the end each was settled once.
async fn any_order_of_results_settles_each_lease_once(db: Db) {
    for seed in 0..5 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut known = BTreeMap::new();
        let targets: Vec<_> = (0..3).map(|n| format!("http://127.0.0.1:1/{seed}/{n}")).collect();
        for (n, target) in targets.iter().enumerate() {
            let max_attempts = random.random_range(1..=4);
            for id in enqueue(&db, &format!("{seed}x{n}x"), target, 6, max_attempts).await {
                let is = Delivery { state: DeliveryState::Pending, attempts: 0, max_attempts, disposable: false };
                known.insert(id, Known { is, lease: None, log: Vec::new() });
            }
        }
        let mut world = World { db: &db, random, known, flying: Vec::new(), over: Vec::new(), targets };
        for _ in 0..25 {
            match world.random.random_range(0..5) {
                0 => world.expire().await,
                _ => world.turn(false).await,
            }
            world.check().await;
        }
        let open = |world: &World<'_>| {
            world.known.values().any(|known| known.lease.is_some() || known.is.state == DeliveryState::Pending)
        };
        for _ in 0..60 {
            if !open(&world) {
                break;
            }
            world.turn(true).await;
            if world.flying.is_empty() {
                world.expire().await;
            }
        }
        assert!(!open(&world), "a delivery that is never settled");
        world.check().await;
        let dead: HashSet<_> = db.dead_letters().await.into_iter().map(|one| one.delivery_id.to_string()).collect();
        for (id, known) in &world.known {
            assert_eq!(dead.contains(id), known.is.state == DeliveryState::Dead, "delivered or a dead letter: {id}");
        }
    }
    let dead = db.dead_letters().await;
    let ids: HashSet<_> = dead.iter().map(|one| &one.delivery_id).collect();
    assert_eq!(ids.len(), dead.len(), "one dead letter each");
}

async fn the_longest_due_are_claimed_and_no_more_than_asked(db: Db) {
    let (one, two) = ("http://127.0.0.1:1/it's \"one\"", "http://127.0.0.1:1/two");
    enqueue(&db, "one", one, 9, 3).await;
    enqueue(&db, "two", two, 9, 3).await;
    db.execute("UPDATE webhook_deliveries SET next_attempt_at = 10 - attempts - CAST(substr(id, 8, 4) AS INTEGER)")
        .await;
    db.execute("UPDATE webhook_deliveries SET next_attempt_at = 9223372036854775000 WHERE id = 'msg_two0008'").await;
    let shares = [
        ClaimShare::new("", one, 2),
        ClaimShare::new("", two, 5),
        ClaimShare::new("", "http://127.0.0.1:1/three", 7),
        ClaimShare::new("somebody else", two, 7),
    ];
    let claimed = db.store.claim_deliveries(&shares).await.unwrap();
    let ids: Vec<_> = claimed.iter().map(|one| one.id.as_str()).collect();
    let expected = ["one0008", "one0007", "two0007", "two0006", "two0005", "two0004", "two0003"];
    assert_eq!(ids, expected.map(|id| format!("msg_{id}")));
    assert_eq!(claimed.iter().map(|one| &one.lease).collect::<HashSet<_>>().len(), 1);
}

async fn a_row_that_cannot_be_claimed_keeps_none_from_being_settled(db: Db) {
    let gate = Gate::closed();
    let held = gate.reply(204);
    let receiver = Receiver::start(move |_, _| held.clone()).await;
    let good = enqueue(&db, "good", &receiver.url("/good"), 4, 3).await;
    // What no version has written, due once the others are in flight.
    enqueue(&db, "bad", &receiver.url("/bad"), 1, 3).await;
    let later = "UPDATE webhook_deliveries SET event = 'nonsense', next_attempt_at = 9000000000000000 \
                 WHERE id = 'msg_bad0000'";
    db.execute(later).await;
    let running = db.start();
    receiver.wait(4).await;
    db.execute("UPDATE webhook_deliveries SET next_attempt_at = 1 WHERE id = 'msg_bad0000'").await;
    gate.open();
    delivered(&db, good.len()).await;
    assert_eq!(receiver.requests().len(), 4);
    running.stop().await;
}

/// Waits until so many are delivered.
async fn delivered(db: &Db, wanted: usize) {
    let sql = "SELECT COUNT(*) AS n FROM webhook_deliveries WHERE state = 'delivered'";
    let asked = tokio::time::timeout(crate::support::patience::HANG, async {
        loop {
            let statement = Statement::from_string(db.raw.get_database_backend(), sql);
            let count: i64 = db.raw.query_one_raw(statement).await.unwrap().unwrap().try_get("", "n").unwrap();
            if usize::try_from(count).unwrap() >= wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    asked.await.unwrap_or_else(|_| panic!("never {wanted} delivered"));
}

/// How often the receiver has seen each.
fn seen(receiver: &Receiver) -> HashMap<String, i32> {
    let mut seen = HashMap::new();
    for request in receiver.requests() {
        *seen.entry(request.header("webhook-id").to_owned()).or_default() += 1;
    }
    seen
}

async fn a_busy_outbox_that_is_stopped_has_charged_what_it_has_sent(db: Db) {
    let receiver = Receiver::start(|n, _| Reply::Status(if n % 50 == 0 { 500 } else { 204 })).await;
    let mut ids = Vec::new();
    for n in 0..10 {
        ids.extend(enqueue(&db, &format!("{n}x"), &receiver.url(&format!("/{n}")), 80, 3).await);
    }
    let running = db.start();
    receiver.wait(200).await;
    running.stop().await;
    let (seen_so_far, stopped) = (seen(&receiver), all(&db).await);
    let mut waiting = 0;
    for id in &ids {
        let (one, seen) = (&stopped[id], seen_so_far.get(id).copied().unwrap_or(0));
        assert_eq!(one.attempts, seen, "{one:?}");
        assert_eq!(db.attempts(&one.id).await.len(), usize::try_from(seen).unwrap());
        waiting += usize::from(one.state == DeliveryState::Pending);
        assert!(matches!(one.state, DeliveryState::Pending | DeliveryState::Delivered));
    }
    assert!(waiting > 0, "it was stopped in the middle");
    let running = db.start();
    delivered(&db, ids.len()).await;
    running.stop().await;
    let delivered = all(&db).await;
    for (id, seen) in seen(&receiver) {
        assert_eq!(delivered[&id].attempts, seen, "none twice but what failed");
    }
}

async fn a_busy_outbox_that_is_killed_delivers_the_rest(db: Db) {
    let receiver = Receiver::always(204).await;
    let mut ids = Vec::new();
    for n in 0..10 {
        ids.extend(enqueue(&db, &format!("{n}x"), &receiver.url(&format!("/{n}")), 60, 3).await);
    }
    let running = db.start();
    receiver.wait(150).await;
    running.kill().await;
    let killed = all(&db).await;
    let seen_so_far = seen(&receiver);
    let leased = killed.values().filter(|one| one.state == DeliveryState::Leased).count();
    assert!(leased <= 10 * PER_TARGET, "{leased} claimed, and they can't all have been sent");
    for id in &ids {
        let charged = killed[id].attempts;
        assert!(charged >= seen_so_far.get(id).copied().unwrap_or(0), "an attempt is written before it is made");
    }
    let running = db.start();
    delivered(&db, ids.len()).await;
    running.stop().await;
    let seen = seen(&receiver);
    assert!(ids.iter().all(|id| seen.contains_key(id)), "at least once");
    assert!(db.dead_letters().await.is_empty());
}
