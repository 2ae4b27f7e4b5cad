//! The decision, one step after the other until none is left: what a step does is part of the state for the next one, so
//! that deciding again at once finds nothing to do.

use super::{
    Action, Decision, Engine, EngineId, Keep, ModelName, Phase, Promise, Reason, Spec, State, World, rules::Board,
};
use crate::engines::place::{self, Place, place};

/// Added to the price of an engine that does not make room yet.
const NOT_YET: f64 = 1e9;

/// What to do now.
#[must_use]
pub fn decide(world: &World<'_>) -> Decision {
    let mut board = Board { world, engines: world.engines.to_vec(), promises: Vec::new() };
    for promise in world.promises {
        if can_be_kept(&board, promise) {
            board.promises.push(promise.clone());
        }
    }
    let mut actions = Vec::new();
    // Each step moves an engine one state on or adds one, so their number is bounded by engines and GPUs.
    while let Some(steps) = step(&mut board) {
        actions.extend(steps);
    }
    let why = reasons(&board);
    Decision { actions, why, again_at: board.next_moment(), promises: board.promises }
}

/// Whether there is still a reason for a promise, and a way to keep it: the models and GPUs may have been configured
/// anew meanwhile, and somebody may have loaded the model.
fn can_be_kept(board: &Board<'_>, promise: &Promise) -> bool {
    let Some(spec) = board.spec(&promise.model).filter(|spec| is_open(board, &spec.model)) else { return false };
    let is_there = |index: &u32| board.world.gpus.iter().any(|gpu| gpu.index == *index);
    let engines = board.engines.iter().filter(|engine| engine.model == spec.model).count();
    promise.gpus.len() == spec.gpus
        && promise.gpus.iter().all(is_there)
        && !board.promises.iter().any(|other| overlap(&other.gpus, &promise.gpus))
        && (!board.is_served(&spec.model) || engines < spec.replicas)
}

/// Whether a model has work and may be loaded.
fn is_open(board: &Board<'_>, model: &ModelName) -> bool {
    board.has_work(model) && board.spec(model).is_some() && blocked_until(board, model).is_none()
}

/// Until when a model is blocked; the inner `None`: until its configuration changes.
fn blocked_until(board: &Board<'_>, model: &ModelName) -> Option<Option<crate::domain::Timestamp>> {
    let blocked = board.world.blocked.iter().find(|blocked| blocked.model == *model)?;
    blocked.until.is_none_or(|until| until > board.world.now).then_some(blocked.until)
}

/// The models that wait for GPUs and have none promised, in the order of rule 7.
fn waiting<'a>(board: &Board<'a>) -> Vec<&'a Spec> {
    let is_waiting = |spec: &&Spec| {
        let model = &spec.model;
        let promised = board.promises.iter().any(|promise| promise.model == *model);
        is_open(board, model) && !board.is_served(model) && !promised
    };
    let mut all: Vec<_> =
        board.world.specs.iter().filter(is_waiting).map(|spec| (board.rank(&spec.model), spec)).collect();
    all.sort_by(|(a, _), (b, _)| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    all.into_iter().map(|(_, spec)| spec).collect()
}

/// One change, or `None` if nothing is to be done.
fn step(board: &mut Board<'_>) -> Option<Vec<Action>> {
    end_a_drain(board)
        .or_else(|| stop_an_idle_one(board))
        .or_else(|| keep_a_promise(board))
        .or_else(|| waiting(board).into_iter().find_map(|spec| load(board, spec, &|_, _| None)))
        .or_else(|| {
            waiting(board)
                .into_iter()
                .find_map(|spec| load(board, spec, &|board, engine| board.price(engine, &spec.model)))
        })
        .or_else(|| waiting(board).into_iter().find_map(|spec| reserve(board, spec)))
        .or_else(|| add_a_replica(board))
}

