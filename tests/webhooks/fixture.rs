//! A store on either database, batches with webhooks, and a deliverer on them.

use std::{future::Future, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use sea_orm::{ConnectionTrait, DatabaseConnection};
use tempfile::TempDir;
use tidemill::{
    delivery::{
        Deliverer, Options, Webhooks,
        egress::{Guard, Policy},
        schedule::Schedule,
        secrets::{MasterKey, Vault},
    },
    domain::{
        Batch, BatchError, BatchId, DeliveryId, Endpoint, File, FileId, FileKind, LineSet, NewBatch, NodeId, Priority,
        Scope, SegmentIndex, SegmentSpan, Timestamp, TokenUsage, WebhookEndpointId,
        webhook::{EventFilter, WebhookConfig, WebhookTarget},
    },
    store::{
        AttemptRecord, ClaimedSegment, CreatedBatch, DeadLetter, DeadLetterFilter, DeliveryFilter, DeliveryRecord,
        FinalObject, NewPart, Store,
    },
    upkeep::{self, Upkeep},
};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::support::direct;
use crate::support::postgres;

/// Lines of each batch.
pub const LINES: i32 = 100;
/// A secret that must not be found anywhere.
pub const CANARY: &str = "canary-4f1d0c";

/// Runs a test on both databases; on PostgreSQL only where there is one.
#[macro_export]
macro_rules! on_both {
    ($($name:ident),* $(,)?) => {
        mod sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name($crate::fixture::Db::sqlite().await).await;
            })*
        }
        mod postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                if let Some(db) = $crate::fixture::Db::postgres().await {
                    super::$name(db).await;
                }
            })*
        }
    };
}

pub struct Db {
    pub store: Store,
    /// Past the store: for what a store has no business to offer.
    pub raw: DatabaseConnection,
    pub folder: Option<TempDir>,
}

impl Db {
    pub async fn sqlite() -> Self {
        Self::sqlite_busy_after(Duration::from_secs(30)).await
    }

    /// With another time after which somebody else's lock is no longer waited for.
    pub async fn sqlite_busy_after(busy: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tidemill.db");
        let store = Store::sqlite_busy_after(&file, busy).await.unwrap();
        let raw = direct::connect(format!("sqlite://{}", file.display())).await;
        Self { store, raw, folder: Some(folder) }
    }

    pub async fn postgres() -> Option<Self> {
        let url = postgres::database().await?;
        let store = Store::postgres(&url, 8).await.unwrap();
        Some(Self { store, raw: direct::connect(&url).await, folder: None })
    }

    pub async fn execute(&self, sql: &str) -> u64 {
        self.raw.execute_unprepared(sql).await.unwrap().rows_affected()
    }

    /// From now on the database refuses changes of deliveries for which a condition holds.
    pub async fn refuse(&self, name: &str, when: &str) {
        let sql = if self.folder.is_some() {
            format!(
                "CREATE TRIGGER {name} BEFORE UPDATE ON webhook_deliveries WHEN {when} \
                 BEGIN SELECT RAISE(ABORT, 'refused'); END"
            )
        } else {
            format!(
                "CREATE FUNCTION {name}() RETURNS trigger AS 'BEGIN RAISE EXCEPTION ''refused''; END' LANGUAGE plpgsql; \
                 CREATE TRIGGER {name} BEFORE UPDATE ON webhook_deliveries FOR EACH ROW WHEN ({when}) \
                 EXECUTE FUNCTION {name}()"
            )
        };
        self.raw.execute_unprepared(&sql).await.unwrap();
    }

    /// A running batch.
    pub async fn batch(&self, webhook: Option<WebhookTarget>, endpoint: Option<&WebhookEndpointId>) -> Batch {
        self.batch_of("", webhook, endpoint).await
    }

    /// The same, of this owner.
    pub async fn batch_of(
        &self,
        owner: &str,
        webhook: Option<WebhookTarget>,
        endpoint: Option<&WebhookEndpointId>,
    ) -> Batch {
        let id = FileId::generate();
        let file = File {
            object_key: Some(format!("inputs/{id}")),
            id: id.clone(),
            owner: owner.into(),
            kind: FileKind::Input,
            filename: "in.jsonl".into(),
            bytes: 1_000,
            line_count: LINES.into(),
            models: vec!["m".into()],
            endpoint: Some(Endpoint::ChatCompletions),
            created_at: Timestamp::now(),
            expires_at: None,
            crc32c: None,
        };
        let span = SegmentSpan {
            index: SegmentIndex(0),
            first_line: 1,
            line_span: LINES,
            requests: LINES,
            offset: 0,
            length: 1_000,
            models: 1,
            crc32c: None,
        };
        self.store.insert_file(&file, None, &[span]).await.unwrap();
        let new = NewBatch {
            owner: owner.into(),
            input_file_id: id,
            endpoint: Endpoint::ChatCompletions,
            completion_window: Duration::from_secs(86_400),
            priority: Priority::default(),
            metadata: [("name".to_owned(), "café 😀 \"q\"".to_owned())].into(),
            request_id: None,
            request_hash: None,
            webhook,
            webhook_endpoint_id: endpoint.cloned(),
            output_expires_after: None,
        };
        match self.store.create_batch(new).await.unwrap() {
            CreatedBatch::New(batch) => *batch,
            other => panic!("{other:?}"),
        }
    }

