//! A part whose bytes are not what was written, though there are as many.

use std::{path::Path, time::Duration};

use tidemill::{
    domain::{BatchId, BatchStatus},
    sim::SimConfig,
};

use crate::harness::{Node, Worker, assert_one_line_each, chats, options};

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
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(40), ..SimConfig::default() }).await;
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
