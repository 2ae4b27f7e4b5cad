//! Retries many dead letters: a durable job, run page by page by one node at a time. Owners take turns.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Webhooks, dead_letter::DeadLetterRetryError, fairness::PER_TARGET};
use crate::{
    domain::{DeadLetterId, Owner, webhook::target_of},
    fault,
    store::{ClaimedJob, DeadLetterFilter, RetryJob, StoreError},
    supervise::Part,
};

/// Dead letters per page; a job's position is recorded after each page.
const PAGE: u64 = 100;
/// Targets that a job sends to at a time.
const TARGETS: usize = 8;
/// Jobs that a node runs at a time, each of another owner.
const JOBS: usize = 4;
/// Time that a job runs while all places are taken, before another owner's job gets its place.
const TURN: Duration = Duration::from_secs(5);
const LEASE: Duration = Duration::from_secs(60);
const RENEW: Duration = Duration::from_secs(20);
/// Time between two searches for jobs of dead nodes.
const LOOK_EVERY: Duration = Duration::from_secs(10);

impl Webhooks {
    /// Creates a job that retries every matching dead letter that has not been delivered since.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn retry_all(&self, owner: &Owner, filter: DeadLetterFilter) -> Result<RetryJob, StoreError> {
        let job = self.inner.store.create_retry_job(owner, filter).await?;
        self.inner.jobs.notify_one();
        Ok(job)
    }
}

/// Runs jobs until the shutdown, at most one per owner, so that no owner's jobs delay another's. If there are more
/// owners than places, each runs for [`TURN`] at a time.
pub(super) async fn run(webhooks: &Webhooks, shutdown: &CancellationToken) {
    let is_full = Arc::new(AtomicBool::new(false));
    // Tasks of their own: one that holds SQLite's only writer must go on while this waits for it.
    let (mut turns, mut running) = (Turns::default(), JoinSet::new());
    let mut looks = true;
    loop {
        fault::panic_in(Part::RetryJobs);
        while looks && running.len() < JOBS && !shutdown.is_cancelled() {
            match turns.next(webhooks).await {
                Ok(Some(job)) => {
                    let (webhooks, is_full, shutdown) = (webhooks.clone(), is_full.clone(), shutdown.clone());
                    running.spawn(async move {
                        let owner = job.job.owner.clone();
                        (owner, run_one(&webhooks, job, &is_full, &shutdown).await)
                    });
                }
                Ok(None) => break,
                Err(error) => {
                    warn!(%error, "retry jobs can't be read");
                    break;
                }
            }
        }
        if running.is_empty() && shutdown.is_cancelled() {
            return;
        }
        is_full.store(running.len() == JOBS, Ordering::Relaxed);
        tokio::select! {
            Some(ended) = running.join_next() => {
                let (owner, ended) = match ended {
                    Ok(ended) => ended,
                    // Ends this part of the server, so that its supervisor notices.
                    Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                    Err(_) => return,
                };
                turns.ended(owner);
                // After an error of the database, wait before the next claim.
                looks = ended.inspect_err(|error| warn!(%error, "a retry job can't continue now; it is tried again")).is_ok();
            }
            () = webhooks.inner.jobs.notified() => looks = true,
            () = sleep(LOOK_EVERY) => looks = true,
            () = shutdown.cancelled(), if !shutdown.is_cancelled() => {}
        }
    }
}

/// The owners' turns.
#[derive(Default)]
struct Turns {
    /// Owners whose jobs run here.
    running: BTreeSet<Owner>,
    /// Owners that have had a turn since all others had one.
    served: BTreeSet<Owner>,
}

impl Turns {
    /// Claims a job of an owner that has none running here, if possible of one that has had no turn lately.
    async fn next(&mut self, webhooks: &Webhooks) -> Result<Option<ClaimedJob>, StoreError> {
        let store = &webhooks.inner.store;
        let but: Vec<Owner> = self.running.union(&self.served).cloned().collect();
        let mut found = store.claim_retry_job(LEASE, &but).await?;
        if found.is_none() && !self.served.is_empty() {
            self.served.clear();
            let but: Vec<Owner> = self.running.iter().cloned().collect();
            found = store.claim_retry_job(LEASE, &but).await?;
        }
        if let Some(job) = &found {
            self.running.insert(job.job.owner.clone());
        }
        Ok(found)
    }

    fn ended(&mut self, owner: Owner) {
        self.running.remove(&owner);
        self.served.insert(owner);
    }
}

