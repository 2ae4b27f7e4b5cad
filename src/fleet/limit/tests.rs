use proptest::prelude::*;

use super::{
    engine::{Model, World},
    *,
};

/// The limit twice a second.
fn trace(world: &World) -> Vec<u32> {
    world.nodes[0].limits.iter().step_by(5).copied().collect()
}

/// The lowest and the highest limit over the last `seconds`, and the mean.
fn range(world: &World, seconds: usize) -> (f64, f64, f64) {
    let all = &world.nodes[0].limits;
    let last: Vec<f64> = all[all.len() - 10 * seconds..].iter().map(|limit| f64::from(*limit)).collect();
    #[allow(clippy::cast_precision_loss)]
    let mean = last.iter().sum::<f64>() / last.len() as f64;
    (last.iter().copied().fold(f64::MAX, f64::min), last.iter().copied().fold(0.0, f64::max), mean)
}

/// The limit stays within a tenth of its mean, and within these bounds.
fn assert_settled(world: &mut World, least: f64, most: f64) {
    world.run(20.0);
    let (low, high, mean) = range(world, 20);
    assert!(low >= 0.9 * mean && high <= 1.1 * mean, "it swings: {low} to {high} {:?}", trace(world));
    assert!(low >= least && high <= most, "{low} to {high}, not within {least} to {most}");
}

#[test]
fn it_finds_what_the_engine_runs_and_a_little_more_within_ten_seconds() {
    for seqs in [16, 32, 64, 128, 256, 800] {
        let mut world = World::adaptive(Model::of(seqs), &[1_024]);
        world.run(10.0);
        #[allow(clippy::cast_precision_loss)]
        let seqs = seqs as f64;
        assert_settled(&mut world, seqs, 1.25 * seqs + 3.0);
    }
}

#[test]
fn it_follows_an_engine_that_becomes_smaller_or_larger() {
    let mut world = World::adaptive(Model::of(512), &[1_024]);
    world.run(15.0);
    for (seqs, bounds) in [(64, (64.0, 82.0)), (400, (400.0, 500.0)), (48, (48.0, 64.0)), (200, (200.0, 250.0))] {
        world.model.max_num_seqs = seqs;
        world.run(10.0);
        assert_settled(&mut world, bounds.0, bounds.1);
    }
}

/// As measured of vLLM 0.32 on a CPU: 128 sequences, all requests alike, and a front end that takes as long as the engine.
fn waves() -> Model {
    Model { step: 0.005, step_per_seq: 0.000_1, spread: 0, front: 0.000_4, ..Model::of(128) }
}

#[test]
fn an_engine_that_runs_in_waves_is_kept_as_full_as_by_the_best_fixed_limit() {
    for model in [waves(), Model { tokens: 64, ..waves() }, Model { prefill: 0.001, ..waves() }] {
        let fixed = [1, 8, 32, 128, 256].map(|limit| World::fixed(model, limit).run(30.0));
        let best = fixed.iter().copied().fold(0.0, f64::max);
        let mut world = World::adaptive(model, &[1_024]);
        let adaptive = world.run(30.0);
        assert!(adaptive >= 0.97 * best, "{adaptive} of {fixed:?}, limit {}", world.limit());
        assert!(world.limit() <= 290, "no more than a second wave waits: {}", world.limit());
    }
}

#[test]
fn the_start_is_quick() {
    // 2,000 requests, as in the benchmark.
    let took = |mut world: World| {
        while world.done < 2_000 {
            world.run(0.01);
        }
        world.now
    };
    let best = [1, 8, 32, 128, 256].map(|limit| took(World::fixed(waves(), limit)));
    let best = best.iter().copied().fold(f64::MAX, f64::min);
    let adaptive = took(World::adaptive(waves(), &[1_024]));
    assert!(best >= 0.97 * adaptive, "{adaptive} s, the best fixed limit {best} s");
}

#[test]
fn a_cap_holds() {
    let mut world = World::adaptive(Model::of(256), &[100]);
    world.run(10.0);
    assert_settled(&mut world, 100.0, 100.0);
}

#[test]
fn a_server_that_runs_one_at_a_time_gets_little_more() {
    let mut world = World::adaptive(Model::of(1), &[1_024]);
    world.run(20.0);
    assert!((2..=4).contains(&world.limit()), "{:?}", trace(&world));
}

#[test]
fn it_never_stays_at_the_floor() {
    let mut world = World::adaptive(Model::of(256), &[1_024]);
    for _ in 0..200 {
        world.nodes[0].pushed_back = 1_000;
        world.run(0.1);
    }
    assert!(world.limit() <= 2, "pushed back all the time: {}", world.limit());
    world.run(60.0);
    assert!(world.limit() >= 256, "{}", world.limit());
}

#[test]
fn a_few_push_backs_among_many_answers_change_nothing() {
    let mut world = World::adaptive(Model::of(256), &[1_024]);
    world.run(20.0);
    let before = world.limit();
    for _ in 0..100 {
        world.nodes[0].pushed_back = 2;
        world.run(0.1);
    }
    assert!(world.limit() >= before * 9 / 10, "{} before, {} after", before, world.limit());
}

#[test]
fn after_a_stall_it_goes_on() {
    let mut world = World::adaptive(Model::of(128), &[1_024]);
    let before = world.run(15.0);
    world.stalled = true;
    world.run(10.0);
    // Half of what was there has timed out.
    world.nodes[0].pushed_back = 64;
    world.run(10.0);
    world.stalled = false;
    world.run(20.0);
    assert!(world.run(10.0) >= 0.97 * before);
    assert_settled(&mut world, 128.0, 160.0);
}

