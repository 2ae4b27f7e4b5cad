//! Runs the sweeps whose leases this node holds.

use std::{panic::AssertUnwindSafe, time::Duration};

use futures::{FutureExt, future::join_all};
use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Sweep, SweepError,
    plan::{self, Lease, Next, Outcome, Plan},
};
use crate::{
    domain::NodeId,
    fault,
    store::{Store, StoreError, WantedSweep},
    supervise::{Part, message},
};

/// How long a lease lasts. It is renewed three times as often.
const LEASE: Duration = Duration::from_secs(15);
/// The time limit of a tick. A tick that takes longer counts as stuck and is dropped; until then its lease is renewed.
const LONGEST: Duration = Duration::from_secs(600);
/// Time until the database is asked again for leases after it has failed.
const AGAIN: Duration = Duration::from_secs(1);
/// The longest time for giving the leases back at the end.
const FAREWELL: Duration = Duration::from_secs(1);

const SECONDS: &str = "tidemill_sweep_seconds";
const ITEMS: &str = "tidemill_sweep_items_total";
const FAILURES: &str = "tidemill_sweep_failures_total";
const LAG: &str = "tidemill_sweep_lag_seconds";

/// A node's periodic work.
pub struct Upkeep {
    store: Store,
    node: NodeId,
    lease: Duration,
    sweeps: Vec<Box<dyn Sweep>>,
}

/// The state that the holder of the leases shares with one sweep.
struct Shared {
    name: &'static str,
    every: Duration,
    lease: watch::Sender<Option<Lease>>,
    report: Mutex<Report>,
}

#[derive(Clone, Copy, Default)]
struct Report {
    caught_up: Option<Instant>,
    gives_up: bool,
}

impl Upkeep {
    /// Runs these sweeps as this node.
    #[must_use]
    pub fn new(store: Store, node: NodeId, sweeps: Vec<Box<dyn Sweep>>) -> Self {
        metrics::describe_histogram!(SECONDS, metrics::Unit::Seconds, "how long a tick of a sweep took");
        metrics::describe_counter!(ITEMS, "what a sweep has done, such as windows closed and objects deleted");
        metrics::describe_counter!(FAILURES, "what a sweep could not do, and ticks that failed");
        metrics::describe_gauge!(
            LAG,
            metrics::Unit::Seconds,
            "how long a sweep is overdue, whichever server does it; 0 if less than 15 s"
        );
        Self { store, node, lease: LEASE, sweeps }
    }

    /// With leases of this length, for tests.
    #[doc(hidden)]
    #[must_use]
    pub fn with_lease(self, lease: Duration) -> Self {
        Self { lease, ..self }
    }

    /// Sweeps until the shutdown, then gives the leases back.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { store, node, lease, sweeps } = self;
        let shared = |sweep: &dyn Sweep| Shared {
            name: sweep.name(),
            every: sweep.every(),
            lease: watch::Sender::new(None),
            report: Mutex::default(),
        };
        let all: Vec<Shared> = sweeps.iter().map(|sweep| shared(&**sweep)).collect();
        let work = async {
            let each = sweeps.into_iter().zip(&all).map(|(sweep, shared)| named(shared.name, run_sweep(sweep, shared)));
            tokio::join!(hold(&store, &node, &all, lease), join_all(each));
        };
        tokio::select! {
            () = work => {}
            () = shutdown.cancelled() => {}
        }
        let names: Vec<&str> = all.iter().map(|shared| shared.name).collect();
        match timeout(FAREWELL, store.give_back_sweeps(&node, &names)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "leases of sweeps could not be released; they expire"),
            Err(_) => tracing::debug!(
                "leases of sweeps could not be released, because the database does not answer; they expire"
            ),
        }
    }
}

/// Takes and renews leases for ever.
async fn hold(store: &Store, node: &NodeId, all: &[Shared], lease: Duration) {
    loop {
        let wait = match hold_once(store, node, all, lease).await {
            Ok(()) => lease / 3,
            Err(error) => {
                // Those that it has run out by themselves.
                tracing::warn!(%error, "leases of sweeps could not be renewed");
                AGAIN.min(lease / 3)
            }
        };
        sleep(wait).await;
    }
}

