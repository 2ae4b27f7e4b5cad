//! A part whose bytes are not what was written, though there are as many.

use std::{path::Path, time::Duration};

use tidemill::{
    blobs::Blobs,
    domain::{BatchId, BatchStatus, Scope},
    sim::SimConfig,
};

use crate::{
    faulty::{Faults, FaultyStore},
    harness::{Node, Worker, assert_one_line_each, chats, options},
};

/// Changes a byte of a part of the batch's first segment, and returns its key.
fn one_part_rots(data: &Path, id: &BatchId) -> String {
    let folder = format!("results/{id}/000000");
    // Not one that is being written.
    let names = std::fs::read_dir(data.join("blobs").join(&folder)).unwrap();
    let mut names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let key = format!("{folder}/{}", names.find(|name| !name.contains('#')).unwrap());
    let part = data.join("blobs").join(&key);
    let mut bytes = std::fs::read(&part).unwrap();
    // Still JSON, and still the right length: only its checksum tells.
    let text = b"chat.completion";
    let at = bytes.windows(text.len()).rposition(|window| window == text).unwrap();
    bytes[at] = b'C';
    std::fs::write(&part, bytes).unwrap();
    key
}

/// The batch ends with every line as the worker wrote it, once, and with the usage of just these.
async fn ends_whole(node: &Node, id: &BatchId, lines: &[String]) {
    let batch = node.ended(id).await;
    assert_eq!((batch.status, batch.counts.completed), (BatchStatus::Completed, lines.len() as i64));
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(lines, &output, &errors);
    assert!(
        output.iter().all(|line| line["response"]["body"]["object"] == "chat.completion"),
        "a rotten line is given out"
    );
    let total: i64 =
        output.iter().map(|line| line["response"]["body"]["usage"]["total_tokens"].as_i64().unwrap()).sum();
    assert_eq!(batch.usage.total, total);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_with_a_changed_byte_is_run_again() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(150), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], options(), 16).await;
    let lines = chats(300);
    let id = node.submit(&lines, 300).await;
    node.when(&id, |batch| batch.counts.completed > 50).await;
    node.stop().await;
    let part = folder.path().join("blobs").join(one_part_rots(folder.path(), &id));
    let node = Node::start(folder.path(), &[&worker]).await;
    ends_whole(&node, &id, &lines).await;
    assert!(!part.exists(), "it was taken back, and its lines run again");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_whose_byte_changes_while_its_segment_runs_is_not_merged_but_run_again() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(200), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], options(), 8).await;
    let lines = chats(100);
    let id = node.submit(&lines, 100).await;
    node.when(&id, |batch| batch.counts.completed > 10).await;
    one_part_rots(folder.path(), &id);
    ends_whole(&node, &id, &lines).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_with_a_changed_byte_is_not_run_but_fails_its_batch_and_says_where() {
    let folder = tempfile::tempdir().unwrap();
    // Nothing is claimed, and so nothing read, before there is a worker.
    let node = Node::start(folder.path(), &[]).await;
    let lines = chats(60);
    let id = node.submit(&lines, 20).await;
    let batch = node.store.batch(&id, &Scope::All).await.unwrap().unwrap();
    let key = node.store.file(&batch.input_file_id, &Scope::All).await.unwrap().unwrap().object_key.unwrap();
    let path = folder.path().join("blobs").join(key);
    // Still JSON, and as long as before: another prompt.
    let text = std::fs::read_to_string(&path).unwrap();
    let changed = text.replace("\"content\":\"r25\"", "\"content\":\"r95\"");
    assert!(changed != text && changed.len() == text.len());
    std::fs::write(&path, changed).unwrap();
    let worker = Worker::start(SimConfig::default()).await;
    node.fleet.register(&worker.url()).await.unwrap();
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Failed);
    let message = &batch.errors[0].message;
    assert!(message.contains("lines 21 to 40"), "{message}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_store_that_garbles_all_results_ends_the_batch_and_says_why() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(100), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let faults = Faults::default();
    let blobs = Blobs::over(FaultyStore::new(&folder.path().join("blobs"), faults.clone()));
    let node = Node::start_on(folder.path(), blobs, &[&worker], options(), 8).await;
    faults.garble("results/");
    let id = node.submit(&chats(40), 40).await;
    let reason = node.waits(&id, |reason| reason.is_some_and(|reason| reason.contains("read back"))).await.unwrap();
    assert!(reason.contains("blob store"), "{reason}");
    let batch = node.ended(&id).await;
    assert_eq!((batch.status, batch.errors[0].code.as_str()), (BatchStatus::Failed, "results_damaged"));
    assert!(worker.sim.faults().received() <= 5 * 40, "a garbling store is no reason to run lines for ever");
    node.stop().await;
}
