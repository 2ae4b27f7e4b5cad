//! One fault at a time, each looked at closely.

use std::time::Duration;

use sea_orm::{ConnectionTrait, TransactionTrait};
use tidemill::{
    pb::{BatchStatus, CancelBatchRequest, GetBatchRequest, ListBatchesRequest, WatchBatchRequest, batch_event::Event},
    sim::SimConfig,
    store::Store,
};
use tokio::time::Instant;
use tonic::Code;

use crate::support::direct;
use crate::{
    alone,
    calls::Anybody,
    cluster::{Cluster, LEASE, worker},
    history::{self, Submitted, submit},
    support::{
        patience::{ends, until},
        postgres,
    },
    together,
};

#[tokio::test(flavor = "multi_thread")]
async fn any_node_serves_any_call_and_the_work_is_shared() {
    let _turn = together().await;
    let Some(database) = postgres::database().await else { return };
    let config = SimConfig { latency: Duration::from_millis(100), ..SimConfig::default() };
    let (_sim, url) = worker(config).await;
    let cluster = Cluster::start(
        &database,
        3,
        // Nobody dies: no lease is to run out because a busy machine stands still.
        &[
            "--worker",
            &url,
            "--worker-max-in-flight",
            "32",
            "--log",
            "info,tidemill::scheduler=debug",
            "--lease",
            "60s",
        ],
    )
    .await;
    let anybody = Anybody::new(cluster.addresses());
    let first = submit(&anybody, 10, "first").await;
    let batch = submit(&anybody, 3_500, "once").await;
    // Everybody watches and follows it on its own, whoever runs it.
    let mut everybody = Vec::new();
    for address in cluster.addresses() {
        let one = Anybody::new(vec![address]);
        everybody.push(tokio::spawn(one.clone().watch(batch.id.clone())));
        let (follower, id) = (one.clone(), batch.id.clone());
        let follower = tokio::spawn(async move { follower.follow(id).await });
        everybody.push(tokio::spawn(async move {
            assert_eq!(follower.await.unwrap().len(), 3_500);
            Vec::new()
        }));
    }
    let id = batch.id.clone();
    let checked = [(first.id.clone(), first.check(&anybody).await), (id, batch.check(&anybody).await)];
    assert!(checked.iter().all(|(_, status)| *status == BatchStatus::Completed));
    for one in everybody {
        one.await.unwrap();
    }
    history::check_events(&anybody, &checked[1..]).await;
    let claimed = cluster.nodes.iter().filter(|node| node.logged("segment claimed") > 0).count();
    assert!(claimed > 1, "more than one node has run a part of it");
    assert_eq!(history::claimed_again(&database).await, 0, "nobody's work was taken away");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_frozen_past_its_lease_writes_nothing() {
    let _turn = together().await;
    let Some(database) = postgres::database().await else { return };
    let config = SimConfig { latency: Duration::from_millis(400), ..SimConfig::default() };
    let (sim, url) = worker(config).await;
    let mut cluster = Cluster::start(&database, 1, &["--worker", &url, "--worker-max-in-flight", "64"]).await;
    let frozen = Anybody::new(cluster.addresses());
    let file = frozen.upload(&history::input(1_500), "f").await;
    let id = frozen.create(&file, "b").await;
    until("it has finished lines", async || sim.faults().received() > 200).await;
    cluster.nodes[0].freeze().await;
    cluster.add(&[]).await;
    let anybody = Anybody::new(vec![cluster.nodes[1].address]);
    // A client of the other node, from the beginning: what it finds must be whole although the first node comes back.
    let batch = Submitted::of(&anybody, id, 1_500);
    tokio::time::sleep(LEASE).await;
    until("the other node has taken over", async || history::claimed_again(&database).await > 0).await;
    cluster.nodes[0].thaw().await;
    until("it is there again", async || cluster.nodes[0].is_ready().await).await;
    assert_eq!(batch.check(&anybody).await, BatchStatus::Completed);
    history::check_epochs(&database).await;
    // It serves and works again.
    let both = Anybody::new(cluster.addresses());
    assert_eq!(submit(&both, 200, "after").await.check(&both).await, BatchStatus::Completed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_frozen_in_the_middle_of_a_transaction_holds_nobody_up() {
    let _turn = together().await;
    let Some(database) = postgres::database().await else { return };
    let config = SimConfig { latency: Duration::from_millis(100), ..SimConfig::default() };
    let (_sim, url) = worker(config).await;
    let mut cluster = Cluster::start(&database, 1, &["--worker", &url, "--worker-max-in-flight", "16"]).await;
    let file = Anybody::new(cluster.addresses()).upload(&history::input(500), "f").await;
    let id = Anybody::new(cluster.addresses()).create(&file, "b").await;
    let direct = direct::connect(&database).await;
    let lock = direct.begin().await.unwrap();
    let sql = format!("SELECT 1 FROM batches WHERE id = '{id}' FOR UPDATE");
    lock.execute_unprepared(&sql).await.unwrap();
    let waiting =
        "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'";
    until("a part waits for the batch's lock", async || history::count(&direct, waiting).await > 0).await;
    cluster.nodes[0].freeze().await;
    // Now the node has the locks of the segment and of the batch, and will not let go of them.
    lock.rollback().await.unwrap();
    cluster.add(&[]).await;
    let anybody = Anybody::new(vec![cluster.nodes[1].address]);
    let batch = Submitted::of(&anybody, id, 500);
    let status = ends("it goes on", batch.check(&anybody)).await;
    assert_eq!(status, BatchStatus::Completed);
    cluster.nodes[0].thaw().await;
    until("it is there again", async || cluster.nodes[0].is_ready().await).await;
    history::check_epochs(&database).await;
    cluster.assert_no_panics();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_hears_of_another_nodes_changes_long_before_its_own_node_asks() {
    let _turn = alone().await;
    let Some(database) = postgres::database().await else { return };
    let cluster = Cluster::start(&database, 2, &[]).await;
    let (mut here, mut there) = (cluster.nodes[0].client().await, cluster.nodes[1].client().await);
    let file = Anybody::new(cluster.addresses()).upload(&history::input(1), "f").await;
    let (mut slowest, mut calls) = (Duration::ZERO, Duration::ZERO);
    for round in 0..6 {
        let id = Anybody::new(vec![cluster.nodes[0].address]).create(&file, &format!("b{round}")).await;
        let request = WatchBatchRequest { batch_id: id.clone(), after_revision: 0, min_interval: None };
        let mut events = there.watch_batch(request).await.unwrap().into_inner();
        events.message().await.unwrap();
        // What a call takes on this machine now.
        let began = Instant::now();
        there.get_batch(GetBatchRequest { batch_id: id.clone() }).await.unwrap();
        calls += began.elapsed();
        let began = Instant::now();
        here.cancel_batch(CancelBatchRequest { batch_id: id }).await.unwrap();
        while !matches!(events.message().await.unwrap().unwrap().event, Some(Event::StateChanged(_))) {}
        slowest = slowest.max(began.elapsed());
    }
    // By asking once a second, all of six would be as quick once in thousands of runs.
    assert!(slowest < Duration::from_millis(300) + 4 * calls, "{slowest:?}, and six calls took {calls:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_can_be_split() {
    let _turn = together().await;
    let Some(database) = postgres::database().await else { return };
    let (_sim, url) = worker(SimConfig::default()).await;
    let debug = "info,tidemill::scheduler=debug";
    let flags = ["--worker", &url, "--log", debug];
    let mut cluster = Cluster::start(&database, 0, &flags).await;
    cluster.add(&["--roles", "api"]).await;
    let front = Anybody::new(cluster.addresses());
    let batch = submit(&front, 300, "b").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(front.get(&batch.id).await.status(), BatchStatus::InProgress, "nobody is there to run it");
    cluster.add(&["--roles", "scheduler,delivery"]).await;
    assert_eq!(batch.check(&front).await, BatchStatus::Completed);
    assert_eq!(cluster.nodes[0].logged("segment claimed"), 0);
    assert!(cluster.nodes[1].logged("segment claimed") > 0);
    let refused = cluster.nodes[1].client().await.list_batches(ListBatchesRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented, "{refused:?}");
    let store = Store::postgres(&database, 2).await.unwrap();
    let roles: Vec<String> = store.nodes().await.unwrap().into_iter().map(|node| node.roles).collect();
    assert_eq!(roles, ["api", "scheduler,delivery"]);
    for node in &mut cluster.nodes {
        node.terminate().await;
    }
    assert!(store.nodes().await.unwrap().is_empty(), "who stops in order leaves no row");
}
