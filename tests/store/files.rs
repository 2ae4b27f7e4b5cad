//! Files, and the objects that nothing names any more.

use futures::future::join_all;
use tidemill::{
    domain::{BatchError, FileId, Scope, SegmentIndex},
    store::{Commit, CreatedBatch, DeletedFile, FileFilter, InsertedFile, PageOrder},
};

use crate::fixture::{Db, new_batch, new_file, part, spans};

async fn a_file_is_read_back_whole(db: Db) {
    // More segments than go into one statement.
    let file = new_file("alice", 4_500, &["m", "ü \"n\""]);
    let segments = spans(4_500);
    assert!(matches!(db.store.insert_file(&file, Some("r"), &segments).await.unwrap(), InsertedFile::New));
    assert_eq!(db.store.file(&file.id, &Scope::All).await.unwrap(), Some(file.clone()));
    assert_eq!(db.store.file_segments(&file.id).await.unwrap(), segments);
    assert_eq!(db.store.file_by_request_id(&"alice".into(), "r").await.unwrap(), Some(file));
    assert_eq!(db.store.file_by_request_id(&"bob".into(), "r").await.unwrap(), None);
    assert_eq!(db.store.file(&FileId::generate(), &Scope::All).await.unwrap(), None);
}

async fn the_same_request_id_is_the_same_file(db: Db) {
    let stores = [db.store.clone(), db.another().await];
    let uploads = join_all((0..8).map(|turn| {
        let store = stores[turn % 2].clone();
        async move {
            let file = new_file("", 2, &["m"]);
            let key = file.object_key.clone().unwrap();
            store.begin_upload(&key).await.unwrap();
            (store.insert_file(&file, Some("r"), &spans(2)).await.unwrap(), file)
        }
    }))
    .await;
    let winner = db.store.file_by_request_id(&"".into(), "r").await.unwrap().unwrap();
    let mut new = 0;
    for (inserted, file) in uploads {
        match inserted {
            InsertedFile::New => {
                new += 1;
                assert_eq!(file, winner);
            }
            InsertedFile::Existing(existing) => assert_eq!(*existing, winner),
            InsertedFile::UploadEnded => panic!("it completes none"),
        }
    }
    assert_eq!(new, 1);
    assert_eq!(db.store.count_files().await.unwrap(), 1);
    assert_eq!(db.number("SELECT COUNT(*) FROM file_segments").await, 2);
    assert_eq!(db.number("SELECT COUNT(*) FROM garbage").await, 7, "the losers' objects are left to be deleted");
}

async fn a_file_in_use_is_not_deleted(db: Db) {
    let file = db.file(1).await;
    let (running, other) = (db.create(new_batch(&file.id)).await, db.create(new_batch(&file.id)).await);
    let user = db.store.delete_file(&file.id, &Scope::All).await.unwrap();
    assert!(matches!(user, DeletedFile::InUse(id) if id == running.id || id == other.id));
    let claimed = db.claim(&running.id).await;
    db.finish(&claimed).await;
    assert_eq!(db.store.delete_file(&file.id, &Scope::All).await.unwrap(), DeletedFile::InUse(other.id.clone()));
    db.store.cancel_batch(&other.id, &Scope::All).await.unwrap();
    assert_eq!(
        db.store.delete_file(&file.id, &Scope::All).await.unwrap(),
        DeletedFile::InUse(other.id.clone()),
        "still cancelling"
    );
    let claimed = db.claim(&other.id).await;
    db.finish(&claimed).await;
    assert_eq!(db.store.delete_file(&file.id, &Scope::All).await.unwrap(), DeletedFile::Deleted);
    assert_eq!(db.store.delete_file(&file.id, &Scope::All).await.unwrap(), DeletedFile::NotFound);
    assert!(db.store.file_segments(&file.id).await.unwrap().is_empty());
    assert_eq!(db.number("SELECT COUNT(*) FROM garbage").await, 1);
    assert!(db.store.due_garbage(10).await.unwrap().is_empty(), "readers that have begun may go on for a while");
}

