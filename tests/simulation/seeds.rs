//! Many seeds, or the one that failed.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Instant,
};

/// Where every run of seeds begins.
const FIRST: u64 = 1;

fn from_env(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text:?}")))
}

/// Runs `simulate` with `count` seeds, or as `TIDEMILL_SIM_SEEDS` (how many) and `TIDEMILL_SIM_SEED` (this one) say, on all
/// cores, each seed on one thread. What `start` makes is one thread's, for all its seeds.
///
/// # Panics
/// If a seed fails; the message says how to run it again.
pub fn run<S>(test: &str, count: u64, start: impl AsyncFn() -> S + Sync, simulate: impl AsyncFn(&mut S, u64) + Sync) {
    let (first, count) = match from_env("TIDEMILL_SIM_SEED") {
        Some(seed) => (seed, 1),
        None => (FIRST, from_env("TIDEMILL_SIM_SEEDS").unwrap_or(count)),
    };
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64).min(count);
    let (next, failed, began) = (AtomicU64::new(first), AtomicBool::new(false), Instant::now());
    let work = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut state = runtime.block_on(start());
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + count || failed.load(Ordering::Relaxed) {
                return;
            }
            let one = || runtime.block_on(simulate(&mut state, seed));
            if catch_unwind(AssertUnwindSafe(one)).is_err() {
                failed.store(true, Ordering::Relaxed);
                eprintln!("seed {seed} failed; again: TIDEMILL_SIM_SEED={seed} cargo test --test simulation {test}");
                return;
            }
        }
    };
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    assert!(!failed.load(Ordering::Relaxed), "a seed failed: see above");
    let seconds = began.elapsed().as_secs_f64();
    println!("{test}: {count} seeds in {seconds:.1} s on {threads} threads");
}
