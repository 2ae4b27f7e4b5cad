//! Word of changes from node to node.

use std::time::Duration;

use tidemill::domain::{BatchId, Scope};
use tokio::{
    sync::broadcast::{Receiver, error::TryRecvError},
    time::timeout,
};

use crate::fixture::{Db, new_batch};

const SOON: Duration = Duration::from_secs(5);

async fn heard(changes: &mut Receiver<BatchId>) -> Option<BatchId> {
    timeout(SOON, changes.recv()).await.ok().map(Result::unwrap)
}

/// Until another node's store listens: it begins to in the background.
async fn both_ways(db: &Db, changes: &mut Receiver<BatchId>) {
    for _ in 0..100 {
        let file = db.file(1).await;
        db.create(new_batch(&file.id)).await;
        if timeout(Duration::from_millis(200), changes.recv()).await.is_ok() {
            return;
        }
    }
    panic!("no word of another node's changes");
}

#[tokio::test]
async fn a_commit_is_heard_of_on_other_nodes_once_and_in_order() {
    let Some(db) = Db::postgres().await else { return };
    let other = db.another().await;
    let (mut here, mut there) = (db.store.changes(), other.changes());
    both_ways(&db, &mut there).await;
    while here.try_recv().is_ok() {}

    let batch = db.batch(1).await.id;
    assert_eq!(heard(&mut there).await.as_ref(), Some(&batch));
    db.store.cancel_batch(&batch, &Scope::All).await.unwrap();
    assert_eq!(heard(&mut there).await.as_ref(), Some(&batch));
    // Nothing has changed: there is no word of it.
    db.store.cancel_batch(&batch, &Scope::All).await.unwrap();
    let last = db.batch(1).await.id;
    assert_eq!(heard(&mut there).await.as_ref(), Some(&last));
    assert_eq!(there.try_recv(), Err(TryRecvError::Empty));
    // The node itself hears at once, and not a second time by way of the database.
    let own: Vec<_> = std::iter::from_fn(|| here.try_recv().ok()).collect();
    assert_eq!(own, [batch.clone(), batch, last]);
}

#[tokio::test]
async fn word_comes_again_after_the_connection_was_lost() {
    let Some(db) = Db::postgres().await else { return };
    let other = db.another().await;
    let mut there = other.changes();
    both_ways(&db, &mut there).await;
    let sql = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
               WHERE datname = current_database() AND query LIKE 'LISTEN%'";
    assert!(db.number(sql).await >= 1);
    both_ways(&db, &mut there).await;
}
