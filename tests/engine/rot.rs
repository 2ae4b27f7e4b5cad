//! A part whose bytes are not what was written, though there are as many.

use std::time::Duration;

use tidemill::{domain::BatchStatus, sim::SimConfig};

use crate::harness::{Node, Worker, assert_one_line_each, chats, options};

#[tokio::test(flavor = "multi_thread")]
async fn a_part_with_a_changed_byte_is_run_again() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(40), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], options(), 16).await;
    let lines = chats(300);
    let id = node.submit(&lines, 300).await;
    node.when(&id, |batch| batch.counts.completed > 50).await;
    node.stop().await;
    let parts = folder.path().join("blobs/results").join(id.as_str()).join("000000");
    let part = std::fs::read_dir(&parts).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&part).unwrap();
    // Still JSON, and still the right length: only its checksum tells.
    let digit = bytes.iter().rposition(u8::is_ascii_digit).unwrap();
    bytes[digit] = if bytes[digit] == b'9' { b'8' } else { b'9' };
    std::fs::write(&part, bytes).unwrap();
    let node = Node::start(folder.path(), &[&worker]).await;
    let batch = node.ended(&id).await;
    assert_eq!((batch.status, batch.counts.completed), (BatchStatus::Completed, 300));
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    let total: i64 =
        output.iter().map(|line| line["response"]["body"]["usage"]["total_tokens"].as_i64().unwrap()).sum();
    assert_eq!(batch.usage.total, total);
    assert!(!part.exists(), "it was taken back, and its lines run again");
    node.stop().await;
}
