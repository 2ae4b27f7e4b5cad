//! What a batch does when workers misbehave: the lines are run elsewhere or again, and each ends exactly once.

use std::time::Duration;

use axum::http::StatusCode;
use tidemill::{
    domain::BatchStatus,
    fleet::WorkerState,
    scheduler::SchedulerOptions,
    sim::{Fault, SimConfig},
};

use crate::harness::{Node, PATIENCE, Worker, assert_one_line_each, chats, options};

async fn completes(node: &Node, lines: &[String]) {
    let id = node.submit(lines, 50).await;
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Completed);
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(lines, &output, &errors);
    assert!(errors.is_empty(), "{:?}", errors.first());
}

#[tokio::test(flavor = "multi_thread")]
async fn resets_truncations_and_server_errors_are_tried_again() {
    let worker = Worker::start(SimConfig::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[&worker]).await;
    let faults = worker.sim.faults();
    faults.next(3, Fault::Reset);
    faults.next(3, Fault::Truncate);
    for status in [408, 409, 425, 500, 502, 503, 504] {
        faults.fail_next(2, StatusCode::from_u16(status).unwrap(), None);
    }
    faults.fail_next(2, StatusCode::TOO_MANY_REQUESTS, Some(Duration::from_secs(1)));
    completes(&node, &chats(200)).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_always_fails_ends_with_the_last_answer_after_its_tries() {
    let worker = Worker::start(SimConfig::default()).await;
    worker.sim.faults().always(Some(Fault::Fail { status: StatusCode::BAD_GATEWAY, retry_after: None }));
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[&worker]).await;
    let lines = chats(3);
    let id = node.submit(&lines, 10).await;
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Completed);
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert_eq!(errors.len(), 3);
    assert_eq!(errors[0]["response"]["status_code"], 502);
    assert_eq!(worker.sim.faults().received(), 15, "five tries each");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_only_says_503_uses_up_the_tries() {
    let worker = Worker::start(SimConfig::default()).await;
    worker.sim.faults().always(Some(Fault::Fail { status: StatusCode::SERVICE_UNAVAILABLE, retry_after: None }));
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[&worker]).await;
    let id = node.submit(&chats(1), 10).await;
    let batch = node.ended(&id).await;
    let (_, errors) = node.results(&batch).await;
    assert_eq!(errors[0]["response"]["status_code"], 503);
    assert_eq!(worker.sim.faults().received(), 5);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_hangs_times_out() {
    let worker = Worker::start(SimConfig::default()).await;
    worker.sim.faults().always(Some(Fault::Hang));
    let folder = tempfile::tempdir().unwrap();
    let short = SchedulerOptions { request_timeout: Duration::from_millis(100), ..options() };
    let node = Node::start_with(folder.path(), &[&worker], short, 64).await;
    let lines = chats(2);
    let id = node.submit(&lines, 10).await;
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert_eq!(errors[0]["error"]["code"], "request_timeout");
    assert_eq!(worker.sim.faults().received(), 10);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_workers_requests_run_elsewhere_at_once() {
    let slow = SimConfig { latency: Duration::from_millis(400), ..SimConfig::default() };
    let (mut doomed, other) = (Worker::start(slow.clone()).await, Worker::start(slow).await);
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[&doomed, &other]).await;
    let lines = chats(300);
    let id = node.submit(&lines, 100).await;
    node.when(&id, |batch| batch.counts.completed > 0).await;
    doomed.kill().await;
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty(), "{:?}", errors.first());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unhealthy_workers_hanging_requests_are_abandoned_not_waited_for() {
    // What a real vLLM does after SIGTERM: /health fails, and the requests it has get neither an answer nor a close.
    let (sick, other) = (Worker::start(SimConfig::default()).await, Worker::start(SimConfig::default()).await);
    sick.sim.faults().always(Some(Fault::Hang));
    let folder = tempfile::tempdir().unwrap();
    // Nobody who waits for the time-out is in time.
    let patient = SchedulerOptions { request_timeout: 10 * PATIENCE, ..options() };
    let node = Node::start_with(folder.path(), &[&sick, &other], patient, 64).await;
    let lines = chats(100);
    let id = node.submit(&lines, 100).await;
    node.when(&id, |batch| batch.counts.completed > 0).await;
    assert!(sick.sim.faults().in_flight() > 0);
    sick.sim.faults().set_unhealthy(true);
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty(), "{:?}", errors.first());
    let states: Vec<_> = node.fleet.workers().iter().map(|worker| worker.state).collect();
    assert_eq!(states, [WorkerState::Down, WorkerState::Healthy]);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_waits_for_a_worker_that_comes_back() {
    let mut worker = Worker::start(SimConfig { latency: Duration::from_millis(50), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], options(), 8).await;
    let lines = chats(100);
    let id = node.submit(&lines, 30).await;
    node.when(&id, |batch| batch.counts.completed > 0).await;
    worker.kill().await;
    tokio::time::timeout(PATIENCE, async {
        while node.fleet.capacity("sim") > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("the worker is seen to be down");
    let _back = Worker::start_at(SimConfig::default(), worker.address).await;
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty(), "{:?}", errors.first());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn drained_workers_get_nothing_new_and_removed_ones_are_left_at_once() {
    let (a, b) = (Worker::start(SimConfig::default()).await, Worker::start(SimConfig::default()).await);
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start(folder.path(), &[]).await;
    let worker = node.fleet.register(&a.url()).await.unwrap();
    let same = node.fleet.register(&format!("{}/v1/", a.url())).await.unwrap();
    assert_eq!(worker.id, same.id, "the same worker by another spelling");
    node.fleet.drain(&worker.id).await.unwrap();
    node.fleet.register(&b.url()).await.unwrap();
    completes(&node, &chats(50)).await;
    assert_eq!((a.sim.faults().received(), b.sim.faults().received()), (0, 50));
    b.sim.faults().always(Some(Fault::Hang));
    let lines = chats(10);
    let id = node.submit(&lines, 10).await;
    tokio::time::timeout(PATIENCE, async {
        while b.sim.faults().in_flight() == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    let (first, second) = (node.fleet.workers()[0].id.clone(), node.fleet.workers()[1].id.clone());
    node.fleet.register(&a.url()).await.unwrap();
    node.fleet.remove(&second).await.unwrap();
    assert!(node.fleet.remove(&second).await.is_err());
    let batch = node.ended(&id).await;
    assert_eq!(batch.counts.completed, 10);
    assert_eq!(node.fleet.workers().len(), 1);
    assert_eq!(node.fleet.workers()[0].id, first);
    node.stop().await;
}
