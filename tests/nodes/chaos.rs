//! Everything at once, by chance: a seed decides what happens to whom and when.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use tidemill::{pb::BatchStatus, sim::SimConfig};
use tokio::time::Instant;

use crate::{
    alone,
    calls::Anybody,
    cluster::{Cluster, LEASE, WorkerProcess, worker},
    history::{self, Submitted, submit_as},
    hooks::{self, Hooks, Via},
    proxy::{Held, Proxy},
    setting,
    support::{patience::HANG, postgres},
};

const NODES: usize = 3;
/// Who submit one batch after the other: together about as much work as two nodes do in that time. There is always some,
/// and the end is near after the last fault.
const CLIENTS: usize = 4;
/// What happens to nodes and their database. One after the other in random order, then all of them again.
const FAULTS: [Fault; 9] = [
    Fault::Kill,
    Fault::Kill,
    Fault::Freeze,
    Fault::Restart,
    Fault::Crash,
    Fault::Partition(Held::Both),
    Fault::Partition(Held::Answers),
    Fault::Reset,
    Fault::Delay,
];
/// What happens to workers meanwhile.
const WORKER_FAULTS: [WorkerFault; 4] =
    [WorkerFault::Kill, WorkerFault::Reset, WorkerFault::Partition, WorkerFault::Delay];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// SIGKILL, and the node is started again.
    Kill,
    /// SIGSTOP past the lease.
    Freeze,
    /// SIGTERM.
    Restart,
    /// The database dies and is started again.
    Crash,
    /// The node has no database for longer than its lease. What it has sent comes through then, or its connections break.
    Partition(Held),
    /// All the node's connections to the database break.
    Reset,
    /// The database is far away.
    Delay,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WorkerFault {
    /// SIGKILL, and the worker is started again.
    Kill,
    /// All connections to a worker break.
    Reset,
    /// A worker can't be reached for a while.
    Partition,
    /// A worker is far away.
    Delay,
}

/// Draws all of them in random order, then again.
struct Deck<T: 'static> {
    all: &'static [T],
    left: Vec<T>,
    drawn: Vec<T>,
}

impl<T: Copy> Deck<T> {
    fn of(all: &'static [T]) -> Self {
        Self { all, left: Vec::new(), drawn: Vec::new() }
    }

