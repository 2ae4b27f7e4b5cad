//! Calls that a worker answers at once. Bodies and answers pass untouched, streams too.

use axum::{
    Extension,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
    routing::{MethodRouter, post},
};
use bytes::Bytes;
use futures::{Stream, StreamExt, stream::BoxStream};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use super::{
    By, Of, REQUEST_ID, RequestId, body,
    problem::{Dialect, Problem},
    sse::Events,
};
use crate::{
    access::Account,
    api::http::observed::{Keeps, observed},
    domain::Endpoint,
    fleet::Extras,
    service::{
        Service, ServiceError,
        live::{AnswerBody, Answered, NewCall},
    },
};

/// Headers that the worker gets, besides those that begin with [`ANTHROPICS`]. Never the client's token.
const PASSED: [HeaderName; 2] = [header::ACCEPT, HeaderName::from_static("traceparent")];
const ANTHROPICS: &str = "anthropic-";
const UNBUFFERED: HeaderName = HeaderName::from_static("x-accel-buffering");

/// The route of an endpoint, or of a path below it.
pub(super) fn route(endpoint: Endpoint, below: &'static str) -> MethodRouter<std::sync::Arc<Service>> {
    post(async move |service: Of, By(caller): By, Extension(account): Extension<Account>, request: Request| {
        let dialect = Dialect::of(endpoint.path());
        let call = answer(&service, &caller, &account, endpoint, below, request);
        call.await.unwrap_or_else(|problem| problem.respond(dialect))
    })
}

async fn answer(
    State(service): &Of,
    caller: &crate::access::Caller,
    account: &Account,
    endpoint: Endpoint,
    below: &'static str,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let mut admitted = match service.expect_call(account) {
        Ok(admitted) => admitted,
        Err(refused) => {
            body::drain(&parts.headers, body.into_data_stream());
            return Err(refused.into());
        }
    };
    let hold = |bytes| admitted.hold(bytes).map_err(ServiceError::from);
    let body = body::counted(&parts.headers, body, body::LARGE, hold).await?;
    let id = parts.extensions.get::<RequestId>().cloned();
    let headers = passed(&parts.headers, id.map(|RequestId(id)| id));
    let answered = service.call(caller, account, NewCall { admitted, endpoint, below, body, headers }).await?;
    respond(endpoint, answered)
}

/// What the worker gets of a client's headers.
fn passed(of: &HeaderMap, id: Option<HeaderValue>) -> Extras {
    let known = |name: &HeaderName| PASSED.contains(name) || name.as_str().starts_with(ANTHROPICS);
    let mut headers: HeaderMap =
        of.iter().filter(|(name, _)| known(name)).map(|(name, value)| (name.clone(), value.clone())).collect();
    if let Some(id) = id {
        headers.insert(REQUEST_ID, id);
    }
    Extras(headers)
}

fn respond(endpoint: Endpoint, of: Answered) -> Result<Response, Problem> {
    if matches!(of.status, 401 | 403 | 407) {
        // The worker's key is this server's, not the client's.
        let message = "the worker refuses this server's API key: the server's operator must correct --worker-api-key";
        return Err(Problem::new(StatusCode::BAD_GATEWAY, "worker_refused", message));
    }
    let is_events = of.headers.is_events();
    let body = match of.body {
        AnswerBody::Whole(body) => Body::from(body),
        AnswerBody::Passing(pieces) if is_events => Body::from_stream(events(endpoint, pieces)),
        AnswerBody::Passing(pieces) => Body::from_stream(pieces),
    };
    let mut response = observed(body, Keeps { _kept: of.admitted }).into_response();
    *response.status_mut() = StatusCode::from_u16(of.status).unwrap_or(StatusCode::BAD_GATEWAY);
    response.headers_mut().extend(of.headers.0);
    if is_events {
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        response.headers_mut().insert(UNBUFFERED, HeaderValue::from_static("no"));
    }
    Ok(response)
}

/// A stream of events, with an error at its end if the worker breaks off.
fn events(
    endpoint: Endpoint,
    mut pieces: BoxStream<'static, Result<Bytes, ServiceError>>,
) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> + Send + 'static {
    async_stream::stream! {
        let mut events = Events::of(endpoint);
        let mut broke = None;
        while !events.is_done() && broke.is_none() {
            match pieces.next().await {
                Some(Ok(piece)) => {
                    let whole = events.push(&piece);
                    if !whole.is_empty() {
                        yield Ok(whole);
                    }
                }
                Some(Err(error)) => broke = Some(error),
                None => break,
            }
        }
        let (code, message) = match &broke {
            Some(error) => (error.reason.to_ascii_lowercase(), error.message.as_str()),
            None => ("worker_lost".to_owned(), "the worker ended its answer too early"),
        };
        let lost = Problem::new(StatusCode::BAD_GATEWAY, &code, message).object();
        if let Some(end) = events.end(broke.is_some(), &lost) {
            yield Ok(end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worker_gets_no_token() {
        let mut given = HeaderMap::new();
        for name in ["authorization", "x-api-key", "cookie", "accept", "anthropic-version", "host", "accept-encoding"] {
            given.insert(HeaderName::from_static(name), HeaderValue::from_static("x"));
        }
        let Extras(passed) = passed(&given, Some(HeaderValue::from_static("req_1")));
        let mut names: Vec<_> = passed.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["accept", "anthropic-version", "x-request-id"]);
    }
}
