//! Checks one worker's health regularly: `/health`, `/v1/models`.

use std::{sync::Arc, time::Duration};

use reqwest::{Client, RequestBuilder, Response, StatusCode, Url, header::LOCATION};
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout};

use super::{
    Inner,
    health::{Change, Health, Probe},
    judge,
    listing::{Listed, models_of},
    worker::{State, Worker, below},
};
use crate::{
    domain::{HealthInterval, OwnHealth},
    fault,
    supervise::Part,
};

/// Time limit of a probe.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// Between two checks of a worker that does not answer as it should: at first, doubling, and at most.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const RETRY: Duration = Duration::from_secs(1);
/// Time between two reads of a healthy worker's models: a LoRA adapter may be loaded at run time.
const MODELS_EVERY: Duration = Duration::from_secs(10);
/// If the health check has not been answered for so long, the list of models is asked for instead.
const SLOW: Duration = Duration::from_secs(4);
/// Health checks in a row that were too slow while the list of models was not: then the check is done without, and for
/// how long.
const SLOW_CHECKS: u32 = 2;
const WITHOUT: Duration = Duration::from_secs(600);
/// The most bytes of an answer that are read.
const MAX_PAGE: usize = 4 * 1024 * 1024;
/// Bytes of a redirect's target that are shown.
const SHOWN: usize = 200;

/// How workers are asked for their health, unless they have settings of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// Below the base URL, with a leading "/". None: only `/v1/models` is asked for.
    pub path: Option<String>,
    /// Between two checks.
    pub interval: Duration,
}

impl HealthCheck {
    /// These settings with a worker's own in their place.
    pub(super) fn with(&self, own: &OwnHealth) -> Self {
        Self {
            path: own.path.as_ref().map_or_else(|| self.path.clone(), |path| path.path().map(str::to_owned)),
            interval: own.interval.map_or(self.interval, HealthInterval::span),
        }
    }
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self { path: Some("/health".into()), interval: Duration::from_secs(1) }
    }
}

/// Probes a worker until it is removed.
pub(super) async fn run(fleet: Arc<Inner>, worker: Arc<Worker>, base: Url) {
    let mut prober = Prober::new(fleet.client.clone(), base, fleet.bearer());
    let mut failures = 0u32;
    loop {
        fault::panic_in(Part::Probe);
        let (stale, check) = {
            let mut state = worker.state.lock();
            (std::mem::take(&mut state.models_stale), fleet.options.health.with(&state.own_health))
        };
        prober.use_path(check.path);
        let seen = prober.probe(stale).await;
        let well = match seen {
            Ok(probe) => {
                take_note(&fleet, &worker, &probe);
                if !matches!(probe, Probe::Well(_)) {
                    prober.forget();
                }
                matches!(probe, Probe::Well(_))
            }
            Err(OwnFault(lack)) => {
                fleet.note_own_fault(lack, "a health check");
                false
            }
        };
        failures = if well { 0 } else { failures.saturating_add(1) };
        let retry = FIRST_RETRY.saturating_mul(2u32.saturating_pow(failures.saturating_sub(1))).min(RETRY);
        let interval = check.interval;
        tokio::select! {
            () = worker.gone.cancelled() => return,
            () = worker.probe_now.notified() => {}
            () = sleep(if well { interval } else { interval.min(retry) }) => {}
        }
    }
}

fn take_note(fleet: &Arc<Inner>, worker: &Worker, probe: &Probe) {
    let change = note(worker, probe);
    if matches!(change, Change::Down) {
        tracing::warn!(worker = %worker.id, url = %worker.url, ?probe, "worker is down; its requests run elsewhere");
        worker.abandon();
    } else if matches!(change, Change::Up) {
        worker.is_back();
        let models: Vec<String> = worker.state.lock().models.iter().map(ToString::to_string).collect();
        tracing::info!(worker = %worker.id, url = %worker.url, ?models, "worker is healthy");
    }
    fleet.refresh(worker);
    worker.gate_moved.notify_one();
}

