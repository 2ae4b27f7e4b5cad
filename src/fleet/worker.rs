//! One worker as this node sees it, and its slots in use.

use std::{
    hash::BuildHasher,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use reqwest::Url;
use strum::EnumCount as _;
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{
    Answer, Complaint, Load, WorkerState, WorkerView,
    board::WorkerKey,
    cuts::Cuts,
    health::Health,
    outage::{Gate, Sign},
    outages::Outages,
    reasons::Reasons,
};
use crate::{
    domain::{Endpoint, OwnHealth, Timestamp, WorkerId, text::http_url},
    store::WorkerRecord,
    telemetry::{Seldom, WORKERS},
};

/// The longest URL, in bytes.
const MAX_URL: usize = 2_048;
/// Bytes of an answer that are logged.
const SAID: usize = 500;
/// Time between two log lines about a worker's bad answers.
const LOG_PAUSE: Duration = Duration::from_secs(10);
/// The most tokens of an answer that count for the rates: more is nonsense.
const MOST_TOKENS: i64 = 1 << 32;
/// In microseconds.
const SECOND: i64 = 1_000_000;
/// Weight of the newest second in the rates shown to people.
const SMOOTHING: f64 = 0.3;

#[derive(Debug)]
pub struct Worker {
    /// Its key on the board.
    pub(super) key: WorkerKey,
    pub id: WorkerId,
    /// Base URL as registered.
    pub url: String,
    created_at: Timestamp,
    endpoints: [Url; Endpoint::COUNT],
    affinity: u64,
    /// What its probes and requests have shown. Held for a few instructions at a time.
    pub(super) state: Mutex<State>,
    /// Cancelled when requests in flight are to be abandoned; then replaced.
    abandon: Mutex<CancellationToken>,
    /// Notified to probe at once.
    pub(super) probe_now: Notify,
    /// What may be sent there changes at another time than before.
    pub(super) gate_moved: Notify,
    /// Cancelled when the worker is removed.
    pub(super) gone: CancellationToken,
    answered: AtomicU64,
    output_tokens: AtomicU64,
    limit: AtomicU32,
    /// Answers of any kind, how long they took in all, and how often it asked to be left alone or did not answer in time.
    returned: AtomicU64,
    took_micros: AtomicU64,
    pushed_back: AtomicU64,
    /// Whether it refuses requests with a `priority` in their body.
    refuses_priority: AtomicBool,
    /// Whether its answers say why they ended.
    pub(super) reasons: Mutex<Reasons>,
    /// When bad answers were logged.
    pub(super) bad_answers: Seldom,
}

/// Counts of a worker's answers since it became known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Deeds {
    pub(super) returned: u64,
    pub(super) took_micros: u64,
    pub(super) pushed_back: u64,
}

impl Deeds {
    /// How long what was answered since then took on average; none if nothing was.
    fn mean_since(self, before: Self) -> Option<Duration> {
        let took = self.took_micros.saturating_sub(before.took_micros);
        took.checked_div(self.returned.saturating_sub(before.returned)).map(Duration::from_micros)
    }
}

/// The observed state of a worker.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) health: Health,
    pub(super) models: Vec<Arc<str>>,
    pub(super) load: Option<Load>,
    pub(super) last_error: Option<String>,
    pub(super) draining: bool,
    /// Whether a request could not reach it, so that nothing is sent until a probe has.
    pub(super) suspect: bool,
    /// It does not have a model that it listed: its next probe looks at its models again.
    pub(super) models_stale: bool,
    /// Its own settings of its health check.
    pub(super) own_health: OwnHealth,
    /// Whether it or one of its models is at fault, according to its answers.
    pub(super) outages: Outages,
    /// The answers that it has cut off.
    pub(super) cuts: Cuts,
    pub(super) requests_per_second: f64,
    pub(super) tokens_per_second: f64,
    /// The recent share of prompt tokens in its prefix cache.
    pub(super) prefix_hit_rate: Option<f64>,
    /// The mean duration of a request.
    request_time: Option<Duration>,
    sampled: Option<Sample>,
}

/// What a worker had done at some time.
#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    answered: u64,
    tokens: u64,
    deeds: Deeds,
}

impl State {
    /// Whether it takes requests at all, so that its models are worth waiting for.
    pub(super) fn is_serving(&self) -> bool {
        self.health.is_well() && !self.draining
    }

    /// What may be sent to it now.
    pub(super) fn gate(&self, now: Instant) -> Gate {
        if self.is_serving() && !self.suspect { self.outages.gate(now) } else { Gate::Closed }
    }
}

