//! PostgreSQL that does not answer, or whose answers don't arrive: for one node while the others have it, or for all.

use std::time::Duration;

use sea_orm::{ConnectionTrait, DatabaseTransaction, TransactionTrait};
use tidemill::{
    pb::{BatchStatus, CancelBatchRequest, GetBatchRequest},
    sim::SimConfig,
};
use tonic::{Code, Status, transport::Endpoint};
use tonic_types::StatusExt;

use crate::support::direct;
use crate::{
    calls::Anybody,
    cluster::{Client, Cluster, LEASE, Node, worker},
    history::{self, Submitted, submit},
    proxy::{Held, Proxy},
    support::{
        patience::{ends, until},
        postgres,
    },
    together,
};

/// A client that does not give up a node that is slow to say that it is there: only the node may say that it can't.
async fn patient(node: &Node) -> Client {
    let endpoint = Endpoint::from_shared(format!("http://{}", node.address)).unwrap();
    Client::new(endpoint.connect().await.unwrap())
}

/// A call to this node whose answer must be that the database is away, and when to try again.
async fn assert_refused(node: &Node, batch: &str) {
    let mut client = patient(node).await;
    let status = refused(client.get_batch(GetBatchRequest { batch_id: batch.to_owned() })).await;
    assert_away(&status);
}

fn assert_away(status: &Status) {
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.get_details_retry_info().unwrap().retry_delay.is_some(), "{status:?}");
}

async fn refused<T: std::fmt::Debug>(call: impl Future<Output = Result<T, Status>>) -> Status {
    ends("the call, however long the database is silent", call).await.unwrap_err()
}

/// Keeps these batches' rows locked: who wants to change one of them waits in the middle of a transaction.
async fn lock(database: &str, batches: &[&str]) -> DatabaseTransaction {
    let lock = direct::connect(database).await.begin().await.unwrap();
    for id in batches {
        lock.execute_unprepared(&format!("SELECT 1 FROM batches WHERE id = '{id}' FOR UPDATE")).await.unwrap();
    }
    lock
}

/// Waits until so many of a database's sessions wait for locks.
async fn waiting(database: &str, sessions: i64) {
    let sql =
        "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    until("they wait for a lock", async || history::ask(database, sql).await >= sessions).await;
}