/// An engine that has drained, or has had its time to, makes room.
fn end_a_drain(board: &mut Board<'_>) -> Option<Vec<Action>> {
    let (now, timeout) = (board.world.now, board.world.drain_timeout);
    let over = |engine: &&Engine| {
        engine.state == State::Draining && (engine.in_flight == 0 || now.since(engine.since) >= timeout)
    };
    let id = board.engines.iter().find(over)?.id;
    Some(vec![make_room(board, id)])
}

fn stop_an_idle_one(board: &mut Board<'_>) -> Option<Vec<Action>> {
    let now = board.world.now;
    let idle = |engine: &&Engine| {
        let limit = board.spec(&engine.model).and_then(|spec| spec.idle);
        let over = limit.zip(engine.idle_since).is_some_and(|(limit, since)| now.since(since) >= limit);
        !engine.state.is_transit() && over && !board.has_work(&engine.model)
    };
    let id = board.engines.iter().find(idle)?.id;
    Some(vec![enter(board, id, State::Stopping)])
}

/// Loads a model on the GPUs that were promised to it, or has engines leave them that now make room.
fn keep_a_promise(board: &mut Board<'_>) -> Option<Vec<Action>> {
    for at in 0..board.promises.len() {
        let Promise { model, gpus } = board.promises[at].clone();
        let Some(spec) = board.spec(&model) else { continue };
        let is_free =
            |gpu: u32| !board.engines.iter().any(|engine| engine.state.is_transit() && engine.gpus.contains(&gpu));
        if !gpus.iter().all(|gpu| is_free(*gpu)) {
            continue;
        }
        let sleeper = board.engines.iter().find(|engine| is_asleep_on(engine, &model, &gpus)).map(|engine| engine.id);
        let choice = choose(board, spec, &gpus, sleeper, &|board, engine| board.price(engine, &model));
        let Some(place) = choice else {
            // Some of its engines make room now, and the others later.
            let leaves = |engine: &&Engine| {
                engine.state == State::Ready && overlap(&engine.gpus, &gpus) && board.price(engine, &model).is_some()
            };
            let Some(id) = board.engines.iter().find(leaves).map(|engine| engine.id) else { continue };
            return Some(vec![release(board, id)]);
        };
        if !place.evict.is_empty() {
            return Some(place.evict.into_iter().map(|id| release(board, id)).collect());
        }
        board.promises.remove(at);
        return Some(vec![begin(board, spec, &gpus, sleeper)]);
    }
    None
}

/// Loads a waiting model, on free GPUs or those whose engines make room at the price that is asked.
fn load(board: &mut Board<'_>, spec: &Spec, price: &Price<'_>) -> Option<Vec<Action>> {
    let free: Vec<u32> = available(board);
    let mut choices: Vec<(f64, Place, Option<EngineId>)> = Vec::new();
    for engine in board.engines.iter().filter(|engine| engine.model == spec.model && engine.state == State::Sleeping) {
        if engine.gpus.len() == spec.gpus && engine.gpus.iter().all(|gpu| free.contains(gpu)) {
            let found = choose(board, spec, &engine.gpus, Some(engine.id), price);
            let wake = board.world.costs.seconds(&spec.model, Phase::Wake);
            choices.extend(found.map(|place| (place.price + wake, place, Some(engine.id))));
        }
    }
    // Two engines of one model on one GPU would only take memory from each other.
    let own = |gpu: &u32| board.engines.iter().any(|engine| engine.model == spec.model && engine.gpus.contains(gpu));
    let elsewhere: Vec<u32> = free.into_iter().filter(|gpu| !own(gpu)).collect();
    let start = board.world.costs.seconds(&spec.model, Phase::Start);
    let found = choose(board, spec, &elsewhere, None, price);
    choices.extend(found.map(|place| (place.price + start, place, None)));
    let (_, place, sleeper) = choices.into_iter().min_by(|a, b| a.0.total_cmp(&b.0))?;
    if place.evict.is_empty() {
        return Some(vec![begin(board, spec, &place.gpus, sleeper)]);
    }
    board.promises.push(Promise { model: spec.model.clone(), gpus: place.gpus });
    Some(place.evict.into_iter().map(|id| release(board, id)).collect())
}