impl Worker {
    pub(super) fn new(key: WorkerKey, record: &WorkerRecord, base: &Url, limit: u32, gone: CancellationToken) -> Self {
        Self {
            key,
            id: record.id.clone(),
            url: record.url.clone(),
            created_at: record.created_at,
            affinity: foldhash::quality::FixedState::default().hash_one(&record.url),
            endpoints: Endpoint::ALL.map(|endpoint| below(base, endpoint.path())),
            state: Mutex::new(State {
                draining: record.draining,
                own_health: record.health.clone(),
                ..State::default()
            }),
            abandon: Mutex::new(gone.child_token()),
            probe_now: Notify::new(),
            gate_moved: Notify::new(),
            gone,
            answered: AtomicU64::new(0),
            output_tokens: AtomicU64::new(0),
            limit: AtomicU32::new(limit),
            returned: AtomicU64::new(0),
            took_micros: AtomicU64::new(0),
            pushed_back: AtomicU64::new(0),
            refuses_priority: AtomicBool::new(false),
            reasons: Mutex::default(),
            bad_answers: Seldom::every(LOG_PAUSE),
        }
    }

    /// A number for it that is the same on every node and after every restart: what goes there again finds what it left.
    #[must_use]
    pub fn affinity(&self) -> u64 {
        self.affinity
    }

    /// Its key on the board.
    #[must_use]
    pub fn key(&self) -> WorkerKey {
        self.key
    }

    /// The most requests that this node may have in flight there.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    pub(super) fn set_limit(&self, limit: u32) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Whether it is known to refuse requests with a `priority` in their body.
    #[must_use]
    pub fn refuses_priority(&self) -> bool {
        self.refuses_priority.load(Ordering::Relaxed)
    }

    /// It refused a request with a `priority` in its body, and took it without.
    pub fn refused_priority(&self, answer: &Answer) {
        if !self.refuses_priority.swap(true, Ordering::Relaxed) {
            let said = String::from_utf8_lossy(&answer.body[..answer.body.len().min(SAID)]).into_owned();
            tracing::warn!(
                worker = %self.id, url = %self.url, status = answer.status, said,
                "the worker refuses requests with a priority, so it gets them without; --worker-priority auto suits all workers"
            );
        }
    }

    /// Records that it is back; it may be another server now.
    pub(super) fn is_back(&self) {
        self.refuses_priority.store(false, Ordering::Relaxed);
        *self.reasons.lock() = Reasons::default();
    }

    /// Records an answer of any kind.
    pub(super) fn returned(&self, took: Duration) {
        self.returned.fetch_add(1, Ordering::Relaxed);
        self.took_micros.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Records a push-back.
    pub(super) fn pushed_back(&self) {
        self.pushed_back.fetch_add(1, Ordering::Relaxed);
    }

    /// Requests that it has answered, whatever it said, since it became known.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.returned.load(Ordering::Relaxed)
    }

    pub(super) fn deeds(&self) -> Deeds {
        Deeds {
            returned: self.returned.load(Ordering::Relaxed),
            took_micros: self.took_micros.load(Ordering::Relaxed),
            pushed_back: self.pushed_back.load(Ordering::Relaxed),
        }
    }

    pub(super) fn endpoint(&self, endpoint: Endpoint) -> Url {
        let at = Endpoint::ALL.iter().position(|other| *other == endpoint).unwrap_or_default();
        self.endpoints[at].clone()
    }

    /// Cancelled when a request that is sent now is to be abandoned.
    pub(super) fn abandoned(&self) -> CancellationToken {
        self.abandon.lock().clone()
    }

    /// Abandons the requests in flight.
    pub(super) fn abandon(&self) {
        let fresh = self.gone.child_token();
        std::mem::replace(&mut *self.abandon.lock(), fresh).cancel();
    }

    /// Schedules a read of its models.
    pub(super) fn look_at_models(&self) {
        self.state.lock().models_stale = true;
        self.probe_now.notify_one();
    }

    /// Changes its own settings of its health check. Others than before apply at once.
    pub(super) fn set_health(&self, own: &OwnHealth) {
        let mut state = self.state.lock();
        if state.own_health != *own {
            state.own_health = own.clone();
            self.probe_now.notify_one();
        }
    }

    /// Counts an answer for the rates.
    pub fn count(&self, output_tokens: i64) {
        self.answered.fetch_add(1, Ordering::Relaxed);
        self.output_tokens
            .fetch_add(u64::try_from(output_tokens.clamp(0, MOST_TOKENS)).unwrap_or(0), Ordering::Relaxed);
    }

    /// Updates the rates.
    pub(super) fn sample(&self, now: Instant) {
        let (answered, tokens) = (self.answered.load(Ordering::Relaxed), self.output_tokens.load(Ordering::Relaxed));
        let deeds = self.deeds();
        let mut state = self.state.lock();
        if let Some(before) = state.sampled {
            let seconds = now.duration_since(before.at);
            if seconds < Duration::from_millis(500) {
                return;
            }
            #[allow(clippy::cast_precision_loss)] // a rate for people
            let rate = |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds.as_secs_f64();
            state.requests_per_second += SMOOTHING * (rate(answered, before.answered) - state.requests_per_second);
            state.tokens_per_second += SMOOTHING * (rate(tokens, before.tokens) - state.tokens_per_second);
            if let Some(time) = deeds.mean_since(before.deeds) {
                let known = state.request_time.unwrap_or(time);
                state.request_time = Some(known.mul_f64(1.0 - SMOOTHING) + time.mul_f64(SMOOTHING));
            }
        }
        state.sampled = Some(Sample { at: now, answered, tokens, deeds });
    }

