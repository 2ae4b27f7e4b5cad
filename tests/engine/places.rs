//! Nobody keeps others from running by having much that takes long.

use std::time::Duration;

use futures::future::join_all;
use tidemill::{domain::BatchStatus, domain::Scope, fleet::InFlight, sim::SimConfig};

use crate::harness::{Node, Worker, chat, options};

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_slow_batches_of_one_owner_keep_nobody_else_waiting() {
    const SLOW: usize = 560;
    let hour = Duration::from_secs(3_600);
    let slow = Worker::start(SimConfig { models: vec!["slow".into()], latency: hour, ..SimConfig::default() }).await;
    let quick = Worker::start(SimConfig { models: vec!["quick".into()], ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let blobs = tidemill::blobs::Blobs::directory(&folder.path().join("blobs")).unwrap();
    let options = tidemill::scheduler::SchedulerOptions { request_timeout: hour, drain: Duration::ZERO, ..options() };
    let node = Node::start_limited(folder.path(), blobs, &[&slow, &quick], options, InFlight::Fixed(1_024)).await;
    let request = [chat("slow", "slow")];
    let slow_ones = join_all((0..SLOW).map(|_| node.submit_of("many", &request, 1))).await;
    // Only when it has taken all that it can get the others come.
    let taken = async {
        let in_flight = || node.fleet.workers().iter().map(|worker| worker.in_flight).sum::<u32>();
        let mut before = 0;
        while before < 256 || in_flight() > before {
            before = in_flight();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::time::timeout(crate::harness::PATIENCE, taken).await.expect("most of the slow requests are sent");
    for owner in ["few", "another", "third"] {
        for _ in 0..3 {
            let id = node.submit_of(owner, &[chat("q", "quick")], 1).await;
            assert_eq!(node.ended(&id).await.status, BatchStatus::Completed, "of {owner}");
        }
    }
    for id in slow_ones {
        assert_eq!(node.store.batch(&id, &Scope::All).await.unwrap().unwrap().status, BatchStatus::InProgress);
    }
    node.stop().await;
}
