//! The database is away for longer than a lease, while nodes run batches.

use std::time::Duration;

use tidemill::{
    pb::{BatchStatus, GetBatchRequest},
    sim::SimConfig,
};
use tokio::time::Instant;
use tonic::Code;
use tonic_types::StatusExt;

use crate::{
    alone,
    calls::Anybody,
    cluster::{Cluster, LEASE, worker},
    history::{self, submit},
    support::{patience::until, postgres},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_costs_time_and_nothing_else() {
    let _turn = alone().await;
    let Some(database) = postgres::database().await else { return };
    let config = SimConfig { latency: Duration::from_millis(400), ..SimConfig::default() };
    let (sim, url) = worker(config).await;
    let mut cluster = Cluster::start(&database, 1, &["--worker", &url, "--worker-max-in-flight", "32"]).await;
    let anybody = Anybody::new(cluster.addresses());
    let batch = submit(&anybody, 600, "b").await;
    until("it is under way", async || sim.faults().received() > 50).await;
    let mut client = cluster.nodes[0].client().await;

    let down = tokio::task::spawn_blocking(postgres::crash).await.unwrap();
    let (away, sent) = (Instant::now(), sim.faults().received());
    let status = client.get_batch(GetBatchRequest { batch_id: batch.id.clone() }).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.get_details_retry_info().unwrap().retry_delay.is_some(), "{status:?}");
    assert!(!cluster.nodes[0].is_ready().await, "load balancers are told");
    tokio::time::sleep_until(away + 2 * LEASE).await;
    until("what is claimed goes on being sent", async || sim.faults().received() > sent + 100).await;
    assert!(cluster.nodes[0].is_alive());
    tokio::task::spawn_blocking(|| drop(down)).await.unwrap();

    let id = batch.id.clone();
    assert_eq!(batch.check(&anybody).await, BatchStatus::Completed);
    assert!(cluster.nodes[0].is_alive());
    assert_eq!(history::claimed_again(&database).await, 0, "nobody else was there: it has kept its work");
    assert_eq!(sim.faults().received(), 600, "{id}: no request ran twice");
    cluster.assert_no_panics();
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_do_not_take_each_others_work_when_the_database_comes_back() {
    let _turn = alone().await;
    let Some(database) = postgres::database().await else { return };
    let config = SimConfig { latency: Duration::from_millis(300), ..SimConfig::default() };
    let (sim, url) = worker(config).await;
    let mut cluster = Cluster::start(&database, 2, &["--worker", &url, "--worker-max-in-flight", "48"]).await;
    let anybody = Anybody::new(cluster.addresses());
    // One node takes three segments of a thousand before it has enough: the fourth is left for the other.
    let batch = submit(&anybody, 4_000, "b").await;
    let both = "SELECT count(DISTINCT lease_owner) AS n FROM segments";
    until("both run some of it", async || history::ask(&database, both).await == 2).await;

    let down = tokio::task::spawn_blocking(postgres::crash).await.unwrap();
    tokio::time::sleep(LEASE + Duration::from_millis(1_500)).await;
    tokio::task::spawn_blocking(|| drop(down)).await.unwrap();
    assert_eq!(batch.check(&anybody).await, BatchStatus::Completed);
    assert_eq!(history::claimed_again(&database).await, 0);
    assert_eq!(sim.faults().received(), 4_000, "no request ran twice");
    assert!(cluster.nodes.iter_mut().all(crate::cluster::Node::is_alive));
    cluster.assert_no_panics();
}