    pub(super) fn view(&self, in_flight: u32, live: u32, limit: u32) -> WorkerView {
        let state = self.state.lock();
        let shown = match (&state.health, state.draining) {
            (Health::Down, _) => WorkerState::Down,
            (Health::Unknown | Health::Well { .. }, true) => WorkerState::Draining,
            (Health::Unknown, false) => WorkerState::Starting,
            (Health::Well { .. }, false) => WorkerState::Healthy,
        };
        WorkerView {
            id: self.id.clone(),
            url: self.url.clone(),
            models: state.models.iter().map(ToString::to_string).collect(),
            state: shown,
            in_flight,
            live,
            limit,
            load: state.load,
            output_tokens_per_second: state.tokens_per_second,
            requests_per_second: state.requests_per_second,
            prefix_hit_rate: state.load.and(state.prefix_hit_rate),
            request_time: state.request_time,
            last_error: state.last_error.clone(),
            complaints: complaints(&state.outages, Instant::now()),
            health: state.own_health.clone(),
            created_at: self.created_at,
        }
    }

    /// Removes its metrics.
    pub(super) fn unpublish(&self) {
        WORKERS.remove(&self.url);
    }
}

/// The certain and the suspected faults of the worker and its models.
fn complaints(outages: &Outages, now: Instant) -> Vec<Complaint> {
    let complaint = |(model, sign, since, is_certain): (Option<&Arc<str>>, Sign, Instant, bool)| {
        let ago = i64::try_from(now.saturating_duration_since(since).as_micros()).unwrap_or(0);
        // To the second: what is the same as before is to compare equal.
        let since = Timestamp((Timestamp::now().0 - ago + SECOND / 2).div_euclid(SECOND) * SECOND);
        Complaint { what: sign.to_string(), model: model.map(ToString::to_string), since, is_certain }
    };
    outages.complaints(now).into_iter().map(complaint).collect()
}

/// `path` below a base URL that may have a path of its own.
pub(super) fn below(base: &Url, path: &str) -> Url {
    let mut url = base.clone();
    url.set_path(&format!("{}{path}", base.path().trim_end_matches('/')));
    url
}

/// A worker's base URL as it is stored: `http` or `https`, without a trailing `/` or `/v1`.
///
/// # Errors
/// What is wrong with it, and what is expected.
pub fn base_url(text: &str) -> Result<Url, String> {
    const EXPECTED: &str = "expected a base URL such as http://gpu-1:8000";
    let text = text.trim_matches(' ');
    if text.len() > MAX_URL {
        return Err(format!("the worker URL has {} bytes; at most {MAX_URL} are accepted", text.len()));
    }
    // Not quoted: it may hold a password.
    let mut url = http_url(text).map_err(|bad| format!("{bad}; {EXPECTED}"))?;
    if url.as_str().len() > MAX_URL {
        return Err(format!("the worker URL is longer than {MAX_URL} bytes when it is percent-encoded"));
    }
    url.set_query(None);
    url.set_fragment(None);
    let path = url.path().trim_end_matches('/');
    let path = path.strip_suffix("/v1").unwrap_or(path).trim_end_matches('/').to_owned();
    url.set_path(&path);
    Ok(url)
}

/// The stored form of a base URL.
pub(super) fn canonical(url: &Url) -> String {
    url.as_str().trim_end_matches('/').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_requests_is_that_of_those_answered_since() {
        let deeds = |returned, took_micros| Deeds { returned, took_micros, pushed_back: 0 };
        assert_eq!(deeds(5, 9_000).mean_since(deeds(5, 9_000)), None);
        assert_eq!(deeds(9, 13_000).mean_since(deeds(5, 9_000)), Some(Duration::from_millis(1)));
    }

    #[test]
    fn base_urls_are_brought_to_one_form() {
        for text in ["http://gpu-1:8000", "http://gpu-1:8000/", "http://gpu-1:8000/v1", " http://GPU-1:8000/v1/?x#y"] {
            assert_eq!(canonical(&base_url(text).unwrap()), "http://gpu-1:8000", "{text}");
        }
        let gateway = base_url("https://gateway/team/v1").unwrap();
        assert_eq!(canonical(&gateway), "https://gateway/team");
        assert_eq!(below(&gateway, "/v1/models").as_str(), "https://gateway/team/v1/models");
        for bad in [
            "",
            "gpu-1:8000",
            "ftp://gpu",
            "http://",
            "http://a:b@gpu",
            "http://a@gpu",
            "http:gpu-1:8000",
            "http://gpu-1\\x",
            "http://gpu-1/\0",
            "http://gpu\t-1",
            &format!("http://{}", "x".repeat(2_048)),
        ] {
            assert!(base_url(bad).is_err(), "{bad}");
        }
    }
}
