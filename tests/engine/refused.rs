//! What the database refuses for good ends the batch that asked for it, and nothing else.

use std::{path::Path, time::Duration};

use sea_orm::ConnectionTrait;
use tidemill::{
    blobs::Blobs,
    domain::{BatchId, BatchStatus, Scope},
    scheduler::SchedulerOptions,
    sim::SimConfig,
};

use crate::direct;
use crate::{
    faulty::{Faults, FaultyStore},
    harness::{Node, Worker, assert_one_line_each, chats, options},
};

/// From now on the database refuses these writes.
async fn refuse(folder: &Path, name: &str, what: &str, when: &str) {
    let raw = direct::connect(format!("sqlite://{}", folder.join("db").display())).await;
    let sql = format!("CREATE TRIGGER {name} BEFORE {what} WHEN {when} BEGIN SELECT RAISE(ABORT, 'refused'); END");
    raw.execute_unprepared(&sql).await.unwrap();
}

async fn is_completed(node: &Node, id: &BatchId, lines: &[String]) {
    let batch = node.ended(id).await;
    assert_eq!(batch.status, BatchStatus::Completed);
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(lines, &output, &errors);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_whose_segment_can_not_be_written_fails_with_the_reason_and_the_others_go_on() {
    let worker = Worker::start(SimConfig::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[]).await;
    let (lines, other) = (chats(20), chats(30));
    let id = node.submit(&lines, 10).await;
    let others = node.submit(&other, 10).await;
    refuse(folder.path(), "ends", "UPDATE ON segments", &format!("NEW.state = 'done' AND NEW.batch_id = '{id}'")).await;
    node.fleet.register(&worker.url()).await.unwrap();
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Failed);
    assert_eq!(batch.errors[0].code, "internal_error");
    assert!(batch.errors[0].message.contains("can't finish a segment"), "{}", batch.errors[0].message);
    is_completed(&node, &others, &other).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_whose_failure_can_not_be_written_either_holds_up_neither_others_nor_the_stop() {
    let worker = Worker::start(SimConfig::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[]).await;
    let lines = chats(20);
    let id = node.submit(&lines, 10).await;
    refuse(folder.path(), "parts", "INSERT ON parts", &format!("NEW.batch_id = '{id}'")).await;
    refuse(folder.path(), "ends", "UPDATE ON segments", &format!("NEW.state = 'done' AND NEW.batch_id = '{id}'")).await;
    refuse(folder.path(), "failures", "UPDATE ON batches", &format!("NEW.id = '{id}'")).await;
    node.fleet.register(&worker.url()).await.unwrap();
    for _ in 0..3 {
        let others = node.submit(&lines, 10).await;
        is_completed(&node, &others, &lines).await;
    }
    assert_eq!(node.store.batch(&id, &Scope::All).await.unwrap().unwrap().status, BatchStatus::InProgress);
    node.stop().await;
}

/// A lease that a run leaves behind is over soon.
fn short_leases() -> SchedulerOptions {
    SchedulerOptions { lease: Duration::from_millis(500), ..options() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_segment_whose_end_can_not_be_read_back_is_not_run_for_ever() {
    let worker = Worker::start(SimConfig::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[], short_leases(), 64).await;
    let (lines, other) = (chats(10), chats(30));
    let id = node.submit(&lines, 10).await;
    let others = node.submit(&other, 10).await;
    // Read when the batch ends, to see whom to tell.
    let raw = direct::connect(format!("sqlite://{}", folder.path().join("db").display())).await;
    let endpoint = "INSERT INTO webhook_endpoints (id, owner, url, events, max_attempts, timeout, created_at, updated_at) \
                    VALUES ('whep_odd', '', 'http://127.0.0.1:9/', 'no JSON', 3, 1000000, 1, 1)";
    raw.execute_unprepared(endpoint).await.unwrap();
    let named = format!("UPDATE batches SET webhook_endpoint_id = 'whep_odd' WHERE id = '{id}'");
    raw.execute_unprepared(&named).await.unwrap();
    node.fleet.register(&worker.url()).await.unwrap();
    let batch = node.ended(&id).await;
    assert_eq!((batch.status, batch.errors[0].code.as_str()), (BatchStatus::Failed, "internal_error"));
    assert!(batch.errors[0].message.contains("can't finish a segment, 5 runs"), "{}", batch.errors[0].message);
    is_completed(&node, &others, &other).await;
    let sent = worker.sim.faults().received();
    assert!(sent <= (5 * lines.len() + other.len()) as u64, "{sent} requests were sent");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_segment_that_crashes_its_run_is_given_up_and_the_others_go_on() {
    let worker = Worker::start(SimConfig::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let faults = Faults::default();
    let blobs = Blobs::over(FaultyStore::new(&folder.path().join("blobs"), faults.clone()));
    let node = Node::start_on(folder.path(), blobs, &[], short_leases(), 64).await;
    let (lines, other) = (chats(20), chats(30));
    let id = node.submit(&lines, 10).await;
    let others = node.submit(&other, 10).await;
    let input = node.store.batch(&id, &Scope::All).await.unwrap().unwrap().input_file_id;
    faults.panic_at(&node.store.file(&input, &Scope::All).await.unwrap().unwrap().object_key.unwrap());
    node.fleet.register(&worker.url()).await.unwrap();
    let batch = node.ended(&id).await;
    assert_eq!((batch.status, batch.errors[0].code.as_str()), (BatchStatus::Failed, "internal_error"));
    assert!(batch.errors[0].message.contains("5 runs in a row"), "{}", batch.errors[0].message);
    is_completed(&node, &others, &other).await;
    node.stop().await;
}
