//! Workers that are gateways: checks that cost, that hang, that lie elsewhere, and models by pattern.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    http::{StatusCode, header::LOCATION},
    routing::{get, post},
};
use serde_json::{Value, json};
use tidemill::{
    domain::{HealthChange, HealthInterval, OwnHealth, WorkerId},
    fleet::{Fleet, FleetOptions, HealthCheck, InFlight, WorkerState, WorkerView},
    store::Store,
};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::harness::{Node, PATIENCE, chat, options};

async fn serve(router: Router) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    url
}

fn lists(models: &'static [&'static str]) -> Router {
    let data: Vec<Value> = models.iter().map(|id| json!({"id": id})).collect();
    Router::new().route("/v1/models", get(async move || Json(json!({ "data": data }))))
}

struct Watched {
    fleet: Fleet,
    shutdown: CancellationToken,
    _folder: tempfile::TempDir,
}

impl Watched {
    async fn start(url: &str, health: HealthCheck) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::sqlite(&folder.path().join("db")).await.unwrap();
        let shutdown = CancellationToken::new();
        let options = FleetOptions { limit: InFlight::Fixed(4), health, ..FleetOptions::default() };
        let fleet = Fleet::start(store, options, &TaskTracker::new(), shutdown.clone()).await.unwrap();
        fleet.register(url).await.unwrap();
        Self { fleet, shutdown, _folder: folder }
    }

    async fn until(&self, so: impl Fn(&WorkerView) -> bool) -> WorkerView {
        let wait = async {
            loop {
                match self.fleet.workers().pop() {
                    Some(worker) if so(&worker) => return worker,
                    _ => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.unwrap_or_else(|_| panic!("{:?}", self.fleet.workers()))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

fn often(path: Option<&str>) -> HealthCheck {
    HealthCheck { path: path.map(str::to_owned), interval: Duration::from_millis(20) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_runs_requests_on_models_is_made_once() {
    let (checks, lists_asked) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let router = {
        let (checks, lists_asked) = (checks.clone(), lists_asked.clone());
        Router::new()
            .route(
                "/health",
                get(async move || {
                    checks.fetch_add(1, Ordering::SeqCst);
                    Json(json!({"healthy_endpoints": [{"model": "m"}], "unhealthy_endpoints": []}))
                }),
            )
            .route(
                "/v1/models",
                get(async move || {
                    lists_asked.fetch_add(1, Ordering::SeqCst);
                    Json(json!({"data": [{"id": "m"}]}))
                }),
            )
    };
    let watched = Watched::start(&serve(router).await, often(Some("/health"))).await;
    watched.until(|_| lists_asked.load(Ordering::SeqCst) >= 20).await;
    assert_eq!(checks.load(Ordering::SeqCst), 1, "each would be a completion of every model");
    watched.until(|worker| worker.state == WorkerState::Healthy && worker.models == ["m"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_that_is_never_answered_is_done_without() {
    let checks = Arc::new(AtomicUsize::new(0));
    let counted = checks.clone();
    let router = lists(&["m"]).route(
        "/health",
        get(async move || {
            counted.fetch_add(1, Ordering::SeqCst);
            std::future::pending::<()>().await;
        }),
    );
    let watched = Watched::start(&serve(router).await, often(Some("/health"))).await;
    watched.until(|worker| worker.state == WorkerState::Healthy && worker.models == ["m"]).await;
    let seen = watched.until(|_| checks.load(Ordering::SeqCst) >= 2).await;
    assert_eq!(seen.state, WorkerState::Healthy);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_checks_path_is_a_setting() {
    let (ours, others) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let count = |counter: &Arc<AtomicUsize>| {
        let counter = counter.clone();
        get(async move || {
            counter.fetch_add(1, Ordering::SeqCst);
        })
    };
    let router = lists(&["m"]).route("/health/liveliness", count(&ours)).route("/health", count(&others));
    let url = serve(router).await;
    let watched = Watched::start(&url, often(Some("/health/liveliness"))).await;
    watched.until(|worker| worker.state == WorkerState::Healthy && ours.load(Ordering::SeqCst) > 5).await;
    drop(watched);
    let before = ours.load(Ordering::SeqCst);
    let watched = Watched::start(&url, often(None)).await;
    watched.until(|worker| worker.state == WorkerState::Healthy).await;
    assert_eq!(others.load(Ordering::SeqCst), 0);
    assert!(ours.load(Ordering::SeqCst) <= before + 1, "one may have been under way");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_may_have_a_path_and_an_interval_of_its_own() {
    let (ours, servers) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let gateway = {
        let (ours, servers) = (ours.clone(), servers.clone());
        // The server's path would run a completion of every model.
        let costly = async move || {
            servers.fetch_add(1, Ordering::SeqCst);
            StatusCode::INTERNAL_SERVER_ERROR
        };
        let own = async move || {
            ours.fetch_add(1, Ordering::SeqCst);
        };
        serve(lists(&["m"]).route("/health", get(costly)).route("/health/liveliness", get(own))).await
    };
    let plain = Arc::new(AtomicUsize::new(0));
    let counted = plain.clone();
    let vllm = lists(&["n"]).route("/health", get(async move || _ = counted.fetch_add(1, Ordering::SeqCst)));
    let watched = Watched::start(&serve(vllm).await, often(Some("/health"))).await;
    let hour = HealthInterval::new(HealthInterval::MOST);
    let path = Some("/health/liveliness".parse().unwrap());
    let own = OwnHealth { path: path.clone(), interval: hour };
    let change = HealthChange { path: Some(path), interval: Some(hour) };
    let added = watched.fleet.register_with(&gateway, &change).await.unwrap();
    assert_eq!(added.health, own);
    let is = |id: &WorkerId, state| watched.fleet.workers().iter().any(|one| one.id == *id && one.state == state);
    watched.until(|_| is(&added.id, WorkerState::Healthy)).await;
    let before = plain.load(Ordering::SeqCst);
    watched.until(|_| plain.load(Ordering::SeqCst) > before + 10).await;
    assert_eq!((ours.load(Ordering::SeqCst), servers.load(Ordering::SeqCst)), (1, 0), "once an hour, and only its own");

    // Who registers it again and names no settings leaves them; a change applies at once, not in an hour.
    assert_eq!(watched.fleet.register(&gateway).await.unwrap().health, own);
    let back = HealthChange { path: Some(None), interval: Some(None) };
    assert_eq!(watched.fleet.register_with(&gateway, &back).await.unwrap().health, OwnHealth::default());
    watched.until(|_| servers.load(Ordering::SeqCst) > 5 && is(&added.id, WorkerState::Down)).await;
    assert_eq!(ours.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_named_with_its_target_and_not_followed() {
    let away = async || (StatusCode::PERMANENT_REDIRECT, [(LOCATION, "https://gpu.example.com/health")]);
    let watched = Watched::start(&serve(lists(&["m"]).route("/health", get(away))).await, often(Some("/health"))).await;
    let error = watched.until(|worker| worker.last_error.is_some()).await.last_error.unwrap();
    assert!(error.contains("308") && error.contains("https://gpu.example.com/health"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_listed_by_pattern_are_served() {
    let answer = async |Json(body): Json<Value>| {
        Json(json!({
            "id": "x", "object": "chat.completion", "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "ok"}}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        }))
    };
    let router =
        lists(&["openai/*", "plain"]).route("/v1/chat/completions", post(answer)).route("/health", get(async || ()));
    let folder = tempfile::tempdir().unwrap();
    let node = Node::start_with(folder.path(), &[], options(), 4).await;
    node.fleet.register(&serve(router).await).await.unwrap();
    let lines = [chat("a", "openai/gpt-x"), chat("b", "plain"), chat("c", "openai/deep/er")];
    let batch = node.ended(&node.submit(&lines, 2).await).await;
    assert_eq!(batch.counts.completed, 3);
    let id = node.submit(&[chat("d", "other/gpt-x")], 1).await;
    let reason = node.waits(&id, |reason| reason.is_some_and(|reason| reason.contains("serves the model"))).await;
    assert!(reason.unwrap().contains("openai/*"));
    node.stop().await;
}
