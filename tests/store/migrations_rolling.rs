//! Old and new programs on one database: the old one runs on what the new one has added to, and starts on it, unless it is
//! told that it may not.

use std::time::Duration;

use sea_orm::{ConnectionTrait, TransactionTrait};
use tidemill::{
    domain::{BatchStatus, NodeId, Scope},
    store::{CancelledBatch, Commit, Store, StoreError},
};
use tidemill_migrations::{SchemaManager, requires};

use crate::fixture::{Db, LEASE, LINES, final_object, new_batch, new_file, part, spans};

const FUTURE: &str = "m29990101_000001_future";

/// What a later release may do without a word to this one: columns that are null or have a default, a table, an index.
async fn a_later_release_migrates(db: &Db) {
    for table in ["batches", "segments", "parts", "files", "batch_events", "workers", "nodes", "webhook_deliveries"] {
        db.execute(&format!("ALTER TABLE {table} ADD COLUMN later_note text")).await;
        db.execute(&format!("ALTER TABLE {table} ADD COLUMN later_count bigint NOT NULL DEFAULT 0")).await;
    }
    db.execute("CREATE TABLE later (id text PRIMARY KEY)").await;
    db.execute("CREATE INDEX later_batches ON batches (later_count, id)").await;
    db.execute(&format!("INSERT INTO seaql_migrations (version, applied_at) VALUES ('{FUTURE}', 1)")).await;
}

/// A day's work of a node: everything that reads or writes rows of the changed tables.
async fn works(store: &Store) {
    let file = new_file("", 2, &["m"]);
    store.insert_file(&file, None, &spans(2)).await.unwrap();
    let tidemill::store::CreatedBatch::New(batch) = store.create_batch(new_batch(&file.id)).await.unwrap() else {
        panic!("a new one")
    };
    let claim = async || store.claim_segment(&NodeId::generate(), &batch.id, -1, LEASE).await.unwrap().unwrap();
    let claimed = claim().await;
    let committed = store.commit_part(&claimed.segment, claimed.epoch, &part([0, 1, 2], [3])).await.unwrap();
    assert_eq!(committed, Commit::Done);
    assert_eq!(store.parts_of(&claimed.segment).await.unwrap().len(), 1);
    let object = final_object(LINES, 0);
    let finish = async |claimed: &tidemill::store::ClaimedSegment| {
        store.finish_segment(&claimed.segment, claimed.epoch, Some(&part(4..10, [])), &object, &[]).await.unwrap()
    };
    assert_eq!(finish(&claimed).await, Commit::Done);
    assert!(matches!(store.cancel_batch(&batch.id, &Scope::All).await.unwrap(), CancelledBatch::Batch(_)));
    let claimed = claim().await;
    let object = final_object(LINES, 0);
    let rest = part(0..10, []);
    let ended = store.finish_segment(&claimed.segment, claimed.epoch, Some(&rest), &object, &[]).await.unwrap();
    assert_eq!(ended, Commit::Done);
    let batch = store.batch(&batch.id, &Scope::All).await.unwrap().unwrap();
    assert_eq!(batch.status, BatchStatus::Cancelled);
    assert_eq!(store.history(&batch.id).await.unwrap().unwrap().1.len(), 4);
    let node = NodeId::generate();
    store.heartbeat(&node, "0.0.1", "api").await.unwrap();
    store.configure_workers(&["http://a:1".to_owned()]).await.unwrap();
    store.leave(&node).await.unwrap();
}

async fn a_node_goes_on_while_a_later_release_migrates(db: Db) {
    // With statements that are prepared, and connections that have seen the schema as it was.
    works(&db.store).await;
    a_later_release_migrates(&db).await;
    works(&db.store).await;
}

async fn a_node_starts_on_what_a_later_release_has_added_to(db: Db) {
    works(&db.store).await;
    a_later_release_migrates(&db).await;
    let store = db.another().await;
    works(&store).await;
    let migrations = store.migrations().await.unwrap();
    assert_eq!(migrations.last(), Some(&(FUTURE.to_owned(), true)));
    assert!(migrations.iter().all(|(_, applied)| *applied), "{migrations:?}");
    assert_eq!(db.number(&format!("SELECT COUNT(*) FROM seaql_migrations WHERE version = '{FUTURE}'")).await, 1);
}

async fn a_node_refuses_to_start_where_it_is_told_that_it_may_not(db: Db) {
    a_later_release_migrates(&db).await;
    requires::require(&SchemaManager::new(&db.raw), FUTURE).await.unwrap();
    let refusal = db.try_another().await.err().expect("it refuses");
    assert!(matches!(refusal, StoreError::Open(_)), "{refusal:?}");
    let text = refusal.to_string();
    assert!(text.contains(FUTURE) && text.contains("start the newer version") && text.contains("backup"), "{text}");
    // Once that is taken back, it starts.
    requires::release(&SchemaManager::new(&db.raw)).await.unwrap();
    works(&db.another().await).await;
    // One that it knows keeps nobody out.
    requires::require(&SchemaManager::new(&db.raw), "m20261124_000002_webhooks").await.unwrap();
    requires::require(&SchemaManager::new(&db.raw), "m20261124_000001_foundation").await.unwrap();
    db.another().await;
}

async fn a_database_of_another_line_is_refused(db: Db) {
    a_later_release_migrates(&db).await;
    db.execute("DELETE FROM seaql_migrations WHERE version = 'm20261124_000002_webhooks'").await;
    let refusal = db.try_another().await.err().expect("it refuses").to_string();
    assert!(refusal.contains(FUTURE) && refusal.contains("webhooks"), "{refusal}");
    // Nothing was touched.
    assert_eq!(db.number("SELECT COUNT(*) FROM webhook_deliveries").await, 0);
}

/// A node's transaction holds what the migration wants, and then wants what the migration holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_gives_way_to_nodes_that_work_and_is_tried_again() {
    let Some(db) = Db::postgres().await else { return };
    let node = db.raw.begin().await.unwrap();
    node.execute_unprepared("LOCK TABLE seaql_migrations IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let waiting = "SELECT COUNT(*) FROM pg_locks WHERE NOT granted AND relation = 'seaql_migrations'::regclass";
    let (started, ()) = tokio::join!(db.try_another(), async {
        while db.number(waiting).await == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let lock = i64::from_be_bytes(*b"tidemill");
        node.execute_unprepared(&format!("SELECT pg_advisory_xact_lock({lock})"))
            .await
            .expect("the node is not the one");
        node.commit().await.unwrap();
    });
    works(&started.expect("it starts all the same")).await;
}

on_both_databases!(
    a_node_goes_on_while_a_later_release_migrates,
    a_node_starts_on_what_a_later_release_has_added_to,
    a_node_refuses_to_start_where_it_is_told_that_it_may_not,
    a_database_of_another_line_is_refused,
);
