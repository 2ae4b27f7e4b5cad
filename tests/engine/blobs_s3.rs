//! Objects in S3: the row comes after the object, however slow S3 is.

use std::time::Duration;

use tidemill::{
    blobs::Blobs,
    domain::{Scope, SegmentIndex, TokenUsage},
    results::{PartBuilder, merge},
    sim::SimConfig,
};

use crate::{
    harness::{Node, Worker, assert_one_line_each, chats, options},
    s3::{BUCKET, Fault, On, S3},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_names_an_object_is_there_only_once_s3_has_answered() {
    tidemill::telemetry::install_tls_provider();
    let s3 = S3::start().await;
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(20), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let blobs = Blobs::url_with(&format!("s3://{BUCKET}/p"), s3.environment()).unwrap();
    let node = Node::start_on(folder.path(), blobs, &[&worker], options(), 8).await;
    s3.break_it(On::Writes, Fault::Slow(Duration::from_millis(150)));
    let lines = chats(300);
    let id = node.submit(&lines, 60).await;
    let (mut parts_seen, mut ends_seen) = (0, 0);
    let batch = loop {
        // Rows first, answers second: an answer is never taken back, so a row without one came too early.
        let batch = node.store.batch(&id, &Scope::All).await.unwrap().unwrap();
        let parts = node.store.parts_from(&id, 0, 1_000).await.unwrap();
        let segments = node.store.segments(&id, SegmentIndex(0), 1_000).await.unwrap();
        let parts: Vec<String> = parts.into_iter().map(|part| part.content.object_key).collect();
        let ends: Vec<String> = segments.into_iter().filter_map(|segment| segment.object_key).collect();
        (parts_seen, ends_seen) = (parts_seen.max(parts.len()), ends_seen.max(ends.len()));
        for key in parts.iter().chain(&ends) {
            assert!(s3.answered(&format!("p/{key}")), "a row names {key}, and S3 has not answered yet");
        }
        if batch.status.is_terminal() {
            break batch;
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
    };
    assert!(parts_seen > 2 && ends_seen == 5, "{parts_seen} {ends_seen}");
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty());
    node.stop().await;
}

#[tokio::test]
async fn a_merge_that_fails_leaves_no_upload_behind() {
    tidemill::telemetry::install_tls_provider();
    let s3 = S3::start().await;
    let blobs = Blobs::url_with(&format!("s3://{BUCKET}/p"), s3.environment()).unwrap();
    let part = |line: u32| {
        let mut builder = PartBuilder::default();
        // Larger than a piece of a multipart upload, so that one is under way.
        builder.complete(line, [&[b'x'; 4 << 20][..], b"\n"].concat(), TokenUsage::default());
        builder.build(format!("part-{line}"))
    };
    let ((one, one_row), (other, other_row)) = (part(0), part(1));
    let mut rotten = other.to_vec();
    rotten[7] = b'y';
    blobs.put("part-0", one).await.unwrap();
    blobs.put("part-1", rotten.into()).await.unwrap();
    assert!(merge(&blobs, &[&one_row, &other_row], "final".into()).await.is_err());
    assert_eq!((s3.unfinished(), s3.keys()), (0, vec!["p/part-0".to_owned(), "p/part-1".to_owned()]));
    blobs.put("part-1", other).await.unwrap();
    merge(&blobs, &[&one_row, &other_row], "final".into()).await.unwrap();
    assert_eq!(blobs.get("final").await.unwrap().len(), 2 * ((4 << 20) + 1));
}

#[tokio::test]
async fn many_objects_are_deleted_by_one_request_unless_it_is_switched_off() {
    tidemill::telemetry::install_tls_provider();
    for bulk in [true, false] {
        let s3 = S3::start().await;
        let mut environment = s3.environment();
        environment.push(("AWS_DISABLE_BULK_DELETE".into(), (!bulk).to_string()));
        let blobs = Blobs::url_with(&format!("s3://{BUCKET}/p"), environment).unwrap();
        let keys: Vec<String> = (0..60).map(|number| format!("results/b/{number:06}/1-1")).collect();
        for key in &keys {
            blobs.put(key, "x".into()).await.unwrap();
        }
        blobs.put("results/c/000000/1-1", "x".into()).await.unwrap();
        let before = s3.requests();
        let mut deleted = blobs.delete_all(keys.clone()).await;
        let requests = s3.requests() - before;
        deleted.gone.sort();
        assert!(deleted.error.is_none() && deleted.gone == keys, "{deleted:?}");
        assert_eq!(s3.keys(), ["p/results/c/000000/1-1"]);
        assert_eq!(requests, if bulk { 1 } else { 60 });
        s3.break_it(On::Writes, Fault::Status(403, "AccessDenied"));
        let deleted = blobs.delete_all(keys).await;
        assert!(deleted.gone.is_empty() && deleted.error.is_some());
    }
}
