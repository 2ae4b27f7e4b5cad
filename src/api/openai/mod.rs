//! OpenAI's HTTP API over the same service as gRPC: a file or a batch that one made, the other sees.
//!
//! - `files`, `content`: files and their bytes. `uploads`: uploads in parts. `form` reads a form with a file, `multipart`
//!   its bytes.
//! - `batches`, `events`: batches, and their events for those who watch over HTTP. `inline`: requests in the call that
//!   creates their batch. `output`: its results so far.
//! - `models`: what the workers serve. `live`: calls that a worker answers at once, `sse` their streams.
//! - `shapes`: how files, batches and models are written. `list`: pages. `json`: fields of a JSON body.

mod batches;
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
pub(super) mod shapes;
pub mod sse;
mod uploads;

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Router,
    routing::{get, post},
};
use serde_json::Value;

use super::v1::{
    body,
    problem::{self, Problem},
    request::{By, Id, Of, REQUEST_ID, RequestId, idempotency_key},
};
use crate::{
    config::BadFiles,
    domain::Endpoint,
    service::{NotASpan, Service, Span},
};

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
        Some(seconds) => match json::whole(seconds) {
            Some(seconds) => Ok(Some(u64::try_from(seconds).map(Duration::from_secs).map_err(|_| NotASpan))),
            None => Err(Problem::kind(&name("seconds"), "an integer", seconds)),
        },
    }
}
