//! Parts and ends: every answer counts once, and the last one ends the batch.

use std::time::Duration;

use futures::future::join_all;
use tidemill::{
    domain::{BatchStatus, FileKind, NodeId, Scope, SegmentIndex, TokenUsage},
    store::{Commit, NewPart, StoreError},
};

use crate::fixture::{Db, LEASE, final_object, part};

async fn a_part_repeated_counts_once(db: Db) {
    let batch = db.batch(2).await;
    let claimed = db.claim(&batch.id).await;
    let mut changes = db.store.changes();
    let answered = part([0, 1, 9], [4]);
    for _ in 0..3 {
        assert_eq!(db.store.commit_part(&claimed.segment, claimed.epoch, &answered).await.unwrap(), Commit::Done);
    }
    assert_eq!(changes.try_recv().unwrap(), batch.id);
    let after = db.get(&batch.id).await;
    assert_eq!((after.counts.completed, after.counts.failed), (3, 1));
    assert_eq!(after.usage, TokenUsage { input: 21, cached_input: 3, output: 15, reasoning: 6, total: 36 });
    assert_eq!(after.revision.0, batch.revision.0 + 1);
    let parts = db.store.parts_of(&claimed.segment).await.unwrap();
    assert_eq!(parts.len(), 1);
    assert_eq!((parts[0].seq, parts[0].segment), (after.revision.0, claimed.segment.index));
    let stored = &parts[0].content;
    assert_eq!(
        (&stored.object_key, stored.crc32c, stored.usage),
        (&answered.object_key, answered.crc32c, answered.usage)
    );
    assert_eq!((stored.output_bytes, stored.error_bytes), (answered.output_bytes, answered.error_bytes));
    assert_eq!((&stored.completed, &stored.failed), (&answered.completed, &answered.failed));
}

async fn token_counts_stop_at_the_most_and_never_fall_below_nothing(db: Db) {
    let batch = db.batch(2).await;
    let (one, two) = (db.claim(&batch.id).await, db.claim(&batch.id).await);
    let most = i64::MAX;
    let usage = TokenUsage { input: most, cached_input: 1, output: most, reasoning: most, total: most };
    let huge = |line: u32| NewPart { usage, ..part([line], []) };
    for (of, line) in [(&one, 0), (&one, 1), (&two, 0)] {
        assert_eq!(db.store.commit_part(&of.segment, of.epoch, &huge(line)).await.unwrap(), Commit::Done);
        let after = db.get(&batch.id).await.usage;
        assert_eq!((after.input, after.output, after.reasoning, after.total), (most, most, most, most));
    }
    assert_eq!(db.get(&batch.id).await.usage.cached_input, 3);
    let torn = db.store.parts_of(&one.segment).await.unwrap();
    db.store.drop_parts(&one.segment, one.epoch, &torn).await.unwrap();
    let after = db.get(&batch.id).await;
    // How much more than the most it was nobody knows.
    assert_eq!((after.usage.total, after.usage.cached_input), (most, 1));
    assert_eq!(after.counts.completed, 1);
}

async fn the_same_part_at_the_same_time_counts_once(db: Db) {
    let batch = db.batch(1).await;
    let claimed = db.claim(&batch.id).await;
    let stores = [db.store.clone(), db.another().await];
    let answered = part(0..5, []);
    let committed =
        join_all((0..8).map(|turn| stores[turn % 2].commit_part(&claimed.segment, claimed.epoch, &answered))).await;
    assert!(committed.into_iter().all(|commit| commit.unwrap() == Commit::Done));
    assert_eq!(db.get(&batch.id).await.counts.completed, 5);
    assert_eq!(db.number("SELECT COUNT(*) FROM parts").await, 1);
}

async fn parts_are_read_in_commit_order_by_page(db: Db) {
    let batch = db.batch(2).await;
    let (one, two) = (db.claim(&batch.id).await, db.claim(&batch.id).await);
    for (of, line) in [(&two, 0), (&one, 0), (&two, 1), (&one, 1), (&two, 2)] {
        db.store.commit_part(&of.segment, of.epoch, &part([line], [])).await.unwrap();
    }
    let (mut seen, mut from) = (Vec::new(), 0);
    loop {
        let page = db.store.parts_from(&batch.id, from, 2).await.unwrap();
        assert!(page.len() <= 2);
        let Some(last) = page.last() else { break };
        from = last.seq + 1;
        seen.extend(page.into_iter().map(|part| part.segment.0));
    }
    assert_eq!(seen, [1, 0, 1, 0, 1]);
    assert_eq!(db.store.parts_of(&two.segment).await.unwrap().len(), 3);
}

