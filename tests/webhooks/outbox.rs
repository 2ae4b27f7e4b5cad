//! What is written when, and what a crash leaves.

use std::time::Duration;

use tidemill::{
    domain::Scope,
    domain::webhook::{AttemptResult, DeliveryState, ErrorKind, EventFilter, WebhookEvent, WebhookTarget},
    store::{ClaimShare, ClaimedDelivery, SettledAs, Settlement},
};

use crate::fixture::{Db, target};

crate::on_both!(
    every_subset_of_events_against_every_outcome,
    a_claim_leaves_its_attempt_and_is_exclusive,
    whoever_lost_its_lease_changes_nothing,
    a_lease_that_ran_out_is_an_unknown_attempt,
    a_release_costs_no_attempt,
    failures_end_as_a_dead_letter,
    progress_is_replaced_and_never_comes_after_the_end,
    old_things_go_and_what_is_named_stays,
);

fn url() -> String {
    "http://127.0.0.1:1/hook".into()
}

fn settlement(claim: &ClaimedDelivery, result: Option<AttemptResult>) -> Settlement {
    Settlement {
        id: claim.id.clone(),
        lease: claim.lease.clone(),
        attempt: claim.attempt,
        result,
        wait: Duration::ZERO,
    }
}

fn success() -> Option<AttemptResult> {
    Some(AttemptResult { error: None, http_status: Some(204), response_excerpt: None })
}

fn failure() -> Option<AttemptResult> {
    Some(AttemptResult::failed(ErrorKind::Connect, "refused"))
}

async fn claim(db: &Db) -> Vec<ClaimedDelivery> {
    let due = db.store.due_targets(&[]).await.unwrap().targets;
    let shares: Vec<_> = due.into_iter().map(|due| ClaimShare::new(due.owner, due.target, 10)).collect();
    db.store.claim_deliveries(&shares).await.unwrap()
}

async fn settle(db: &Db, claim: &ClaimedDelivery, result: Option<AttemptResult>) -> SettledAs {
    db.store.settle_deliveries(&[settlement(claim, result)]).await.unwrap()[0].now
}

async fn every_subset_of_events_against_every_outcome(db: Db) {
    let ends = [WebhookEvent::Completed, WebhookEvent::Failed, WebhookEvent::Cancelled, WebhookEvent::Expired];
    for mask in 0u8..16 {
        let wanted: Vec<_> = (0..4).filter(|bit| mask & (1 << bit) != 0).map(|bit| ends[bit]).collect();
        let names: Vec<_> = wanted.iter().map(|event| event.as_str()).collect();
        // None wanted of these: only progress.
        let events = EventFilter::parse(if names.is_empty() { &["progress"] } else { names.as_slice() }).unwrap();
        for end in ends {
            let batch = db.batch(Some(WebhookTarget { events, ..target(url()) }), None).await;
            assert!(db.deliveries(&batch.id).await.is_empty(), "nothing has ended yet");
            match end {
                WebhookEvent::Failed => db.fail(&batch.id).await,
                WebhookEvent::Cancelled => {
                    db.store.cancel_batch(&batch.id, &Scope::All).await.unwrap();
                    db.complete(&batch.id).await;
                }
                WebhookEvent::Expired => {
                    db.store.set_expiry(&batch.id, tidemill::domain::Timestamp(1)).await.unwrap();
                    db.store.close_windows(10).await.unwrap();
                    db.complete(&batch.id).await;
                }
                _ => db.complete(&batch.id).await,
            }
            let written: Vec<_> = db.deliveries(&batch.id).await.into_iter().map(|one| one.event).collect();
            let expected: Vec<_> = wanted.iter().copied().filter(|event| *event == end).collect();
            assert_eq!(written, expected, "{events:?} {end:?}");
        }
    }
    let silent = db.batch(None, None).await;
    db.complete(&silent.id).await;
    assert!(db.deliveries(&silent.id).await.is_empty());
}