async fn a_file_is_deleted_or_used_but_not_both(db: Db) {
    for _ in 0..12 {
        let file = db.file(1).await;
        let other = db.store.clone();
        let (created, deleted) =
            tokio::join!(db.store.create_batch(new_batch(&file.id)), other.delete_file(&file.id, &Scope::All));
        match (created.unwrap(), deleted.unwrap()) {
            (CreatedBatch::New(batch), DeletedFile::InUse(user)) => {
                assert_eq!(batch.id, user);
                assert_eq!(batch.segments, 1);
            }
            (CreatedBatch::FileNotFound, DeletedFile::Deleted) => {}
            other => panic!("{other:?}"),
        }
    }
}

async fn uploads_that_break_off_leave_garbage_and_others_none(db: Db) {
    let due = async || {
        let mut due = db.store.due_garbage(10).await.unwrap();
        due.sort();
        due
    };
    let file = db.file(1).await;
    let whole = new_file("", 1, &["m"]);
    let key = whole.object_key.clone().unwrap();
    for key in [&key, "inputs/broken", "inputs/abandoned"] {
        db.store.begin_upload(key).await.unwrap();
    }
    assert!(due().await.is_empty(), "an upload may take its time");
    assert!(matches!(db.store.insert_file(&whole, None, &spans(1)).await.unwrap(), InsertedFile::New));
    db.store.abandon_upload("inputs/abandoned").await.unwrap();
    assert_eq!(due().await, ["inputs/abandoned"]);
    // As if a day had passed since.
    db.execute("UPDATE garbage SET delete_after = 1").await;
    assert_eq!(due().await, ["inputs/abandoned", "inputs/broken"], "not the one that became a file");
    assert_eq!(db.store.due_garbage(1).await.unwrap().len(), 1);
    db.store.forget_garbage(&["inputs/abandoned".to_owned(), "inputs/nothing".to_owned()]).await.unwrap();
    assert_eq!(due().await, ["inputs/broken"]);
    assert_eq!(db.store.file(&file.id, &Scope::All).await.unwrap(), Some(file));
}

async fn a_failed_batch_is_freed_with_its_input(db: Db) {
    let file = db.file(3).await;
    let (failed, other) = (db.create(new_batch(&file.id)).await, db.create(new_batch(&file.id)).await);
    let claimed = db.claim(&failed.id).await;
    db.finish(&claimed).await;
    let claimed = db.claim(&failed.id).await;
    let left = part(0..4, 4..6);
    db.store.commit_part(&claimed.segment, claimed.epoch, &left).await.unwrap();
    let error = BatchError { code: "input_unreadable".into(), message: "gone".into(), line: 0, param: String::new() };
    assert_eq!(db.store.fail_batch(&claimed.segment, claimed.epoch, error).await.unwrap(), Commit::Done);
    assert_eq!(db.store.delete_file(&file.id, &Scope::All).await.unwrap(), DeletedFile::InUse(other.id.clone()));
    assert_eq!(
        db.store.segments(&failed.id, SegmentIndex(0), 9).await.unwrap().len(),
        3,
        "its results can be followed"
    );
    for _ in 0..3 {
        let claimed = db.claim(&other.id).await;
        db.finish(&claimed).await;
    }
    assert_eq!(db.store.delete_file(&file.id, &Scope::All).await.unwrap(), DeletedFile::Deleted);
    assert!(db.store.segments(&failed.id, SegmentIndex(0), 9).await.unwrap().is_empty());
    assert!(db.store.parts_from(&failed.id, 0, 9).await.unwrap().is_empty());
    assert_eq!(
        db.store.segments(&other.id, SegmentIndex(0), 9).await.unwrap().len(),
        3,
        "those have files of their own"
    );
    db.execute("UPDATE garbage SET delete_after = 1").await;
    let due = db.store.due_garbage(10).await.unwrap();
    assert_eq!(due.len(), 3, "the input, the object of the ended segment, the part of the other: {due:?}");
    assert!(due.contains(&left.object_key) && due.contains(file.object_key.as_ref().unwrap()));
}

