//! Registered endpoints: their own events, rotation, holding back, trying out.

use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use tidemill::{
    delivery::{
        AcceptError, Options, Webhooks,
        egress::{Guard, Policy},
        secrets::{MasterKey, Vault},
    },
    domain::Scope,
    domain::webhook::{DeliveryState, EventFilter, Secret, WebhookConfig, WebhookEvent},
    store::{DeletedEndpoint, EndpointChange, EndpointRecord},
};

use crate::{
    fixture::{CANARY, Db, Running, eventually, settled, signed},
    receiver::{Gate, Receiver},
};

crate::on_both!(
    an_endpoint_hears_what_it_wants_signed_with_its_own_secret,
    during_a_rotation_both_secrets_sign,
    what_comes_for_a_disabled_endpoint_waits,
    a_moved_endpoint_gets_what_waited,
    a_delivery_that_is_being_sent_when_its_endpoint_moves_follows_it,
    a_test_event_takes_the_common_way,
    a_test_event_is_settled_although_its_caller_hangs_up,
    an_endpoint_in_use_stays,
    a_new_master_key_takes_over_every_secret,
);

async fn create(webhooks: &Webhooks, url: String) -> (EndpointRecord, Secret) {
    webhooks.create_endpoint(&"".into(), WebhookConfig::new(url)).await.unwrap()
}

async fn an_endpoint_hears_what_it_wants_signed_with_its_own_secret(db: Db) {
    let running = db.start();
    let receiver = Receiver::always(200).await;
    let config = WebhookConfig::new(receiver.url("/")).events(vec!["completed".into()]);
    let (endpoint, secret) = running.webhooks.create_endpoint(&"".into(), config).await.unwrap();
    assert!(secret.expose().starts_with("whsec_"));
    assert!(endpoint.has_secret && !endpoint.disabled);
    let failed = db.batch(None, Some(&endpoint.id)).await;
    db.fail(&failed.id).await;
    let completed = db.batch(None, Some(&endpoint.id)).await;
    db.complete(&completed.id).await;
    assert_eq!(settled(&db, &completed.id).await[0].event, WebhookEvent::Completed);
    assert!(db.deliveries(&failed.id).await.is_empty());
    assert_eq!(receiver.requests().len(), 1);
    assert!(receiver.requests()[0].verify(secret.expose()).is_ok());
    running.stop().await;
}

async fn during_a_rotation_both_secrets_sign(db: Db) {
    let running = db.start();
    let receiver = Receiver::always(200).await;
    let (endpoint, old) = create(&running.webhooks, receiver.url("/")).await;
    let hour = Duration::from_secs(3_600);
    let new = Secret::generate();
    let record = running.webhooks.rotate_secret(&endpoint.id, &Scope::All, &new, hour).await.unwrap().unwrap();
    assert!(record.previous_secret_until.is_some());
    let tell = || async {
        let batch = db.batch(None, Some(&endpoint.id)).await;
        db.complete(&batch.id).await;
        settled(&db, &batch.id).await;
        receiver.requests().pop().unwrap()
    };
    let both = tell().await;
    assert!(both.verify(old.expose()).is_ok() && both.verify(new.expose()).is_ok());
    assert_eq!(both.header("x-webhook-signature"), tidemill::delivery::signature::sign_body(&new, &both.body));
    db.execute("UPDATE webhook_endpoints SET previous_secret_until = 1").await;
    let after = tell().await;
    assert!(after.verify(old.expose()).is_err() && after.verify(new.expose()).is_ok());
    // Without overlap the old one is gone at once: it was stolen.
    let mine = Secret::try_new("mine").unwrap();
    let rotated = running.webhooks.rotate_secret(&endpoint.id, &Scope::All, &mine, Duration::ZERO).await;
    assert_eq!(rotated.unwrap().unwrap().previous_secret_until, None);
    let last = tell().await;
    assert!(last.verify(new.expose()).is_err() && last.verify("mine").is_ok());
    running.stop().await;
}

