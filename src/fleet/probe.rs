//! Asks one worker again and again how it is: `/health`, `/v1/models`.

use std::{sync::Arc, time::Duration};

use reqwest::{Client, Response, StatusCode, Url};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::{Instant, timeout};

use super::{
    Inner,
    health::{Change, Probe},
    worker::{Worker, below},
};
use crate::{
    domain::{request_line::MAX_MODEL_BYTES, text::is_plain},
    fault,
    supervise::Part,
};

/// Between two probes.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// How long a probe may take.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// Probes between two looks at a healthy worker's models: a LoRA adapter may be loaded at run time.
const MODELS_EVERY: u32 = 10;
/// The most models of one worker that are known: a claim asks the database for all of all workers.
const MAX_MODELS: usize = 1_000;
/// Characters of a name that is left out in the log.
const SHOWN: usize = 60;
/// The most that is read of an answer.
const MAX_PAGE: usize = 4 * 1024 * 1024;

/// Probes a worker until it is forgotten.
pub(super) async fn run(fleet: Arc<Inner>, worker: Arc<Worker>, base: Url) {
    let mut round = 0u32;
    let mut known = Vec::new();
    loop {
        fault::panic_in(Part::Probe);
        let stale = std::mem::take(&mut worker.state.lock().models_stale);
        let models = stale || round.is_multiple_of(MODELS_EVERY) || known.is_empty();
        let probe = match timeout(TIMEOUT, probe(&fleet.client, &base, fleet.bearer(), models, &known)).await {
            Ok(probe) => probe,
            Err(_) => Probe::Silent(format!("no answer to the health check within {} s", TIMEOUT.as_secs())),
        };
        if let Probe::Well(models) = &probe {
            known.clone_from(models);
        } else {
            // A worker that comes back may serve something else.
            known.clear();
        }
        round = round.wrapping_add(1);
        let change = note(&worker, &probe);
        worker.sample(Instant::now());
        if matches!(change, Change::Down) {
            tracing::warn!(worker = %worker.id, url = %worker.url, ?probe, "worker is down; its requests run elsewhere");
            worker.abandon();
        } else if matches!(change, Change::Up) {
            worker.is_back();
            tracing::info!(worker = %worker.id, url = %worker.url, models = ?known, "worker is healthy");
        }
        fleet.refresh(&worker);
        if !matches!(probe, Probe::Well(_)) {
            worker.state.lock().load = None;
        }
        let held = worker.state.lock().held_until.map(|until| until.saturating_duration_since(Instant::now()));
        let wait = held.map_or(INTERVAL, |held| held.min(INTERVAL)).max(Duration::from_millis(10));
        tokio::select! {
            () = worker.gone.cancelled() => return,
            () = worker.probe_now.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

fn note(worker: &Worker, probe: &Probe) -> Change {
    let mut state = worker.state.lock();
    let change = state.health.observe(probe);
    match probe {
        Probe::Well(models) => {
            state.models = models.iter().map(|model| Arc::from(model.as_str())).collect();
            state.last_error = None;
            state.suspect = false;
        }
        Probe::Unwell(error) | Probe::Silent(error) => {
            state.last_error = Some(error.clone());
            // While in doubt nothing new goes there; what is in flight may still be answered.
            state.suspect = true;
        }
    }
    change
}

async fn probe(client: &Client, base: &Url, bearer: Option<&str>, models: bool, known: &[String]) -> Probe {
    let get = |path: &str| {
        let request = client.get(below(base, path));
        match bearer {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    };
    let health = match get("/health").send().await {
        Ok(response) => response,
        Err(error) => return failed(&error),
    };
    // Any OpenAI-compatible server will do: one without /health is asked for its models instead.
    let absent =
        matches!(health.status(), StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::UNAUTHORIZED);
    if !absent && !health.status().is_success() {
        return Probe::Unwell(format!("/health answers {}", health.status()));
    }
    if !absent && !models {
        return Probe::Well(known.to_vec());
    }
    let response = match get("/v1/models").send().await {
        Ok(response) => response,
        Err(error) => return failed(&error),
    };
    if !response.status().is_success() {
        return Probe::Unwell(format!("/v1/models answers {}", response.status()));
    }
    match read(response).await.map(|page| models_of(&page)) {
        Ok(Some(Listed { models, dropped })) => {
            if let Some((count, first)) = dropped
                && models != known
            {
                tracing::warn!(url = %base, count, first, "the worker lists models that no request can name; the others are used");
            }
            Probe::Well(models)
        }
        Ok(None) => Probe::Unwell("/v1/models does not answer with OpenAI's model list".into()),
        Err(error) => Probe::Unwell(error),
    }
}

fn failed(error: &reqwest::Error) -> Probe {
    if error.is_timeout() {
        Probe::Silent(super::dispatch::cause(error))
    } else {
        Probe::Unwell(super::dispatch::cause(error))
    }
}

pub(super) async fn read(mut response: Response) -> Result<Vec<u8>, String> {
    let mut page = Vec::new();
    while let Some(piece) = response.chunk().await.map_err(|error| super::dispatch::cause(&error))? {
        if page.len() + piece.len() > MAX_PAGE {
            return Err(format!("an answer over {MAX_PAGE} bytes"));
        }
        page.extend_from_slice(&piece);
    }
    Ok(page)
}

/// The names in a model list. Of what can't be one, because it is no text, or no line could ask for it, or there are too
/// many of them, nothing is taken but the others are. None: it is no model list, or there is no name in it that can be used.
fn models_of(page: &[u8]) -> Option<Listed> {
    #[derive(Deserialize)]
    struct List<'a> {
        #[serde(borrow)]
        data: Vec<&'a RawValue>,
    }
    #[derive(Deserialize)]
    struct Model {
        id: String,
    }
    let list: List<'_> = serde_json::from_slice(page).ok()?;
    let mut listed = Listed::default();
    for one in list.data {
        match serde_json::from_str::<Model>(one.get()) {
            Ok(Model { id }) if is_usable(&id) && listed.models.len() < MAX_MODELS => listed.models.push(id),
            Ok(Model { id }) => listed.drop(&id),
            Err(_) => listed.drop(one.get()),
        }
    }
    (!listed.models.is_empty() || listed.dropped.is_none()).then_some(listed)
}

/// Whether a line can ask for it.
fn is_usable(model: &str) -> bool {
    (1..=MAX_MODEL_BYTES).contains(&model.len()) && is_plain(model)
}

/// What a model list has.
#[derive(Debug, Default, PartialEq, Eq)]
struct Listed {
    models: Vec<String>,
    /// How many were left out, and the first of them, in part.
    dropped: Option<(usize, String)>,
}

impl Listed {
    fn drop(&mut self, what: &str) {
        let count = self.dropped.as_ref().map_or(0, |(count, _)| *count) + 1;
        let first = self.dropped.take().map(|(_, first)| first);
        // Escaped, for the log.
        let first = first.unwrap_or_else(|| what.chars().take(SHOWN).collect::<String>().escape_debug().to_string());
        self.dropped = Some((count, first));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_can_not_be_used_costs_that_name() {
        let list = |items: &str| models_of(format!(r#"{{"object":"list","data":[{items}]}}"#).as_bytes());
        let long = format!(r#"{{"id":"{}"}}"#, "x".repeat(1_025));
        for bad in [
            r#"{"id":"a\u0000b"}"#,
            r#"{"id":"\u001b[31m"}"#,
            r#"{"id":""}"#,
            r#"{"id":"\ud800"}"#,
            r#"{"id":7}"#,
            "{}",
            "7",
            &long,
        ] {
            let listed = list(&format!(r#"{{"id":"good"}},{bad},{{"id":"also"}}"#)).unwrap();
            assert_eq!(listed.models, ["good", "also"], "{bad}");
            let (count, first) = listed.dropped.unwrap();
            assert!(count == 1 && is_plain(&first), "{bad}: {first:?}");
            assert_eq!(list(bad), None, "a worker of which nothing can be used is not well");
        }
        assert_eq!(list("").unwrap(), Listed::default());
        let many: Vec<String> = (0..1_500).map(|number| format!(r#"{{"id":"m{number}"}}"#)).collect();
        let listed = list(&many.join(",")).unwrap();
        assert_eq!((listed.models.len(), listed.dropped), (1_000, Some((500, "m1000".into()))));
        assert_eq!(models_of(b"[]"), None);
    }
}
