//! What holds in every world.

use proptest::prelude::*;

use super::{
    super::*,
    machine::{Batch, GIB, Machine, costs, gpus, spec},
};
use crate::engines::place::Memory;

const HOUR: f64 = 3600.0;

fn any_spec(name: usize) -> impl Strategy<Value = Spec> {
    let memory = prop_oneof![Just(Memory::Whole), (10u64..50).prop_map(|gib| Memory::Bytes(gib * GIB))];
    let idle = prop_oneof![Just(None), Just(Some(std::time::Duration::from_mins(5)))];
    (1usize..=2, memory, any::<bool>(), idle, 1usize..=3).prop_map(move |(gpus, memory, sleeps, idle, replicas)| Spec {
        gpus,
        memory,
        keep: if sleeps { Keep::Sleep } else { Keep::Stop },
        idle,
        replicas,
        ..spec(&format!("m{name}"))
    })
}

/// What may come for the model of that number.
fn any_batch(models: usize) -> impl Strategy<Value = Batch> {
    let closes = prop_oneof![2 => Just(None), 1 => (0.2..6.0f64).prop_map(Some)];
    (0..models, 0.0..4.0 * HOUR, 1.0..HOUR, closes, 0usize..3).prop_map(|(model, arrives, work, closes, priority)| {
        Batch {
            model: format!("m{model}").as_str().into(),
            arrives,
            work,
            closes: closes.map(|hours| arrives + hours * HOUR),
            priority,
        }
    })
}

fn any_machine() -> impl Strategy<Value = Machine> {
    (2u32..=4, 1usize..=5).prop_flat_map(|(count, models)| {
        let specs: Vec<_> = (0..models).map(any_spec).collect();
        let batches = prop::collection::vec(any_batch(models), 1..25);
        (specs, batches, 1.0..400.0f64).prop_map(move |(specs, batches, swap)| {
            let costs = costs(&specs, swap);
            Machine::new(gpus(count), specs, costs, batches)
        })
    })
}

/// Whether an engine of the model is told to leave.
fn leaves(machine: &Machine, actions: &[Action], model: &ModelName) -> bool {
    let of = |id: &EngineId| machine.engines.iter().any(|engine| engine.id == *id && engine.model == *model);
    actions.iter().any(|action| match action {
        Action::Drain(id) | Action::Sleep(id) | Action::Stop(id) => of(id),
        Action::Start { .. } | Action::Wake(_) => false,
    })
}

fn ready_with_work(machine: &Machine, demand: &[Demand]) -> Vec<ModelName> {
    let loaded = machine.engines.iter().filter(|engine| engine.state == State::Ready).map(|engine| &engine.model);
    loaded.filter(|model| demand.iter().any(|demand| demand.model == **model)).cloned().collect()
}

