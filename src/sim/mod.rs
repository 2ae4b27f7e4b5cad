//! A simulated vLLM worker for `tidemill sim`, the demo, tests and benchmarks: vLLM 0.32's HTTP surface and metric names over
//! an engine that only takes time. No weights, no GPU; answers follow from the request and the seed.
//!
//! As in vLLM, at most `max_num_seqs` requests run and the others wait; an error is `{"error": {...}}`; a client that goes
//! away frees its place at once. Unlike in vLLM: a token is a word, every answer is as long as it may be (16 tokens where the
//! request does not say), `n` is not simulated, a stream has its first event at
//! once and the others when the engine is done, with `response_format` a chat answers what it was asked and nothing else (JSON,
//! if it was asked JSON), and a bad prompt costs no time. Given `x-request-id`, it becomes part
//! of the answer's id (as in vLLM) and is sent back (as in vLLM with `--enable-request-id-headers`).

mod answers;
mod engine;
mod faults;
mod metrics;
mod request;
mod streams;
#[cfg(test)]
mod tests;

use std::{
    collections::HashSet,
    convert::Infallible,
    io::{self, Read},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{DefaultBodyLimit, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, StatusCode,
        header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RETRY_AFTER},
    },
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use futures::StreamExt;
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

pub use faults::{Coding, Fault, Faults, Received};

use self::{
    engine::{Engine, Outcome},
    request::Refusal,
};
use crate::domain::{Endpoint, Timestamp};

/// vLLM has no limit; this one is far above any prompt.
const MAX_BODY: usize = 64 * 1024 * 1024;
/// The most sequences at once: more than any engine runs, and few enough for the semaphore behind it.
const MAX_NUM_SEQS: usize = 1_000_000;
/// A pause after an accept that failed, for instance because there are no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// A gateway's page.
const PAGE: &str = "<html><head><title>Gateway</title></head><body>Go away</body></html>";

/// The configuration of a simulated worker.
#[derive(Clone, Debug, PartialEq)]
pub struct SimConfig {
    /// The models that it serves, at least one; the first labels the metrics.
    pub models: Vec<String>,
    /// The time to the first token of every request.
    pub latency: Duration,
    /// The speed of each request in tokens per second; 0: all at once.
    pub tokens_per_second: f64,
    /// The share of requests answered with status 500, 0 to 1.
    pub error_rate: f64,
    /// The seed that decides which requests fail, and what answers say.
    pub seed: u64,
    /// Requests that run at once, 1 to 1,000,000; the others wait.
    pub max_num_seqs: usize,
}

impl Default for SimConfig {
    /// One model, `sim`, at once and without errors; 256 sequences as in vLLM.
    fn default() -> Self {
        Self {
            models: vec!["sim".to_owned()],
            latency: Duration::ZERO,
            tokens_per_second: 0.0,
            error_rate: 0.0,
            seed: 0,
            max_num_seqs: 256,
        }
    }
}

/// Why a configuration is invalid.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SimConfigError {
    /// It has no model.
    #[error("a simulated worker needs at least one model, and no model's name may be empty")]
    NoModel,
    /// A name occurs twice.
    #[error("the model {0:?} is named twice")]
    ModelTwice(String),
    /// Not a rate.
    #[error("tokens per second must be 0 (at once) or more, not {0}")]
    TokensPerSecond(f64),
    /// Not a share.
    #[error("the error rate must be from 0 to 1, not {0}")]
    ErrorRate(f64),
    /// Out of range.
    #[error("sequences at once must be from 1 to {MAX_NUM_SEQS}, not {0}")]
    MaxNumSeqs(usize),
}

impl SimConfig {
    /// Validates the configuration.
    ///
    /// # Errors
    /// [`SimConfigError`] names the first value that is out of range.
    pub fn validate(&self) -> Result<(), SimConfigError> {
        if self.models.is_empty() || self.models.iter().any(String::is_empty) {
            return Err(SimConfigError::NoModel);
        }
        let mut seen = HashSet::new();
        if let Some(twice) = self.models.iter().find(|model| !seen.insert(*model)) {
            return Err(SimConfigError::ModelTwice(twice.clone()));
        }
        if !(self.tokens_per_second.is_finite() && self.tokens_per_second >= 0.0) {
            return Err(SimConfigError::TokensPerSecond(self.tokens_per_second));
        }
        if !(0.0..=1.0).contains(&self.error_rate) {
            return Err(SimConfigError::ErrorRate(self.error_rate));
        }
        if !(1..=MAX_NUM_SEQS).contains(&self.max_num_seqs) {
            return Err(SimConfigError::MaxNumSeqs(self.max_num_seqs));
        }
        Ok(())
    }
}

/// A simulated worker. Cheap to clone; clones are the same worker.
#[derive(Clone)]
pub struct Sim {
    inner: Arc<Inner>,
}

