//! The process dies between two writes, at every pair of them there is, and is started again: the batch completes once, its
//! webhook tells so, under one id.

use std::{path::Path, time::Duration};

use sea_orm::{ConnectionTrait, Statement};
use strum::VariantArray;
use tidemill::{
    fault::Fault,
    pb::{
        BatchStatus, CreateBatchRequest, Delivery, DeliveryState, GetBatchRequest, GetDeliveryRequest,
        ListDeadLettersRequest, ListDeliveriesRequest, WebhookConfig, create_batch_request::Input,
    },
    sim::SimConfig,
};

use crate::support::direct;
use crate::{
    assert_complete, input,
    receiver::{Receiver, SECRET, SILENT},
    server::Server,
    support::{
        patience::{ends, until},
        postgres,
    },
    try_upload, worker,
};

/// Enough for several parts.
const LINES: usize = 300;

/// Where it dies, the how many-th time it comes by, and which attempts the receiver sees in all.
macro_rules! deaths {
    ($($name:ident: $fault:ident, $visit:literal, $attempts:expr;)*) => {
        /// A point that no test dies at would be a hole in the table.
        #[test]
        fn every_point_has_its_test() {
            // `parted` has the tests of the one that no batch comes by.
            let tested = [$(Fault::$fault,)* Fault::UploadedPart];
            assert!(Fault::VARIANTS.iter().all(|fault| tested.contains(fault)));
        }
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::dies_and_completes(None, super::Fault::$fault, $visit, &$attempts).await;
            })*
        }
        mod on_postgres {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                if let Some(url) = super::postgres::database().await {
                    super::dies_and_completes(Some(url), super::Fault::$fault, $visit, &$attempts).await;
                }
            })*
        }
    };
}

deaths! {
    after_an_uploads_object: UploadObject, 1, ["1"];
    after_the_first_parts_object: PartObject, 1, ["1"];
    after_a_later_parts_object: PartObject, 3, ["1"];
    after_the_first_parts_row: PartRow, 1, ["1"];
    after_a_later_parts_row: PartRow, 3, ["1"];
    before_a_segments_end: SegmentFinish, 1, ["1"];
    after_the_merged_object: MergedObject, 1, ["1"];
    after_the_outbox_is_committed: SegmentFinished, 1, ["1"];
    within_the_claim: DeliveryClaimed, 1, ["1"];
    after_the_attempt_is_noted: DeliveryAttempt, 1, ["2"];
    after_the_receivers_200: DeliveryAnswered, 1, ["1", "2"];
    after_the_webhook_is_settled: DeliverySettled, 1, ["1"];
}

/// What a test runs on.
struct World {
    server: Server,
    receiver: Receiver,
    database: Option<String>,
}

impl World {
    async fn start(database: Option<String>, status: u16, fault: Option<(Fault, u32)>) -> Self {
        // To die at a later part, the answers must come over a time in which even a busy machine writes several parts.
        let latency = Duration::from_millis(if fault.is_some_and(|(_, visit)| visit > 1) { 400 } else { 40 });
        let config = SimConfig { latency, max_num_seqs: 16, ..SimConfig::default() };
        let (_, worker) = worker(config).await;
        let mut flags = vec!["--worker", &worker, "--flush-interval", "50ms", "--lease", "3s"];
        flags.extend(["--webhook-allow-cidr", "127.0.0.0/8", "--webhook-retry-schedule", "1s,2s,4s"]);
        if let Some(url) = &database {
            flags.extend(["--database-url", url]);
        }
        let server = match fault {
            Some((fault, visit)) => Server::armed(&flags, fault, visit).await,
            None => Server::start(&flags).await,
        };
        Self { server, receiver: Receiver::start(status).await, database }
    }

