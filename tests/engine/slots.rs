//! Slots of a worker: who is given them when they come back.

use std::time::Duration;

use tidemill::{
    domain::{Priority, Timestamp},
    fleet::{Acquire, Fleet, FleetOptions, InFlight, NoSlot, Rank, Slot, Want},
    sim::SimConfig,
    store::Store,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::harness::Worker;

const SLOTS: u32 = 4;

/// What a wish has been given by now.
fn given(wish: &mut Acquire) -> Vec<Slot> {
    std::iter::from_fn(|| wish.try_next().ok()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_that_come_back_together_are_one_turn_and_each_for_itself_is_one_of_its_own() {
    tidemill::telemetry::install_tls_provider();
    let worker = Worker::start(SimConfig::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let store = Store::sqlite(&folder.path().join("db")).await.unwrap();
    let (tasks, shutdown) = (TaskTracker::new(), CancellationToken::new());
    let options = FleetOptions { limit: InFlight::Fixed(SLOTS), ..FleetOptions::default() };
    let fleet = Fleet::start(store, options, &tasks, shutdown.clone()).await.unwrap();
    fleet.register(&worker.url()).await.unwrap();
    let mut topology = fleet.topology();
    let serves = async {
        while fleet.capacity("sim") < SLOTS {
            topology.changed().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(120), serves).await.unwrap();

    let rank = Rank::batch(Priority::default(), Timestamp(1));
    let want = Want { model: "sim".into(), rank, avoid: Default::default(), alone: false };
    let wish = || fleet.acquire(want.clone(), SLOTS);
    let all = given(&mut wish());
    assert_eq!(all.len(), SLOTS as usize, "what is free is given at once");
    let (mut first, mut second) = (wish(), wish());
    assert_eq!((first.try_next().err(), second.try_next().err()), (Some(NoSlot::Yet), Some(NoSlot::Yet)));
    Slot::give_back(all);
    let all = given(&mut first);
    assert_eq!((all.len(), given(&mut second).len()), (SLOTS as usize, 0), "together: to whoever is first");
    assert_eq!(first.try_next().err(), Some(NoSlot::Ended));

    let mut third = wish();
    drop(all);
    let (to_second, to_third) = (given(&mut second), given(&mut third));
    assert_eq!((to_second.len(), to_third.len()), (2, 2), "one by one: in turns");

    // Whoever no longer wants them leaves none behind.
    drop((second, third));
    Slot::give_back(to_second);
    drop(to_third);
    assert_eq!(given(&mut wish()).len(), SLOTS as usize);
    Slot::give_back(Vec::new());
    shutdown.cancel();
}
