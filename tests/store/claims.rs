//! Leases: a segment is one node's at a time, and whoever lost it can write nothing.

use std::{collections::BTreeSet, time::Duration};

use futures::future::join_all;
use tidemill::{
    domain::{BatchError, BatchId, Epoch, NewBatch, NodeId, Scope, SegmentIndex, SegmentRef, lifecycle::Ending},
    store::{ClaimedSegment, Commit},
};

use crate::{
    fixture::{Db, LEASE, final_object, key, new_batch, part},
    support::patience::until,
};

async fn many_claimers_never_get_the_same_segment(db: Db) {
    const SEGMENTS: i32 = 40;
    let batch = db.batch(SEGMENTS).await;
    let stores = [db.store.clone(), db.another().await, db.another().await];
    let claimed = join_all((0..12).map(|claimer| {
        let (store, id, node) = (stores[claimer % 3].clone(), batch.id.clone(), NodeId::generate());
        tokio::spawn(async move {
            let mut mine = Vec::new();
            while let Some(claimed) = store.claim_segment(&node, &id, -1, LEASE).await.unwrap() {
                mine.push(claimed);
            }
            mine
        })
    }))
    .await;
    let claimed: Vec<ClaimedSegment> = claimed.into_iter().flat_map(Result::unwrap).collect();
    assert!(claimed.iter().all(|one| one.epoch == Epoch(1)));
    assert_eq!(claimed.len(), 40, "each once");
    let segments: BTreeSet<_> = claimed.iter().map(|one| one.segment.index.0).collect();
    assert_eq!(segments, (0..SEGMENTS).collect());
    assert!(db.store.candidates(&["m".to_owned()], 10).await.unwrap().is_empty());
}

async fn a_claim_says_what_there_is_to_do(db: Db) {
    let file = db.file_of("", 3, &["m", "n"]).await;
    let batch = db.create(new_batch(&file.id)).await;
    db.claim(&batch.id).await;
    let claimed = db.claim(&batch.id).await;
    assert_eq!(claimed.segment, SegmentRef { batch: batch.id.clone(), index: SegmentIndex(1) }, "in order");
    assert_eq!(claimed.span, db.store.file_segments(&file.id).await.unwrap()[1]);
    assert_eq!(Some(claimed.object_key), file.object_key);
    assert_eq!((claimed.models, claimed.endpoint), (file.models, batch.endpoint));
    assert_eq!((claimed.priority, claimed.expires_at, claimed.ending), (batch.priority, batch.expires_at, None));
    db.store.cancel_batch(&batch.id, &Scope::All).await.unwrap();
    assert_eq!(db.claim(&batch.id).await.ending, Some(Ending::Cancelled));
}

async fn a_lease_that_ran_out_is_claimed_again_and_its_old_owner_is_fenced(db: Db) {
    let batch = db.batch(1).await;
    let old = db.claim(&batch.id).await;
    let answered = part(0..3, 3..4);
    assert_eq!(db.store.commit_part(&old.segment, old.epoch, &answered).await.unwrap(), Commit::Done);
    assert!(db.store.claim_segment(&NodeId::generate(), &batch.id, -1, LEASE).await.unwrap().is_none(), "still leased");
    db.expire(&old.segment).await;
    let served = db.store.candidates(&["m".to_owned()], 10).await.unwrap();
    assert_eq!(served.len(), 1, "expired is claimable");
    let new = db.claim(&batch.id).await;
    assert_eq!((&new.segment, new.epoch), (&old.segment, Epoch(old.epoch.0 + 1)));
    assert_eq!(db.store.parts_of(&new.segment).await.unwrap().len(), 1, "the new owner sees what is done");

    let before = db.all_rows(&batch.id).await;
    let store = db.another().await;
    let torn = db.store.parts_of(&old.segment).await.unwrap();
    assert_eq!(store.commit_part(&old.segment, old.epoch, &part(4..6, [])).await.unwrap(), Commit::Fenced);
    assert_eq!(store.commit_part(&old.segment, old.epoch, &answered).await.unwrap(), Commit::Fenced);
    let superseded = [answered.object_key.clone()];
    let (last, object) = (part(4..10, []), final_object(9, 1));
    let end = store.finish_segment(&old.segment, old.epoch, Some(&last), &object, &superseded);
    assert_eq!(end.await.unwrap(), Commit::Fenced);
    assert_eq!(store.drop_parts(&old.segment, old.epoch, &torn).await.unwrap(), Commit::Fenced);
    store.release_segment(&old.segment, old.epoch, 0).await.unwrap();
    assert_eq!(db.all_rows(&batch.id).await, before, "a zombie changes nothing");

    assert_eq!(db.finish(&new).await, Commit::Done);
    assert_eq!(db.store.commit_part(&new.segment, new.epoch, &part(4..6, [])).await.unwrap(), Commit::Fenced);
}