/// One node with a batch under way loses the database in this way; another takes over; then the first has it back.
async fn a_partitioned_node(held: Held) {
    let _turn = together().await;
    let Some(database) = postgres::database().await else { return };
    let (proxy, behind) = Proxy::of_database(&database).await;
    let config = SimConfig { latency: Duration::from_millis(300), ..SimConfig::default() };
    let (_sim, url) = worker(config).await;
    let mut cluster = Cluster::start(&database, 0, &["--worker", &url, "--worker-max-in-flight", "64"]).await;
    cluster.add_behind(&behind, &[]).await;
    let first = Anybody::new(cluster.addresses());
    let file = first.upload(&history::input(1_500), "f").await;
    let id = first.create(&file, "b").await;
    // There is what a late write could spoil.
    let parts = format!("SELECT count(*) AS n FROM parts WHERE batch_id = '{id}'");
    until("it has stored parts", async || history::ask(&database, &parts).await > 0).await;
    proxy.hold(held);
    cluster.add(&[]).await;
    let other = Anybody::new(vec![cluster.nodes[1].address]);
    // What this client finds must be whole although the first node comes back.
    let batch = Submitted::of(&other, id.clone(), 1_500);
    tokio::time::sleep(LEASE).await;
    until("the other node has taken over", async || history::claimed_again(&database).await > 0).await;
    assert_refused(&cluster.nodes[0], &id).await;
    assert!(cluster.nodes[0].is_alive());
    // What it had sent comes through now, late.
    proxy.heal();
    until("it is there again", async || cluster.nodes[0].is_ready().await).await;
    assert_eq!(batch.check(&other).await, BatchStatus::Completed);
    history::check_epochs(&database).await;
    // It serves and works again.
    let again = Anybody::new(vec![cluster.nodes[0].address]);
    assert_eq!(submit(&again, 200, "after").await.check(&again).await, BatchStatus::Completed);
    cluster.assert_no_panics();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_cut_off_from_the_database_past_its_lease_writes_nothing() {
    a_partitioned_node(Held::Both).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_hears_no_answers_of_the_database_writes_nothing_past_its_lease() {
    a_partitioned_node(Held::Answers).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_hangs_refuses_calls_in_time_and_costs_nothing_else() {
    let _turn = together().await;
    let Some(database) = postgres::database().await else { return };
    let (proxy, behind) = Proxy::of_database(&database).await;
    let config = SimConfig { latency: Duration::from_millis(400), ..SimConfig::default() };
    let (sim, url) = worker(config).await;
    let mut cluster = Cluster::start(&behind, 1, &["--worker", &url, "--worker-max-in-flight", "32"]).await;
    let anybody = Anybody::new(cluster.addresses());
    let batch = submit(&anybody, 600, "b").await;
    let unwanted = submit(&anybody, 600, "unwanted").await;
    until("it is under way", async || sim.faults().received() > 50).await;
    let locked = lock(&database, &[&batch.id, &unwanted.id]).await;
    let mut client = patient(&cluster.nodes[0]).await;
    let cancel = CancelBatchRequest { batch_id: unwanted.id.clone() };
    let cancelled = tokio::spawn(async move { refused(client.cancel_batch(cancel)).await });
    waiting(&database, 2).await;
    // A part and a cancellation are under way, and nobody will ever say what became of them.
    proxy.hold(Held::Both);
    locked.rollback().await.unwrap();
    let node = &cluster.nodes[0];
    // Many at once, more than the node has connections: each is told, none waits for all the others.
    futures::future::join_all((0..30).map(|_| assert_refused(node, &batch.id))).await;
    assert_away(&cancelled.await.unwrap());
    assert!(!cluster.nodes[0].is_ready().await, "load balancers are told");
    assert!(cluster.nodes[0].is_alive());
    proxy.heal();
    until("it is there again", async || cluster.nodes[0].is_ready().await).await;
    anybody.cancel(&unwanted.id).await;
    assert_eq!(batch.check(&anybody).await, BatchStatus::Completed);
    assert_eq!(unwanted.check(&anybody).await, BatchStatus::Cancelled);
    assert_eq!(history::claimed_again(&database).await, 0, "nobody else was there: it has kept its work");
    cluster.assert_no_panics();
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_silent_for_ever_are_given_up_and_replaced() {
    let _turn = together().await;
    let Some(database) = postgres::database().await else { return };
    let (proxy, behind) = Proxy::of_database(&database).await;
    let config = SimConfig { latency: Duration::from_millis(400), ..SimConfig::default() };
    let (sim, url) = worker(config).await;
    let mut cluster = Cluster::start(&behind, 1, &["--worker", &url, "--worker-max-in-flight", "32"]).await;
    let anybody = Anybody::new(cluster.addresses());
    let batch = submit(&anybody, 600, "b").await;
    until("it is under way", async || sim.faults().received() > 50).await;
    let locked = lock(&database, &[&batch.id]).await;
    // A part and five cancellations wait; then the clients of those don't any more, which leaves connections behind, too.
    let client = patient(&cluster.nodes[0]).await;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..5 {
        let (mut client, request) = (client.clone(), CancelBatchRequest { batch_id: batch.id.clone() });
        calls.spawn(async move { client.cancel_batch(request).await });
    }
    waiting(&database, 6).await;
    calls.shutdown().await;
    proxy.strand();
    locked.rollback().await.unwrap();
    let id = batch.id.clone();
    let status = ends("it goes on", batch.check(&anybody)).await;
    // Whether any of the cancellations has happened nobody can know.
    assert!(matches!(status, BatchStatus::Completed | BatchStatus::Cancelled), "{status:?}");
    until("it is there again", async || cluster.nodes[0].is_ready().await).await;
    let node = Anybody::new(cluster.addresses());
    let gets = futures::future::join_all((0..30).map(|_| node.get(&id)));
    ends("it has connections enough", gets).await;
    assert!(cluster.nodes[0].is_alive());
    cluster.assert_no_panics();
}
