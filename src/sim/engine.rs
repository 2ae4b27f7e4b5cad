//! The engine behind the HTTP API: how many sequences run at once, how long each takes, which fail, and what is
//! counted. Decisions are functions of configuration, request and draw; only [`Engine::run`] waits.

use std::{
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::Duration,
};

use tokio::sync::{Semaphore, SemaphorePermit};

use super::SimConfig;

/// Prefixes that the simulated prefix cache holds; a new one displaces whichever has its place.
const PREFIXES: usize = 4_096;

/// One simulated engine.
pub(super) struct Engine {
    latency: Duration,
    tokens_per_second: f64,
    error_rate: f64,
    seed: u64,
    max_num_seqs: usize,
    /// A permit is a running sequence. Fair: first come, first served, as vLLM's default policy.
    slots: Semaphore,
    waiting: AtomicUsize,
    /// Requests drawn for errors so far.
    drawn: AtomicU64,
    /// Fingerprints of prefixes seen, by their low bits; 0 is none.
    prefixes: Vec<AtomicU64>,
    counters: Counters,
}

/// Totals since the start, as `/metrics` shows them.
#[derive(Default)]
pub(super) struct Counters {
    pub(super) prompt_tokens: AtomicU64,
    pub(super) generation_tokens: AtomicU64,
    pub(super) prefix_queries: AtomicU64,
    pub(super) prefix_hits: AtomicU64,
}

/// The cost of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cost {
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
    /// Tokens of the prompt's first message: what another request can share.
    pub(super) prefix_tokens: u64,
    /// The fingerprint of the prompt's first message.
    pub(super) prefix: u64,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Answered,
    /// By the error rate.
    Failed,
}

impl Engine {
    pub(super) fn new(config: &SimConfig) -> Self {
        Self {
            latency: config.latency,
            tokens_per_second: config.tokens_per_second,
            error_rate: config.error_rate,
            seed: config.seed,
            max_num_seqs: config.max_num_seqs,
            slots: Semaphore::new(config.max_num_seqs),
            waiting: AtomicUsize::new(0),
            drawn: AtomicU64::new(0),
            prefixes: (0..PREFIXES).map(|_| AtomicU64::new(0)).collect(),
            counters: Counters::default(),
        }
    }

    /// Runs one request. If dropped half way, it returns its slot or its place in the queue at once.
    pub(super) async fn run(&self, cost: Cost, slow_down: f64) -> Outcome {
        let slot = self.slot().await;
        self.count_prompt(cost);
        let draw = self.drawn.fetch_add(1, Ordering::Relaxed);
        let takes = service_time(self.latency, self.tokens_per_second, cost.completion_tokens, slow_down);
        if !takes.is_zero() {
            tokio::time::sleep(takes).await;
        }
        drop(slot);
        if is_unlucky(self.seed, draw, self.error_rate) {
            return Outcome::Failed;
        }
        self.counters.generation_tokens.fetch_add(cost.completion_tokens, Ordering::Relaxed);
        Outcome::Answered
    }

    async fn slot(&self) -> SemaphorePermit<'_> {
        if let Ok(slot) = self.slots.try_acquire() {
            return slot;
        }
        let _waiting = Waiting::join(&self.waiting);
        self.slots.acquire().await.expect("the semaphore is never closed")
    }

    fn count_prompt(&self, cost: Cost) {
        let counters = &self.counters;
        counters.prompt_tokens.fetch_add(cost.prompt_tokens, Ordering::Relaxed);
        counters.prefix_queries.fetch_add(cost.prompt_tokens, Ordering::Relaxed);
        let place = usize::try_from(cost.prefix % PREFIXES as u64).unwrap_or(0);
        if self.prefixes[place].swap(cost.prefix | 1, Ordering::Relaxed) == cost.prefix | 1 {
            counters.prefix_hits.fetch_add(cost.prefix_tokens, Ordering::Relaxed);
        }
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Sequences that run.
    pub(super) fn running(&self) -> usize {
        self.max_num_seqs.saturating_sub(self.slots.available_permits())
    }

    /// Requests that wait for a slot.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// 0 to 1: every sequence takes the same share of the cache, and all that may run at once fill it.
    #[allow(clippy::cast_precision_loss)]
    pub(super) fn kv_cache_usage(&self) -> f64 {
        self.running() as f64 / self.max_num_seqs as f64
    }
}

