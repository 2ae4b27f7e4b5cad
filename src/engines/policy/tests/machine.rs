//! A machine in virtual time: its engines take the seconds that the costs say, and its batches are worked off at their
//! rate.

use std::time::Duration;

use super::super::*;
use crate::engines::place::Memory;

pub(super) const GIB: u64 = 1 << 30;
/// Lines per second of every model here.
pub(super) const RATE: f64 = 10.0;
/// What a sleeping engine is taken to hold; the policy counts 1.5 GiB.
const ASLEEP: u64 = GIB;

pub(super) fn at(seconds: f64) -> Timestamp {
    Timestamp((seconds * 1e6) as i64)
}

pub(super) fn spec(model: &str) -> Spec {
    Spec { model: model.into(), gpus: 1, memory: Memory::Whole, keep: Keep::Stop, idle: None, replicas: 1 }
}

pub(super) fn gpus(count: u32) -> Vec<Gpu> {
    (0..count).map(|index| Gpu { index, total: 80 * GIB, foreign: 0 }).collect()
}

/// Costs of `start` seconds a swap, all of them in the start.
pub(super) fn costs(specs: &[Spec], start: f64) -> Costs {
    let mut costs = Costs::default();
    for spec in specs {
        costs.took(&spec.model, Phase::Start, start);
        costs.took(&spec.model, Phase::Wake, 5.0);
        costs.took(&spec.model, Phase::Sleep, 1.0);
        costs.took(&spec.model, Phase::Stop, 0.0);
        costs.took(&spec.model, Phase::Drain, 0.0);
        costs.ran_at(&spec.model, RATE);
    }
    costs
}

#[derive(Clone, Debug)]
pub(super) struct Batch {
    pub(super) model: ModelName,
    pub(super) arrives: f64,
    /// Seconds of work for one engine.
    pub(super) work: f64,
    pub(super) closes: Option<f64>,
    pub(super) priority: usize,
}

#[derive(Debug)]
pub(super) struct Machine {
    pub(super) now: f64,
    pub(super) gpus: Vec<Gpu>,
    pub(super) specs: Vec<Spec>,
    pub(super) costs: Costs,
    pub(super) engines: Vec<Engine>,
    pub(super) promises: Vec<Promise>,
    pub(super) blocked: Vec<Blocked>,
    pub(super) batches: Vec<Batch>,
    /// Models whose start fails.
    pub(super) fails: Vec<ModelName>,
    pub(super) loads: u32,
    pub(super) missed: u32,
    pub(super) in_transit: f64,
    /// Engines that have been told to stop while they slept: they hold no more than sleepers.
    slept: Vec<EngineId>,
    next: u64,
}

impl Machine {
    pub(super) fn new(gpus: Vec<Gpu>, specs: Vec<Spec>, costs: Costs, batches: Vec<Batch>) -> Self {
        Self {
            now: 0.0,
            gpus,
            specs,
            costs,
            engines: Vec::new(),
            promises: Vec::new(),
            blocked: Vec::new(),
            batches,
            fails: Vec::new(),
            loads: 0,
            missed: 0,
            in_transit: 0.0,
            slept: Vec::new(),
            next: 1,
        }
    }

    pub(super) fn demand(&self) -> Vec<Demand> {
        let of = |spec: &Spec| {
            let work = |priority: usize| {
                let own = |batch: &&Batch| {
                    batch.model == spec.model
                        && batch.priority == priority
                        && batch.arrives <= self.now
                        && batch.work > 0.0
                };
                let lines = |batch: &Batch| (batch.work * RATE).ceil() as u64;
                let all: Vec<&Batch> = self.batches.iter().filter(own).collect();
                let deadlines = all
                    .iter()
                    .filter_map(|batch| Some(Deadline { closes: at(batch.closes?), lines: lines(batch) }))
                    .collect();
                Work {
                    lines: all.iter().map(|batch| lines(batch)).sum(),
                    batches: all.len() as u64,
                    oldest: all.iter().map(|batch| at(batch.arrives)).min(),
                    deadlines,
                }
            };
            Demand { model: spec.model.clone(), live: None, by_priority: [work(0), work(1), work(2)] }
        };
        self.specs.iter().map(of).filter(|demand| demand.by_priority.iter().any(|work| work.lines > 0)).collect()
    }

