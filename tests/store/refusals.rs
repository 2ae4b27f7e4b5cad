//! What the database refuses for good is told from what it can't do now, and hurts nobody but who asked for it.

use tidemill::{
    domain::{BatchError, BatchStatus, Epoch},
    store::{Commit, StoreError},
};

use crate::fixture::{Db, LINES, final_object, part};

fn error() -> BatchError {
    BatchError { code: "internal_error".into(), message: "refused".into(), line: 0, param: String::new() }
}

async fn a_refusal_is_final_and_leaves_nothing_behind(db: Db) {
    let batch = db.batch(1).await;
    let claimed = db.claim(&batch.id).await;
    let before = db.all_rows(&batch.id).await;
    db.refuse("parts", "INSERT", "NEW.seq > 0").await;
    let new = part(0..1, []);
    let refused = db.store.commit_part(&claimed.segment, claimed.epoch, &new).await.unwrap_err();
    assert!(matches!(refused, StoreError::Rejected(_)), "{refused:?}");
    assert!(refused.is_final());
    assert_eq!(db.all_rows(&batch.id).await, before);
    db.accept("parts").await;
    assert_eq!(db.store.commit_part(&claimed.segment, claimed.epoch, &new).await.unwrap(), Commit::Done);
}

async fn a_value_that_no_column_can_hold_is_refused(db: Db) {
    // PostgreSQL has no NUL in texts; SQLite has one.
    let refused = db.store.register_worker("http://worker\0").await;
    assert_eq!(refused.is_err(), !db.is_sqlite());
    if let Err(refused) = refused {
        assert!(matches!(refused, StoreError::Rejected(_)), "{refused:?}");
    }
}

async fn only_a_run_with_its_lease_can_fail_its_batch(db: Db) {
    let batch = db.batch(2).await;
    let claimed = db.claim(&batch.id).await;
    db.expire(&claimed.segment).await;
    let again = db.claim(&batch.id).await;
    assert_eq!((&again.segment, again.epoch), (&claimed.segment, Epoch(2)));
    let before = db.all_rows(&batch.id).await;
    // The node that lost its lease sees other objects, or was frozen: what it thinks of the batch counts for nothing.
    let fenced = db.store.fail_batch(&claimed.segment, claimed.epoch, error()).await.unwrap();
    assert_eq!(fenced, Commit::Fenced);
    assert_eq!(db.all_rows(&batch.id).await, before);
    db.store.release_segment(&again.segment, again.epoch, 1).await.unwrap();
    assert_eq!(db.store.fail_batch(&again.segment, again.epoch, error()).await.unwrap(), Commit::Fenced);
    let last = db.claim(&batch.id).await;
    assert_eq!(db.store.fail_batch(&last.segment, last.epoch, error()).await.unwrap(), Commit::Done);
    let failed = db.get(&batch.id).await;
    assert_eq!((failed.status, failed.errors), (BatchStatus::Failed, vec![error()]));
}

async fn a_window_that_can_not_be_closed_keeps_no_other_open(db: Db) {
    let mut all = Vec::new();
    for _ in 0..3 {
        let batch = db.batch(1).await;
        db.store.set_expiry(&batch.id, batch.created_at).await.unwrap();
        all.push(batch.id);
    }
    let stuck = &all[1];
    db.refuse("batches", "UPDATE", &format!("NEW.id = '{stuck}'")).await;
    let mut closed = db.store.close_windows(10).await.unwrap();
    closed.sort();
    assert_eq!(closed, [all[0].clone(), all[2].clone()]);
    assert_eq!(db.get(stuck).await.status, BatchStatus::InProgress);
    db.accept("batches").await;
    assert_eq!(db.store.close_windows(10).await.unwrap(), std::slice::from_ref(stuck));
    assert_eq!(db.get(&all[0]).await.status, BatchStatus::Finalizing);
    let claimed = db.claim(&all[0]).await;
    let object = final_object(0, LINES);
    let end = db.store.finish_segment(&claimed.segment, claimed.epoch, None, &object, &[]).await;
    assert_eq!(end.unwrap(), Commit::Done);
}

on_both_databases!(
    a_refusal_is_final_and_leaves_nothing_behind,
    a_value_that_no_column_can_hold_is_refused,
    only_a_run_with_its_lease_can_fail_its_batch,
    a_window_that_can_not_be_closed_keeps_no_other_open,
);
