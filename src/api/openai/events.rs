//! The events of a batch as server-sent events: what browsers, notebooks and curl can watch.

use axum::{
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde_json::Value;

use super::{By, Id, Of, batches::no_such, list::Query, problem::Problem, shapes};
use crate::progress::{Event, EventKind};

/// What a browser sends when it comes back: the id of the last event that it has seen.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Keeps proxies from holding events back.
const UNBUFFERED: HeaderName = HeaderName::from_static("x-accel-buffering");
/// How long a browser waits before it comes back, in milliseconds.
const BEGIN: &[u8] = b"retry: 1000\n\n";

pub(super) async fn watch(
    State(service): Of,
    By(caller): By,
    Id(id): Id,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let after = match headers.get(LAST_EVENT_ID) {
        Some(value) => Some(value.to_str().unwrap_or("?").to_owned()),
        None => query.get("after_revision"),
    };
    let after = match after.as_deref() {
        None | Some("") => 0,
        Some(text) => text.parse::<i64>().ok().filter(|revision| *revision >= 0).ok_or_else(|| {
            let message = "Last-Event-ID is not a revision: send the id of the last event, or leave the header out";
            Problem::invalid("invalid_value", "Last-Event-ID", message)
        })?,
    };
    let now = service.batch(&caller, &id).await.map_err(|error| no_such(error, &id))?.batch;
    if after > now.revision.0 {
        let message = format!("Last-Event-ID is greater than the newest revision, {}", now.revision);
        return Err(Problem::invalid("invalid_value", "Last-Event-ID", message));
    }
    if after > 0 && now.status.is_terminal() && now.revision.0 == after {
        // Whoever has seen the end need not come back: 204 tells a browser so.
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let events = service.watch_batch(&caller, &id, after, None).await.map_err(|error| no_such(error, &id))?;
    // A stream that fails ends: whoever watches comes back with the id of the last event.
    let events = events.take_while(|event| std::future::ready(event.is_ok())).filter_map(async |event| event.ok());
    let begin = stream::iter([Bytes::from_static(BEGIN)]);
    let body = begin.chain(events.map(|event| text(&event))).map(Ok::<_, std::convert::Infallible>);
    let mut response = Body::from_stream(body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(UNBUFFERED, HeaderValue::from_static("no"));
    Ok(response)
}

/// An event as it is sent. Its id resumes the stream after it.
fn text(of: &Event) -> Bytes {
    let (name, data) = match &of.kind {
        EventKind::StateChanged { batch, progress } => ("batch", shapes::batch(batch, progress.as_deref())),
        EventKind::Progress(progress) => ("progress", shapes::progress(progress)),
        EventKind::Heartbeat => return Bytes::from_static(b": alive\n\n"),
    };
    event(name, of.revision.0, &data)
}

fn event(name: &str, id: i64, data: &Value) -> Bytes {
    // JSON has no line ends outside of its strings' escapes.
    format!("event: {name}\nid: {id}\ndata: {data}\n\n").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_block_whatever_its_texts_hold() {
        let text = event("batch", 7, &serde_json::json!({"a": "line\nend\r"}));
        assert_eq!(text, "event: batch\nid: 7\ndata: {\"a\":\"line\\nend\\r\"}\n\n");
    }
}
