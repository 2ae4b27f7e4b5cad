//! What is an answer: a text that the engine cut off, an error in disguise or bytes that nobody can read end no line.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tidemill::{
    blobs::Blobs,
    domain::{BatchStatus, Endpoint, Scope},
    fleet::{FleetOptions, InFlight},
    scheduler::{SchedulerOptions, TryPolicy},
    sim::{Coding, Fault, SimConfig},
};

use crate::{
    harness::{Node, PATIENCE, Worker, assert_one_line_each, chats, ids, options},
    raw::{Raw, Reply},
};

const MIB: usize = 1024 * 1024;

/// Every try counts.
fn one_try() -> SchedulerOptions {
    SchedulerOptions { tries: TryPolicy { max_tries: 1, ..options().tries }, ..options() }
}

/// One request for each number, at an endpoint.
fn requests(endpoint: Endpoint, count: usize) -> Vec<String> {
    let body = match endpoint {
        Endpoint::ChatCompletions | Endpoint::Messages => {
            json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4})
        }
        Endpoint::Completions => json!({"prompt": ["hello", "you"], "max_tokens": 4}),
        Endpoint::Responses => json!({"input": "hello", "max_output_tokens": 4}),
        Endpoint::Embeddings => json!({"input": "hello"}),
        Endpoint::Score => json!({"text_1": "hello", "text_2": "you"}),
        Endpoint::Rerank => json!({"query": "hello", "documents": ["you"]}),
    };
    let line = |number: usize| {
        let mut body = body.clone();
        body["model"] = "sim".into();
        json!({"custom_id": format!("r{number}"), "method": "POST", "url": endpoint.path(), "body": body}).to_string()
    };
    (0..count).map(line).collect()
}

/// Runs lines over one worker, and returns the output and error lines.
async fn run(url: &str, options: SchedulerOptions, lines: &[String]) -> (Vec<Value>, Vec<Value>) {
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[], options, 8).await;
    node.fleet.register(url).await.unwrap();
    let results = run_on(&node, lines).await;
    node.stop().await;
    results
}

async fn run_on(node: &Node, lines: &[String]) -> (Vec<Value>, Vec<Value>) {
    let id = node.submit(lines, 50).await;
    let batch = node.ended(&id).await;
    assert_eq!(batch.status, BatchStatus::Completed);
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(lines, &output, &errors);
    (output, errors)
}