async fn garbage_is_taken_by_one_node_at_a_time_and_what_stays_blocks_nothing(db: Db) {
    for number in 0..30 {
        db.store.abandon_upload(&format!("inputs/{number:02}")).await.unwrap();
        db.execute(&format!("UPDATE garbage SET delete_after = {number} + 1 WHERE object_key = 'inputs/{number:02}'"))
            .await;
    }
    let others = [db.store.clone(), db.another().await, db.another().await];
    let taken = join_all(others.iter().map(|store| store.take_garbage(10))).await;
    let mut taken: Vec<String> = taken.into_iter().flat_map(Result::unwrap).collect();
    taken.sort();
    let distinct = taken.iter().collect::<std::collections::BTreeSet<_>>().len();
    assert_eq!((taken.len(), distinct), (30, 30), "each by one of them");
    assert!(db.store.take_garbage(10).await.unwrap().is_empty(), "what could not be deleted rests");
    let rest = async |before: i64| (db.number("SELECT MAX(delete_after) FROM garbage").await - before) / 60_000_000;
    assert_eq!(rest(db.store.clock().await.unwrap().0 - 59_000_000).await, 5, "for five minutes");
    db.store.forget_garbage(&taken[..29]).await.unwrap();
    assert_eq!(db.number("SELECT COUNT(*) FROM garbage").await, 1, "but is not forgotten");
    // After that it rests for ten minutes, twenty, and so on up to five hours and twenty minutes.
    let mut rests = Vec::new();
    for _ in 0..8 {
        db.execute("UPDATE garbage SET delete_after = 1").await;
        let before = db.store.clock().await.unwrap().0;
        assert_eq!(db.store.take_garbage(10).await.unwrap(), taken[29..]);
        rests.push(rest(before).await);
    }
    assert_eq!(rests, [10, 20, 40, 80, 160, 320, 320, 320]);
    // An upload that breaks off while its note is there is due at once, in one statement.
    db.store.begin_upload("inputs/late").await.unwrap();
    db.store.abandon_upload("inputs/late").await.unwrap();
    assert_eq!(db.store.take_garbage(10).await.unwrap(), ["inputs/late"]);
}

async fn checksums_of_an_input_go_with_its_segments(db: Db) {
    let mut file = new_file("", 2, &["m"]);
    file.crc32c = Some(u32::MAX);
    let mut some = spans(2);
    some[1].crc32c = Some(u32::MAX - 1);
    db.store.insert_file(&file, None, &some).await.unwrap();
    assert_eq!(db.store.file(&file.id, &Scope::All).await.unwrap().unwrap(), file);
    assert_eq!(db.store.file_segments(&file.id).await.unwrap(), some);
    assert_eq!(db.store.file_segments_from(&file.id, SegmentIndex(1), 5).await.unwrap(), some[1..]);
    let batch = db.create(new_batch(&file.id)).await;
    let claimed = [db.claim(&batch.id).await, db.claim(&batch.id).await];
    assert_eq!(claimed.map(|one| one.span.crc32c), [None, Some(u32::MAX - 1)]);
}

async fn lists_are_filtered_and_paged_newest_first(db: Db) {
    let mut made = Vec::new();
    for turn in 0..5 {
        made.push(db.file_of(if turn % 2 == 0 { "a" } else { "b" }, 1, &["m"]).await.id);
    }
    let batch = db.create(new_batch(&made[0])).await;
    let claimed = db.claim(&batch.id).await;
    db.finish(&claimed).await;
    let output = db.get(&batch.id).await.output_file_id.unwrap();
    let list = async |owner: Option<&str>, purpose: Option<&str>| {
        let filter = FileFilter { scope: owner.map(str::to_owned).into(), purpose: purpose.map(str::to_owned) };
        let files = db.store.files(&filter, None, 100).await.unwrap();
        files.into_iter().map(|file| file.id).collect::<Vec<_>>()
    };
    let inputs: Vec<_> = made.iter().rev().cloned().collect();
    assert_eq!(list(None, None).await, [vec![output.clone()], inputs.clone()].concat());
    assert_eq!(list(None, Some("batch")).await, inputs);
    assert_eq!(list(None, Some("batch_output")).await, [output]);
    assert_eq!(list(Some("b"), None).await, [made[3].clone(), made[1].clone()]);
    let page = db.store.files(&FileFilter::within(Scope::All), Some(&made[3]), 2).await.unwrap();
    assert_eq!(page.into_iter().map(|file| file.id).collect::<Vec<_>>(), [made[2].clone(), made[1].clone()]);
}