    pub(super) fn with_world<T>(&self, now: f64, demand: &[Demand], then: impl FnOnce(&World<'_>) -> T) -> T {
        then(&World {
            now: at(now),
            gpus: &self.gpus,
            specs: &self.specs,
            engines: &self.engines,
            demand,
            blocked: &self.blocked,
            promises: &self.promises,
            costs: &self.costs,
            drain_timeout: Duration::from_mins(10),
            live_calls_swap: false,
        })
    }

    /// Decides and begins what was decided. The answer is the decision.
    pub(super) fn decide(&mut self) -> Decision {
        let demand = self.demand();
        let decision = self.with_world(self.now, &demand, decide);
        self.promises.clone_from(&decision.promises);
        for action in &decision.actions {
            let (id, state) = match action {
                Action::Start { model, gpus } => {
                    self.loads += 1;
                    self.next += 1;
                    self.engines.push(Engine {
                        id: EngineId(self.next),
                        model: model.clone(),
                        gpus: gpus.clone(),
                        state: State::Starting,
                        since: at(self.now),
                        in_flight: 0,
                        idle_since: None,
                    });
                    continue;
                }
                Action::Wake(id) => (*id, State::Waking),
                Action::Drain(id) => (*id, State::Draining),
                Action::Sleep(id) => (*id, State::FallingAsleep),
                Action::Stop(id) => (*id, State::Stopping),
            };
            let engine = self.engines.iter_mut().find(|engine| engine.id == id).unwrap();
            if engine.state == State::Sleeping && state == State::Stopping {
                self.slept.push(id);
            }
            (engine.state, engine.since) = (state, at(self.now));
        }
        self.check_memory();
        decision
    }

    fn check_memory(&self) {
        for gpu in &self.gpus {
            let here: Vec<_> = self.engines.iter().filter(|engine| engine.gpus.contains(&gpu.index)).collect();
            let of = |engine: &&&Engine| self.specs.iter().find(|spec| spec.model == engine.model).unwrap().memory;
            let sleeps = |engine: &Engine| engine.state == State::Sleeping || self.slept.contains(&engine.id);
            let awake: Vec<_> = here.iter().filter(|engine| !sleeps(engine)).collect();
            let asleep = (here.len() - awake.len()) as u64 * ASLEEP;
            let whole = awake.iter().filter(|engine| of(engine) == Memory::Whole).count();
            assert!(whole == 0 || awake.len() == 1, "a whole GPU is shared: {here:?}");
            let held: u64 = awake
                .iter()
                .map(|engine| match of(engine) {
                    Memory::Bytes(bytes) => bytes,
                    Memory::Whole => gpu.total / 2,
                })
                .sum();
            assert!(held + asleep + gpu.foreign <= gpu.total, "GPU {} is over its memory: {here:?}", gpu.index);
        }
    }

    fn ends(&self, engine: &Engine) -> Option<f64> {
        let phase = match engine.state {
            State::Starting => Phase::Start,
            State::Waking => Phase::Wake,
            State::Draining => Phase::Drain,
            State::FallingAsleep => Phase::Sleep,
            State::Stopping => Phase::Stop,
            State::Ready | State::Sleeping => return None,
        };
        Some(engine.since.0 as f64 / 1e6 + self.costs.seconds(&engine.model, phase))
    }

    /// The batch that a model's engines work on.
    fn current(&self, model: &ModelName) -> Option<usize> {
        let open = |at: &usize| {
            let batch = &self.batches[*at];
            batch.model == *model && batch.work > 0.0 && batch.arrives <= self.now
        };
        let key = |at: &usize| {
            let batch = &self.batches[*at];
            (2 - batch.priority, batch.closes.unwrap_or(f64::MAX), batch.arrives)
        };
        (0..self.batches.len()).filter(open).min_by(|a, b| key(a).partial_cmp(&key(b)).unwrap())
    }

    fn workers(&self, model: &ModelName) -> usize {
        self.engines.iter().filter(|engine| engine.model == *model && engine.state == State::Ready).count()
    }

    /// Lets time pass until something happens, `at_most` seconds.
    pub(super) fn pass(&mut self, again_at: Option<Timestamp>, at_most: f64) {
        let mut next = self.now + at_most;
        let mut soonest = |moment: f64| next = next.min(moment.max(self.now + 1e-6));
        again_at.map(|moment| moment.0 as f64 / 1e6).into_iter().for_each(&mut soonest);
        let to_come = self.batches.iter().map(|batch| batch.arrives).filter(|arrives| *arrives > self.now);
        to_come.for_each(&mut soonest);
        self.engines.iter().filter_map(|engine| self.ends(engine)).for_each(&mut soonest);
        let models: Vec<ModelName> = self.specs.iter().map(|spec| spec.model.clone()).collect();
        for model in &models {
            if let (Some(batch), engines @ 1..) = (self.current(model), self.workers(model)) {
                soonest(self.now + self.batches[batch].work / engines as f64 + 1e-6);
            }
        }
        let span = next - self.now;
        for model in &models {
            if let (Some(batch), engines @ 1..) = (self.current(model), self.workers(model)) {
                let batch = &mut self.batches[batch];
                batch.work -= span * engines as f64;
                if batch.work <= 0.0 && batch.closes.is_some_and(|closes| closes < next) {
                    self.missed += 1;
                }
            }
        }
        self.in_transit += span * self.engines.iter().filter(|engine| engine.state.is_transit()).count() as f64;
        self.now = next;
        self.change_states();
    }

    fn change_states(&mut self) {
        let now = at(self.now);
        let is_over = |engine: &&Engine| self.ends(engine).is_some_and(|end| end <= self.now);
        let over: Vec<EngineId> = self.engines.iter().filter(is_over).map(|engine| engine.id).collect();
        self.engines.retain(|engine| engine.state != State::Stopping || !over.contains(&engine.id));
        for engine in self.engines.iter_mut().filter(|engine| over.contains(&engine.id)) {
            (engine.state, engine.since) = match engine.state {
                State::Starting if self.fails.contains(&engine.model) => {
                    let until = Some(now.plus(Duration::from_mins(10)));
                    self.blocked.push(Blocked { model: engine.model.clone(), until });
                    (State::Stopping, now)
                }
                State::Starting | State::Waking => (State::Ready, now),
                State::FallingAsleep => (State::Sleeping, now),
                State::Ready | State::Draining | State::Sleeping | State::Stopping => (engine.state, engine.since),
            };
        }
        self.blocked.retain(|blocked| blocked.until.is_none_or(|until| until > now));
        for at in 0..self.engines.len() {
            let has_lines = self.current(&self.engines[at].model).is_some();
            let engine = &mut self.engines[at];
            engine.in_flight = match engine.state {
                State::Ready if has_lines => 8,
                State::Draining if !over.contains(&engine.id) => engine.in_flight,
                _ => 0,
            };
            engine.idle_since = match (engine.in_flight, engine.idle_since) {
                (0, None) if !has_lines => Some(now),
                (0, since) if !has_lines => since,
                _ => None,
            };
        }
    }

    pub(super) fn is_done(&self) -> bool {
        self.batches.iter().all(|batch| batch.work <= 0.0)
    }
}
