//! How many requests a worker gets at a time, over real sockets.

use std::time::Duration;

use axum::http::StatusCode;
use tidemill::{
    blobs::Blobs,
    domain::{BatchStatus, Scope},
    fleet::{InFlight, WorkerView},
    sim::{Fault, SimConfig},
};

use crate::harness::{Node, PATIENCE, Worker, assert_one_line_each, chats, options};

async fn node(folder: &tempfile::TempDir, worker: &Worker, limit: InFlight) -> Node {
    let blobs = Blobs::directory(&folder.path().join("blobs")).unwrap();
    Node::start_limited(folder.path(), blobs, &[worker], options(), limit).await
}

/// What clients see of the only worker, once `until` holds of it.
async fn seen(node: &Node, until: impl Fn(&WorkerView) -> bool) -> WorkerView {
    let wait = async {
        loop {
            match node.fleet.workers().into_iter().next() {
                Some(worker) if until(&worker) => return worker,
                Some(_) | None => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{:?}", node.fleet.workers()))
}

/// So slow that a busy machine can keep as many requests in flight as it runs.
fn slow(max_num_seqs: usize) -> SimConfig {
    SimConfig { latency: Duration::from_secs(1), max_num_seqs, ..SimConfig::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_runs_many_gets_many_and_its_limit_is_shown() {
    let worker = Worker::start(slow(200)).await;
    let folder = tempfile::tempdir().unwrap();
    let node = node(&folder, &worker, InFlight::Adaptive { cap: 1_024 }).await;
    let lines = chats(6_000);
    let id = node.submit(&lines, 1_000).await;
    let view = seen(&node, |worker| worker.limit >= 200 && worker.in_flight >= 200).await;
    assert!(view.load.is_some());
    worker.sim.faults().set_slow_down(0.05);
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Completed);
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(worker.sim.faults().max_in_flight() <= 1_024);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_limit_stays_under_its_cap_and_a_fixed_one_stays_where_it_is() {
    for (limit, most) in [(InFlight::Adaptive { cap: 90 }, 90), (InFlight::Fixed(7), 7)] {
        let worker = Worker::start(slow(200)).await;
        let folder = tempfile::tempdir().unwrap();
        let node = node(&folder, &worker, limit).await;
        let id = node.submit(&chats(if most == 90 { 1_500 } else { 100 }), 500).await;
        seen(&node, |worker| worker.limit == most && worker.in_flight == most).await;
        worker.sim.faults().set_slow_down(0.05);
        assert_eq!(
            node.ended(&id).await.counts.completed,
            node.store.batch(&id, &Scope::All).await.unwrap().unwrap().counts.total
        );
        assert_eq!(worker.sim.faults().max_in_flight(), most as usize);
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn preemptions_and_push_backs_lower_the_limit() {
    // How far and how fast is for the tests of the limit in virtual time. Here: that what the worker does gets there.
    let worker = Worker::start(slow(1_000)).await;
    let folder = tempfile::tempdir().unwrap();
    let node = node(&folder, &worker, InFlight::Adaptive { cap: 1_024 }).await;
    let id = node.submit(&chats(3_000), 1_000).await;
    let mut limit = seen(&node, |worker| worker.in_flight > 1 && worker.load.is_some()).await.limit;
    // Whatever the pace, the limit falls some time while this goes on: it may rise in between.
    let falls = async |limit: &mut u32, again: &dyn Fn()| {
        loop {
            again();
            tokio::time::sleep(Duration::from_millis(50)).await;
            let now = node.fleet.workers()[0].limit;
            if std::mem::replace(limit, now) > now {
                return;
            }
        }
    };
    let preempt = || worker.sim.faults().preempt(10);
    tokio::time::timeout(PATIENCE, falls(&mut limit, &preempt)).await.expect("preemptions lower it");
    // Preemptions that are still to be noticed may lower it to its floor: from there nothing lowers it.
    let rises = seen(&node, |worker| worker.limit > limit);
    limit = rises.await.limit;
    let refuse = Fault::Fail { status: StatusCode::TOO_MANY_REQUESTS, retry_after: Some(Duration::ZERO) };
    worker.sim.faults().always(Some(refuse));
    tokio::time::timeout(PATIENCE, falls(&mut limit, &|| {})).await.expect("push-backs lower it");
    worker.sim.faults().clear();
    node.store.cancel_batch(&id, &Scope::All).await.unwrap();
    assert_eq!(node.ended(&id).await.status, BatchStatus::Cancelled);
    node.stop().await;
}
