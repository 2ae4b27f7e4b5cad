//! A database whose clock is set back: neither a wait nor a lease lasts for as long as that.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use sea_orm::{ConnectionTrait, Statement};
use tidemill::{
    delivery::{Deliverer, Options, Webhooks, schedule::Schedule},
    domain::{
        NodeId, Scope, Timestamp,
        webhook::{AttemptResult, DeliveryState, ErrorKind, WebhookTarget},
    },
    store::{BeginRetry, ClaimShare, Settlement, with_clock},
    upkeep::{self, Upkeep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    fixture::{Db, eventually, settled, target},
    receiver::{Receiver, Reply},
};

crate::on_both!(waits_and_leases_of_a_clock_set_back_begin_anew, a_page_of_targets_follows_the_other);

const HOUR: i64 = 3_600_000_000;

async fn number(db: &Db, sql: &str) -> i64 {
    let row = db.raw.query_one_raw(Statement::from_string(db.raw.get_database_backend(), sql)).await.unwrap().unwrap();
    row.try_get("", "n").unwrap()
}

async fn claim_one(db: &Db, url: &str) -> tidemill::store::ClaimedDelivery {
    db.store.claim_deliveries(&[ClaimShare::new("", url, 1)]).await.unwrap().remove(0)
}

fn failed(claim: &tidemill::store::ClaimedDelivery, wait: Duration) -> Settlement {
    Settlement {
        id: claim.id.clone(),
        lease: claim.lease.clone(),
        attempt: claim.attempt,
        result: Some(AttemptResult::failed(ErrorKind::Connect, "refused")),
        wait,
    }
}

/// For the database it is the same whether its clock goes back or all that is stored goes ahead.
async fn waits_and_leases_of_a_clock_set_back_begin_anew(db: Db) {
    let url = |name: &str| format!("http://127.0.0.1:1/{name}");
    let wait = Duration::from_secs(60);
    for name in ["new", "waits", "sent", "dead"] {
        let max_attempts = if name == "dead" { 1 } else { 3 };
        let batch = db.batch(Some(WebhookTarget { max_attempts, ..target(url(name)) }), None).await;
        db.complete(&batch.id).await;
    }
    assert_eq!(db.store.mend_due_times().await.unwrap(), 0, "nothing is wrong");
    let waits = claim_one(&db, &url("waits")).await;
    let dead = claim_one(&db, &url("dead")).await;
    db.store.settle_deliveries(&[failed(&waits, wait), failed(&dead, wait)]).await.unwrap();
    let sent = claim_one(&db, &url("sent")).await;
    let letter = db.dead_letters().await.remove(0);
    assert!(matches!(
        db.store.begin_retry(&letter.id, &Scope::All, false, None).await.unwrap(),
        BeginRetry::Started { .. }
    ));
    assert_eq!(db.store.mend_due_times().await.unwrap(), 0, "nothing is wrong yet");
    db.execute(&format!(
        "UPDATE webhook_deliveries SET created_at = created_at + {HOUR}, scheduled_at = scheduled_at + {HOUR}, \
         next_attempt_at = next_attempt_at + {HOUR}, lease_expires_at = lease_expires_at + {HOUR}"
    ))
    .await;
    db.execute(&format!("UPDATE webhook_dead_letters SET lease_expires_at = lease_expires_at + {HOUR}")).await;
    assert!(db.store.due_targets(&[]).await.unwrap().targets.iter().all(|one| one.due > HOUR));
    // Three deliveries, one of them with its lease, and the retry's lease.
    assert_eq!(db.store.mend_due_times().await.unwrap(), 5);
    let now = db.store.clock().await.unwrap();
    let due = db.store.due_targets(&[]).await.unwrap().targets;
    let due_in = |name: &str| due.iter().find(|one| one.target == url(name)).unwrap().due - now.0;
    assert!(due_in("new") <= 0, "{}", due_in("new"));
    assert!((0..=60_000_000).contains(&due_in("waits")), "{}", due_in("waits"));
    let lease = "SELECT MAX(lease_expires_at) AS n FROM webhook_deliveries WHERE state = 'leased'";
    assert!(number(&db, lease).await <= now.plus(sent.timeout + Duration::from_secs(30)).0);
    let lease = "SELECT MAX(lease_expires_at) AS n FROM webhook_dead_letters";
    assert!(number(&db, lease).await <= now.plus(Duration::from_secs(330)).0);
    assert_eq!(db.store.mend_due_times().await.unwrap(), 0);
}

/// Of an owner with very many targets a look takes in a thousand, the next look the next thousand; others are in every one.
async fn a_page_of_targets_follows_the_other(db: Db) {
    let insert = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 2500) \
         INSERT INTO webhook_deliveries (id, owner, event, url, target, body, max_attempts, timeout, state, attempts, \
         next_attempt_at, created_at) SELECT 'msg_' || n.i, 'many', 'completed', 'u', 't' || n.i, 'x', 3, 5000000, \
         'pending', 0, n.i, 1 FROM n";
    let insert = if db.folder.is_some() { insert.to_owned() } else { insert.replace("'x'", "'x'::bytea") };
    db.execute(&insert).await;
    for owner in ["few", "zero"] {
        let batch = db.batch_of(owner, Some(target("http://127.0.0.1:1/".into())), None).await;
        db.complete(&batch.id).await;
    }
    let (mut after, mut seen, mut looks) = (Vec::new(), std::collections::HashSet::new(), 0);
    loop {
        let look = db.store.due_targets(&after).await.unwrap();
        let owners: Vec<_> = look.targets.iter().map(|one| one.owner.as_str()).collect();
        assert!(owners.contains(&"few") && owners.contains(&"zero"));
        assert!(owners.iter().filter(|owner| **owner == "many").count() <= 1_000);
        seen.extend(look.targets.into_iter().filter(|one| one.owner.as_str() == "many").map(|one| one.target));
        looks += 1;
        after = look.more;
        if after.is_empty() {
            break;
        }
    }
    assert_eq!((seen.len(), looks), (2_500, 3));
}

