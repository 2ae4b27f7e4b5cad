//! The schema on a database that holds something: down a step and up again, and all the way.

use std::time::Duration;

use tidemill::{
    domain::{
        Scope, WebhookEndpointId,
        webhook::{EventFilter, WebhookTarget},
    },
    store::{Commit, NewEndpoint},
};
use tidemill_migrations::{Migrator, MigratorTrait};

use crate::fixture::{Db, new_batch, part};

/// Everything that this schema's first migration keeps, in use: a batch that has ended, one that runs, one that waits.
async fn populate(db: &Db) -> [tidemill::domain::Batch; 3] {
    let (ended, runs, waits) = (db.batch(1).await, db.batch(3).await, db.batch(2).await);
    let claimed = db.claim(&ended.id).await;
    assert_eq!(db.finish(&claimed).await, Commit::Done);
    let claimed = db.claim(&runs.id).await;
    db.store.commit_part(&claimed.segment, claimed.epoch, &part([0, 1], [2])).await.unwrap();
    db.store.configure_workers(&["http://a:1".to_owned()]).await.unwrap();
    [ended, runs, waits]
}

async fn what_is_there_survives_a_step_down_and_up(db: Db) {
    let batches = populate(&db).await;
    let mut before = Vec::new();
    for batch in &batches {
        before.push(db.all_rows(&batch.id).await);
    }
    let steps = u32::try_from(Migrator::migrations().len()).unwrap();
    // The first one makes what is looked at: down to it, never below.
    for down in 1..steps {
        Migrator::down(&db.raw, Some(down)).await.unwrap();
        Migrator::up(&db.raw, None).await.unwrap();
        for (batch, before) in batches.iter().zip(&before) {
            assert_eq!(db.all_rows(&batch.id).await, *before, "{down} down");
        }
    }
    // And it works: the batch that ran goes on to its end.
    let store = db.another().await;
    assert!(store.migrations().await.unwrap().iter().all(|(_, applied)| *applied));
    let claimed = db.claim(&batches[1].id).await;
    assert_eq!(db.finish(&claimed).await, Commit::Done);
    db.store.cancel_batch(&batches[2].id, &Scope::All).await.unwrap();
}

/// Down and up again keeps every row of what is left, and drops what the step has made: webhooks go with their migration,
/// batches stay.
async fn webhooks_go_with_their_migration_and_nothing_else_does(db: Db) {
    let url = "https://example.com/hook".to_owned();
    let timeout = Duration::from_secs(30);
    let (events, secret, max_attempts) = (EventFilter::default(), None, 3);
    let target = WebhookTarget { url: url.clone(), secret, max_attempts, timeout, events };
    let file = db.file(1).await;
    let batch = db.create(tidemill::domain::NewBatch { webhook: Some(target), ..new_batch(&file.id) }).await;
    let claimed = db.claim(&batch.id).await;
    assert_eq!(db.finish(&claimed).await, Commit::Done);
    let (id, owner) = (WebhookEndpointId::generate(), tidemill::domain::Owner::nobody());
    db.store
        .create_endpoint(NewEndpoint { id, owner, url, events, secret: None, max_attempts, timeout })
        .await
        .unwrap();
    let counts = async || {
        (
            db.number("SELECT COUNT(*) FROM webhook_endpoints").await,
            db.number("SELECT COUNT(*) FROM webhook_deliveries").await,
        )
    };
    let rows = db.all_rows(&batch.id).await;
    assert_eq!(counts().await, (1, 1));
    let steps = u32::try_from(Migrator::migrations().len()).unwrap();
    let webhooks = Migrator::migrations().iter().position(|one| one.name().ends_with("webhooks")).unwrap();
    let webhooks = u32::try_from(webhooks).unwrap();
    for down in 1..steps - webhooks {
        Migrator::down(&db.raw, Some(down)).await.unwrap();
        Migrator::up(&db.raw, None).await.unwrap();
        assert_eq!(counts().await, (1, 1), "{down} down");
    }
    Migrator::down(&db.raw, Some(steps - webhooks)).await.unwrap();
    Migrator::up(&db.raw, None).await.unwrap();
    assert_eq!(counts().await, (0, 0));
    assert_eq!(db.all_rows(&batch.id).await, rows);
}

async fn all_the_way_down_leaves_nothing_behind(db: Db) {
    populate(&db).await;
    Migrator::down(&db.raw, None).await.unwrap();
    let tables = if db.is_sqlite() {
        "SELECT COUNT(*) FROM sqlite_master WHERE type = 'table' AND name NOT IN ('seaql_migrations', 'sqlite_sequence')"
    } else {
        "SELECT COUNT(*) FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'seaql_migrations'"
    };
    assert_eq!(db.number(tables).await, 0);
    Migrator::up(&db.raw, None).await.unwrap();
    populate(&db).await;
}

async fn a_migrated_database_is_not_touched_by_a_start(db: Db) {
    let [ended, runs, _] = populate(&db).await;
    let before = [db.all_rows(&ended.id).await, db.all_rows(&runs.id).await];
    let again = db.another().await;
    assert_eq!(again.batch(&runs.id, &Scope::All).await.unwrap().unwrap().id, runs.id);
    assert_eq!([db.all_rows(&ended.id).await, db.all_rows(&runs.id).await], before);
}

on_both_databases!(
    what_is_there_survives_a_step_down_and_up,
    webhooks_go_with_their_migration_and_nothing_else_does,
    all_the_way_down_leaves_nothing_behind,
    a_migrated_database_is_not_touched_by_a_start,
);