async fn the_last_segment_ends_the_batch(db: Db) {
    let other = db.batch(2).await;
    for _ in 0..2 {
        db.finish(&db.claim(&other.id).await).await;
    }
    let batch = db.batch(2).await;
    let (one, two) = (db.claim(&batch.id).await, db.claim(&batch.id).await);
    let first = part(0..6, 6..8);
    db.store.commit_part(&one.segment, one.epoch, &first).await.unwrap();
    let object = final_object(8, 2);
    let superseded = [first.object_key.clone()];
    let last = part(8..10, []);
    let end = async || {
        let end = db.store.finish_segment(&one.segment, one.epoch, Some(&last), &object, &superseded);
        assert_eq!(end.await.unwrap(), Commit::Done);
    };
    end().await;
    let half = db.get(&batch.id).await;
    end().await;
    assert_eq!(db.get(&batch.id).await, half, "the same end again");
    assert_eq!((half.status, half.segments_done), (BatchStatus::InProgress, 1));
    assert_eq!((half.counts.completed, half.counts.failed), (8, 2));
    assert_eq!((half.output_file_id, half.error_file_id), (None, None));
    assert_eq!(db.number("SELECT COUNT(*) FROM garbage").await, 1);

    // Twice at once, as when a first try seemed to fail.
    let (other, object) = (db.another().await, final_object(10, 0));
    let last = part(0..10, []);
    let ends = join_all(
        [&db.store, &other].map(|store| store.finish_segment(&two.segment, two.epoch, Some(&last), &object, &[])),
    )
    .await;
    assert!(ends.into_iter().all(|end| end.unwrap() == Commit::Done));

    let done = db.get(&batch.id).await;
    assert_eq!((done.status, done.segments_done), (BatchStatus::Completed, 2));
    assert_eq!((done.counts.total, done.counts.completed, done.counts.failed), (20, 18, 2));
    let (output, error) = (done.output_file_id.clone().unwrap(), done.error_file_id.clone().unwrap());
    let output = db.store.file(&output, &Scope::All).await.unwrap().unwrap();
    assert_eq!((output.bytes, output.line_count, output.object_key), (1_800, 18, None));
    assert_eq!(output.kind, FileKind::Output(batch.id.clone()));
    let error = db.store.file(&error, &Scope::All).await.unwrap().unwrap();
    assert_eq!((error.bytes, error.line_count, &error.owner), (100, 2, &batch.owner));
    assert_eq!(error.kind, FileKind::Error(batch.id.clone()));
    assert_eq!(db.number("SELECT COUNT(*) FROM files").await, 2 + 3);

    let events = db.events(&batch.id).await;
    use BatchStatus::{Completed, Finalizing, InProgress, Validating};
    let statuses: Vec<_> = events.iter().map(|event| event.batch.status).collect();
    assert_eq!(statuses, [Validating, InProgress, Finalizing, Completed]);
    assert!(events.windows(2).all(|two| two[0].batch.revision < two[1].batch.revision));
    assert!(events.windows(2).all(|two| two[0].sequence < two[1].sequence));
    let told = |place: usize| (&events[place].batch.output_file_id, events[place].batch.counts.completed);
    assert_eq!([told(1), told(2), told(3)], [(&None, 0), (&None, 18), (&done.output_file_id, 18)]);
    assert_eq!(events[3].batch, done, "the last event is the batch as it stays");
    let stored = db.store.segment(&one.segment).await.unwrap().unwrap();
    assert_eq!((stored.output_bytes, stored.error_bytes), (800, 100));
    assert!(stored.object_key.is_some());
}

async fn a_batch_without_errors_has_no_error_file(db: Db) {
    let batch = db.batch(1).await;
    let claimed = db.claim(&batch.id).await;
    assert_eq!(db.finish(&claimed).await, Commit::Done);
    let done = db.get(&batch.id).await;
    assert!(done.output_file_id.is_some() && done.error_file_id.is_none());
}

async fn dropped_parts_are_counted_back_once(db: Db) {
    let batch = db.batch(2).await;
    let claimed = db.claim(&batch.id).await;
    let (good, torn) = (NewPart { not_run: 1, ..part(0..4, [4]) }, NewPart { not_run: 2, ..part(5..8, [8, 9]) });
    for one in [&good, &torn] {
        db.store.commit_part(&claimed.segment, claimed.epoch, one).await.unwrap();
    }
    let before = db.get(&batch.id).await;
    let parts = db.store.parts_of(&claimed.segment).await.unwrap();
    for _ in 0..2 {
        let dropped = db.store.drop_parts(&claimed.segment, claimed.epoch, &parts[1..]).await.unwrap();
        assert_eq!(dropped, Commit::Done, "a caller whose answer was lost asks again");
    }
    let after = db.get(&batch.id).await;
    assert_eq!((before.not_run, after.not_run), (3, 1));
    assert_eq!((after.counts.completed, after.counts.failed), (4, 1));
    assert_eq!(after.usage, good.usage);
    assert!(after.revision > before.revision);
    let left = db.store.parts_of(&claimed.segment).await.unwrap();
    assert_eq!(left.iter().map(|part| &part.content.object_key).collect::<Vec<_>>(), [&good.object_key]);
    assert_eq!(db.number("SELECT COUNT(*) FROM garbage").await, 1, "the torn object is left to be deleted");
    // The lines are run again.
    db.store.commit_part(&claimed.segment, claimed.epoch, &part(5..10, [])).await.unwrap();
    assert_eq!(db.get(&batch.id).await.counts.completed, 9);
}