/// Runs a job until it ends or others need its place.
async fn run_one(
    webhooks: &Webhooks,
    mut job: ClaimedJob,
    is_full: &AtomicBool,
    shutdown: &CancellationToken,
) -> Result<(), StoreError> {
    let turn_ends = Instant::now() + TURN;
    let is_over = || Instant::now() >= turn_ends && is_full.load(Ordering::Relaxed);
    let store = &webhooks.inner.store;
    loop {
        let page = store.retry_job_page(&job, PAGE).await?;
        let Some(newest) = page.last().map(|dead_letter| dead_letter.id.clone()) else {
            store.advance_retry_job(&job, 0, true, LEASE).await?;
            info!(job = %job.job.id, "a retry job is done");
            return Ok(());
        };
        let mut targets: BTreeMap<String, Vec<DeadLetterId>> = BTreeMap::new();
        for dead_letter in page {
            targets.entry(target_of(&dead_letter.url)).or_default().push(dead_letter.id);
        }
        // Nothing new is started once the server stops, or the job is stopped or taken over. Sends in flight finish.
        let stop = shutdown.child_token();
        let sent = {
            let sends = send_page(webhooks, &job, targets, &stop);
            tokio::pin!(sends);
            let mut renew_at = Instant::now() + RENEW;
            let mut look_at = turn_ends;
            loop {
                tokio::select! {
                    sent = &mut sends => break sent,
                    () = sleep_until(look_at), if !stop.is_cancelled() => {
                        look_at = Instant::now() + TURN;
                        if is_over() {
                            stop.cancel();
                        }
                    }
                    () = sleep_until(renew_at) => {
                        renew_at = Instant::now() + RENEW;
                        match store.advance_retry_job(&job, 0, false, LEASE).await {
                            Ok(true) => {}
                            Ok(false) => stop.cancel(),
                            Err(error) => warn!(%error, job = %job.job.id, "a retry job's lease can't be renewed"),
                        }
                    }
                }
            }
        };
        let skipped = match sent {
            Ok(skipped) => skipped,
            Err(error) => {
                // What was not tried is tried when the database is back, by the node that runs the job then; what was
                // sent is found by the job's id. If even this can't be written, the lease expires.
                store.release_retry_job(&job).await?;
                return Err(error);
            }
        };
        // A page that was broken off is looked through again, and what it skips is counted then.
        let skipped = if stop.is_cancelled() {
            0
        } else {
            job.position = newest;
            skipped
        };
        let mine = store.advance_retry_job(&job, skipped, false, LEASE).await?;
        if shutdown.is_cancelled() || is_over() {
            // The next node finds what this one has sent by the job's id, and does not send it again.
            return store.release_retry_job(&job).await;
        }
        if !mine {
            return Ok(());
        }
    }
}

/// Sends a page to its targets in parallel. Returns how many dead letters had nothing to send. After an error of the
/// database nothing new is started.
async fn send_page(
    webhooks: &Webhooks,
    job: &ClaimedJob,
    targets: BTreeMap<String, Vec<DeadLetterId>>,
    stop: &CancellationToken,
) -> Result<i64, StoreError> {
    let note = |sum: Result<i64, StoreError>, one: Result<i64, StoreError>| {
        if one.is_err() {
            stop.cancel();
        }
        std::future::ready(sum.and_then(|sum| one.map(|one| sum + one)))
    };
    stream::iter(targets.into_values())
        .map(|dead_letters| {
            stream::iter(dead_letters)
                .take_while(|_| std::future::ready(!stop.is_cancelled()))
                .map(async |id| retry(webhooks, job, id).await.map(|sent| i64::from(!sent)))
                .buffer_unordered(PER_TARGET)
                .fold(Ok(0), note)
        })
        .buffer_unordered(TARGETS)
        .fold(Ok(0), note)
        .await
}

/// Retries one dead letter. Returns whether there was something to send.
///
/// # Errors
/// The database can't say now. Nothing was sent then, or the job's id is on what was.
async fn retry(webhooks: &Webhooks, job: &ClaimedJob, id: DeadLetterId) -> Result<bool, StoreError> {
    // The job's id is the request id: a dead letter that is visited twice is sent once.
    let (scope, request_id) = (job.job.filter.scope.clone(), job.job.id.to_string());
    let retried = webhooks.retry(id, scope, false, Some(request_id)).await;
    was_sent(retried.map(|_| ()))
}

fn was_sent(retried: Result<(), DeadLetterRetryError>) -> Result<bool, StoreError> {
    match retried {
        Ok(_) | Err(DeadLetterRetryError::LeaseLost | DeadLetterRetryError::Stopped) => Ok(true),
        Err(
            DeadLetterRetryError::NotFound
            | DeadLetterRetryError::AlreadyDelivered
            | DeadLetterRetryError::Busy
            | DeadLetterRetryError::EndpointDeleted,
        ) => Ok(false),
        // This one can never be retried; the others can.
        Err(DeadLetterRetryError::Store(error)) if error.is_final() => {
            warn!(%error, "a dead letter can't be retried");
            Ok(false)
        }
        Err(DeadLetterRetryError::Store(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use sea_orm::DbErr;

    use super::*;

    /// A dead letter is skipped where there is nothing to try, and never because the database is away.
    #[test]
    fn a_database_that_is_away_skips_nothing() {
        let store = |error| was_sent(Err(DeadLetterRetryError::Store(error)));
        assert!(matches!(
            store(StoreError::Unavailable(DbErr::Custom("away".into()))),
            Err(StoreError::Unavailable(_))
        ));
        assert!(matches!(store(StoreError::Rejected(DbErr::Custom("bug".into()))), Ok(false)));
        assert!(matches!(store(StoreError::Corrupt("odd".into())), Ok(false)));
        for (error, sent) in [
            (DeadLetterRetryError::LeaseLost, true),
            (DeadLetterRetryError::Stopped, true),
            (DeadLetterRetryError::NotFound, false),
            (DeadLetterRetryError::AlreadyDelivered, false),
            (DeadLetterRetryError::Busy, false),
            (DeadLetterRetryError::EndpointDeleted, false),
        ] {
            assert!(was_sent(Err(error)).is_ok_and(|was| was == sent));
        }
        assert!(was_sent(Ok(())).is_ok_and(|was| was));
    }
}
