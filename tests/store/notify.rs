//! Word of changes from node to node.

use std::time::Duration;

use tidemill::domain::{BatchId, Scope};
use tokio::{
    sync::broadcast::{Receiver, error::TryRecvError},
    time::timeout,
};

use crate::{
    fixture::{Db, new_batch},
    support::patience::ends,
};

async fn heard(changes: &mut Receiver<BatchId>) -> BatchId {
    ends("word of a change", changes.recv()).await.unwrap()
}

/// Until another node's store listens: it begins to in the background.
async fn both_ways(db: &Db, changes: &mut Receiver<BatchId>) {
    ends("word of another node's changes", async {
        loop {
            let file = db.file(1).await;
            let last = db.create(new_batch(&file.id)).await.id;
            // Word may be late: the last one is waited for too, so that nothing is left to hear.
            let mut word = timeout(Duration::from_millis(200), changes.recv()).await.ok().map(Result::unwrap);
            while let Some(id) = word {
                if id == last {
                    return;
                }
                word = Some(changes.recv().await.unwrap());
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_commit_is_heard_of_on_other_nodes_once_and_in_order() {
    let Some(db) = Db::postgres().await else { return };
    let other = db.another().await;
    let (mut here, mut there) = (db.store.changes(), other.changes());
    both_ways(&db, &mut there).await;
    while here.try_recv().is_ok() {}

    let batch = db.batch(1).await.id;
    assert_eq!(heard(&mut there).await, batch);
    db.store.cancel_batch(&batch, &Scope::All).await.unwrap();
    assert_eq!(heard(&mut there).await, batch);
    // Nothing has changed: there is no word of it.
    db.store.cancel_batch(&batch, &Scope::All).await.unwrap();
    let last = db.batch(1).await.id;
    assert_eq!(heard(&mut there).await, last);
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
