//! The bytes of files: what OpenAI's clients download, and what a webhook's `output_file_url` and `error_file_url` name.

use axum::{
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::{Stream, StreamExt, stream::BoxStream};
use http::{HeaderMap, HeaderValue, StatusCode, header};

use super::{By, Id, Of, problem::Problem};
use crate::{
    domain::File,
    service::{Code, Service, ServiceError},
};

/// What OpenAI says that every file is.
const BYTES: HeaderValue = HeaderValue::from_static("application/octet-stream");
const JSONL: HeaderValue = HeaderValue::from_static("application/jsonl");

pub(super) async fn content(
    State(service): Of,
    By(caller): By,
    Id(file): Id,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let file = service.file(&caller, &file).await?;
    let mut response = send(&service, &file, &headers, BYTES).await?;
    // Other names are left out rather than cut: the id is in the URL.
    if let Ok(name) = HeaderValue::try_from(format!("attachment; filename=\"{}\"", plain(&file.filename))) {
        response.headers_mut().insert(header::CONTENT_DISPOSITION, name);
    }
    Ok(response)
}

pub(super) async fn results(
    State(service): Of,
    By(caller): By,
    Id(batch): Id,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    send(&service, &service.output_file(&caller, &batch).await?, &headers, JSONL).await
}

pub(super) async fn errors(
    State(service): Of,
    By(caller): By,
    Id(batch): Id,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    send(&service, &service.error_file(&caller, &batch).await?, &headers, JSONL).await
}

/// A file's name as it may stand in quotes in a header.
fn plain(name: &str) -> String {
    name.chars()
        .map(|letter| if matches!(letter, ' '..='~') && !"\"\\".contains(letter) { letter } else { '_' })
        .collect()
}

/// The file, or the part of it that the client asks for. What can't be read at all is an error, because the head goes out
/// only with the first bytes. If reading fails later the connection breaks, so that nobody takes a piece for the whole.
async fn send(service: &Service, file: &File, headers: &HeaderMap, kind: HeaderValue) -> Result<Response, Problem> {
    // A file never changes: its id says which version it is.
    let version = format!("\"{}\"", file.id);
    let same = headers.get(header::IF_RANGE).is_none_or(|wanted| wanted.as_bytes() == version.as_bytes());
    let range = headers.get(header::RANGE).filter(|_| same).and_then(Range::parse);
    let (from, to) = match range.map(|range| range.within(file.bytes)) {
        None => (0, file.bytes),
        Some(Some(part)) => part,
        Some(None) => {
            let whole = [(header::CONTENT_RANGE, format!("bytes */{}", file.bytes))];
            let text = format!("the file has {} bytes: none of them are in this range", file.bytes);
            let problem = Problem::new(StatusCode::RANGE_NOT_SATISFIABLE, "range_not_satisfiable", text);
            return Ok((whole, problem).into_response());
        }
    };
    let mut pieces = service.read_file(file, from).await?;
    let left = u64::try_from(to - from).unwrap_or(0);
    let begins = match left {
        0 => None,
        _ => Some(beginning(&mut pieces).await?),
    };
    let pieces = futures::stream::iter(begins.map(Ok)).chain(pieces);
    let body = Body::from_stream(first(pieces, left));
    let mut response = Response::new(body);
    let fields = response.headers_mut();
    fields.insert(header::CONTENT_TYPE, kind);
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

/// The first bytes of a stream.
async fn beginning(pieces: &mut BoxStream<'static, Result<Bytes, ServiceError>>) -> Result<Bytes, Problem> {
    loop {
        match pieces.next().await {
            Some(Ok(piece)) if piece.is_empty() => {}
            Some(piece) => return Ok(piece?),
            None => return Err(cut_short().into()),
        }
    }
}

/// The bytes of a file end before its end.
fn cut_short() -> ServiceError {
    ServiceError::new(Code::DataLoss, "DATA_DAMAGED", "the stored file is shorter than it was")
}

/// The first so many bytes of a stream.
fn first(
    pieces: impl Stream<Item = Result<Bytes, ServiceError>> + Send + 'static,
    mut left: u64,
) -> impl Stream<Item = Result<Bytes, ServiceError>> + Send + 'static {
    async_stream::stream! {
        let mut pieces = std::pin::pin!(pieces);
        let mut failed = false;
        while left > 0 && !failed && let Some(piece) = pieces.next().await {
            failed = piece.is_err();
            yield piece.map(|mut piece| {
                piece.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                left -= piece.len() as u64;
                piece
            });
        }
        if left > 0 && !failed {
            yield Err(cut_short());
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
