//! What the rules ask: how urgent a model is, and whether an engine makes room for it.

use std::{cmp::Reverse, time::Duration};

use super::{Demand, Engine, EngineId, Keep, ModelName, Phase, Promise, Spec, State, Work, World};
use crate::{
    domain::Timestamp,
    engines::place::{Holder, Memory},
};

/// An engine runs for so many times what the swaps cost before another model's wait ends its turn.
const QUANTA: f64 = 10.0;
/// The shortest quantum, in seconds: with swaps of some seconds the loss by tails of half-empty engines counts more.
const QUANTUM: f64 = 300.0;
/// Nobody's wait of less than this, in seconds, ends another model's turn.
const PATIENCE: f64 = 1800.0;
/// A model that has waited for so many times its patience goes before those that would finish more batches.
const STARVING: f64 = 4.0;
/// What must be left to a deadline beside the way back, in seconds.
const RESERVE: f64 = 300.0;
/// Below so many seconds of slack a deadline decides which waiting model goes first.
const URGENT: f64 = 3600.0;
/// Later than this, in seconds, a deadline is lost and counts no more.
const LOST: f64 = 3600.0;
/// An additional engine is worth so many starts.
const REPLICA_STARTS: f64 = 3.0;
/// Added to the price of an engine that has work, so that those without leave first; half of it for an additional one.
const HAS_WORK: f64 = 1e6;

/// The world, with engines and promises as the decision has changed them so far.
pub(super) struct Board<'a> {
    pub(super) world: &'a World<'a>,
    pub(super) engines: Vec<Engine>,
    pub(super) promises: Vec<Promise>,
}

/// A pair of models: one loaded, and one that wants its place.
struct Swap {
    /// Seconds until the waiting model serves.
    there: f64,
    /// Seconds until the loaded one serves again.
    back: f64,
}

impl Swap {
    fn costs(&self) -> f64 {
        self.there + self.back
    }

    fn quantum(&self) -> f64 {
        (QUANTA * self.costs()).max(QUANTUM)
    }

    fn patience(&self) -> f64 {
        self.quantum().max(PATIENCE)
    }
}

/// How the waiting models are ordered: rule 7.
#[derive(Debug, PartialEq, PartialOrd)]
pub(super) struct Rank {
    urgent: f64,
    priority: Reverse<Option<usize>>,
    starving: Reverse<bool>,
    per_batch: f64,
    cold: bool,
    oldest: Option<Timestamp>,
    model: ModelName,
}

