//! What clients do beside batches that simply run: failed requests are run again, single requests are run at once.

use std::time::Duration;

use axum::http::StatusCode;
use serde_json::{Value, json};
use tidemill::{
    pb::{BatchStatus, GetBatchRequest, InferRequest, ListBatchesRequest, RetryFailedRequestsRequest},
    sim::{Fault, SimConfig},
};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

use super::{create, download, input, upload, watch, worker};
use crate::{
    server::{Client, Server},
    support::patience::{HANG, until},
};

fn reason(status: &Status) -> (Code, String) {
    (status.code(), status.get_details_error_info().expect("ErrorInfo always").reason)
}

fn retry(batch_id: &str, request_id: &str) -> RetryFailedRequestsRequest {
    RetryFailedRequestsRequest {
        batch_id: batch_id.to_owned(),
        request_id: request_id.to_owned(),
        ..RetryFailedRequestsRequest::default()
    }
}

fn ids(lines: &[Value]) -> Vec<&str> {
    lines.iter().map(|line| line["custom_id"].as_str().unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_requests_are_run_again_and_only_those() {
    let (sim, url) = worker(SimConfig::default()).await;
    let mut server = Server::start(&["--worker", &url, "--flush-interval", "100ms"]).await;
    let mut client = server.client().await;
    // A refusal of the worker's is that request's answer: it is not tried again by itself.
    sim.faults().fail_next(7, StatusCode::BAD_REQUEST, None);
    let file = upload(&mut client, input(40)).await;
    let first = create(&mut client, &file, "").await;
    watch(server.clone(), first.clone()).await;
    let get = async |client: &mut Client, id: &str| {
        client.get_batch(GetBatchRequest { batch_id: id.to_owned() }).await.unwrap().into_inner()
    };
    let batch = get(&mut client, &first).await;
    let counts = batch.request_counts.unwrap();
    assert_eq!((counts.total, counts.completed, counts.failed), (40, 33, 7));
    let failed = download(&mut client, &batch.error_file_id).await;
    assert_eq!(failed.len(), 7);
    assert!(failed.iter().all(|line| line["response"]["status_code"] == 400), "{failed:?}");

    let again = client.retry_failed_requests(retry(&first, "again")).await.unwrap().into_inner();
    assert_eq!(again.request_counts.as_ref().unwrap().total, 7);
    server.kill().await;
    server.restart().await;
    let mut client = server.client().await;
    let same = client.retry_failed_requests(retry(&first, "again")).await.unwrap().into_inner();
    assert_eq!(same.id, again.id, "the same request id is the same batch, after a crash too");
    let all = client.list_batches(ListBatchesRequest::default()).await.unwrap().into_inner().batches;
    assert_eq!(all.len(), 2);
    watch(server.clone(), again.id.clone()).await;
    let done = get(&mut client, &again.id).await;
    assert_eq!((done.status(), done.error_file_id.as_str()), (BatchStatus::Completed, ""));
    let output = download(&mut client, &done.output_file_id).await;
    assert_eq!(ids(&output), ids(&failed), "the failed ones, in input order");
    let nothing = client.retry_failed_requests(retry(&again.id, "")).await.unwrap_err();
    assert_eq!(reason(&nothing), (Code::FailedPrecondition, "NO_FAILED_REQUESTS".into()));
    server.kill().await;
}

fn infer(body: &Value) -> InferRequest {
    InferRequest { endpoint: "/v1/chat/completions".into(), body: body.to_string().into() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_request_goes_ahead_of_a_batch_that_fills_the_worker() {
    let config = SimConfig { latency: Duration::from_millis(200), ..SimConfig::default() };
    let (sim, url) = worker(config).await;
    let mut server = Server::start(&["--worker", &url, "--worker-max-in-flight", "4"]).await;
    let mut client = server.client().await;
    let file = upload(&mut client, input(400)).await;
    let batch = create(&mut client, &file, "").await;
    until("the worker is full", async || sim.faults().in_flight() == 4).await;
    // What is sent from now on takes so long that the call is in line before the next request can be sent.
    sim.faults().set_slow_down(50.0);
    let before = sim.faults().received();
    until("all its requests are slow", async || sim.faults().received() >= before + 4).await;
    let body = json!({"model": "sim", "messages": [{"role": "user", "content": "now"}], "max_tokens": 2});
    sim.faults().record(true);
    let answer = client.infer(infer(&body)).await.unwrap().into_inner();
    assert_eq!(answer.status_code, 200);
    let said: Value = serde_json::from_slice(&answer.body).unwrap();
    assert!(said["choices"][0]["message"]["content"].as_str().unwrap().contains("now"), "{said}");
    let received = sim.faults().recorded();
    let place = received.iter().position(|one| one.body == body.to_string()).expect("untouched");
    assert!(place < 8, "it was sent as number {place} of those that followed");
    let running = client.get_batch(GetBatchRequest { batch_id: batch }).await.unwrap().into_inner();
    assert_eq!(running.status(), BatchStatus::InProgress);
    server.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_request_tells_why_it_has_no_answer() {
    let (sim, url) = worker(SimConfig::default()).await;
    let mut server = Server::start(&["--worker", &url]).await;
    let mut client = server.client().await;
    let body = |model: &str| json!({"model": model, "messages": [{"role": "user", "content": "hi"}]});
    // The worker is found healthy a moment after the start.
    until("the worker is found", async || {
        let answer = client.infer(infer(&body("sim"))).await;
        answer.map_err(|status| assert_eq!(reason(&status), (Code::Unavailable, "NO_WORKER".into()))).is_ok()
    })
    .await;
    let status = client.infer(infer(&body("unheard-of"))).await.unwrap_err();
    assert_eq!(reason(&status), (Code::Unavailable, "NO_WORKER".into()));
    assert!(status.message().contains("unheard-of") && status.get_details_retry_info().is_some(), "{status:?}");
    // The worker's refusal is its answer, word for word.
    let refused = client.infer(infer(&json!({"model": "sim"}))).await.unwrap().into_inner();
    assert_eq!(refused.status_code, 400);
    assert!(String::from_utf8_lossy(&refused.body).contains("messages"));
    sim.faults().always(Some(Fault::Hang));
    let mut within = Duration::from_millis(500);
    let status = loop {
        let mut request = Request::new(infer(&body("sim")));
        request.set_timeout(within);
        let status = client.infer(request).await.unwrap_err();
        // The clock of the client or of the server's gate may end it before the worker is to blame.
        let is_early = status.code() == Code::Cancelled || reason(&status).1 != "WORKER_TIMEOUT";
        if !is_early || within > HANG {
            break status;
        }
        within *= 2;
    };
    assert_eq!(reason(&status), (Code::DeadlineExceeded, "WORKER_TIMEOUT".into()));
    server.kill().await;
}
