//! Other nodes in the way of what is done with webhooks: they cost time, and no call fails because of them.

use std::time::Duration;

use sea_orm::ConnectionTrait;
use tidemill::{
    domain::{
        DeadLetterId, Scope,
        webhook::{AttemptResult, ErrorKind, SealedSecret, WebhookConfig},
    },
    store::{BeginRetry, ClaimShare, EndpointChange, Settlement, Store},
};

use crate::{
    fixture::{Db, target},
    support::rivals::{Repeats, deadlock},
};

const URL: &str = "http://127.0.0.1:1/hook";

/// A delivery that has failed as often as it may.
async fn dead_letter(db: &Db) -> DeadLetterId {
    let batch = db.batch(Some(target(URL.into())), None).await;
    db.complete(&batch.id).await;
    for _ in 0..3 {
        let due = db.store.due_targets(&[]).await.unwrap().targets;
        let shares: Vec<_> = due.into_iter().map(|due| ClaimShare::new(due.owner, due.target, 10)).collect();
        let [claim] = db.store.claim_deliveries(&shares).await.unwrap().try_into().unwrap();
        let failed = Settlement {
            id: claim.id,
            lease: claim.lease,
            attempt: claim.attempt,
            result: Some(AttemptResult::failed(ErrorKind::Connect, "refused")),
            wait: Duration::ZERO,
        };
        db.store.settle_deliveries(&[failed]).await.unwrap();
    }
    db.dead_letters().await.pop().unwrap().id
}

#[tokio::test]
async fn a_retry_survives_a_deadlock() {
    let Some(db) = Db::postgres().await else { return };
    let id = dead_letter(&db).await;
    // Undone in the end: it stands for another attempt that would have the same number.
    let attempt = "INSERT INTO webhook_attempts (delivery_id, generation, attempt, started_at, outcome) \
                   SELECT delivery_id, 1, attempt, started_at, outcome FROM webhook_attempts WHERE attempt = 1";
    let letter = "SELECT 1 FROM webhook_dead_letters FOR UPDATE";
    let begun = deadlock(&db.raw, attempt, letter, Box::pin(db.store.begin_retry(&id, &Scope::All, false, None)))
        .await
        .unwrap();
    let BeginRetry::Started { claim, forced: false } = begun else { panic!("{begun:?}") };
    let failed = AttemptResult::failed(ErrorKind::Connect, "refused");
    let finish = Box::pin(db.store.finish_retry(&id, &claim, &failed));
    let attempts = "SELECT 1 FROM webhook_attempts FOR UPDATE";
    let finished = deadlock(&db.raw, attempts, letter, finish).await.unwrap().unwrap();
    assert_eq!(finished.retry_count, 1);
    assert_eq!(db.attempts(&claim.id).await.iter().filter(|one| one.generation == 1).count(), 1);
}

#[tokio::test]
async fn moving_an_endpoint_survives_a_deadlock() {
    let Some(db) = Db::postgres().await else { return };
    let (endpoint, _) = db.webhooks().create_endpoint(&"".into(), WebhookConfig::new(URL)).await.unwrap();
    let batch = db.batch(None, Some(&endpoint.id)).await;
    db.complete(&batch.id).await;
    let change = EndpointChange { url: Some("http://127.0.0.1:2/".into()), ..EndpointChange::default() };
    let (waiting, endpoints) =
        ("SELECT 1 FROM webhook_deliveries FOR UPDATE", "SELECT 1 FROM webhook_endpoints FOR UPDATE");
    let update = Box::pin(db.store.update_endpoint(&endpoint.id, &Scope::All, change));
    let moved = deadlock(&db.raw, waiting, endpoints, update).await.unwrap().unwrap();
    assert_eq!(moved.url, "http://127.0.0.1:2/");
    assert_eq!(db.deliveries(&batch.id).await[0].url, moved.url);
}

#[tokio::test]
async fn retention_survives_a_deadlock() {
    let Some(db) = Db::postgres().await else { return };
    let id = dead_letter(&db).await;
    assert_eq!(db.store.purge_dead_letters(Duration::ZERO, &Scope::All).await.unwrap().count, 1, "{id}");
    let (deliveries, attempts) =
        ("SELECT 1 FROM webhook_deliveries FOR UPDATE", "SELECT 1 FROM webhook_attempts FOR UPDATE");
    let purged =
        deadlock(&db.raw, deliveries, attempts, Box::pin(db.store.purge_deliveries(Duration::ZERO))).await.unwrap();
    assert_eq!(purged.count, 1);
}

#[tokio::test]
async fn an_endpoint_that_many_change_at_once_is_changed() {
    let Some(db) = Db::postgres().await else { return };
    let all = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = serializable', \
               current_database()); END $$";
    db.execute(all).await;
    let row = db.raw.query_one_raw(sea_orm::Statement::from_string(
        db.raw.get_database_backend(),
        "SELECT inet_server_port(), current_database()",
    ));
    let row = row.await.unwrap().unwrap();
    let (port, name): (i32, String) = (row.try_get_by_index(0).unwrap(), row.try_get_by_index(1).unwrap());
    let url = format!("postgres://postgres@127.0.0.1:{port}/{name}?sslmode=disable");
    let store = Store::postgres(&url, 8).await.unwrap();
    let (endpoint, _) = db.webhooks().create_endpoint(&"".into(), WebhookConfig::new(URL)).await.unwrap();
    let repeats = Repeats::count();
    let secret = SealedSecret::from_bytes(vec![7; 40]);
    for _ in 0..10 {
        let calls = (0..8).map(|_| store.rotate_secret(&endpoint.id, &Scope::All, &secret, Duration::from_secs(60)));
        for rotated in futures::future::join_all(calls).await {
            assert!(rotated.unwrap().is_some());
        }
    }
    assert!(repeats.seen() > 0, "they were never in each other's way: this test has tested nothing");
}