/// A place in the queue, given back on drop.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn join(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How long a request runs. `tokens_per_second` 0: its tokens take no time.
fn service_time(latency: Duration, tokens_per_second: f64, completion_tokens: u64, slow_down: f64) -> Duration {
    if latency.is_zero() && tokens_per_second == 0.0 {
        return Duration::ZERO;
    }
    #[allow(clippy::cast_precision_loss)]
    let generation = if tokens_per_second > 0.0 { completion_tokens as f64 / tokens_per_second } else { 0.0 };
    Duration::try_from_secs_f64((latency.as_secs_f64() + generation) * slow_down).unwrap_or(Duration::MAX)
}

/// Whether the request of this draw fails: the same for the same seed and draw.
fn is_unlucky(seed: u64, draw: u64, error_rate: f64) -> bool {
    if error_rate == 0.0 {
        return false;
    }
    // The 53 bits that a double holds, as a number from 0 up to but not including 1.
    #[allow(clippy::cast_precision_loss)]
    let fraction =
        (splitmix64(seed.wrapping_add(draw.wrapping_mul(0x9e37_79b9_7f4a_7c15))) >> 11) as f64 / 2f64.powi(53);
    fraction < error_rate
}

/// Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
pub(super) fn splitmix64(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const COST: Cost = Cost { prompt_tokens: 10, completion_tokens: 50, prefix_tokens: 4, prefix: 77 };

    fn engine(config: &SimConfig) -> Arc<Engine> {
        Arc::new(Engine::new(config))
    }

    #[test]
    fn time_is_latency_and_tokens_times_the_slow_down() {
        let ms = Duration::from_millis;
        assert_eq!(service_time(ms(0), 0.0, 1_000, 5.0), ms(0));
        assert_eq!(service_time(ms(20), 0.0, 1_000, 1.0), ms(20));
        assert_eq!(service_time(ms(20), 100.0, 50, 1.0), ms(520));
        assert_eq!(service_time(ms(20), 100.0, 50, 2.0), ms(1_040));
    }

    #[test]
    fn errors_come_at_their_rate_and_by_the_seed() {
        let failed = |seed| (0..20_000).filter(|draw| is_unlucky(seed, *draw, 0.1)).collect::<Vec<_>>();
        assert!((1_800..2_200).contains(&failed(1).len()), "{}", failed(1).len());
        assert_eq!(failed(1), failed(1));
        assert_ne!(failed(1), failed(2));
        assert!((0..1_000).all(|draw| is_unlucky(3, draw, 1.0) && !is_unlucky(3, draw, 0.0)));
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_run_than_may_and_the_rest_wait() {
        let engine = engine(&SimConfig { latency: Duration::from_secs(1), max_num_seqs: 2, ..SimConfig::default() });
        let started = tokio::time::Instant::now();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..5 {
            let engine = engine.clone();
            tasks.spawn(async move { engine.run(COST, 1.0).await });
        }
        tokio::task::yield_now().await;
        assert_eq!((engine.running(), engine.waiting()), (2, 3));
        assert!((engine.kv_cache_usage() - 1.0).abs() < f64::EPSILON);
        assert_eq!(tasks.join_all().await, [Outcome::Answered; 5]);
        assert_eq!(started.elapsed(), Duration::from_secs(3), "two, two and one");
        assert_eq!((engine.running(), engine.waiting()), (0, 0));
        assert_eq!(engine.counters().generation_tokens.load(Ordering::Relaxed), 250);
    }

    #[tokio::test(start_paused = true)]
    async fn who_goes_away_frees_the_slot_or_the_place_in_the_queue() {
        let engine = engine(&SimConfig { latency: Duration::from_secs(60), max_num_seqs: 1, ..SimConfig::default() });
        let spawn = || {
            let engine = engine.clone();
            tokio::spawn(async move { engine.run(COST, 1.0).await })
        };
        let (running, waiting) = (spawn(), spawn());
        tokio::task::yield_now().await;
        assert_eq!((engine.running(), engine.waiting()), (1, 1));
        waiting.abort();
        assert!(waiting.await.unwrap_err().is_cancelled());
        assert_eq!((engine.running(), engine.waiting()), (1, 0));
        running.abort();
        assert!(running.await.unwrap_err().is_cancelled());
        assert_eq!((engine.running(), engine.waiting()), (0, 0));
        assert_eq!(engine.counters().generation_tokens.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_prefix_seen_before_is_a_hit() {
        let engine = engine(&SimConfig::default());
        let hits = || engine.counters().prefix_hits.load(Ordering::Relaxed);
        engine.run(COST, 1.0).await;
        assert_eq!(hits(), 0);
        engine.run(COST, 1.0).await;
        assert_eq!(hits(), 4);
        engine.run(Cost { prefix: 78 + PREFIXES as u64 * 2, ..COST }, 1.0).await;
        assert_eq!(hits(), 4);
    }
}