async fn what_comes_for_a_disabled_endpoint_waits(db: Db) {
    let running = db.start();
    let receiver = Receiver::always(200).await;
    let (endpoint, _) = create(&running.webhooks, receiver.url("/")).await;
    let set = |disabled: bool| {
        let change =
            EndpointChange { disabled: Some((disabled, Some("maintenance".into()))), ..EndpointChange::default() };
        running.webhooks.update_endpoint(&endpoint.id, &Scope::All, change)
    };
    let off = set(true).await.unwrap().unwrap();
    assert_eq!((off.disabled, off.disabled_reason.as_deref()), (true, Some("maintenance")));
    let batch = db.batch(None, Some(&endpoint.id)).await;
    db.complete(&batch.id).await;
    // What is written later for somebody else is delivered.
    let other = Receiver::always(200).await;
    let elsewhere = db.batch(Some(crate::fixture::target(other.url("/"))), None).await;
    db.complete(&elsewhere.id).await;
    settled(&db, &elsewhere.id).await;
    let waiting = db.deliveries(&batch.id).await.remove(0);
    assert_eq!((waiting.state, waiting.attempts, waiting.next_attempt_at), (DeliveryState::Pending, 0, None));
    assert!(receiver.requests().is_empty());
    let on = set(false).await.unwrap().unwrap();
    assert_eq!((on.disabled, on.disabled_reason), (false, None));
    assert_eq!(settled(&db, &batch.id).await[0].state, DeliveryState::Delivered);
    running.stop().await;
}

async fn a_moved_endpoint_gets_what_waited(db: Db) {
    let running = db.start();
    let (old, new) = (Receiver::always(503).await, Receiver::always(200).await);
    let (endpoint, _) = create(&running.webhooks, old.url("/")).await;
    let batch = db.batch(None, Some(&endpoint.id)).await;
    db.complete(&batch.id).await;
    assert_eq!(settled(&db, &batch.id).await[0].state, DeliveryState::Dead);
    let change = EndpointChange { url: Some(new.url("/")), ..EndpointChange::default() };
    running.webhooks.update_endpoint(&endpoint.id, &Scope::All, change).await.unwrap().unwrap();
    let dead = db.dead_letters().await.remove(0);
    assert!(
        running.webhooks.retry(dead.id, Scope::All, false, None).await.unwrap().success,
        "a dead letter follows it"
    );
    assert_eq!(new.requests().len(), 1);
    running.stop().await;
}

async fn a_delivery_that_is_being_sent_when_its_endpoint_moves_follows_it(db: Db) {
    let running = db.start();
    let gate = Gate::closed();
    let held = gate.reply(503);
    let (old, new) = (Receiver::start(move |_, _| held.clone()).await, Receiver::always(200).await);
    let (endpoint, _) = create(&running.webhooks, old.url("/old")).await;
    let batch = db.batch(None, Some(&endpoint.id)).await;
    db.complete(&batch.id).await;
    old.wait(1).await;
    let change = EndpointChange { url: Some(new.url("/new")), ..EndpointChange::default() };
    running.webhooks.update_endpoint(&endpoint.id, &Scope::All, change).await.unwrap().unwrap();
    gate.open();
    let delivery = settled(&db, &batch.id).await.remove(0);
    assert_eq!((delivery.state, delivery.attempts), (DeliveryState::Delivered, 2));
    assert_eq!((delivery.url, old.requests().len()), (new.url("/new"), 1));
    assert_eq!(new.requests()[0].path, "/new");
    running.stop().await;
}

async fn a_test_event_is_settled_although_its_caller_hangs_up(db: Db) {
    let running = db.start();
    let gate = Gate::closed();
    let held = gate.reply(200);
    let receiver = Receiver::start(move |_, _| held.clone()).await;
    let (endpoint, _) = create(&running.webhooks, receiver.url("/")).await;
    let mut call = Box::pin(running.webhooks.test_endpoint(&endpoint.id, &Scope::All));
    tokio::select! {
        _ = &mut call => panic!("the receiver has not answered yet"),
        _ = receiver.wait(1) => {}
    }
    drop(call);
    gate.open();
    let filter = tidemill::store::DeliveryFilter {
        endpoint_id: Some(endpoint.id.clone()),
        ..tidemill::store::DeliveryFilter::within(Scope::All)
    };
    eventually("settled", || async {
        let all = db.store.deliveries(&filter, None, 10).await.unwrap();
        all.iter().all(|one| one.state == DeliveryState::Delivered).then_some(())
    })
    .await;
    running.stop().await;
}

