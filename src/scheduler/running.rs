//! The runs of this node: renews their leases, and tells them what has become of their batches.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use tokio::{sync::watch, time::Instant};

use super::{Control, Scheduler, run::Remaining};
use crate::{
    domain::{BatchId, Epoch, SegmentRef},
    fleet::Rank,
    store::StoreError,
};

/// A segment that this node runs.
pub(super) struct Running {
    pub(super) epoch: Epoch,
    pub(super) control: watch::Sender<Control>,
    pub(super) models: Vec<Arc<str>>,
    pub(super) rank: Rank,
    pub(super) remaining: Remaining,
    pub(super) bytes: u64,
}

impl Running {
    /// Sends nothing more from now on, unless it ends its lines anyhow.
    pub(super) fn drain(&self, deadline: Instant) {
        self.control.send_if_modified(|control| {
            let runs = *control == Control::Run;
            if runs {
                *control = Control::Drain { deadline };
            }
            runs
        });
    }
}

impl Scheduler {
    /// Renews the leases of all runs; those that have lost theirs are stopped.
    pub(super) async fn renew(&mut self) -> Result<(), StoreError> {
        let began = Instant::now();
        if self.running.is_empty() {
            self.renewed_at = began;
            return Ok(());
        }
        let before: Vec<(SegmentRef, Epoch)> =
            self.running.iter().map(|(segment, running)| (segment.clone(), running.epoch)).collect();
        let running: Vec<SegmentRef> = before.iter().map(|(segment, _)| segment.clone()).collect();
        let renewed = self.store.renew_leases(&self.node, &running, self.options.lease).await;
        self.heard(began.elapsed(), &renewed);
        let renewed = renewed?;
        self.renewed_at = began;
        let held: HashMap<SegmentRef, Epoch> = renewed.held.into_iter().map(|one| (one.segment, one.epoch)).collect();
        for (segment, epoch) in before {
            // What has just finished is not held either, and does not mind.
            if held.get(&segment) != Some(&epoch)
                && let Some(running) = self.running.get(&segment)
                && running.epoch == epoch
            {
                running.control.send_replace(Control::Abandon);
            }
        }
        Ok(())
    }

    /// Tells runs whose batch was cancelled, has expired or has failed.
    pub(super) async fn notice_endings(&mut self) -> Result<(), StoreError> {
        let mut batches: BTreeMap<BatchId, Vec<&Running>> = BTreeMap::new();
        for (segment, running) in &self.running {
            batches.entry(segment.batch.clone()).or_default().push(running);
        }
        if batches.is_empty() {
            return Ok(());
        }
        let ids: Vec<BatchId> = batches.keys().cloned().collect();
        for (id, ending, ended) in self.store.endings(&ids).await? {
            let control = match (ended, ending) {
                (true, _) => Control::Abandon,
                (false, Some(ending)) => Control::Finish(ending),
                (false, None) => continue,
            };
            for running in batches.get(&id).into_iter().flatten() {
                running.control.send_if_modified(|now| {
                    let change = matches!(now, Control::Run) || (matches!(now, Control::Drain { .. }) && ended);
                    if change {
                        *now = control;
                    }
                    change
                });
            }
        }
        Ok(())
    }
}
