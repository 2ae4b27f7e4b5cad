//! Servers that share a PostgreSQL database and a directory of objects: either can be asked, either can die.

use std::time::Duration;

use tidemill::{pb::BatchStatus, sim::SimConfig};

use super::{assert_complete, create, input, support, upload, watch, worker};
use crate::server::Server;

#[tokio::test(flavor = "multi_thread")]
async fn two_servers_share_the_work_and_one_goes_on_when_the_other_is_killed() {
    let Some(database) = support::postgres::database().await else { return };
    let config = SimConfig { latency: Duration::from_millis(60), max_num_seqs: 32, ..SimConfig::default() };
    let (sim, url) = worker(config).await;
    let objects = tempfile::tempdir().unwrap();
    let blobs = format!("file://{}", objects.path().display());
    let mut flags = vec!["--database-url", &database, "--blobs", &blobs, "--worker", &url];
    flags.extend(["--lease", "3s", "--flush-interval", "100ms", "--database-connections", "5"]);
    let (mut one, mut two) = (Server::start(&flags).await, Server::start(&flags).await);
    let file = upload(&mut one.client().await, input(3_000)).await;
    let batch = create(&mut two.client().await, &file, "once").await;
    assert_eq!(create(&mut one.client().await, &file, "once").await, batch, "one batch on both servers");
    let watching = tokio::spawn(watch(two.clone(), batch.clone()));
    support::patience::until("the batch is well under way", async || sim.faults().received() > 600).await;
    one.kill().await;
    let states = support::patience::ends("the batch ends", watching).await.unwrap();
    assert_eq!(states, [BatchStatus::InProgress, BatchStatus::Finalizing, BatchStatus::Completed]);
    one.restart().await;
    assert_complete(&mut one.client().await, &batch, 3_000).await;
    one.kill().await;
    two.kill().await;
}
