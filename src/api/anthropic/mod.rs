//! Anthropic's Message Batches: a second dialect of the batches whose endpoint is `/v1/messages`. What one dialect makes,
//! the others see, watch and cancel.
//!
//! - `create`: new batches, whose requests `split` finds in the body while it comes. `batch`, `result`: how batches and
//!   results are written.

mod batch;
mod create;
mod result;
mod split;

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, stream::BoxStream};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use super::v1::{
    problem::{Dialect, Problem},
    query::Query,
    request::{By, Id, Of},
};
use crate::{
    results::ResultLine,
    service::{Beside, Service, ServiceError, short},
};

/// The default and the most of batches in a list.
const LIMIT: (u64, u64) = (20, 1_000);
/// Bytes of results that are sent together.
const TOGETHER: usize = 64 * 1024;
const JSONL: HeaderValue = HeaderValue::from_static("application/x-jsonl");

/// The routes. The gate has let their callers in.
pub(super) fn routes(service: Service) -> Router {
    Router::new()
        .route("/v1/messages/batches", get(list).post(create::create))
        .route("/v1/messages/batches/{batch}", get(show).delete(delete))
        .route("/v1/messages/batches/{batch}/cancel", post(cancel))
        .route("/v1/messages/batches/{batch}/results", get(results))
        .with_state(Arc::new(service))
}

type Answer = Result<Response, Refused>;

/// A problem in this dialect.
struct Refused(Problem);

impl<T: Into<Problem>> From<T> for Refused {
    fn from(problem: T) -> Self {
        Self(problem.into())
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        self.0.respond(Dialect::Anthropic)
    }
}

async fn list(State(service): Of, By(caller): By, query: Query) -> Answer {
    let limit = query.limit(LIMIT.0, LIMIT.1)?;
    let of = |name| query.id(name, batch::PREFIX).map(|id| id.and_then(|id| batch::batch_of(&id)));
    let beside = match (of("after_id")?, of("before_id")?) {
        (None, None) => Beside::Newest,
        (Some(after), None) => Beside::After(after),
        (None, Some(before)) => Beside::Before(before),
        (Some(_), Some(_)) => {
            let message = "after_id and before_id: expected only one of them";
            return Err(Problem::invalid("invalid_value", "before_id", message).into());
        }
    };
    let (found, has_more) = service.message_batches(&caller, beside, limit).await?;
    let data: Vec<Value> = found.iter().map(|of| batch::batch(&of.batch, &of.progress)).collect();
    let id = |item: Option<&Value>| item.map(|item| item["id"].clone());
    let (first, last) = (id(data.first()), id(data.last()));
    Ok(axum::Json(json!({"data": data, "has_more": has_more, "first_id": first, "last_id": last})).into_response())
}

async fn show(State(service): Of, By(caller): By, Id(id): Id) -> Answer {
    let found = service.message_batch(&caller, &known(&id)?).await;
    Ok(batch::shown(&found.map_err(|error| no_such(error, &id))?))
}

async fn cancel(State(service): Of, By(caller): By, Id(id): Id) -> Answer {
    let cancelled = service.cancel_message_batch(&caller, &known(&id)?).await;
    Ok(batch::shown(&cancelled.map_err(|error| no_such(error, &id))?))
}

async fn delete(State(service): Of, By(caller): By, Id(id): Id) -> Answer {
    service.delete_message_batch(&caller, &known(&id)?).await.map_err(|error| no_such(error, &id))?;
    Ok(axum::Json(json!({"id": id, "type": "message_batch_deleted"})).into_response())
}

async fn results(State(service): Of, By(caller): By, Id(id): Id) -> Answer {
    let lines = service.message_results(&caller, &known(&id)?).await.map_err(|error| no_such(error, &id))?;
    let mut response = Body::from_stream(together(lines)).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, JSONL);
    Ok(response)
}

/// The results as they are sent. If reading fails on the way the connection breaks, so that nobody takes a piece for the
/// whole.
fn together(
    mut lines: BoxStream<'static, Result<ResultLine, ServiceError>>,
) -> impl Stream<Item = Result<Bytes, ServiceError>> + Send + 'static {
    async_stream::try_stream! {
        let mut ready = BytesMut::new();
        while let Some(line) = lines.next().await {
            let line = result::result(&line?).map_err(|_| ServiceError::unreadable_result())?;
            ready.extend_from_slice(&line);
            if ready.len() >= TOGETHER {
                yield ready.split().freeze();
            }
        }
        if !ready.is_empty() {
            yield ready.freeze();
        }
    }
}

/// The batch that an id of this dialect may name.
fn known(id: &str) -> Result<String, Problem> {
    batch::batch_of(id).ok_or_else(|| unknown(id))
}

fn unknown(id: &str) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "not_found", format!("No message batch found with id '{}'.", short(id)))
}

/// An unknown batch, and one in the wrong state, in this dialect's words.
fn no_such(error: ServiceError, id: &str) -> Problem {
    match error.reason {
        "BATCH_NOT_FOUND" => unknown(id),
        "BATCH_TERMINAL" => Problem::from(error).saying("The message batch has ended and can't be canceled any more."),
        "BATCH_NOT_ENDED" => {
            Problem::from(error).saying("The message batch has not ended: cancel it, or wait until it has ended.")
        }
        _ => error.into(),
    }
}
