//! Each rule by example.

use super::{
    super::*,
    machine::{GIB, RATE, at, costs, gpus, spec},
};
use crate::engines::place::Memory;

const MINUTE: f64 = 60.0;
const HOUR: f64 = 3600.0;

/// A world under construction. It is 100 h after the epoch, and a swap takes 120 s.
struct Scene {
    specs: Vec<Spec>,
    gpus: Vec<Gpu>,
    engines: Vec<Engine>,
    demand: Vec<Demand>,
    blocked: Vec<Blocked>,
    promises: Vec<Promise>,
    live_calls_swap: bool,
}

const NOW: f64 = 100.0 * HOUR;

impl Scene {
    fn new(models: &[&str]) -> Self {
        Self {
            specs: models.iter().map(|model| spec(model)).collect(),
            gpus: gpus(1),
            engines: Vec::new(),
            demand: Vec::new(),
            blocked: Vec::new(),
            promises: Vec::new(),
            live_calls_swap: false,
        }
    }

    /// An engine that has been ready for so many seconds.
    fn ready(&mut self, model: &str, gpus: &[u32], ran: f64) -> &mut Engine {
        let id = EngineId(self.engines.len() as u64 + 1);
        let (since, gpus) = (at(NOW - ran), gpus.to_vec());
        let state = State::Ready;
        self.engines.push(Engine { id, model: model.into(), gpus, state, since, in_flight: 0, idle_since: None });
        self.engines.last_mut().unwrap()
    }

    /// So many seconds of work of a priority, whose oldest line has waited so many seconds.
    fn work(&mut self, model: &str, priority: usize, seconds: f64, waited: f64) -> &mut Work {
        let lines = (seconds * RATE) as u64;
        let work = Work { lines, batches: 1, oldest: Some(at(NOW - waited)), deadlines: Vec::new() };
        let known = self.demand.iter().position(|demand| demand.model == model.into());
        let index = known.unwrap_or_else(|| {
            self.demand.push(Demand { model: model.into(), live: None, by_priority: Default::default() });
            self.demand.len() - 1
        });
        self.demand[index].by_priority[priority] = work;
        &mut self.demand[index].by_priority[priority]
    }

    fn due(&mut self, model: &str, seconds: f64, in_seconds: f64) {
        let work = self.work(model, 1, seconds, 0.0);
        work.deadlines.push(Deadline { closes: at(NOW + in_seconds), lines: work.lines });
    }

    fn decide(&self) -> Decision {
        let costs = costs(&self.specs, 120.0);
        decide(&World {
            now: at(NOW),
            gpus: &self.gpus,
            specs: &self.specs,
            engines: &self.engines,
            demand: &self.demand,
            blocked: &self.blocked,
            promises: &self.promises,
            costs: &costs,
            drain_timeout: std::time::Duration::from_mins(10),
            live_calls_swap: self.live_calls_swap,
        })
    }

    fn actions(&self) -> Vec<Action> {
        self.decide().actions
    }
}

fn start(model: &str, gpus: &[u32]) -> Action {
    Action::Start { model: model.into(), gpus: gpus.to_vec() }
}

#[test]
fn a_free_gpu_goes_to_the_model_that_finishes_most_batches_per_second() {
    let mut scene = Scene::new(&["a", "b"]);
    scene.work("a", 1, HOUR, 0.0);
    assert_eq!(scene.actions(), [start("a", &[0])]);
    scene.work("b", 1, 10.0 * MINUTE, 0.0);
    assert_eq!(scene.actions(), [start("b", &[0])]);
    scene.work("a", 1, HOUR, 0.0).batches = 20;
    assert_eq!(scene.actions(), [start("a", &[0])]);
    scene.work("b", 2, 10.0, 0.0);
    assert_eq!(scene.actions(), [start("b", &[0])], "a higher priority goes first");
    scene.due("a", HOUR, 1.5 * HOUR);
    assert_eq!(scene.actions(), [start("a", &[0])], "28 minutes to spare go before all");
}

