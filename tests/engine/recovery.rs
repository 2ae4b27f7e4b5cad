//! What a batch does when its node stops in order or dies: it goes on, and each line ends exactly once. (`kill -9` of the
//! real process is tested in `tests/process`.)

use std::time::Duration;

use sea_orm::{ConnectionTrait, Statement};
use tidemill::{domain::BatchStatus, domain::Scope, sim::SimConfig};

use crate::direct;
use crate::harness::{Node, Worker, assert_one_line_each, chats, options};

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_in_order_loses_nothing_and_repeats_nothing() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(200), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], options(), 16).await;
    let lines = chats(400);
    let id = node.submit(&lines, 60).await;
    node.when(&id, |batch| batch.counts.completed > 0).await;
    node.stop().await;
    let node = Node::start(folder.path(), &[&worker]).await;
    assert!(
        !node.store.batch(&id, &Scope::All).await.unwrap().unwrap().status.is_terminal(),
        "it stopped in the middle"
    );
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert_eq!(worker.sim.faults().received(), 400, "what was in flight was waited for");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn torn_and_missing_parts_are_run_again() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(150), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], options(), 16).await;
    let lines = chats(400);
    let id = node.submit(&lines, 400).await;
    node.when(&id, |batch| batch.counts.completed > 100).await;
    node.stop().await;
    // What a disk that lies about fsync leaves behind.
    let parts = folder.path().join("blobs/results").join(id.as_str()).join("000000");
    let mut files: Vec<_> = std::fs::read_dir(&parts).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 3, "{files:?}");
    let torn = std::fs::read(&files[0]).unwrap();
    std::fs::write(&files[0], &torn[..torn.len() / 2]).unwrap();
    std::fs::remove_file(&files[1]).unwrap();
    // What a crash between the object and its row leaves behind.
    std::fs::write(parts.join("1-99"), "never named").unwrap();
    let node = Node::start(folder.path(), &[&worker]).await;
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Completed);
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert_eq!((batch.counts.completed, output.len()), (400, 400));
    let total: i64 =
        output.iter().map(|line| line["response"]["body"]["usage"]["total_tokens"].as_i64().unwrap()).sum();
    assert_eq!(batch.usage.total, total, "the counts of torn parts are taken back");
    assert!(!parts.join("1-99").exists(), "an object that nobody will ever name is deleted");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_is_gone_fails_the_batch_with_the_reason() {
    let worker = Worker::start(SimConfig { models: vec!["late".into()], ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[&worker]).await;
    let id = node.submit(&chats(5), 5).await;
    std::fs::remove_dir_all(folder.path().join("blobs/inputs")).unwrap();
    let sim = Worker::start(SimConfig::default()).await;
    node.fleet.register(&sim.url()).await.unwrap();
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Failed);
    assert_eq!(batch.errors[0].code, "input_unreadable");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_is_away_for_a_moment_is_waited_for() {
    let worker = Worker::start(SimConfig { models: vec!["late".into()], ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[&worker]).await;
    let lines = chats(20);
    let id = node.submit(&lines, 5).await;
    let (there, away) = (folder.path().join("blobs/inputs"), folder.path().join("away"));
    std::fs::rename(&there, &away).unwrap();
    let sim = Worker::start(SimConfig::default()).await;
    node.fleet.register(&sim.url()).await.unwrap();
    // It has been claimed, and given back.
    let raw = direct::connect(format!("sqlite://{}", folder.path().join("db").display())).await;
    let given_back = "SELECT COUNT(*) AS n FROM segments WHERE epoch > 0 AND state = 'queued'";
    let wait = async {
        loop {
            let statement = Statement::from_string(raw.get_database_backend(), given_back);
            let row = raw.query_one_raw(statement).await.unwrap().unwrap();
            if row.try_get::<i64>("", "n").unwrap() > 0 {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(crate::harness::PATIENCE, wait).await.expect("it is given back");
    std::fs::rename(&away, &there).unwrap();
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Completed);
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_row_that_is_no_worker_costs_no_other() {
    let worker = Worker::start(SimConfig::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[]).await;
    for url in ["nonsense", "http:\\\\x", "", "http://x/\0"] {
        node.store.register_worker(url).await.unwrap();
    }
    node.fleet.register(&worker.url()).await.unwrap();
    let lines = chats(20);
    let batch = node.ended(&node.submit(&lines, 5).await).await;
    assert_eq!(batch.status, BatchStatus::Completed);
    assert_eq!(node.fleet.workers().len(), 1);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_lost_its_lease_writes_nothing_more() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(300), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], options(), 4).await;
    let lines = chats(40);
    let id = node.submit(&lines, 40).await;
    node.when(&id, |batch| batch.counts.completed > 0).await;
    // Another node finds the leases expired and takes over.
    node.store.release_all().await.unwrap();
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert_eq!(batch.counts.completed, 40, "no part of the former run counts twice");
    node.stop().await;
}
