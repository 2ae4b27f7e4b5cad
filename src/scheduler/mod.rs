//! Which segments this node runs, and the run of each.
//!
//! [`plan`], [`order`], [`lines`], [`tries`] and [`deaths`] decide, purely; [`segment`] and [`work`] run one segment with
//! [`checkpoint`] for what must be durable; [`claiming`] claims segments, beside this file's loop. This file starts the
//! runs; [`running`] keeps their leases and tells them what has become of their batches.

mod aside;
mod checkpoint;
mod claiming;
mod crashes;
mod deaths;
mod doubts;
#[doc(hidden)]
pub mod lines;
mod order;
#[doc(hidden)]
pub mod plan;
mod run;
mod running;
mod seat;
mod segment;
mod stages;
mod tries;
mod troubles;
mod work;

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::FutureExt;
use tokio::{
    sync::{broadcast::error::RecvError, mpsc, watch},
    time::{Instant, MissedTickBehavior},
};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};

pub use run::Ended;
pub use stages::{Stage, Stages};
pub use tries::TryPolicy;
pub use troubles::Troubles;
pub use work::{PART_BYTES, PART_LINES};

use crate::{
    blobs::Blobs,
    domain::{Epoch, NodeId, Owner, Priority, SegmentRef, Timestamp, Weights, WorkerPriority, lifecycle::Ending},
    fault,
    fleet::{Fleet, Rank, Tenant},
    store::{ClaimedSegment, Store, StoreError},
    supervise::{Part, message},
};
use aside::Asides;
use claiming::{Outcome, Round, lines_by_model, pause_after, was_away};
use crashes::Crashes;
use plan::Demand;
use run::{Remaining, Run};
use running::Running;

/// The guarantee behind every wake: how long a claimable segment or a cancelled batch can go unnoticed.
const POLL: Duration = Duration::from_millis(500);
/// The least time between two searches for segments to claim that only notifications of changes cause.
const LOOK_GAP: Duration = Duration::from_millis(100);
/// Time at the shutdown for a database call that has begun. A claim that is dropped half way would leave a lease
/// without a run.
const HALF_WAY: Duration = Duration::from_secs(1);
/// After what is in flight at the shutdown has had its time, for so long runs may write down what they have. Then they
/// are abandoned, and their leases run out.
const LAST_WRITES: Duration = Duration::from_secs(2);
/// How long abandoned runs have to be gone.
const GONE: Duration = Duration::from_millis(200);

/// What the scheduler wants of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// Go on.
    Run,
    /// Write the lines without a result as errors, and finish.
    Finish(Ending),
    /// Send nothing more, take answers until then, give the segment back.
    Drain {
        /// Until when.
        deadline: Instant,
    },
    /// The segment is somebody else's: drop everything.
    Abandon,
}

/// How segments are run.
#[derive(Clone, Debug)]
pub struct SchedulerOptions {
    /// How long a lease lasts; it is renewed three times as often.
    pub lease: Duration,
    /// At most this much work is lost by a crash.
    pub flush_interval: Duration,
    /// The time limit of one try of a request.
    pub request_timeout: Duration,
    /// How often a request is tried.
    pub tries: TryPolicy,
    /// How batch requests say to their worker that others go first, for vLLM's `--scheduling-policy priority`.
    pub worker_priority: WorkerPriority,
    /// How large the owners' shares of the workers are.
    pub weights: Weights,
    /// How long requests in flight may continue at a stop.
    pub drain: Duration,
}

/// Claims segments and runs them.
pub struct Scheduler {
    store: Store,
    blobs: Blobs,
    fleet: Fleet,
    node: NodeId,
    options: Arc<SchedulerOptions>,
    shutdown: CancellationToken,
    running: HashMap<SegmentRef, Running>,
    runs: TaskTracker,
    /// When the last renewal that worked began.
    renewed_at: Instant,
    /// The last thing asked of the database failed.
    away: bool,
    /// When the database answered again after it was away.
    back_at: Option<Instant>,
    /// How long after a look no further one is due of its own accord.
    pause: Duration,
    troubles: Troubles,
    stages: Stages,
    asides: Asides,
    crashes: Crashes,
}

