//! What a batch does when nothing breaks.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use tidemill::{
    domain::{BatchStatus, Scope, Timestamp},
    results::{ReadError, ResultLine},
    sim::SimConfig,
};

use crate::harness::{Node, Worker, assert_one_line_each, chat, chats, ids, options};

#[tokio::test(flavor = "multi_thread")]
async fn every_request_has_one_line_in_input_order_and_bodies_pass_untouched() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(2), ..SimConfig::default() }).await;
    worker.sim.faults().record(true);
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[&worker]).await;
    let mut lines = chats(700);
    let odd = r#"{ "model":"sim" ,"max_tokens":2,"messages":[{"role":"user","content":"caf\u00e9 ☕"}],"temperature":1.0e-1 }"#;
    lines.push(format!(r#"{{"url":"/v1/chat/completions","custom_id":"\u006fdd","body":{odd},"method":"POST"}}"#));
    let id = node.submit(&lines, 97).await;
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Completed);
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty());
    assert_eq!(worker.sim.faults().times_received(odd), 1, "the body arrives as it was written");
    let total: i64 =
        output.iter().map(|line| line["response"]["body"]["usage"]["total_tokens"].as_i64().unwrap()).sum();
    assert_eq!(batch.usage.total, total);
    assert_eq!((batch.counts.completed, batch.counts.failed), (701, 0));
    assert_eq!(worker.sim.faults().received(), 701, "nothing ran twice");
    for line in &output {
        assert_eq!(line["response"]["status_code"], 200);
        assert!(line["error"].is_null());
        assert!(line["id"].as_str().unwrap().starts_with("batch_req_"));
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_request_ends_in_the_error_file_with_the_workers_answer() {
    let worker = Worker::start(SimConfig::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[&worker]).await;
    let mut lines = chats(20);
    lines.insert(
        7,
        r#"{"custom_id":"bad","method":"POST","url":"/v1/chat/completions","body":{"model":"sim","messages":"x"}}"#
            .into(),
    );
    let id = node.submit(&lines, 10).await;
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Completed, "a batch with failed lines still completes");
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert_eq!(ids(&errors), ["bad"]);
    assert_eq!(errors[0]["response"]["status_code"], 400);
    assert!(errors[0]["error"].is_null());
    assert_eq!(errors[0]["response"]["body"]["error"]["code"], 400);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn models_go_to_the_workers_that_serve_them_and_a_missing_one_waits() {
    let a = Worker::start(SimConfig { models: vec!["a".into()], ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[&a]).await;
    let lines: Vec<_> = (0..60).map(|i| chat(&format!("r{i}"), if i % 3 == 0 { "b" } else { "a" })).collect();
    let id = node.submit(&lines, 25).await;
    let waiting = node.when(&id, |batch| batch.counts.completed == 40).await;
    assert_eq!(waiting.status, BatchStatus::InProgress, "no worker for b: the batch waits");
    assert_eq!(node.fleet.unserved(&waiting.models), ["b"]);
    let b = Worker::start(SimConfig { models: vec!["b".into()], ..SimConfig::default() }).await;
    node.fleet.register(&b.url()).await.unwrap();
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert_eq!((output.len(), a.sim.faults().received(), b.sim.faults().received()), (60, 40, 20));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_keeps_what_is_done_and_frees_the_worker() {
    let slow = SimConfig { latency: Duration::from_secs(30), ..SimConfig::default() };
    let worker = Worker::start(SimConfig { models: vec!["slow".into()], ..slow }).await;
    let quick = Worker::start(SimConfig::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[&worker, &quick]).await;
    let lines: Vec<_> = (0..90).map(|i| chat(&format!("r{i}"), if i < 30 { "sim" } else { "slow" })).collect();
    let id = node.submit(&lines, 40).await;
    node.when(&id, |batch| batch.counts.completed == 30).await;
    assert!(worker.sim.faults().in_flight() > 0);
    node.store.cancel_batch(&id, &Scope::All).await.unwrap();
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Cancelled);
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert_eq!((output.len(), errors.len(), batch.not_run), (30, 60, 60));
    for line in &errors {
        assert_eq!(line["error"]["code"], "batch_cancelled");
        assert!(line["response"].is_null());
    }
    tokio::time::timeout(Duration::from_secs(120), async {
        while worker.sim.faults().in_flight() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("the connections are closed, so the worker stops generating");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_window_ends_the_rest_as_expired() {
    let worker = Worker::start(SimConfig { models: vec!["other".into()], ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[&worker]).await;
    let lines = chats(25);
    let id = node.submit(&lines, 10).await;
    node.store.set_expiry(&id, Timestamp::now()).await.unwrap();
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Expired);
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert_eq!(errors[0]["error"]["code"], "batch_expired");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn results_stream_while_the_batch_runs_and_resume_at_every_cursor() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(200), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], options(), 8).await;
    let mut lines = chats(120);
    lines[50] =
        r#"{"custom_id":"r50","method":"POST","url":"/v1/chat/completions","body":{"model":"sim","messages":1}}"#
            .into();
    let id = node.submit(&lines, 50).await;
    let mut stream = Box::pin(node.reader.results(&id, None, true).await.unwrap());
    let first = stream.next().await.unwrap().unwrap();
    assert!(
        !node.store.batch(&id, &Scope::All).await.unwrap().unwrap().status.is_terminal(),
        "a line comes while the batch runs"
    );
    let mut all = vec![first];
    all.extend(stream.try_collect::<Vec<_>>().await.unwrap());
    let seen = |results: &[ResultLine]| results.iter().map(|result| result.custom_id.clone()).collect::<Vec<_>>();
    let mut sorted = seen(&all);
    sorted.sort();
    sorted.dedup();
    assert_eq!(sorted.len(), 120);
    for result in &all {
        let line = &lines[usize::try_from(result.line_number).unwrap() - 1];
        assert!(line.contains(&format!("\"{}\"", result.custom_id)));
        assert_eq!(result.succeeded, result.custom_id != "r50");
    }
    // By now the parts are merged; every cursor still leads to the rest.
    for at in [0, 1, 49, 50, 51, 118, 119] {
        let rest = node.reader.results(&id, Some(all[at].cursor), false).await.unwrap();
        let rest: Vec<ResultLine> = rest.try_collect().await.unwrap();
        assert_eq!(seen(&rest), seen(&all[at + 1..]));
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_higher_priority_goes_first() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(100), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], options(), 4).await;
    let low = node.submit_as(&chats(3_000), 1_000, -1).await;
    node.when(&low, |batch| batch.counts.completed > 0).await;
    let high = node.submit_as(&chats(40), 1_000, 1).await;
    node.ended(&high).await;
    let behind = node.store.batch(&low, &Scope::All).await.unwrap().unwrap();
    assert!(behind.counts.completed < 1_000, "{:?}", behind.counts);
    node.store.cancel_batch(&low, &Scope::All).await.unwrap();
    node.ended(&low).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_results_are_freed_and_say_so() {
    let worker = Worker::start(SimConfig::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[&worker]).await;
    let mut lines = chats(60);
    lines[3] =
        r#"{"custom_id":"r3","method":"POST","url":"/v1/chat/completions","body":{"model":"sim","messages":1}}"#.into();
    let id = node.submit(&lines, 20).await;
    let batch = node.ended(&id).await;
    let (output, errors) = (batch.output_file_id.clone().unwrap(), batch.error_file_id.clone().unwrap());
    let file = node.store.file(&errors, &Scope::All).await.unwrap().unwrap();
    node.store.delete_file(&output, &Scope::All).await.unwrap();
    let (_, left) = node.results(&tidemill::domain::Batch { output_file_id: None, ..batch.clone() }).await;
    assert_eq!(ids(&left), ["r3"], "the errors are still there");
    node.store.delete_file(&errors, &Scope::All).await.unwrap();
    let read: Result<Vec<_>, _> = node.reader.download(&file, 0).await.unwrap().try_collect::<Vec<_>>().await;
    assert!(matches!(read, Err(ReadError::Deleted(_))), "a file that goes while it is read does not just end");
    let read: Result<Vec<_>, _> = node.reader.results(&id, None, false).await.unwrap().try_collect::<Vec<_>>().await;
    assert!(matches!(read, Err(ReadError::Deleted(_))));
    assert_eq!(node.store.segments(&id, tidemill::domain::SegmentIndex(0), 9).await.unwrap(), []);
    let objects = node.blobs.list("results").await.unwrap();
    assert!(!objects.is_empty(), "whoever is reading has ten minutes");
    node.stop().await;
}