    async fn create(&self, file: &str, attempts: i32) -> Result<String, tonic::Status> {
        let webhook = WebhookConfig {
            url: self.receiver.url.clone(),
            secret: SECRET.into(),
            max_retries: attempts,
            ..WebhookConfig::default()
        };
        let request = CreateBatchRequest {
            input: Some(Input::InputFileId(file.to_owned())),
            request_id: "once".into(),
            webhook: Some(webhook),
            ..CreateBatchRequest::default()
        };
        self.server.client().await.create_batch(request).await.map(|batch| batch.into_inner().id)
    }

    /// Starts the dead server again. Where others may have the database, its leases on deliveries last for another 35 s: they
    /// are over at once here.
    async fn restart(&mut self) {
        if let Some(url) = &self.database {
            let database = direct::connect(url).await;
            database.execute_unprepared("UPDATE webhook_deliveries SET lease_expires_at = 1").await.unwrap();
            database.close().await.unwrap();
        }
        self.server.restart().await;
    }

    /// The batch's one delivery, once nothing is to be done for it any more.
    async fn settled(&self, batch: &str) -> Delivery {
        let mut webhooks = self.server.webhooks().await;
        let request = ListDeliveriesRequest { batch_id: batch.to_owned(), ..ListDeliveriesRequest::default() };
        let settled = async {
            loop {
                let found = webhooks.list_deliveries(request.clone()).await.unwrap().into_inner().deliveries;
                assert!(found.len() <= 1, "{found:?}");
                if let Some(one) = found.into_iter().find(|one| one.settle_time.is_some()) {
                    let request = GetDeliveryRequest { delivery_id: one.id };
                    return webhooks.get_delivery(request).await.unwrap().into_inner();
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        ends("the webhook is delivered or dead", settled).await
    }

    /// Every object of results is named by a row; also when the dead server, or one that was frozen, comes to write what it
    /// was about to.
    async fn nothing_is_left(&self, batch: &str) {
        let file = self.server.folder().join("tidemill.db");
        let url = self.database.clone().unwrap_or_else(|| format!("sqlite://{}", file.display()));
        let database = direct::connect(&url).await;
        let blobs = self.server.folder().join("blobs");
        let unnamed = async || {
            // Files first: what goes meanwhile has been garbage.
            let found = files(&blobs, "results");
            let sql = "SELECT object_key FROM parts UNION SELECT object_key FROM segments WHERE object_key IS NOT NULL \
                       UNION SELECT object_key FROM garbage";
            let statement = Statement::from_string(database.get_database_backend(), sql);
            let rows = database.query_all_raw(statement).await.unwrap();
            let named: Vec<String> = rows.iter().map(|row| row.try_get("", "object_key").unwrap()).collect();
            found.into_iter().filter(|key| !named.contains(key)).collect::<Vec<String>>()
        };
        assert!(unnamed().await.is_empty(), "{:?}", unnamed().await);
        std::fs::write(blobs.join(format!("results/{batch}/000000/1-98")), "late").unwrap();
        // As if an hour had passed since the end.
        assert_eq!(
            database.execute_unprepared("UPDATE leftovers SET look_after = 1").await.unwrap().rows_affected(),
            1
        );
        until("what nothing names is deleted", async || unnamed().await.is_empty()).await;
        database.close().await.unwrap();
        assert_complete(&mut self.server.client().await, batch, LINES).await;
    }

    /// The batch is complete, its delivery as told, and every request that the receiver got was this one event.
    async fn check(&self, batch: &str, state: DeliveryState, outcomes: &[&str], attempts: &[&str]) {
        let delivery = self.settled(batch).await;
        assert_eq!((delivery.state(), delivery.event.as_str()), (state, "completed"), "{delivery:?}");
        let log: Vec<_> = delivery.attempt_log.iter().map(|one| one.outcome.as_str()).collect();
        assert_eq!(log, outcomes);
        let mut client = self.server.client().await;
        assert_complete(&mut client, batch, LINES).await;
        let received = self.receiver.received();
        let seen: Vec<_> = received.iter().map(|webhook| webhook.attempt.as_str()).collect();
        assert_eq!(seen, attempts);
        let found = client.get_batch(GetBatchRequest { batch_id: batch.to_owned() }).await.unwrap().into_inner();
        assert_eq!(found.status(), BatchStatus::Completed);
        for webhook in received {
            assert_eq!((webhook.id.as_str(), webhook.event.as_str()), (delivery.id.as_str(), "completed"));
            assert_eq!((&webhook.body["id"], &webhook.body["status"]), (&batch.into(), &"completed".into()));
            assert_eq!(webhook.body["output_file_id"], found.output_file_id.as_str());
        }
    }
}

/// The files below a folder, by their paths in it.
fn files(folder: &Path, within: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder.join(within)).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{within}/{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(folder, &name));
        } else {
            found.push(name);
        }
    }
    found
}