impl Scheduler {
    /// A scheduler that has claimed nothing yet.
    #[must_use]
    pub fn new(
        store: Store,
        blobs: Blobs,
        fleet: Fleet,
        node: NodeId,
        options: SchedulerOptions,
        shutdown: CancellationToken,
    ) -> Self {
        let options = Arc::new(options);
        Self {
            store,
            blobs,
            fleet,
            node,
            options,
            shutdown,
            running: HashMap::new(),
            runs: TaskTracker::new(),
            renewed_at: Instant::now(),
            away: false,
            back_at: None,
            pause: Duration::ZERO,
            troubles: Troubles::default(),
            stages: Stages::default(),
            asides: Asides::default(),
            crashes: Crashes::default(),
        }
    }

    /// The blob store or database errors that this node's runs wait for.
    #[must_use]
    pub fn troubles(&self) -> Troubles {
        self.troubles.clone()
    }

    /// How long this node's requests spend in each stage.
    #[must_use]
    pub fn stages(&self) -> Stages {
        self.stages.clone()
    }

    /// Says what this module's metrics are.
    fn describe_metrics() {
        metrics::describe_counter!("tidemill_requests_total", "requests that got their line here, by outcome");
        metrics::describe_counter!("tidemill_tries_failed_total", "failed tries of requests, by kind");
        metrics::describe_counter!("tidemill_parts_total", "parts committed before their segment was finished");
        stages::describe_metrics();
        metrics::describe_gauge!("tidemill_segments_running", "segments that this server runs");
        metrics::describe_counter!("tidemill_segments_crashed_total", "runs of segments that ended with a panic: bugs");
        metrics::describe_gauge!(troubles::STUCK, "segments that can't reach the blob store or the database");
    }

    /// Runs until the shutdown, and then until every segment is finished or given back.
    pub async fn run(mut self) {
        Self::describe_metrics();
        let shutdown = self.shutdown.clone();
        let (ended, mut endings) = mpsc::unbounded_channel();
        let (claims, mut claimed) = mpsc::unbounded_channel();
        let mut round: Option<AbortOnDropHandle<Outcome>> = None;
        // There is reason for another round as soon as this one is over.
        let mut look_again = false;
        let mut changes = self.store.changes();
        let mut topology = self.fleet.topology();
        let mut poll = tokio::time::interval(POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looked_at = Instant::now();
        // Something changed that was not looked at yet.
        let mut has_news = false;
        let mut renew = tokio::time::interval(self.options.lease / 3);
        renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            fault::panic_in(Part::Scheduler);
            tokio::select! {
                () = shutdown.cancelled() => break,
                Some(claimed) = claimed.recv() => {
                    self.start(claimed, ended.clone());
                    continue;
                }
                outcome = over(&mut round) => {
                    self.note(outcome);
                    if !std::mem::take(&mut look_again) {
                        continue;
                    }
                }
                Some((segment, epoch)) = endings.recv() => {
                    self.forget(&segment, epoch);
                    while let Ok((segment, epoch)) = endings.try_recv() {
                        self.forget(&segment, epoch);
                    }
                }
                _ = topology.changed() => {}
                changed = changes.recv() => match changed {
                    // A batch that is running here changes with every part: that is no news.
                    Ok(batch) if self.running.keys().any(|segment| segment.batch == batch) => continue,
                    // Those that run elsewhere change as often: all that comes at once is one reason to look.
                    Ok(_) | Err(RecvError::Lagged(_)) if looked_at.elapsed() < LOOK_GAP => {
                        has_news = true;
                        poll.reset_at(looked_at + LOOK_GAP);
                        continue;
                    }
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => break,
                },
                _ = poll.tick() => {
                    let began = Instant::now();
                    let Some(noticed) = half_way(&shutdown, self.notice_endings()).await else { break };
                    self.heard(began.elapsed(), &noticed);
                    if let Err(error) = noticed {
                        tracing::warn!(%error, "the state of running batches could not be read");
                    }
                    if !has_news && looked_at.elapsed() < self.pause {
                        continue;
                    }
                }
                _ = renew.tick() => {
                    let Some(renewed) = half_way(&shutdown, self.renew()).await else { break };
                    if let Err(error) = renewed {
                        // What runs goes on: if nobody claims it in between it is still this node's when the database
                        // is back, and else it finds itself fenced.
                        tracing::warn!(%error, "leases could not be renewed");
                        renew.reset_after(POLL.min(self.options.lease / 3));
                    }
                    continue;
                }
            }
            (looked_at, has_news) = (Instant::now(), false);
            if round.is_some() {
                look_again = true;
            } else {
                let Some(begun) = half_way(&shutdown, self.round(&claims)).await else { break };
                round = begun;
            }
            #[allow(clippy::cast_precision_loss)]
            metrics::gauge!("tidemill_segments_running").set(self.running.len() as f64);
        }
        // A round claims nothing more now; what it has claimed is given back like all the rest.
        drop(claims);
        self.drain(&mut endings, &mut claimed, &ended).await;
        drop(round);
    }

