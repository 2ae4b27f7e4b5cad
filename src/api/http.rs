//! Plain HTTP beside gRPC: for load balancers, orchestrators and Prometheus.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{Request, State},
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderMap, StatusCode, header};
use tokio_util::sync::CancellationToken;

use super::{
    Services,
    auth::{Role, Tokens},
    downloads,
    gate::unknown_method,
    limits::Limiter,
    service::Api,
};

/// How long the database may take to answer before this node counts as not ready.
const READY_WITHIN: Duration = Duration::from_secs(2);

struct Http {
    services: Services,
    tokens: Option<Tokens>,
    shutdown: CancellationToken,
}

/// The routes, and what answers where there is none.
pub(super) fn routes(
    services: Services,
    tokens: Option<Tokens>,
    limits: Arc<Limiter>,
    shutdown: CancellationToken,
) -> Router {
    let api = Api { services: services.clone(), limits, shutdown: shutdown.clone() };
    let downloads = downloads::routes(api, tokens.clone());
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .fallback(nothing)
        .with_state(Arc::new(Http { services, tokens, shutdown }))
        .merge(downloads)
}

/// Whether this node can take work.
async fn ready(State(http): State<Arc<Http>>) -> Response {
    if http.shutdown.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n").into_response();
    }
    match tokio::time::timeout(READY_WITHIN, http.services.store.ping()).await {
        Ok(Ok(())) => "ready\n".into_response(),
        Ok(Err(error)) => {
            tracing::warn!(%error, "not ready: the database failed");
            (StatusCode::SERVICE_UNAVAILABLE, "the database is not available\n").into_response()
        }
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "the database does not answer\n").into_response(),
    }
}

async fn metrics(State(http): State<Arc<Http>>, headers: HeaderMap) -> Response {
    match downloads::caller(http.tokens.as_ref(), &headers) {
        Ok(caller) if caller.role == Role::Admin => {}
        Ok(_) => return (StatusCode::FORBIDDEN, "metrics need a token with the role admin\n").into_response(),
        Err(refused) => return downloads::tell(&refused),
    }
    let text = (http.services.metrics)();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// A gRPC client is told in gRPC's way.
async fn nothing(request: Request) -> Response {
    let grpc = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    if grpc {
        return unknown_method().into_http();
    }
    (StatusCode::NOT_FOUND, "nothing here but gRPC, /healthz, /readyz, /metrics and files below /v1\n").into_response()
}