/// More lines for a loaded model must not make it leave, unless somebody has waited so long that rule 6 counts.
fn more_lines_keep_it(machine: &Machine, demand: &[Demand], decision: &Decision) -> Result<(), TestCaseError> {
    for model in ready_with_work(machine, demand) {
        let somebody_waits_long = demand.iter().any(|other| {
            let oldest = other.by_priority.iter().filter_map(|work| work.oldest).min();
            oldest.is_some_and(|oldest| machine.now - oldest.0 as f64 / 1e6 >= 1800.0)
        });
        if somebody_waits_long || leaves(machine, &decision.actions, &model) {
            continue;
        }
        let mut more = demand.to_vec();
        let own = more.iter_mut().find(|demand| demand.model == model).unwrap();
        own.by_priority.iter_mut().filter(|work| work.lines > 0).for_each(|work| work.lines *= 3);
        let actions = machine.with_world(machine.now, &more, decide).actions;
        prop_assert!(!leaves(machine, &actions, &model), "{actions:?}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn all_work_ends_and_nothing_is_decided_twice(mut machine in any_machine(), halfway in 0.01..0.99f64) {
        let work: f64 = machine.batches.iter().map(|batch| batch.work).sum();
        let swaps = 6.0 * 400.0 * machine.batches.len() as f64;
        let end = 4.0 * HOUR + 1.2 * work + swaps;
        while !machine.is_done() {
            let demand = machine.demand();
            let before = machine.with_world(machine.now, &demand, decide);
            more_lines_keep_it(&machine, &demand, &before)?;
            // Memory is checked inside.
            let decision = machine.decide();
            let again = machine.with_world(machine.now, &demand, decide);
            prop_assert!(again.actions.is_empty() && again.promises == decision.promises, "{decision:?}, then {again:?}");
            let between = match again.again_at {
                Some(moment) => machine.now + (moment.0 as f64 / 1e6 - machine.now) * halfway,
                None => machine.now + 9.0 * HOUR,
            };
            let early = machine.with_world(between, &demand, decide);
            prop_assert!(early.actions.is_empty(), "{:?} at {between}, before {:?}", early.actions, again.again_at);
            for (model, _) in &decision.why {
                prop_assert!(machine.demand().iter().any(|demand| demand.model == *model));
            }
            machine.pass(again.again_at, 600.0);
            prop_assert!(machine.now < end, "after {} h not all is done: {:?}", machine.now / HOUR, machine.engines);
        }
    }

    #[test]
    fn a_model_that_fails_delays_nobody(mut machine in any_machine()) {
        let failing = machine.specs[0].model.clone();
        machine.blocked.push(Blocked { model: failing.clone(), until: None });
        machine.batches.retain(|batch| batch.model != failing || batch.arrives < 0.0 || batch.work > 600.0);
        for _ in 0..30 {
            let demand = machine.demand();
            let without: Vec<_> = demand.iter().filter(|demand| demand.model != failing).cloned().collect();
            let (with, without) =
                (machine.with_world(machine.now, &demand, decide), machine.with_world(machine.now, &without, decide));
            prop_assert_eq!(with.actions, without.actions);
            let again_at = machine.decide().again_at;
            machine.pass(again_at, 600.0);
        }
    }

    #[test]
    fn with_one_model_its_engine_stays_while_there_is_work(mut machine in any_machine()) {
        let only = machine.specs[0].model.clone();
        machine.batches.retain(|batch| batch.model == only);
        (machine.specs[0].replicas, machine.specs[0].idle) = (1, None);
        for _ in 0..60 {
            let actions = machine.decide().actions;
            prop_assert!(!leaves(&machine, &actions, &only), "{actions:?}");
            machine.pass(None, 120.0);
        }
    }
}

/// Models that never run out of work, each with batches that came at all times.
fn endless(models: usize, swap: f64, gpu_count: u32) -> Machine {
    let specs: Vec<_> = (0..models).map(|at| spec(&format!("m{at}"))).collect();
    let batch = |at: usize| Batch {
        model: format!("m{}", at % models).as_str().into(),
        arrives: (at / models) as f64 * 600.0,
        work: 1200.0,
        closes: None,
        priority: 1,
    };
    let costs = costs(&specs, swap);
    Machine::new(gpus(gpu_count), specs, costs, (0..models * 12 * 48).map(batch).collect())
}

#[test]
fn fair_turns_cost_a_share_that_is_bounded_and_everybody_has_some() {
    for (swap, models) in [(120.0, 3), (600.0, 2)] {
        let mut machine = endless(models, swap, 1);
        let mut served = vec![0.0; models];
        while machine.now < 48.0 * HOUR {
            let again_at = machine.decide().again_at;
            let (before, engines) = (machine.now, machine.engines.clone());
            machine.pass(again_at, 600.0);
            for engine in engines.iter().filter(|engine| engine.state == State::Ready) {
                let model: usize = engine.model.as_str()[1..].parse().unwrap();
                served[model] += machine.now - before;
            }
        }
        let lost = machine.in_transit / machine.now;
        assert!(lost <= 1.0 / 11.0 + 0.005, "{swap} s a swap: {lost}");
        assert!(served.iter().all(|seconds| *seconds > 6.0 * HOUR), "{served:?}");
    }
}

#[test]
fn a_model_that_is_always_the_last_choice_has_its_turn() {
    let mut machine = endless(3, 120.0, 1);
    // Much work in one batch: it finishes fewest batches per second. The others come with a little, again and again.
    machine.batches.retain(|batch| batch.model != "m2".into());
    machine.batches.iter_mut().for_each(|batch| batch.work = 290.0);
    let large = Batch { model: "m2".into(), arrives: 0.0, work: 5.0 * HOUR, closes: None, priority: 1 };
    machine.batches.push(large);
    let mut first = None;
    while machine.now < 12.0 * HOUR && first.is_none() {
        let again_at = machine.decide().again_at;
        machine.pass(again_at, 600.0);
        first = machine.engines.iter().any(|engine| engine.model == "m2".into()).then_some(machine.now);
    }
    assert!(first.is_some_and(|moment| moment < 6.0 * HOUR), "{first:?}");
}