    /// Lets every run end or give its segment back, and keeps their leases meanwhile. What can't be written in time,
    /// because the database or the blob store is away, is left to the lease.
    async fn drain(
        &mut self,
        endings: &mut mpsc::UnboundedReceiver<(SegmentRef, Epoch)>,
        claimed: &mut mpsc::UnboundedReceiver<ClaimedSegment>,
        ended: &mpsc::UnboundedSender<(SegmentRef, Epoch)>,
    ) {
        let deadline = Instant::now() + self.options.drain;
        let give_up = deadline + LAST_WRITES;
        for running in self.running.values() {
            running.drain(deadline);
        }
        self.runs.close();
        let mut renew = tokio::time::interval(self.options.lease / 3);
        // Until the last round of claims is over: what it has just claimed is given back at once. A claim that has no answer
        // by then is left to its lease.
        let claims_until = deadline.min(Instant::now() + HALF_WAY);
        let mut claiming = true;
        while claiming || !self.running.is_empty() {
            tokio::select! {
                late = claimed.recv(), if claiming => match late {
                    Some(late) => {
                        let segment = late.segment.clone();
                        self.start(late, ended.clone());
                        if let Some(running) = self.running.get(&segment) {
                            running.drain(deadline);
                        }
                    }
                    None => claiming = false,
                },
                () = tokio::time::sleep_until(claims_until), if claiming => claiming = false,
                Some((segment, epoch)) = endings.recv() => self.forget(&segment, epoch),
                () = tokio::time::sleep_until(give_up) => break,
                _ = renew.tick() => {
                    if let Ok(Err(error)) = tokio::time::timeout_at(give_up, self.renew()).await {
                        tracing::warn!(%error, "leases could not be renewed");
                    }
                }
            }
        }
        if !self.running.is_empty() {
            tracing::warn!(
                segments = self.running.len(),
                lease = ?self.options.lease,
                "segments could not be released in time: when their leases have expired, they run elsewhere or at the next start, without the answers that could not be written"
            );
            for running in self.running.values() {
                running.control.send_replace(Control::Abandon);
            }
        }
        let _ = tokio::time::timeout(GONE, self.runs.wait()).await;
    }

    fn forget(&mut self, segment: &SegmentRef, epoch: Epoch) {
        if self.running.get(segment).is_some_and(|running| running.epoch == epoch) {
            self.running.remove(segment);
        }
    }