    fn draw(&mut self, random: &mut StdRng) -> T {
        if self.left.is_empty() {
            self.left = self.all.to_vec();
            self.left.shuffle(random);
        }
        let one = self.left.pop().unwrap();
        self.drawn.push(one);
        one
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_dies_every_line_ends_once_and_every_webhook_is_settled() {
    let _turn = alone().await;
    let Some(database) = postgres::database().await else { return };
    let seconds: u64 = setting("TIDEMILL_CHAOS_SECONDS", 12);
    let seed: u64 = setting("TIDEMILL_CHAOS_SEED", 2);
    eprintln!("TIDEMILL_CHAOS_SECONDS={seconds} TIDEMILL_CHAOS_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let config = SimConfig { latency: Duration::from_millis(250), error_rate: 0.02, seed: 1, ..SimConfig::default() };
    let (_near, near) = worker(config).await;
    let process = ["--latency-ms", "250", "--tokens-per-second", "0", "--error-rate", "0.02", "--seed"];
    let far = WorkerProcess::start(&[&process[..], &["2"]].concat()).await;
    let (path, far_url) = Proxy::of_worker(&far.url()).await;
    let mortal = WorkerProcess::start(&[&process[..], &["3"]].concat()).await;
    // The simulated errors of a request are the same on every try: tries enough that other workers answer it.
    let mut flags = vec!["--worker", &near, "--worker", &far_url, "--worker"];
    let mortal_url = mortal.url();
    flags.extend([mortal_url.as_str(), "--worker-max-in-flight", "16", "--max-tries", "20"]);
    flags.extend(hooks::FLAGS);
    let mut cluster = Cluster::start(&database, 0, &flags).await;
    let mut paths = Vec::new();
    for _ in 0..NODES {
        let (path, url) = Proxy::of_database(&database).await;
        cluster.add_behind(&url, &[]).await;
        paths.push(path);
    }
    let anybody = Anybody::new(cluster.addresses());
    let hooks = Hooks::start(cluster.nodes[0].address, seed).await;
    let warm_up = submit_as(&anybody, 20, "warm-up", |request| hooks.on(Via::Inline, request)).await;
    let mut submitted = vec![(warm_up, Via::Inline)];

    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut faults, mut worker_faults) = (Deck::of(&FAULTS), Deck::of(&WORKER_FAULTS));
    let (mut dice, mut others) = (StdRng::seed_from_u64(random.random()), StdRng::seed_from_u64(random.random()));
    let clients = futures::future::join_all((0..CLIENTS).map(|client| {
        let mut random = StdRng::seed_from_u64(random.random());
        let (anybody, hooks) = (&anybody, &hooks);
        async move {
            let mut submitted = Vec::new();
            while Instant::now() < end {
                let name = format!("batch-{client}-{}", submitted.len());
                submitted.push(submit_one(anybody, hooks, &mut random, &name).await);
                pause(&mut random, 0, 2_000).await;
            }
            submitted
        }
    }));
    let on_nodes = async {
        while Instant::now() < end {
            let victim = dice.random_range(0..NODES);
            break_node(&mut cluster, victim, &paths[victim], faults.draw(&mut dice), &mut dice).await;
            pause(&mut dice, 0, 500).await;
        }
    };
    let on_workers = async {
        let mut mortal = mortal;
        while Instant::now() < end {
            pause(&mut others, 500, 2_500).await;
            break_worker(&mut mortal, &path, worker_faults.draw(&mut others), &mut others).await;
        }
        // It lives on for the rest of the work.
        mortal
    };
    let (more, (), _mortal) = tokio::join!(clients, on_nodes, on_workers);
    submitted.extend(more.into_iter().flatten());
    hooks.calm();
    eprintln!("{} batches; {:?}; {:?}", submitted.len(), faults.drawn, worker_faults.drawn);
    for node in &mut cluster.nodes {
        assert!(node.is_alive(), "a node ended by itself");
    }

    let patience = HANG + Duration::from_secs(seconds);
    let checking = async {
        let mut checked = Vec::new();
        for (batch, via) in submitted {
            let id = batch.id.clone();
            checked.push((id, batch.check(&anybody).await, via));
        }
        checked
    };
    let Ok(checked) = tokio::time::timeout(patience, checking).await else {
        cluster.print_logs();
        panic!("not all batches end");
    };
    assert!(checked.iter().any(|(_, status, _)| *status == BatchStatus::Completed));
    let states: Vec<_> = checked[1..].iter().map(|(id, status, _)| (id.clone(), *status)).collect();
    history::check_events(&anybody, &states).await;
    history::check_epochs(&database).await;
    hooks.settle(&database, patience, true).await;
    let tally = hooks.check(&database, &cluster.addresses(), &checked).await;
    cluster.assert_no_panics();
    eprintln!("{} segments were taken over; {tally}", history::claimed_again(&database).await);
}

/// A batch, with a webhook or without, that some clients cancel.
async fn submit_one(anybody: &Anybody, hooks: &Hooks, random: &mut StdRng, name: &str) -> (Submitted, Via) {
    let vias = [Via::Inline, Via::Progress, Via::Endpoint, Via::Endpoint, Via::Dead, Via::None];
    let via = vias[random.random_range(0..vias.len())];
    let lines = random.random_range(20..300);
    let batch = submit_as(anybody, lines, name, |request| hooks.on(via, request)).await;
    if random.random_ratio(1, 6) {
        pause(random, 0, 1_000).await;
        anybody.cancel(&batch.id).await;
    }
    (batch, via)
}

async fn break_node(cluster: &mut Cluster, victim: usize, path: &Proxy, fault: Fault, random: &mut StdRng) {
    let lease = u64::try_from(LEASE.as_millis()).unwrap();
    let node = &mut cluster.nodes[victim];
    match fault {
        Fault::Kill => {
            node.kill().await;
            pause(random, 0, 1_000).await;
            node.restart().await;
        }
        Fault::Freeze => {
            node.freeze().await;
            pause(random, lease, lease + 1_000).await;
            node.thaw().await;
        }
        Fault::Restart => {
            node.terminate().await;
            node.restart().await;
        }
        Fault::Crash => crash_database(Duration::from_millis(random.random_range(0..1_500))).await,
        Fault::Partition(held) => {
            path.hold(held);
            pause(random, lease, lease + 1_000).await;
            if random.random() {
                path.reset();
            }
            path.heal();
        }
        Fault::Reset => path.reset(),
        Fault::Delay => {
            path.delay(Duration::from_millis(random.random_range(5..40)));
            pause(random, 500, 1_500).await;
            path.delay(Duration::ZERO);
        }
    }
}

async fn break_worker(mortal: &mut WorkerProcess, path: &Proxy, fault: WorkerFault, random: &mut StdRng) {
    match fault {
        WorkerFault::Kill => {
            mortal.kill().await;
            pause(random, 0, 1_500).await;
            mortal.restart().await;
        }
        WorkerFault::Reset => path.reset(),
        WorkerFault::Partition => {
            path.hold(Held::Both);
            pause(random, 500, 2_000).await;
            path.heal();
        }
        WorkerFault::Delay => {
            path.delay(Duration::from_millis(random.random_range(20..200)));
            pause(random, 500, 1_500).await;
            path.delay(Duration::ZERO);
        }
    }
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
