//! What receivers get, and what they get after a crash.

use std::{collections::HashSet, time::Duration};

use sea_orm::{ConnectionTrait, Statement, TransactionTrait};

use tidemill::{
    delivery::{
        schedule::Schedule,
        signature::{Verified, VerifyError, sign_body},
    },
    domain::Scope,
    domain::webhook::{DeliveryState, Secret, WebhookConfig, WebhookTarget},
};

use crate::{
    fixture::{CANARY, Db, eventually, settled, signed, target},
    receiver::{Gate, Receiver, Reply},
};

crate::on_both!(
    every_attempt_is_signed_anew_under_the_same_id,
    what_waits_at_a_restart_is_delivered,
    a_crash_during_an_attempt_repeats_it_under_the_same_id,
    of_two_deliverers_only_the_one_with_the_lease_writes,
    a_stop_lets_what_is_in_flight_end,
    one_receiver_that_hangs_delays_nobody_else,
    hanging_receivers_of_one_owner_hold_up_nobody,
    a_receiver_that_is_down_for_a_minute_gets_its_webhook,
);

async fn every_attempt_is_signed_anew_under_the_same_id(db: Db) {
    let receiver = Receiver::start(|n, _| Reply::Status(if n < 3 { 500 } else { 200 })).await;
    let webhooks = db.webhooks();
    let webhook = signed(&webhooks, receiver.url("/hook?job=1")).await;
    let batch = db.batch(Some(webhook), None).await;
    db.complete(&batch.id).await;
    let running = crate::fixture::Running::start(webhooks);
    let requests = receiver.wait(3).await;
    assert_eq!(settled(&db, &batch.id).await[0].state, DeliveryState::Delivered);
    let id = requests[0].header("webhook-id").to_owned();
    assert!(id.starts_with("msg_"));
    for (n, request) in (1..).zip(&requests) {
        assert_eq!(request.path, "/hook?job=1");
        assert_eq!(request.header("content-type"), "application/json");
        assert!(request.header("user-agent").starts_with("tidemill/"));
        assert_eq!((request.header("webhook-id"), request.header("x-webhook-id")), (id.as_str(), id.as_str()));
        assert_eq!(request.header("x-webhook-event"), "completed");
        assert_eq!(request.header("x-webhook-attempt"), n.to_string());
        assert_eq!(request.header("x-webhook-timestamp"), request.header("webhook-timestamp"));
        assert_eq!(request.verify(CANARY), Ok(Verified::Standard));
        assert_eq!(request.verify("another"), Err(VerifyError::Mismatch));
        let key = Secret::try_new(CANARY).unwrap();
        assert_eq!(request.header("x-webhook-signature"), sign_body(&key, &request.body));
        assert_eq!(request.body, requests[0].body);
        assert!(!request.headers.contains_key("accept-encoding"));
    }
    let body = requests[0].json();
    assert_eq!(body["id"], batch.id.as_str());
    assert_eq!((&body["type"], &body["object"]), (&"batch.completed".into(), &"batch".into()));
    assert_eq!(body["metadata"]["name"], "café 😀 \"q\"");
    assert_eq!(body["output_file_url"], format!("/v1/batches/{}/results", batch.id));
    assert!(body["error_file_id"].as_str().unwrap().starts_with("file-"));
    running.stop().await;
}

async fn what_waits_at_a_restart_is_delivered(db: Db) {
    let receiver = Receiver::always(200).await;
    let batch = db.batch(Some(target(receiver.url("/"))), None).await;
    db.complete(&batch.id).await;
    assert!(receiver.requests().is_empty());
    let running = db.start();
    receiver.wait(1).await;
    assert_eq!(settled(&db, &batch.id).await[0].state, DeliveryState::Delivered);
    running.stop().await;
    assert_eq!(receiver.requests().len(), 1);
}

async fn a_crash_during_an_attempt_repeats_it_under_the_same_id(db: Db) {
    // The first process dies after the receiver has the event and before the answer is written down.
    let receiver = Receiver::start(|n, _| if n == 1 { Reply::Silent } else { Reply::Status(200) }).await;
    let batch = db.batch(Some(target(receiver.url("/"))), None).await;
    db.complete(&batch.id).await;
    let first = db.start();
    receiver.wait(1).await;
    first.kill().await;
    let log = db.attempts(&db.deliveries(&batch.id).await[0].id).await;
    assert_eq!((log.len(), log[0].outcome.as_str()), (1, "started"), "a trace, whatever happens");
    let second = db.start();
    let requests = receiver.wait(2).await;
    let delivery = settled(&db, &batch.id).await.remove(0);
    assert_eq!((delivery.state, delivery.attempts), (DeliveryState::Delivered, 2));
    let ids: HashSet<_> = requests.iter().map(|request| request.header("webhook-id")).collect();
    assert_eq!(ids.len(), 1);
    let outcomes: Vec<_> = db.attempts(&delivery.id).await.into_iter().map(|one| one.outcome.as_str()).collect();
    assert_eq!(outcomes, ["unknown", "succeeded"]);
    second.stop().await;
}