    fn demand(&self) -> Demand {
        let mut demand = Demand::new();
        for model in self.fleet.served() {
            let capacity = self.fleet.capacity(&model);
            demand.serve(model, capacity);
        }
        for running in self.running.values() {
            demand.running(running.rank.tenant(), running.bytes);
            for (model, lines) in running.models.iter().zip(running.remaining.iter()) {
                demand.at_hand(model.clone(), running.rank, lines.load(Ordering::Relaxed));
            }
        }
        demand
    }

    /// Records from a call's answer and duration whether the database is available.
    fn heard<T>(&mut self, took: Duration, answer: &Result<T, StoreError>) {
        match answer {
            Err(StoreError::Unavailable(_)) => self.away = true,
            Ok(_) if self.away || was_away(took, self.options.lease) => {
                self.away = false;
                self.back_at = Some(Instant::now());
            }
            // What the database holds may be wrong, but it is there.
            Ok(_) | Err(_) => {}
        }
    }

    /// Begins a round of claims if there is room for more segments.
    async fn round(&mut self, claims: &mpsc::UnboundedSender<ClaimedSegment>) -> Option<AbortOnDropHandle<Outcome>> {
        // Other nodes may have the objects.
        if self.shutdown.is_cancelled() || self.blobs.foreign().is_some() {
            return None;
        }
        if self.fleet.lists_patterns() {
            let (began, wanted) = (Instant::now(), self.store.wanted_models().await);
            self.heard(began.elapsed(), &wanted);
            match wanted {
                Ok(models) => self.fleet.want(&models),
                Err(error) => {
                    tracing::warn!(%error, "the models that are wanted could not be read");
                    return None;
                }
            }
        }
        let demand = self.demand();
        if !demand.has_room() {
            return None;
        }
        // A node that was held up would otherwise claim what it runs itself.
        if self.renewed_at.elapsed() > self.options.lease / 2
            && let Err(error) = self.renew().await
        {
            tracing::warn!(%error, "leases could not be renewed");
            return None;
        }
        let round = Round {
            store: self.store.clone(),
            node: self.node.clone(),
            options: self.options.clone(),
            shutdown: self.shutdown.clone(),
            served: self.fleet.served().iter().map(ToString::to_string).collect(),
            demand,
            running: self.running.values().map(|running| running.rank.tenant()).collect(),
            asides: self.asides.clone(),
            away: self.away,
            back_at: self.back_at,
            claimed: claims.clone(),
        };
        Some(round.begin())
    }

    /// Takes note of how a round went.
    fn note(&mut self, outcome: Outcome) {
        self.heard(outcome.took, &outcome.looked);
        self.pause = pause_after(outcome.took, *outcome.looked.as_ref().unwrap_or(&1));
        if let Err(error) = outcome.looked.and(outcome.claimed) {
            tracing::warn!(%error, "segments could not be claimed");
        }
    }