#[test]
fn a_loaded_model_is_finished_before_another_one_is_loaded() {
    let mut scene = Scene::new(&["a", "b"]);
    scene.ready("a", &[0], 5.0 * HOUR).in_flight = 7;
    scene.work("a", 1, MINUTE, 0.0);
    scene.work("b", 1, 9.0 * HOUR, 9.0 * MINUTE);
    let decision = scene.decide();
    assert_eq!(decision.actions, []);
    assert_eq!(decision.why[0].1.to_string(), "b waits for its turn: a has 600 lines left, about 60 s");
    scene.work("a", 1, 0.0, 0.0);
    let decision = scene.decide();
    assert_eq!(decision.actions, [Action::Drain(EngineId(1))], "no lines are left: it drains");
    assert_eq!(decision.promises, [Promise { model: "b".into(), gpus: vec![0] }]);
    assert_eq!(decision.why[0].1.to_string(), "b is next: a finishes 7 requests and makes room");
    scene.engines[0].in_flight = 0;
    assert_eq!(scene.actions(), [Action::Stop(EngineId(1))]);
}

#[test]
fn an_engine_without_work_stays_until_somebody_wants_its_gpu_or_its_time_is_over() {
    let mut scene = Scene::new(&["a"]);
    scene.ready("a", &[0], 5.0 * HOUR).idle_since = Some(at(NOW - 599.0));
    assert_eq!(scene.decide(), Decision::default());
    scene.specs[0].idle = Some(std::time::Duration::from_mins(10));
    let decision = scene.decide();
    assert_eq!((decision.actions, decision.again_at), (vec![], Some(at(NOW + 1.0))));
    scene.engines[0].idle_since = Some(at(NOW - 600.0));
    assert_eq!(scene.actions(), [Action::Stop(EngineId(1))]);
}

#[test]
fn a_drain_ends_with_its_last_request_or_with_its_time() {
    let mut scene = Scene::new(&["a", "b"]);
    scene.specs[0].keep = Keep::Sleep;
    let engine = scene.ready("a", &[0], 599.0);
    (engine.state, engine.in_flight) = (State::Draining, 3);
    scene.work("b", 1, HOUR, 0.0);
    let decision = scene.decide();
    assert_eq!((decision.actions, decision.again_at), (vec![], Some(at(NOW + 1.0))));
    scene.engines[0].since = at(NOW - 600.0);
    assert_eq!(scene.actions(), [Action::Sleep(EngineId(1))]);
    (scene.engines[0].since, scene.engines[0].in_flight) = (at(NOW), 0);
    assert_eq!(scene.actions(), [Action::Sleep(EngineId(1))]);
    scene.engines[0].state = State::Sleeping;
    assert_eq!(scene.actions(), [start("b", &[0])], "beside the sleeper");
}

#[test]
fn a_deadline_at_stake_swaps_if_the_loaded_model_has_more_time() {
    let mut scene = Scene::new(&["a", "b"]);
    scene.ready("a", &[0], MINUTE);
    scene.work("a", 1, 5.0 * HOUR, 0.0);
    scene.due("b", HOUR, 2.0 * HOUR);
    assert_eq!(scene.actions(), [], "58 minutes to spare");
    scene.due("b", HOUR, HOUR + 6.0 * MINUTE);
    assert_eq!(scene.actions(), [Action::Stop(EngineId(1))]);
    scene.due("a", HOUR, HOUR + 6.0 * MINUTE);
    assert_eq!(scene.actions(), [], "here it is as urgent");
    scene.due("a", HOUR, 9.0 * HOUR);
    assert_eq!(scene.actions(), [Action::Stop(EngineId(1))]);
    scene.due("b", 5.0 * HOUR, HOUR);
    assert_eq!(scene.actions(), [], "lost anyway");
}

