//! Creating, finding and listing batches.

use std::collections::BTreeSet;

use futures::future::join_all;
use tidemill::{
    domain::{Batch, BatchId, BatchStatus, FileId, NewBatch, Priority, Scope},
    store::{BatchFilter, CreatedBatch, DeletedBatch, DeletedFile},
};

use crate::fixture::{Db, new_batch};

async fn a_new_batch_runs_with_its_segments_and_its_events(db: Db) {
    let mut changes = db.store.changes();
    let file = db.file_of("alice", 3, &["m", "n"]).await;
    let new = NewBatch { owner: "alice".into(), priority: Priority::new(1).unwrap(), ..new_batch(&file.id) };
    let batch = db.create(new.clone()).await;
    assert_eq!(changes.recv().await.unwrap(), batch.id);
    assert_eq!(db.get(&batch.id).await, batch, "what the client was told is what is stored");
    assert_eq!((batch.status, batch.segments, batch.segments_done), (BatchStatus::InProgress, 3, 0));
    assert_eq!((batch.counts.total, batch.counts.completed, batch.counts.failed), (30, 0, 0));
    assert_eq!(batch.models, ["m", "n"]);
    assert_eq!(batch.metadata, new.metadata);
    assert_eq!(batch.priority.value(), 1);
    assert_eq!(batch.expires_at, batch.created_at.plus(new.completion_window));
    let (told, events) = db.store.history(&batch.id).await.unwrap().unwrap();
    assert_eq!(told, batch);
    assert_eq!(
        events.iter().map(|event| (event.batch.status, event.batch.revision.0)).collect::<Vec<_>>(),
        [(BatchStatus::Validating, 1), (BatchStatus::InProgress, 2)]
    );
    assert!(events[0].sequence < events[1].sequence);
    assert_eq!(events[1].batch, batch);
    assert_eq!(events[0].batch.times.in_progress, events[1].batch.times.in_progress.filter(|at| *at <= events[0].at));
    let spans = db.store.file_segments(&file.id).await.unwrap();
    let segments = db.store.segments(&batch.id, tidemill::domain::SegmentIndex(0), 10).await.unwrap();
    assert_eq!(segments.iter().map(|segment| segment.span).collect::<Vec<_>>(), spans);
}

async fn the_same_request_id_is_the_same_batch(db: Db) {
    let file = db.file(2).await;
    let new = NewBatch { request_id: Some("r".into()), ..new_batch(&file.id) };
    let made = db.create(new.clone()).await;
    let hash = Some("what it is".to_owned());
    let new = NewBatch { request_hash: hash.clone(), ..new };
    db.execute("UPDATE batches SET request_hash = 'what it is'").await;
    let again = NewBatch { request_hash: None, metadata: [].into(), ..new.clone() };
    assert!(
        matches!(db.store.create_batch(again).await.unwrap(), CreatedBatch::Existing(batch) if batch.id == made.id)
    );
    let other = NewBatch { request_hash: Some("something else".into()), ..new.clone() };
    let made_id = made.id.clone();
    assert!(matches!(db.store.create_batch(other).await.unwrap(), CreatedBatch::Reused(batch) if batch == made_id));
    let find = async |hash| db.store.batch_by_request_id(&"".into(), "r", hash).await.unwrap();
    assert!(matches!(find(hash.as_deref()).await, Some(CreatedBatch::Existing(batch)) if batch.id == made_id));
    assert!(matches!(find(Some("something else")).await, Some(CreatedBatch::Reused(batch)) if batch == made_id));
    assert!(db.store.batch_by_request_id(&"bob".into(), "r", None).await.unwrap().is_none());
    // A row of an earlier version has no hash.
    db.execute("UPDATE batches SET request_hash = NULL").await;
    assert!(matches!(find(Some("something else")).await, Some(CreatedBatch::Existing(batch)) if batch.id == made_id));
    // Other owners' ids, and no id, are their own.
    db.create(NewBatch { owner: "bob".into(), ..new.clone() }).await;
    db.create(NewBatch { request_id: None, ..new.clone() }).await;
    db.create(NewBatch { request_id: None, ..new.clone() }).await;
    assert_eq!(db.number("SELECT COUNT(*) FROM batches").await, 4);
    assert_eq!(db.number("SELECT COUNT(*) FROM segments").await, 8);
    // Even when the input has gone in the meantime.
    db.execute("UPDATE batches SET status = 'completed'").await;
    assert_eq!(db.store.delete_file(&file.id, &Scope::All).await.unwrap(), DeletedFile::Deleted);
    assert!(matches!(db.store.create_batch(new).await.unwrap(), CreatedBatch::Existing(batch) if batch.id == made.id));
}

