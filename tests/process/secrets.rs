//! A secret that is looked for everywhere: in all that the server logs at its most talkative, in what it answers, in every
//! file that it keeps.

use std::{path::Path, time::Duration};

use tidemill::{
    pb::{
        CreateBatchRequest, CreateEndpointRequest, GetBatchRequest, GetDeadLetterRequest, ListBatchesRequest,
        ListDeadLettersRequest, ListDeliveriesRequest, ListEndpointsRequest, RetryDeadLetterRequest,
        RotateSecretRequest, SendTestEventRequest, WatchBatchRequest, WebhookConfig, create_batch_request::Input,
    },
    sim::SimConfig,
};

use crate::{
    input,
    receiver::{Receiver, SECRET},
    server::Server,
    support::patience::ends,
    upload, worker,
};

/// 32 bytes, as is asked for. In text, so that it could be seen anywhere too.
const MASTER_KEY: &str = "Y2FuYXJ5LW1hc3Rlci1rZXktMDEyMzQ1Njc4OWFiY2Q=";
/// The endpoint's, before and after its rotation.
const ENDPOINT: [&str; 2] = ["canary-endpoint-7c1f", "canary-rotated-2e9b"];

/// The places below a folder where one of the texts is.
fn places(folder: &Path, texts: &[&str], looked: &mut usize) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            found.extend(places(&entry.path(), texts, looked));
            continue;
        }
        let bytes = std::fs::read(entry.path()).unwrap();
        *looked += bytes.len();
        let has = |text: &&&str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        found.extend(texts.iter().filter(has).map(|text| format!("{text} in {}", entry.path().display())));
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_any_log_answer_or_file() {
    let (_, worker) = worker(SimConfig::default()).await;
    let receiver = Receiver::start(500).await;
    // Every level that says something of a request or a statement, of all crates; their traces are of single bytes.
    let flags = ["--worker", &worker, "--webhook-allow-cidr", "127.0.0.0/8", "--master-key", MASTER_KEY];
    let flags = [&flags[..], &["--webhook-secret", SECRET, "--log", "debug,tidemill=trace"]].concat();
    let mut server = Server::start(&flags).await;
    let (mut client, mut webhooks) = (server.client().await, server.webhooks().await);
    let file = upload(&mut client, input(3)).await;
    let webhook =
        WebhookConfig { url: receiver.url.clone(), secret: SECRET.into(), max_retries: 1, ..WebhookConfig::default() };
    let request = CreateBatchRequest {
        input: Some(Input::InputFileId(file)),
        webhook: Some(webhook),
        ..CreateBatchRequest::default()
    };
    let mut said = Vec::new();
    let batch = client.create_batch(request.clone()).await.unwrap().into_inner();
    said.push(format!("{batch:?}"));
    let endpoint = CreateEndpointRequest {
        url: receiver.url.clone(),
        secret: ENDPOINT[0].into(),
        ..CreateEndpointRequest::default()
    };
    let made = webhooks.create_endpoint(endpoint).await.unwrap().into_inner();
    // Told once, to whoever registers it.
    assert_eq!(made.secret, ENDPOINT[0]);
    let endpoint_id = made.endpoint.unwrap().id;
    let rotate = RotateSecretRequest {
        endpoint_id: endpoint_id.clone(),
        secret: ENDPOINT[1].into(),
        ..RotateSecretRequest::default()
    };
    let rotated = webhooks.rotate_secret(rotate).await.unwrap().into_inner();
    said.push(format!("{:?}", rotated.endpoint));
    // Refused, with the secret in the request.
    let refused = WebhookConfig { url: "ftp://x".into(), max_retries: 99, ..request.webhook.clone().unwrap() };
    let refused = CreateBatchRequest { webhook: Some(refused), ..request };
    said.push(format!("{:?}", client.create_batch(refused).await.unwrap_err()));
    let watch = WatchBatchRequest { batch_id: batch.id.clone(), after_revision: 0, min_interval: None };
    let mut events = client.watch_batch(watch).await.unwrap().into_inner();
    while let Some(event) = events.message().await.unwrap() {
        said.push(format!("{event:?}"));
    }
    let dead = ends("the receiver takes nothing", async {
        loop {
            let list = ListDeadLettersRequest { batch_id: batch.id.clone(), ..ListDeadLettersRequest::default() };
            let dead = webhooks.list_dead_letters(list).await.unwrap().into_inner().dead_letters;
            if let Some(dead) = dead.into_iter().next() {
                return dead;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let dead = dead.await;
    let retry = RetryDeadLetterRequest { dead_letter_id: dead.id.clone(), ..RetryDeadLetterRequest::default() };
    said.push(format!("{:?}", webhooks.retry_dead_letter(retry).await.unwrap()));
    let get = GetDeadLetterRequest { dead_letter_id: dead.id };
    said.push(format!("{:?}", webhooks.get_dead_letter(get).await.unwrap()));
    said.push(format!("{:?}", webhooks.list_deliveries(ListDeliveriesRequest::default()).await.unwrap()));
    said.push(format!("{:?}", webhooks.list_endpoints(ListEndpointsRequest::default()).await.unwrap()));
    said.push(format!("{:?}", webhooks.send_test_event(SendTestEventRequest { endpoint_id }).await.unwrap()));
    said.push(format!("{:?}", client.get_batch(GetBatchRequest { batch_id: batch.id.clone() }).await.unwrap()));
    said.push(format!("{:?}", client.list_batches(ListBatchesRequest::default()).await.unwrap()));
    // The test event is signed by the endpoint's secrets, so its receiver's check of the other one's would fail.
    assert_eq!(receiver.received().len(), 2);
    let texts = [SECRET, &SECRET["whsec_".len()..], ENDPOINT[0], ENDPOINT[1], MASTER_KEY, "canary-master-key"];
    for said in said {
        assert!(said.len() > 20 && !texts.iter().any(|text| said.contains(text)), "{said}");
    }
    // Both before and after the database's own tidying up at a stop.
    let mut looked = 0;
    assert_eq!(places(server.folder(), &texts, &mut looked), [""; 0]);
    assert!(server.terminate().await.success());
    assert_eq!(places(server.folder(), &texts, &mut looked), [""; 0]);
    assert!(looked > 100_000);
    assert!(places(server.folder(), &[&batch.id], &mut looked).len() > 1, "what is there is found");
    let log = std::fs::read_to_string(server.folder().join("server.log")).unwrap();
    assert!(log.contains("DEBUG") && log.contains("dead letter"), "the log says what happens");
}