    fn start(&mut self, claimed: ClaimedSegment, ended: mpsc::UnboundedSender<(SegmentRef, Epoch)>) {
        let control = claimed.ending.map_or(Control::Run, Control::Finish);
        let (control, told) = watch::channel(control);
        let remaining: Remaining = lines_by_model(&claimed).map(Into::into).collect();
        let running = Running {
            epoch: claimed.epoch,
            control,
            models: claimed.models.iter().map(|model| Arc::from(model.as_str())).collect(),
            rank: rank(&self.options.weights, &claimed.owner, claimed.priority, claimed.expires_at),
            remaining: remaining.clone(),
            bytes: u64::try_from(claimed.span.length).unwrap_or(0),
        };
        let (segment, epoch) = (claimed.segment.clone(), claimed.epoch);
        tracing::debug!(%segment, %epoch, requests = claimed.span.requests, "segment claimed");
        if let Some(before) = self.running.insert(segment.clone(), running) {
            // Its lease ran out between a renewal and this claim: what it writes is refused from now on.
            before.control.send_replace(Control::Abandon);
        }
        let mut abandoned = told.clone();
        let run = Run {
            store: self.store.clone(),
            blobs: self.blobs.clone(),
            fleet: self.fleet.clone(),
            options: self.options.clone(),
            claimed,
            control: told,
            missed: self.asides.times(&segment.batch),
            remaining,
            troubles: self.troubles.clone(),
            stages: self.stages.clone(),
        };
        let (asides, crashes) = (self.asides.clone(), self.crashes.clone());
        self.runs.spawn(async move {
            // Told however the run ends.
            let guard = Told { ended, what: Some((segment.clone(), epoch)) };
            let how = tokio::select! {
                biased;
                how = watched(run, &crashes) => how,
                // Also in the middle of a question to a database or blob store that does not answer.
                _ = abandoned.wait_for(|control| *control == Control::Abandon) => Ended::Lost,
            };
            match how {
                Ended::Missing | Ended::Stuck | Ended::Broken(_) => asides.leave(&segment.batch, Instant::now()),
                Ended::Finished => asides.forget(&segment.batch),
                Ended::Released | Ended::Lost => {}
            }
            tracing::debug!(%segment, %epoch, ?how, "segment ended");
            drop(guard);
        });
    }
}

/// The end of the round that is under way; without one it never comes.
async fn over(round: &mut Option<AbortOnDropHandle<Outcome>>) -> Outcome {
    let Some(handle) = round else { return std::future::pending().await };
    let outcome = handle.await;
    *round = None;
    // It is aborted only together with the scheduler.
    outcome.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

/// A batch's.
fn rank(weights: &Weights, owner: &Owner, priority: Priority, expires_at: Timestamp) -> Rank {
    Rank::batch(priority, expires_at).of(Tenant::named(owner.as_str()).weighing(weights.of(owner)))
}

/// What `act` comes to; None if it is still under way [`HALF_WAY`] after the shutdown.
async fn half_way<T>(shutdown: &CancellationToken, act: impl Future<Output = T>) -> Option<T> {
    let overdue = async {
        shutdown.cancelled().await;
        tokio::time::sleep(HALF_WAY).await;
    };
    tokio::select! {
        biased;
        done = act => Some(done),
        () = overdue => None,
    }
}

/// Runs a segment. What breaks off is run again when its lease has run out, but not for ever: then its batch fails.
async fn watched(run: Run, crashes: &Crashes) -> Ended {
    let (store, segment, epoch) = (run.store.clone(), run.claimed.segment.clone(), run.claimed.epoch);
    if crashes.verdict(&segment).is_none() {
        let how = match AssertUnwindSafe(run.run()).catch_unwind().await {
            Ok(how) => how,
            // Not the end of the server: what one batch holds must not end every node, one after the other.
            Err(panic) => {
                metrics::counter!("tidemill_segments_crashed_total").increment(1);
                tracing::error!(%segment, %epoch, panic = message(&*panic), "the run of a segment has crashed: a bug");
                Ended::Broken("run it")
            }
        };
        crashes.ended(&segment, how, Instant::now());
        if !matches!(how, Ended::Broken(_)) {
            return how;
        }
    }
    let Some(error) = crashes.verdict(&segment) else { return Ended::Broken("run it") };
    match store.fail_batch(&segment, epoch, error).await {
        Ok(_) => {
            crashes.forget(&segment);
            Ended::Lost
        }
        Err(error) => {
            tracing::error!(%segment, %error, "a batch that can't continue could not be ended as failed");
            Ended::Stuck
        }
    }
}

/// Says that a run has ended, however it ended.
struct Told {
    ended: mpsc::UnboundedSender<(SegmentRef, Epoch)>,
    what: Option<(SegmentRef, Epoch)>,
}

impl Drop for Told {
    fn drop(&mut self) {
        if let Some(what) = self.what.take() {
            // The scheduler is gone: nobody needs to know.
            let _ = self.ended.send(what);
        }
    }
}