async fn a_claim_leaves_its_attempt_and_is_exclusive(db: Db) {
    let batch = db.batch(Some(target(url())), None).await;
    db.complete(&batch.id).await;
    let (one, two) = tokio::join!(claim(&db), claim(&db));
    let claimed: Vec<_> = one.into_iter().chain(two).collect();
    assert_eq!(claimed.len(), 1, "one of both has it");
    let [claim] = claimed.as_slice() else { panic!() };
    assert!(claim.id.as_str().starts_with("msg_"));
    assert_eq!((claim.attempt, claim.number, claim.generation), (1, 1, 0));
    let attempts = db.attempts(&claim.id).await;
    assert_eq!((attempts.len(), attempts[0].outcome.as_str(), attempts[0].finished_at), (1, "started", None));
    assert_eq!(settle(&db, claim, success()).await, SettledAs::Delivered);
    let attempts = db.attempts(&claim.id).await;
    assert_eq!((attempts[0].outcome.as_str(), attempts[0].http_status), ("succeeded", Some(204)));
    assert_eq!(db.deliveries(&batch.id).await[0].state, DeliveryState::Delivered);
}

async fn whoever_lost_its_lease_changes_nothing(db: Db) {
    let batch = db.batch(Some(target(url())), None).await;
    db.complete(&batch.id).await;
    let late = claim(&db).await.remove(0);
    db.execute("UPDATE webhook_deliveries SET lease_expires_at = 1").await;
    let reaped = db.store.reap_deliveries(false, |_| Duration::ZERO).await.unwrap();
    assert_eq!((reaped.pending, reaped.dead), (1, 0));
    let second = claim(&db).await.remove(0);
    assert_eq!((second.attempt, &second.id), (2, &late.id), "the same id again");
    let before = format!("{:?} {:?}", db.deliveries(&batch.id).await, db.attempts(&late.id).await);
    for result in [success(), failure(), None] {
        assert_eq!(settle(&db, &late, result).await, SettledAs::LeaseLost);
    }
    assert_eq!(format!("{:?} {:?}", db.deliveries(&batch.id).await, db.attempts(&late.id).await), before);
    assert_eq!(settle(&db, &second, success()).await, SettledAs::Delivered);
    assert_eq!(settle(&db, &second, failure()).await, SettledAs::LeaseLost, "delivered stays delivered");
}

async fn a_lease_that_ran_out_is_an_unknown_attempt(db: Db) {
    let batch = db.batch(Some(WebhookTarget { max_attempts: 2, ..target(url()) }), None).await;
    db.complete(&batch.id).await;
    for (left, dead) in [(1, 0), (0, 1)] {
        let id = claim(&db).await.remove(0).id;
        assert_eq!(db.store.reap_deliveries(false, |_| Duration::ZERO).await.unwrap().pending, 0, "the lease holds");
        let reaped = db.store.reap_deliveries(true, |_| Duration::ZERO).await.unwrap();
        assert_eq!((reaped.pending, reaped.dead), (left, dead));
        assert_eq!(db.attempts(&id).await.last().unwrap().outcome.as_str(), "unknown");
    }
    assert!(claim(&db).await.is_empty(), "a body that crashes its sender can't do so for ever");
    let dead = db.dead_letters().await;
    assert_eq!((dead[0].attempts, dead[0].error_kind), (2, ErrorKind::Unknown));
}

async fn a_release_costs_no_attempt(db: Db) {
    let batch = db.batch(Some(WebhookTarget { max_attempts: 1, ..target(url()) }), None).await;
    db.complete(&batch.id).await;
    for _ in 0..3 {
        let claimed = claim(&db).await.remove(0);
        assert_eq!(claimed.attempt, 1);
        assert_eq!(settle(&db, &claimed, None).await, SettledAs::Pending);
        assert!(db.attempts(&claimed.id).await.is_empty(), "nothing was sent");
    }
}

async fn failures_end_as_a_dead_letter(db: Db) {
    let batch = db.batch(Some(target(url())), None).await;
    db.complete(&batch.id).await;
    let mut id = None;
    for (attempt, expected) in [(1, SettledAs::Pending), (2, SettledAs::Pending), (3, SettledAs::Dead)] {
        let claimed = claim(&db).await.remove(0);
        assert_eq!(claimed.attempt, attempt);
        assert_eq!(settle(&db, &claimed, failure()).await, expected);
        id = Some(claimed.id);
    }
    let dead = db.dead_letters().await;
    let delivery = &db.deliveries(&batch.id).await[0];
    assert_eq!(dead.len(), 1);
    assert_eq!(Some(&dead[0].delivery_id), id.as_ref());
    assert_eq!(dead[0].batch_id.as_ref(), Some(&batch.id));
    assert_eq!((dead[0].event, dead[0].attempts, dead[0].retry_success), (WebhookEvent::Completed, 3, false));
    assert_eq!((&dead[0].payload, dead[0].url.as_str()), (&delivery.body, url().as_str()));
    assert_eq!((dead[0].error_message.as_str(), delivery.state), ("refused", DeliveryState::Dead));
    assert!(claim(&db).await.is_empty());
}