/// A retry waits for some seconds when the clock of the database is set back by an hour.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_set_back_does_not_hold_a_retry() {
    let db = Db::sqlite().await;
    let receiver = Receiver::start(|n, _| Reply::Status(if n == 1 { 503 } else { 200 })).await;
    let (clock, back) = (Arc::new(AtomicI64::new(Timestamp::now().0)), Arc::new(AtomicI64::new(0)));
    let ticking = {
        let (clock, back) = (clock.clone(), back.clone());
        tokio::spawn(async move {
            loop {
                clock.store(Timestamp::now().0 - back.load(Ordering::SeqCst), Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
    };
    let batch = db.batch(Some(target(receiver.url("/"))), None).await;
    with_clock(clock.clone(), db.complete(&batch.id)).await;
    let schedule = Schedule::try_new(vec![Duration::from_secs(4)]).unwrap();
    let options = Options { schedule, reap: Duration::from_millis(100), ..db.options() };
    let (webhooks, shutdown) = (Webhooks::new(db.store.clone(), options).unwrap(), CancellationToken::new());
    let upkeep = Upkeep::new(db.store.clone(), NodeId::generate(), upkeep::of_webhooks(&webhooks));
    let (upkeep, deliverer) = (upkeep.run(shutdown.clone()), Deliverer::new(webhooks, shutdown.clone()));
    let both = async { tokio::join!(deliverer.run(), upkeep) };
    let running = tokio::spawn(with_clock(clock, both));
    eventually("the first attempt has failed", || async {
        let one = db.deliveries(&batch.id).await.remove(0);
        (one.state == DeliveryState::Pending && one.attempts == 1).then_some(())
    })
    .await;
    back.store(HOUR, Ordering::SeqCst);
    receiver.wait(2).await;
    assert_eq!(settled(&db, &batch.id).await[0].state, DeliveryState::Delivered);
    shutdown.cancel();
    running.await.unwrap();
    ticking.abort();
}
