//! The state of one worker, and of each of its models, according to its answers.
//!
//! A worker of one model is judged as a whole. A worker of several models is usually a gateway with a server behind it
//! for each. There each model is judged by its own requests, so a dead model holds neither the others nor their lines.
//! Only broken connections count for the whole worker.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{
    names,
    outage::{Blame, Gate, Outage, Sign},
};

/// The most models of one worker that are judged separately: a pattern may stand for any number.
const MOST_MODELS: usize = 1_000;

/// What follows from a failure.
#[derive(Debug)]
pub(super) struct Judged {
    /// Whether the worker is at fault.
    pub(super) at_fault: bool,
    /// The verdict, which may come later.
    pub(super) blame: Blame,
    /// What becomes of an outage by it.
    pub(super) turn: Turn,
}

/// What an outcome makes of an outage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing.
    None,
    /// One begins.
    Begins,
    /// One ends.
    Ends,
}

/// A worker's [`Outage`], and those of its models.
#[derive(Debug, Default)]
pub(super) struct Outages {
    whole: Outage,
    /// Whether models are judged separately.
    by_model: bool,
    /// The models that had failures.
    models: BTreeMap<Arc<str>, Outage>,
}

impl Outages {
    /// Takes over the models that the worker lists.
    pub(super) fn serves(&mut self, models: &[Arc<str>]) {
        self.by_model = models.len() > 1 || models.iter().any(|model| names::is_pattern(model));
        if !self.by_model {
            self.models.clear();
        }
    }

    /// The state that a request for this model counts for.
    fn of(&mut self, model: &Arc<str>) -> &mut Outage {
        if !self.by_model {
            return &mut self.whole;
        }
        if self.models.len() >= MOST_MODELS {
            self.models.retain(|_, outage| outage.is_doubted());
        }
        self.models.entry(model.clone()).or_default()
    }

    /// See [`Outage::succeeded`].
    pub(super) fn succeeded(&mut self, model: &Arc<str>, now: Instant) -> bool {
        let whole = self.whole.succeeded(now);
        let model = self.by_model && self.of(model).succeeded(now);
        whole || model
    }

    /// See [`Outage::failed`].
    pub(super) fn failed(&mut self, model: &Arc<str>, sign: Sign, request: u64, sent: Instant, now: Instant) -> Judged {
        // An answer to one model shows that connections to the worker hold.
        let ended = sign != Sign::Broken && self.by_model && self.whole.answered_otherwise(sent);
        let outage = if sign == Sign::Broken { &mut self.whole } else { self.of(model) };
        let before = outage.complaint().is_some();
        let (at_fault, blame) = outage.failed(sign, request, sent, now);
        let turn = match (before, outage.complaint().is_some()) {
            (false, true) => Turn::Begins,
            (true, false) => Turn::Ends,
            _ if ended => Turn::Ends,
            _ => Turn::None,
        };
        Judged { at_fault, blame, turn }
    }

    /// See [`Outage::answered_otherwise`].
    pub(super) fn answered_otherwise(&mut self, model: &Arc<str>, sent: Instant) -> bool {
        let whole = self.whole.answered_otherwise(sent);
        let model = self.by_model && self.of(model).answered_otherwise(sent);
        whole || model
    }

    /// See [`Outage::pushed_back`].
    pub(super) fn pushed_back(&mut self, model: &Arc<str>, asked: Option<Duration>, sent: Instant, now: Instant) {
        self.of(model).pushed_back(asked, sent, now);
    }

    /// See [`Outage::reset`].
    pub(super) fn reset(&mut self) {
        self.whole.reset();
        self.models.values_mut().for_each(Outage::reset);
    }

    /// What may be sent there, whatever the model.
    pub(super) fn gate(&self, now: Instant) -> Gate {
        self.whole.gate(now)
    }

    /// What may be sent there for models of which not everything may.
    pub(super) fn held(&self, now: Instant) -> Vec<(Arc<str>, Gate)> {
        let gates = self.models.iter().map(|(model, outage)| (model.clone(), outage.gate(now)));
        gates.filter(|(_, gate)| *gate != Gate::Open).collect()
    }

