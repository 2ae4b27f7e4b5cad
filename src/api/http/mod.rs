//! Plain HTTP beside gRPC: for load balancers, orchestrators and Prometheus, and for files. Every request passes a gate
//! as every RPC does: who calls, a span, a count and a time.
//!
//! - `listener` takes the connections and ends them. `hosts`: by which names the server may be called, and from which web
//!   pages. `panics`: what a handler answers that panics. `observed`: bodies whose bytes and end are noted.
//! - `told`: errors in HTTP's words. What is below `/v1` is OpenAI's API: `super::openai`.

pub(super) mod hosts;
pub(super) mod listener;
pub(super) mod observed;
pub(super) mod panics;
mod told;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Extension, Router,
    body::HttpBody,
    extract::{Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{any, get},
};
use http::{Method, StatusCode, header};
use smallvec::SmallVec;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use observed::{Observer, observed};

use super::{
    anthropic,
    gate::{Gate, TraceId, trace_id},
    grpc, openai,
    v1::{
        self, body,
        problem::{Dialect, Problem},
        request::RequestId,
    },
};
use crate::{
    access::{Account, Caller, Held, Peer, Received},
    config::BadFiles,
    service::{Service, ServiceError},
    telemetry,
};

/// How long the database may take to answer before this node counts as not ready.
const READY_WITHIN: Duration = Duration::from_secs(2);
/// Counts requests that have ended, by `route` and `status`.
const REQUESTS: &str = "tidemill_http_requests_total";
/// Seconds that requests took, downloads to their end, by `route` and `status`.
const SECONDS: &str = "tidemill_http_request_seconds";
/// The answer to an unknown path: it says what this server is.
const NOTHING: &str = "this is tidemill, a batch server. Here are its gRPC API, OpenAI's HTTP API below /v1, and /healthz, \
                       /readyz and /metrics for GET\n";

/// The routes, and the answer for unknown paths.
pub(super) fn routes(service: Service, gate: Arc<Gate>, api: Option<BadFiles>, shutdown: CancellationToken) -> Router {
    metrics::describe_counter!(REQUESTS, "HTTP requests that have ended, by route and status");
    metrics::describe_histogram!(
        SECONDS,
        metrics::Unit::Seconds,
        "how long HTTP requests took, downloads to their end"
    );
    // Without the role api a path of the API is not unknown: another node has it.
    let api = match api {
        Some(bad_files) => openai::routes(service.clone(), bad_files).merge(anthropic::routes(service.clone())),
        None => Router::new().route("/v1/{*path}", any(elsewhere)),
    };
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .fallback(nothing)
        .with_state(Arc::new(service))
        .merge(api)
        .method_not_allowed_fallback(other_method)
        .layer(middleware::from_fn_with_state((gate, shutdown), pass))
}

/// Whether this node can take work.
async fn ready(State(service): State<Arc<Service>>) -> Response {
    match service.ready(READY_WITHIN).await {
        Ok(()) => "ready\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn metrics(Extension(caller): Extension<Caller>) -> Response {
    if let Err(denied) = caller.require_admin() {
        return told::tell(&denied.into());
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], telemetry::render()).into_response()
}

/// Answers an unknown path; a gRPC client gets a gRPC status.
async fn nothing(request: Request) -> Response {
    if grpc::is_grpc(&request) {
        return grpc::unknown_method();
    }
    if v1::is_below(request.uri().path()) {
        return v1::nothing(request.method(), request.uri().path());
    }
    (StatusCode::NOT_FOUND, NOTHING).into_response()
}

async fn other_method(request: Request) -> Response {
    let path = request.uri().path();
    if v1::is_below(path) {
        return Problem::method(request.method(), path).respond(Dialect::of(path));
    }
    (StatusCode::METHOD_NOT_ALLOWED, NOTHING).into_response()
}

async fn elsewhere(uri: http::Uri) -> Response {
    Problem::not_an_api_node().respond(Dialect::of(uri.path()))
}

/// What a path is to the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Anybody may ask, as often as they like.
    Open,
    /// The caller must be known.
    Known,
    /// The caller must be known, and has a limited number at a time.
    Download,
    /// Like `Download`, with the limit of long streams that cost little.
    Watch,
    /// The bytes of the request are counted as they come.
    Upload,
}

