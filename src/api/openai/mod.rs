//! OpenAI's HTTP API over the same service as gRPC: a file or a batch that one made, the other sees.
//!
//! - `files`, `content`: files and their bytes. `uploads`: uploads in parts. `form` reads a form with a file, `multipart`
//!   its bytes.
//! - `batches`, `events`: batches, and their events for those who watch over HTTP. `inline`: requests in the call that
//!   creates their batch. `output`: its results so far.
//! - `models`: what the workers serve. `live`: calls that a worker answers at once, `sse` their streams.
//! - `shapes`: how files, batches and models are written. `list`: pages. `problem`: errors. `body`: request bodies. `json`:
//!   fields of a JSON body.

mod batches;
pub(super) mod body;
mod content;
mod events;
mod files;
mod form;
mod inline;
mod json;
mod list;
mod live;
mod models;
pub mod multipart;
mod output;
pub(super) mod problem;
mod shapes;
pub mod sse;
mod uploads;

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, RequestPartsExt, Router,
    extract::{FromRequestParts, Path, State},
    response::Response,
    routing::{get, post},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, request::Parts};
use serde_json::Value;

use self::problem::{Dialect, Problem};
use crate::{
    access::{Caller, Denied},
    config::BadFiles,
    domain::{Endpoint, text::is_plain},
    service::{NotASpan, Service, ServiceError, Span},
};

/// The id of a request, by which client and server talk about it.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The same on Anthropic's paths.
const ANTHROPICS_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
/// How long the answer took, in milliseconds.
const PROCESSING: HeaderName = HeaderName::from_static("openai-processing-ms");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// The longest id that a client may give its request.
const LONGEST_ID: usize = 128;

/// The routes. The gate has let their callers in.
pub(super) fn routes(service: Service, bad_files: BadFiles) -> Router {
    let mut router = Router::new();
    for endpoint in Endpoint::ALL {
        router = router.route(endpoint.path(), live::route(endpoint, ""));
    }
    router
        .route("/v1/messages/count_tokens", live::route(Endpoint::Messages, "/count_tokens"))
        .route("/v1/files", get(files::list).post(files::upload))
        .route("/v1/files/{file}", get(files::show).delete(files::delete))
        .route("/v1/files/{file}/content", get(content::content))
        .route("/v1/uploads", post(uploads::create))
        .route("/v1/uploads/{upload}/parts", post(uploads::add_part))
        .route("/v1/uploads/{upload}/complete", post(uploads::complete))
        .route("/v1/uploads/{upload}/cancel", post(uploads::cancel))
        .route("/v1/batches", get(batches::list).post(batches::create))
        .route("/v1/batches/{batch}", get(batches::show).delete(batches::delete))
        .route("/v1/batches/{batch}/cancel", post(batches::cancel))
        .route("/v1/batches/{batch}/events", get(events::watch))
        .route("/v1/batches/{batch}/output", get(output::output))
        .route("/v1/batches/{batch}/results", get(content::results))
        .route("/v1/batches/{batch}/errors", get(content::errors))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*model}", get(models::show))
        .layer(Extension(bad_files))
        .with_state(Arc::new(service))
}

type Of = State<Arc<Service>>;

/// Who calls.
struct By(Caller);

impl<S: Send + Sync> FromRequestParts<S> for By {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let caller = parts.extensions.get::<Caller>().cloned();
        caller.map(Self).ok_or_else(|| ServiceError::from(Denied::TokenMissing).into())
    }
}

/// The id in a path, decoded.
struct Id(String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        // What is no UTF-8 names nothing.
        let Ok(Path(id)) = parts.extract::<Path<String>>().await else {
            return Err(Problem::unknown_url(&parts.method, parts.uri.path()));
        };
        Ok(Self(id))
    }
}

impl axum::response::IntoResponse for Problem {
    fn into_response(self) -> Response {
        self.respond(Dialect::OpenAi)
    }
}

/// Whether a path is one of this API.
pub(super) fn is_below(path: &str) -> bool {
    path == "/v1" || path.starts_with("/v1/")
}

/// What a path of this API answers where there is nothing.
pub(super) fn nothing(method: &Method, path: &str) -> Response {
    Problem::unknown_url(method, path).respond(Dialect::of(path))
}

/// The id of a request: the client's own if it has one, else a new one.
#[derive(Clone, Debug)]
pub(super) struct RequestId(HeaderValue);

impl RequestId {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let given = headers.get(REQUEST_ID).filter(|id| {
            (1..=LONGEST_ID).contains(&id.len()) && id.as_bytes().iter().all(|byte| matches!(byte, b'!'..=b'~'))
        });
        let made = || HeaderValue::try_from(format!("req_{:032x}", rand::random::<u128>()));
        // Hex digits are good in a header.
        Self(given.cloned().unwrap_or_else(|| made().unwrap_or_else(|_| HeaderValue::from_static("req_0"))))
    }

    /// Puts the id and the time that the answer took into its headers.
    pub(super) fn mark(&self, response: &mut Response, dialect: Dialect, took: Duration) {
        let headers = response.headers_mut();
        headers.insert(REQUEST_ID, self.0.clone());
        match dialect {
            Dialect::OpenAi => {
                headers.insert(PROCESSING, u64::try_from(took.as_millis()).unwrap_or(u64::MAX).into());
            }
            Dialect::Anthropic => {
                headers.insert(ANTHROPICS_REQUEST_ID, self.0.clone());
            }
        }
    }
}

/// The client's idempotency key; empty: none.
fn idempotency_key(headers: &HeaderMap) -> Result<String, Problem> {
    let Some(key) = headers.get(IDEMPOTENCY_KEY) else { return Ok(String::new()) };
    match key.to_str() {
        Ok(key) if is_plain(key) => Ok(key.to_owned()),
        _ => Err(Problem::invalid("invalid_value", "Idempotency-Key", "the Idempotency-Key is not plain ASCII")),
    }
}

/// When something expires, as OpenAI writes it: an anchor and seconds. How long it may be is for the service to judge.
fn expiry(of: &Value, field: &str) -> Result<Option<Span>, Problem> {
    let Value::Object(fields) = of else { return Err(Problem::kind(field, "an object", of)) };
    let name = |part: &str| format!("{field}.{part}");
    match fields.get("anchor") {
        Some(Value::String(anchor)) if anchor == "created_at" => {}
        Some(Value::String(anchor)) => return Err(Problem::value(&name("anchor"), anchor, "'created_at'")),
        None | Some(Value::Null) => return Err(Problem::missing(&name("anchor"))),
        Some(other) => return Err(Problem::kind(&name("anchor"), "a string", other)),
    }
    match fields.get("seconds") {
        None | Some(Value::Null) => Err(Problem::missing(&name("seconds"))),
        Some(seconds) => match seconds.as_i64() {
            Some(seconds) => Ok(Some(u64::try_from(seconds).map(Duration::from_secs).map_err(|_| NotASpan))),
            None => Err(Problem::kind(&name("seconds"), "an integer", seconds)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_own_id_is_kept_if_it_is_plain() {
        let of =
            |id: &[u8]| RequestId::of(&HeaderMap::from_iter([(REQUEST_ID, HeaderValue::from_bytes(id).unwrap())])).0;
        assert_eq!(of(b"my-id"), "my-id");
        for bad in [&b""[..], b"a b", "ü".as_bytes(), &[b'x'; 129]] {
            assert!(of(bad).to_str().unwrap().starts_with("req_"), "{bad:?}");
        }
    }
}