    /// When the gate of the worker or of one of its models changes with time alone.
    pub(super) fn changes_at(&self, now: Instant) -> Option<Instant> {
        self.all().filter_map(|(_, outage)| outage.changes_at(now)).min()
    }

    /// Whether what is sent for this model finds out whether it is answered again.
    pub(super) fn is_doubted(&self, model: &Arc<str>) -> bool {
        self.whole.is_doubted() || self.models.get(model).is_some_and(Outage::is_doubted)
    }

    /// The faults of the worker and of its models, since when, and whether they are certain.
    pub(super) fn complaints(&self, now: Instant) -> Vec<(Option<&Arc<str>>, Sign, Instant, bool)> {
        let complaint = |(model, outage): (_, &Outage)| {
            let certain = outage.complaint().map(|(sign, since)| (model, sign, since, true));
            certain.or_else(|| outage.suspicion(now).map(|(sign, since)| (model, sign, since, false)))
        };
        self.all().filter_map(complaint).collect()
    }

    fn all(&self) -> impl Iterator<Item = (Option<&Arc<str>>, &Outage)> {
        let models = self.models.iter().map(|(model, outage)| (Some(model), outage));
        std::iter::once((None, &self.whole)).chain(models)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::outage::REQUESTS, *};

    const SIGN: Sign = Sign::Status(502);

    fn fail(outages: &mut Outages, model: &Arc<str>, sign: Sign, now: Instant) -> bool {
        (0..REQUESTS as u64).map(|request| outages.failed(model, sign, request, now, now).at_fault).last() == Some(true)
    }

    #[tokio::test(start_paused = true)]
    async fn a_dead_model_is_held_alone() {
        let (a, b, now): (Arc<str>, Arc<str>, _) = ("a".into(), "b".into(), Instant::now());
        let mut outages = Outages::default();
        outages.serves(&[a.clone(), b.clone()]);
        assert!(fail(&mut outages, &a, SIGN, now));
        assert_eq!((outages.gate(now), outages.held(now)), (Gate::Open, vec![(a.clone(), Gate::Closed)]));
        assert!(outages.is_doubted(&a) && !outages.is_doubted(&b));
        assert!(!outages.succeeded(&b, now), "what another model answers does not end it");
        assert_eq!(outages.complaints(now).len(), 1);
        let later = outages.changes_at(now).unwrap();
        assert_eq!(outages.held(later), [(a.clone(), Gate::Trial(1))]);
        outages.pushed_back(&b, Some(Duration::from_secs(9)), now, now);
        assert_eq!(outages.held(later).len(), 2);
        assert!(outages.succeeded(&a, later));
        assert_eq!(outages.held(later), [(b, Gate::Closed)]);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_serves_one_model_is_held_as_a_whole_and_broken_connections_are_all_models() {
        let (a, now): (Arc<str>, _) = ("a".into(), Instant::now());
        let mut outages = Outages::default();
        outages.serves(std::slice::from_ref(&a));
        assert!(fail(&mut outages, &a, SIGN, now));
        assert_eq!((outages.gate(now), outages.held(now)), (Gate::Closed, vec![]));
        let mut outages = Outages::default();
        outages.serves(&["team/*".into()]);
        let mut now = now;
        for request in 0..REQUESTS as u64 {
            outages.failed(&a, Sign::Broken, request, now, now);
            now += Duration::from_secs(1);
        }
        assert_eq!(outages.complaints(now).iter().filter(|complaint| complaint.0.is_none()).count(), 1);
        let judged = outages.failed(&a, SIGN, 0, now - Duration::from_secs(1), now);
        assert!(!judged.at_fault && judged.turn == Turn::None, "it was sent before a trial");
        let judged = outages.failed(&a, SIGN, 1, now, now);
        assert!(!judged.at_fault && judged.turn == Turn::Ends, "an answer, if a bad one: connections hold");
        assert_eq!(outages.complaints(now), []);
    }
}