/// The route of a path, as a label, and what it is. A client must not be able to make up new labels.
fn route_of(method: &Method, path: &str) -> (&'static str, Kind) {
    let parts: SmallVec<[&str; 8]> = path.split('/').skip(1).take(8).collect();
    match parts.as_slice() {
        ["healthz"] => ("/healthz", Kind::Open),
        ["readyz"] => ("/readyz", Kind::Open),
        ["metrics"] => ("/metrics", Kind::Known),
        ["v1", "files"] if *method == Method::POST => ("/v1/files", Kind::Upload),
        ["v1", "files"] => ("/v1/files", Kind::Known),
        ["v1", "files", _] => ("/v1/files/{file}", Kind::Known),
        ["v1", "files", _, "content"] => ("/v1/files/{file}/content", Kind::Download),
        ["v1", "uploads"] => ("/v1/uploads", Kind::Known),
        ["v1", "uploads", _, "parts"] => ("/v1/uploads/{upload}/parts", Kind::Upload),
        ["v1", "uploads", _, "complete"] => ("/v1/uploads/{upload}/complete", Kind::Known),
        ["v1", "uploads", _, "cancel"] => ("/v1/uploads/{upload}/cancel", Kind::Known),
        ["v1", "batches"] => ("/v1/batches", Kind::Known),
        ["v1", "batches", _] => ("/v1/batches/{batch}", Kind::Known),
        ["v1", "batches", _, "cancel"] => ("/v1/batches/{batch}/cancel", Kind::Known),
        ["v1", "batches", _, "events"] => ("/v1/batches/{batch}/events", Kind::Watch),
        ["v1", "batches", _, "output"] => ("/v1/batches/{batch}/output", Kind::Download),
        ["v1", "batches", _, "results"] => ("/v1/batches/{batch}/results", Kind::Download),
        ["v1", "batches", _, "errors"] => ("/v1/batches/{batch}/errors", Kind::Download),
        ["v1", "models"] => ("/v1/models", Kind::Known),
        ["v1", "chat", "completions"] => ("/v1/chat/completions", Kind::Known),
        ["v1", "completions"] => ("/v1/completions", Kind::Known),
        ["v1", "embeddings"] => ("/v1/embeddings", Kind::Known),
        ["v1", "responses"] => ("/v1/responses", Kind::Known),
        ["v1", "score"] => ("/v1/score", Kind::Known),
        ["v1", "rerank"] => ("/v1/rerank", Kind::Known),
        ["v1", "messages"] => ("/v1/messages", Kind::Known),
        ["v1", "messages", "count_tokens"] => ("/v1/messages/count_tokens", Kind::Known),
        ["v1", "messages", "batches"] if *method == Method::POST => ("/v1/messages/batches", Kind::Upload),
        ["v1", "messages", "batches"] => ("/v1/messages/batches", Kind::Known),
        ["v1", "messages", "batches", _] => ("/v1/messages/batches/{batch}", Kind::Known),
        ["v1", "messages", "batches", _, "cancel"] => ("/v1/messages/batches/{batch}/cancel", Kind::Known),
        ["v1", "messages", "batches", _, "results"] => ("/v1/messages/batches/{batch}/results", Kind::Download),
        ["v1", "models", ..] => ("/v1/models/{model}", Kind::Known),
        _ => ("other", Kind::Open),
    }
}

