//! Any node that answers clients answers every call, whoever does the work: two that only answer, one that only runs
//! batches, one that only delivers webhooks.

use std::{collections::BTreeSet, time::Duration};

use tidemill::{
    pb::{
        self, BatchStatus, CreateBatchRequest, GetDeadLetterRequest, GetRetryJobRequest, InferRequest,
        ListDeadLettersRequest, ListDeliveriesRequest, RetryDeadLetterRequest, RetryDeadLettersRequest, RetryJobState,
        RotateSecretRequest, SendTestEventRequest, WebhookConfig,
    },
    sim::{Sim, SimConfig},
};

use crate::{
    calls::{Anybody, of_file},
    cluster::{Cluster, worker},
    history::{self, Submitted},
    hooks::{self, admin},
    receiver::{Receiver, Reply},
    support::{patience::until, postgres},
    together,
};

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const NEXT_SECRET: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
/// Their places in the cluster.
const HERE: usize = 0;
const THERE: usize = 1;
const SENDER: usize = 3;

/// The nodes, and clients of the first and of the second.
async fn apart(database: &str, config: SimConfig) -> (Cluster, Sim, Anybody, Anybody) {
    let (sim, url) = worker(config).await;
    let mut flags = vec!["--worker", &url, "--worker-max-in-flight", "32"];
    flags.extend(hooks::FLAGS);
    let mut cluster = Cluster::start(database, 0, &flags).await;
    for roles in ["api", "api", "scheduler", "delivery"] {
        cluster.add(&["--roles", roles]).await;
    }
    let one = |place: usize| Anybody::new(vec![cluster.nodes[place].address]);
    let (here, there) = (one(HERE), one(THERE));
    (cluster, sim, here, there)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_watched_read_and_cancelled_where_nobody_runs_it() {
    let _turn = together().await;
    let Some(database) = postgres::database().await else { return };
    let config = SimConfig { latency: Duration::from_millis(100), ..SimConfig::default() };
    let (mut cluster, sim, here, there) = apart(&database, config).await;
    // So slow at first that nobody can miss how it goes on.
    sim.faults().set_slow_down(20.0);
    let file = here.upload(&history::input(400), "f").await;
    let id = there.create(&file, "b").await;
    assert_eq!(here.create(&file, "b").await, id, "the same batch at both");
    // WatchBatch, StreamResults, GetBatch and DownloadFile, all at the node that neither took the file nor runs it.
    let (batch, beside) = (Submitted::of(&there, id.clone(), 400), Submitted::of(&here, id.clone(), 400));
    let progress = async || there.get(&id).await.request_counts.unwrap().completed;
    until("progress is seen there", async || (1..400).contains(&progress().await)).await;
    sim.faults().set_slow_down(1.0);
    assert_eq!(batch.check(&there).await, BatchStatus::Completed);
    assert_eq!(beside.check(&here).await, BatchStatus::Completed);
    assert_eq!(there.download(&file).await, here.download(&file).await);

    // CancelBatch: who runs it, and who watches elsewhere, hear of it.
    let file = there.upload(&history::input(5_000), "g").await;
    let id = here.create(&file, "c").await;
    let watched = Submitted::of(&here, id.clone(), 5_000);
    let before = sim.faults().received();
    until("it is under way", async || sim.faults().received() > before + 50).await;
    there.cancel(&id).await;
    assert_eq!(watched.check(&here).await, BatchStatus::Cancelled);
    assert!(sim.faults().received() < before + 4_000, "the runner has stopped");

    // Infer at both.
    for client in [cluster.nodes[HERE].client(), cluster.nodes[THERE].client()] {
        let body = br#"{"model":"sim","messages":[{"role":"user","content":"now"}],"max_tokens":3}"#;
        let request = InferRequest { endpoint: "/v1/chat/completions".into(), body: body.to_vec().into() };
        let answer = client.await.infer(request).await.unwrap().into_inner();
        let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!((answer.status_code, body["usage"]["completion_tokens"].as_i64()), (200, Some(3)), "{body}");
    }
    for node in &mut cluster.nodes {
        node.terminate().await;
    }
    cluster.assert_no_panics();
}

fn hook(url: String) -> WebhookConfig {
    let timeout = Some(prost_types::Duration { seconds: 5, nanos: 0 });
    WebhookConfig { url, secret: SECRET.into(), max_retries: 1, timeout, ..WebhookConfig::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_seen_and_retried_where_nobody_sent_them() {
    let _turn = together().await;
    let Some(database) = postgres::database().await else { return };
    let (cluster, _sim, here, there) = apart(&database, SimConfig::default()).await;
    // Whoever sends by itself is refused; what is retried arrives.
    let refusing = Receiver::start(|n, _| Reply::Status(if n <= 4 { 500 } else { 200 })).await;
    let file = here.upload(&history::input(3), "f").await;
    let mut batches = BTreeSet::new();
    for n in 0..4 {
        let webhook = Some(hook(refusing.url("/")));
        batches.insert(here.create_from(&CreateBatchRequest { webhook, ..of_file(&file, &format!("b{n}")) }).await);
    }
    let (mut one, mut two) = (admin(cluster.nodes[HERE].address).await, admin(cluster.nodes[THERE].address).await);
    let list = ListDeadLettersRequest { page_size: 10, ..ListDeadLettersRequest::default() };
    let mut dead = Vec::new();
    until("all are dead letters", async || {
        dead = one.list_dead_letters(list.clone()).await.unwrap().into_inner().dead_letters;
        dead.len() == 4
    })
    .await;
    assert_eq!(dead.iter().map(|dead| dead.batch_id.clone()).collect::<BTreeSet<_>>(), batches);
    assert_eq!(refusing.requests().len(), 4);

    // One by itself, through the other node.
    let id = dead[0].id.clone();
    let known = two.get_dead_letter(GetDeadLetterRequest { dead_letter_id: id.clone() }).await.unwrap().into_inner();
    assert_eq!((known.attempt_log.len(), &known.delivery_id), (1, &dead[0].delivery_id));
    let retry = RetryDeadLetterRequest { dead_letter_id: id, ..RetryDeadLetterRequest::default() };
    let retried = two.retry_dead_letter(retry.clone()).await.unwrap().into_inner();
    assert!(retried.retry_success, "{retried:?}");
    let refused = one.retry_dead_letter(retry).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "the first node knows: {refused:?}");

    // The rest by a job that one node takes, a third runs and the other is asked about.
    let job = one.retry_dead_letters(RetryDeadLettersRequest::default()).await.unwrap().into_inner();
    assert_eq!(job.matched, 3);
    let retry_job_id = job.job.unwrap().id;
    let mut ended = pb::RetryJob::default();
    until("the job is done", async || {
        let request = GetRetryJobRequest { retry_job_id: retry_job_id.clone() };
        ended = two.get_retry_job(request).await.unwrap().into_inner();
        ended.state() == RetryJobState::Done
    })
    .await;
    assert_eq!((ended.succeeded, ended.failed, ended.skipped), (3, 0, 0), "{ended:?}");
    let requests = refusing.requests();
    assert_eq!(requests.len(), 8, "each was sent once more");
    assert!(requests.iter().all(|request| request.verify(SECRET).is_ok()));
    let ids = |requests: &[crate::receiver::Request]| -> BTreeSet<(String, Vec<u8>)> {
        requests.iter().map(|one| (one.header("webhook-id").to_owned(), one.body.clone())).collect()
    };
    assert_eq!(ids(&requests[..4]), ids(&requests[4..]), "under its id, with its body");
    assert!(cluster.nodes[SENDER].logged("a retry job is done") > 0);
    for batch in batches {
        assert_eq!(there.get(&batch).await.status(), BatchStatus::Completed);
    }
    cluster.assert_no_panics();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_made_at_one_node_is_changed_at_another_and_served_by_a_third() {
    let _turn = together().await;
    let Some(database) = postgres::database().await else { return };
    let (cluster, _sim, here, _there) = apart(&database, SimConfig::default()).await;
    let receiver = Receiver::always(200).await;
    let (mut one, mut two) = (admin(cluster.nodes[HERE].address).await, admin(cluster.nodes[THERE].address).await);
    let create = pb::CreateEndpointRequest {
        url: receiver.url("/"),
        secret: SECRET.into(),
        ..pb::CreateEndpointRequest::default()
    };
    let endpoint_id = one.create_endpoint(create).await.unwrap().into_inner().endpoint.unwrap().id;
    let test = SendTestEventRequest { endpoint_id: endpoint_id.clone() };
    assert!(two.send_test_event(test).await.unwrap().into_inner().success);
    let rotate = RotateSecretRequest {
        endpoint_id: endpoint_id.clone(),
        secret: NEXT_SECRET.into(),
        overlap: Some(prost_types::Duration::default()),
    };
    two.rotate_secret(rotate).await.unwrap();
    let file = here.upload(&history::input(3), "f").await;
    let request = CreateBatchRequest { webhook_endpoint_id: endpoint_id, ..of_file(&file, "b") };
    let batch = here.create_from(&request).await;
    let requests = receiver.wait(2).await;
    assert!(requests[0].verify(SECRET).is_ok(), "the test event");
    assert!(requests[1].verify(NEXT_SECRET).is_ok(), "signed with what is valid now");
    assert_eq!(requests[1].json()["id"], batch.as_str());
    // Both nodes can say what became of it.
    for client in [&mut one, &mut two] {
        let list = ListDeliveriesRequest { batch_id: batch.clone(), ..ListDeliveriesRequest::default() };
        until("it is delivered", async || {
            let found = client.list_deliveries(list.clone()).await.unwrap().into_inner().deliveries;
            found.len() == 1 && found[0].state() == pb::DeliveryState::Delivered
        })
        .await;
    }
    cluster.assert_no_panics();
}