    /// Answers some lines of a batch; the rest stays.
    pub async fn part(&self, id: &BatchId, lines: std::ops::Range<u32>) {
        let claimed =
            self.store.claim_segment(&NodeId::generate(), id, -1, Duration::from_secs(600)).await.unwrap().unwrap();
        let part = NewPart {
            object_key: format!("parts/{}", uuid::Uuid::new_v4()),
            output_bytes: 1,
            error_bytes: 0,
            crc32c: 0,
            completed: lines.collect::<LineSet>(),
            failed: LineSet::default(),
            not_run: 0,
            usage: TokenUsage::default(),
        };
        self.store.commit_part(&claimed.segment, claimed.epoch, &part).await.unwrap();
        self.store.release_segment(&claimed.segment, claimed.epoch, 1).await.unwrap();
    }

    pub async fn complete(&self, id: &BatchId) {
        let claimed =
            self.store.claim_segment(&NodeId::generate(), id, -1, Duration::from_secs(600)).await.unwrap().unwrap();
        let object = FinalObject {
            object_key: format!("results/{id}"),
            output_bytes: 10,
            error_bytes: 5,
            output_lines: 98,
            error_lines: 2,
            crc32c: 0,
        };
        self.store.finish_segment(&claimed.segment, claimed.epoch, None, &object, &[]).await.unwrap();
    }

    pub async fn fail(&self, id: &BatchId) {
        let claimed =
            self.store.claim_segment(&NodeId::generate(), id, -1, Duration::from_secs(600)).await.unwrap().unwrap();
        self.fail_as(&claimed).await;
    }

    /// Fails a batch of which a segment is claimed.
    pub async fn fail_as(&self, claimed: &ClaimedSegment) {
        let error =
            BatchError { code: "input_unreadable".into(), message: "gone".into(), line: 0, param: String::new() };
        self.store.fail_batch(&claimed.segment, claimed.epoch, error).await.unwrap();
    }

    pub async fn deliveries(&self, id: &BatchId) -> Vec<DeliveryRecord> {
        let filter = DeliveryFilter { batch_id: Some(id.clone()), ..DeliveryFilter::within(Scope::All) };
        let mut all = self.store.deliveries(&filter, None, 1_000).await.unwrap();
        all.reverse();
        all
    }

    pub async fn attempts(&self, id: &DeliveryId) -> Vec<AttemptRecord> {
        self.store.attempts(id, &Scope::All).await.unwrap()
    }

    pub async fn dead_letters(&self) -> Vec<DeadLetter> {
        self.store.dead_letters(&DeadLetterFilter::within(Scope::All), None, 1_000).await.unwrap()
    }

    pub fn options(&self) -> Options {
        let policy =
            Policy { allow: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()], https_only: false };
        let key = MasterKey::from_base64(&STANDARD.encode([7; 32])).unwrap();
        let millis = Duration::from_millis;
        Options {
            schedule: Schedule::try_new([10, 20, 40, 80, 100].map(millis).to_vec()).unwrap(),
            poll: millis(50),
            drain: Duration::from_secs(10),
            sole_node: true,
            seed: Some(1),
            ..Options::new(Guard::new(policy), Vault::new(Some(key), None))
        }
    }

    pub fn webhooks(&self) -> Webhooks {
        Webhooks::new(self.store.clone(), self.options()).unwrap()
    }

    pub fn start(&self) -> Running {
        Running::start(self.webhooks())
    }
}

/// A deliverer that runs until it is dropped.
pub struct Running {
    pub webhooks: Webhooks,
    stop: DropGuard,
    task: JoinHandle<()>,
}

impl Running {
    pub fn start(webhooks: Webhooks) -> Self {
        let shutdown = CancellationToken::new();
        let (deliverer, store) = (Deliverer::new(webhooks.clone(), shutdown.clone()), webhooks.store().clone());
        let upkeep = Upkeep::new(store.clone(), NodeId::generate(), upkeep::of_webhooks(&webhooks));
        let stop = shutdown.clone();
        let task = tokio::spawn(async move {
            store.free_sweeps().await.unwrap();
            tokio::join!(deliverer.run(), upkeep.run(stop));
        });
        Self { webhooks, stop: shutdown.drop_guard(), task }
    }

    /// Stops in order.
    pub async fn stop(self) {
        self.stop.disarm().cancel();
        self.task.await.unwrap();
    }

    /// Gone from one moment to the next, as by `kill -9`.
    pub async fn kill(self) {
        let _not_told = self.stop.disarm();
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }
}

/// A webhook with quick retries.
pub fn target(url: String) -> WebhookTarget {
    WebhookTarget {
        url,
        secret: None,
        max_attempts: 3,
        timeout: Duration::from_secs(60),
        events: EventFilter::default(),
    }
}

/// The same, signed with [`CANARY`].
pub async fn signed(webhooks: &Webhooks, url: String) -> WebhookTarget {
    let config = WebhookConfig::new(url).secret(Some(CANARY.into())).max_retries(Some(3));
    webhooks.accept(config).await.unwrap()
}

/// Asks again and again until there is an answer.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let asked = tokio::time::timeout(Duration::from_secs(120), async {
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    asked.await.unwrap_or_else(|_| panic!("never: {what}"))
}

/// Waits until nothing of a batch waits or is being sent.
pub async fn settled(db: &Db, id: &BatchId) -> Vec<DeliveryRecord> {
    eventually("settled", || async {
        let all = db.deliveries(id).await;
        (!all.is_empty() && all.iter().all(|one| one.settled_at.is_some())).then_some(all)
    })
    .await
}
