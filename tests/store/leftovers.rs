//! Objects of results that no row names.

use futures::future::join_all;
use tidemill::{
    domain::{BatchError, BatchId, Epoch, Scope, SegmentIndex, SegmentRef},
    results::object_key,
    store::{Commit, DeletedFile, FinalObject, NewPart},
};

use crate::fixture::{Db, LINES, final_object, new_batch, part};

fn named(of: &SegmentRef, epoch: Epoch, number: u32) -> NewPart {
    NewPart { object_key: object_key(of, epoch, number), ..part([number], []) }
}

/// As if an hour had passed.
async fn due(db: &Db) -> Vec<BatchId> {
    db.execute("UPDATE leftovers SET look_after = 1 WHERE look_after > 1").await;
    db.store.take_leftovers(100).await.unwrap()
}

async fn what_no_row_names_is_found_once_the_batch_has_ended(db: Db) {
    let file = db.file(2).await;
    let batch = db.create(new_batch(&file.id)).await;
    let first = db.claim(&batch.id).await;
    let other = db.claim(&batch.id).await;
    let (of, epoch) = (&first.segment, first.epoch);
    let committed = named(of, epoch, 1);
    assert_eq!(db.store.commit_part(of, epoch, &committed).await.unwrap(), Commit::Done);
    // The other segment has ended; its part was merged.
    let merged = named(&other.segment, other.epoch, 1);
    db.store.commit_part(&other.segment, other.epoch, &merged).await.unwrap();
    let last = FinalObject { object_key: object_key(&other.segment, other.epoch, 2), ..final_object(LINES, 0) };
    let superseded = [merged.object_key.clone()];
    let finished = db.store.finish_segment(&other.segment, other.epoch, None, &last, &superseded).await.unwrap();
    assert_eq!(finished, Commit::Done);

    let unnamed: Vec<String> = vec![
        object_key(of, epoch, 2),
        object_key(of, Epoch(epoch.0 + 1), 1),
        object_key(&other.segment, other.epoch, 3),
    ];
    let mut found = unnamed.clone();
    found.extend([committed.object_key.clone(), merged.object_key.clone(), last.object_key.clone()]);
    // Whatever else lies there was written by somebody else.
    found.push(format!("results/{}/notes.txt", batch.id));
    found.push(object_key(&SegmentRef { batch: BatchId::generate(), index: SegmentIndex(0) }, epoch, 9));
    let look = async || db.store.unnamed_objects(&batch.id, found.clone()).await.unwrap();
    assert!(look().await.is_empty(), "what a run has written it may yet name");
    assert!(due(&db).await.is_empty());

    let error = BatchError { code: "input_unreadable".into(), message: "gone".into(), line: 0, param: String::new() };
    assert_eq!(db.store.fail_batch(of, epoch, error).await.unwrap(), Commit::Done);
    assert!(db.store.take_leftovers(9).await.unwrap().is_empty(), "not at once: a run may still be writing");
    assert_eq!(due(&db).await, std::slice::from_ref(&batch.id));
    assert_eq!(look().await, unnamed);
    // What was let go of is deleted in its time, once readers are done with it.
    assert_eq!(db.store.delete_file(&file.id, &Scope::All).await.unwrap(), DeletedFile::Deleted);
    assert_eq!(look().await, unnamed);
}

async fn every_end_of_a_batch_is_noted_and_each_is_taken_by_one_node(db: Db) {
    let mut ended = Vec::new();
    for cancelled in [false, true, false] {
        let batch = db.batch(1).await;
        if cancelled {
            db.store.cancel_batch(&batch.id, &Scope::All).await.unwrap();
        }
        let claimed = db.claim(&batch.id).await;
        assert_eq!(db.finish(&claimed).await, Commit::Done);
        ended.push(batch.id);
    }
    let running = db.batch(1).await;
    db.execute("UPDATE leftovers SET look_after = 1").await;
    let stores = [db.store.clone(), db.another().await, db.another().await];
    let taken = join_all(stores.iter().map(|store| store.take_leftovers(1))).await;
    let mut taken: Vec<BatchId> = taken.into_iter().flat_map(Result::unwrap).collect();
    taken.sort();
    ended.sort();
    assert_eq!(taken, ended);
    assert!(db.store.take_leftovers(9).await.unwrap().is_empty(), "they are being looked at");
    // A run that lost its lease has written once more meanwhile.
    db.store.note_leftovers(&ended[0]).await.unwrap();
    for id in &ended {
        db.store.forget_leftovers(id).await.unwrap();
    }
    assert_eq!(due(&db).await, [ended[0].clone()], "a note that came later is not forgotten");
    assert!(!ended.contains(&running.id));
}

on_both_databases!(
    what_no_row_names_is_found_once_the_batch_has_ended,
    every_end_of_a_batch_is_noted_and_each_is_taken_by_one_node,
);