/// Two nodes on one database, the first so slow that its lease runs out while it sends.
async fn of_two_deliverers_only_the_one_with_the_lease_writes(db: Db) {
    let gate = Gate::closed();
    let held = gate.reply(500);
    let receiver = Receiver::start(move |n, _| if n == 1 { held.clone() } else { Reply::Status(200) }).await;
    let batch = db.batch(Some(target(receiver.url("/"))), None).await;
    db.complete(&batch.id).await;
    let node = || {
        let options = tidemill::delivery::Options { sole_node: false, ..db.options() };
        crate::fixture::Running::start(tidemill::delivery::Webhooks::new(db.store.clone(), options).unwrap())
    };
    let first = node();
    receiver.wait(1).await;
    assert_eq!(db.execute("UPDATE webhook_deliveries SET lease_expires_at = 1 WHERE state = 'leased'").await, 1);
    let second = node();
    let requests = receiver.wait(2).await;
    assert_eq!(requests[0].header("webhook-id"), requests[1].header("webhook-id"));
    settled(&db, &batch.id).await;
    // Now the first one has its answer, and its lease is gone.
    gate.open();
    first.stop().await;
    second.stop().await;
    let delivery = db.deliveries(&batch.id).await.remove(0);
    assert_eq!((delivery.state, delivery.attempts), (DeliveryState::Delivered, 2));
    let outcomes: Vec<_> = db.attempts(&delivery.id).await.into_iter().map(|one| one.outcome.as_str()).collect();
    assert_eq!(outcomes, ["unknown", "succeeded"]);
    assert_eq!(receiver.requests().len(), 2);
    assert!(db.dead_letters().await.is_empty());
}

async fn a_stop_lets_what_is_in_flight_end(db: Db) {
    let gate = Gate::closed();
    let held = gate.reply(200);
    let receiver = Receiver::start(move |_, _| held.clone()).await;
    let batch = db.batch(Some(target(receiver.url("/"))), None).await;
    db.complete(&batch.id).await;
    let options = tidemill::delivery::Options { drain: Duration::from_secs(120), ..db.options() };
    let running = crate::fixture::Running::start(tidemill::delivery::Webhooks::new(db.store.clone(), options).unwrap());
    receiver.wait(1).await;
    let late = db.batch(Some(target(receiver.url("/"))), None).await;
    let mut stopping = Box::pin(running.stop());
    assert!(futures::poll!(&mut stopping).is_pending(), "it is to stop, and waits for what is in flight");
    db.complete(&late.id).await;
    gate.open();
    stopping.await;
    let delivery = &db.deliveries(&batch.id).await[0];
    assert_eq!((delivery.state, delivery.attempts), (DeliveryState::Delivered, 1));
    assert_eq!(db.deliveries(&late.id).await[0].state, DeliveryState::Pending);
    assert_eq!(receiver.requests().len(), 1);
}

async fn one_receiver_that_hangs_delays_nobody_else(db: Db) {
    let dead = Receiver::start(|_, _| Reply::Silent).await;
    let good = Receiver::always(200).await;
    let hanging = WebhookTarget { timeout: Duration::from_secs(60), ..target(dead.url("/")) };
    let mut batches = Vec::new();
    for n in 0..100 {
        let webhook = if n % 2 == 0 { hanging.clone() } else { target(good.url(&format!("/{}", n % 10))) };
        let batch = db.batch(Some(webhook), None).await;
        db.complete(&batch.id).await;
        if n % 2 == 1 {
            batches.push(batch.id);
        }
    }
    let running = db.start();
    good.wait(50).await;
    for id in &batches {
        assert_eq!(settled(&db, id).await[0].state, DeliveryState::Delivered);
    }
    assert_eq!(dead.requests().len(), 4, "four at a time, and all of them still hang");
    running.kill().await;
}

/// Two hosts, eight paths each, more deliveries than there are places: others' webhooks are sent, and so are the same owner's to
/// a receiver that answers.
async fn hanging_receivers_of_one_owner_hold_up_nobody(db: Db) {
    let (one, two) = (Receiver::start(|_, _| Reply::Silent).await, Receiver::start(|_, _| Reply::Silent).await);
    let good = Receiver::always(200).await;
    for n in 0..80 {
        let dead = if n % 2 == 0 { &one } else { &two };
        let url = dead.url(&format!("/{}", n / 2 % 8));
        let hanging = WebhookTarget { timeout: Duration::from_secs(300), ..target(url) };
        let batch = db.batch_of("bad", Some(hanging), None).await;
        db.complete(&batch.id).await;
    }
    let options = tidemill::delivery::Options { in_flight: 64, ..db.options() };
    let running = crate::fixture::Running::start(tidemill::delivery::Webhooks::new(db.store.clone(), options).unwrap());
    let hang = || one.requests().len() + two.requests().len();
    eventually("as many hang as may", || async { (hang() >= 8).then_some(()) }).await;
    for (owner, path) in [("good", "/theirs"), ("bad", "/own")] {
        let batch = db.batch_of(owner, Some(target(good.url(path))), None).await;
        db.complete(&batch.id).await;
        assert_eq!(settled(&db, &batch.id).await[0].state, DeliveryState::Delivered, "{owner}");
    }
    assert!(hang() <= 16, "{} of 64 places", hang());
    let attempts = "SELECT 1 FROM webhook_attempts WHERE outcome = 'failed'";
    assert!(
        db.raw.query_all_raw(Statement::from_string(db.raw.get_database_backend(), attempts)).await.unwrap().is_empty()
    );
    running.kill().await;
}

