//! Reads one worker's load and adjusts its limit; [`super::limit`] decides.

use std::{sync::Arc, time::Duration};

use reqwest::Url;
use tokio::time::{Instant, timeout};

use super::{
    InFlight, Inner, Load,
    limit::{LimitFinder, Seen, TICK},
    load::{self, HitRate},
    probe,
    worker::{Deeds, Worker, below},
};
use crate::{
    fault,
    supervise::Part,
    telemetry::{Family, WORKERS},
};

/// Between two reads of the metrics of a worker whose limit is fixed, or that has nothing to do; and of this module's own.
const PACE: Duration = Duration::from_secs(1);

const LIMIT: Family =
    Family::gauge("tidemill_worker_limit", "requests that this server may have in flight at the worker");
const IN_FLIGHT: Family =
    Family::gauge("tidemill_worker_in_flight", "requests that this server has in flight at the worker");
const RUNNING: Family =
    Family::gauge("tidemill_worker_running", "requests that the worker reports as running, of all clients");
const WAITING: Family =
    Family::gauge("tidemill_worker_waiting", "requests that the worker reports as waiting, of all clients");
const CACHE: Family =
    Family::gauge("tidemill_worker_kv_cache_usage", "the share of the worker's KV cache that is in use, 0 to 1");
const HIT_RATE: Family = Family::gauge(
    "tidemill_worker_prefix_hit_rate",
    "the share of prompt tokens that its prefix cache held, 0 to 1, lately",
);
const REQUESTS: Family = Family::gauge(
    "tidemill_worker_requests_per_second",
    "requests that the worker answers per second, measured by this server",
);
const TOKENS: Family = Family::gauge(
    "tidemill_worker_output_tokens_per_second",
    "tokens that the worker generates per second, measured by this server",
);

/// Adjusts a worker's limit until the worker is removed.
pub(super) async fn run(fleet: Arc<Inner>, worker: Arc<Worker>, base: Url) {
    let mut limiter = match fleet.options.limit {
        InFlight::Fixed(_) => None,
        InFlight::Adaptive { cap } => Some(LimitFinder::new(cap)),
    };
    let began = Instant::now();
    let (mut read_at, mut published_at) = (None::<Instant>, began);
    let mut before = Deeds::default();
    let mut prefix = HitRate::default();
    loop {
        fault::panic_in(Part::Limit);
        tokio::select! {
            () = worker.gone.cancelled() => return,
            () = tokio::time::sleep(TICK) => {}
        }
        let now = Instant::now();
        let idle = worker.deeds() == before && fleet.desks.lock().board.load(worker.key).0 == 0;
        let pace = limiter.as_ref().filter(|_| !idle).map_or(PACE, |limiter| limiter.pace(now - began));
        // The timer is not exact.
        let due = read_at.is_none_or(|at| now + TICK / 4 >= at + pace);
        let serving = worker.state.lock().is_serving();
        let load = if due && serving {
            read_at = Some(now);
            let load = read(&fleet, &base).await;
            worker.state.lock().load = load;
            load
        } else {
            None
        };
        if let Some(limiter) = &mut limiter {
            let deeds = worker.deeds();
            let (in_flight, full) = {
                let board = &mut fleet.desks.lock().board;
                (board.load(worker.key).0, board.was_full(worker.key))
            };
            let limit = limiter.look(now - began, &seen(deeds, before, in_flight, full, load));
            before = deeds;
            if limit != worker.limit() {
                tracing::debug!(worker = %worker.id, limit, before = worker.limit(), ?load, "another limit");
                fleet.relimit(&worker, limit);
            }
        }
        if now - published_at >= PACE {
            published_at = now;
            worker.sample(now);
            let (in_flight, _) = fleet.desks.lock().board.load(worker.key);
            publish(&worker, in_flight, &mut prefix);
            // It may have been removed meanwhile.
            if worker.gone.is_cancelled() {
                worker.unpublish();
            }
        }
    }
}

fn seen(now: Deeds, before: Deeds, in_flight: u32, full: bool, load: Option<Load>) -> Seen {
    let since = |now: u64, before: u64| u32::try_from(now.saturating_sub(before)).unwrap_or(u32::MAX);
    let answered = since(now.returned, before.returned);
    let took = now.took_micros.saturating_sub(before.took_micros);
    Seen {
        in_flight,
        full,
        answered,
        latency: Duration::from_micros(took / u64::from(answered.max(1))),
        load,
        pushed_back: since(now.pushed_back, before.pushed_back),
    }
}

async fn read(fleet: &Inner, base: &Url) -> Option<Load> {
    let request = fleet.authorized(fleet.client.get(below(base, "/metrics")));
    let page = timeout(probe::TIMEOUT, async {
        let response = request.send().await.ok().filter(|response| response.status().is_success())?;
        probe::read(response).await.ok()
    });
    page.await.ok().flatten().and_then(|page| load::parse(&String::from_utf8_lossy(&page)))
}

/// Publishes the worker's metrics. `prefix`: the state of its prefix cache.
fn publish(worker: &Worker, in_flight: u32, prefix: &mut HitRate) {
    let (requests, tokens, load, hit_rate) = {
        let mut state = worker.state.lock();
        if let Some(load) = &state.load {
            state.prefix_hit_rate = prefix.observe(load);
        }
        (state.requests_per_second, state.tokens_per_second, state.load, state.prefix_hit_rate)
    };
    let show = |gauge, value: f64| WORKERS.set(gauge, &worker.url, value);
    show(LIMIT, worker.limit().into());
    show(IN_FLIGHT, in_flight.into());
    show(REQUESTS, requests);
    show(TOKENS, tokens);
    let Some(load) = load else { return };
    show(RUNNING, load.running);
    show(WAITING, load.waiting);
    show(CACHE, load.kv_cache_usage);
    if let Some(rate) = hit_rate {
        show(HIT_RATE, rate);
    }
}
