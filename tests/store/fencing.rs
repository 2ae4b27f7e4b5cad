//! What is stored under which epoch.

use tidemill::store::Commit;

use crate::fixture::{Db, part};

async fn a_part_is_stored_with_its_epoch(db: Db) {
    let batch = db.batch(1).await;
    let first = db.claim(&batch.id).await;
    let commit = async |epoch, lines| db.store.commit_part(&first.segment, epoch, &part(lines, [])).await.unwrap();
    assert_eq!(commit(first.epoch, 0..1).await, Commit::Done);
    db.expire(&first.segment).await;
    let second = db.claim(&batch.id).await;
    assert_eq!(commit(second.epoch, 1..2).await, Commit::Done);
    let epochs = [first.epoch, second.epoch].map(|epoch| epoch.0);
    assert_eq!(epochs, [1, 2]);
    for epoch in epochs {
        assert_eq!(db.number(&format!("SELECT COUNT(*) FROM parts WHERE epoch = {epoch}")).await, 1);
    }
}

on_both_databases!(a_part_is_stored_with_its_epoch);