/// Keeps GPUs for a model that needs several and has waited long.
fn reserve(board: &mut Board<'_>, spec: &Spec) -> Option<Vec<Action>> {
    if spec.gpus < 2 {
        return None;
    }
    let model = &spec.model;
    let place = choose(board, spec, &available(board), None, &|board, engine| {
        let later = || board.may_reserve(engine, model).then(|| board.value(engine) + NOT_YET);
        (!engine.state.is_transit()).then(|| board.price(engine, model).or_else(later)).flatten()
    })?;
    board.promises.push(Promise { model: model.clone(), gpus: place.gpus });
    Some(Vec::new())
}

/// Rule 8.
fn add_a_replica(board: &mut Board<'_>) -> Option<Vec<Action>> {
    for spec in board.world.specs {
        let promised = board.promises.iter().any(|promise| promise.model == spec.model);
        if promised || !is_open(board, &spec.model) || !board.is_worth_another(spec) {
            continue;
        }
        let unused = |board: &Board<'_>, engine: &Engine| {
            (!board.has_work(&engine.model)).then(|| board.price(engine, &spec.model)).flatten()
        };
        if let Some(actions) = load(board, spec, &unused) {
            return Some(actions);
        }
    }
    None
}

type Price<'p> = dyn Fn(&Board<'_>, &Engine) -> Option<f64> + 'p;

/// A place for a model on some of the GPUs, or in place of its engine that sleeps there.
fn choose(board: &Board<'_>, spec: &Spec, gpus: &[u32], sleeper: Option<EngineId>, price: &Price<'_>) -> Option<Place> {
    let among: Vec<_> = board.world.gpus.iter().filter(|gpu| gpus.contains(&gpu.index)).copied().collect();
    let holders = board.holders(sleeper, |engine| price(board, engine));
    place(&among, &holders, spec.gpus, spec.memory)
}

/// The GPUs on which nothing is decided yet.
fn available(board: &Board<'_>) -> Vec<u32> {
    let busy = board.engines.iter().filter(|engine| engine.state.is_transit()).flat_map(|engine| &engine.gpus);
    let promised = board.promises.iter().flat_map(|promise| &promise.gpus);
    let taken: Vec<u32> = busy.chain(promised).copied().collect();
    board.world.gpus.iter().map(|gpu| gpu.index).filter(|gpu| !taken.contains(gpu)).collect()
}

fn overlap(some: &[u32], others: &[u32]) -> bool {
    some.iter().any(|gpu| others.contains(gpu))
}

fn is_asleep_on(engine: &Engine, model: &ModelName, gpus: &[u32]) -> bool {
    engine.model == *model && engine.state == State::Sleeping && engine.gpus == gpus
}

/// Wakes the engine that sleeps there, or starts one.
fn begin(board: &mut Board<'_>, spec: &Spec, gpus: &[u32], sleeper: Option<EngineId>) -> Action {
    if let Some(id) = sleeper {
        return enter(board, id, State::Waking);
    }
    let (model, gpus) = (spec.model.clone(), gpus.to_vec());
    // The caller gives it its real id.
    let id = EngineId(board.engines.iter().map(|engine| engine.id.0).max().map_or(0, |id| id.saturating_add(1)));
    board.engines.push(Engine {
        id,
        model: model.clone(),
        gpus: gpus.clone(),
        state: State::Starting,
        since: board.world.now,
        in_flight: 0,
        idle_since: None,
    });
    Action::Start { model, gpus }
}

/// An engine gets no new requests, and leaves at once if it has none.
fn release(board: &mut Board<'_>, id: EngineId) -> Action {
    let is_busy = |engine: &Engine| engine.id == id && engine.state == State::Ready && engine.in_flight > 0;
    if board.engines.iter().any(is_busy) {
        return enter(board, id, State::Draining);
    }
    make_room(board, id)
}

