//! Starting on a database.

use futures::future::join_all;
use sea_orm::{ConnectionTrait, Statement};
use tidemill::store::{Store, StoreError};

use crate::support::direct;
use crate::support::postgres;

/// Nodes that start together find one schema, made once.
async fn all_start(url: &str, open: impl AsyncFn() -> Result<Store, StoreError>) {
    for store in join_all((0..4).map(|_| open())).await {
        let store = store.unwrap();
        let migrations = store.migrations().await.unwrap();
        assert!(!migrations.is_empty() && migrations.iter().all(|(_, applied)| *applied), "{migrations:?}");
        assert_eq!(store.last_sequence().await.unwrap().0, 0);
        store.ping().await.unwrap();
        store.close().await;
    }
    open().await.expect("again, with nothing to do").close().await;
    let raw = direct::connect(url).await;
    let count = Statement::from_string(raw.get_database_backend(), "SELECT COUNT(*) FROM counters");
    let counters: i64 = raw.query_one_raw(count).await.unwrap().unwrap().try_get_by_index(0).unwrap();
    assert_eq!(counters, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_start_at_once_on_an_empty_sqlite_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tidemill.db");
    all_start(&format!("sqlite://{}", file.display()), async || Store::sqlite(&file).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_start_at_once_on_an_empty_postgres_database() {
    let Some(url) = postgres::database().await else { return };
    // One connection must be enough: nothing may wait for a second one while it holds the first.
    all_start(&url, async || Store::postgres(&url, 1).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_start_at_once_on_a_postgres_database_that_is_serializable_by_default() {
    let Some(url) = postgres::database().await else { return };
    let all = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = serializable', \
               current_database()); END $$";
    direct::connect(&url).await.execute_unprepared(all).await.unwrap();
    all_start(&url, async || Store::postgres(&url, 1).await).await;
}

#[tokio::test]
async fn a_data_directory_may_have_any_name() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["with space", "100%", "a%20b", "what?", "#1", "zürich"] {
        let file = folder.path().join(name).join("tidemill.db");
        std::fs::create_dir(file.parent().unwrap()).unwrap();
        let store = Store::sqlite(&file).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        store.ping().await.unwrap();
        store.close().await;
        assert!(file.exists(), "{name}");
    }
}