/// One webhook, one receiver, the default schedule. The waits are not sat out: what is due is made due.
async fn a_receiver_that_is_down_for_a_minute_gets_its_webhook(db: Db) {
    let receiver = Receiver::start(|n, _| Reply::Status(if n <= 3 { 503 } else { 200 })).await;
    let options = tidemill::delivery::Options { schedule: Schedule::default(), ..db.options() };
    let webhooks = tidemill::delivery::Webhooks::new(db.store.clone(), options).unwrap();
    let webhook = webhooks.accept(WebhookConfig::new(receiver.url("/"))).await.unwrap();
    assert_eq!(webhook.max_attempts, 10);
    let batch = db.batch(Some(webhook), None).await;
    db.complete(&batch.id).await;
    let running = crate::fixture::Running::start(webhooks);
    let mut away = Duration::ZERO;
    for attempt in 1..=3 {
        let due = eventually("the next attempt", || async {
            let one = db.deliveries(&batch.id).await.remove(0);
            (one.state == DeliveryState::Pending && one.attempts == attempt).then_some(one.next_attempt_at).flatten()
        })
        .await;
        away += due.since(db.store.clock().await.unwrap());
        db.execute("UPDATE webhook_deliveries SET next_attempt_at = 1").await;
    }
    assert!(away > Duration::from_secs(60), "{away:?}");
    assert_eq!(settled(&db, &batch.id).await[0].state, DeliveryState::Delivered);
    running.stop().await;
}

/// The secret is nowhere: not in the database's files, not in what can be asked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_is_found_anywhere() {
    let db = Db::sqlite().await;
    let receiver = Receiver::always(500).await;
    let webhooks = db.webhooks();
    let webhook = signed(&webhooks, receiver.url("/")).await;
    let batch = db.batch(Some(webhook), None).await;
    db.complete(&batch.id).await;
    let config = tidemill::domain::webhook::WebhookConfig::new(receiver.url("/e")).secret(Some(CANARY.into()));
    let (endpoint, secret) = webhooks.create_endpoint(&"".into(), config).await.unwrap();
    assert_eq!(secret.expose(), CANARY);
    let second = Secret::try_new(format!("{CANARY}-2")).unwrap();
    let rotated = webhooks.rotate_secret(&endpoint.id, &Scope::All, &second, Duration::from_secs(60)).await;
    rotated.unwrap().unwrap();
    let running = crate::fixture::Running::start(webhooks.clone());
    let tested = webhooks.test_endpoint(&endpoint.id, &Scope::All).await.unwrap().unwrap();
    let deliveries = settled(&db, &batch.id).await;
    let batch = db.store.batch(&batch.id, &Scope::All).await.unwrap();
    let attempts = db.attempts(&deliveries[0].id).await;
    let shown = format!("{batch:?} {deliveries:?} {attempts:?} {:?} {endpoint:?} {tested:?}", db.dead_letters().await);
    assert!(!shown.contains(CANARY), "{shown}");
    assert!(receiver.requests()[0].verify(CANARY).is_ok());
    running.stop().await;
    let folder = db.folder.as_ref().unwrap().path();
    let mut looked = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        looked += bytes.len();
        assert!(!bytes.windows(CANARY.len()).any(|window| window == CANARY.as_bytes()));
    }
    assert!(looked > 10_000);
}

/// The database is away after the receiver has said 200, and comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_result_waits_for_the_database() {
    let db = Db::sqlite_busy_after(Duration::from_millis(20)).await;
    let gate = Gate::closed();
    let held = gate.reply(200);
    let receiver = Receiver::start(move |_, _| held.clone()).await;
    let batch = db.batch(Some(target(receiver.url("/"))), None).await;
    db.complete(&batch.id).await;
    let running = db.start();
    receiver.wait(1).await;
    // Somebody else has the database for itself.
    let other = db.raw.begin().await.unwrap();
    other.execute_unprepared("UPDATE webhook_deliveries SET id = id").await.unwrap();
    gate.open();
    // It is tried in vain meanwhile.
    tokio::time::sleep(Duration::from_secs(2)).await;
    other.rollback().await.unwrap();
    let delivery = eventually("settled", || async {
        Some(db.deliveries(&batch.id).await.remove(0)).filter(|one| one.state == DeliveryState::Delivered)
    })
    .await;
    assert_eq!(delivery.attempts, 1);
    assert_eq!(receiver.requests().len(), 1, "it is written down, not sent again");
    running.stop().await;
}
