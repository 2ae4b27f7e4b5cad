//! Objects in S3, and S3 in trouble: the batch stops, says why, and goes on; nothing is lost and nothing runs twice.

use std::time::Duration;

use tidemill::{
    pb::{self, BatchStatus, GetBatchRequest},
    sim::SimConfig,
};
use tonic::Code;
use tonic_types::StatusExt;

use crate::{
    assert_complete, create, input,
    s3::{BUCKET, Fault, On, S3},
    server::{Client, Server},
    support::patience,
    try_upload, upload, worker,
};

const LINES: usize = 600;

async fn server_on(s3: &S3, worker: &str) -> Server {
    let blobs = format!("s3://{BUCKET}/deep/prefix");
    let flags = ["--blobs", &blobs, "--worker", worker, "--worker-max-in-flight", "8", "--flush-interval", "50ms"];
    Server::in_environment(&flags, s3.environment(), None).await
}

/// The batch, once `until` holds of it.
async fn when(client: &mut Client, id: &str, until: impl Fn(&pb::Batch) -> bool) -> pb::Batch {
    let mut batch = pb::Batch::default();
    let get = GetBatchRequest { batch_id: id.to_owned() };
    patience::until("the batch gets there", async || {
        batch = client.get_batch(get.clone()).await.unwrap().into_inner();
        until(&batch)
    })
    .await;
    batch
}

/// A batch meets a fault half way. `says` is in its reason; `refuses` tells whether uploads are refused meanwhile.
async fn pauses_and_goes_on(on: On, fault: Fault, says: &str, refuses: bool) {
    let s3 = S3::start().await;
    let config = SimConfig { latency: Duration::from_millis(20), ..SimConfig::default() };
    let (sim, url) = worker(config).await;
    // A second a request, so that the batch can't end before S3 breaks.
    sim.faults().set_slow_down(50.0);
    let mut server = server_on(&s3, &url).await;
    let mut client = server.client().await;
    let file = upload(&mut client, input(LINES)).await;
    let id = create(&mut client, &file, "").await;
    let running = |batch: &pb::Batch| batch.request_counts.is_some_and(|counts| counts.completed > 0);
    let before = when(&mut client, &id, running).await;
    assert_eq!(before.status(), BatchStatus::InProgress, "there must be something left to do");
    s3.break_it(on, fault);
    let told = when(&mut client, &id, |batch| batch.waiting_reason.contains(says)).await;
    assert!(told.waiting_reason.starts_with("the blob store has failed"), "{}", told.waiting_reason);
    assert!(!told.waiting_reason.contains("secret") && !told.waiting_reason.contains("127.0.0.1"), "{told:?}");
    assert_eq!(told.status(), BatchStatus::InProgress);
    assert_eq!(server.metric("tidemill_segments_stuck{on=\"blob_store\"}").await.as_deref(), Some("1"));
    if refuses {
        let refusal = try_upload(&mut client, input(3), "").await.unwrap_err();
        // What trying again can't mend is not answered with "try again".
        let hopeless = matches!(fault, Fault::Status(403 | 404, _));
        let (code, reason) = match hopeless {
            true => (Code::FailedPrecondition, "BLOB_STORE_REFUSED"),
            false => (Code::Unavailable, "BLOB_STORE_UNAVAILABLE"),
        };
        assert_eq!((refusal.code(), refusal.get_details_error_info().unwrap().reason.as_str()), (code, reason));
        assert_eq!(refusal.get_details_retry_info().is_some(), !hopeless, "{refusal:?}");
        assert!(refusal.message().contains(says) && !refusal.message().contains("secret"), "{refusal:?}");
    }
    s3.heal();
    sim.faults().set_slow_down(1.0);
    when(&mut client, &id, |batch| batch.status() == BatchStatus::Completed).await;
    assert_complete(&mut client, &id, LINES).await;
    assert_eq!(sim.faults().received(), LINES as u64, "no request ran twice for it");
    assert_eq!(server.metric("tidemill_segments_stuck{on=\"blob_store\"}").await.as_deref(), Some("0"));
    assert!(s3.keys().iter().all(|key| key.starts_with("deep/prefix/")), "{:?}", s3.keys());
    assert_eq!(s3.unfinished(), 0, "no multipart upload is left half done");
    // The server stops and finds all of it again.
    server.kill().await;
    server.restart().await;
    assert_complete(&mut server.client().await, &id, LINES).await;
    server.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_that_asks_to_slow_down_pauses_the_batch_with_its_reason() {
    pauses_and_goes_on(On::All, Fault::Status(503, "SlowDown"), "503 Service Unavailable", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_that_fails_inside_pauses_the_batch_with_its_reason() {
    pauses_and_goes_on(On::Writes, Fault::Status(500, "InternalError"), "500 Internal Server Error", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_that_denies_access_pauses_the_batch_with_its_reason() {
    pauses_and_goes_on(On::Writes, Fault::Status(403, "AccessDenied"), "permission denied", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_is_gone_for_a_while_pauses_the_batch_with_its_reason() {
    pauses_and_goes_on(On::All, Fault::Status(404, "NoSuchBucket"), "there is no such bucket", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_that_does_not_answer_pauses_the_batch_with_its_reason() {
    pauses_and_goes_on(On::Writes, Fault::Slow(Duration::from_secs(8)), "no answer yet", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn resets_and_bodies_cut_off_are_bridged_without_a_word() {
    for (on, fault) in [(On::All, Fault::Reset), (On::Reads, Fault::Cut)] {
        let s3 = S3::start().await;
        let (sim, url) = worker(SimConfig::default()).await;
        let mut server = server_on(&s3, &url).await;
        let mut client = server.client().await;
        s3.break_it(on, fault);
        let file = upload(&mut client, input(LINES)).await;
        let id = create(&mut client, &file, "").await;
        when(&mut client, &id, |batch| batch.status() == BatchStatus::Completed).await;
        assert_complete(&mut client, &id, LINES).await;
        assert_eq!(sim.faults().received(), LINES as u64);
        assert!(s3.struck() > 2, "{fault:?} met {} requests", s3.struck());
        server.kill().await;
    }
}