/// An engine sleeps or stops, as its model's setting says.
fn make_room(board: &mut Board<'_>, id: EngineId) -> Action {
    let engine = board.engines.iter().find(|engine| engine.id == id);
    let can_sleep = engine.filter(|engine| engine.state != State::Sleeping);
    let keep = can_sleep.and_then(|engine| board.spec(&engine.model)).map_or(Keep::Stop, |spec| spec.keep);
    enter(board, id, if keep == Keep::Sleep { State::FallingAsleep } else { State::Stopping })
}

fn enter(board: &mut Board<'_>, id: EngineId, state: State) -> Action {
    let now = board.world.now;
    if let Some(engine) = board.engines.iter_mut().find(|engine| engine.id == id) {
        (engine.state, engine.since) = (state, now);
    }
    match state {
        State::Waking | State::Ready | State::Starting => Action::Wake(id),
        State::Draining => Action::Drain(id),
        State::FallingAsleep | State::Sleeping => Action::Sleep(id),
        State::Stopping => Action::Stop(id),
    }
}

/// Why models with work are not served.
fn reasons(board: &Board<'_>) -> Vec<(ModelName, Reason)> {
    let unserved = board.world.demand.iter().map(|demand| &demand.model);
    let unserved = unserved.filter(|model| board.has_work(model) && board.serving(model) == 0);
    unserved.filter_map(|model| Some((model.clone(), reason(board, board.spec(model)?)))).collect()
}

fn reason(board: &Board<'_>, spec: &Spec) -> Reason {
    let model = &spec.model;
    let comes = |engine: &&Engine| engine.model == *model && matches!(engine.state, State::Starting | State::Waking);
    if let Some(engine) = board.engines.iter().find(comes) {
        let phase = if engine.state == State::Waking { Phase::Wake } else { Phase::Start };
        return Reason::Loads {
            model: model.clone(),
            gpus: engine.gpus.clone(),
            for_seconds: board.world.now.since(engine.since).as_secs_f64(),
            of_seconds: board.world.costs.seconds(model, phase),
        };
    }
    if let Some(until) = blocked_until(board, model) {
        let again_in = until.map(|until| until.since(board.world.now).as_secs_f64());
        return Reason::Failed { model: model.clone(), again_in };
    }
    if !place::could_fit(board.world.gpus, spec.gpus, spec.memory) {
        let memory = spec.memory;
        return Reason::NeverFits { model: model.clone(), gpus: spec.gpus, memory, found: board.world.gpus.len() };
    }
    let promised = board.promises.iter().find(|promise| promise.model == *model);
    let concerns = |engine: &&Engine| promised.is_none_or(|promise| overlap(&promise.gpus, &engine.gpus));
    let near = board.engines.iter().filter(concerns);
    if let Some(engine) = near.clone().find(|engine| promised.is_some() && engine.state.is_transit()) {
        return Reason::Next { model: model.clone(), after: engine.model.clone(), in_flight: engine.in_flight };
    }
    let loaded = near.filter(|engine| engine.state == State::Ready && board.has_work(&engine.model));
    let first = loaded.min_by(|a, b| board.left(&a.model).total_cmp(&board.left(&b.model)));
    if let Some(engine) = first {
        let (behind, lines, seconds) = (engine.model.clone(), board.lines(&engine.model), board.left(&engine.model));
        return Reason::Turn { model: model.clone(), behind, lines, seconds };
    }
    let transit = board.engines.iter().find(|engine| engine.state.is_transit());
    match (transit, board.world.gpus.iter().max_by_key(|gpu| gpu.foreign)) {
        (Some(engine), _) => {
            Reason::Next { model: model.clone(), after: engine.model.clone(), in_flight: engine.in_flight }
        }
        (None, Some(gpu)) if gpu.foreign > 0 => {
            Reason::Memory { model: model.clone(), gpu: gpu.index, foreign: gpu.foreign, total: gpu.total }
        }
        (None, _) => Reason::Memory { model: model.clone(), gpu: 0, foreign: 0, total: 0 },
    }
}