struct Inner {
    config: SimConfig,
    engine: Engine,
    faults: Faults,
    started_at: Timestamp,
}

/// Marks a response whose connection [`Sim::serve`] closes instead of sending it.
#[derive(Clone, Copy)]
struct CloseInstead;

impl Sim {
    /// Makes a worker, which is not served yet.
    ///
    /// # Errors
    /// [`SimConfigError`], as [`SimConfig::validate`].
    pub fn new(config: SimConfig) -> Result<Self, SimConfigError> {
        config.validate()?;
        let engine = Engine::new(&config);
        let inner = Inner { config, engine, faults: Faults::default(), started_at: Timestamp::now() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The handle for faults and observations.
    #[must_use]
    pub fn faults(&self) -> Faults {
        self.inner.faults.clone()
    }

    /// The numbers of running and of waiting requests.
    #[must_use]
    pub fn load(&self) -> (usize, usize) {
        (self.inner.engine.running(), self.inner.engine.waiting())
    }

    /// The HTTP surface. Served by anything but [`Sim::serve`], a [`Fault::Reset`] becomes a [`Fault::Truncate`].
    pub fn router(&self) -> Router {
        let mut router = Router::new()
            .route("/health", get(health))
            .route("/v1/models", get(models))
            .route("/metrics", get(metrics))
            .route("/version", get(async || json(StatusCode::OK, r#"{"version":"0.32.0+tidemill.sim"}"#.into())))
            .route("/load", get(load))
            .route("/v1/messages/count_tokens", post(count_tokens))
            .route("/sleep", post(async |State(sim): State<Sim>| sim.inner.faults.sleep()))
            .route("/wake_up", post(async |State(sim): State<Sim>| sim.inner.faults.wake_up()))
            .route("/is_sleeping", get(is_sleeping));
        for endpoint in Endpoint::ALL {
            let handler = async move |State(sim): State<Sim>, headers: HeaderMap, body: Bytes| {
                sim.infer(endpoint, &headers, &body).await
            };
            router = router.route(endpoint.path(), post(handler));
        }
        let not_found = async || json(StatusCode::NOT_FOUND, r#"{"detail":"Not Found"}"#.into());
        router.fallback(not_found).layer(DefaultBodyLimit::max(MAX_BODY)).with_state(self.clone())
    }

    /// Serves HTTP/1.1, as vLLM does, until `shutdown`; then it is as if the process had been killed: requests in flight get no
    /// answer and every connection is closed.
    ///
    /// # Errors
    /// If the listener has no address.
    pub async fn serve(self, listener: TcpListener, shutdown: CancellationToken) -> io::Result<()> {
        tracing::debug!(address = %listener.local_addr()?, models = ?self.inner.config.models, "simulated worker listens");
        let router = self.router();
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new());
        // Dropping it ends the connections.
        let mut connections = JoinSet::new();
        loop {
            let stream = tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                Some(_) = connections.join_next() => continue,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::warn!(%error, "simulated worker can't accept a connection");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                },
            };
            // If this fails, answers are a little later.
            let _ = stream.set_nodelay(true);
            let router = router.clone();
            let service = hyper::service::service_fn(move |request: http::Request<Incoming>| {
                let answer = router.clone().oneshot(request.map(Body::new));
                async move {
                    let response = answer.await.unwrap_or_else(|never: Infallible| match never {});
                    match response.extensions().get::<CloseInstead>() {
                        Some(CloseInstead) => Err(io::Error::from(io::ErrorKind::ConnectionReset)),
                        None => Ok(response),
                    }
                }
            });
            let connection = http.serve_connection(TokioIo::new(stream), service);
            connections.spawn(async move {
                // The peer sees the error; nobody else needs it.
                let _ = connection.await;
            });
        }
    }

    async fn infer(&self, endpoint: Endpoint, headers: &HeaderMap, body: &Bytes) -> Response {
        let Inner { config, engine, faults, .. } = &*self.inner;
        let in_flight = faults.receive(endpoint.path(), body);
        let fault = faults.take();
        // Most requests do not ask for a stream, and are read once.
        if matches!(fault, None | Some(Fault::Truncate))
            && memchr::memmem::find(body, b"\"stream\"").is_some()
            && let Ok(request) = request::read(endpoint, body, &config.models, config.seed)
            && request.streams
        {
            return self.stream(endpoint, &request, headers, fault.is_some(), in_flight);
        }
        let mut response = match fault {
            Some(Fault::Hang) => std::future::pending().await,
            Some(Fault::Reset) => broken("", Some(CloseInstead)),
            Some(Fault::Truncate) => broken(r#"{"id":"chatcmpl-"#, None),
            Some(Fault::Fail { status, retry_after }) => injected(status, retry_after),
            Some(Fault::Body(content_type, body)) => {
                ([(CONTENT_TYPE, HeaderValue::from_static(content_type))], body).into_response()
            }
            Some(Fault::Page(status)) => page(status),
            Some(Fault::CutOff(_) | Fault::Encoded(_) | Fault::Big { .. } | Fault::Headers(_)) | None => {
                let cut = if let Some(Fault::CutOff(reason)) = fault { Some(reason) } else { None };
                match (answer(config, engine, faults, cut, endpoint, headers, body).await, fault) {
                    (Ok(answer), Some(Fault::Encoded(coding))) => encoded(&answer, coding),
                    (Ok(answer), Some(Fault::Big { bytes, sized })) => big(answer, bytes, sized),
                    (Ok(answer), Some(Fault::Headers(count))) => with_headers(json(StatusCode::OK, answer), count),
                    (Ok(answer), _) => json(StatusCode::OK, answer),
                    (Err(refusal), _) => refuse(&refusal),
                }
            }
        };
        if let Some(id) = headers.get(REQUEST_ID) {
            response.headers_mut().insert(REQUEST_ID, id.clone());
        }
        response
    }
}

impl Sim {
    /// A streamed answer. `torn`: it breaks off in the middle of its third event.
    fn stream(
        &self,
        endpoint: Endpoint,
        request: &request::Request<'_>,
        headers: &HeaderMap,
        torn: bool,
        in_flight: faults::InFlight,
    ) -> Response {
        let id = answer_id(headers, request.fingerprint);
        let mut events = streams::events(endpoint, request, &id, Timestamp::now().unix_seconds()).into_iter();
        let (sim, cost, first) = (self.clone(), request.cost, events.next());
        let body = async_stream::stream! {
            let _in_flight = in_flight;
            yield Ok(first.unwrap_or_default());
            sim.inner.engine.run(cost, sim.inner.faults.slow_down()).await;
            if torn {
                yield Ok(events.next().unwrap_or_default());
                let half = events.next().unwrap_or_default();
                yield Ok(half[..half.floor_char_boundary(half.len() / 2)].to_owned());
                // So that what is there is written out first.
                tokio::task::yield_now().await;
                yield Err(io::Error::from(io::ErrorKind::ConnectionReset));
                return;
            }
            for event in events {
                yield Ok(event);
            }
        };
        let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
        let mut response = ([(CONTENT_TYPE, kind)], Body::from_stream(body)).into_response();
        if let Some(id) = headers.get(REQUEST_ID) {
            response.headers_mut().insert(REQUEST_ID, id.clone());
        }
        response
    }
}

/// The id of an answer without its prefix: the client's, or that of what it says.
fn answer_id(headers: &HeaderMap, fingerprint: u64) -> String {
    let id = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(|id| is_plain(id));
    id.map_or_else(|| format!("{fingerprint:016x}"), str::to_owned)
}

async fn count_tokens(State(sim): State<Sim>, body: Bytes) -> Response {
    let Inner { config, .. } = &*sim.inner;
    match request::read(Endpoint::Messages, &body, &config.models, config.seed) {
        Ok(request) => json(StatusCode::OK, format!(r#"{{"input_tokens":{}}}"#, request.cost.prompt_tokens)),
        Err(refusal) => refuse(&refusal),
    }
}

async fn answer(
    config: &SimConfig,
    engine: &Engine,
    faults: &Faults,
    mut cut: Option<Option<&str>>,
    endpoint: Endpoint,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<String, Refusal> {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.as_bytes().get(..JSON.len()));
    let json = kind.is_some_and(|kind| kind.eq_ignore_ascii_case(JSON.as_bytes()));
    if !json {
        return Err(Refusal::invalid("Unsupported Media Type: Only 'application/json' is allowed", None));
    }
    let mut request = request::read(endpoint, body, &config.models, config.seed)?;
    faults.until_asleep(false).await;
    let outcome = tokio::select! {
        biased;
        outcome = engine.run(request.cost, faults.slow_down()) => outcome,
        () = faults.until_asleep(true) => {
            cut = Some(Some("abort"));
            Outcome::Answered
        }
    };
    if cut.is_some() {
        request.cost.completion_tokens /= 2;
    }
    match outcome {
        Outcome::Answered => {
            let id = answer_id(headers, request.fingerprint);
            let answer = answers::answer(endpoint, &request, &id, Timestamp::now().unix_seconds(), config.seed);
            Ok(match cut {
                None => answer,
                Some(reason) => answers::cut_off(&answer, reason),
            })
        }
        Outcome::Failed => {
            Err(internal(StatusCode::INTERNAL_SERVER_ERROR, "The simulated engine failed this request."))
        }
    }
}

/// Whether a text may stand in a JSON string as it is.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"' && byte != b'\\')
}

async fn health(State(sim): State<Sim>) -> StatusCode {
    if sim.inner.faults.is_unhealthy() { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
}

async fn models(State(sim): State<Sim>) -> Response {
    json(StatusCode::OK, answers::models(&sim.inner.config.models, sim.inner.started_at.unix_seconds()))
}

async fn metrics(State(sim): State<Sim>) -> Response {
    let Inner { config, engine, faults, .. } = &*sim.inner;
    let text = metrics::render(engine, faults.preemptions(), &config.models[0]);
    ([(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=1.0.0; charset=utf-8"))], text).into_response()
}

async fn load(State(sim): State<Sim>) -> Response {
    json(StatusCode::OK, format!(r#"{{"server_load":{}}}"#, sim.inner.faults.in_flight()))
}

async fn is_sleeping(State(sim): State<Sim>) -> Response {
    json(StatusCode::OK, format!(r#"{{"is_sleeping":{}}}"#, sim.inner.faults.is_asleep()))
}

fn encoded(answer: &str, coding: Coding) -> Response {
    let level = flate2::Compression::fast();
    let (name, encoded) = match coding {
        Coding::Gzip => ("gzip", whole(flate2::read::GzEncoder::new(answer.as_bytes(), level))),
        Coding::Deflate => ("deflate", whole(flate2::read::ZlibEncoder::new(answer.as_bytes(), level))),
        Coding::Zstd => ("zstd", zstd::encode_all(answer.as_bytes(), 1)),
        // It need not be right: it must not be read.
        Coding::Brotli => ("br", Ok(b"\x8b\x02\x80{}\x03".to_vec())),
    };
    match encoded {
        Ok(encoded) => {
            ([(CONTENT_TYPE, JSON), (CONTENT_ENCODING, HeaderValue::from_static(name))], encoded).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

fn whole(mut reader: impl Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).map(|_| bytes)
}

/// The answer with one more field, which is sent in pieces and never in memory as a whole.
fn big(mut answer: String, bytes: usize, sized: bool) -> Response {
    static PIECE: [u8; 64 * 1024] = [b'x'; 64 * 1024];
    answer.pop();
    answer.push_str(r#","padding":""#);
    let length = answer.len() + bytes + 2;
    let begin = futures::stream::iter([Bytes::from(answer)]);
    let pieces = (0..bytes.div_ceil(PIECE.len()))
        .map(move |at| Bytes::from_static(&PIECE[..PIECE.len().min(bytes - at * PIECE.len())]));
    let end = futures::stream::iter([Bytes::from_static(b"\"}")]);
    let body = begin.chain(futures::stream::iter(pieces)).chain(end).map(Ok::<_, Infallible>);
    let mut response = Body::from_stream(body).into_response();
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    if sized {
        response.headers_mut().insert(CONTENT_LENGTH, length.into());
    }
    response
}

fn json(status: StatusCode, body: String) -> Response {
    (status, [(CONTENT_TYPE, JSON)], body).into_response()
}

fn internal(status: StatusCode, message: &str) -> Refusal {
    Refusal { status: status.as_u16(), kind: "InternalServerError", message: message.to_owned(), param: None }
}

fn refuse(refusal: &Refusal) -> Response {
    let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    json(status, answers::error(refusal))
}

fn injected(status: StatusCode, retry_after: Option<Duration>) -> Response {
    let mut response = json(status, answers::error(&internal(status, "The test wants this request to fail.")));
    if let Some(wait) = retry_after {
        response.headers_mut().insert(RETRY_AFTER, wait.as_secs().into());
    }
    response
}

/// What a gateway answers in the place of its server.
fn page(status: StatusCode) -> Response {
    let mut response = (status, [(CONTENT_TYPE, HeaderValue::from_static("text/html"))], PAGE).into_response();
    if status.is_redirection() {
        response.headers_mut().insert(LOCATION, HeaderValue::from_static("https://login.example.com/"));
    }
    response
}

fn with_headers(mut response: Response, count: u16) -> Response {
    for at in 0..count {
        if let Ok(name) = HeaderName::try_from(format!("x-trace-{at}")) {
            response.headers_mut().insert(name, at.into());
        }
    }
    response
}

/// An answer that breaks off after `begun`.
fn broken(begun: &'static str, close: Option<CloseInstead>) -> Response {
    let begin = futures::stream::iter([Ok(Bytes::from_static(begun.as_bytes()))]);
    let end = futures::stream::once(async {
        // The server writes out what it has when there is no more for now; an error at once would swallow it.
        tokio::task::yield_now().await;
        Err(io::Error::from(io::ErrorKind::ConnectionReset))
    });
    let mut response = Body::from_stream(begin.chain(end)).into_response();
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    if let Some(close) = close {
        response.extensions_mut().insert(close);
    }
    response
}