fn note(worker: &Worker, probe: &Probe) -> Change {
    let mut state = worker.state.lock();
    let change = state.health.observe(probe);
    match probe {
        Probe::Well(models) => {
            state.models = models.iter().map(|model| Arc::from(model.as_str())).collect();
            let State { models, outages, .. } = &mut *state;
            outages.serves(models);
            state.last_error = None;
            state.suspect = false;
        }
        Probe::Unwell(error) | Probe::Silent(error) => {
            state.last_error = Some(error.clone());
            // While in doubt nothing new goes there; what is in flight may still be answered.
            state.suspect = true;
            state.cuts.begin_new_life();
            state.load = None;
        }
    }
    if state.health == Health::Down {
        // A worker that comes back may be another process.
        state.outages.reset();
    }
    change
}

/// The check failed because of this server itself, which says nothing of the worker.
struct OwnFault(&'static str);

/// How a worker is probed.
struct Prober {
    client: Client,
    base: Url,
    bearer: Option<String>,
    /// The health check's path. `None`: only the list of models is read.
    path: Option<String>,
    /// Consecutive checks that were too slow.
    slow: u32,
    /// Until when the check is skipped.
    without: Option<Instant>,
    /// Whether the check runs requests on models, so that it is not made again.
    costly: bool,
    /// What the worker serves, and when it was asked for that.
    known: Option<(Instant, Vec<String>)>,
}

/// The answer to a health check.
enum Checked {
    Well,
    /// There is no such check.
    Absent,
    Unwell(String),
    Slow,
}

impl Prober {
    fn new(client: Client, base: Url, bearer: Option<&str>) -> Self {
        let bearer = bearer.map(str::to_owned);
        Self { client, base, bearer, path: None, slow: 0, without: None, costly: false, known: None }
    }

    /// The path to ask for from now on. What was learned of another path says nothing of it.
    fn use_path(&mut self, path: Option<String>) {
        if self.path != path {
            (self.path, self.slow, self.without, self.costly) = (path, 0, None, false);
        }
    }

    /// A worker that comes back may serve something else, and be another server.
    fn forget(&mut self) {
        self.known = None;
    }

    /// Probes once. `models`: reads the list of models too.
    async fn probe(&mut self, models: bool) -> Result<Probe, OwnFault> {
        let now = Instant::now();
        let models = models || self.known.as_ref().is_none_or(|(at, _)| now >= *at + MODELS_EVERY);
        let without = self.costly || self.without.is_some_and(|until| now < until);
        let check = self.path.clone().filter(|_| !without);
        let Some(path) = check else { return self.models(TIMEOUT).await };
        match self.check(&path).await? {
            Checked::Well if !models && !self.costly => {
                self.slow = 0;
                Ok(Probe::Well(self.known.as_ref().map(|(_, models)| models.clone()).unwrap_or_default()))
            }
            Checked::Well | Checked::Absent => {
                self.slow = 0;
                self.models(TIMEOUT).await
            }
            Checked::Unwell(error) => Ok(Probe::Unwell(error)),
            Checked::Slow => {
                let probe = self.models(TIMEOUT - SLOW).await?;
                if !matches!(probe, Probe::Well(_)) {
                    let seconds = TIMEOUT.as_secs();
                    return Ok(Probe::Silent(format!("no answer to the health check within {seconds} s")));
                }
                self.slow += 1;
                if self.slow >= SLOW_CHECKS {
                    (self.slow, self.without) = (0, Some(now + WITHOUT));
                    tracing::info!(
                        worker = %self.base, path,
                        "the worker does not answer its health check in time, but its list of models: the check is skipped for a while; --worker-health-path none skips it for good"
                    );
                }
                Ok(probe)
            }
        }
    }

    async fn check(&mut self, path: &str) -> Result<Checked, OwnFault> {
        let response = match timeout(SLOW, self.get(path).send()).await {
            Err(_) => return Ok(Checked::Slow),
            Ok(Err(error)) => {
                return match failed(&error)? {
                    Probe::Silent(_) => Ok(Checked::Slow),
                    Probe::Unwell(error) => Ok(Checked::Unwell(error)),
                    Probe::Well(_) => Ok(Checked::Well),
                };
            }
            Ok(Ok(response)) => response,
        };
        let status = response.status();
        // Any OpenAI-compatible server will do: one without this path is asked for its models instead.
        if matches!(status, StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::UNAUTHORIZED) {
            return Ok(Checked::Absent);
        }
        if !status.is_success() {
            return Ok(Checked::Unwell(format!("{path} answers {}", answered(&response))));
        }
        let page = match timeout(SLOW, read(response)).await {
            Err(_) => return Ok(Checked::Slow),
            Ok(page) => page.unwrap_or_default(),
        };
        if is_costly(&page) {
            self.costly = true;
            tracing::info!(
                worker = %self.base, path,
                "each health check of this gateway runs requests on its models: from now on only its list of models is read"
            );
        }
        Ok(Checked::Well)
    }

    async fn models(&mut self, within: Duration) -> Result<Probe, OwnFault> {
        let asked = timeout(within, async {
            let response = match self.get("/v1/models").send().await {
                Ok(response) => response,
                Err(error) => return failed(&error),
            };
            if !response.status().is_success() {
                let key = match (response.status(), &self.bearer) {
                    (StatusCode::UNAUTHORIZED, None) => ": it wants an API key, see --worker-api-key",
                    (StatusCode::UNAUTHORIZED, Some(_)) => ": it refuses the key of --worker-api-key",
                    _ => "",
                };
                return Ok(Probe::Unwell(format!("/v1/models answers {}{key}", answered(&response))));
            }
            let page = match read(response).await {
                Ok(page) => page,
                Err(error) => return Ok(Probe::Unwell(error)),
            };
            let Some(Listed { models, dropped }) = models_of(&page) else {
                return Ok(Probe::Unwell("/v1/models does not answer with OpenAI's model list".into()));
            };
            if let Some((count, first)) = dropped
                && self.known.as_ref().is_none_or(|(_, known)| *known != models)
            {
                let url = &self.base;
                tracing::warn!(%url, count, first, "the worker lists models with names that no request can have; they are ignored");
            }
            Ok(Probe::Well(models))
        });
        let Ok(probe) = asked.await else {
            return Ok(Probe::Silent(format!("no answer to /v1/models within {} s", within.as_secs())));
        };
        let probe = probe?;
        if let Probe::Well(models) = &probe {
            self.known = Some((Instant::now(), models.clone()));
        }
        Ok(probe)
    }

    fn get(&self, path: &str) -> RequestBuilder {
        let request = self.client.get(below(&self.base, path));
        match &self.bearer {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }
}

/// A status in words, and where it leads.
fn answered(response: &Response) -> String {
    let status = response.status();
    let to = response.headers().get(LOCATION).filter(|_| status.is_redirection()).and_then(|to| to.to_str().ok());
    match to {
        Some(to) => {
            let to: String = to.chars().take(SHOWN).collect();
            format!(
                "{status}, a redirect to {to}: tidemill follows no redirects, so give that server's base URL instead"
            )
        }
        None => status.to_string(),
    }
}

fn failed(error: &reqwest::Error) -> Result<Probe, OwnFault> {
    if let Some(lack) = judge::own_fault(error) {
        return Err(OwnFault(lack));
    }
    let cause = super::outcome::cause(error);
    Ok(if error.is_timeout() { Probe::Silent(cause) } else { Probe::Unwell(cause) })
}

pub(super) async fn read(mut response: Response) -> Result<Vec<u8>, String> {
    let mut page = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(|error| super::outcome::cause(&error))? {
        if page.len() + piece.len() > MAX_PAGE {
            return Err(format!("an answer over {MAX_PAGE} bytes"));
        }
        page.extend_from_slice(&piece);
    }
    Ok(page)
}

/// Whether a health check tells of the endpoints behind a gateway, as LiteLLM's does: it asks each of them for a completion.
fn is_costly(page: &[u8]) -> bool {
    serde_json::from_slice::<Value>(page).is_ok_and(|page| page.get("healthy_endpoints").is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_that_costs_is_known_by_what_it_tells() {
        assert!(is_costly(br#"{"healthy_endpoints":[{"model":"m"}],"unhealthy_endpoints":[]}"#));
        assert!(!is_costly(b"") && !is_costly(b"OK") && !is_costly(br#"{"status":"ok"}"#));
    }
}