#[test]
fn higher_priority_swaps_if_it_is_worth_it_or_the_loaded_model_had_its_quantum() {
    let mut scene = Scene::new(&["a", "b"]);
    scene.ready("a", &[0], MINUTE);
    scene.work("a", 1, 5.0 * HOUR, 0.0);
    scene.work("b", 2, MINUTE, 0.0);
    assert_eq!(scene.actions(), [], "a minute of work for four of swaps");
    scene.work("b", 2, 5.0 * MINUTE, 0.0);
    assert_eq!(scene.actions(), [Action::Stop(EngineId(1))]);
    scene.work("b", 2, MINUTE, 0.0);
    scene.engines[0].since = at(NOW - 40.0 * MINUTE);
    assert_eq!(scene.actions(), [Action::Stop(EngineId(1))], "ten times the swaps");
    scene.due("a", HOUR, HOUR + 9.0 * MINUTE);
    assert_eq!(scene.actions(), [], "its deadline would bring it back at once");
}

#[test]
fn short_work_that_has_waited_long_goes_before_long_work() {
    let mut scene = Scene::new(&["a", "b"]);
    scene.ready("a", &[0], 41.0 * MINUTE);
    scene.work("a", 1, 5.0 * HOUR, 0.0);
    scene.work("b", 1, HOUR, 39.0 * MINUTE);
    assert_eq!(scene.actions(), []);
    scene.work("b", 1, HOUR, 41.0 * MINUTE);
    assert_eq!(scene.actions(), [Action::Stop(EngineId(1))]);
    scene.engines[0].since = at(NOW - 39.0 * MINUTE);
    assert_eq!(scene.actions(), [], "its turn is not over");
    scene.engines[0].since = at(NOW - HOUR);
    scene.work("b", 1, 6.0 * HOUR, HOUR);
    assert_eq!(scene.actions(), [], "it is the longer one");
    scene.work("b", 1, 6.0 * HOUR, 3.0 * HOUR);
    assert_eq!(scene.actions(), [Action::Stop(EngineId(1))], "what is left of the other came hours later");
    scene.work("b", 1, 0.0, 0.0);
    scene.work("b", 0, HOUR, 9.0 * HOUR);
    assert_eq!(scene.actions(), [], "a lower priority waits");
}

#[test]
fn a_promise_is_kept_although_another_model_would_go_first_now() {
    let mut scene = Scene::new(&["a", "b"]);
    scene.work("a", 1, MINUTE, 0.0);
    scene.work("b", 1, HOUR, 0.0);
    scene.promises.push(Promise { model: "b".into(), gpus: vec![0] });
    let decision = scene.decide();
    assert_eq!((decision.actions, decision.promises), (vec![start("b", &[0])], vec![]));
    scene.blocked.push(Blocked { model: "b".into(), until: None });
    assert_eq!(scene.actions(), [start("a", &[0])], "a promise to a model that has failed is void");
    scene.blocked.clear();
    for gpus in [vec![7], vec![0, 1]] {
        scene.promises[0].gpus = gpus;
        assert_eq!(scene.actions(), [start("a", &[0])], "so is one of GPUs that are no longer there");
    }
    scene.promises[0].gpus = vec![0];
    scene.ready("b", &[0], MINUTE);
    assert_eq!(scene.decide().promises, [], "and one to a model that has been loaded meanwhile");
}

#[test]
fn idle_gpus_get_more_engines_of_a_model_with_much_work_and_lose_them_to_others() {
    let mut scene = Scene::new(&["a", "b"]);
    scene.gpus = gpus(2);
    scene.specs[0].replicas = 2;
    scene.ready("a", &[0], HOUR);
    scene.work("a", 1, 11.0 * MINUTE, 0.0);
    assert_eq!(scene.actions(), [], "shared by two it is less than three starts");
    scene.work("a", 1, 13.0 * MINUTE, 0.0);
    assert_eq!(scene.actions(), [start("a", &[1])]);
    scene.ready("b", &[1], MINUTE);
    assert_eq!(scene.actions(), [Action::Stop(EngineId(2))], "an engine without work makes room for it");
    scene.engines.pop();
    scene.ready("a", &[1], 5.0 * MINUTE);
    scene.work("b", 1, MINUTE, 0.0);
    assert_eq!(scene.actions().len(), 1, "and one of the two for another model");
}

