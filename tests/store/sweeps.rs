//! Periodic work: each sweep is done by one node at a time, and by another when that one is gone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures::{
    FutureExt,
    future::{BoxFuture, join_all},
};
use tidemill::{
    domain::NodeId,
    store::{Store, SweepRow, WantedSweep},
    upkeep::{Sweep, SweepError, Swept, Upkeep},
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::fixture::{Db, LEASE};

const NAMES: [&str; 3] = ["a", "b", "c"];
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn wanted(caught_up: Option<Duration>) -> [WantedSweep<'static>; 3] {
    NAMES.map(|name| WantedSweep { name, caught_up })
}

async fn hold(store: &Store, node: &NodeId) -> Vec<SweepRow> {
    store.hold_sweeps(node, &wanted(None), LEASE).await.unwrap()
}

fn ours(rows: &[SweepRow]) -> Vec<&str> {
    let mut names: Vec<&str> = rows.iter().filter(|row| row.is_ours).map(|row| row.name.as_str()).collect();
    names.sort_unstable();
    names
}

async fn each_sweep_has_one_holder(db: Db) {
    let nodes: Vec<NodeId> = (0..4).map(|_| NodeId::generate()).collect();
    let stores = join_all((0..4).map(|_| db.another())).await;
    let held = join_all(nodes.iter().zip(&stores).map(|(node, store)| hold(store, node))).await;
    let mut holders: Vec<&str> = held.iter().flat_map(|rows| ours(rows)).collect();
    holders.sort_unstable();
    assert_eq!(holders, NAMES, "each sweep, once");
    // It stays with its holder.
    let again = join_all(nodes.iter().zip(&stores).map(|(node, store)| hold(store, node))).await;
    for (before, after) in held.iter().zip(&again) {
        assert_eq!(ours(before), ours(after));
    }
}

async fn a_lease_ends_by_its_time_by_being_given_back_and_with_a_clock_that_was_set_back(db: Db) {
    let [one, two] = [NodeId::generate(), NodeId::generate()];
    assert_eq!(ours(&hold(&db.store, &one).await), NAMES);
    assert!(ours(&hold(&db.store, &two).await).is_empty());
    db.execute("UPDATE sweeps SET lease_expires_at = 1 WHERE name = 'a'").await;
    assert_eq!(ours(&hold(&db.store, &two).await), ["a"]);
    assert_eq!(ours(&hold(&db.store, &one).await), ["b", "c"], "it has lost it");
    db.store.give_back_sweeps(&two, &["b"]).await.unwrap();
    assert_eq!(ours(&hold(&db.store, &one).await), ["b", "c"], "nobody gives back another's");
    db.store.give_back_sweeps(&one, &["b"]).await.unwrap();
    assert_eq!(ours(&hold(&db.store, &two).await), ["a", "b"]);
    // No lease is that long: the clock was set back since.
    db.execute("UPDATE sweeps SET lease_expires_at = lease_expires_at + 3600000000 WHERE name = 'c'").await;
    assert_eq!(ours(&hold(&db.store, &two).await), NAMES);
    db.store.free_sweeps().await.unwrap();
    assert_eq!(ours(&hold(&db.store, &one).await), NAMES);
}

async fn the_next_holder_knows_when_a_sweep_was_last_caught_up(db: Db) {
    let [one, two] = [NodeId::generate(), NodeId::generate()];
    let rows = hold(&db.store, &one).await;
    assert!(rows.iter().all(|row| row.caught_up.is_none() && row.known < PATIENCE), "{rows:?}");
    let hour = Duration::from_secs(3_600);
    db.store.hold_sweeps(&one, &wanted(Some(hour)), LEASE).await.unwrap();
    // A renewal that has nothing to say of it changes nothing, nor does a node without the lease.
    hold(&db.store, &one).await;
    let rows = db.store.hold_sweeps(&two, &wanted(Some(Duration::ZERO)), LEASE).await.unwrap();
    assert!(rows.iter().all(|row| !row.is_ours && row.caught_up.is_some_and(|ago| ago >= hour)), "{rows:?}");
    db.store.give_back_sweeps(&one, &NAMES).await.unwrap();
    let rows = hold(&db.store, &two).await;
    assert!(rows.iter().all(|row| row.is_ours && row.caught_up.is_some_and(|ago| ago >= hour)), "{rows:?}");
}

/// A sweep that one of the nodes can't do.
struct Lame {
    node: u32,
    began: mpsc::UnboundedSender<u32>,
}

impl Sweep for Lame {
    fn name(&self) -> &'static str {
        "lame"
    }

    fn every(&self) -> Duration {
        Duration::from_millis(10)
    }

    fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>> {
        async {
            let _ = self.began.send(self.node);
            if self.node == 0 { Err(SweepError::Here("no objects".into())) } else { Ok(Swept::all(1)) }
        }
        .boxed()
    }
}