/// A client that goes away drops the call wherever it is: it is done or not, never half, and the next call works.
async fn a_call_given_up_half_way_is_whole_or_nothing(db: Db) {
    let batch = db.batch(1).await;
    let claimed = db.claim(&batch.id).await;
    let mut given_up = 0;
    for step in 0..200 {
        let answered = part([], [step % 10]);
        let commit = async || db.store.commit_part(&claimed.segment, claimed.epoch, &answered).await;
        let mut first = Box::pin(commit());
        let mut done = false;
        for _ in 0..step {
            if futures::poll!(&mut first).is_ready() {
                done = true;
                break;
            }
            tokio::time::sleep(Duration::from_micros(50)).await;
        }
        drop(first);
        given_up += i32::from(!done);
        let seen = db.store.parts_of(&claimed.segment).await.unwrap().len();
        let counted = db.get(&batch.id).await.counts.failed;
        assert!(i64::try_from(seen).unwrap() <= counted, "a part without its count");
        assert_eq!(commit().await.unwrap(), Commit::Done);
        assert_eq!(db.get(&batch.id).await.counts.failed, i64::from(step) + 1);
    }
    assert!(given_up > 1, "{given_up}");
}

/// The whole engine at once: claims, parts, renewals, cancellations and ends from many nodes. Lock orders that differ
/// would be a deadlock here on PostgreSQL.
async fn many_nodes_finish_many_batches_together(db: Db) {
    let batches = [db.batch(6).await, db.batch(6).await, db.batch(6).await];
    // Without it the batch can't end before it is cancelled.
    let held = db.claim(&batches[2].id).await;
    let mut stores = vec![db.store.clone()];
    stores.extend([db.another().await, db.another().await]);
    // The first that fails ends the others.
    let mut nodes = tokio::task::JoinSet::new();
    for turn in 0..6 {
        let (held, store, node) = (held.clone(), stores[turn % 3].clone(), NodeId::generate());
        let ids: Vec<_> = batches.iter().map(|batch| batch.id.clone()).collect();
        nodes.spawn(async move {
            for step in 0.. {
                let Some(id) = ids.get((turn + step) % ids.len()) else { break };
                store.renew_leases(&node, std::slice::from_ref(&held.segment), LEASE).await?;
                if turn == 0 && step == 1 {
                    store.cancel_batch(&ids[2], &Scope::All).await?;
                    let (all, object) = (part(0..9, [9]), final_object(9, 1));
                    let end = store.finish_segment(&held.segment, held.epoch, Some(&all), &object, &[]);
                    assert_eq!(end.await?, Commit::Done);
                }
                let Some(claimed) = store.claim_segment(&node, id, -1, LEASE).await? else {
                    if store.unfinished(&Scope::All, 1).await?.is_empty() {
                        break;
                    }
                    tokio::task::yield_now().await;
                    continue;
                };
                let first = part(0..5, []);
                let (commit, _) = tokio::try_join!(
                    store.commit_part(&claimed.segment, claimed.epoch, &first),
                    store.renew_leases(&node, std::slice::from_ref(&claimed.segment), LEASE)
                )?;
                assert_eq!(commit, Commit::Done);
                let (last, object, superseded) = (part(5..9, [9]), final_object(9, 1), [first.object_key]);
                let (end, _) = tokio::try_join!(
                    store.finish_segment(&claimed.segment, claimed.epoch, Some(&last), &object, &superseded),
                    store.renew_leases(&node, std::slice::from_ref(&claimed.segment), LEASE)
                )?;
                assert_eq!(end, Commit::Done);
            }
            Ok::<(), StoreError>(())
        });
    }
    while let Some(node) = nodes.join_next().await {
        node.unwrap().unwrap();
    }
    for (place, batch) in batches.iter().enumerate() {
        let done = db.get(&batch.id).await;
        let expected = if place == 2 { BatchStatus::Cancelled } else { BatchStatus::Completed };
        assert_eq!((done.status, done.segments_done), (expected, 6));
        assert_eq!((done.counts.completed, done.counts.failed), (54, 6));
        let segments = db.store.segments(&batch.id, SegmentIndex(0), 100).await.unwrap();
        assert!(segments.iter().all(|segment| segment.object_key.is_some()));
    }
    assert_eq!(db.number("SELECT COUNT(*) FROM parts").await, 17 * 2 + 1);
}

on_both_databases!(
    token_counts_stop_at_the_most_and_never_fall_below_nothing,
    a_part_repeated_counts_once,
    the_same_part_at_the_same_time_counts_once,
    parts_are_read_in_commit_order_by_page,
    the_last_segment_ends_the_batch,
    a_batch_without_errors_has_no_error_file,
    dropped_parts_are_counted_back_once,
    a_call_given_up_half_way_is_whole_or_nothing,
    many_nodes_finish_many_batches_together,
);
