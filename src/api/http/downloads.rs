//! Files over plain HTTP: what a webhook's `output_file_url` and `error_file_url` name, for receivers without gRPC.

use std::sync::Arc;

use super::told::tell;
use crate::{
    access::Caller,
    domain::File,
    service::{Service, ServiceError},
};
use axum::{
    Extension, Router,
    body::Body,
    extract::{Path, State},
    response::{IntoResponse, Response},
    routing::get,
};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{HeaderMap, HeaderValue, StatusCode, header};

/// The routes. The same callers see the same files as over gRPC; the gate has let them in.
pub(super) fn routes(service: Service) -> Router {
    Router::new()
        .route("/v1/files/{file}/content", get(content))
        .route("/v1/batches/{batch}/results", get(results))
        .route("/v1/batches/{batch}/errors", get(errors))
        .with_state(Arc::new(service))
}

type Of = State<Arc<Service>>;
type By = Extension<Caller>;

async fn content(State(service): Of, Extension(caller): By, Path(file): Path<String>, headers: HeaderMap) -> Response {
    answer(&service, service.file(&caller, &file).await, &headers).await
}

async fn results(State(service): Of, Extension(caller): By, Path(id): Path<String>, headers: HeaderMap) -> Response {
    answer(&service, service.output_file(&caller, &id).await, &headers).await
}

async fn errors(State(service): Of, Extension(caller): By, Path(id): Path<String>, headers: HeaderMap) -> Response {
    answer(&service, service.error_file(&caller, &id).await, &headers).await
}

async fn answer(service: &Service, file: Result<File, ServiceError>, headers: &HeaderMap) -> Response {
    let sent = match file {
        Ok(file) => send(service, &file, headers).await,
        Err(error) => Err(error),
    };
    sent.unwrap_or_else(|error| tell(&error))
}

/// The file, or the part of it that the client asks for. If reading fails on the way the connection breaks, so that
/// nobody takes a piece for the whole.
async fn send(service: &Service, file: &File, headers: &HeaderMap) -> Result<Response, ServiceError> {
    // A file never changes: its id says which version it is.
    let version = format!("\"{}\"", file.id);
    let same = headers.get(header::IF_RANGE).is_none_or(|wanted| wanted.as_bytes() == version.as_bytes());
    let range = headers.get(header::RANGE).filter(|_| same).and_then(Range::parse);
    let (from, to) = match range.map(|range| range.within(file.bytes)) {
        None => (0, file.bytes),
        Some(Some(part)) => part,
        Some(None) => {
            let whole = [(header::CONTENT_RANGE, format!("bytes */{}", file.bytes))];
            let text = format!("the file has {} bytes: none of them are in this range\n", file.bytes);
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, whole, text).into_response());
        }
    };
    let pieces = service.read_file(file, from).await?;
    let body = Body::from_stream(first(pieces, u64::try_from(to - from).unwrap_or(0)));
    let mut response = Response::new(body);
    let fields = response.headers_mut();
    fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
    fields.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    fields.insert(header::CONTENT_LENGTH, (to - from).into());
    // An id has no character that a header can't have.
    if let Ok(version) = version.parse() {
        fields.insert(header::ETAG, version);
    }
    if range.is_some() {
        let range = format!("bytes {from}-{}/{}", to - 1, file.bytes);
        if let Ok(range) = range.parse() {
            fields.insert(header::CONTENT_RANGE, range);
        }
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    Ok(response)
}

/// The first so many bytes of a stream.
fn first(
    pieces: impl Stream<Item = Result<Bytes, ServiceError>> + Send + 'static,
    mut left: u64,
) -> impl Stream<Item = Result<Bytes, ServiceError>> + Send + 'static {
    async_stream::stream! {
        let mut pieces = std::pin::pin!(pieces);
        while left > 0 && let Some(piece) = pieces.next().await {
            yield piece.map(|mut piece| {
                piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                left -= piece.len() as u64;
                piece
            });
        }
    }
}

/// A part of a file that a client asks for (RFC 9110, 14.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Range {
    /// From this byte to the end.
    From(i64),
    /// From this byte to that one, both included.
    Between(i64, i64),
    /// So many bytes at the end.
    Last(i64),
}

impl Range {
    /// Several ranges, and what is not a range of bytes, may be ignored (RFC 9110, 14.2), and are.
    fn parse(value: &HeaderValue) -> Option<Self> {
        let number = |text: &str| {
            let good = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            good.then(|| text.parse().unwrap_or(i64::MAX))
        };
        match value.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')? {
            ("", last) => number(last).map(Self::Last),
            (from, "") => number(from).map(Self::From),
            (from, to) => match (number(from)?, number(to)?) {
                (from, to) if from <= to => Some(Self::Between(from, to)),
                _ => None,
            },
        }
    }

    /// From which byte, and before which. None: the file has no such bytes.
    fn within(self, bytes: i64) -> Option<(i64, i64)> {
        let (from, to) = match self {
            Self::From(from) => (from, bytes),
            Self::Between(from, to) => (from, to.saturating_add(1).min(bytes)),
            Self::Last(last) => ((bytes - last).max(0), bytes),
        };
        (from < to).then_some((from, to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &'static str) -> Option<Range> {
        Range::parse(&HeaderValue::from_static(text))
    }

    #[test]
    fn ranges_are_read_as_http_writes_them() {
        assert_eq!(range("bytes=0-"), Some(Range::From(0)));
        assert_eq!(range("bytes=99999999999999999999-"), Some(Range::From(i64::MAX)));
        assert_eq!(range("bytes=0-3"), Some(Range::Between(0, 3)));
        assert_eq!(range("bytes=5-5"), Some(Range::Between(5, 5)));
        assert_eq!(range("bytes=-5"), Some(Range::Last(5)));
        for other in
            ["bytes=5-2", "bytes=1-,5-", "bytes=0-0,5-5", "bytes=+1-", "bytes= 1-", "lines=1-", "", "bytes=-", "a=b"]
        {
            assert_eq!(range(other), None, "{other}");
        }
    }

    #[test]
    fn a_range_lies_within_the_file() {
        let within = |text, bytes| range(text).unwrap().within(bytes);
        assert_eq!(within("bytes=4-", 10), Some((4, 10)));
        assert_eq!(within("bytes=0-3", 10), Some((0, 4)));
        assert_eq!(within("bytes=8-99999999999999999999", 10), Some((8, 10)));
        assert_eq!(within("bytes=-4", 10), Some((6, 10)));
        assert_eq!(within("bytes=-40", 10), Some((0, 10)));
        for beyond in ["bytes=10-", "bytes=10-12", "bytes=-0"] {
            assert_eq!(within(beyond, 10), None, "{beyond}");
        }
        assert_eq!(within("bytes=0-", 0), None);
    }
}
