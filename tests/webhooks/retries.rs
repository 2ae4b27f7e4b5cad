//! Dead letters, retried by hand, one and many.

use std::time::Duration;

use futures::StreamExt;
use tidemill::{
    delivery::DeadLetterRetryError,
    domain::{
        DeadLetterId, Owner, Scope,
        webhook::{DeliveryState, WebhookTarget},
    },
    store::{DeadLetter, DeadLetterFilter, DeletedDeadLetter, RetryJobState},
};

use crate::{
    fixture::{CANARY, Db, Running, eventually, settled, signed, target},
    receiver::{Gate, Receiver, Reply},
};

crate::on_both!(
    a_retry_is_sent_once_and_not_again_unless_forced,
    of_two_retries_at_the_same_time_one_sends,
    a_request_id_makes_a_retry_idempotent,
    a_failed_retry_can_be_retried,
    a_retry_that_was_cut_off_can_be_retried,
    a_job_retries_what_matches_and_counts,
    a_job_goes_on_where_it_was_cut_off,
    jobs_of_owners_whose_receivers_hang_hold_up_nobody,
);

/// The dead letter of a batch whose receiver answered `500` as long as it was asked.
async fn dead_letter(db: &Db, running: &Running, url: String) -> DeadLetter {
    let webhook = signed(&running.webhooks, url).await;
    let batch = db.batch(Some(webhook), None).await;
    db.complete(&batch.id).await;
    assert_eq!(settled(db, &batch.id).await[0].state, DeliveryState::Dead);
    let all = db.dead_letters().await;
    all.into_iter().find(|one| one.batch_id.as_ref() == Some(&batch.id)).unwrap()
}

async fn a_retry_is_sent_once_and_not_again_unless_forced(db: Db) {
    let running = db.start();
    let receiver = Receiver::start(|n, _| Reply::Status(if n <= 3 { 500 } else { 200 })).await;
    let dead = dead_letter(&db, &running, receiver.url("/")).await;
    let retry = |force| running.webhooks.retry(dead.id.clone(), Scope::All, force, None);
    let retried = retry(false).await.unwrap();
    assert_eq!((retried.success, retried.forced, retried.http_status), (true, false, Some(200)));
    assert_eq!((retried.dead_letter.retry_success, retried.dead_letter.retry_count), (true, 1));
    assert!(retried.dead_letter.retried_at.is_some());
    assert!(matches!(retry(false).await, Err(DeadLetterRetryError::AlreadyDelivered)));
    let forced = retry(true).await.unwrap();
    assert_eq!((forced.success, forced.forced), (true, true));
    let requests = receiver.requests();
    assert_eq!(requests.len(), 5);
    for (n, request) in (1..).zip(&requests) {
        assert_eq!(request.header("webhook-id"), dead.delivery_id.as_str(), "always the same id");
        assert_eq!(request.header("x-webhook-attempt"), n.to_string());
        assert_eq!(request.body, dead.payload);
        assert!(request.verify(CANARY).is_ok(), "signed anew");
    }
    let generations: Vec<_> =
        db.attempts(&dead.delivery_id).await.iter().map(|one| (one.generation, one.attempt, one.forced)).collect();
    assert_eq!(generations, [(0, 1, false), (0, 2, false), (0, 3, false), (1, 1, false), (2, 1, true)]);
    let unknown = running.webhooks.retry(DeadLetterId::from_text("dl_none"), Scope::All, true, None).await;
    assert!(matches!(unknown, Err(DeadLetterRetryError::NotFound)));
    let other = running.webhooks.retry(dead.id.clone(), Scope::Of("somebody else".into()), true, None).await;
    assert!(matches!(other, Err(DeadLetterRetryError::NotFound)));
    assert_eq!(db.store.delete_dead_letter(&dead.id, &Scope::All).await.unwrap(), DeletedDeadLetter::Deleted);
    assert_eq!(db.store.delete_dead_letter(&dead.id, &Scope::All).await.unwrap(), DeletedDeadLetter::NotFound);
    running.stop().await;
}

async fn of_two_retries_at_the_same_time_one_sends(db: Db) {
    let running = db.start();
    let gate = Gate::closed();
    let held = gate.reply(200);
    let receiver = Receiver::start(move |n, _| if n <= 3 { Reply::Status(500) } else { held.clone() }).await;
    let dead = dead_letter(&db, &running, receiver.url("/")).await;
    let mut retries: futures::stream::FuturesUnordered<_> =
        (0..5).map(|_| running.webhooks.retry(dead.id.clone(), Scope::All, true, None)).collect();
    for _ in 0..4 {
        assert!(matches!(retries.next().await, Some(Err(DeadLetterRetryError::Busy))));
    }
    receiver.wait(4).await;
    // While it is being sent it can't be deleted.
    assert_eq!(db.store.delete_dead_letter(&dead.id, &Scope::All).await.unwrap(), DeletedDeadLetter::Busy);
    gate.open();
    assert!(matches!(retries.next().await, Some(Ok(_))));
    drop(retries);
    assert_eq!(receiver.requests().len(), 4);
    running.stop().await;
}