async fn progress_is_replaced_and_never_comes_after_the_end(db: Db) {
    let events = EventFilter::parse(&["progress", "completed"]).unwrap();
    let batch = db.batch(Some(WebhookTarget { events, ..target(url()) }), None).await;
    let long_ago = || async { db.execute("UPDATE batches SET progress_at = 1").await };
    db.part(&batch.id, 0..20).await;
    assert!(db.deliveries(&batch.id).await.is_empty(), "not in the first 30 s");
    long_ago().await;
    db.part(&batch.id, 20..25).await;
    let first = db.deliveries(&batch.id).await;
    assert_eq!(first.len(), 1);
    assert_eq!(first[0].event, WebhookEvent::Progress);
    let body: serde_json::Value = serde_json::from_slice(&first[0].body).unwrap();
    assert_eq!((&body["type"], &body["request_counts"]["completed"]), (&"batch.progress".into(), &25.into()));
    long_ago().await;
    db.part(&batch.id, 25..30).await;
    assert_eq!(db.deliveries(&batch.id).await.len(), 1, "less than a tenth more");
    db.part(&batch.id, 30..40).await;
    let two = db.deliveries(&batch.id).await;
    assert_eq!(
        two.iter().map(|one| one.state).collect::<Vec<_>>(),
        [DeliveryState::Cancelled, DeliveryState::Pending],
        "the newer one replaces what waited"
    );
    let sequence = |body: &[u8]| serde_json::from_slice::<serde_json::Value>(body).unwrap()["sequence"].as_i64();
    assert!(sequence(&two[0].body) < sequence(&two[1].body));
    // A failure of what is being sent is no dead letter.
    let sending = claim(&db).await.remove(0);
    assert_eq!(settle(&db, &sending, failure()).await, SettledAs::Cancelled);
    long_ago().await;
    db.part(&batch.id, 40..60).await;
    db.complete(&batch.id).await;
    let last = db.deliveries(&batch.id).await;
    assert_eq!(last.iter().filter(|one| one.state == DeliveryState::Pending).count(), 1);
    let left = claim(&db).await;
    assert_eq!(left.iter().map(|one| one.event).collect::<Vec<_>>(), [WebhookEvent::Completed]);
    assert!(db.dead_letters().await.is_empty());
    // Too old: dropped, unsent.
    let old = db.batch(Some(WebhookTarget { events, ..target(url()) }), None).await;
    long_ago().await;
    db.part(&old.id, 0..20).await;
    db.execute("UPDATE webhook_deliveries SET expires_at = 1 WHERE state = 'pending'").await;
    assert!(claim(&db).await.is_empty());
    assert_eq!(db.store.reap_deliveries(false, |_| Duration::ZERO).await.unwrap().expired, 1);
}

async fn old_things_go_and_what_is_named_stays(db: Db) {
    let day = Duration::from_secs(86_400);
    for result in [success(), Some(AttemptResult::failed(ErrorKind::Gone, "gone"))] {
        let batch = db.batch(Some(target(url())), None).await;
        db.complete(&batch.id).await;
        settle(&db, &claim(&db).await.remove(0), result).await;
    }
    assert_eq!(db.store.purge_deliveries(day).await.unwrap().count, 0);
    assert_eq!(
        db.store.purge_deliveries(Duration::ZERO).await.unwrap().count,
        1,
        "a dead letter still names the other"
    );
    assert_eq!(db.store.purge_dead_letters(day, &Scope::All).await.unwrap().count, 0);
    assert_eq!(db.store.purge_dead_letters(Duration::ZERO, &Scope::Of("somebody else".into())).await.unwrap().count, 0);
    assert_eq!(db.store.purge_dead_letters(Duration::ZERO, &Scope::All).await.unwrap().count, 1);
    assert_eq!(db.store.purge_deliveries(Duration::ZERO).await.unwrap().count, 1);
    assert_eq!(db.execute("DELETE FROM webhook_attempts").await, 0, "their attempts went with them");
}