fn body(line: &Value) -> &Value {
    &line["response"]["body"]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_the_engine_cut_off_is_run_again_and_costs_no_try() {
    for (endpoint, reasons) in [
        (Endpoint::ChatCompletions, &["abort", "error"][..]),
        (Endpoint::Completions, &["abort"]),
        (Endpoint::Messages, &["abort"]),
        (Endpoint::Responses, &["cancelled", "failed"]),
    ] {
        let worker = Worker::start(SimConfig::default()).await;
        for reason in reasons {
            worker.sim.faults().next(10, Fault::CutOff(Some(reason)));
        }
        let (output, errors) = run(&worker.url(), one_try(), &requests(endpoint, 20)).await;
        assert!(errors.is_empty(), "{endpoint}: {:?}", errors.first());
        assert_eq!(worker.sim.faults().received(), 20 + 10 * reasons.len() as u64, "{endpoint}");
        for line in &output {
            let whole = match endpoint {
                Endpoint::Responses => {
                    body(line)["status"] == "incomplete" && body(line)["usage"]["output_tokens"] == 4
                }
                Endpoint::Messages => body(line)["stop_reason"] == "max_tokens",
                _ => body(line)["choices"].as_array().unwrap().iter().all(|one| one["finish_reason"] == "length"),
            };
            assert!(whole, "{line}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_put_to_sleep_in_mid_batch_costs_no_token() {
    let slow = SimConfig { latency: Duration::from_millis(200), ..SimConfig::default() };
    let worker = Worker::start(slow).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], one_try(), 16).await;
    let lines = chats(150);
    let faults = worker.sim.faults();
    let naps = async {
        for _ in 0..3 {
            let before = faults.received();
            while faults.received() < before + 20 || faults.in_flight() == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            faults.sleep();
            tokio::time::sleep(Duration::from_millis(300)).await;
            faults.wake_up();
        }
    };
    let ((output, errors), ()) = tokio::join!(run_on(&node, &lines), naps);
    assert!(errors.is_empty(), "{:?}", errors.first());
    assert!(faults.received() > 150, "some were cut off");
    for line in &output {
        assert_eq!(body(line)["choices"][0]["finish_reason"], "length");
        assert_eq!(body(line)["usage"]["completion_tokens"], 4);
    }
    node.stop().await;
}

/// With short waits.
fn hasty() -> SchedulerOptions {
    SchedulerOptions { tries: TryPolicy { cap: Duration::from_millis(20), ..one_try().tries }, ..one_try() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_the_engine_always_cuts_off_ends_and_the_others_are_answered() {
    let cut = r#"{"choices":[{"index":0,"finish_reason":"error","message":{"content":"x"}}]}"#;
    let raw = Raw::start(move |body| match body.contains("r7\"") {
        true => Reply::Answer(200, "application/json", cut.into()),
        false => Reply::good(),
    })
    .await;
    let (output, errors) = run(&raw.url(), hasty(), &chats(31)).await;
    assert_eq!((output.len(), ids(&errors)), (30, vec!["r7".into()]));
    assert_eq!(errors[0]["error"]["code"], "answer_cut_off");
    let message = errors[0]["error"]["message"].as_str().unwrap();
    assert!(message.contains("`finish_reason` is \"error\""), "{message}");
    assert!((30 + 6..=30 + 11).contains(&raw.received()), "{}", raw.received());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_that_each_stop_of_its_worker_cuts_off_is_answered_in_the_end() {
    let endless = SimConfig { latency: Duration::from_secs(3_600), ..SimConfig::default() };
    let mut worker = Worker::start(endless.clone()).await;
    let folder = tempfile::tempdir().unwrap();
    let waits = TryPolicy { base: Duration::from_millis(200), cap: Duration::from_millis(400), ..one_try().tries };
    let node = Node::start_with(folder.path(), &[&worker], SchedulerOptions { tries: waits, ..one_try() }, 1).await;
    let until = async |so: &dyn Fn() -> bool| {
        let wait = async {
            while !so() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.expect("it comes to that");
    };
    let lines = chats(1);
    let id = node.submit(&lines, 1).await;
    // More often than it takes to find a line that is cut off for what it asks.
    for left in (0..12).rev() {
        let faults = worker.sim.faults();
        until(&|| faults.in_flight() == 1).await;
        faults.sleep();
        // So that the answer that was cut off is written out; if not, the connection breaks.
        tokio::time::sleep(Duration::from_millis(20)).await;
        worker.kill().await;
        until(&|| node.fleet.workers().iter().all(|worker| worker.last_error.is_some())).await;
        let next = if left == 0 { SimConfig::default() } else { endless.clone() };
        worker = Worker::start_at(next, worker.address).await;
    }
    let batch = node.ended(&id).await;
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    assert!(errors.is_empty(), "{errors:?}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_whose_head_can_not_be_read_costs_a_try_and_is_no_death() {
    let raw = Raw::start(|body| {
        let head = match body {
            body if body.contains("r1\"") => (0..150).map(|at| format!("x-{at}: y\r\n")).collect(),
            body if body.contains("r2\"") => "x-näme: ä\r\n".to_owned(),
            body if body.contains("r3\"") => "x-name: a\r\n b\r\n".to_owned(),
            body if body.contains("r4\"") => (0..400).map(|at| format!("x-{at}: y\r\n")).collect(),
            body if body.contains("r5\"") => "content-length: 1\r\n".to_owned(),
            _ => String::new(),
        };
        Reply::Head(head)
    })
    .await;
    let two = SchedulerOptions { tries: TryPolicy { max_tries: 2, ..hasty().tries }, ..hasty() };
    let (output, errors) = run(&raw.url(), two, &chats(30)).await;
    assert_eq!((output.len(), ids(&errors)), (28, vec!["r4".into(), "r5".into()]));
    for (line, words) in errors.iter().zip(["too many headers", "a header that is not valid"]) {
        assert_eq!(line["error"]["code"], "bad_worker_answer");
        let message = line["error"]["message"].as_str().unwrap();
        assert!(message.contains("its answer is HTTP, but") && message.contains(words), "{message}");
    }
    assert_eq!(raw.received(), 28 + 2 + 2, "two tries each");
    let worker = Worker::start(SimConfig::default()).await;
    worker.sim.faults().always(Some(Fault::Headers(200)));
    let (output, _) = run(&worker.url(), hasty(), &chats(3)).await;
    assert_eq!((output.len(), worker.sim.faults().received()), (3, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_without_a_reason_costs_a_try_where_the_server_names_reasons() {
    let worker = Worker::start(SimConfig::default()).await;
    worker.sim.faults().next(2, Fault::CutOff(None));
    let (output, _) = run(&worker.url(), options(), &chats(1)).await;
    assert_eq!(body(&output[0])["choices"][0]["finish_reason"], "length", "the third try");
    // Here it has named one before.
    let worker = Worker::start(SimConfig::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[&worker], options(), 8).await;
    run_on(&node, &chats(1)).await;
    worker.sim.faults().always(Some(Fault::CutOff(None)));
    let (output, errors) = run_on(&node, &chats(10)).await;
    assert_eq!((output.len(), errors.len()), (0, 10));
    assert_eq!(errors[0]["error"]["code"], "bad_worker_answer");
    assert_eq!(body(&errors[0])["usage"]["completion_tokens"], 2, "what came is kept");
    assert_eq!(worker.sim.faults().received(), 1 + 50, "five tries each");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_never_names_a_reason_is_left_in_peace() {
    let worker = Worker::start(SimConfig::default()).await;
    worker.sim.faults().always(Some(Fault::CutOff(None)));
    for options in [one_try(), options()] {
        let (output, _) = run(&worker.url(), options, &chats(40)).await;
        assert_eq!(output.len(), 40);
    }
    assert!(worker.sim.faults().received() <= 80 + 3, "once that is known nothing runs twice");
    let nameless = r#"{"choices":[{"message":{"content":"ok"}}]}"#;
    let raw = Raw::start(move |_| Reply::Answer(200, "application/json", nameless.into())).await;
    let (output, _) = run(&raw.url(), one_try(), &chats(5)).await;
    assert_eq!((output.len(), raw.received()), (5, 5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_success_without_what_its_endpoint_answers_with_is_none() {
    // A good answer after the bad ones shows that these are the requests' fault: their lines wait for nothing more.
    const BAD: [&str; 6] =
        [r#"{"object":"error","message":"no"}"#, r#"{"detail":"Not Found"}"#, "{}", "null", "[]", "7"];
    let bad = BAD.map(|text| serde_json::from_str::<Value>(text).unwrap());
    for endpoint in Endpoint::ALL {
        let good = match endpoint {
            Endpoint::ChatCompletions | Endpoint::Completions => r#"{"choices":[{"finish_reason":"stop"}]}"#,
            Endpoint::Responses => r#"{"status":"completed","output":[{}]}"#,
            Endpoint::Embeddings => r#"{"data":[{"embedding":[0.1]}]}"#,
            Endpoint::Score => r#"{"data":[{"score":1}]}"#,
            Endpoint::Rerank => r#"{"results":[{"index":0}]}"#,
            Endpoint::Messages => r#"{"content":[],"stop_reason":"end_turn"}"#,
        };
        let asked = AtomicUsize::new(0);
        let reply = move |_: &str| {
            let text = BAD.get(asked.fetch_add(1, Ordering::SeqCst) / 2).unwrap_or(&good);
            Reply::Answer(200, "application/json", (*text).into())
        };
        let raw = Raw::start(reply).await;
        let (output, errors) = run(&raw.url(), one_try(), &requests(endpoint, 14)).await;
        assert_eq!((output.len(), errors.len(), raw.received()), (2, 12, 14), "{endpoint}");
        assert!(errors.iter().all(|line| line["error"]["code"] == "bad_worker_answer"), "{endpoint} {errors:?}");
        for text in &bad {
            assert_eq!(errors.iter().filter(|line| body(line) == text).count(), 2, "{endpoint} {text}");
        }
        let worker = Worker::start(SimConfig::default()).await;
        let (output, _) = run(&worker.url(), one_try(), &requests(endpoint, 2)).await;
        assert_eq!(output.len(), 2, "{endpoint}");
    }
    for text in [r#"{"choices":[]}"#, r#"{"choices":[{"delta":{},"finish_reason":"stop"}]}"#] {
        let raw = Raw::start(move |_| Reply::Answer(200, "application/json", text.into())).await;
        let (output, _) = run(&raw.url(), options(), &chats(1)).await;
        assert_eq!((output.len(), raw.received()), (0, 5), "{text}");
    }
    let raw =
        Raw::start(|_| Reply::Answer(200, "application/json", r#"{"status":"in_progress","output":[]}"#.into())).await;
    let (output, _) = run(&raw.url(), options(), &requests(Endpoint::Responses, 1)).await;
    assert_eq!((output.len(), raw.received()), (0, 5));
}

#[tokio::test(flavor = "multi_thread")]
async fn encoded_answers_are_decoded_or_their_encoding_is_named() {
    for coding in [Coding::Gzip, Coding::Deflate, Coding::Zstd] {
        let worker = Worker::start(SimConfig::default()).await;
        worker.sim.faults().always(Some(Fault::Encoded(coding)));
        let (output, _) = run(&worker.url(), one_try(), &chats(10)).await;
        assert_eq!(body(&output[9])["choices"][0]["finish_reason"], "length", "{coding:?}");
    }
    let worker = Worker::start(SimConfig::default()).await;
    worker.sim.faults().always(Some(Fault::Encoded(Coding::Brotli)));
    let (_, errors) = run(&worker.url(), one_try(), &chats(1)).await;
    let message = errors[0]["error"]["message"].as_str().unwrap();
    assert!(message.contains("Content-Encoding is \"br\"") && message.contains("status 200"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_answer_is_described_in_its_error_line() {
    let page = "<html>\r\n<head><title>502</title></head>";
    for (kind, body, words) in [
        ("text/html", page.as_bytes(), &["HTML", r#"content type "text/html""#, r"<html>\r\n<head>", "39 bytes"][..]),
        (
            "text/event-stream",
            b"data: {\"choices\":[]}\n\ndata: [DONE]\n\n",
            &["event stream", r#"data: {"choices":[]}\n"#],
        ),
        ("application/json", br#"{"choices":[{"logprobs":NaN}]}"#, &["byte 24: NaN is not JSON", "30 bytes"]),
        ("application/json", b"\xef\xbb\xbf{}", &["byte order mark", "5 bytes"]),
        ("application/json", b"\xff\xfe{\0}\0", &["UTF-16", r"\xff\xfe{\x00}"]),
        ("application/json", b"", &["it is empty", "0 bytes"]),
        ("application/json", br#"{"choices":[{"mess"#, &["ends early, after byte 18", r#"{"choices":[{"mess"#]),
        ("application/json", &[b'['; 1_000], &["ends early", "1000 bytes", "[[[…"]),
    ] {
        let worker = Worker::start(SimConfig::default()).await;
        worker.sim.faults().always(Some(Fault::Body(kind, Box::leak(body.into()))));
        let (_, errors) = run(&worker.url(), one_try(), &chats(1)).await;
        assert_eq!(errors[0]["error"]["code"], "bad_worker_answer");
        let message = errors[0]["error"]["message"].as_str().unwrap();
        for word in words.iter().chain(&["status 200", "content type"]) {
            assert!(message.contains(word), "{message:?} does not say {word:?}");
        }
        assert!(!message.contains(char::is_control) && message.len() < 600, "{message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_token_counts_cost_themselves_only_and_sums_stop_at_the_most() {
    let answers = AtomicU64::new(0);
    let raw = Raw::start(move |_| {
        let most = i64::MAX;
        let usage = match answers.fetch_add(1, Ordering::SeqCst) % 2 {
            0 => format!(
                r#"{{"prompt_tokens":-5,"completion_tokens":{most},"total_tokens":{most},"cost":{{"usd":0.1}}}}"#
            ),
            _ => format!(r#"{{"prompt_tokens":"x","prompt_tokens":3,"completion_tokens":{most},"total_tokens":1.5}}"#),
        };
        let text = format!(r#"{{"choices":[{{"finish_reason":"stop"}}],"usage":{usage}}}"#);
        Reply::Answer(200, "application/json", text)
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[], options(), 8).await;
    node.fleet.register(&raw.url()).await.unwrap();
    // A segment each, so that parts are added up in the database too.
    let id = node.submit(&chats(6), 1).await;
    let batch = node.ended(&id).await;
    let usage = batch.usage;
    assert_eq!((usage.input, usage.output, usage.total), (0, i64::MAX, i64::MAX));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_answers_share_a_bounded_memory_and_all_come_through() {
    const MOST: usize = 16 * MIB;
    let worker = Worker::start(SimConfig::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let fleet = FleetOptions { limit: InFlight::Fixed(16), answer_memory: MOST as u64, ..FleetOptions::default() };
    let blobs = Blobs::directory(&folder.path().join("blobs")).unwrap();
    let node = Node::start_fleet(folder.path(), blobs, &[&worker], options(), fleet).await;
    // All of them together are four times the memory; and each of the last two is more than what is for large ones.
    let faults = worker.sim.faults();
    for sized in [true, false] {
        faults.next(12, Fault::Big { bytes: 2 * MIB, sized });
        faults.next(1, Fault::Big { bytes: 10 * MIB, sized });
    }
    let most = Arc::new(AtomicU64::new(0));
    let watched = async {
        loop {
            most.fetch_max(node.fleet.answer_memory_used(), Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let lines = chats(60);
    let run = tokio::time::timeout(PATIENCE, run_on(&node, &lines));
    let (output, _) =
        tokio::select! { done = run => done.expect("nobody waits for ever"), () = watched => unreachable!() };
    assert_eq!(output.len(), 60);
    let padded = output.iter().filter(|line| body(line)["padding"].is_string()).count();
    assert_eq!(padded, 26);
    let most = most.load(Ordering::Relaxed);
    assert!(most >= 4 * MIB as u64 && most <= MOST as u64, "{most}");
    tokio::time::timeout(PATIENCE, async {
        while node.fleet.answer_memory_used() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("all of it is given back");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_answers_of_one_batch_do_not_hold_up_small_ones_of_another() {
    let worker = Worker::start(SimConfig::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let fleet = FleetOptions { limit: InFlight::Fixed(16), answer_memory: 16 << 20, ..FleetOptions::default() };
    let blobs = Blobs::directory(&folder.path().join("blobs")).unwrap();
    let slow = SchedulerOptions { flush_interval: Duration::from_secs(3_600), ..options() };
    let node = Node::start_fleet(folder.path(), blobs, &[&worker], slow, fleet).await;
    // Half of the memory is for large ones: seven of these. No part is due, as each is smaller than a part, and a line that
    // hangs keeps each batch open.
    let mut open = Vec::new();
    for full in [2, 4, 6, 7] {
        worker.sim.faults().next(2, Fault::Big { bytes: MIB, sized: true });
        worker.sim.faults().next(1, Fault::Hang);
        open.push(node.submit(&chats(3), 50).await);
        tokio::time::timeout(PATIENCE, async {
            while node.fleet.answer_memory_used() < (full * MIB) as u64 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await
        .expect("the large ones come");
    }
    let (output, _) = run_on(&node, &chats(100)).await;
    assert_eq!(ids(&output).len(), 100);
    for id in &open {
        assert!(!node.store.batch(id, &Scope::All).await.unwrap().unwrap().status.is_terminal());
    }
    node.stop().await;
}
