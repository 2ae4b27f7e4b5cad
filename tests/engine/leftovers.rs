//! Objects that were written and never named: none stays once its batch has ended.

use std::{collections::BTreeSet, path::Path, time::Duration};

use sea_orm::{ConnectionTrait, DatabaseConnection, Statement};
use tidemill::{
    blobs::Blobs,
    domain::{BatchId, BatchStatus, Epoch, SegmentIndex, SegmentRef},
    results::object_key,
    sim::SimConfig,
};

use crate::direct;
use crate::{
    faulty::{Faults, FaultyStore},
    harness::{Node, PATIENCE, Worker, assert_one_line_each, chats, options},
};

async fn raw(folder: &Path) -> DatabaseConnection {
    direct::connect(format!("sqlite://{}", folder.join("db").display())).await
}

/// As if an hour had passed since each batch's end.
async fn an_hour_passes(database: &DatabaseConnection) {
    database.execute_unprepared("UPDATE leftovers SET look_after = 1").await.unwrap();
}

/// The objects of results that rows name, as results or as garbage.
async fn named(database: &DatabaseConnection) -> BTreeSet<String> {
    let sql = "SELECT object_key FROM parts UNION SELECT object_key FROM segments WHERE object_key IS NOT NULL \
               UNION SELECT object_key FROM garbage";
    let statement = Statement::from_string(database.get_database_backend(), sql);
    let rows = database.query_all_raw(statement).await.unwrap();
    rows.iter().map(|row| row.try_get("", "object_key").unwrap()).collect()
}

async fn unnamed(blobs: &Blobs, database: &DatabaseConnection) -> Vec<String> {
    let found = blobs.list("results").await.unwrap();
    let named = named(database).await;
    found.into_iter().filter(|key| !named.contains(key)).collect()
}

async fn until_nothing_is_left(blobs: &Blobs, database: &DatabaseConnection) {
    let swept = async {
        while !unnamed(blobs, database).await.is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let in_time = tokio::time::timeout(PATIENCE, swept).await;
    assert!(in_time.is_ok(), "{:?}", unnamed(blobs, database).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_failed_run_wrote_and_never_named_is_deleted_after_the_end() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(100), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let faults = Faults::default();
    let blobs = Blobs::over(FaultyStore::new(&folder.path().join("blobs"), faults.clone()));
    let node = Node::start_on(folder.path(), blobs, &[&worker], options(), 8).await;
    // Each run ends with an object that its merge does not accept, so no row ever names it.
    faults.garble("results/");
    let id = node.submit(&chats(40), 40).await;
    assert_eq!(node.ended(&id).await.status, BatchStatus::Failed);
    let database = raw(folder.path()).await;
    assert!(!unnamed(&node.blobs, &database).await.is_empty(), "or this test shows nothing");
    an_hour_passes(&database).await;
    until_nothing_is_left(&node.blobs, &database).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_owner_writes_after_the_end_is_deleted_and_nothing_else() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(20), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[&worker]).await;
    let lines = chats(90);
    let id = node.submit(&lines, 30).await;
    let batch = node.ended(&id).await;
    // Another batch can't run: its worker is not there, so a dead owner's object may yet be the next owner's business.
    let waiting = node.submit(&[chats(1)[0].replace("\"sim\"", "\"elsewhere\"")], 1).await;
    let dead = |batch: &BatchId, index: i32, number: u32| {
        object_key(&SegmentRef { batch: batch.clone(), index: SegmentIndex(index) }, Epoch(1), number)
    };
    let late: Vec<String> = (0..3).map(|index| dead(&id, index, 97)).collect();
    let other = dead(&waiting, 0, 97);
    for key in late.iter().chain([&other]) {
        node.blobs.put(key, "half a part".into()).await.unwrap();
    }
    node.store.note_leftovers(&waiting).await.unwrap();
    let database = raw(folder.path()).await;
    an_hour_passes(&database).await;
    let gone = async {
        while unnamed(&node.blobs, &database).await != [other.clone()] {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, gone).await.is_ok(), "{:?}", unnamed(&node.blobs, &database).await);
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    node.stop().await;
}
