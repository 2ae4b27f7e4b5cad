//! Other processes and other nodes in the store's way: they cost time, and no call fails because of them.

use std::{future::Future, pin::Pin, time::Duration};

use sea_orm::{ConnectionTrait, TransactionTrait};
use tidemill::{
    domain::{BatchStatus, NodeId, Owner, Scope, Timestamp, webhook::EventFilter},
    store::{DeadLetterFilter, DeletedFile, EndpointChange, NewEndpoint, StoreError},
};

use crate::{
    fixture::{Db, LEASE, key, new_batch, new_file, part, spans},
    support::rivals::{Repeats, deadlock},
};

type Call<'a> = Pin<Box<dyn Future<Output = Result<(), StoreError>> + 'a>>;

fn call<'a, T>(call: impl Future<Output = Result<T, StoreError>> + 'a) -> Call<'a> {
    Box::pin(async { call.await.map(|_| ()) })
}

#[tokio::test]
async fn a_sqlite_file_that_another_process_writes_to_is_waited_for() {
    let db = Db::sqlite().await;
    let repeats = Repeats::count();
    let store = db.impatient(Duration::from_millis(20)).await;
    let (file, unused) = (db.file(4).await, db.file(1).await);
    let (batch, late) = (db.create(new_batch(&file.id)).await, db.create(new_batch(&file.id)).await);
    store.set_expiry(&late.id, Timestamp(1)).await.unwrap();
    let (one, two) = (db.claim(&batch.id).await, db.claim(&batch.id).await);
    let worker = store.register_worker("http://127.0.0.1:1").await.unwrap();
    let endpoint = store.create_endpoint(endpoint()).await.unwrap();
    let (node, uploaded, new, found) = (NodeId::generate(), key(), new_file("", 1, &["m"]), spans(1));
    let (done, change) = (part([0], []), EndpointChange { disabled: Some((true, None)), ..EndpointChange::default() });
    let (keys, running) = ([key()], [two.segment.clone()]);
    let hour = Duration::from_secs(3_600);

    let other = db.raw.begin().await.unwrap();
    other.execute_unprepared("UPDATE counters SET value = value").await.unwrap();
    let nobody = Owner::nobody();
    let calls = [
        call(store.insert_file(&new, None, &found)),
        call(store.delete_file(&unused.id, &Scope::All)),
        call(store.create_batch(new_batch(&file.id))),
        call(store.commit_part(&one.segment, one.epoch, &done)),
        call(store.release_segment(&two.segment, two.epoch, 1)),
        call(store.renew_leases(&node, &running, LEASE)),
        call(store.claim_segment(&node, &batch.id, -1, LEASE)),
        call(store.close_windows(10)),
        call(store.begin_upload(&uploaded)),
        call(store.abandon_upload(&uploaded)),
        call(store.forget_garbage(&keys)),
        call(store.heartbeat(&node, "1", "all")),
        call(store.leave(&node)),
        call(store.drain_worker(&worker.id)),
        call(store.update_endpoint(&endpoint.id, &Scope::All, change)),
        call(store.create_retry_job(&nobody, DeadLetterFilter::within(Scope::All))),
        call(store.reap_deliveries(false, |_| Duration::ZERO)),
        call(store.purge_dead_letters(hour, &Scope::All)),
        call(store.purge_deliveries(hour)),
    ];
    let count = calls.len() as u64;
    let lets_go = async {
        // Each has found the file locked once or more by then, and has tries left.
        while repeats.seen() < count {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        other.commit().await.unwrap();
    };
    let (done, ()) = tokio::join!(futures::future::join_all(calls), lets_go);
    for (at, done) in done.into_iter().enumerate() {
        assert!(done.is_ok(), "call {at}: {done:?}");
    }
    assert_eq!(db.get(&late.id).await.status, BatchStatus::Finalizing, "its window has closed");
    assert_eq!(db.get(&batch.id).await.counts.completed, 1);
}

#[tokio::test]
async fn a_sqlite_file_that_stays_locked_is_said_to_be() {
    let db = Db::sqlite().await;
    let store = db.impatient(Duration::from_millis(20)).await;
    let other = db.raw.begin().await.unwrap();
    other.execute_unprepared("UPDATE counters SET value = value").await.unwrap();
    let node = NodeId::generate();
    let (one, two) = tokio::join!(store.heartbeat(&node, "1", "all"), store.register_worker("http://127.0.0.1:1"));
    for error in [one.unwrap_err(), two.unwrap_err()] {
        assert!(matches!(error, StoreError::Unavailable(_)), "{error:?}");
        assert_eq!(error.obstacle(), Some("another process has locked the database file"));
    }
    assert!(store.ping().await.is_err(), "such a server is not ready");
    other.rollback().await.unwrap();
    store.heartbeat(&node, "1", "all").await.unwrap();
    store.ping().await.unwrap();
}

/// As it does when the disk is full. The driver believes that the transaction is still open.
#[tokio::test]
async fn a_transaction_that_sqlite_undid_by_itself_takes_no_later_one_with_it() {
    let db = Db::sqlite().await;
    for action in ["ROLLBACK", "ABORT", "ROLLBACK", "ABORT"] {
        db.execute(&format!(
            "CREATE TRIGGER refusal BEFORE INSERT ON workers BEGIN SELECT RAISE({action}, 'refused'); END"
        ))
        .await;
        db.store.register_worker("http://127.0.0.1:1").await.unwrap_err();
        db.accept("workers").await;
    }
    let file = db.file(1).await;
    assert!(db.another().await.file(&file.id, &Scope::All).await.unwrap().is_some(), "what is acknowledged is stored");
}

#[tokio::test]
async fn closing_a_window_survives_a_deadlock() {
    let Some(db) = Db::postgres().await else { return };
    let batch = db.batch(1).await;
    db.store.set_expiry(&batch.id, Timestamp(1)).await.unwrap();
    let (events, batches) = ("SELECT 1 FROM counters FOR UPDATE", "SELECT 1 FROM batches FOR UPDATE");
    let closed = deadlock(&db.raw, events, batches, Box::pin(db.store.close_windows(10))).await.unwrap();
    assert_eq!(closed, std::slice::from_ref(&batch.id));
    let statuses: Vec<_> = db.events(&batch.id).await.into_iter().map(|event| event.batch.status).collect();
    let once = [BatchStatus::Validating, BatchStatus::InProgress, BatchStatus::Finalizing];
    assert_eq!(statuses, once);
}

#[tokio::test]
async fn deleting_a_file_survives_a_deadlock() {
    let Some(db) = Db::postgres().await else { return };
    let file = db.file(1).await;
    let (index, files) = ("SELECT 1 FROM file_segments FOR UPDATE", "SELECT 1 FROM files FOR UPDATE");
    let deleted = deadlock(&db.raw, index, files, Box::pin(db.store.delete_file(&file.id, &Scope::All))).await.unwrap();
    assert_eq!(deleted, DeletedFile::Deleted);
    assert!(db.store.file(&file.id, &Scope::All).await.unwrap().is_none());
}

#[tokio::test]
async fn workers_that_many_change_at_once_are_changed() {
    let Some(db) = Db::postgres().await else { return };
    serializable(&db).await;
    let store = db.another().await;
    let repeats = Repeats::count();
    let worker = store.register_worker("http://127.0.0.1:1").await.unwrap();
    for _ in 0..20 {
        let calls = (0..8).map(|_| store.drain_worker(&worker.id));
        for drained in futures::future::join_all(calls).await {
            assert!(drained.unwrap().unwrap().draining);
        }
    }
    assert!(repeats.seen() > 0, "they were never in each other's way: this test has tested nothing");
}

/// From its next connection on.
async fn serializable(db: &Db) {
    let all = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = serializable', \
               current_database()); END $$";
    db.execute(all).await;
}

fn endpoint() -> NewEndpoint {
    NewEndpoint {
        id: tidemill::domain::WebhookEndpointId::generate(),
        owner: Owner::nobody(),
        url: "http://127.0.0.1:1/hook".into(),
        events: EventFilter::default(),
        secret: None,
        max_attempts: 3,
        timeout: Duration::from_secs(1),
    }
}
