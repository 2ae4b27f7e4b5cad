//! Batch requests let others go first, and no worker refuses them for it.

use std::sync::{Arc, Mutex};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderMap, StatusCode},
    routing::{get, post},
};
use serde_json::{Value, json};
use tidemill::{
    domain::{BatchStatus, WorkerPriority},
    scheduler::SchedulerOptions,
};
use tokio::net::TcpListener;

use crate::{
    harness::{Node, assert_one_line_each, chats, options},
    raw::GOOD,
};

/// What a worker has against a `priority` in the body.
#[derive(Clone, Copy, PartialEq)]
enum Against {
    Nothing,
    /// As a server that takes no fields that it does not know.
    TheField,
    /// It refuses whatever comes, and quotes it.
    Everything,
}

/// The priorities of a request: the header's and the body's.
type Priorities = (Option<String>, Option<i64>);

/// A worker that remembers the priorities of its requests.
#[derive(Clone)]
struct Picky {
    against: Against,
    seen: Arc<Mutex<Vec<Priorities>>>,
}

impl Picky {
    async fn start(against: Against) -> (Self, String) {
        let worker = Self { against, seen: Arc::default() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new()
            .route("/health", get(async || ()))
            .route("/v1/models", get(async || Json(json!({"data": [{"id": "sim"}]}))))
            .route("/v1/chat/completions", post(Self::answer))
            .with_state(worker.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        (worker, url)
    }

    async fn answer(
        State(worker): State<Self>,
        headers: HeaderMap,
        Json(body): Json<Value>,
    ) -> (StatusCode, Json<Value>) {
        let header = headers.get("x-vllm-priority").map(|value| value.to_str().unwrap().to_owned());
        worker.seen.lock().unwrap().push((header, body["priority"].as_i64()));
        let refusal = |message: String| (StatusCode::BAD_REQUEST, Json(json!({"error": {"message": message}})));
        match worker.against {
            Against::TheField if !body["priority"].is_null() => {
                refusal("Unrecognized request argument supplied: priority".into())
            }
            Against::Everything => refusal(format!("bad request: {body}")),
            Against::Nothing | Against::TheField => (StatusCode::OK, Json(serde_json::from_str(GOOD).unwrap())),
        }
    }

    fn seen(&self) -> Vec<Priorities> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

/// Runs twenty lines, the last with a priority of its own, and returns how many have failed.
async fn run(url: &str, worker_priority: WorkerPriority) -> i64 {
    let folder = tempfile::tempdir().unwrap();
    let with = SchedulerOptions { worker_priority, ..options() };
    // One at a time: what the first one meets, the others know.
    let node = Node::start_with(folder.path(), &[], with, 1).await;
    node.fleet.register(url).await.unwrap();
    let mut lines = chats(19);
    let own = r#"{"model":"sim","priority":3,"messages":[{"role":"user","content":"own"}]}"#;
    lines.push(format!(r#"{{"custom_id":"own","method":"POST","url":"/v1/chat/completions","body":{own}}}"#));
    let batch = node.ended(&node.submit(&lines, 20).await).await;
    assert_eq!(batch.status, BatchStatus::Completed);
    let (output, errors) = node.results(&batch).await;
    assert_one_line_each(&lines, &output, &errors);
    node.stop().await;
    batch.counts.failed
}

fn count(seen: &[Priorities], header: Option<&str>, body: Option<i64>) -> usize {
    seen.iter().filter(|one| (one.0.as_deref(), one.1) == (header, body)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn by_itself_a_batch_lets_others_go_first_by_a_header_and_a_client_s_own_priority_stays() {
    let (worker, url) = Picky::start(Against::TheField).await;
    run(&url, WorkerPriority::Auto).await;
    let seen = worker.seen();
    assert_eq!((count(&seen, Some("10"), None), count(&seen, None, Some(3)), seen.len()), (19, 1, 20));
    run(&url, WorkerPriority::Off).await;
    let seen = worker.seen();
    assert_eq!((count(&seen, None, None), count(&seen, None, Some(3)), seen.len()), (19, 1, 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_refuses_the_priority_gets_its_requests_without() {
    let (worker, url) = Picky::start(Against::TheField).await;
    assert_eq!(run(&url, WorkerPriority::Body(7)).await, 1, "all but the line whose client asked for it");
    let seen = worker.seen();
    assert_eq!(count(&seen, None, Some(7)), 1, "it is asked once");
    assert_eq!((count(&seen, None, None), count(&seen, None, Some(3))), (19, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_takes_the_priority_gets_it_though_it_refuses_requests() {
    let (worker, url) = Picky::start(Against::Nothing).await;
    assert_eq!(run(&url, WorkerPriority::Body(7)).await, 0);
    let seen = worker.seen();
    assert_eq!((count(&seen, None, Some(7)), count(&seen, None, Some(3)), seen.len()), (19, 1, 20));

    let (worker, url) = Picky::start(Against::Everything).await;
    assert_eq!(run(&url, WorkerPriority::Body(7)).await, 20);
    let seen = worker.seen();
    assert_eq!(count(&seen, None, Some(7)), 19, "that a refusal names the priority is no proof");
    assert_eq!(count(&seen, None, None), 19, "each is tried without");
}
