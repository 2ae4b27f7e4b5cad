//! Webhooks over the wire: what CreateBatch takes and answers, and WebhookAdmin.

use tidemill::pb;
use tonic::Code;

use crate::support::{Server, expect, fields, get, inline};

const URL: &str = "http://127.0.0.1:9/hook";

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

#[tokio::test]
async fn a_batch_answers_with_its_schedule_and_without_its_secret() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let webhook = pb::WebhookConfig {
        url: URL.into(),
        secret: "canary".into(),
        max_retries: 4,
        timeout: seconds(5),
        events: vec!["failed".into(), "completed".into()],
        ..Default::default()
    };
    let request = pb::CreateBatchRequest { webhook: Some(webhook), ..inline(1) };
    let made = client.create_batch(request).await.unwrap().into_inner();
    assert!(!format!("{made:?}").contains("canary"));
    let webhook = made.webhook.clone().unwrap();
    assert_eq!((webhook.url.as_str(), webhook.max_retries, webhook.timeout), (URL, 4, seconds(5)));
    assert_eq!(webhook.events, ["completed", "failed"]);
    let waits: Vec<_> = webhook.retry_schedule.iter().map(|wait| wait.seconds).collect();
    assert_eq!((waits.as_slice(), webhook.retry_horizon), ([5, 30, 120].as_slice(), seconds(155)));
    assert_eq!(client.get_batch(get(&made.id)).await.unwrap().into_inner().webhook, made.webhook);
    // The old form, and what the server puts where nothing is said.
    let mut old = inline(1);
    old.metadata.insert("webhook_url".into(), URL.into());
    let webhook = client.create_batch(old).await.unwrap().into_inner().webhook.unwrap();
    assert_eq!((webhook.url.as_str(), webhook.max_retries, webhook.timeout), (URL, 10, seconds(30)));
    assert_eq!((webhook.retry_schedule.len(), webhook.retry_horizon), (9, seconds(56_555)), "some 16 hours");
    assert_eq!(webhook.events, ["completed", "failed", "cancelled", "expired"]);
}

#[tokio::test]
async fn what_is_wrong_with_a_webhook_is_named() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let bad = pb::WebhookConfig {
        url: "ftp://x".into(),
        secret: "whsec_!".into(),
        max_retries: 11,
        timeout: seconds(4),
        events: vec!["done".into()],
        ..Default::default()
    };
    let answer = client.create_batch(pb::CreateBatchRequest { webhook: Some(bad), ..inline(1) }).await;
    let message = answer.as_ref().unwrap_err().message().to_owned();
    assert!(message.contains("\"done\"") && message.contains("completed, failed, progress"), "{message}");
    let expected = ["webhook.events", "webhook.max_retries", "webhook.secret", "webhook.timeout", "webhook.url"];
    assert_eq!(fields(answer), expected);
    for url in ["http://10.0.0.1/", "http://[::ffff:169.254.169.254]/", "http://2852039166/"] {
        let webhook = pb::WebhookConfig { url: url.into(), ..Default::default() };
        let answer = client.create_batch(pb::CreateBatchRequest { webhook: Some(webhook), ..inline(1) }).await;
        assert_eq!(fields(answer), ["webhook.url"], "{url}");
    }
    let forever = pb::WebhookConfig { url: URL.into(), timeout: seconds(i64::MIN), ..Default::default() };
    let answer = client.create_batch(pb::CreateBatchRequest { webhook: Some(forever), ..inline(1) }).await;
    assert_eq!(fields(answer), ["webhook.timeout"]);
    let mut old = inline(1);
    old.metadata.insert("webhook_url".into(), "http://10.0.0.1/".into());
    assert_eq!(fields(client.create_batch(old).await), ["metadata[\"webhook_url\"]"]);
    let nowhere = pb::CreateBatchRequest { webhook_endpoint_id: "we_none".into(), ..inline(1) };
    assert_eq!(fields(client.create_batch(nowhere).await), ["webhook_endpoint_id"]);
}

