//! The state of one owner's target.

use std::time::{Duration, Instant};

use super::{FAILURES_BEFORE_PROBING, LATELY, PROBE_WAIT};

/// How long a target that only ever failed is remembered after its last send.
const LONG: Duration = Duration::from_secs(3_600);

pub(super) struct Target {
    pub(super) host: String,
    /// When it was last given a place, on [`Fairness`](super::Fairness)'s clock.
    pub(super) served_at: u64,
    in_flight: usize,
    /// The sends in flight that began while it had not answered lately.
    unsure: usize,
    failures: u32,
    /// The wait before the next probe, while it is only probed.
    probe_wait: Duration,
    pub(super) not_before: Option<Instant>,
    last_used: Option<Instant>,
    last_success: Option<Instant>,
}

impl Target {
    pub(super) fn new(host: String) -> Self {
        Self {
            host,
            served_at: 0,
            in_flight: 0,
            unsure: 0,
            failures: 0,
            probe_wait: Duration::ZERO,
            not_before: None,
            last_used: None,
            last_success: None,
        }
    }

    pub(super) fn is_held(&self, now: Instant) -> bool {
        self.not_before.is_some_and(|at| at > now)
    }

    pub(super) fn is_probed(&self) -> bool {
        self.failures >= FAILURES_BEFORE_PROBING
    }

    /// Whether it has answered lately, so that it will probably answer again.
    pub(super) fn is_sure(&self, now: Instant) -> bool {
        self.failures == 0 && self.last_success.is_some_and(|at| now.saturating_duration_since(at) <= LATELY)
    }

    /// Whether the target's own limits allow another send.
    pub(super) fn has_room(&self, per_target: usize, now: Instant) -> bool {
        let limit = if self.is_probed() { 1 } else { per_target };
        self.in_flight < limit && !self.is_held(now)
    }

    pub(super) fn begin(&mut self, is_sure: bool, now: Instant) {
        self.in_flight += 1;
        self.unsure += usize::from(!is_sure);
        self.last_used = Some(now);
    }

    /// Records the end of a send. Returns whether it was begun as a sure one; `None` if none was in flight. They are
    /// alike, so it does not matter which one has ended.
    pub(super) fn end(&mut self) -> Option<bool> {
        self.in_flight = self.in_flight.checked_sub(1)?;
        let was_sure = self.unsure == 0;
        self.unsure = self.unsure.saturating_sub(1);
        Some(was_sure)
    }

    pub(super) fn succeeded(&mut self, now: Instant) {
        self.failures = 0;
        self.probe_wait = Duration::ZERO;
        self.not_before = None;
        self.last_success = Some(now);
    }

    pub(super) fn failed(&mut self, retry_after: Option<Duration>, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        // Sends that were in flight when the first one failed say nothing new.
        let probing = (self.is_probed() && !self.is_held(now)).then(|| {
            let (first, longest) = PROBE_WAIT;
            self.probe_wait = (self.probe_wait * 2).clamp(first, longest);
            self.probe_wait
        });
        if let Some(wait) = probing.into_iter().chain(retry_after).max() {
            self.not_before = self.not_before.max(Some(now + wait));
        }
    }

    pub(super) fn is_at_rest(&self, now: Instant) -> bool {
        let recent = self.last_used.is_some_and(|at| now.saturating_duration_since(at) < LONG);
        let known = (self.failures > 0 && recent) || self.is_sure(now);
        !(self.in_flight > 0 || self.is_held(now) || known)
    }
}