async fn a_hidden_file_serves_its_batch_and_goes_with_it(db: Db) {
    let file = db.file_of("alice", 1, &["m"]).await;
    let (mine, theirs) = (Scope::Of("alice".into()), Scope::Of("bob".into()));
    let batch = db.create(new_batch(&file.id)).await;
    assert_eq!(db.store.hide_file(&file.id, &theirs).await.unwrap(), DeletedFile::NotFound);
    assert_eq!(db.store.hide_file(&file.id, &mine).await.unwrap(), DeletedFile::Deleted);
    assert_eq!(db.store.hide_file(&file.id, &mine).await.unwrap(), DeletedFile::NotFound, "a second time");
    assert_eq!(db.store.file(&file.id, &Scope::All).await.unwrap(), None);
    assert!(db.store.files(&FileFilter::within(Scope::All), None, 9).await.unwrap().is_empty());
    assert!(matches!(db.store.create_batch(new_batch(&file.id)).await.unwrap(), CreatedBatch::FileNotFound));
    assert!(db.store.delete_due_files(9).await.unwrap().is_empty(), "its batch reads it");
    let claimed = db.claim(&batch.id).await;
    db.finish(&claimed).await;
    assert_eq!(db.store.delete_due_files(9).await.unwrap(), std::slice::from_ref(&file.id));
    assert!(db.store.file_segments(&file.id).await.unwrap().is_empty());
    assert_eq!(db.number("SELECT COUNT(*) FROM garbage").await, 1);
    assert!(db.store.delete_due_files(9).await.unwrap().is_empty());
}

async fn an_expired_file_is_gone_at_once_and_its_request_id_is_free(db: Db) {
    let long_ago = Some(tidemill::domain::Timestamp(1));
    let (expired, fresh) =
        (tidemill::domain::File { expires_at: long_ago, ..new_file("alice", 1, &["m"]) }, new_file("alice", 1, &["m"]));
    db.store.insert_file(&expired, Some("r"), &spans(1)).await.unwrap();
    assert_eq!(db.store.file(&expired.id, &Scope::All).await.unwrap(), None);
    assert_eq!(db.store.file_by_request_id(&"alice".into(), "r").await.unwrap(), None);
    assert!(matches!(db.store.insert_file(&fresh, Some("r"), &spans(1)).await.unwrap(), InsertedFile::New));
    assert_eq!(db.store.delete_due_files(9).await.unwrap(), [expired.id]);
    assert_eq!(db.store.file_by_request_id(&"alice".into(), "r").await.unwrap(), Some(fresh));
}

async fn result_files_expire_after_their_batch_has_ended(db: Db) {
    let file = db.file(1).await;
    let hour = std::time::Duration::from_secs(3_600);
    let batch = db.create(tidemill::domain::NewBatch { output_expires_after: Some(hour), ..new_batch(&file.id) }).await;
    assert_eq!(batch.output_expires_at(), None);
    let claimed = db.claim(&batch.id).await;
    db.finish(&claimed).await;
    let ended = db.get(&batch.id).await;
    let output = db.store.file(ended.output_file_id.as_ref().unwrap(), &Scope::All).await.unwrap().unwrap();
    assert_eq!(output.expires_at, Some(output.created_at.plus(hour)));
    assert_eq!(ended.output_expires_at(), output.expires_at);
    db.execute("UPDATE files SET expires_at = 1 WHERE kind = 'output'").await;
    assert_eq!(db.store.delete_due_files(9).await.unwrap(), [output.id]);
    assert!(db.store.file(&file.id, &Scope::All).await.unwrap().is_some(), "the input stays");
}

async fn lists_go_in_both_orders(db: Db) {
    let mut made = Vec::new();
    for _ in 0..4 {
        made.push(db.file(1).await.id);
    }
    let filter = FileFilter::within(Scope::All);
    let page = db.store.files_in(&filter, PageOrder::Oldest, Some(&made[0]), 2).await.unwrap();
    assert_eq!(page.into_iter().map(|file| file.id).collect::<Vec<_>>(), made[1..3]);
}

on_both_databases!(
    a_hidden_file_serves_its_batch_and_goes_with_it,
    an_expired_file_is_gone_at_once_and_its_request_id_is_free,
    result_files_expire_after_their_batch_has_ended,
    lists_go_in_both_orders,
    a_file_is_read_back_whole,
    the_same_request_id_is_the_same_file,
    a_file_in_use_is_not_deleted,
    a_file_is_deleted_or_used_but_not_both,
    uploads_that_break_off_leave_garbage_and_others_none,
    a_failed_batch_is_freed_with_its_input,
    garbage_is_taken_by_one_node_at_a_time_and_what_stays_blocks_nothing,
    checksums_of_an_input_go_with_its_segments,
    lists_are_filtered_and_paged_newest_first,
);