async fn a_test_event_takes_the_common_way(db: Db) {
    let running = db.start();
    let receiver = Receiver::start(|n, _| crate::receiver::Reply::Status(if n == 1 { 200 } else { 500 })).await;
    let (endpoint, secret) = create(&running.webhooks, receiver.url("/")).await;
    let tested = running.webhooks.test_endpoint(&endpoint.id, &Scope::All).await.unwrap().unwrap();
    assert!(tested.result.succeeded());
    let request = receiver.requests().remove(0);
    assert!(request.verify(secret.expose()).is_ok());
    assert_eq!((request.header("x-webhook-event"), &request.json()["type"]), ("test", &"batch.test".into()));
    let record = db.store.delivery(&tested.claim.id, &Scope::All).await.unwrap().unwrap();
    assert_eq!(record.state, DeliveryState::Delivered);
    let failed = running.webhooks.test_endpoint(&endpoint.id, &Scope::All).await.unwrap().unwrap();
    assert_eq!(failed.result.http_status, Some(500));
    let record = db.store.delivery(&failed.claim.id, &Scope::All).await.unwrap().unwrap();
    assert_eq!((record.state, record.attempts), (DeliveryState::Cancelled, 1));
    assert!(db.dead_letters().await.is_empty(), "nobody misses a test event");
    running.stop().await;
}

async fn an_endpoint_in_use_stays(db: Db) {
    let webhooks = db.webhooks();
    let (endpoint, _) = create(&webhooks, "http://127.0.0.1:9/".into()).await;
    let batch = db.batch(None, Some(&endpoint.id)).await;
    let delete = || db.store.delete_endpoint(&endpoint.id, &Scope::All);
    assert_eq!(delete().await.unwrap(), DeletedEndpoint::InUse { batches: 1, deliveries: 0 });
    db.complete(&batch.id).await;
    assert_eq!(delete().await.unwrap(), DeletedEndpoint::InUse { batches: 0, deliveries: 1 });
    db.execute("UPDATE webhook_deliveries SET state = 'delivered'").await;
    assert_eq!(
        db.store.delete_endpoint(&endpoint.id, &Scope::Of("other".into())).await.unwrap(),
        DeletedEndpoint::NotFound
    );
    assert_eq!(delete().await.unwrap(), DeletedEndpoint::Deleted);
    assert_eq!(delete().await.unwrap(), DeletedEndpoint::NotFound);
    // One that names it all the same, because both happened at the same time: nobody is told, and that is noticed.
    let late = db.batch(None, Some(&endpoint.id)).await;
    db.complete(&late.id).await;
    assert_eq!(db.deliveries(&late.id).await[0].state, DeliveryState::Dead);
    assert_eq!(db.dead_letters().await.len(), 1);
}

