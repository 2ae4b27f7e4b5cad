//! Each tick of a sweep does a bounded amount of work, and says whether more is left.

use std::time::Duration;

use tidemill::{
    delivery::{Options, Webhooks},
    store::{ClaimShare, ClaimedDelivery, Settlement},
    upkeep::{self, Swept},
};

use crate::fixture::{Db, target};

crate::on_both!(retention_deletes_some_at_a_time, attempts_of_dead_senders_end_some_at_a_time);

/// Doubles the rows of a table until there are 512. `keys` are the columns in which they must differ.
async fn multiply(db: &Db, table: &str, keys: &[&str]) {
    for round in 0..9 {
        db.execute(&format!("CREATE TABLE copies AS SELECT * FROM {table}")).await;
        for key in keys {
            db.execute(&format!("UPDATE copies SET {key} = {key} || '{round}'")).await;
        }
        db.execute(&format!("INSERT INTO {table} SELECT * FROM copies")).await;
        db.execute("DROP TABLE copies").await;
    }
}

async fn claimed(db: &Db) -> ClaimedDelivery {
    let batch = db.batch(Some(target("http://127.0.0.1:1/hook".into())), None).await;
    db.complete(&batch.id).await;
    let due = db.store.due_targets(&[]).await.unwrap().targets.remove(0);
    db.store.claim_deliveries(&[ClaimShare::new(due.owner, due.target, 1)]).await.unwrap().remove(0)
}

async fn tick(webhooks: &Webhooks, name: &str) -> Swept {
    let mut sweeps = upkeep::of_webhooks(webhooks);
    sweeps.iter_mut().find(|sweep| sweep.name() == name).unwrap().tick().await.unwrap()
}

fn swept(done: u64, more: bool) -> Swept {
    Swept { done, failed: 0, more }
}

async fn retention_deletes_some_at_a_time(db: Db) {
    use tidemill::domain::webhook::{AttemptResult, ErrorKind};
    let claim = claimed(&db).await;
    let result = Some(AttemptResult::failed(ErrorKind::Gone, "gone"));
    let (id, lease, attempt) = (claim.id.clone(), claim.lease.clone(), claim.attempt);
    db.store.settle_deliveries(&[Settlement { id, lease, attempt, result, wait: Duration::ZERO }]).await.unwrap();
    let now = Duration::ZERO;
    let options = Options { keep_deliveries: now, keep_dead_letters: now, ..db.options() };
    let webhooks = Webhooks::new(db.store.clone(), options).unwrap();
    multiply(&db, "webhook_dead_letters", &["id", "delivery_id"]).await;
    // The delivery of the first is deleted in the same tick as the last of them at the latest.
    let [first, second] = [tick(&webhooks, "webhook-retention").await, tick(&webhooks, "webhook-retention").await];
    assert!(first.more && !second.more, "{first:?} {second:?}");
    assert_eq!((first.done / 500, first.done + second.done), (1, 512 + 1));
    assert_eq!(tick(&webhooks, "webhook-retention").await, swept(0, false));
    let claim = claimed(&db).await;
    db.execute("UPDATE webhook_deliveries SET state = 'delivered', lease_token = NULL, settled_at = 1").await;
    multiply(&db, "webhook_deliveries", &["id"]).await;
    assert_eq!(tick(&webhooks, "webhook-retention").await, swept(500, true));
    assert_eq!(tick(&webhooks, "webhook-retention").await, swept(12, false), "{}", claim.id);
}

async fn attempts_of_dead_senders_end_some_at_a_time(db: Db) {
    claimed(&db).await;
    multiply(&db, "webhook_deliveries", &["id"]).await;
    let webhooks = db.webhooks();
    assert_eq!(tick(&webhooks, "webhook-attempts").await, swept(0, false), "their leases hold");
    db.execute("UPDATE webhook_deliveries SET lease_expires_at = 1").await;
    for _ in 0..5 {
        assert_eq!(tick(&webhooks, "webhook-attempts").await, swept(100, true));
    }
    assert_eq!(tick(&webhooks, "webhook-attempts").await, swept(12, false));
    // A server that starts alone on its database ends all leases at once, unless it can't read them.
    let later = db.store.clock().await.unwrap().0 + 300_000_000;
    db.execute(&format!("UPDATE webhook_deliveries SET state = 'leased', lease_expires_at = {later}")).await;
    db.execute("UPDATE webhook_deliveries SET event = 'of a later version' WHERE id LIKE '%8'").await;
    let mut ended = 0;
    loop {
        let reaped = db.store.reap_deliveries(true, |_| Duration::ZERO).await.unwrap();
        ended += reaped.pending + reaped.dead;
        if !reaped.more {
            break;
        }
    }
    assert_eq!(ended, 256);
}