/// The gate, as a layer around everything that is not gRPC.
async fn pass(
    State((gate, shutdown)): State<(Arc<Gate>, CancellationToken)>,
    mut request: Request,
    next: Next,
) -> Response {
    let began = Instant::now();
    let path = request.uri().path();
    let (route, kind) = route_of(request.method(), path);
    let api = v1::is_below(path).then(|| (Dialect::of(path), RequestId::of(request.headers())));
    let caller = match kind {
        Kind::Open => Ok(Caller::anonymous()),
        _ if shutdown.is_cancelled() => Err(ServiceError::shutting_down()),
        _ => gate.caller_by(request.headers(), matches!(api, Some((Dialect::Anthropic, _)))),
    };
    let trace: Arc<str> = trace_id(request.headers()).into();
    let span = tracing::info_span!(
        "http",
        method = %request.method(),
        route,
        caller = caller.as_ref().map_or("", |caller| caller.owner.as_str()),
        trace_id = &*trace
    );
    let mut record = Record { span: span.clone(), route, began, status: None, ended: false };
    let peer = request.extensions().get::<Peer>().copied();
    let entered = caller.and_then(|caller| {
        let account = Account::of(&caller, peer.as_ref());
        let held = match kind {
            Kind::Download => Some(gate.download(&account)?),
            Kind::Watch => Some(gate.watch(&account)?),
            Kind::Open | Kind::Known | Kind::Upload => None,
        };
        Ok::<_, ServiceError>((caller, account, held))
    });
    let (mut response, held) = match entered {
        Ok((caller, account, held)) => {
            let extensions = request.extensions_mut();
            extensions.insert(caller);
            extensions.insert(account);
            extensions.insert(TraceId(trace));
            if let Some((_, id)) = &api {
                extensions.insert(id.clone());
            }
            let request = if kind == Kind::Upload {
                let received = Received::default();
                request.extensions_mut().insert(received.clone());
                request.map(|body| observed(body, received))
            } else {
                request
            };
            (next.run(request).instrument(span).await, held)
        }
        Err(refused) => match &api {
            Some((dialect, _)) => {
                let (parts, body) = request.into_parts();
                body::drain(&parts.headers, body.into_data_stream());
                (Problem::from(refused).respond(*dialect), None)
            }
            None => (told::tell(&refused), None),
        },
    };
    if let Some((dialect, id)) = &api {
        id.mark(&mut response, *dialect, began.elapsed());
    }
    record.status = Some(response.status());
    response.map(|body| {
        record.ended = body.is_end_stream();
        observed(body, Recorded { record, _held: held })
    })
}

/// Reports a request when it is dropped, however it ended.
struct Record {
    span: Span,
    route: &'static str,
    began: Instant,
    /// None: there was no response yet when the client went away.
    status: Option<StatusCode>,
    /// Whether the whole body was sent.
    ended: bool,
}

impl Drop for Record {
    fn drop(&mut self) {
        // What nginx writes for a client that has gone.
        let status = self.status.filter(|_| self.ended).map_or(499, |status| status.as_u16());
        let elapsed = self.began.elapsed();
        let labels = [("route", self.route.to_owned()), ("status", status.to_string())];
        metrics::counter!(REQUESTS, &labels).increment(1);
        metrics::histogram!(SECONDS, &labels).record(elapsed.as_secs_f64());
        let _entered = self.span.enter();
        tracing::debug!(status, ?elapsed, "http request ended");
    }
}

/// Looks at a response's body for its end.
struct Recorded {
    record: Record,
    /// The caller's place among its downloads, returned on drop.
    _held: Option<Held>,
}

impl Observer for Recorded {
    fn span(&self) -> Span {
        self.record.span.clone()
    }

    fn ended(&mut self) {
        self.record.ended = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_routes_become_labels() {
        let get = |path| route_of(&Method::GET, path);
        assert_eq!(get("/healthz"), ("/healthz", Kind::Open));
        assert_eq!(get("/metrics"), ("/metrics", Kind::Known));
        assert_eq!(get("/v1/files/file-1/content"), ("/v1/files/{file}/content", Kind::Download));
        assert_eq!(get("/v1/batches/b/results"), ("/v1/batches/{batch}/results", Kind::Download));
        assert_eq!(get("/v1/files"), ("/v1/files", Kind::Known));
        assert_eq!(route_of(&Method::POST, "/v1/files"), ("/v1/files", Kind::Upload));
        let part = route_of(&Method::POST, "/v1/uploads/u/parts");
        assert_eq!(part, ("/v1/uploads/{upload}/parts", Kind::Upload));
        assert_eq!(get("/v1/models/a/b/c/d/e/f/g/h/i"), ("/v1/models/{model}", Kind::Known));
        for other in ["/", "", "/v1", "/v1/files/a/b/content", "/v1/files/x/content/more", "/healthz/", "//metrics"] {
            assert_eq!(get(other), ("other", Kind::Open), "{other}");
        }
    }
}