async fn a_request_id_makes_a_retry_idempotent(db: Db) {
    let running = db.start();
    let receiver = Receiver::start(|n, _| Reply::Status(if n <= 3 { 500 } else { 202 })).await;
    let dead = dead_letter(&db, &running, receiver.url("/")).await;
    let retry = |id: &str| running.webhooks.retry(dead.id.clone(), Scope::All, false, Some(id.to_owned()));
    let first = retry("once").await.unwrap();
    let again = retry("once").await.unwrap();
    assert_eq!((first.success, first.http_status), (again.success, again.http_status));
    assert_eq!(again.http_status, Some(202));
    assert_eq!(receiver.requests().len(), 4);
    assert!(matches!(retry("other").await, Err(DeadLetterRetryError::AlreadyDelivered)));
    running.stop().await;
}

async fn a_failed_retry_can_be_retried(db: Db) {
    let running = db.start();
    let receiver = Receiver::start(|n, _| Reply::Status(if n <= 4 { 503 } else { 200 })).await;
    let dead = dead_letter(&db, &running, receiver.url("/")).await;
    let retry = || running.webhooks.retry(dead.id.clone(), Scope::All, false, None);
    let failed = retry().await.unwrap();
    assert_eq!((failed.success, failed.http_status), (false, Some(503)));
    assert_eq!(failed.error_message.as_deref(), Some("the receiver answered 503"));
    assert_eq!((failed.dead_letter.retry_success, failed.dead_letter.attempts), (false, 3));
    assert!(retry().await.unwrap().success);
    running.stop().await;
}

async fn a_retry_that_was_cut_off_can_be_retried(db: Db) {
    let running = db.start();
    let receiver = Receiver::start(|n, _| Reply::Status(if n <= 3 { 500 } else { 200 })).await;
    let dead = dead_letter(&db, &running, receiver.url("/")).await;
    // Begun by a process that is then gone.
    db.store.begin_retry(&dead.id, &Scope::All, false, None).await.unwrap();
    assert!(matches!(
        running.webhooks.retry(dead.id.clone(), Scope::All, false, None).await,
        Err(DeadLetterRetryError::Busy)
    ));
    db.execute("UPDATE webhook_dead_letters SET lease_expires_at = 1").await;
    db.store.reap_deliveries(false, |_| Duration::ZERO).await.unwrap();
    assert!(running.webhooks.retry(dead.id.clone(), Scope::All, false, None).await.unwrap().success);
    let outcomes: Vec<_> =
        db.attempts(&dead.delivery_id).await.into_iter().map(|one| one.outcome.as_str()).skip(3).collect();
    assert_eq!(outcomes, ["unknown", "succeeded"]);
    running.stop().await;
}

async fn a_job_retries_what_matches_and_counts(db: Db) {
    let running = db.start();
    let up = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_up = up.clone();
    let status = move |path: &str| match path {
        "/bad" => 500,
        _ if is_up.load(std::sync::atomic::Ordering::SeqCst) => 200,
        _ => 500,
    };
    let receiver = Receiver::start(move |_, request| Reply::Status(status(&request.path))).await;
    let mut all = Vec::new();
    for path in ["/good/1", "/good/2", "/good/3", "/bad"] {
        all.push(dead_letter(&db, &running, receiver.url(path)).await);
    }
    up.store(true, std::sync::atomic::Ordering::SeqCst);
    let sent = receiver.requests().len();
    let none = DeadLetterFilter { batch_id: Some("batch_none".into()), ..DeadLetterFilter::within(Scope::All) };
    let empty = running.webhooks.retry_all(&Owner::nobody(), none).await.unwrap();
    assert_eq!((empty.matched, empty.state), (0, RetryJobState::Done));
    let job = running.webhooks.retry_all(&Owner::nobody(), DeadLetterFilter::within(Scope::All)).await.unwrap();
    assert_eq!(job.matched, 4);
    let done = eventually("done", || async {
        db.store.retry_job(&job.id, &Scope::All).await.unwrap().filter(|job| job.state != RetryJobState::Running)
    })
    .await;
    assert_eq!((done.state, done.succeeded, done.failed, done.skipped), (RetryJobState::Done, 3, 1, 0));
    assert_eq!(receiver.requests().len(), sent + 4);
    assert_eq!(db.dead_letters().await.iter().filter(|one| one.retry_success).count(), 3);
    // What was delivered is not sent again.
    let again = running.webhooks.retry_all(&Owner::nobody(), DeadLetterFilter::within(Scope::All)).await.unwrap();
    assert_eq!(again.matched, 1);
    running.stop().await;
}

