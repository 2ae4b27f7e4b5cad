//! State changes and the events that tell of them.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use futures::future::join_all;
use tidemill::{
    domain::{BatchError, BatchId, BatchStatus, NewBatch, Scope, Sequence},
    store::{CancelledBatch, Commit},
};

use crate::fixture::{Db, new_batch, part};

async fn path(db: &Db, id: &BatchId) -> Vec<BatchStatus> {
    db.events(id).await.into_iter().map(|event| event.batch.status).collect()
}

async fn cancelling_twice_is_cancelling_once(db: Db) {
    let batch = db.batch(2).await;
    let (one, two) = (db.claim(&batch.id).await, db.claim(&batch.id).await);
    let cancel = async || match db.store.cancel_batch(&batch.id, &Scope::All).await.unwrap() {
        CancelledBatch::Batch(batch) => *batch,
        other => panic!("{other:?}"),
    };
    let mut changes = db.store.changes();
    let once = cancel().await;
    assert_eq!(changes.try_recv().as_ref(), Ok(&batch.id));
    assert_eq!(once.status, BatchStatus::Cancelling);
    assert_eq!(cancel().await, once);
    assert!(changes.try_recv().is_err(), "nothing changed");
    assert_eq!(db.get(&batch.id).await, once);
    // What is answered already counts still.
    assert_eq!(db.store.commit_part(&one.segment, one.epoch, &part(0..2, [])).await.unwrap(), Commit::Done);
    assert_eq!(db.finish(&one).await, Commit::Done);
    assert_eq!(db.get(&batch.id).await.status, BatchStatus::Cancelling);
    assert_eq!(db.finish(&two).await, Commit::Done);
    use BatchStatus::{Cancelled, Cancelling, InProgress, Validating};
    assert_eq!(path(&db, &batch.id).await, [Validating, InProgress, Cancelling, Cancelled]);
    let ended = db.get(&batch.id).await;
    assert!(ended.output_file_id.is_some(), "partial results are results");
    assert_eq!(cancel().await, ended);
    assert_eq!(path(&db, &batch.id).await.len(), 4);
}

async fn what_has_ended_is_not_cancelled(db: Db) {
    let batch = db.batch(1).await;
    let claimed = db.claim(&batch.id).await;
    db.finish(&claimed).await;
    let done = db.get(&batch.id).await;
    let refused = db.store.cancel_batch(&batch.id, &Scope::All).await.unwrap();
    assert!(matches!(refused, CancelledBatch::Ended(batch) if *batch == done));
    assert_eq!(db.get(&batch.id).await, done);
    assert_eq!(path(&db, &batch.id).await.len(), 4);
    let missing = db.store.cancel_batch(&BatchId::generate(), &Scope::All).await.unwrap();
    assert!(matches!(missing, CancelledBatch::NotFound));
}

async fn a_cancel_against_the_last_answer_has_one_winner(db: Db) {
    for _ in 0..8 {
        let batch = db.batch(1).await;
        let claimed = db.claim(&batch.id).await;
        let other = db.another().await;
        let (end, cancelled) = tokio::join!(db.finish(&claimed), other.cancel_batch(&batch.id, &Scope::All));
        assert_eq!(end, Commit::Done);
        use BatchStatus::{Cancelled, Cancelling, Completed, Finalizing, InProgress, Validating};
        let path = path(&db, &batch.id).await;
        match cancelled.unwrap() {
            CancelledBatch::Batch(_) => assert_eq!(path, [Validating, InProgress, Cancelling, Cancelled]),
            CancelledBatch::Ended(_) => assert_eq!(path, [Validating, InProgress, Finalizing, Completed]),
            CancelledBatch::NotFound => panic!("it is there"),
        }
        other.close().await;
    }
}

async fn windows_close_once_their_time_is_up(db: Db) {
    let (late, early) = (db.batch(1).await, db.batch(1).await);
    let claimed = db.claim(&late.id).await;
    assert!(db.store.close_windows(10).await.unwrap().is_empty());
    db.store.set_expiry(&late.id, late.created_at).await.unwrap();
    let other = db.another().await;
    let (one, two) = tokio::join!(db.store.close_windows(10), other.close_windows(10));
    assert_eq!([one.unwrap(), two.unwrap()].concat(), std::slice::from_ref(&late.id), "by one of two nodes");
    assert!(db.store.close_windows(10).await.unwrap().is_empty());
    assert_eq!(db.get(&late.id).await.status, BatchStatus::Finalizing);
    assert_eq!(db.get(&early.id).await.status, BatchStatus::InProgress);
    assert_eq!(db.finish(&claimed).await, Commit::Done);
    use BatchStatus::{Expired, Finalizing, InProgress, Validating};
    assert_eq!(path(&db, &late.id).await, [Validating, InProgress, Finalizing, Expired]);
    let refused = db.store.cancel_batch(&late.id, &Scope::All).await.unwrap();
    assert!(matches!(refused, CancelledBatch::Ended(_)));
}

