//! Others that are in the store's way, and how often it had to do a transaction again because of them.

use std::{future::Future, time::Duration};

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use sea_orm::{ConnectionTrait, DatabaseConnection, Statement, TransactionTrait};

use super::patience::ends;

/// Counts what is done again on this thread while it lives: for tests whose runtime is this thread alone.
pub struct Repeats {
    metrics: PrometheusHandle,
    _local: metrics::LocalRecorderGuard<'static>,
}

impl Repeats {
    pub fn count() -> Self {
        let recorder = Box::leak(Box::new(PrometheusBuilder::new().build_recorder()));
        Self { metrics: recorder.handle(), _local: metrics::set_default_local_recorder(recorder) }
    }

    pub fn seen(&self) -> u64 {
        let line = self.metrics.render();
        let line = line.lines().find(|line| line.starts_with("tidemill_transactions_repeated_total"));
        line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
    }
}

/// Does `call` while somebody else, who locks what `first` names at once and what `second` names as soon as the call waits
/// for it, is in its way: each waits for the other then, until PostgreSQL ends the call's transaction.
pub async fn deadlock<T>(raw: &DatabaseConnection, first: &str, second: &str, call: impl Future<Output = T>) -> T {
    let repeats = Repeats::count();
    let other = raw.begin().await.unwrap();
    // This one never gives up first.
    other.execute_unprepared("SET LOCAL deadlock_timeout = '900s'").await.unwrap();
    other.execute_unprepared(first).await.unwrap();
    let rival = async {
        let waiting =
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
        let waiting = Statement::from_string(raw.get_database_backend(), waiting);
        loop {
            let row = raw.query_one_raw(waiting.clone()).await.unwrap().unwrap();
            if row.try_get_by_index::<i64>(0).unwrap() > 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        other.execute_unprepared(second).await.unwrap();
        other.rollback().await.unwrap();
    };
    let both = async { tokio::join!(call, rival) };
    let (done, ()) = ends("the call waits for what the other has, and the other for what the call has", both).await;
    assert!(repeats.seen() > 0, "there was no deadlock: this test has tested nothing");
    done
}
