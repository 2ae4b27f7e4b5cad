//! In which order lines are sent, to which worker, and whose go first.

use std::{collections::BTreeMap, time::Duration};

use tidemill::{
    domain::{BatchStatus, Scope, WorkerPriority},
    scheduler::SchedulerOptions,
    sim::{Sim, SimConfig},
};

use crate::harness::{Node, Worker, assert_one_line_each, chats, options};

const GROUPS: usize = 20;

/// Chat requests over a few long system prompts, in an order that has nothing to do with them.
fn shared(count: usize) -> Vec<String> {
    (0..count)
        .map(|at| {
            let (number, rules) = (at * 7_919 % count, "Answer in one word. ".repeat(30));
            let system = format!("You are clerk number {}. {rules}", number % GROUPS);
            format!(
                r#"{{"custom_id":"r{at}","method":"POST","url":"/v1/chat/completions","body":{{"model":"sim","messages":[{{"role":"system","content":"{system}"}},{{"role":"user","content":"{at}?"}}],"max_tokens":4}}}}"#
            )
        })
        .collect()
}

/// Which prompt each request had, in the order in which they came.
fn groups(sim: &Sim) -> Vec<usize> {
    let clerk = |body: &[u8]| -> usize {
        let text = std::str::from_utf8(body).unwrap();
        let after = text.split("clerk number ").nth(1).unwrap();
        after.split('.').next().unwrap().parse().unwrap()
    };
    sim.faults().recorded().iter().map(|one| clerk(&one.body)).collect()
}

async fn recording() -> Worker {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(3), ..SimConfig::default() }).await;
    worker.sim.faults().record(true);
    worker
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_that_begin_alike_are_sent_together_and_answered_in_input_order() {
    let worker = recording().await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], options(), 4).await;
    let lines = shared(600);
    let id = node.submit(&lines, 1_000).await;
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    // Four are in flight, so that neighbours may overtake each other.
    let came = groups(&worker.sim);
    let changes = came.windows(2).filter(|pair| pair[0] != pair[1]).count();
    assert!(changes < 4 * GROUPS, "{changes} changes of prompt in {} requests", came.len());
    let in_file = lines.iter().map(|line| line.split("number ").nth(1).unwrap().split('.').next().unwrap());
    let in_file: Vec<_> = in_file.collect();
    assert!(in_file.windows(2).filter(|pair| pair[0] != pair[1]).count() > 500, "the file is well mixed");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_prompt_has_its_worker() {
    let workers = [recording().await, recording().await, recording().await];
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &workers.each_ref(), options(), 4).await;
    // All three are there before the first line is sent.
    while node.fleet.affinities("sim").len() < 3 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let lines = shared(1_200);
    let id = node.submit(&lines, 600).await;
    assert_eq!(node.ended(&id).await.counts.completed, 1_200);
    let mut at: BTreeMap<usize, [usize; 3]> = BTreeMap::new();
    for (place, worker) in workers.iter().enumerate() {
        for group in groups(&worker.sim) {
            at.entry(group).or_default()[place] += 1;
        }
    }
    let most: usize = at.values().map(|share| share.iter().max().unwrap()).sum();
    assert!(most > 800, "{most} of 1,200 went where most with their prompt went: {at:?}");
    for worker in &workers {
        assert!(worker.sim.faults().received() > 200, "none is idle: {at:?}");
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_batch_of_another_owner_does_not_wait_for_a_large_one() {
    let worker = Worker::start(SimConfig { latency: Duration::from_millis(80), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], options(), 8).await;
    let large = node.submit_of("large", &chats(4_000), 500).await;
    node.when(&large, |batch| batch.counts.completed > 0).await;
    let small = node.submit_of("small", &chats(100), 500).await;
    assert_eq!(node.ended(&small).await.status, BatchStatus::Completed);
    let done = node.store.batch(&large, &Scope::All).await.unwrap().unwrap().counts.completed;
    // With equal shares the large one gets on by about as much as the small one has.
    assert!(done < 1_000, "the small batch waited until {done} of the large one were done");
    worker.sim.faults().set_slow_down(0.05);
    assert_eq!(node.ended(&large).await.counts.completed, 4_000);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batch_requests_carry_a_priority_where_one_is_set() {
    let worker = recording().await;
    let folder = tempfile::tempdir().unwrap();
    let with = SchedulerOptions { worker_priority: WorkerPriority::Body(7), ..options() };
    let node = Node::start_with(folder.path(), &[&worker], with, 4).await;
    let own = r#"{"model":"sim","priority":1,"messages":[{"role":"user","content":"own"}]}"#;
    let mut lines = chats(3);
    lines.push(format!(r#"{{"custom_id":"own","method":"POST","url":"/v1/chat/completions","body":{own}}}"#));
    let id = node.submit(&lines, 10).await;
    assert_eq!(node.ended(&id).await.counts.completed, 4);
    let faults = worker.sim.faults();
    assert_eq!(faults.times_received(r#"{"priority":7,"model":"sim","messages""#), 3);
    assert_eq!(faults.times_received(own), 1, "a client's own is left as it is");
    node.stop().await;
}