async fn the_same_request_id_at_the_same_time_makes_one_batch(db: Db) {
    let (one, other) = (db.file(2).await, db.file(2).await);
    let stores = [db.store.clone(), db.another().await];
    let created = join_all((0..16).map(|turn| {
        let (store, file) = (stores[turn % 2].clone(), if turn % 4 < 2 { &one } else { &other });
        let new = NewBatch { request_id: Some("r".into()), ..new_batch(&file.id) };
        async move { store.create_batch(new).await.unwrap() }
    }))
    .await;
    let (mut new, mut ids) = (0, BTreeSet::new());
    for one in created {
        match one {
            CreatedBatch::New(batch) => {
                new += 1;
                ids.insert(batch.id);
            }
            CreatedBatch::Existing(batch) => {
                ids.insert(batch.id);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((new, ids.len()), (1, 1));
    assert_eq!(db.number("SELECT COUNT(*) FROM segments").await, 2);
    assert_eq!(db.number("SELECT COUNT(*) FROM batch_events").await, 2);
}

async fn batches_made_at_the_same_time_do_not_pass_the_limit_together(db: Db) {
    let file = db.file_of("alice", 2, &["m"]).await;
    let lines = file.line_count;
    // Five batches of eight, by two nodes at once.
    let most = 5 * lines + lines / 2;
    let stores = [db.store.clone(), db.another().await];
    let created = join_all((0..8).map(|turn| {
        let new = NewBatch { owner: "alice".into(), ..new_batch(&file.id) };
        let store = stores[turn % 2].clone();
        async move { store.create_batch_within(new, &Scope::All, Some(most)).await.unwrap() }
    }))
    .await;
    let made = created.iter().filter(|one| matches!(one, CreatedBatch::New(_))).count();
    let refused = created.iter().filter(
        |one| matches!(one, CreatedBatch::TooManyLines { queued, added } if (*queued, *added) == (5 * lines, lines)),
    );
    assert_eq!((made, refused.count()), (5, 3), "{created:?}");
    assert_eq!(db.store.queued_lines(&"alice".into()).await.unwrap(), 5 * lines);
    assert_eq!(db.number("SELECT COUNT(*) FROM segments").await, 10, "nothing is left of those that were refused");
    // Another's lines don't count.
    let new = NewBatch { owner: "bob".into(), ..new_batch(&file.id) };
    assert!(matches!(db.store.create_batch_within(new, &Scope::All, Some(lines)).await.unwrap(), CreatedBatch::New(_)));
}

async fn without_an_input_there_is_no_batch(db: Db) {
    let missing = new_batch(&FileId::generate());
    assert!(matches!(db.store.create_batch(missing).await.unwrap(), CreatedBatch::FileNotFound));
    let batch = db.batch(1).await;
    let claimed = db.claim(&batch.id).await;
    db.finish(&claimed).await;
    let output = db.get(&batch.id).await.output_file_id.unwrap();
    assert!(matches!(db.store.create_batch(new_batch(&output)).await.unwrap(), CreatedBatch::WrongPurpose));
    assert_eq!(db.number("SELECT COUNT(*) FROM batches").await, 1);
}

fn ids(batches: &[Batch]) -> Vec<&BatchId> {
    batches.iter().map(|batch| &batch.id).collect()
}

async fn lists_are_filtered_and_paged_newest_first(db: Db) {
    let (ours, theirs) = (db.file_of("a", 1, &["m"]).await, db.file_of("b", 1, &["m", "n"]).await);
    let mut made = Vec::new();
    for turn in 0..7 {
        let (owner, file) = if turn % 2 == 0 { ("a", &ours) } else { ("b", &theirs) };
        let metadata = [("team".to_owned(), (turn % 3).to_string()), ("env".to_owned(), "x".to_owned())].into();
        made.push(db.create(NewBatch { owner: owner.into(), metadata, ..new_batch(&file.id) }).await.id);
    }
    db.store.cancel_batch(&made[4], &Scope::All).await.unwrap();
    let list = async |filter: BatchFilter| db.store.batches(&filter, None, 100).await.unwrap();
    let expect = |places: &[usize]| places.iter().map(|place| &made[*place]).collect::<Vec<_>>();
    assert_eq!(ids(&list(BatchFilter::within(Scope::All)).await), expect(&[6, 5, 4, 3, 2, 1, 0]));
    let scope = Scope::Of("b".into());
    assert_eq!(ids(&list(BatchFilter::within(scope.clone())).await), expect(&[5, 3, 1]));
    let statuses = vec![BatchStatus::Cancelling, BatchStatus::Cancelled];
    assert_eq!(ids(&list(BatchFilter { statuses, ..BatchFilter::within(Scope::All) }).await), expect(&[4]));
    let model = Some("n".to_owned());
    assert_eq!(ids(&list(BatchFilter { model, ..BatchFilter::within(Scope::All) }).await), expect(&[5, 3, 1]));
    let team = |team: &str| [("team".to_owned(), team.to_owned()), ("env".to_owned(), "x".to_owned())].into();
    let metadata = team("0");
    assert_eq!(ids(&list(BatchFilter { metadata, ..BatchFilter::within(Scope::All) }).await), expect(&[6, 3, 0]));
    let metadata = team("0");
    assert_eq!(ids(&list(BatchFilter { metadata, ..BatchFilter::within(scope) }).await), expect(&[3]));
    let metadata = [("team".to_owned(), "x".to_owned())].into();
    assert!(
        list(BatchFilter { metadata, ..BatchFilter::within(Scope::All) }).await.is_empty(),
        "values belong to their names"
    );

    let (mut paged, mut after) = (Vec::new(), None);
    loop {
        let page = db.store.batches(&BatchFilter::within(Scope::All), after.as_ref(), 3).await.unwrap();
        assert!(page.len() <= 3);
        let Some(last) = page.last() else { break };
        after = Some(last.id.clone());
        paged.extend(page.into_iter().map(|batch| batch.id));
    }
    assert_eq!(paged.iter().collect::<Vec<_>>(), expect(&[6, 5, 4, 3, 2, 1, 0]));
}

async fn the_queue_is_by_priority_then_deadline(db: Db) {
    let file = db.file(1).await;
    let mut made = Vec::new();
    for (priority, hours) in [(0, 24), (0, 5), (1, 90), (-1, 1)] {
        let completion_window = std::time::Duration::from_secs(hours * 3_600);
        let priority = Priority::new(priority).unwrap();
        made.push(db.create(NewBatch { priority, completion_window, ..new_batch(&file.id) }).await);
    }
    let mut positions = Vec::new();
    for batch in &made {
        positions.push(db.store.queue_position(batch).await.unwrap());
    }
    assert_eq!(positions, [2, 1, 0, 3]);
    let served = db.store.candidates(&["m".to_owned()], 10).await.unwrap();
    let order: Vec<_> = served.iter().map(|candidate| &candidate.id).collect();
    assert_eq!(order, [&made[2].id, &made[1].id, &made[0].id, &made[3].id]);
    assert_eq!(db.store.candidates(&["m".to_owned()], 2).await.unwrap().len(), 2);
    let mut all: Vec<_> = made.iter().map(|batch| batch.id.clone()).collect();
    assert_eq!(db.store.unfinished(&Scope::All, 10).await.unwrap(), all);
    let mut revisions = db.store.revisions(&all).await.unwrap();
    revisions.sort();
    all.sort();
    assert_eq!(revisions, all.into_iter().map(|id| (id, 2)).collect::<Vec<_>>());
}

async fn an_ended_batch_is_deleted_with_all_that_is_its_own(db: Db) {
    let file = db.file_of("alice", 1, &["m"]).await;
    let new = || NewBatch { owner: "alice".into(), ..new_batch(&file.id) };
    let (batch, other) = (db.create(new()).await, db.create(new()).await);
    let (mine, theirs) = (Scope::Of("alice".into()), Scope::Of("bob".into()));
    assert_eq!(db.store.delete_batch(&batch.id, &mine).await.unwrap(), DeletedBatch::NotEnded);
    let claimed = db.claim(&batch.id).await;
    db.finish(&claimed).await;
    let output = db.get(&batch.id).await.output_file_id.unwrap();
    assert_eq!(db.store.delete_batch(&batch.id, &theirs).await.unwrap(), DeletedBatch::NotFound);
    assert_eq!(db.store.delete_batch(&batch.id, &mine).await.unwrap(), DeletedBatch::Deleted);
    assert_eq!(db.store.delete_batch(&batch.id, &mine).await.unwrap(), DeletedBatch::NotFound);
    assert_eq!(db.store.batch(&batch.id, &Scope::All).await.unwrap(), None);
    assert_eq!(db.store.file(&output, &Scope::All).await.unwrap(), None);
    assert!(db.store.file(&file.id, &Scope::All).await.unwrap().is_some(), "the input stays");
    for table in ["segments", "parts", "batch_events", "batch_models", "batch_metadata"] {
        let left = db.number(&format!("SELECT COUNT(*) FROM {table} WHERE batch_id = '{}'", batch.id)).await;
        assert_eq!(left, 0, "{table}");
    }
    assert_eq!(db.number("SELECT COUNT(*) FROM garbage").await, 1, "its object");
    // What a run wrote that no row ever named is found by the search of its folder.
    let stray = format!("results/{}/000000/1-0", batch.id);
    assert_eq!(db.store.unnamed_objects(&batch.id, vec![stray.clone()]).await.unwrap(), [stray]);
    assert_eq!(db.get(&other.id).await.status, BatchStatus::InProgress);
}

on_both_databases!(
    an_ended_batch_is_deleted_with_all_that_is_its_own,
    a_new_batch_runs_with_its_segments_and_its_events,
    the_same_request_id_is_the_same_batch,
    the_same_request_id_at_the_same_time_makes_one_batch,
    batches_made_at_the_same_time_do_not_pass_the_limit_together,
    without_an_input_there_is_no_batch,
    lists_are_filtered_and_paged_newest_first,
    the_queue_is_by_priority_then_deadline,
);
