//! A store on either database, and what most tests begin with.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use sea_orm::{ConnectionTrait, DatabaseConnection, Statement};
use tempfile::TempDir;
use tidemill::{
    domain::{
        Batch, BatchId, Endpoint, File, FileId, FileKind, LineSet, NewBatch, NodeId, Owner, Priority, Scope,
        SegmentIndex, SegmentRef, SegmentSpan, Timestamp, TokenUsage,
    },
    store::{ClaimedSegment, Commit, CreatedBatch, FinalObject, InsertedFile, NewPart, StateEvent, Store, StoreError},
};

use crate::support::direct;
use crate::support::postgres;

/// Long enough not to expire in a test.
pub const LEASE: Duration = Duration::from_secs(600);
/// Lines of each segment of [`Db::file`].
pub const LINES: i32 = 10;

/// A database of its own with a store on it.
pub struct Db {
    pub store: Store,
    /// Past the store: for what a store has no business to offer.
    pub raw: DatabaseConnection,
    url: String,
    folder: Option<TempDir>,
}

impl Db {
    pub async fn sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tidemill.db");
        let store = Store::sqlite(&file).await.unwrap();
        let url = format!("sqlite://{}", file.display());
        Self { store, raw: direct::connect(&url).await, url, folder: Some(folder) }
    }

    /// None: there is no PostgreSQL here.
    pub async fn postgres() -> Option<Self> {
        let url = postgres::database().await?;
        let store = Store::postgres(&url, 8).await.unwrap();
        Some(Self { store, raw: direct::connect(&url).await, url, folder: None })
    }

    pub fn is_sqlite(&self) -> bool {
        self.folder.is_some()
    }

    /// Another node's store on the same database.
    pub async fn another(&self) -> Store {
        self.try_another().await.unwrap()
    }

    pub async fn try_another(&self) -> Result<Store, StoreError> {
        match &self.folder {
            Some(folder) => Store::sqlite(&folder.path().join("tidemill.db")).await,
            None => Store::postgres(&self.url, 8).await,
        }
    }

    /// One that waits only so long for another process's lock on the SQLite file before it tries again.
    pub async fn impatient(&self, busy: Duration) -> Store {
        let folder = self.folder.as_ref().expect("a SQLite file");
        Store::sqlite_busy_after(&folder.path().join("tidemill.db"), busy).await.unwrap()
    }

    /// One that has few connections to PostgreSQL.
    pub async fn with_connections(&self, count: u32) -> Store {
        assert!(!self.is_sqlite());
        Store::postgres(&self.url, count).await.unwrap()
    }

    pub async fn execute(&self, sql: &str) -> u64 {
        self.raw.execute_unprepared(sql).await.unwrap().rows_affected()
    }

    /// The one number that a query answers.
    pub async fn number(&self, sql: &str) -> i64 {
        let statement = Statement::from_string(self.raw.get_database_backend(), sql);
        self.raw.query_one_raw(statement).await.unwrap().unwrap().try_get_by_index(0).unwrap()
    }

    /// From now on the database refuses rows of a table for which a condition holds, whoever writes them.
    pub async fn refuse(&self, table: &str, operation: &str, when: &str) {
        let sql = if self.is_sqlite() {
            format!(
                "CREATE TRIGGER refusal BEFORE {operation} ON {table} WHEN {when} BEGIN SELECT RAISE(ABORT, 'refused'); END"
            )
        } else {
            format!(
                "CREATE FUNCTION refusal() RETURNS trigger AS 'BEGIN RAISE EXCEPTION ''refused''; END' LANGUAGE plpgsql; \
                 CREATE TRIGGER refusal BEFORE {operation} ON {table} FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION refusal()"
            )
        };
        self.raw.execute_unprepared(&sql).await.unwrap();
    }

    /// Ends what [`Db::refuse`] began.
    pub async fn accept(&self, table: &str) {
        let on = if self.is_sqlite() { String::new() } else { format!(" ON {table}") };
        self.raw.execute_unprepared(&format!("DROP TRIGGER refusal{on}")).await.unwrap();
    }

    /// Lets a segment's lease run out now.
    pub async fn expire(&self, of: &SegmentRef) {
        let (batch, index) = (&of.batch, of.index);
        let changed = self
            .execute(&format!(
                "UPDATE segments SET lease_expires_at = 1 WHERE batch_id = '{batch}' AND idx = {index} AND state = 'leased'"
            ))
            .await;
        assert_eq!(changed, 1);
    }

    /// An input file of `segments` segments of [`LINES`] lines each.
    pub async fn file(&self, segments: i32) -> File {
        self.file_of("", segments, &["m"]).await
    }

    pub async fn file_of(&self, owner: &str, segments: i32, models: &[&str]) -> File {
        let file = new_file(owner, segments, models);
        let inserted = self.store.insert_file(&file, None, &spans(segments)).await.unwrap();
        assert!(matches!(inserted, InsertedFile::New));
        file
    }

    /// A running batch of `segments` segments.
    pub async fn batch(&self, segments: i32) -> Batch {
        let file = self.file(segments).await;
        self.create(new_batch(&file.id)).await
    }

    pub async fn create(&self, new: NewBatch) -> Batch {
        match self.store.create_batch(new).await.unwrap() {
            CreatedBatch::New(batch) => *batch,
            other => panic!("{other:?}"),
        }
    }

    pub async fn get(&self, id: &BatchId) -> Batch {
        self.store.batch(id, &Scope::All).await.unwrap().unwrap()
    }

    pub async fn events(&self, id: &BatchId) -> Vec<StateEvent> {
        self.store.history(id).await.unwrap().unwrap().1
    }

    pub async fn claim(&self, id: &BatchId) -> ClaimedSegment {
        let claimed = self.store.claim_segment(&NodeId::generate(), id, -1, LEASE).await.unwrap();
        claimed.expect("a segment to claim")
    }

    /// Ends a segment whose lines all went well, without a part.
    pub async fn finish(&self, claimed: &ClaimedSegment) -> Commit {
        let object = final_object(LINES, 0);
        self.store.finish_segment(&claimed.segment, claimed.epoch, None, &object, &[]).await.unwrap()
    }

    /// Every row that a fenced write could have touched, as one text.
    pub async fn all_rows(&self, id: &BatchId) -> String {
        let batch = self.get(id).await;
        let segments = self.store.segments(id, SegmentIndex(0), 1_000).await.unwrap();
        let parts = self.store.parts_from(id, 0, 1_000).await.unwrap();
        let epochs = self
            .number(&format!("SELECT CAST(SUM(epoch * (idx + 1)) AS bigint) FROM segments WHERE batch_id = '{id}'"))
            .await;
        let leased =
            self.number(&format!("SELECT COUNT(*) FROM segments WHERE batch_id = '{id}' AND state = 'leased'")).await;
        let garbage = self.number("SELECT COUNT(*) FROM garbage").await;
        format!("{batch:#?} {segments:#?} {parts:#?} {epochs} {leased} {garbage} {:#?}", self.events(id).await)
    }
}