impl<'a> Board<'a> {
    pub(super) fn spec(&self, model: &ModelName) -> Option<&'a Spec> {
        self.world.specs.iter().find(|spec| spec.model == *model)
    }

    fn demand(&self, model: &ModelName) -> Option<&'a Demand> {
        self.world.demand.iter().find(|demand| demand.model == *model)
    }

    fn works(&self, model: &ModelName) -> &'a [Work] {
        self.demand(model).map_or(&[], |demand| demand.by_priority.as_slice())
    }

    pub(super) fn lines(&self, model: &ModelName) -> u64 {
        self.works(model).iter().fold(0, |sum, work| sum.saturating_add(work.lines))
    }

    fn live(&self, model: &ModelName) -> u64 {
        let live = self.demand(model).and_then(|demand| demand.live).filter(|_| self.world.live_calls_swap);
        live.map_or(0, |live| live.calls)
    }

    pub(super) fn has_work(&self, model: &ModelName) -> bool {
        self.lines(model) > 0 || self.live(model) > 0
    }

    /// The highest priority that has work. Live calls are above all priorities.
    fn top(&self, model: &ModelName) -> Option<usize> {
        let works = self.works(model);
        if self.live(model) > 0 {
            return Some(works.len());
        }
        works.iter().rposition(|work| work.lines > 0)
    }

    /// Seconds of work for one engine at and above a priority.
    fn work_from(&self, model: &ModelName, lowest: usize) -> f64 {
        let lines: u64 = self.works(model).iter().skip(lowest).fold(0, |sum, work| sum.saturating_add(work.lines));
        lines.saturating_add(self.live(model)) as f64 / self.world.costs.rate(model)
    }

    /// Seconds of work that the model's engines have together.
    pub(super) fn left(&self, model: &ModelName) -> f64 {
        self.work_from(model, 0) / self.serving(model).max(1) as f64
    }

    /// When the oldest work came.
    fn oldest(&self, model: &ModelName) -> Option<Timestamp> {
        let lines = self.works(model).iter().filter(|work| work.lines > 0).filter_map(|work| work.oldest);
        let live = self.demand(model).and_then(|demand| demand.live).filter(|_| self.live(model) > 0);
        lines.chain(live.map(|live| live.since)).min()
    }

    fn waited(&self, model: &ModelName) -> f64 {
        self.oldest(model).map_or(0.0, |oldest| self.world.now.since(oldest).as_secs_f64())
    }

    /// How many engines serve the model.
    pub(super) fn serving(&self, model: &ModelName) -> usize {
        self.engines.iter().filter(|engine| engine.model == *model && engine.state == State::Ready).count()
    }

    /// Whether an engine serves the model or will soon.
    pub(super) fn is_served(&self, model: &ModelName) -> bool {
        let comes = |state| matches!(state, State::Ready | State::Starting | State::Waking);
        self.engines.iter().any(|engine| engine.model == *model && comes(engine.state))
    }

    /// Seconds that loading the model takes as things are.
    pub(super) fn load(&self, model: &ModelName) -> f64 {
        let sleeps = self.engines.iter().any(|engine| engine.model == *model && engine.state == State::Sleeping);
        self.world.costs.seconds(model, if sleeps { Phase::Wake } else { Phase::Start })
    }

    /// Seconds that loading it takes once it has made room.
    fn reload(&self, model: &ModelName) -> f64 {
        let phase = match self.spec(model).map(|spec| spec.keep) {
            Some(Keep::Sleep) => Phase::Wake,
            Some(Keep::Stop) | None => Phase::Start,
        };
        self.world.costs.seconds(model, phase)
    }

    /// Seconds until its GPUs are free.
    fn leave(&self, model: &ModelName) -> f64 {
        let phase = match self.spec(model).map(|spec| spec.keep) {
            Some(Keep::Sleep) => Phase::Sleep,
            Some(Keep::Stop) | None => Phase::Stop,
        };
        self.world.costs.seconds(model, Phase::Drain) + self.world.costs.seconds(model, phase)
    }

    fn swap(&self, loaded: &ModelName, waiting: &ModelName) -> Swap {
        Swap { there: self.leave(loaded) + self.load(waiting), back: self.leave(waiting) + self.reload(loaded) }
    }

    /// Seconds to spare until the first deadline that can still be kept would be missed. `None`: there is none.
    fn slack(&self, model: &ModelName) -> Option<f64> {
        let mut deadlines: Vec<_> = self.works(model).iter().flat_map(|work| &work.deadlines).collect();
        deadlines.sort_unstable();
        let load = if self.is_served(model) { 0.0 } else { self.load(model) };
        let rate = self.world.costs.rate(model) * self.serving(model).max(1) as f64;
        let (mut lines, mut least) = (0u64, None);
        for deadline in deadlines {
            lines = lines.saturating_add(deadline.lines);
            let left = seconds_until(self.world.now, deadline.closes) - load - lines as f64 / rate;
            if left >= -LOST && least.is_none_or(|least| left < least) {
                least = Some(left);
            }
        }
        least
    }

    /// Rule 7.
    pub(super) fn rank(&self, model: &ModelName) -> Rank {
        let batches = self.works(model).iter().map(|work| work.batches).sum::<u64>() + self.live(model);
        let load = self.load(model);
        let patience = (QUANTA * 2.0 * (load + self.leave(model))).max(PATIENCE);
        Rank {
            urgent: self.slack(model).filter(|slack| *slack < URGENT).unwrap_or(f64::INFINITY),
            priority: Reverse(self.top(model)),
            starving: Reverse(self.waited(model) >= STARVING * patience),
            per_batch: (load + self.work_from(model, 0)) / batches.max(1) as f64,
            cold: !self.engines.iter().any(|engine| engine.model == *model && engine.state == State::Sleeping),
            oldest: self.oldest(model),
            model: model.clone(),
        }
    }

    /// The price of an engine's making room for a model; `None`: it does not.
    pub(super) fn price(&self, engine: &Engine, waiting: &ModelName) -> Option<f64> {
        self.yields(engine, waiting).then(|| self.value(engine))
    }

    /// What it costs to have an engine leave.
    pub(super) fn value(&self, engine: &Engine) -> f64 {
        let model = &engine.model;
        if engine.state == State::Sleeping {
            let costs = self.world.costs;
            return (costs.seconds(model, Phase::Start) - costs.seconds(model, Phase::Wake)).max(0.0);
        }
        let weight = match (self.has_work(model), self.serving(model) > 1) {
            (false, _) => 0.0,
            (true, true) => HAS_WORK / 2.0,
            (true, false) => HAS_WORK,
        };
        self.reload(model) + weight
    }

    /// Rules 3 to 6: whether an engine makes room for a model.
    fn yields(&self, engine: &Engine, waiting: &ModelName) -> bool {
        let loaded = &engine.model;
        if loaded == waiting || engine.state.is_transit() {
            return false;
        }
        if engine.state == State::Sleeping || !self.has_work(loaded) {
            return true;
        }
        let swap = self.swap(loaded, waiting);
        let ran = self.world.now.since(engine.since).as_secs_f64();
        let (theirs, ours) = (self.top(waiting), self.top(loaded));
        if self.serving(loaded) > 1 && (ran >= QUANTUM || theirs > ours || self.work_from(waiting, 0) > swap.costs()) {
            return true;
        }
        let slack = self.slack(loaded);
        let at_stake = self.slack(waiting).filter(|theirs| *theirs < swap.back + RESERVE);
        if at_stake.is_some_and(|theirs| slack.is_none_or(|ours| ours - swap.costs() > theirs)) {
            return true;
        }
        // A deadline that would bring the loaded model back at once forbids that it leaves for less.
        let can_be_away =
            |seconds: f64| slack.is_none_or(|ours| ours - swap.costs() - seconds >= swap.costs() + RESERVE);
        if theirs > ours {
            let higher = self.work_from(waiting, ours.map_or(0, |ours| ours + 1));
            return can_be_away(QUANTUM) && (ran >= swap.quantum() || higher > swap.costs());
        }
        if theirs < ours || ran < swap.quantum() || self.waited(waiting) < swap.patience() {
            return false;
        }
        let work = self.work_from(waiting, 0);
        let is_short = self.left(loaded) > work + swap.back;
        (is_short && can_be_away(work))
            || (self.came_later(loaded, waiting, &swap) && can_be_away(work.min(swap.quantum())))
    }

    /// Whether the work that came with the waiting model's is done here, and what is left came much later.
    fn came_later(&self, loaded: &ModelName, waiting: &ModelName, swap: &Swap) -> bool {
        let (Some(ours), Some(theirs)) = (self.oldest(loaded), self.oldest(waiting)) else { return false };
        ours.since(theirs).as_secs_f64() > STARVING * swap.patience()
    }

    /// Whether a model of several GPUs has waited so long that GPUs are kept for it, although their engines still run.
    pub(super) fn may_reserve(&self, engine: &Engine, waiting: &ModelName) -> bool {
        let swap = self.swap(&engine.model, waiting);
        self.waited(waiting) >= swap.patience() && self.top(waiting) >= self.top(&engine.model)
    }

    /// Rule 8: whether one engine more is worth its start.
    pub(super) fn is_worth_another(&self, spec: &Spec) -> bool {
        let engines = self.engines.iter().filter(|engine| engine.model == spec.model).count();
        let serving = self.serving(&spec.model);
        let start = self.world.costs.seconds(&spec.model, Phase::Start);
        serving > 0
            && serving == engines
            && engines < spec.replicas
            && self.work_from(&spec.model, 0) / (serving + 1) as f64 > REPLICA_STARTS * start
    }

    /// The engines as holders of GPUs, each with its price.
    pub(super) fn holders(&self, without: Option<EngineId>, price: impl Fn(&Engine) -> Option<f64>) -> Vec<Holder<'_>> {
        let others = self.engines.iter().filter(|engine| Some(engine.id) != without);
        let holder = |engine: &'_ Engine| (engine.state == State::Sleeping, price(engine));
        others
            .map(|engine| {
                let (sleeps, price) = holder(engine);
                let memory = self.spec(&engine.model).map_or(Memory::Whole, |spec| spec.memory);
                Holder { engine: engine.id, gpus: &engine.gpus, memory, sleeps, price }
            })
            .collect()
    }

    /// The next instant at which time alone may change the decision.
    pub(super) fn next_moment(&self) -> Option<Timestamp> {
        let now = self.world.now;
        let mut moments: Vec<Timestamp> = self.world.blocked.iter().filter_map(|blocked| blocked.until).collect();
        for engine in &self.engines {
            if engine.state == State::Draining {
                moments.push(engine.since.plus(self.world.drain_timeout));
            }
            if let (Some(since), Some(idle)) = (engine.idle_since, self.spec(&engine.model).and_then(|spec| spec.idle))
            {
                moments.push(since.plus(idle));
            }
        }
        let slack_is = |model, seconds: f64| {
            let slack = self.slack(model)?;
            (slack >= seconds).then(|| after(now, slack - seconds))
        };
        for demand in self.world.demand {
            let waiting = &demand.model;
            moments.extend(slack_is(waiting, URGENT));
            // A lost deadline neither protects a loaded model nor counts for a waiting one.
            moments.extend(slack_is(waiting, -LOST));
            if self.serving(waiting) > 0 {
                continue;
            }
            for engine in self.engines.iter().filter(|engine| engine.state == State::Ready) {
                let swap = self.swap(&engine.model, waiting);
                moments.extend(slack_is(waiting, swap.back + RESERVE));
                moments.extend([QUANTUM, swap.quantum()].map(|seconds| after(engine.since, seconds)));
                moments.extend(self.oldest(waiting).map(|oldest| after(oldest, swap.patience())));
            }
        }
        moments.into_iter().filter(|moment| *moment > now).min()
    }
}

/// The instant that many seconds later, rounded up to what a timestamp can tell apart.
fn after(from: Timestamp, seconds: f64) -> Timestamp {
    from.plus(Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)).plus(Duration::from_micros(1))
}

/// Seconds from one time to another, negative if that is in the past.
fn seconds_until(now: Timestamp, then: Timestamp) -> f64 {
    then.since(now).as_secs_f64() - now.since(then).as_secs_f64()
}
