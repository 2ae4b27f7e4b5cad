//! Workers that answer what no worker should, or die of what they are asked: nothing is lost, and no line pays for another.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use axum::http::StatusCode;
use serde_json::Value;
use tidemill::{
    domain::{Batch, BatchStatus, Scope},
    scheduler::{SchedulerOptions, TryPolicy},
    sim::{Fault, SimConfig},
};

use crate::{
    harness::{Node, Worker, assert_one_line_each, chats, ids, options},
    raw::{GOOD, Raw, Reply},
};

/// Runs lines over workers given by URL, and returns the batch and its output and error lines.
async fn run(urls: &[String], options: SchedulerOptions, lines: &[String]) -> (Batch, Vec<Value>, Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[], options, 16).await;
    for url in urls {
        node.fleet.register(url).await.unwrap();
    }
    let id = node.submit(lines, 50).await;
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_eq!(batch.status, BatchStatus::Completed);
    assert_one_line_each(lines, &output, &errors);
    node.stop().await;
    (batch, output, errors)
}

fn impatient() -> SchedulerOptions {
    SchedulerOptions {
        request_timeout: Duration::from_millis(300),
        tries: TryPolicy { max_tries: 2, ..options().tries },
        ..options()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_drips_is_bounded_by_the_request_timeout() {
    let raw = Raw::start(|_| Reply::Drip(Duration::from_millis(50))).await;
    let (_, _, errors) = run(&[raw.url()], impatient(), &chats(3)).await;
    assert_eq!(errors.len(), 3);
    assert_eq!(errors[0]["error"]["code"], "request_timeout");
    assert_eq!(raw.received(), 6, "two tries each");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_connection_is_given_up_after_the_request_timeout() {
    let raw = Raw::start(|_| Reply::Nothing).await;
    let good = Worker::start(SimConfig::default()).await;
    // Long beside the good worker's time to answer, on a busy machine too.
    let patient = SchedulerOptions { request_timeout: Duration::from_secs(5), ..impatient() };
    let (_, output, _) = run(&[raw.url(), good.url()], patient, &chats(40)).await;
    assert_eq!(output.len(), 40, "what one worker swallowed, the other one answers");
    assert!(raw.received() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn json_of_another_content_type_is_an_answer() {
    let raw = Raw::start(|_| Reply::Answer(200, "text/html", GOOD.into())).await;
    let (_, output, _) = run(&[raw.url()], options(), &chats(5)).await;
    assert_eq!(output[0]["response"]["body"]["choices"][0]["message"]["content"], "ok");
    assert_eq!(raw.received(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn html_and_truncated_json_are_tried_again_and_then_an_error() {
    for body in ["<html><body>Welcome to nginx!</body></html>", &GOOD[..GOOD.len() / 2], ""] {
        let text = body.to_owned();
        let raw = Raw::start(move |_| Reply::Answer(200, "application/json", text.clone())).await;
        let (batch, _, errors) = run(&[raw.url()], options(), &chats(2)).await;
        assert_eq!((batch.counts.completed, batch.counts.failed), (0, 2), "{body}");
        assert_eq!(errors[0]["error"]["code"], "bad_worker_answer", "{body}");
        assert_eq!(raw.received(), 10, "five tries each: {body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_shorter_than_its_head_says_is_run_elsewhere() {
    let raw = Raw::start(|_| Reply::Short).await;
    let good = Worker::start(SimConfig::default()).await;
    let (_, output, _) = run(&[raw.url(), good.url()], options(), &chats(60)).await;
    assert_eq!(output.len(), 60);
    assert!(raw.received() > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_success_that_holds_only_an_error_is_a_failed_try_and_then_an_error_line() {
    let tries = AtomicUsize::new(0);
    let raw = Raw::start(move |body| {
        let error = r#"{"error":{"message":"upstream connect error","code":502}}"#;
        let passes = body.contains("r0\"") && tries.fetch_add(1, Ordering::SeqCst) >= 2;
        if passes { Reply::good() } else { Reply::Answer(200, "application/json", error.into()) }
    })
    .await;
    let (_, output, errors) = run(&[raw.url()], options(), &chats(3)).await;
    assert_eq!((ids(&output), ids(&errors)), (vec!["r0".into()], vec!["r1".into(), "r2".into()]));
    assert_eq!(errors[0]["response"]["body"]["error"]["message"], "upstream connect error");
    assert_eq!(errors[0]["error"]["code"], "bad_worker_answer");
    assert_eq!(raw.received(), 3 + 5 + 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_a_worker_lists_and_does_not_have_is_found_elsewhere() {
    let missing =
        r#"{"error":{"message":"The model `sim` does not exist.","type":"NotFoundError","param":"model","code":404}}"#;
    let liar = Raw::start(|_| Reply::Answer(404, "application/json", missing.into())).await;
    let good = Worker::start(SimConfig::default()).await;
    let (_, output, _) = run(&[liar.url(), good.url()], options(), &chats(60)).await;
    assert_eq!(output.len(), 60);
    assert!(liar.received() > 0);
    // Where nobody has it, that is the answer.
    let (_, _, errors) = run(&[liar.url()], options(), &chats(2)).await;
    assert_eq!(errors[0]["response"]["status_code"], 404);
    assert_eq!(errors[0]["response"]["body"]["error"]["type"], "NotFoundError");
    // What else the API does not find is the request's answer at once; what no API says is asked for twice.
    let error = r#"{"error":{"message":"Response with id 'x' not found.","type":"NotFoundError","code":404}}"#;
    for (body, times) in [(error, 1), (r#"{"detail":"Not Found"}"#, 2)] {
        let other = Raw::start(move |_| Reply::Answer(404, "application/json", body.into())).await;
        let (_, _, errors) = run(&[other.url()], options(), &chats(2)).await;
        assert_eq!(errors[0]["response"]["status_code"], 404);
        assert_eq!(other.received(), 2 * times, "{body}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_429_and_503_from_all_workers_uses_up_no_tries() {
    let (a, b) = (Worker::start(SimConfig::default()).await, Worker::start(SimConfig::default()).await);
    let pause = Some(Duration::ZERO);
    a.sim.faults().fail_next(300, StatusCode::TOO_MANY_REQUESTS, pause);
    b.sim.faults().fail_next(300, StatusCode::SERVICE_UNAVAILABLE, pause);
    let patient =
        SchedulerOptions { tries: TryPolicy { cap: Duration::from_millis(50), ..options().tries }, ..options() };
    let (_, output, _) = run(&[a.url(), b.url()], patient, &chats(40)).await;
    assert_eq!(output.len(), 40, "on average each was refused fifteen times");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flapping_worker_costs_no_line() {
    let (flapping, steady) = (
        Raw::start(|_| Reply::Later(Duration::from_millis(100))).await,
        Worker::start(SimConfig { latency: Duration::from_millis(50), ..SimConfig::default() }).await,
    );
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&steady], options(), 8).await;
    node.fleet.register(&flapping.url()).await.unwrap();
    let lines = chats(1_500);
    let id = node.submit(&lines, 200).await;
    let flap = async {
        loop {
            tokio::time::sleep(Duration::from_millis(700)).await;
            flapping.kill();
        }
    };
    let batch = tokio::select! {
        batch = node.ended(&id) => batch,
        () = flap => unreachable!(),
    };
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty(), "{:?}", errors.first());
    assert!(flapping.deaths() >= 3, "{}", flapping.deaths());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_gets_slower_and_slower_holds_nobody_up() {
    let slow = Worker::start(SimConfig { latency: Duration::from_millis(20), ..SimConfig::default() }).await;
    let good = Worker::start(SimConfig { latency: Duration::from_millis(20), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let short = SchedulerOptions { request_timeout: Duration::from_secs(1), ..options() };
    let node = Node::start_with(folder.path(), &[&slow, &good], short, 8).await;
    let lines = chats(2_000);
    let id = node.submit(&lines, 200).await;
    let faults = slow.sim.faults();
    let slower = async {
        let mut factor = 1.0;
        loop {
            faults.set_slow_down(factor);
            factor *= 2.0;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    let batch = tokio::select! {
        batch = node.ended(&id) => batch,
        () = slower => unreachable!(),
    };
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty(), "{:?}", errors.first());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poison_request_is_isolated_and_costs_no_other_line() {
    // Whichever worker takes r7 dies at once, with all that it has in flight.
    let poison = |body: &str| if body.contains("r7\"") { Reply::Die } else { Reply::Later(Duration::from_millis(30)) };
    let (a, b) = (Raw::start(poison).await, Raw::start(poison).await);
    let lines = chats(200);
    let (_, output, errors) = run(&[a.url(), b.url()], options(), &lines).await;
    assert_eq!(ids(&errors), ["r7"], "only the one that kills");
    assert_eq!(output.len(), 199);
    let code = errors[0]["error"]["code"].as_str().unwrap();
    assert!(["worker_unreachable", "worker_lost"].contains(&code), "{code}");
    // No fewer than its tries. No more than three in company, five while 32 are halved, two alone, and two if nobody else was
    // answered in between: without halving, each of its neighbours would have to be cleared by itself.
    let (deaths, tries) = (a.deaths() + b.deaths(), options().tries.max_tries);
    assert!((tries..=3 + 5 + 2 + 2).contains(&deaths), "{deaths} deaths, {tries} tries");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_poison_requests_on_one_worker_cost_no_other_line() {
    let poison = |body: &str| if body.contains("3\"") { Reply::Die } else { Reply::Later(Duration::from_millis(20)) };
    let raw = Raw::start(poison).await;
    let lines = chats(50);
    let quick = SchedulerOptions { tries: TryPolicy { max_tries: 3, ..options().tries }, ..options() };
    let (_, output, errors) = run(&[raw.url()], quick, &lines).await;
    assert_eq!(ids(&errors), ["r3", "r13", "r23", "r33", "r43"]);
    assert_eq!(output.len(), 45);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_workers_may_go_and_come_back() {
    let slow = SimConfig { latency: Duration::from_millis(100), ..SimConfig::default() };
    let (mut a, mut b) = (Worker::start(slow.clone()).await, Worker::start(slow.clone()).await);
    b.sim.faults().next(20, Fault::Reset);
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&a, &b], options(), 4).await;
    let lines = chats(150);
    let id = node.submit(&lines, 60).await;
    node.when(&id, |batch| batch.counts.completed > 0).await;
    a.kill().await;
    b.kill().await;
    while node.fleet.capacity("sim") > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let before = node.store.batch(&id, &Scope::All).await.unwrap().unwrap();
    assert_eq!(before.status, BatchStatus::InProgress);
    let _back = (Worker::start_at(slow.clone(), a.address).await, Worker::start_at(slow, b.address).await);
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty(), "{:?}", errors.first());
    node.stop().await;
}