async fn no_more_windows_close_than_asked_for(db: Db) {
    for _ in 0..3 {
        db.batch(1).await;
    }
    for _ in 0..5 {
        let batch = db.batch(1).await;
        db.store.set_expiry(&batch.id, batch.created_at).await.unwrap();
    }
    let mut closed = Vec::new();
    for expected in [2, 2, 1, 0] {
        let some = db.store.close_windows(2).await.unwrap();
        assert_eq!(some.len(), expected);
        closed.extend(some);
    }
    closed.sort();
    closed.dedup();
    assert_eq!(closed.len(), 5);
}

async fn a_batch_that_cannot_run_fails_with_its_reason(db: Db) {
    let batch = db.batch(1).await;
    let error = BatchError { code: "input_missing".into(), message: "gone".into(), line: 3, param: "url".into() };
    let claimed = db.claim(&batch.id).await;
    let fail = async |error| db.store.fail_batch(&claimed.segment, claimed.epoch, error).await.unwrap();
    assert_eq!(fail(error.clone()).await, Commit::Done);
    let failed = db.get(&batch.id).await;
    assert_eq!((failed.status, &failed.errors), (BatchStatus::Failed, &vec![error.clone()]));
    assert!(failed.times.failed.is_some() && failed.output_file_id.is_none());
    assert_eq!(fail(BatchError { code: "other".into(), ..error }).await, Commit::Fenced);
    assert_eq!(db.get(&batch.id).await, failed, "once");
    assert_eq!(path(&db, &batch.id).await, [BatchStatus::Validating, BatchStatus::InProgress, BatchStatus::Failed]);
}

/// While many commit at once, a reader that goes on from the last it has seen misses none.
async fn sequences_grow_in_commit_order(db: Db) {
    const WRITERS: usize = 6;
    const EACH: usize = 8;
    let file = db.file(1).await;
    let done = Arc::new(AtomicBool::new(false));
    let reader = tokio::spawn({
        let (store, done) = (db.another().await, done.clone());
        async move {
            let (mut seen, mut at) = (Vec::new(), Sequence(0));
            loop {
                let last = done.load(Ordering::Acquire);
                let (events, reached) = store.events_after(&Scope::All, at, 7).await.unwrap();
                if events.is_empty() && last {
                    return seen;
                }
                seen.extend(events.into_iter().map(|event| event.sequence.0));
                at = reached;
            }
        }
    });
    let stores = [db.store.clone(), db.another().await];
    join_all((0..WRITERS).map(|writer| {
        let (store, new) = (stores[writer % 2].clone(), new_batch(&file.id));
        tokio::spawn(async move {
            for _ in 0..EACH {
                store.create_batch(new.clone()).await.unwrap();
            }
        })
    }))
    .await;
    done.store(true, Ordering::Release);
    let expected: Vec<i64> = (1..=i64::try_from(WRITERS * EACH * 2).unwrap()).collect();
    assert_eq!(reader.await.unwrap(), expected, "two each, none missed, none twice");
    assert_eq!(db.store.last_sequence().await.unwrap().0, *expected.last().unwrap());
}

async fn events_are_paged_and_kept_from_other_owners(db: Db) {
    let (ours, theirs) = (db.file_of("a", 1, &["m"]).await, db.file_of("b", 1, &["m"]).await);
    for (owner, file) in [("a", &ours), ("b", &theirs), ("b", &theirs), ("b", &theirs), ("a", &ours)] {
        db.create(NewBatch { owner: owner.into(), ..new_batch(&file.id) }).await;
    }
    let (mut seen, mut at, mut pages) = (Vec::new(), Sequence(0), 0);
    loop {
        let (events, reached) = db.store.events_after(&Scope::Of("a".into()), at, 3).await.unwrap();
        seen.extend(events.into_iter().map(|event| (event.sequence.0, event.batch.owner)));
        if reached == at {
            break;
        }
        (at, pages) = (reached, pages + 1);
    }
    assert_eq!(seen, [1, 2, 9, 10].map(|sequence| (sequence, "a".into())));
    assert_eq!((at, pages), (Sequence(10), 4), "pages of others' events are passed, not taken for the end");
    assert_eq!(db.store.unfinished(&Scope::Of("a".into()), 10).await.unwrap().len(), 2);
}

on_both_databases!(
    cancelling_twice_is_cancelling_once,
    what_has_ended_is_not_cancelled,
    a_cancel_against_the_last_answer_has_one_winner,
    windows_close_once_their_time_is_up,
    no_more_windows_close_than_asked_for,
    a_batch_that_cannot_run_fails_with_its_reason,
    sequences_grow_in_commit_order,
    events_are_paged_and_kept_from_other_owners,
);
