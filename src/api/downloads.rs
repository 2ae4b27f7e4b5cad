//! Files over plain HTTP: what a webhook's `output_file_url` and `error_file_url` name, for receivers without gRPC.

use std::sync::Arc;

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
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{service::Api, status::error, validate};
use crate::{access::Caller, domain::FileId, pb};

/// The routes. The same callers see the same files as over gRPC; the gate has let them in.
pub(super) fn routes(api: Api) -> Router {
    Router::new()
        .route("/v1/files/{file}/content", get(content))
        .route("/v1/batches/{batch}/results", get(results))
        .route("/v1/batches/{batch}/errors", get(errors))
        .with_state(Arc::new(Downloads { api }))
}

struct Downloads {
    api: Api,
}

type Of = State<Arc<Downloads>>;
type By = Extension<Caller>;

async fn content(State(of): Of, Extension(caller): By, Path(file): Path<String>, headers: HeaderMap) -> Response {
    let answer = async {
        let id = validate::file_id(&file)?;
        of.send(&caller, &id, &headers).await
    };
    answer.await.unwrap_or_else(|status| tell(&status))
}

async fn results(State(of): Of, Extension(caller): By, Path(batch): Path<String>, headers: HeaderMap) -> Response {
    let answer = async {
        let batch = of.api.find(&caller, &validate::batch_id(&batch)?).await?;
        let file = batch.output_file_id.ok_or_else(|| no_file_yet("OUTPUT_FILE_NOT_FOUND", "output"))?;
        of.send(&caller, &file, &headers).await
    };
    answer.await.unwrap_or_else(|status| tell(&status))
}

async fn errors(State(of): Of, Extension(caller): By, Path(batch): Path<String>, headers: HeaderMap) -> Response {
    let answer = async {
        let batch = of.api.find(&caller, &validate::batch_id(&batch)?).await?;
        let file = batch.error_file_id.ok_or_else(|| no_file_yet("ERROR_FILE_NOT_FOUND", "error"))?;
        of.send(&caller, &file, &headers).await
    };
    answer.await.unwrap_or_else(|status| tell(&status))
}

impl Downloads {
    /// The file, or the part of it that the client asks for. If reading fails on the way the connection breaks, so that
    /// nobody takes a piece for the whole.
    async fn send(&self, caller: &Caller, id: &FileId, headers: &HeaderMap) -> Result<Response, Status> {
        let file = self.api.find_file(caller, id).await?;
        // A file never changes: its id says which version it is.
        let version = format!("\"{id}\"");
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
        let request = pb::DownloadFileRequest { file_id: id.as_str().to_owned(), offset: from };
        let chunks = self.api.download(caller, &request).await?.map(|chunk| chunk.map(|chunk| chunk.data));
        let body = Body::from_stream(first(chunks, u64::try_from(to - from).unwrap_or(0)));
        let mut response = Response::new(body);
        let fields = response.headers_mut();
        fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
        fields.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        fields.insert(header::CONTENT_LENGTH, (to - from).into());
        fields.insert(header::ETAG, version.parse().map_err(|_| Status::internal("a version"))?);
        if range.is_some() {
            let range = format!("bytes {from}-{}/{}", to - 1, file.bytes);
            fields.insert(header::CONTENT_RANGE, range.parse().map_err(|_| Status::internal("a range"))?);
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        }
        Ok(response)
    }
}

/// The first so many bytes of a stream.
fn first(
    pieces: impl Stream<Item = Result<Bytes, Status>> + Send + 'static,
    mut left: u64,
) -> impl Stream<Item = Result<Bytes, Status>> + Send + 'static {
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

fn no_file_yet(reason: &'static str, which: &str) -> Status {
    error(Code::NotFound, reason, format!("the batch has no {which} file, or not yet"))
}

/// A status in HTTP's words.
pub(super) fn tell(status: &Status) -> Response {
    let code = match status.code() {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        // What is asked for was there, and is not any more.
        Code::FailedPrecondition => StatusCode::GONE,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Cancelled | Code::Unknown | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let mut response = (code, format!("{}\n", status.message())).into_response();
    if code == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if let Some(wait) = status.get_details_retry_info().and_then(|info| info.retry_delay) {
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
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

    #[test]
    fn every_status_is_told_in_https_words() {
        use super::super::status::{retry, shutting_down};
        let told = |status: &Status| tell(status).status().as_u16();
        assert_eq!(told(&error(Code::FailedPrecondition, "RESULTS_DELETED", "x")), 410);
        assert_eq!(told(&error(Code::DataLoss, "OBJECT_MISSING", "x")), 500);
        assert_eq!(told(&error(Code::DeadlineExceeded, "X", "x")), 504);
        assert_eq!((told(&shutting_down()), told(&Status::not_found("x"))), (503, 404));
        let slow = retry(Code::ResourceExhausted, "X", "x", std::time::Duration::from_millis(1_200));
        assert_eq!(tell(&slow).headers()[header::RETRY_AFTER], "2");
    }
}
