//! A worker that is removed is gone, whatever is under way at the time.

use std::{sync::Arc, time::Duration};

use axum::{Json, Router, extract::State, routing::get};
use serde_json::json;
use tidemill::{
    fleet::{Fleet, FleetOptions, InFlight},
    store::Store,
};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Its health checks are asked, and are answered as far as there are permits.
#[derive(Clone)]
struct Slow {
    asked: Arc<Semaphore>,
    answers: Arc<Semaphore>,
}

async fn until(what: &str, so: impl Fn() -> bool) {
    let wait = async {
        while !so() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(crate::harness::PATIENCE, wait).await.unwrap_or_else(|_| panic!("never {what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_removed_during_a_probe_does_not_come_back() {
    let slow = Slow { asked: Arc::new(Semaphore::new(0)), answers: Arc::new(Semaphore::new(0)) };
    let health = async |State(slow): State<Slow>| {
        slow.asked.add_permits(1);
        slow.answers.acquire().await.unwrap().forget();
    };
    let router = Router::new()
        .route("/health", get(health))
        .route("/v1/models", get(async || Json(json!({"data": [{"id": "sim"}]}))))
        .with_state(slow.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });

    let folder = tempfile::tempdir().unwrap();
    let store = Store::sqlite(&folder.path().join("db")).await.unwrap();
    let (tasks, shutdown) = (TaskTracker::new(), CancellationToken::new());
    let options = FleetOptions { limit: InFlight::Fixed(1), ..FleetOptions::default() };
    let fleet = Fleet::start(store, options, &tasks, shutdown.clone()).await.unwrap();
    let before = tasks.len();
    let worker = fleet.register(&url).await.unwrap();
    slow.asked.acquire().await.unwrap().forget();
    fleet.remove(&worker.id).await.unwrap();
    // Now the probe that was under way finds that it is well.
    slow.answers.add_permits(100);
    until("does what looks after it end", || tasks.len() <= before).await;
    assert_eq!(fleet.capacity("sim"), 0, "nobody is there to take a request");
    shutdown.cancel();
}
