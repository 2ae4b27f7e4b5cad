//! Many seeds, or the one that failed.

use std::{
    future::Future,
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
/// cores, each seed on one thread.
///
/// # Panics
/// If a seed fails; the message says how to run it again.
pub fn run<F: Future<Output = ()>>(test: &str, count: u64, simulate: impl Fn(u64) -> F + Sync) {
    if let Some(seed) = from_env("TIDEMILL_SIM_SEED") {
        return one(seed, &simulate);
    }
    let count = from_env("TIDEMILL_SIM_SEEDS").unwrap_or(count);
    let threads = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64).min(count);
    let (next, failed, began) = (AtomicU64::new(FIRST), AtomicBool::new(false), Instant::now());
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= FIRST + count || failed.load(Ordering::Relaxed) {
                return;
            }
            if catch_unwind(AssertUnwindSafe(|| one(seed, &simulate))).is_err() {
                failed.store(true, Ordering::Relaxed);
                eprintln!("seed {seed} failed; again: TIDEMILL_SIM_SEED={seed} cargo test --test simulation {test}");
            }
        }
    };
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    assert!(!failed.load(Ordering::Relaxed), "a seed failed: see above");
    let seconds = began.elapsed().as_secs_f64();
    println!("{test}: {count} seeds in {seconds:.1} s on {threads} threads");
}

fn one<F: Future<Output = ()>>(seed: u64, simulate: &impl Fn(u64) -> F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(simulate(seed));
}
