//! Workers, and gateways in front of them, that fail every request while they seem to be well; and those that die again and
//! again. Both cost time, and no line.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::http::StatusCode;
use tidemill::{
    domain::{BatchStatus, Endpoint, Scope},
    fleet::{Extras, LiveCall, Tenant},
    scheduler::{SchedulerOptions, TryPolicy},
    sim::{Fault, SimConfig},
};
use tokio::sync::Semaphore;

use crate::{
    harness::{Node, PATIENCE, Worker, assert_one_line_each, chat, chats, ids, options},
    raw::{Raw, Reply},
};

/// One try, so that whatever uses one up ends a line.
fn once() -> SchedulerOptions {
    SchedulerOptions { tries: TryPolicy { max_tries: 1, ..options().tries }, ..options() }
}

async fn until(what: &str, so: impl Fn() -> bool) {
    let wait = async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("never {what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_uses_up_no_try_and_is_told() {
    let page = |status: u16| match status {
        200 => Reply::Answer(200, "text/html", "<html>log in</html>".into()),
        404 => Reply::Answer(404, "application/json", r#"{"detail":"Not Found"}"#.into()),
        status => Reply::Answer(status, "text/html", "<html>no</html>".into()),
    };
    for status in [200, 502, 500, 503, 401, 403, 404] {
        let out = Arc::new(AtomicBool::new(true));
        let raw = {
            let out = out.clone();
            Raw::start(move |_| if out.load(Ordering::SeqCst) { page(status) } else { Reply::good() }).await
        };
        let folder = tempfile::tempdir().unwrap();
        let node = Node::start_with(folder.path(), &[], once(), 32).await;
        node.fleet.register(&raw.url()).await.unwrap();
        let lines = chats(100);
        let id = node.submit(&lines, 50).await;
        let words = match status {
            200 => format!("{} answers every request with the same invalid answer since ", raw.url()),
            status => format!("{} answers {status} to every request since ", raw.url()),
        };
        node.waits(&id, |reason| reason.is_some_and(|reason| reason.contains(&words))).await;
        assert!(raw.received() < 60, "{} requests to find that out", raw.received());
        out.store(false, Ordering::SeqCst);
        let batch = node.ended(&id).await;
        let (output, errors) = node.results(&batch).await;
        assert_one_line_each(&lines, &output, &errors);
        assert!(errors.is_empty(), "{status}: {:?}", errors.first());
        node.stop().await;
    }
}

/// A gateway that wants a login, has moved, wants money, another protocol or less, or does what nobody knows.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_status_a_gateway_answers_everything_with_costs_no_line() {
    let worker = Worker::start(SimConfig::default()).await;
    let faults = worker.sim.faults();
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], once(), 32).await;
    let lines = chats(20);
    for status in [302, 304, 400, 405, 413, 499, 600].map(|status| StatusCode::from_u16(status).unwrap()) {
        let code = status.as_u16();
        faults.always(Some(Fault::Page(status)));
        let id = node.submit(&lines, 20).await;
        let words = format!("{} answers {code} to every request since ", worker.url());
        node.waits(&id, |reason| reason.is_some_and(|reason| reason.contains(&words))).await;
        faults.clear();
        let batch = node.ended(&id).await;
        assert_eq!((batch.counts.completed, batch.counts.failed), (20, 0), "{code}");
        // What fails right after a success is at fault itself.
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_is_redirected_alone_ends_with_what_that_means() {
    let raw = Raw::start(|body| {
        if body.contains("r7\"") { Reply::Answer(302, "text/html", "log in".into()) } else { Reply::good() }
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[], options(), 16).await;
    node.fleet.register(&raw.url()).await.unwrap();
    let lines = chats(60);
    let batch = node.ended(&node.submit(&lines, 60).await).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert_eq!((ids(&errors), raw.received()), (vec!["r7".into()], 59 + 5));
    assert_eq!(errors[0]["error"]["code"], "bad_worker_answer");
    let message = errors[0]["error"]["message"].as_str().unwrap();
    assert!(message.contains("302, which is neither a success nor an error"), "{message}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_lines_that_are_refused_for_what_they_are_end_at_once() {
    for status in [400, 404, 422] {
        let refusal = r#"{"error":{"message":"no such response","type":"NotFoundError","code":404}}"#;
        let raw = Raw::start(move |_| Reply::Answer(status, "application/json", refusal.into())).await;
        let folder = tempfile::tempdir().unwrap();
        let node = Node::start_with(folder.path(), &[], options(), 16).await;
        node.fleet.register(&raw.url()).await.unwrap();
        let lines = chats(60);
        let batch = node.ended(&node.submit(&lines, 30).await).await;
        assert_eq!((batch.status, batch.counts.failed), (BatchStatus::Completed, 60));
        assert_eq!(raw.received(), 60, "each is asked once");
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_fails_alone_ends_although_its_worker_is_well() {
    let raw =
        Raw::start(
            |body| {
                if body.contains("r7\"") { Reply::Answer(502, "text/html", "no".into()) } else { Reply::good() }
            },
        )
        .await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[], options(), 16).await;
    node.fleet.register(&raw.url()).await.unwrap();
    let lines = chats(60);
    let batch = node.ended(&node.submit(&lines, 60).await).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert_eq!(ids(&errors), ["r7"]);
    assert_eq!(raw.received(), 59 + 5, "five tries");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_few_lines_that_all_fail_end_after_their_tries() {
    for (lines, options, tries) in [(1, options(), 5), (7, once(), 1)] {
        let raw = Raw::start(|_| Reply::Answer(502, "text/html", "no".into())).await;
        let folder = tempfile::tempdir().unwrap();
        let node = Node::start_with(folder.path(), &[], options, 16).await;
        node.fleet.register(&raw.url()).await.unwrap();
        let batch = node.ended(&node.submit(&chats(lines), 10).await).await;
        let failed = usize::try_from(batch.counts.failed).unwrap();
        assert_eq!((batch.status, failed, raw.received()), (BatchStatus::Completed, lines, lines * tries));
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_whose_every_line_takes_too_long_ends() {
    let raw = Raw::start(|_| Reply::Nothing).await;
    let folder = tempfile::tempdir().unwrap();
    let brief = TryPolicy { max_tries: 2, ..options().tries };
    let quick = SchedulerOptions { request_timeout: Duration::from_millis(100), tries: brief, ..options() };
    let node = Node::start_with(folder.path(), &[], quick, 32).await;
    node.fleet.register(&raw.url()).await.unwrap();
    let lines = chats(40);
    let batch = node.ended(&node.submit(&lines, 40).await).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(output.is_empty() && errors.iter().all(|line| line["error"]["code"] == "request_timeout"), "{errors:?}");
    node.stop().await;
}

/// One caller's calls that fail have no worker held for others.
#[tokio::test(flavor = "multi_thread")]
async fn calls_of_one_caller_that_fail_hold_up_nobodys_batch() {
    let raw = Raw::start(|body: &str| match body.contains("poison") {
        true => Reply::Answer(500, "application/json", r#"{"error":{"message":"no"}}"#.into()),
        false => Reply::Later(Duration::from_millis(20)),
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[], options(), 8).await;
    node.fleet.register(&raw.url()).await.unwrap();
    let call = || async {
        let body = r#"{"model":"sim","messages":[{"role":"user","content":"poison"}]}"#.into();
        let call = LiveCall {
            endpoint: Endpoint::ChatCompletions,
            below: "",
            model: "sim",
            body,
            headers: Extras::default(),
            timeout: Duration::from_secs(10),
        };
        node.fleet.infer(Tenant::named("eve"), call).await
    };
    let calls = async {
        loop {
            let _ = futures::future::join_all((0..16).map(|_| call())).await;
            tokio::task::yield_now().await;
        }
    };
    let batch = async { node.ended(&node.submit(&chats(60), 60).await).await };
    let batch = tokio::select! { batch = batch => batch, () = calls => unreachable!() };
    assert_eq!((batch.counts.completed, batch.counts.failed), (60, 0));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_of_a_few_lines_survives_an_outage_too() {
    // With 200 it is a proxy's page, or what a proxy has cut off.
    let pages = ["<html>no</html>", r#"{"id":"chatcmpl-1","choices":[{"ind"#];
    for (status, lines, page) in [(502, 1, 0), (503, 7, 0), (404, 3, 0), (200, 1, 0), (200, 7, 1)] {
        let seen = Arc::new(AtomicUsize::new(0));
        let raw = {
            let seen = seen.clone();
            // Each line is failed four times, on average.
            let reply = move |_: &str| match seen.fetch_add(1, Ordering::SeqCst) {
                before if before < 4 * lines => Reply::Answer(status, "text/html", pages[page].into()),
                _ => Reply::good(),
            };
            Raw::start(reply).await
        };
        let folder = tempfile::tempdir().unwrap();
        // Some lines are failed more often than others.
        let patient = TryPolicy { max_tries: 1, patience: 3 * PATIENCE, ..options().tries };
        let node = Node::start_with(folder.path(), &[], SchedulerOptions { tries: patient, ..options() }, 16).await;
        node.fleet.register(&raw.url()).await.unwrap();
        let lines = chats(lines);
        let batch = node.ended(&node.submit(&lines, 10).await).await;
        let (output, errors) = node.results(&batch).await;
        assert_one_line_each(&lines, &output, &errors);
        assert!(errors.is_empty(), "{status}: {:?}", errors.first());
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_few_lines_that_all_fail_wait_for_another_ones_answer_and_say_so() {
    let raw =
        Raw::start(
            |body| {
                if body.contains("r0\"") { Reply::Answer(502, "text/html", "no".into()) } else { Reply::good() }
            },
        )
        .await;
    let folder = tempfile::tempdir().unwrap();
    let patient = TryPolicy { max_tries: 1, patience: 10 * PATIENCE, ..options().tries };
    let node = Node::start_with(folder.path(), &[], SchedulerOptions { tries: patient, ..options() }, 16).await;
    node.fleet.register(&raw.url()).await.unwrap();
    let id = node.submit(&chats(1), 1).await;
    let words = format!("{} answers 502 to every request since ", raw.url());
    node.waits(&id, |reason| reason.is_some_and(|reason| reason.contains(&words))).await;
    let good = node.ended(&node.submit(&[chat("other", "sim")], 1).await).await;
    assert_eq!(good.counts.completed, 1);
    // What another batch got proves that the worker works: the line has one more try.
    let batch = node.ended(&id).await;
    assert_eq!((batch.status, batch.counts.failed), (BatchStatus::Completed, 1));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_model_of_a_gateway_holds_no_other_model() {
    let out = Arc::new(AtomicBool::new(true));
    let raw = {
        let out = out.clone();
        let reply = move |body: &str| match body.contains("dead") && out.load(Ordering::SeqCst) {
            true => Reply::Answer(502, "text/html", "<html>no</html>".into()),
            false => Reply::good(),
        };
        Raw::serving(&["dead", "well"], reply).await
    };
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[], once(), 32).await;
    node.fleet.register(&raw.url()).await.unwrap();
    let of = |model: &str| (0..60).map(|at| chat(&format!("r{at}"), model)).collect::<Vec<_>>();
    let dead = node.submit(&of("dead"), 30).await;
    let words = format!("worker {}, asked for the model \"dead\", answers 502 to every request since ", raw.url());
    node.waits(&dead, |reason| reason.is_some_and(|reason| reason.contains(&words))).await;
    let well = node.ended(&node.submit(&of("well"), 30).await).await;
    assert_eq!((well.counts.completed, well.counts.failed), (60, 0));
    let still = node.store.batch(&dead, &Scope::All).await.unwrap().unwrap();
    assert_eq!((still.counts.completed, still.counts.failed), (0, 0), "what the other model answers ends no line");
    out.store(false, Ordering::SeqCst);
    let batch = node.ended(&dead).await;
    assert_eq!((batch.counts.completed, batch.counts.failed), (60, 0));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_worker_fails_the_others_do() {
    let broken = Raw::start(|_| Reply::Answer(502, "text/html", "no".into())).await;
    let good = Worker::start(SimConfig { latency: Duration::from_millis(20), ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&good], options(), 8).await;
    node.fleet.register(&broken.url()).await.unwrap();
    let lines = chats(400);
    let batch = node.ended(&node.submit(&lines, 200).await).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty(), "{:?}", errors.first());
    assert!(broken.received() < 60, "{} requests to a worker that answers none", broken.received());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_has_pushed_back_is_checked_no_more_often_than_others() {
    let refused = AtomicBool::new(false);
    let raw = Raw::start(move |_| {
        if refused.swap(true, Ordering::SeqCst) {
            Reply::good()
        } else {
            Reply::Answer(429, "application/json", "{}".into())
        }
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[], options(), 4).await;
    node.fleet.register(&raw.url()).await.unwrap();
    assert_eq!(node.ended(&node.submit(&chats(3), 3).await).await.counts.completed, 3);
    let (before, began) = (raw.checks(), tokio::time::Instant::now());
    // A slow machine makes fewer checks, never more.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (checks, seconds) = (raw.checks() - before, began.elapsed().as_secs() as usize);
    assert!(checks <= 2 + 2 * seconds, "{checks} checks in {seconds} s");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_deaths_of_a_worker_isolate_nobody() {
    let received = Arc::new(AtomicUsize::new(0));
    let answers = Arc::new(Semaphore::new(0));
    let raw = {
        let (received, answers) = (received.clone(), answers.clone());
        Raw::start(move |_| {
            let number = received.fetch_add(1, Ordering::SeqCst);
            if number < 128 { Reply::Nothing } else { Reply::When(answers.clone()) }
        })
        .await
    };
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[], once(), 64).await;
    node.fleet.register(&raw.url()).await.unwrap();
    let lines = chats(64);
    let id = node.submit(&lines, 64).await;
    for round in 1..=2 {
        until("are all there", || received.load(Ordering::SeqCst) == 64 * round).await;
        raw.kill();
    }
    // None is answered before all are there: had one to go alone, this would not come.
    until("are all there at once after two deaths", || received.load(Ordering::SeqCst) == 192).await;
    answers.add_permits(64);
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty(), "{:?}", errors.first());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_again_and_again_costs_no_line() {
    let received = Arc::new(AtomicUsize::new(0));
    let raw = {
        let received = received.clone();
        Raw::start(move |_| {
            received.fetch_add(1, Ordering::SeqCst);
            Reply::Later(Duration::from_millis(60))
        })
        .await
    };
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[], once(), 16).await;
    node.fleet.register(&raw.url()).await.unwrap();
    let lines = chats(150);
    let id = node.submit(&lines, 150).await;
    let kills = async {
        // Each life is long enough for some to be answered, and each death meets as many as there can be.
        for at in 1.. {
            until("is enough sent", || received.load(Ordering::SeqCst) >= 40 * at).await;
            raw.kill();
        }
    };
    let batch = tokio::select! {
        batch = node.ended(&id) => batch,
        () = kills => unreachable!(),
    };
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty(), "{:?}", errors.first());
    assert!(raw.deaths() >= 3, "{}", raw.deaths());
    node.stop().await;
}