async fn a_new_master_key_takes_over_every_secret(db: Db) {
    let receiver = Receiver::always(200).await;
    let with = |current: u8, previous: Option<u8>| {
        let key = |byte| MasterKey::from_base64(&STANDARD.encode([byte; 32])).unwrap();
        let vault = Vault::new(Some(key(current)), previous.map(key));
        Webhooks::new(db.store.clone(), Options { vault, ..db.options() }).unwrap()
    };
    let old = with(1, None);
    let (endpoint, secret) = create(&old, receiver.url("/endpoint")).await;
    let rotated = Secret::try_new("rotated").unwrap();
    old.rotate_secret(&endpoint.id, &Scope::All, &rotated, Duration::from_secs(3_600)).await.unwrap().unwrap();
    let running = db.batch(Some(signed(&old, receiver.url("/batch")).await), None).await;
    let ended = db.batch(Some(signed(&old, receiver.url("/ended")).await), None).await;
    let disabled = EndpointChange { disabled: Some((true, None)), ..EndpointChange::default() };
    old.update_endpoint(&endpoint.id, &Scope::All, disabled).await.unwrap().unwrap();
    // Something that waits, under each page's first and last id and between.
    db.complete(&ended.id).await;
    let copied = db
        .execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 450) \
             INSERT INTO webhook_deliveries (id, batch_id, owner, event, url, target, secret, body, max_attempts, timeout, \
             state, attempts, next_attempt_at, created_at) SELECT 'msg_' || n.i, d.batch_id, d.owner, d.event, d.url, \
             d.target, d.secret, d.body, d.max_attempts, d.timeout, 'cancelled', 0, 0, 0 FROM webhook_deliveries d, n",
        )
        .await;
    assert_eq!(copied, 450);
    db.execute("CREATE TABLE before AS SELECT id, secret FROM webhook_deliveries").await;
    // Nothing is sent meanwhile: the key alone is replaced.
    db.execute("UPDATE webhook_deliveries SET next_attempt_at = 9000000000000000 WHERE state = 'pending'").await;
    let between = Running::start(with(2, Some(1)));
    let left = "UPDATE before SET id = id WHERE EXISTS (SELECT 1 FROM webhook_deliveries d WHERE d.id = before.id AND \
                d.secret = before.secret)";
    eventually("all are sealed anew", || async { (db.execute(left).await == 0).then_some(()) }).await;
    between.stop().await;
    // The old key is gone.
    let new = Running::start(with(2, None));
    db.execute("UPDATE webhook_deliveries SET next_attempt_at = 1 WHERE state = 'pending'").await;
    db.complete(&running.id).await;
    for id in [&ended.id, &running.id] {
        eventually("delivered", || async {
            db.deliveries(id).await.iter().any(|one| one.state == DeliveryState::Delivered).then_some(())
        })
        .await;
    }
    let tested = new.webhooks.test_endpoint(&endpoint.id, &Scope::All).await.unwrap().unwrap();
    assert!(tested.result.succeeded(), "{tested:?}");
    for request in receiver.requests() {
        if request.path == "/endpoint" {
            assert!(request.verify(secret.expose()).is_ok() && request.verify("rotated").is_ok());
        } else {
            assert!(request.verify(CANARY).is_ok());
        }
    }
    assert_eq!(receiver.requests().len(), 3);
    new.stop().await;
}

#[tokio::test]
async fn one_guard_for_every_way_in() {
    let db = Db::sqlite().await;
    let open = db.webhooks();
    let (endpoint, _) = create(&open, "http://127.0.0.1:9/".into()).await;
    let guarded =
        Webhooks::new(db.store.clone(), Options { guard: Guard::new(Policy::default()), ..db.options() }).unwrap();
    let refused = |result: Result<(), AcceptError>| match result {
        Err(AcceptError::Invalid(fields)) => assert_eq!(fields[0].field, "url"),
        other => panic!("{other:?}"),
    };
    for url in ["http://127.0.0.1/", "http://localhost/", "http://[::ffff:10.0.0.1]/", "http://169.254.169.254/"] {
        refused(guarded.accept(WebhookConfig::new(url)).await.map(|_| ()));
        refused(guarded.create_endpoint(&"".into(), WebhookConfig::new(url)).await.map(|_| ()));
        let change = EndpointChange { url: Some(url.into()), ..EndpointChange::default() };
        refused(guarded.update_endpoint(&endpoint.id, &Scope::All, change).await.map(|_| ()));
    }
    let tested = guarded.test_endpoint(&endpoint.id, &Scope::All).await.unwrap().unwrap();
    assert!(tested.result.error.is_some_and(|error| error.message.contains("--webhook-allow-cidr")));
    let change = EndpointChange { events: Some(EventFilter::parse(&["failed"]).unwrap()), ..EndpointChange::default() };
    let changed = guarded.update_endpoint(&endpoint.id, &Scope::All, change).await.unwrap().unwrap();
    assert_eq!(changed.events.names(), ["failed"]);
}