#[tokio::test]
async fn endpoints_live_over_the_wire() {
    let server = Server::start().await;
    let mut hooks = server.webhooks(None).await;
    let create = pb::CreateEndpointRequest { url: URL.into(), max_retries: 2, ..Default::default() };
    let made = hooks.create_endpoint(create).await.unwrap().into_inner();
    assert!(made.secret.starts_with("whsec_"));
    let endpoint = made.endpoint.unwrap();
    assert_eq!((endpoint.max_retries, endpoint.retry_horizon), (2, seconds(5)));
    let id = endpoint.id.clone();
    let named = pb::CreateBatchRequest { webhook_endpoint_id: id.clone(), ..inline(1) };
    let batch = server.client().await.create_batch(named.clone()).await.unwrap().into_inner();
    assert_eq!((batch.webhook_endpoint_id.as_str(), batch.webhook), (id.as_str(), None));
    let delete = pb::DeleteEndpointRequest { endpoint_id: id.clone() };
    expect(hooks.delete_endpoint(delete).await, Code::FailedPrecondition, "ENDPOINT_IN_USE");
    let off = pb::UpdateEndpointRequest {
        endpoint_id: id.clone(),
        disabled: Some(true),
        disabled_reason: "maintenance".into(),
        events: vec!["failed".into()],
        ..Default::default()
    };
    let changed = hooks.update_endpoint(off).await.unwrap().into_inner();
    assert_eq!((changed.disabled, changed.disabled_reason.as_str()), (true, "maintenance"));
    assert_eq!(changed.events, ["failed"]);
    expect(server.client().await.create_batch(named).await, Code::FailedPrecondition, "ENDPOINT_DISABLED");
    let bad = pb::UpdateEndpointRequest {
        endpoint_id: id.clone(),
        url: Some("http://10.0.0.1/".into()),
        ..Default::default()
    };
    assert_eq!(fields(hooks.update_endpoint(bad).await), ["url"]);
    let rotate = pb::RotateSecretRequest { endpoint_id: id.clone(), overlap: seconds(60), ..Default::default() };
    let long = pb::RotateSecretRequest { overlap: seconds(8 * 86_400), ..rotate.clone() };
    assert_eq!(fields(hooks.rotate_secret(long).await), ["overlap"]);
    let bad = pb::RotateSecretRequest { secret: "a\nb".into(), ..rotate.clone() };
    assert_eq!(fields(hooks.rotate_secret(bad).await), ["secret"]);
    let rotated = hooks.rotate_secret(rotate).await.unwrap().into_inner();
    assert_ne!(rotated.secret, made.secret);
    assert!(rotated.endpoint.unwrap().previous_secret_expire_time.is_some());
    let test = pb::SendTestEventRequest { endpoint_id: id };
    let tested = hooks.send_test_event(test).await.unwrap().into_inner();
    assert_eq!((tested.success, tested.error_kind.as_str()), (false, "connect"));
    let listed = hooks.list_deliveries(pb::ListDeliveriesRequest::default()).await.unwrap().into_inner().deliveries;
    assert_eq!((listed.len(), listed[0].state()), (1, pb::DeliveryState::Cancelled));
    let shown =
        hooks.get_delivery(pb::GetDeliveryRequest { delivery_id: tested.delivery_id }).await.unwrap().into_inner();
    assert_eq!((shown.attempt_log.len(), shown.event.as_str()), (1, "test"));
    assert!(shown.payload.contains("\"batch.test\""));
    let endpoints = hooks.list_endpoints(pb::ListEndpointsRequest::default()).await.unwrap().into_inner().endpoints;
    assert_eq!(endpoints.len(), 1);
}

#[tokio::test]
async fn what_is_not_there_is_not_found_and_purging_wants_an_age() {
    let server = Server::start().await;
    let mut hooks = server.webhooks(None).await;
    let id = || "dl_none".to_owned();
    let get = hooks.get_dead_letter(pb::GetDeadLetterRequest { dead_letter_id: id() }).await;
    expect(get, Code::NotFound, "DEAD_LETTER_NOT_FOUND");
    let retry = pb::RetryDeadLetterRequest { dead_letter_id: id(), force: true, ..Default::default() };
    expect(hooks.retry_dead_letter(retry).await, Code::NotFound, "DEAD_LETTER_NOT_FOUND");
    let delete = hooks.delete_dead_letter(pb::DeleteDeadLetterRequest { dead_letter_id: id() }).await;
    expect(delete, Code::NotFound, "DEAD_LETTER_NOT_FOUND");
    assert_eq!(fields(hooks.purge_dead_letters(pb::PurgeDeadLettersRequest::default()).await), ["older_than"]);
    let purged = hooks.purge_dead_letters(pb::PurgeDeadLettersRequest { older_than: seconds(0) }).await;
    assert_eq!(purged.unwrap().into_inner().purged, 0);
    let dry = pb::RetryDeadLettersRequest { dry_run: true, ..Default::default() };
    assert_eq!(hooks.retry_dead_letters(dry).await.unwrap().into_inner().job, None);
    let job = hooks.retry_dead_letters(pb::RetryDeadLettersRequest::default()).await.unwrap().into_inner().job.unwrap();
    assert_eq!(job.state(), pb::RetryJobState::Done);
    let again =
        hooks.get_retry_job(pb::GetRetryJobRequest { retry_job_id: job.id.clone() }).await.unwrap().into_inner();
    assert_eq!(again, job);
    let bad = pb::ListDeadLettersRequest { event: "done".into(), ..Default::default() };
    assert_eq!(fields(hooks.list_dead_letters(bad).await), ["event"]);
}
