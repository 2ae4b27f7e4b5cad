//! Cancelled or expired at any moment, under any fault: one line for every request, finished ones kept, connections closed.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidemill::{
    domain::{BatchStatus, Scope, Timestamp},
    sim::{Fault, SimConfig},
};

use crate::harness::{Node, PATIENCE, Worker, assert_one_line_each, chats, options};

/// One batch, ended at a random moment. A failing seed is in the panic's message.
async fn one(node: &Node, worker: &Worker, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let lines = chats(random.random_range(1..400));
    let per_segment = random.random_range(1..150);
    let faults = worker.sim.faults();
    faults.next(random.random_range(0..10), Fault::Truncate);
    faults.next(random.random_range(0..3), Fault::Hang);
    let expires = random.random_bool(0.3);
    let id = node.submit(&lines, per_segment).await;
    tokio::time::sleep(Duration::from_millis(random.random_range(0..600))).await;
    let before = node.store.batch(&id, &Scope::All).await.unwrap().unwrap();
    if expires {
        node.store.set_expiry(&id, Timestamp::now()).await.unwrap();
    } else {
        node.store.cancel_batch(&id, &Scope::All).await.unwrap();
    }
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(batch.counts.completed >= before.counts.completed, "seed {seed}: finished lines are kept");
    assert_eq!(
        (batch.counts.completed, batch.counts.failed),
        (output.len() as i64, errors.len() as i64),
        "seed {seed}"
    );
    let (status, code) =
        if expires { (BatchStatus::Expired, "batch_expired") } else { (BatchStatus::Cancelled, "batch_cancelled") };
    assert!([status, BatchStatus::Completed].contains(&batch.status), "seed {seed}: {:?}", batch.status);
    for line in &errors {
        assert_eq!(line["error"]["code"], code, "seed {seed}: {line}");
    }
    assert_eq!(batch.not_run, errors.len() as i64, "seed {seed}: counted apart");
    if batch.status == BatchStatus::Completed {
        assert_eq!(errors.len(), 0, "seed {seed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whenever_a_batch_is_ended_each_request_has_one_line() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(30), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], options(), 32).await;
    let start: u64 = std::env::var("TIDEMILL_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    for round in 0..8 {
        // Several at a time: each is ended under the load of the others.
        futures::future::join_all((0..4).map(|at| one(&node, &worker, start + round * 4 + at))).await;
    }
    worker.sim.faults().clear();
    let idle = async {
        while worker.sim.faults().in_flight() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, idle).await.expect("every connection is closed");
    // Nothing of it is left in the way of the next batch.
    let lines = chats(50);
    let id = node.submit(&lines, 50).await;
    assert_eq!(node.ended(&id).await.counts.completed, 50);
    node.stop().await;
}
