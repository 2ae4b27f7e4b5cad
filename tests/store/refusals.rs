//! What the database refuses for good is told from what it can't do now, and hurts nobody but who asked for it.

use tidemill::{
    domain::{BatchError, BatchId, BatchStatus, Epoch, NodeId, Scope, Sequence, lifecycle::Ending},
    store::{BatchFilter, Commit, FileFilter, StoreError},
};

use crate::fixture::{Db, LEASE, LINES, final_object, part};

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
    // A page of one, so that what can't be closed would fill it.
    let page = async |rest: &[BatchId]| db.store.close_windows_but(rest, 1).await.unwrap();
    assert_eq!(page(&[]).await.closed, all[..1]);
    let second = page(&[]).await;
    assert!(second.closed.is_empty() && second.more && second.stuck == all[1..2], "{second:?}");
    assert_eq!(page(&second.stuck).await.closed, all[2..], "what rests is not looked at");
    assert_eq!(db.get(stuck).await.status, BatchStatus::InProgress);
    db.accept("batches").await;
    assert_eq!(db.store.close_windows(10).await.unwrap(), std::slice::from_ref(stuck));
    assert_eq!(db.get(&all[0]).await.status, BatchStatus::Finalizing);
    let claimed = db.claim(&all[0]).await;
    let object = final_object(0, LINES);
    let end = db.store.finish_segment(&claimed.segment, claimed.epoch, None, &object, &[]).await;
    assert_eq!(end.unwrap(), Commit::Done);
}

async fn a_window_that_another_transaction_blocks_keeps_no_other_open(db: Db) {
    // SQLite has one writer: no row is blocked by itself.
    if db.is_sqlite() {
        return;
    }
    let mut all = Vec::new();
    for _ in 0..4 {
        let batch = db.batch(1).await;
        db.store.set_expiry(&batch.id, batch.created_at).await.unwrap();
        all.push(batch.id);
    }
    // What a statement is answered with that waited in vain for a lock.
    let blocked = "RAISE EXCEPTION ''blocked'' USING ERRCODE = ''55P03''";
    db.execute(&format!("CREATE FUNCTION blocked() RETURNS trigger AS 'BEGIN {blocked}; END' LANGUAGE plpgsql")).await;
    let block = async |when: &str| {
        db.execute("DROP TRIGGER IF EXISTS blocked ON batches").await;
        let on = "CREATE TRIGGER blocked BEFORE UPDATE ON batches FOR EACH ROW";
        db.execute(&format!("{on} WHEN ({when}) EXECUTE FUNCTION blocked()")).await;
    };
    block(&format!("NEW.id = '{}'", all[0])).await;
    let page = db.store.close_windows_but(&[], 10).await.unwrap();
    assert_eq!((&page.closed[..], &page.stuck[..]), (&all[1..], &all[..1]));
    // If two fail one after the other, the database is unreachable.
    for _ in 0..2 {
        let batch = db.batch(1).await;
        db.store.set_expiry(&batch.id, batch.created_at).await.unwrap();
    }
    block("true").await;
    assert!(matches!(db.store.close_windows_but(&[], 10).await, Err(StoreError::Unavailable(_))));
}