async fn a_short_lease_runs_out_by_itself(db: Db) {
    let batch = db.batch(1).await;
    let (first, second) = (NodeId::generate(), NodeId::generate());
    let claim = async |node: &NodeId, lease| db.store.claim_segment(node, &batch.id, -1, lease).await.unwrap();
    assert!(claim(&first, Duration::from_millis(30)).await.is_some());
    let again = loop {
        if let Some(claimed) = claim(&second, LEASE).await {
            break claimed;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!(again.epoch, Epoch(2));
    assert!(db.store.renew_leases(&first, &[again.segment], LEASE).await.unwrap().held.is_empty());
}

async fn a_renewed_lease_does_not_run_out(db: Db) {
    let batch = db.batch(3).await;
    let (node, other) = (NodeId::generate(), NodeId::generate());
    let mine = db.store.claim_segment(&node, &batch.id, -1, LEASE).await.unwrap().unwrap();
    let theirs = db.store.claim_segment(&other, &batch.id, -1, LEASE).await.unwrap().unwrap();
    db.expire(&mine.segment).await;
    db.expire(&theirs.segment).await;
    let both = [mine.segment.clone(), theirs.segment.clone()];
    let held = db.store.renew_leases(&node, &both, LEASE).await.unwrap().held;
    assert_eq!(held.len(), 1);
    assert_eq!((&held[0].segment, held[0].epoch), (&mine.segment, mine.epoch));
    assert_eq!((held[0].ending, held[0].batch_ended), (None, false));
    assert_eq!(db.claim(&batch.id).await.segment, theirs.segment, "the lease that was not renewed");
    assert_eq!(db.finish(&mine).await, Commit::Done);
    assert!(db.store.renew_leases(&node, &both, LEASE).await.unwrap().held.is_empty(), "what is done is not held");
}

async fn a_lease_that_nobody_works_under_runs_out(db: Db) {
    let batch = db.batch(2).await;
    let node = NodeId::generate();
    let lost = db.store.claim_segment(&node, &batch.id, -1, LEASE).await.unwrap().unwrap();
    let running = db.store.claim_segment(&node, &batch.id, -1, LEASE).await.unwrap().unwrap();
    for claimed in [&lost, &running] {
        db.expire(&claimed.segment).await;
    }
    // The answer of the first claim never came, or its run was given up: the node has it and does not know.
    let held = db.store.renew_leases(&node, std::slice::from_ref(&running.segment), LEASE).await.unwrap().held;
    assert_eq!(held.iter().map(|held| &held.segment).collect::<Vec<_>>(), [&running.segment]);
    let again = db.claim(&batch.id).await;
    assert_eq!((again.segment, again.epoch), (lost.segment, Epoch(2)));
    assert!(db.store.renew_leases(&node, &[], LEASE).await.unwrap().held.is_empty());
}

async fn a_renewal_tells_of_endings(db: Db) {
    let node = NodeId::generate();
    let (cancelled, failed, late) = (db.batch(1).await, db.batch(1).await, db.batch(1).await);
    let (mut running, mut epochs) = (Vec::new(), Vec::new());
    for batch in [&cancelled, &failed, &late] {
        let claimed = db.store.claim_segment(&node, &batch.id, -1, LEASE).await.unwrap().unwrap();
        running.push(claimed.segment);
        epochs.push(claimed.epoch);
    }
    db.store.cancel_batch(&cancelled.id, &Scope::All).await.unwrap();
    let error = BatchError { code: "input_missing".into(), message: "gone".into(), line: 0, param: String::new() };
    assert_eq!(db.store.fail_batch(&running[1], epochs[1], error).await.unwrap(), Commit::Done);
    db.store.set_expiry(&late.id, late.created_at).await.unwrap();
    assert_eq!(db.store.close_windows(10).await.unwrap(), std::slice::from_ref(&late.id));
    let held = db.store.renew_leases(&node, &running, LEASE).await.unwrap().held;
    let of = |id: &BatchId| held.iter().find(|one| one.segment.batch == *id).map(|one| (one.ending, one.batch_ended));
    assert_eq!(of(&cancelled.id), Some((Some(Ending::Cancelled), false)));
    assert_eq!(of(&failed.id), Some((None, true)));
    assert_eq!(of(&late.id), Some((Some(Ending::Expired), false)));
}

async fn a_segment_is_claimed_for_the_models_it_still_needs(db: Db) {
    let file = db.file_of("", 1, &["m", "n"]).await;
    let batch = db.create(new_batch(&file.id)).await;
    let claim = async |mask| db.store.claim_segment(&NodeId::generate(), &batch.id, mask, LEASE).await.unwrap();
    assert!(claim(0b10).await.is_none(), "no line of the segment is for the second model");
    let claimed = claim(0b01).await.unwrap();
    db.store.release_segment(&claimed.segment, claimed.epoch, 0b10).await.unwrap();
    assert!(claim(0b01).await.is_none());
    let again = claim(0b11).await.unwrap();
    assert_eq!(again.epoch, Epoch(2));
    let fenced = db.store.commit_part(&claimed.segment, claimed.epoch, &part(0..1, [])).await.unwrap();
    assert_eq!(fenced, Commit::Fenced, "what was released is not one's own any more");
}

async fn only_what_a_worker_serves_is_offered(db: Db) {
    let file = db.file_of("", 1, &["m", "n"]).await;
    let batch = db.create(new_batch(&file.id)).await;
    let offered = async |served: &[&str]| {
        let served: Vec<_> = served.iter().map(|model| (*model).to_owned()).collect();
        db.store.candidates(&served, 10).await.unwrap().len()
    };
    assert_eq!([offered(&[]).await, offered(&["x"]).await, offered(&["x", "n"]).await], [0, 0, 1]);
    db.store.cancel_batch(&batch.id, &Scope::All).await.unwrap();
    assert_eq!(offered(&[]).await, 1, "lines that are not to be run need no worker");
}

async fn one_owners_thousand_batches_hide_nobody_elses(db: Db) {
    let (many, few) = (db.file_of("many", 1, &["m"]).await, db.file_of("few", 1, &["m"]).await);
    let of = |file: &tidemill::domain::File| NewBatch { owner: file.owner.clone(), ..new_batch(&file.id) };
    for _ in 0..30 {
        db.create(of(&many)).await;
    }
    let mut late = Vec::new();
    for _ in 0..3 {
        late.push(db.create(of(&few)).await.id);
    }
    let served = ["m".to_owned()];
    let offered = |limit| {
        let (store, served) = (db.store.clone(), served.clone());
        async move { store.candidates(&served, limit).await.unwrap() }
    };
    let some = offered(10).await;
    assert_eq!(some.len(), 10);
    for id in &late {
        assert!(some.iter().any(|one| one.id == *id), "the batches of the owner with few are hidden");
    }
    assert!(some.is_sorted_by_key(|one| (std::cmp::Reverse(one.priority), one.expires_at)), "in the order of serving");
    assert_eq!(some[0].owner.as_str(), "many", "which is that of deadlines");
    // Each owner is there even if there are as many as places.
    let two = offered(2).await;
    assert_eq!(two.iter().map(|one| one.owner.as_str()).collect::<Vec<_>>(), ["many", "few"]);
    assert_eq!(offered(1_000).await.len(), 33);
}

async fn a_batch_that_has_ended_has_nothing_to_claim(db: Db) {
    let batch = db.batch(2).await;
    let claimed = db.claim(&batch.id).await;
    let error = BatchError { code: "x".into(), message: String::new(), line: 0, param: String::new() };
    db.store.fail_batch(&claimed.segment, claimed.epoch, error).await.unwrap();
    assert!(db.store.claim_segment(&NodeId::generate(), &batch.id, -1, LEASE).await.unwrap().is_none());
    assert!(db.store.candidates(&["m".to_owned()], 10).await.unwrap().is_empty());
    let before = db.all_rows(&batch.id).await;
    assert_eq!(db.store.commit_part(&claimed.segment, claimed.epoch, &part(0..1, [])).await.unwrap(), Commit::Fenced);
    let (object, superseded) = (final_object(10, 0), [key()]);
    let end = db.store.finish_segment(&claimed.segment, claimed.epoch, None, &object, &superseded);
    assert_eq!(end.await.unwrap(), Commit::Fenced);
    assert_eq!(db.store.drop_parts(&claimed.segment, claimed.epoch, &[]).await.unwrap(), Commit::Fenced);
    assert_eq!(db.all_rows(&batch.id).await, before);
}

async fn a_dead_predecessors_leases_can_be_ended_at_once(db: Db) {
    let batch = db.batch(3).await;
    let (first, second) = (db.claim(&batch.id).await, db.claim(&batch.id).await);
    assert_eq!(db.finish(&first).await, Commit::Done);
    assert_eq!(db.store.release_all().await.unwrap(), 1, "what is done stays done");
    let again = db.claim(&batch.id).await;
    assert_eq!((again.segment, again.epoch), (second.segment, Epoch(2)));
}

/// For the database it is the same whether its clock goes back or all that is stored goes ahead.
async fn a_clock_set_back_makes_no_lease_of_a_dead_owner_last_for_as_long(db: Db) {
    let lease = Duration::from_millis(300);
    let batch = db.batch(2).await;
    let node = NodeId::generate();
    let dead = db.store.claim_segment(&node, &batch.id, -1, lease).await.unwrap().unwrap();
    let living = db.store.claim_segment(&node, &batch.id, -1, Duration::from_secs(3_000)).await.unwrap().unwrap();
    let mend = async |longest| db.store.mend_leases(longest).await.unwrap();
    assert_eq!(mend(Duration::from_secs(3_000)).await, 0, "nothing is wrong");
    db.execute("UPDATE segments SET lease_expires_at = lease_expires_at + 3600000000 WHERE state = 'leased'").await;
    assert!(db.store.candidates(&["m".to_owned()], 9).await.unwrap().is_empty());
    // The living owner renews, as it always does.
    db.store.renew_leases(&node, std::slice::from_ref(&living.segment), LEASE).await.unwrap();
    assert_eq!(mend(LEASE).await, 1);
    assert_eq!(mend(lease).await, 2, "the least of all");
    let mut taken = None;
    until("its lease ends", async || {
        taken = db.store.claim_segment(&NodeId::generate(), &batch.id, -1, LEASE).await.unwrap();
        taken.is_some()
    })
    .await;
    let taken = taken.unwrap();
    assert_eq!((taken.segment.clone(), taken.epoch), (dead.segment.clone(), Epoch(2)));
    let late = db.store.commit_part(&dead.segment, dead.epoch, &part(0..1, [])).await.unwrap();
    assert_eq!(late, Commit::Fenced);
}

on_both_databases!(
    a_clock_set_back_makes_no_lease_of_a_dead_owner_last_for_as_long,
    many_claimers_never_get_the_same_segment,
    a_claim_says_what_there_is_to_do,
    a_lease_that_ran_out_is_claimed_again_and_its_old_owner_is_fenced,
    a_short_lease_runs_out_by_itself,
    a_renewed_lease_does_not_run_out,
    a_lease_that_nobody_works_under_runs_out,
    a_renewal_tells_of_endings,
    a_segment_is_claimed_for_the_models_it_still_needs,
    only_what_a_worker_serves_is_offered,
    one_owners_thousand_batches_hide_nobody_elses,
    a_batch_that_has_ended_has_nothing_to_claim,
    a_dead_predecessors_leases_can_be_ended_at_once,
);