async fn a_node_that_can_not_do_a_sweep_leaves_it_to_another(db: Db) {
    let (began, mut ticks) = mpsc::unbounded_channel();
    let stop = CancellationToken::new();
    #[allow(clippy::async_yields_async)] // the task goes on
    let start = async |node| {
        let sweep = Lame { node, began: began.clone() };
        let upkeep = Upkeep::new(db.another().await, NodeId::generate(), vec![Box::new(sweep)]);
        tokio::spawn(upkeep.with_lease(Duration::from_secs(3)).run(stop.clone()))
    };
    let lame = start(0).await;
    assert_eq!(next(&mut ticks).await, 0);
    let other = start(1).await;
    while next(&mut ticks).await == 0 {}
    for _ in 0..20 {
        assert_eq!(next(&mut ticks).await, 1, "and it stays there");
    }
    stop.cancel();
    lame.await.unwrap();
    other.await.unwrap();
}

/// A sweep that tells when a tick begins, and ends it when its node is told to.
struct Slow {
    node: u32,
    began: mpsc::UnboundedSender<u32>,
    inside: Arc<AtomicU32>,
    hangs: bool,
}

impl Sweep for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn every(&self) -> Duration {
        Duration::from_millis(10)
    }

    fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>> {
        async {
            assert_eq!(self.inside.fetch_add(1, Ordering::SeqCst), 0, "two nodes at once");
            let _ = self.began.send(self.node);
            if self.hangs {
                std::future::pending::<()>().await;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
            self.inside.fetch_sub(1, Ordering::SeqCst);
            Ok(Swept::all(1))
        }
        .boxed()
    }
}

fn start(store: Store, sweep: Slow, stop: &CancellationToken, lease: Duration) -> JoinHandle<()> {
    let upkeep = Upkeep::new(store, NodeId::generate(), vec![Box::new(sweep)]).with_lease(lease);
    tokio::spawn(upkeep.run(stop.clone()))
}

async fn next(began: &mut mpsc::UnboundedReceiver<u32>) -> u32 {
    tokio::time::timeout(PATIENCE, began.recv()).await.expect("a tick").unwrap()
}

async fn two_nodes_do_a_sweep_one_at_a_time_and_the_other_follows_an_orderly_stop_at_once(db: Db) {
    let (began, mut ticks) = mpsc::unbounded_channel();
    let inside = Arc::new(AtomicU32::new(0));
    let stops = [CancellationToken::new(), CancellationToken::new()];
    let mut running = Vec::new();
    for (node, stop) in (0..).zip(&stops) {
        let sweep = Slow { node, began: began.clone(), inside: inside.clone(), hangs: false };
        // Nobody's lease ends in this test.
        running.push(start(db.another().await, sweep, stop, Duration::from_secs(15)));
    }
    let first = next(&mut ticks).await;
    for _ in 0..20 {
        assert_eq!(next(&mut ticks).await, first);
    }
    stops[first as usize].cancel();
    running.remove(first as usize).await.unwrap();
    // The stop may have interrupted a tick.
    inside.store(0, Ordering::SeqCst);
    while next(&mut ticks).await == first {}
    stops.iter().for_each(CancellationToken::cancel);
    running.remove(0).await.unwrap();
}

async fn a_node_that_dies_in_a_sweep_is_followed_by_another_after_its_lease(db: Db) {
    let (began, mut ticks) = mpsc::unbounded_channel();
    let (inside, stop) = (Arc::new(AtomicU32::new(0)), CancellationToken::new());
    let lease = Duration::from_secs(5);
    let hangs = Slow { node: 0, began: began.clone(), inside: inside.clone(), hangs: true };
    let dies = start(db.another().await, hangs, &stop, lease);
    assert_eq!(next(&mut ticks).await, 0);
    let sweep = Slow { node: 1, began, inside: inside.clone(), hangs: false };
    let follows = start(db.another().await, sweep, &stop, lease);
    // While it lives, its lease is renewed and the other one waits, however long the tick takes.
    let expires = async || db.number("SELECT lease_expires_at FROM sweeps WHERE name = 'slow'").await;
    let first = expires().await;
    let renewed = async {
        while expires().await < first + 3_000_000 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, renewed).await.expect("the lease is renewed");
    assert!(ticks.try_recv().is_err(), "the other one has not begun");
    dies.abort();
    let _ = dies.await;
    inside.store(0, Ordering::SeqCst);
    let last = expires().await;
    assert_eq!(next(&mut ticks).await, 1);
    let now = db.store.clock().await.unwrap().0;
    assert!(now >= last, "not before the dead node's lease has ended");
    stop.cancel();
    follows.await.unwrap();
}

on_both_databases!(
    each_sweep_has_one_holder,
    a_lease_ends_by_its_time_by_being_given_back_and_with_a_clock_that_was_set_back,
    the_next_holder_knows_when_a_sweep_was_last_caught_up,
    two_nodes_do_a_sweep_one_at_a_time_and_the_other_follows_an_orderly_stop_at_once,
    a_node_that_dies_in_a_sweep_is_followed_by_another_after_its_lease,
    a_node_that_can_not_do_a_sweep_leaves_it_to_another,
);