pub fn new_file(owner: &str, segments: i32, models: &[&str]) -> File {
    let id = FileId::generate();
    File {
        owner: owner.into(),
        kind: FileKind::Input,
        filename: "input.jsonl".to_owned(),
        bytes: i64::from(segments) * 1_000,
        line_count: i64::from(segments * LINES),
        models: models.iter().map(|model| (*model).to_owned()).collect(),
        endpoint: Some(Endpoint::ChatCompletions),
        created_at: Timestamp::now(),
        expires_at: None,
        object_key: Some(format!("inputs/{id}")),
        id,
        crc32c: None,
    }
}

pub fn spans(segments: i32) -> Vec<SegmentSpan> {
    (0..segments)
        .map(|index| SegmentSpan {
            index: SegmentIndex(index),
            first_line: i64::from(index * LINES) + 1,
            line_span: LINES,
            requests: LINES,
            offset: i64::from(index) * 1_000,
            length: 1_000,
            models: 0b1,
            crc32c: None,
        })
        .collect()
}

pub fn new_batch(file: &FileId) -> NewBatch {
    NewBatch {
        owner: Owner::nobody(),
        input_file_id: file.clone(),
        endpoint: Endpoint::ChatCompletions,
        completion_window: Duration::from_secs(24 * 3_600),
        priority: Priority::default(),
        metadata: [("team".to_owned(), "a".to_owned())].into(),
        request_id: None,
        request_hash: None,
        webhook: None,
        webhook_endpoint_id: None,
        output_expires_after: None,
    }
}

/// A new object's name.
pub fn key() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("objects/{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A part of these lines.
pub fn part(completed: impl IntoIterator<Item = u32>, failed: impl IntoIterator<Item = u32>) -> NewPart {
    let (completed, failed): (LineSet, LineSet) = (completed.into_iter().collect(), failed.into_iter().collect());
    let lines = i64::try_from(completed.len()).unwrap();
    NewPart {
        object_key: key(),
        output_bytes: completed.len() as u64 * 100,
        error_bytes: failed.len() as u64 * 50,
        crc32c: 0xffff_fff0,
        not_run: 0,
        usage: TokenUsage {
            input: lines * 7,
            cached_input: lines,
            output: lines * 5,
            reasoning: lines * 2,
            total: lines * 12,
        },
        completed,
        failed,
    }
}

pub fn final_object(output_lines: i32, error_lines: i32) -> FinalObject {
    let (output_lines, error_lines) = (u64::try_from(output_lines).unwrap(), u64::try_from(error_lines).unwrap());
    FinalObject {
        object_key: key(),
        output_bytes: output_lines * 100,
        error_bytes: error_lines * 50,
        output_lines,
        error_lines,
        crc32c: 0xffff_fff0,
    }
}

/// Makes a test of each function on each database.
#[macro_export]
macro_rules! on_both_databases {
    ($($name:ident),* $(,)?) => {
        mod on_sqlite {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                super::$name($crate::fixture::Db::sqlite().await).await;
            })*
        }
        mod on_postgres {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $name() {
                if let Some(db) = $crate::fixture::Db::postgres().await {
                    super::$name(db).await;
                }
            })*
        }
    };
}