#[test]
fn preemptions_are_backed_off_from() {
    // Room for the prompts of 128 and for what 88 generate.
    let model = Model { cache: 128 * 300, prompt: 200, tokens: 200, spread: 90, ..Model::of(1_000) };
    let preempted = |mut world: World| {
        world.run(30.0);
        let before = world.preemptions;
        let rate = world.run(60.0);
        (world.preemptions - before, rate, world)
    };
    let (flooded, flooded_rate, _) = preempted(World::fixed(model, 1_000));
    let (adaptive, rate, mut world) = preempted(World::adaptive(model, &[1_024]));
    assert!(adaptive * 4 < flooded, "{adaptive} preemptions, {flooded} with 1,000 in flight");
    assert!(rate >= 0.95 * flooded_rate, "{rate} against {flooded_rate} {:?}", trace(&world));
    assert_settled(&mut world, 90.0, 200.0);
}

#[test]
fn a_gateway_that_refuses_is_met_just_below_where_it_does() {
    for metrics in [true, false] {
        let mut world = World::adaptive(Model { metrics, ..Model::of(1_000) }, &[1_024]);
        world.refuses_above = 100;
        world.run(20.0);
        world.run(20.0);
        let (low, high, _) = range(&world, 20);
        assert!(low >= 45.0 && high <= 120.0, "{low} to {high}, metrics: {metrics}");
    }
}

#[test]
fn nodes_that_share_a_worker_do_not_outbid_each_other() {
    let mut world = World::adaptive(Model::of(128), &[1_024; 4]);
    world.run(20.0);
    for _ in 0..20 {
        world.run(1.0);
        assert!((128..=170).contains(&world.limit()), "{} in all", world.limit());
    }
    assert!(
        world.nodes.iter().all(|node| node.limit >= 8),
        "{:?}",
        world.nodes.iter().map(|n| n.limit).collect::<Vec<_>>()
    );
    // Three have nothing more to do; the fourth takes the place.
    for node in &mut world.nodes[1..] {
        node.busy = false;
    }
    world.run(10.0);
    assert!((128..=160).contains(&world.nodes[0].limit), "{}", world.nodes[0].limit);
}

#[test]
fn one_that_has_nothing_to_send_keeps_its_limit() {
    let mut world = World::adaptive(Model::of(128), &[1_024]);
    world.run(15.0);
    let limit = world.limit();
    world.nodes[0].busy = false;
    world.run(60.0);
    assert_eq!(world.limit(), limit);
}

#[test]
fn without_metrics_throughput_shows_the_way() {
    for seqs in [32, 128, 300] {
        let model = Model { metrics: false, ..Model::of(seqs) };
        let best = World::fixed(model, 2 * u32::try_from(seqs).unwrap()).run(20.0);
        let mut world = World::adaptive(model, &[1_024]);
        world.run(10.0);
        let rate = world.run(20.0);
        assert!(rate >= 0.93 * best, "{rate} of {best} with {seqs}, limit {:?}", trace(&world));
        assert!(world.limit() as usize <= 2 * seqs + 64, "{} for {seqs}", world.limit());
    }
}

#[test]
fn without_metrics_it_follows_an_engine_that_changes() {
    let mut world = World::adaptive(Model { metrics: false, ..Model::of(300) }, &[1_024]);
    world.run(20.0);
    world.model.max_num_seqs = 40;
    world.run(60.0);
    assert!((36..=120).contains(&world.limit()), "{:?}", trace(&world));
    world.model.max_num_seqs = 300;
    world.run(60.0);
    assert!(world.limit() >= 240, "{:?}", trace(&world));
}

fn load() -> impl Strategy<Value = Load> {
    (0.0..2_000f64, 0.0..2_000f64, 0.0..1f64, 0.0..50f64).prop_map(|(running, waiting, kv_cache_usage, preemptions)| {
        Load { running, waiting, kv_cache_usage, preemptions, ..Load::default() }
    })
}

proptest! {
    /// Whatever is seen: the limit stays within floor and cap, and at most doubles in one look.
    #[test]
    fn no_sight_leads_it_astray(
        cap in 1u32..2_000,
        looks in prop::collection::vec(
            (1u64..3_000, 0u32..3_000, any::<bool>(), 0u32..5_000, 0u64..100_000, prop::option::of(load()), 0u32..3), 1..200),
    ) {
        let mut limiter = LimitFinder::new(cap);
        let mut now = Duration::ZERO;
        for (wait, in_flight, full, answered, latency, load, pushed_back) in looks {
            now += Duration::from_millis(wait);
            let before = limiter.limit();
            let in_flight = in_flight.min(before);
            let seen = Seen { in_flight, full, answered, latency: Duration::from_millis(latency), load, pushed_back };
            let after = limiter.look(now, &seen);
            prop_assert_eq!(after, limiter.limit());
            prop_assert!((FLOOR..=cap).contains(&after));
            prop_assert!(after <= (2 * before).max(2), "{} after {}", after, before);
            prop_assert!(!limiter.pace(now).is_zero());
        }
    }

    /// Whatever the engine: it is kept as busy as a limit far above what it runs would keep it.
    #[test]
    fn any_engine_is_kept_full(
        seqs in 1usize..400, step in 0.003..0.03f64, tokens in 4u32..64, spread in 0u32..40, front in 0.0..0.000_3f64,
    ) {
        let model = Model { step, tokens, spread, front, ..Model::of(seqs) };
        let flooded = World::fixed(model, 1_024);
        let mut worlds = [World::adaptive(model, &[1_024]), flooded];
        // Requests of one length end together, up to 400 at once: long enough that one such flock does not decide.
        let [rate, best] = worlds.each_mut().map(|world| { world.run(10.0); world.run(60.0) });
        prop_assert!(rate >= 0.93 * best, "{} of {}, limit {}", rate, best, worlds[0].limit());
    }
}