async fn hold_once(store: &Store, node: &NodeId, all: &[Shared], lease: Duration) -> Result<(), StoreError> {
    let mut reports: Vec<(&Shared, Report)> = all.iter().map(|shared| (shared, *shared.report.lock())).collect();
    // A sweep that fails here is left to the others for one round.
    let given_up: Vec<&str> =
        reports.iter().filter(|(_, report)| report.gives_up).map(|(shared, _)| shared.name).collect();
    reports.retain(|(shared, report)| {
        if report.gives_up {
            shared.lease.send_replace(None);
            shared.report.lock().gives_up = false;
        }
        !report.gives_up
    });
    if !given_up.is_empty() {
        tracing::warn!(sweeps = ?given_up, "sweeps that fail here are left to other servers for a while");
        store.give_back_sweeps(node, &given_up).await?;
    }
    let asked = Instant::now();
    let wanted: Vec<WantedSweep<'_>> = reports
        .iter()
        .map(|(shared, report)| WantedSweep {
            name: shared.name,
            caught_up: report.caught_up.map(|then| asked.saturating_duration_since(then)),
        })
        .collect();
    for row in store.hold_sweeps(node, &wanted, lease).await? {
        let Some(shared) = all.iter().find(|shared| shared.name == row.name) else { continue };
        let caught_up = row.caught_up.and_then(|ago| asked.checked_sub(ago));
        shared.lease.send_replace(row.is_ours.then(|| Lease { until: asked + lease, caught_up }));
        let lag = plan::lag(row.caught_up.unwrap_or(row.known), shared.every, lease);
        metrics::gauge!(LAG, "sweep" => shared.name).set(lag.as_secs_f64());
    }
    Ok(())
}

/// Does one sweep for ever, whenever it is due and this node holds its lease.
async fn run_sweep(mut sweep: Box<dyn Sweep>, shared: &Shared) {
    let (mut plan, mut lease) = (Plan::new(shared.every), shared.lease.subscribe());
    loop {
        fault::panic_in(Part::Upkeep);
        let held = *lease.borrow_and_update();
        let due = match plan.next(Instant::now(), held) {
            Next::Tick => None,
            Next::At(at) => Some(at),
            Next::Lease => {
                // Its sender lives as long as this.
                let _ = lease.changed().await;
                continue;
            }
        };
        if let Some(due) = due {
            tokio::select! {
                () = sleep_until(due) => {}
                _ = lease.changed() => {}
            }
            continue;
        }
        let began = Instant::now();
        let outcome = tick(&mut *sweep).await;
        plan.ended(began, Instant::now(), outcome);
        metrics::histogram!(SECONDS, "sweep" => shared.name).record(began.elapsed().as_secs_f64());
        *shared.report.lock() = Report { caught_up: plan.caught_up(), gives_up: plan.gives_up() };
    }
}

async fn tick(sweep: &mut dyn Sweep) -> Outcome {
    let name = sweep.name();
    let (failed, outcome) = match timeout(LONGEST, sweep.tick()).await {
        Ok(Ok(swept)) => {
            metrics::counter!(ITEMS, "sweep" => name).increment(swept.done);
            (swept.failed, if swept.more { Outcome::More } else { Outcome::CaughtUp })
        }
        Ok(Err(error)) => {
            tracing::warn!(sweep = name, %error, "a sweep failed and is tried again");
            let here = matches!(error, SweepError::Here(_));
            (1, if here { Outcome::FailedHere } else { Outcome::Failed })
        }
        Err(_) => {
            tracing::warn!(sweep = name, after = ?LONGEST, "a sweep did not end in time and is tried again");
            (1, Outcome::FailedHere)
        }
    };
    metrics::counter!(FAILURES, "sweep" => name).increment(failed);
    outcome
}

/// Names the sweep in a panic's message.
async fn named(name: &'static str, sweep: impl Future<Output = ()>) {
    if let Err(panic) = AssertUnwindSafe(sweep).catch_unwind().await {
        std::panic::resume_unwind(Box::new(format!("sweep {name}: {}", message(&*panic))));
    }
}

#[cfg(test)]
mod tests {
    use futures::future::BoxFuture;

    use super::{super::Swept, *};

    struct Broken(bool);

    impl Sweep for Broken {
        fn name(&self) -> &'static str {
            if self.0 { "broken" } else { "sound" }
        }

        fn every(&self) -> Duration {
            Duration::from_millis(1)
        }

        fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>> {
            assert!(!self.0, "oh no");
            std::future::ready(Ok(Swept::all(1))).boxed()
        }
    }

    #[tokio::test]
    async fn a_sweep_that_panics_ends_the_upkeep_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::sqlite(&folder.path().join("db")).await.unwrap();
        let sweeps: Vec<Box<dyn Sweep>> = vec![Box::new(Broken(false)), Box::new(Broken(true))];
        let supervisor = crate::supervise::Supervisor::default();
        let (upkeep, stop) = (Upkeep::new(store, NodeId::generate(), sweeps), CancellationToken::new());
        supervisor.spawn(Part::Upkeep, &stop, upkeep.run(stop.clone()));
        let died = supervisor.died().await;
        assert_eq!((died.part, died.why.as_str()), (Part::Upkeep, "it panicked: sweep broken: oh no"));
    }
}