async fn a_job_goes_on_where_it_was_cut_off(db: Db) {
    let running = db.start();
    let receiver = Receiver::start(|n, _| Reply::Status(if n <= 9 { 500 } else { 200 })).await;
    let mut ids = Vec::new();
    // Targets of their own: one that fails again and again would only be probed.
    for path in ["/1", "/2", "/3"] {
        ids.push(dead_letter(&db, &running, receiver.url(path)).await.id);
    }
    running.stop().await;
    let webhooks = db.webhooks();
    let job = webhooks.retry_all(&Owner::nobody(), DeadLetterFilter::within(Scope::All)).await.unwrap();
    // A runner took it, sent the first and was gone.
    let claimed = db.store.claim_retry_job(Duration::from_secs(60), &[]).await.unwrap().unwrap();
    assert_eq!(claimed.job.id, job.id);
    assert!(webhooks.retry(ids[0].clone(), Scope::All, false, Some(job.id.to_string())).await.unwrap().success);
    assert!(db.store.claim_retry_job(Duration::from_secs(60), &[]).await.unwrap().is_none());
    db.execute("UPDATE webhook_retry_jobs SET lease_expires_at = 1").await;
    let running = db.start();
    let done = eventually("done", || async {
        db.store.retry_job(&job.id, &Scope::All).await.unwrap().filter(|job| job.state == RetryJobState::Done)
    })
    .await;
    assert_eq!((done.succeeded, done.failed, done.skipped), (3, 0, 0));
    assert_eq!(receiver.requests().len(), 9 + 3, "none twice");
    running.stop().await;
}

/// Six owners' jobs go to receivers that hang: more jobs than a node runs at a time, each longer than its turn. A seventh owner's is
/// done all the same, before they are, and nothing of theirs is lost.
async fn jobs_of_owners_whose_receivers_hang_hold_up_nobody(db: Db) {
    const LETTERS: usize = 16;
    let running = db.start();
    let hangs = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (is_hanging, gate) = (hangs.clone(), Gate::closed());
    let held = gate.reply(200);
    let receiver = Receiver::start(move |_, request| {
        if !is_hanging.load(std::sync::atomic::Ordering::SeqCst) {
            Reply::Status(500)
        } else if request.path.starts_with("/good") {
            Reply::Status(200)
        } else {
            held.clone()
        }
    })
    .await;
    let owners = ["a", "b", "c", "d", "e", "f", "good"];
    let mut batches = Vec::new();
    for owner in owners {
        for at in 0..LETTERS {
            // Longer than a turn.
            let timeout = Duration::from_secs(8);
            let webhook = WebhookTarget { timeout, ..target(receiver.url(&format!("/{owner}/{at}"))) };
            let batch = db.batch_of(owner, Some(webhook), None).await;
            db.complete(&batch.id).await;
            batches.push(batch.id);
        }
    }
    for id in &batches {
        settled(&db, id).await;
    }
    assert_eq!(db.dead_letters().await.len(), owners.len() * LETTERS);
    let before = receiver.requests().len();
    hangs.store(true, std::sync::atomic::Ordering::SeqCst);
    let mut jobs = Vec::new();
    for owner in owners {
        let filter = DeadLetterFilter::within(Scope::Of(owner.into()));
        jobs.push(running.webhooks.retry_all(&owner.into(), filter).await.unwrap());
    }
    let ended =
        async |id| db.store.retry_job(id, &Scope::All).await.unwrap().filter(|job| job.state == RetryJobState::Done);
    let good = jobs.pop().unwrap();
    let done = eventually("the seventh is done", || ended(&good.id)).await;
    assert_eq!(done.succeeded, i64::try_from(LETTERS).unwrap(), "{done:?}");
    let first = |request: &&crate::receiver::Request| {
        ["/a/", "/b/", "/c/", "/d/"].iter().any(|one| request.path.starts_with(one))
    };
    let requests = &receiver.requests()[before..];
    let began = requests.iter().position(|request| request.path.starts_with("/good")).unwrap();
    let sent = requests[..began].iter().filter(first).count();
    // Before the seventh begins, each of the first four has its turn, in which it sends eight, and at most one has begun a
    // second turn. Without turns all four are done by then.
    assert!(sent <= 40, "the first four went on for longer than a turn: {sent} of 64");
    gate.open();
    for job in &jobs {
        let done = eventually("the others go on", || ended(&job.id)).await;
        assert_eq!(done.succeeded + done.failed, i64::try_from(LETTERS).unwrap(), "{done:?}");
    }
    running.stop().await;
}