#[test]
fn live_calls_load_a_model_only_if_they_may() {
    let mut scene = Scene::new(&["a", "b"]);
    scene.ready("a", &[0], HOUR);
    scene.work("a", 2, 5.0 * HOUR, 0.0);
    let live = Some(LiveCalls { calls: 1, since: at(NOW) });
    scene.demand.push(Demand { model: "b".into(), live, by_priority: Default::default() });
    assert_eq!(scene.actions(), []);
    scene.live_calls_swap = true;
    assert_eq!(scene.actions(), [Action::Stop(EngineId(1))]);
}

#[test]
fn a_model_of_two_gpus_gets_them_although_small_ones_take_turns() {
    let mut scene = Scene::new(&["a", "b", "c", "large"]);
    scene.gpus = gpus(2);
    scene.specs[3].gpus = 2;
    scene.ready("a", &[0], MINUTE);
    scene.ready("b", &[1], HOUR);
    for (model, waited) in [("b", 0.0), ("c", 0.0), ("large", 41.0 * MINUTE)] {
        scene.work(model, 1, 10.0 * MINUTE, waited);
    }
    let decision = scene.decide();
    assert_eq!(decision.promises.len(), 1);
    assert_eq!(decision.promises[0], Promise { model: "c".into(), gpus: vec![0] }, "the short one goes first");
    scene.work("a", 1, MINUTE, 0.0);
    let decision = scene.decide();
    assert_eq!((decision.actions, decision.promises.len()), (vec![], 1), "both GPUs are kept for it");
    scene.promises = decision.promises;
    scene.work("a", 1, 0.0, 0.0);
    assert_eq!(scene.actions(), [Action::Stop(EngineId(1))], "and nobody else takes the first one that is free");
    scene.engines.remove(0);
    assert_eq!(scene.actions(), []);
    scene.engines.clear();
    assert_eq!(scene.actions(), [start("large", &[0, 1])]);
}

#[test]
fn models_that_fit_together_run_together() {
    let mut scene = Scene::new(&["a", "b", "c"]);
    for model in ["a", "b", "c"] {
        scene.work(model, 1, HOUR, 0.0);
    }
    scene.specs.iter_mut().for_each(|spec| spec.memory = Memory::Bytes(30 * GIB));
    assert_eq!(scene.actions(), [start("a", &[0])], "one after the other: a load must not disturb another one");
    scene.ready("a", &[0], MINUTE);
    assert_eq!(scene.actions(), [start("b", &[0])]);
    scene.ready("b", &[0], MINUTE);
    assert_eq!(scene.actions(), [], "90 of 80 GiB");
}

#[test]
fn what_can_not_run_is_explained() {
    let mut scene = Scene::new(&["a", "b"]);
    scene.work("a", 1, HOUR, 0.0);
    scene.work("b", 1, HOUR, 0.0);
    scene.work("unknown", 1, HOUR, 0.0);
    scene.specs[0].gpus = 2;
    scene.blocked.push(Blocked { model: "b".into(), until: Some(at(NOW + 120.0)) });
    let decision = scene.decide();
    let why: Vec<_> = decision.why.iter().map(|(_, reason)| reason.to_string()).collect();
    assert_eq!(why, ["a needs 2 GPUs, and this machine may use 1", "b failed; next try in 2 min"]);
    assert_eq!((decision.actions, decision.again_at), (vec![], Some(at(NOW + 120.0))));
    (scene.specs[0].gpus, scene.gpus[0].foreign) = (1, 70 * GIB);
    let why = scene.decide().why[0].1.to_string();
    assert_eq!(why, "a waits for memory: other programs hold 70.0 GiB of the 80.0 GiB of gpu 0");
}
