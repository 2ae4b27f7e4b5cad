//! The results of a batch so far, for those who can't wait for its end and poll.

use axum::{
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use bytes::{BufMut, Bytes, BytesMut};
use futures::StreamExt;
use http::{HeaderName, HeaderValue, header};

use super::{By, Id, Of, batches::no_such, list::Query, problem::Problem};

/// Whether more lines will come.
const INCOMPLETE: HeaderName = HeaderName::from_static("x-incomplete");
/// The number of the last line of the answer, from which the next call goes on.
const LAST_LINE: HeaderName = HeaderName::from_static("x-last-line");

pub(super) async fn output(State(service): Of, By(caller): By, Id(id): Id, query: Query) -> Result<Response, Problem> {
    let offset = match query.get("offset") {
        None => 0,
        Some(text) => text.parse::<u64>().map_err(|_| {
            let message = "Invalid 'offset': send the X-Last-Line of the last answer, a number of lines.";
            Problem::invalid("invalid_value", "offset", message)
        })?,
    };
    let found = service.results_so_far(&caller, &id, offset).await.map_err(|error| no_such(error, &id))?;
    let line = |line: Bytes| {
        let mut text = BytesMut::with_capacity(line.len() + 1);
        text.extend_from_slice(&line);
        text.put_u8(b'\n');
        text.freeze()
    };
    let mut response = Body::from_stream(found.lines.map(move |one| one.map(|one| line(one.line)))).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(INCOMPLETE, HeaderValue::from_static(if found.ended { "false" } else { "true" }));
    headers.insert(LAST_LINE, found.last_line.into());
    Ok(response)
}
