//! Servers that start together on a database that nobody has used, each with objects of its own: at most one goes on.

use std::{path::Path, time::Duration};

use tidemill::{
    blobs::Blobs,
    domain::NodeId,
    objects::{self, ObjectsError},
    store::{Store, StoreError},
};
use tokio::sync::oneshot;

use crate::fixture::Db;

/// Starts as a server does, and returns the id under which it goes on.
async fn start(store: Store, folder: &Path) -> Result<String, ObjectsError> {
    let blobs = Blobs::directory(folder).unwrap();
    let node = NodeId::generate();
    let found = objects::probe(&blobs, "objects").await?;
    store.heartbeat(&node, "0", "").await?;
    let established = objects::establish(&store, &blobs, "objects", &node, found).await;
    if established.is_err() {
        store.leave(&node).await?;
    }
    established.map(|()| blobs.expected_id().unwrap())
}

async fn servers_with_different_objects_never_both_go_on(db: Db) {
    let folders: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let stores = [db.store.clone(), db.another().await, db.another().await];
    let mut went_on = 0;
    // In the first round the database has no id and neither has any store; later ones have those of earlier rounds.
    for round in 0..12 {
        let started: Vec<_> = stores
            .iter()
            .zip(&folders)
            .map(|(store, folder)| {
                let (store, folder) = (store.clone(), folder.path().to_owned());
                tokio::spawn(async move { start(store, &folder).await })
            })
            .collect();
        let mut ids = Vec::new();
        for one in started {
            match one.await.unwrap() {
                Ok(id) => ids.push(id),
                Err(ObjectsError::Foreign(..)) => {}
                Err(error) => panic!("{error}"),
            }
        }
        assert!(ids.len() <= 1, "round {round}: {ids:?} go on together");
        if let Some(id) = ids.first() {
            assert_eq!(db.store.blob_store_id().await.unwrap().as_ref(), Some(id));
            went_on += 1;
        }
        // Its server stops in order, and nothing was stored.
        db.execute("DELETE FROM nodes").await;
    }
    assert!(went_on > 0, "somebody can start");
}

/// A server has seen that it is alone and is about to give the database its objects, when the one whose objects the database
/// has so far starts.
async fn a_server_that_starts_during_a_take_over_sees_how_it_ends(db: Db) {
    if db.is_sqlite() {
        // It has one server, and a writer at a time.
        return;
    }
    let [old, new] = [0, 1].map(|_| tempfile::tempdir().unwrap());
    start(db.store.clone(), old.path()).await.unwrap();
    db.execute("DELETE FROM nodes").await;
    let (taking, took) = oneshot::channel();
    let (go_on, wait) = oneshot::channel::<()>();
    let (store, node) = (db.another().await, NodeId::generate());
    store.heartbeat(&node, "0", "").await.unwrap();
    let take_over = tokio::spawn(async move {
        let once = std::sync::Mutex::new(Some((taking, wait)));
        let give = || {
            let (taking, wait) = once.lock().unwrap().take().unwrap();
            async move {
                taking.send(()).unwrap();
                wait.await.unwrap();
                Ok::<(), StoreError>(())
            }
        };
        store.settle_blob_store_id("store_new", &node, give).await.unwrap()
    });
    took.await.unwrap();
    let folder = old.path().to_owned();
    let store = db.another().await;
    let started = tokio::spawn(async move { start(store, &folder).await });
    // It waits, or it has decided without the other one; an event tells, a lock that is waited for.
    let waits = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'";
    while db.number(waits).await == 0 && !started.is_finished() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    go_on.send(()).unwrap();
    assert_eq!(take_over.await.unwrap(), "store_new");
    let started = started.await.unwrap();
    assert!(matches!(started, Err(ObjectsError::Foreign(..))), "both go on: {started:?}");
    drop(new);
}

async fn a_server_whose_database_was_given_other_objects_ends(db: Db) {
    let folder = tempfile::tempdir().unwrap();
    let blobs = Blobs::directory(folder.path()).unwrap();
    let node = NodeId::generate();
    objects::establish(&db.store, &blobs, "objects", &node, None).await.unwrap();
    let watched = objects::watch(db.store.clone(), blobs, tokio_util::sync::CancellationToken::new());
    // It was frozen for long, and another one has found the database unused.
    db.execute("UPDATE blob_store SET store_id = 'store_other'").await;
    let ended = crate::support::patience::ends("it ends", watched).await;
    assert!(ended.unwrap_err().contains("store_other"));
}

on_both_databases!(
    servers_with_different_objects_never_both_go_on,
    a_server_that_starts_during_a_take_over_sees_how_it_ends,
    a_server_whose_database_was_given_other_objects_ends,
);
