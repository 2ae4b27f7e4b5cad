//! Everything at once, by chance: a seed decides what happens to whom and when.

use std::{fmt::Display, str::FromStr, time::Duration};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidemill::{pb::BatchStatus, sim::SimConfig};
use tokio::time::Instant;

use crate::{
    alone,
    calls::Anybody,
    cluster::{Cluster, LEASE, worker},
    history::{self, submit},
    support::postgres,
};

const NODES: usize = 3;

fn setting<T: FromStr<Err: Display>>(name: &str, default: T) -> T {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")),
        Err(_) => default,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_dies_every_line_ends_once() {
    let _turn = alone().await;
    let Some(database) = postgres::database().await else { return };
    let seconds: u64 = setting("TIDEMILL_CHAOS_SECONDS", 10);
    let seed: u64 = setting("TIDEMILL_CHAOS_SEED", 2);
    eprintln!("TIDEMILL_CHAOS_SECONDS={seconds} TIDEMILL_CHAOS_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let config =
        |seed| SimConfig { latency: Duration::from_millis(250), error_rate: 0.02, seed, ..SimConfig::default() };
    let ((_a, a), (_b, b)) = (worker(config(1)).await, worker(config(2)).await);
    // The simulated errors of a request are the same on every try: tries enough that other workers answer it.
    let flags = ["--worker", &a, "--worker", &b, "--worker-max-in-flight", "24", "--max-tries", "20"];
    let mut cluster = Cluster::start(&database, NODES, &flags).await;
    let anybody = Anybody::new(cluster.addresses());
    let mut submitted = vec![submit(&anybody, 20, "warm-up").await];

    let end = Instant::now() + Duration::from_secs(seconds);
    let mut happened = [0; 4];
    while Instant::now() < end {
        // About as much work as two nodes do in that time: there is always some, and the end is near after the last fault.
        let batch = submit(&anybody, random.random_range(200..1_200), &format!("batch-{}", submitted.len())).await;
        if random.random_ratio(1, 4) {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..1_500))).await;
            anybody.cancel(&batch.id).await;
        }
        submitted.push(batch);
        let victim = random.random_range(0..NODES);
        match random.random_range(0..10) {
            0..=4 => {
                happened[0] += 1;
                cluster.nodes[victim].kill().await;
                pause(&mut random, 0, 1_000).await;
                cluster.nodes[victim].restart().await;
            }
            5..=6 => {
                happened[1] += 1;
                cluster.nodes[victim].freeze().await;
                let lease = u64::try_from(LEASE.as_millis()).unwrap();
                pause(&mut random, lease, lease + 2_000).await;
                cluster.nodes[victim].thaw().await;
            }
            7..=8 => {
                happened[2] += 1;
                crash_database(Duration::from_millis(random.random_range(0..1_500))).await;
            }
            _ => {
                happened[3] += 1;
                cluster.nodes[victim].terminate().await;
                cluster.nodes[victim].restart().await;
            }
        }
        pause(&mut random, 0, 700).await;
    }
    eprintln!(
        "{} batches; {} kills, {} freezes, {} database crashes, {} orderly restarts",
        submitted.len(),
        happened[0],
        happened[1],
        happened[2],
        happened[3]
    );
    for node in &mut cluster.nodes {
        assert!(node.is_alive(), "a node ended by itself");
    }
    let checking = async {
        let mut checked = Vec::new();
        for batch in submitted {
            let id = batch.id.clone();
            checked.push((id, batch.check(&anybody).await));
        }
        checked
    };
    let Ok(checked) = tokio::time::timeout(Duration::from_secs(60 + seconds), checking).await else {
        cluster.print_logs();
        panic!("not all batches end");
    };
    assert!(checked.iter().any(|(_, status)| *status == BatchStatus::Completed));
    history::check_events(&anybody, &checked[1..]).await;
    history::check_epochs(&database).await;
    cluster.assert_no_panics();
    eprintln!("{} segments were taken over", history::claimed_again(&database).await);
}

/// Stops the database at once and starts it again after a while.
pub async fn crash_database(away: Duration) {
    let down = tokio::task::spawn_blocking(postgres::crash).await.unwrap();
    tokio::time::sleep(away).await;
    tokio::task::spawn_blocking(|| drop(down)).await.unwrap();
}

async fn pause(random: &mut StdRng, least: u64, most: u64) {
    tokio::time::sleep(Duration::from_millis(random.random_range(least..most))).await;
}
