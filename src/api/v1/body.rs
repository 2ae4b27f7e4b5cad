//! Request bodies: whole and bounded, or left to be read on after an early answer.

use std::{collections::BTreeMap, time::Duration};

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, stream::BoxStream};
use http::{HeaderMap, StatusCode, header};
use serde_json::{Map, Value, value::RawValue};
use tokio::time::{Instant, timeout_at};

use super::problem::Problem;
use crate::{
    access::LEAST,
    service::{ServiceError, not_json},
};

/// The most bytes of a JSON body that is no live call.
pub(in crate::api) const SMALL: usize = 64 * 1024;
/// The most bytes of a live call's body: as large as vLLM takes prompts with pictures in them.
pub(in crate::api) const LARGE: usize = 32 * 1024 * 1024;
/// How long a body may take to come, at the least rate; and at any rate.
const GRACE: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(120);
/// How much is read on after an early answer, and for how long.
const DRAIN_BYTES: u64 = 256 * 1024 * 1024;
const DRAIN: Duration = Duration::from_secs(60);

/// The whole body, of at most so many bytes.
///
/// # Errors
/// [`Problem`].
pub(in crate::api) async fn whole(headers: &HeaderMap, body: Body, most: usize) -> Result<Bytes, Problem> {
    counted(headers, body, most, |_| Ok(())).await
}

/// The same for a body whose bytes count against a budget: `hold` is given how many there are so far, which is at once as
/// many as are announced, and refuses what is too much.
///
/// # Errors
/// [`Problem`].
pub(in crate::api) async fn counted(
    headers: &HeaderMap,
    body: Body,
    most: usize,
    mut hold: impl FnMut(u64) -> Result<(), ServiceError>,
) -> Result<Bytes, Problem> {
    plain(headers)?;
    let too_large = || {
        let message = format!("the request body is larger than {most} bytes");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message)
    };
    if length(headers).is_some_and(|length| length > most as u64) {
        drain(headers, body.into_data_stream());
        return Err(too_large());
    }
    if let Err(refused) = hold(length(headers).unwrap_or(0)) {
        drain(headers, body.into_data_stream());
        return Err(refused.into());
    }
    let began = Instant::now();
    let mut pieces = body.into_data_stream();
    let (mut first, mut all) = (Bytes::new(), BytesMut::new());
    loop {
        let came = (first.len() + all.len()) as u64;
        let until = began + (GRACE + Duration::from_secs(came / LEAST)).min(LONGEST);
        let Ok(piece) = timeout_at(until, pieces.next()).await else {
            let message = "the request body did not come in time: within 10 s, or at 1 KiB/s, and within 2 min";
            return Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "request_too_slow", message));
        };
        let piece = match piece {
            None => break,
            Some(Err(_)) => return Err(broken_off()),
            Some(Ok(piece)) => piece,
        };
        if came as usize + piece.len() > most {
            drain(headers, pieces);
            return Err(too_large());
        }
        if let Err(refused) = hold(came + piece.len() as u64) {
            drain(headers, pieces);
            return Err(refused.into());
        }
        // Most bodies come in one piece, which is not copied.
        match (first.is_empty(), all.is_empty()) {
            (true, true) => first = piece,
            (false, true) => {
                all.extend_from_slice(&std::mem::take(&mut first));
                all.extend_from_slice(&piece);
            }
            (_, false) => all.extend_from_slice(&piece),
        }
    }
    Ok(if all.is_empty() { first } else { all.freeze() })
}

/// The body as a JSON object.
///
/// # Errors
/// [`Problem`].
pub(in crate::api) async fn json(headers: &HeaderMap, body: Body) -> Result<Map<String, Value>, Problem> {
    json_of(headers, body, SMALL).await
}

/// The body of at most so many bytes as a JSON object.
///
/// # Errors
/// [`Problem`].
pub(in crate::api) async fn json_of(
    headers: &HeaderMap,
    body: Body,
    most: usize,
) -> Result<Map<String, Value>, Problem> {
    let bytes = whole(headers, body, most).await?;
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err(no_object()),
        Err(error) => Err(no_json(&bytes, &error)),
    }
}

/// The body of at most so many bytes as a JSON object, and the text of one field, which is left as it came. What is beside
/// that field is small.
///
/// # Errors
/// [`Problem`].
pub(in crate::api) async fn json_and(
    headers: &HeaderMap,
    body: Body,
    most: usize,
    field: &str,
) -> Result<(Map<String, Value>, Option<Box<RawValue>>), Problem> {
    let bytes = whole(headers, body, most).await?;
    let mut fields: BTreeMap<String, &RawValue> = serde_json::from_slice(&bytes)
        .map_err(|error| if error.is_data() { no_object() } else { no_json(&bytes, &error) })?;
    let one = fields.remove(field).filter(|one| one.get() != "null").map(ToOwned::to_owned);
    if fields.values().map(|value| value.get().len()).sum::<usize>() > SMALL {
        let message = format!("the fields beside '{field}' are larger than {SMALL} bytes");
        return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "request_too_large", message));
    }
    let read = |(name, text): (String, &RawValue)| Ok((name, serde_json::from_str(text.get())?));
    let object = fields.into_iter().map(read).collect::<Result<_, _>>().map_err(|error| no_json(&bytes, &error))?;
    Ok((object, one))
}

fn no_object() -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, "invalid_json", "the request body is not a JSON object")
}

fn no_json(body: &[u8], error: &serde_json::Error) -> Problem {
    let why = not_json(body, error);
    let message = format!("We could not parse the JSON body of your request: {why}");
    Problem::new(StatusCode::BAD_REQUEST, "invalid_json", message)
}

/// A body as it comes.
pub(in crate::api) type Pieces = BoxStream<'static, Result<Bytes, Problem>>;

pub(in crate::api) fn pieces(body: Body) -> Pieces {
    body.into_data_stream().map(|piece| piece.map_err(|_| broken_off())).boxed()
}

/// The connection broke while the body came: nobody reads this.
fn broken_off() -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, "body_broken_off", "the request body broke off before its end")
}

/// Refuses a body that is encoded.
///
/// # Errors
/// [`Problem`].
pub(in crate::api) fn plain(headers: &HeaderMap) -> Result<(), Problem> {
    match headers.get(header::CONTENT_ENCODING) {
        Some(coding) if !coding.as_bytes().eq_ignore_ascii_case(b"identity") => {
            let message = "the request body has a content-encoding: send it without";
            Err(Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_content_encoding", message))
        }
        Some(_) | None => Ok(()),
    }
}

/// The announced length.
pub(in crate::api) fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Reads on, for a client that sends its body before it looks at the answer: a closed connection would hide the answer
/// from it. Whoever waits for `100 Continue` has not begun to send.
pub(in crate::api) fn drain<E>(
    headers: &HeaderMap,
    mut pieces: impl Stream<Item = Result<Bytes, E>> + Unpin + Send + 'static,
) {
    if headers.contains_key(header::EXPECT) || length(headers) == Some(0) {
        return;
    }
    let until = Instant::now() + DRAIN;
    tokio::spawn(async move {
        let mut came = 0;
        while let Ok(Some(Ok(piece))) = timeout_at(until, pieces.next()).await {
            came += piece.len() as u64;
            if came > DRAIN_BYTES {
                return;
            }
        }
    });
}