async fn a_row_that_can_not_be_read_hides_no_other(db: Db) {
    let mut batches = Vec::new();
    for _ in 0..6 {
        batches.push(db.batch(1).await.id);
    }
    let spoil = async |at: usize, set: &str| {
        assert_eq!(db.execute(&format!("UPDATE batches SET {set} WHERE id = '{}'", batches[at])).await, 1);
    };
    spoil(0, "models = 'nonsense'").await;
    spoil(1, "ending = 'nonsense'").await;
    spoil(2, "endpoint = 'nonsense'").await;
    spoil(3, "metadata = 'nonsense'").await;
    let candidates = db.store.candidates(&["m".to_owned()], 10).await.unwrap();
    let mut ids: Vec<_> = candidates.into_iter().map(|one| one.id).collect();
    ids.sort();
    assert_eq!(ids, batches[2..], "a claim needs neither the endpoint nor the metadata to find them");
    // A lease on it would run out and be taken again for ever.
    let before = db.number("SELECT COUNT(*) FROM segments WHERE state = 'leased'").await;
    let node = NodeId::generate();
    let unread = db.store.claim_segment(&node, &batches[2], -1, LEASE).await.unwrap_err();
    assert!(matches!(unread, StoreError::Corrupt(_)), "{unread:?}");
    assert_eq!(db.number("SELECT COUNT(*) FROM segments WHERE state = 'leased'").await, before);

    let held = db.store.claim_segment(&node, &batches[4], -1, LEASE).await.unwrap().unwrap().segment;
    let other = db.store.claim_segment(&node, &batches[5], -1, LEASE).await.unwrap().unwrap().segment;
    spoil(4, "ending = 'nonsense'").await;
    db.store.cancel_batch(&batches[5], &Scope::All).await.unwrap();
    let renewed = db.store.renew_leases(&node, &[held.clone(), other], LEASE).await.unwrap().held;
    assert_eq!(renewed.len(), 2);
    let endings = db.store.endings(&batches).await.unwrap();
    assert_eq!(endings, [(batches[5].clone(), Some(Ending::Cancelled), false)]);

    // Lists: none but what can't be read is missing, and a page is full all the same.
    let last = db.batch(1).await;
    let page = db.store.batches(&BatchFilter::within(Scope::All), None, 2).await.unwrap();
    assert_eq!(page.iter().map(|one| &one.id).collect::<Vec<_>>(), [&last.id, &batches[5]]);
    let one = db.store.batches(&BatchFilter::within(Scope::All), Some(&batches[5]), 1).await.unwrap();
    assert!(one.is_empty(), "{one:?}");
    let (events, reached) = db.store.events_after(&Scope::All, Sequence(0), 1_000).await.unwrap();
    assert!(events.iter().any(|event| event.batch.id == last.id) && reached > Sequence(0));
    db.execute(&format!("UPDATE files SET models = 'x' WHERE id = '{}'", db.get(&last.id).await.input_file_id)).await;
    assert_eq!(db.store.files(&FileFilter::within(Scope::All), None, 3).await.unwrap().len(), 3);
}

async fn a_segment_ends_with_one_line_for_each_of_its_requests(db: Db) {
    let batch = db.batch(1).await;
    let claimed = db.claim(&batch.id).await;
    let before = db.all_rows(&batch.id).await;
    for (output, errors) in [(LINES - 1, 0), (LINES, 1), (0, 0), (0, LINES - 1)] {
        let object = final_object(output, errors);
        let end = db.store.finish_segment(&claimed.segment, claimed.epoch, None, &object, &[]).await;
        assert_eq!(end.unwrap(), Commit::Incomplete, "{output} and {errors} lines of {LINES}");
        assert_eq!(db.all_rows(&batch.id).await, before);
    }
    let object = final_object(LINES - 1, 1);
    let end = db.store.finish_segment(&claimed.segment, claimed.epoch, None, &object, &[]).await;
    assert_eq!(end.unwrap(), Commit::Done);
    let ended = db.get(&batch.id).await;
    assert_eq!(ended.status, BatchStatus::Completed);
    assert_eq!(
        (ended.counts.completed, ended.counts.failed),
        (i64::from(LINES) - 1, 1),
        "what was counted is what there is"
    );
}

async fn a_batch_does_not_end_without_a_line_for_each_of_its_requests(db: Db) {
    let batch = db.batch(2).await;
    let (first, second) = (db.claim(&batch.id).await, db.claim(&batch.id).await);
    assert_eq!(db.finish(&first).await, Commit::Done);
    db.execute(&format!("UPDATE segments SET output_lines = 9 WHERE batch_id = '{}' AND state = 'done'", batch.id))
        .await;
    let before = db.all_rows(&batch.id).await;
    assert_eq!(db.finish(&second).await, Commit::Incomplete);
    assert_eq!(db.all_rows(&batch.id).await, before);
    assert_eq!(db.get(&batch.id).await.status, BatchStatus::InProgress);
}

on_both_databases!(
    a_row_that_can_not_be_read_hides_no_other,
    a_window_that_another_transaction_blocks_keeps_no_other_open,
    a_segment_ends_with_one_line_for_each_of_its_requests,
    a_batch_does_not_end_without_a_line_for_each_of_its_requests,
    a_refusal_is_final_and_leaves_nothing_behind,
    a_value_that_no_column_can_hold_is_refused,
    only_a_run_with_its_lease_can_fail_its_batch,
    a_window_that_can_not_be_closed_keeps_no_other_open,
);
