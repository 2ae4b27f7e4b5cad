//! Rows that can't be read, and writes that the database refuses: they cost nobody else a webhook.

use std::time::Duration;

use tidemill::{
    domain::{BatchStatus, NodeId, Scope, webhook::DeliveryState},
    store::{ClaimShare, DeliveryFilter},
};

use crate::{
    fixture::{Db, eventually, settled, target},
    receiver::Receiver,
};

crate::on_both!(
    what_the_database_refuses_of_one_delivery_delays_no_other,
    a_delivery_that_can_not_be_read_hides_no_other,
    a_batch_whose_webhook_can_not_be_written_fails_all_the_same,
);

async fn what_the_database_refuses_of_one_delivery_delays_no_other(db: Db) {
    let receiver = Receiver::always(200).await;
    db.refuse("claims", "NEW.state = 'leased' AND NEW.target LIKE '%/claim'").await;
    db.refuse("ends", "NEW.state = 'delivered' AND NEW.target LIKE '%/end'").await;
    let running = db.start();
    for round in 0..3 {
        let mut batches = Vec::new();
        for path in ["/claim", "/end", "/good", "/also"] {
            let batch = db.batch(Some(target(receiver.url(path))), None).await;
            db.complete(&batch.id).await;
            batches.push(batch.id);
        }
        for good in &batches[2..] {
            assert_eq!(settled(&db, good).await[0].state, DeliveryState::Delivered, "round {round}");
        }
    }
    running.stop().await;
    let paths: Vec<_> = receiver.requests().into_iter().map(|request| request.path).collect();
    assert!(!paths.contains(&"/claim".to_owned()) && paths.contains(&"/end".to_owned()), "{paths:?}");
}

async fn a_delivery_that_can_not_be_read_hides_no_other(db: Db) {
    let receiver = Receiver::always(200).await;
    let mut batches = Vec::new();
    for _ in 0..4 {
        // One target, so that they are claimed together.
        let batch = db.batch(Some(target(receiver.url("/"))), None).await;
        db.complete(&batch.id).await;
        batches.push(batch.id);
    }
    let spoil = async |at: usize, set: &str| {
        let id = &batches[at];
        assert_eq!(db.execute(&format!("UPDATE webhook_deliveries SET {set} WHERE batch_id = '{id}'")).await, 1);
    };
    spoil(0, "event = 'nonsense'").await;
    spoil(1, "attempts = 99").await;
    // A sender that is gone has left it.
    spoil(2, "event = 'nonsense', state = 'leased', lease_token = 'x', lease_expires_at = 1").await;
    let share = ClaimShare::new("", target(receiver.url("/")).url, 10);
    let claimed = db.store.claim_deliveries(std::slice::from_ref(&share)).await.unwrap();
    assert_eq!(claimed.len(), 1);
    assert_eq!(claimed[0].batch_id.as_ref(), Some(&batches[3]));
    assert!(db.store.claim_deliveries(&[share]).await.unwrap().is_empty(), "they are not the first for ever");
    let due = db.store.due_targets(&[]).await.unwrap();
    assert!(due.targets.iter().all(|one| one.due > due.at.0), "{due:?}");
    let reaped = db.store.reap_deliveries(true, |_| Duration::ZERO).await.unwrap();
    assert_eq!(reaped.pending, 1, "what can be read is taken back");
    let all = db.store.deliveries(&DeliveryFilter::within(Scope::All), None, 2).await.unwrap();
    assert_eq!(all.len(), 2, "a page is full all the same");
    let running = db.start();
    assert_eq!(settled(&db, &batches[3]).await[0].state, DeliveryState::Delivered);
    running.stop().await;
}

async fn a_batch_whose_webhook_can_not_be_written_fails_all_the_same(db: Db) {
    let table = if db.folder.is_some() { "webhook_deliveries" } else { "webhook_deliveries FOR EACH ROW" };
    let act = if db.folder.is_some() {
        "BEGIN SELECT RAISE(ABORT, 'refused'); END"
    } else {
        db.execute("CREATE FUNCTION no() RETURNS trigger AS 'BEGIN RAISE EXCEPTION ''no''; END' LANGUAGE plpgsql")
            .await;
        "EXECUTE FUNCTION no()"
    };
    db.execute(&format!("CREATE TRIGGER no BEFORE INSERT ON {table} {act}")).await;
    let batch = db.batch(Some(target("http://127.0.0.1:1/".into())), None).await;
    let lease = Duration::from_secs(600);
    let claimed = db.store.claim_segment(&NodeId::generate(), &batch.id, -1, lease).await.unwrap().unwrap();
    db.fail_as(&claimed).await;
    let failed = eventually("failed", || async {
        let batch = db.store.batch(&batch.id, &Scope::All).await.unwrap().unwrap();
        (batch.status == BatchStatus::Failed).then_some(batch)
    })
    .await;
    assert_eq!(failed.errors.len(), 1);
    assert!(db.deliveries(&batch.id).await.is_empty());
}
