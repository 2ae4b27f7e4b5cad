//! A round of claims. It runs in parallel with the scheduler's own loop, so that renewing leases never waits for a
//! claim.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::{sync::mpsc, time::Instant};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{SchedulerOptions, aside::Asides, plan::Demand, rank};
use crate::{
    domain::NodeId,
    fleet::{Rank, Tenant},
    store::{Candidate, ClaimedSegment, Store, StoreError},
};

/// The most batches considered in one round of claims.
const CANDIDATES: u64 = 1_000;
/// A look that finds nothing is followed by a pause so many times as long: looking takes at most half a percent of a core.
const PAUSE: u32 = 200;
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// After the database was away nothing is claimed for so long: leases have run out that nobody could renew, and whoever still
/// runs a segment is to renew first. A pool that waits for its database tries to connect about every second.
pub(super) const COURTESY: Duration = Duration::from_secs(2);

/// The input of a round.
pub(super) struct Round {
    pub(super) store: Store,
    pub(super) node: NodeId,
    pub(super) options: Arc<SchedulerOptions>,
    pub(super) shutdown: CancellationToken,
    /// The models that a worker serves.
    pub(super) served: Vec<String>,
    /// What runs here and what is wanted. The round adds its claims.
    pub(super) demand: Demand,
    /// The tenants that run something here.
    pub(super) running: BTreeSet<Tenant>,
    /// The batches that are left to other nodes.
    pub(super) asides: Asides,
    /// Whether the last call to the database failed.
    pub(super) away: bool,
    /// When the database answered again after an outage.
    pub(super) back_at: Option<Instant>,
    /// Receives each claimed segment at once.
    pub(super) claimed: mpsc::UnboundedSender<ClaimedSegment>,
}

/// The result of a round.
pub(super) struct Outcome {
    /// How long the query for candidates took.
    pub(super) took: Duration,
    /// How many batches it found.
    pub(super) looked: Result<usize, StoreError>,
    /// Whether all claims succeeded.
    pub(super) claimed: Result<(), StoreError>,
}

/// How long the scheduler does not look again of its own accord after a look that took so long. A look that finds nothing
/// passes over every batch that waits for a model that no worker serves, so with ten thousand of them it is not cheap.
/// News of a batch or a worker ends the wait; without news only a lease that has run out can be found.
pub(super) fn pause_after(took: Duration, found: usize) -> Duration {
    if found > 0 { Duration::ZERO } else { took.saturating_mul(PAUSE).min(LONGEST_PAUSE) }
}

/// Whether an answer that took this long came from a database that was unreachable meanwhile: a query may wait as long
/// as a renewal may be late.
pub(super) fn was_away(took: Duration, lease: Duration) -> bool {
    took > lease / 3
}

impl Round {
    pub(super) fn begin(self) -> AbortOnDropHandle<Outcome> {
        AbortOnDropHandle::new(tokio::spawn(self.run()))
    }

    async fn run(mut self) -> Outcome {
        let began = Instant::now();
        let candidates = self.store.candidates(&self.served, CANDIDATES).await;
        let took = began.elapsed();
        let candidates = match candidates {
            Ok(candidates) => candidates,
            Err(error) => return Outcome { took, looked: Err(error), claimed: Ok(()) },
        };
        let found = candidates.len();
        let is_back = self.away || was_away(took, self.options.lease);
        let claimed = if is_back || self.back_at.is_some_and(|back_at| back_at.elapsed() < COURTESY) {
            Ok(())
        } else {
            self.claim(candidates).await
        };
        Outcome { took, looked: Ok(found), claimed }
    }

    async fn claim(&mut self, candidates: Vec<Candidate>) -> Result<(), StoreError> {
        let ranked = candidates.into_iter().map(|candidate| {
            let rank = rank(&self.options.weights, &candidate.owner, candidate.priority, candidate.expires_at);
            (candidate, rank)
        });
        let mut candidates: Vec<(Candidate, Rank)> = ranked.collect();
        self.demand.share(&candidates.iter().map(|(_, rank)| rank.tenant()).chain(self.running.clone()).collect());
        // First each tenant within its own part of the room; the rest is for all, in the order of the batches.
        for lent in [false, true] {
            candidates = self.claim_of(candidates, lent).await?;
        }
        Ok(())
    }

    /// Claims segments of these. `lent`: beyond their tenants' own parts of this node's room, too. Returns those that there
    /// was no room for.
    async fn claim_of(
        &mut self,
        candidates: Vec<(Candidate, Rank)>,
        lent: bool,
    ) -> Result<Vec<(Candidate, Rank)>, StoreError> {
        let mut left = Vec::new();
        for (candidate, rank) in candidates {
            if self.asides.has(&candidate.id, Instant::now()) {
                continue;
            }
            loop {
                if self.shutdown.is_cancelled() || !self.demand.has_room() {
                    return Ok(Vec::new());
                }
                if !self.demand.has_room_for(rank.tenant()) {
                    break;
                }
                if !lent && !self.demand.has_room_of_its_own(rank.tenant()) {
                    left.push((candidate, rank));
                    break;
                }
                // Lines that are not to run any more need no worker.
                let mask =
                    if candidate.ending.is_some() { i64::MAX } else { self.demand.wanted(&candidate.models, rank) };
                if mask == 0 {
                    break;
                }
                let claimed = self.store.claim_segment(&self.node, &candidate.id, mask, self.options.lease).await;
                let claimed = match claimed {
                    Ok(Some(claimed)) => claimed,
                    Ok(None) => break,
                    // A batch that the database can't hand out does not keep others from being claimed.
                    Err(error) if error.is_final() => {
                        tracing::error!(batch = %candidate.id, %error, "a segment can't be claimed");
                        break;
                    }
                    Err(error) => return Err(error),
                };
                self.demand.running(rank.tenant(), u64::try_from(claimed.span.length).unwrap_or(0));
                for (model, lines) in claimed.models.iter().zip(lines_by_model(&claimed)) {
                    self.demand.at_hand(model.as_str().into(), rank, lines);
                }
                // The scheduler is gone: the lease runs out.
                let _ = self.claimed.send(claimed);
            }
        }
        Ok(left)
    }
}

/// The lines of a segment that has just been claimed: until its run has counted them, every one may be of every model that the
/// segment names.
pub(super) fn lines_by_model(claimed: &ClaimedSegment) -> impl Iterator<Item = usize> {
    let (models, lines) = (claimed.span.models, usize::try_from(claimed.span.requests).unwrap_or(0));
    (0..claimed.models.len()).map(move |model| if models & (1 << model) == 0 { 0 } else { lines })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_that_find_nothing_take_half_a_percent_of_the_time() {
        assert_eq!(pause_after(Duration::from_micros(500), 0), Duration::from_millis(100));
        assert_eq!(pause_after(Duration::from_millis(10), 0), Duration::from_secs(2));
        assert_eq!(pause_after(Duration::MAX, 0), LONGEST_PAUSE);
        assert_eq!(pause_after(Duration::MAX, 1), Duration::ZERO);
    }
}