async fn dies_and_completes(database: Option<String>, fault: Fault, visit: u32, attempts: &[&str]) {
    let mut world = World::start(database, 200, Some((fault, visit))).await;
    let uploaded = try_upload(&mut world.server.client().await, input(LINES), "file").await;
    assert_eq!(uploaded.is_err(), fault == Fault::UploadObject, "{uploaded:?}");
    if let Ok(file) = uploaded {
        // It may die before it answers.
        let _ = world.create(&file, 3).await;
    }
    world.server.died().await;
    world.restart().await;
    // A client that got no answer asks again.
    let file = try_upload(&mut world.server.client().await, input(LINES), "file").await.unwrap();
    let batch = world.create(&file, 3).await.unwrap();
    let outcomes: &[&str] = match fault {
        Fault::DeliveryAttempt | Fault::DeliveryAnswered => &["unknown", "succeeded"],
        _ => &["succeeded"],
    };
    world.check(&batch, DeliveryState::Delivered, outcomes, attempts).await;
    let inputs = std::fs::read_dir(world.server.folder().join("blobs/inputs")).unwrap().count();
    // What an upload left that no row names goes with the sweep of the note that was made of it.
    assert_eq!(inputs, 1 + usize::from(fault == Fault::UploadObject));
    world.nothing_is_left(&batch).await;
    world.server.kill().await;
}

/// `kill -9` while the receiver holds the request.
async fn killed_mid_send(database: Option<String>) {
    let mut world = World::start(database, SILENT, None).await;
    let file = try_upload(&mut world.server.client().await, input(LINES), "file").await.unwrap();
    let batch = world.create(&file, 3).await.unwrap();
    world.receiver.wait(1).await;
    world.server.kill().await;
    world.receiver.answer(204);
    world.restart().await;
    world.check(&batch, DeliveryState::Delivered, &["unknown", "succeeded"], &["1", "2"]).await;
    world.server.kill().await;
}

/// The last attempt's outcome is not known: it is no delivery, so it is a dead letter, which says so.
async fn killed_at_the_last_attempt(database: Option<String>) {
    let mut world = World::start(database, 200, Some((Fault::DeliveryAnswered, 1))).await;
    let file = try_upload(&mut world.server.client().await, input(LINES), "file").await.unwrap();
    let batch = world.create(&file, 1).await.unwrap();
    world.server.died().await;
    world.restart().await;
    world.check(&batch, DeliveryState::Dead, &["unknown"], &["1"]).await;
    let request = ListDeadLettersRequest { batch_id: batch, ..ListDeadLettersRequest::default() };
    let dead = world.server.webhooks().await.list_dead_letters(request).await.unwrap().into_inner().dead_letters;
    assert_eq!((dead.len(), dead[0].attempts), (1, 1));
    assert!(dead[0].error_message.contains("the receiver may have it"), "{}", dead[0].error_message);
    world.server.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_mid_send_on_sqlite() {
    killed_mid_send(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_mid_send_on_postgres() {
    if let Some(url) = postgres::database().await {
        killed_mid_send(Some(url)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_the_last_attempt_on_sqlite() {
    killed_at_the_last_attempt(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_the_last_attempt_on_postgres() {
    if let Some(url) = postgres::database().await {
        killed_at_the_last_attempt(Some(url)).await;
    }
}
