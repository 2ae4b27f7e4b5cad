//! Plain HTTP beside gRPC: for load balancers, orchestrators and Prometheus, and for files. Every request passes a gate
//! as every RPC does: who calls, a span, a count and a time.
//!
//! - `listener` takes the connections and ends them. `hosts`: by which names the server may be called, and from which web
//!   pages. `panics`: what a handler answers that panics. `observed`: bodies whose bytes and end are noted.
//! - `downloads`: files. `told`: errors in HTTP's words.

mod downloads;
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
    routing::get,
};
use http::{StatusCode, header};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use observed::{Observer, observed};

use super::{
    gate::{Gate, TraceId, trace_id},
    grpc,
};
use crate::{
    access::{Account, Caller, Held, Peer},
    service::{Service, ServiceError},
    telemetry,
};

/// How long the database may take to answer before this node counts as not ready.
const READY_WITHIN: Duration = Duration::from_secs(2);
/// Counts requests that have ended, by `route` and `status`.
const REQUESTS: &str = "tidemill_http_requests_total";
/// Seconds that requests took, downloads to their end, by `route` and `status`.
const SECONDS: &str = "tidemill_http_request_seconds";
/// What this server is, for whoever expects another.
const NOTHING: &str = "this is tidemill, a batch server with a gRPC API. It does not speak OpenAI's HTTP API: use the \
                       tidemill CLI or a gRPC client. Over plain HTTP there are /healthz, /readyz, /metrics, \
                       /v1/files/FILE/content, /v1/batches/BATCH/results and /v1/batches/BATCH/errors, all for GET\n";

/// The routes, and what answers where there is none.
pub(super) fn routes(service: Service, gate: Arc<Gate>, shutdown: CancellationToken) -> Router {
    metrics::describe_counter!(REQUESTS, "HTTP requests that have ended, by route and status");
    metrics::describe_histogram!(
        SECONDS,
        metrics::Unit::Seconds,
        "how long HTTP requests took, downloads to their end"
    );
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .fallback(nothing)
        .with_state(Arc::new(service.clone()))
        .merge(downloads::routes(service))
        .method_not_allowed_fallback(async || (StatusCode::METHOD_NOT_ALLOWED, NOTHING))
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

/// A gRPC client is told in gRPC's way.
async fn nothing(request: Request) -> Response {
    if grpc::is_grpc(&request) {
        return grpc::unknown_method();
    }
    (StatusCode::NOT_FOUND, NOTHING).into_response()
}

/// What a path is to the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Anybody may ask, as often as they like.
    Open,
    /// Whoever asks must be known.
    Known,
    /// The same, and they have only so many at a time.
    Download,
}

/// The route of a path, as a label, and what it is. A client must not be able to make up new labels.
fn route_of(path: &str) -> (&'static str, Kind) {
    let mut parts = path.split('/').skip(1);
    match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some("healthz"), None, ..) => ("/healthz", Kind::Open),
        (Some("readyz"), None, ..) => ("/readyz", Kind::Open),
        (Some("metrics"), None, ..) => ("/metrics", Kind::Known),
        (Some("v1"), Some("files"), Some(_), Some("content"), None) => ("/v1/files/{file}/content", Kind::Download),
        (Some("v1"), Some("batches"), Some(_), Some("results"), None) => {
            ("/v1/batches/{batch}/results", Kind::Download)
        }
        (Some("v1"), Some("batches"), Some(_), Some("errors"), None) => ("/v1/batches/{batch}/errors", Kind::Download),
        _ => ("other", Kind::Open),
    }
}

/// The gate, as a layer around everything that is not gRPC.
async fn pass(
    State((gate, shutdown)): State<(Arc<Gate>, CancellationToken)>,
    mut request: Request,
    next: Next,
) -> Response {
    let (route, kind) = route_of(request.uri().path());
    let caller = match kind {
        Kind::Open => Ok(Caller::anonymous()),
        Kind::Known | Kind::Download if shutdown.is_cancelled() => Err(ServiceError::shutting_down()),
        Kind::Known | Kind::Download => gate.caller(request.headers()),
    };
    let trace: Arc<str> = trace_id(request.headers()).into();
    let span = tracing::info_span!(
        "http",
        method = %request.method(),
        route,
        caller = caller.as_ref().map_or("", |caller| caller.owner.as_str()),
        trace_id = &*trace
    );
    let mut record = Record { span: span.clone(), route, began: Instant::now(), status: None, ended: false };
    let peer = request.extensions().get::<Peer>().copied();
    let entered = caller.and_then(|caller| {
        let account = Account::of(&caller, peer.as_ref());
        let held = if kind == Kind::Download { Some(gate.download(&account)?) } else { None };
        Ok::<_, ServiceError>((caller, account, held))
    });
    let (response, held) = match entered {
        Ok((caller, account, held)) => {
            let extensions = request.extensions_mut();
            extensions.insert(caller);
            extensions.insert(account);
            extensions.insert(TraceId(trace));
            (next.run(request).instrument(span).await, held)
        }
        Err(refused) => (told::tell(&refused), None),
    };
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
    /// The body came to its end.
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
    /// Of the caller's downloads, this one.
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
        assert_eq!(route_of("/healthz"), ("/healthz", Kind::Open));
        assert_eq!(route_of("/metrics"), ("/metrics", Kind::Known));
        assert_eq!(route_of("/v1/files/file-1/content"), ("/v1/files/{file}/content", Kind::Download));
        assert_eq!(route_of("/v1/batches/b/results"), ("/v1/batches/{batch}/results", Kind::Download));
        for other in
            ["/", "", "/v1/files", "/v1/files/a/b/content", "/v1/files/x/content/more", "/healthz/", "//metrics"]
        {
            assert_eq!(route_of(other), ("other", Kind::Open), "{other}");
        }
    }
}
