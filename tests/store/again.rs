//! What PostgreSQL refuses because of somebody else is done again by the store; what must wait, waits.

use std::time::{Duration, Instant};

use sea_orm::{ConnectionTrait, TransactionTrait};
use tidemill::{
    domain::NodeId,
    store::{Commit, StoreError},
};

use crate::{
    fixture::{Db, LEASE, new_batch, part},
    support::patience::until,
};

#[tokio::test]
async fn a_deadlock_is_nobody_elses_business() {
    let Some(db) = Db::postgres().await else { return };
    let batch = db.batch(1).await;
    let claimed = db.claim(&batch.id).await;
    // This one never gives up first.
    let other = db.raw.begin().await.unwrap();
    other.execute_unprepared("SET LOCAL deadlock_timeout = '900s'").await.unwrap();
    let id = &batch.id;
    other.execute_unprepared(&format!("SELECT 1 FROM batches WHERE id = '{id}' FOR UPDATE")).await.unwrap();
    let (store, segment, epoch) = (db.store.clone(), claimed.segment.clone(), claimed.epoch);
    let commit = tokio::spawn(async move { store.commit_part(&segment, epoch, &part([0, 1], [])).await });
    // It has the segment and waits for the batch.
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    until("the commit waits", async || db.number(waiting).await > 0).await;
    // Each waits for the other now, until PostgreSQL ends the commit.
    other.execute_unprepared(&format!("SELECT 1 FROM segments WHERE batch_id = '{id}' FOR UPDATE")).await.unwrap();
    other.commit().await.unwrap();
    assert_eq!(commit.await.unwrap().unwrap(), Commit::Done);
    let found = db.get(id).await.counts;
    assert_eq!(found.completed, 2, "once");
    let deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    // Or this test has tested nothing.
    until("the deadlock is counted", async || db.number(deadlocks).await == 1).await;
}

#[tokio::test]
async fn a_database_that_is_serializable_by_default_is_fine() {
    let Some(db) = Db::postgres().await else { return };
    let name = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = serializable', \
                current_database()); END $$";
    db.execute(name).await;
    let store = db.another().await;
    let file = db.file(12).await;
    let batch = db.create(new_batch(&file.id)).await;
    let mut claims = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (store, id) = (store.clone(), batch.id.clone());
        claims.spawn(async move {
            let node = NodeId::generate();
            for _ in 0..3 {
                let claimed = store.claim_segment(&node, &id, -1, LEASE).await.unwrap().expect("enough for all");
                let commit = store.commit_part(&claimed.segment, claimed.epoch, &part([0], [])).await.unwrap();
                assert_eq!(commit, Commit::Done);
            }
        });
    }
    claims.join_all().await;
    assert_eq!(db.get(&batch.id).await.counts.completed, 12);
}

#[tokio::test]
async fn more_calls_than_connections_wait_their_turn() {
    let Some(db) = Db::postgres().await else { return };
    let few = db.with_connections(2).await;
    let file = db.file(1).await;
    // Each takes so long that all together take longer than any would wait for a connection that does not come.
    db.execute(
        "CREATE FUNCTION slow() RETURNS trigger AS 'BEGIN PERFORM pg_sleep(0.06); RETURN NEW; END' LANGUAGE plpgsql; \
         CREATE TRIGGER slow BEFORE INSERT ON batches FOR EACH ROW EXECUTE FUNCTION slow()",
    )
    .await;
    let began = Instant::now();
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let (few, new) = (few.clone(), new_batch(&file.id));
        calls.spawn(async move { few.create_batch(new).await.map(|_| ()) });
    }
    let failed: Vec<_> = calls.join_all().await.into_iter().filter_map(Result::err).collect();
    assert!(failed.is_empty(), "{} of 200 failed, one as: {}", failed.len(), failed[0]);
    assert_eq!(db.number("SELECT count(*) FROM batches").await, 200);
    assert!(began.elapsed() > Duration::from_secs(5), "this has tested nothing: {:?}", began.elapsed());
}

#[tokio::test]
async fn a_call_is_refused_when_the_connections_stand_still() {
    let Some(db) = Db::postgres().await else { return };
    let few = db.with_connections(2).await;
    let file = db.file(1).await;
    let lock = db.raw.begin().await.unwrap();
    lock.execute_unprepared("LOCK TABLE batches IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let mut stuck = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let (few, new) = (few.clone(), new_batch(&file.id));
        stuck.spawn(async move { few.create_batch(new).await.map(|_| ()) });
    }
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    until("both wait", async || db.number(waiting).await == 2).await;
    let refused = few.ping().await.unwrap_err();
    assert!(matches!(refused, StoreError::Unavailable(_)), "{refused}");
    assert_eq!(db.number(waiting).await, 2, "it was refused while they stood still");
    lock.rollback().await.unwrap();
    for done in stuck.join_all().await {
        done.unwrap();
    }
    few.ping().await.unwrap();
}
