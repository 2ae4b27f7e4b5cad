//! What comes late, of senders that were frozen or are gone..

use std::time::Duration;

use tidemill::{
    domain::Scope,
    domain::webhook::{AttemptResult, ErrorKind, WebhookTarget},
    store::{BeginRetry, ClaimShare, ClaimedDelivery, SettledAs, Settlement},
};

use crate::fixture::{Db, target};

crate::on_both!(
    a_late_result_beside_the_right_one_is_the_one_that_is_dropped,
    a_retry_that_nobody_ended_is_ended_by_the_next
);

async fn claim(db: &Db) -> ClaimedDelivery {
    let due = db.store.due_targets(&[]).await.unwrap().targets;
    let shares: Vec<_> = due.into_iter().map(|due| ClaimShare::new(due.owner, due.target, 1)).collect();
    db.store.claim_deliveries(&shares).await.unwrap().remove(0)
}

fn settlement(claim: &ClaimedDelivery, result: AttemptResult) -> Settlement {
    let (id, lease, attempt) = (claim.id.clone(), claim.lease.clone(), claim.attempt);
    Settlement { id, lease, attempt, result: Some(result), wait: Duration::ZERO }
}

fn success() -> AttemptResult {
    AttemptResult { error: None, http_status: Some(204), response_excerpt: None }
}

fn failure() -> AttemptResult {
    AttemptResult::failed(ErrorKind::Timeout, "too slow")
}

/// A process that was frozen may find both in its hands when it wakes up.
async fn a_late_result_beside_the_right_one_is_the_one_that_is_dropped(db: Db) {
    for late_first in [true, false] {
        let url = "http://127.0.0.1:1/hook".to_owned();
        let batch = db.batch(Some(WebhookTarget { max_attempts: 2, ..target(url) }), None).await;
        db.complete(&batch.id).await;
        let late = claim(&db).await;
        db.store.reap_deliveries(true, |_| Duration::ZERO).await.unwrap();
        let right = claim(&db).await;
        assert_eq!(late.id, right.id);
        let mut both = vec![settlement(&late, failure()), settlement(&right, success())];
        let mut expected = vec![SettledAs::LeaseLost, SettledAs::Delivered];
        if !late_first {
            both.reverse();
            expected.reverse();
        }
        let settled = db.store.settle_deliveries(&both).await.unwrap();
        assert_eq!(settled.into_iter().map(|one| one.now).collect::<Vec<_>>(), expected);
        let outcomes: Vec<_> = db.attempts(&right.id).await.into_iter().map(|one| one.outcome.as_str()).collect();
        assert_eq!(outcomes, ["unknown", "succeeded"]);
    }
}

/// The next one may come before the reaper. The request id of the first would be busy for ever otherwise.
async fn a_retry_that_nobody_ended_is_ended_by_the_next(db: Db) {
    let batch = db.batch(Some(WebhookTarget { max_attempts: 1, ..target("http://127.0.0.1:1/".into()) }), None).await;
    db.complete(&batch.id).await;
    let failed = claim(&db).await;
    db.store.settle_deliveries(&[settlement(&failed, failure())]).await.unwrap();
    let dead = db.dead_letters().await.remove(0);
    let begin = async |request_id| db.store.begin_retry(&dead.id, &Scope::All, false, Some(request_id)).await.unwrap();
    let BeginRetry::Started { claim: late, .. } = begin("one").await else { panic!("it is a dead letter") };
    assert!(matches!(begin("two").await, BeginRetry::Busy));
    db.execute("UPDATE webhook_dead_letters SET lease_expires_at = 1").await;
    let BeginRetry::Started { claim, .. } = begin("two").await else { panic!("its sender is gone") };
    assert!(db.store.finish_retry(&dead.id, &late, &success()).await.unwrap().is_none(), "its lease is lost");
    assert!(db.store.finish_retry(&dead.id, &claim, &failure()).await.unwrap().is_some());
    let outcomes: Vec<_> = db.attempts(&dead.delivery_id).await.into_iter().map(|one| one.outcome.as_str()).collect();
    assert_eq!(outcomes, ["failed", "unknown", "failed"]);
    let BeginRetry::Repeated(_, attempt) = begin("one").await else { panic!("of this one nobody will say more") };
    assert_eq!(attempt.outcome.as_str(), "unknown");
}
