//! Files over plain HTTP: what a webhook's `output_file_url` and `error_file_url` name, for receivers without gRPC.

use std::sync::Arc;

use axum::{
    Router,
    body::Body,
    extract::{Path, State},
    response::{IntoResponse, Response},
    routing::get,
};
use futures::StreamExt;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tonic::{Code, Status};

use super::{
    auth::{Caller, Tokens},
    service::Api,
    status::error,
    validate,
};
use crate::{domain::FileId, pb};

struct Downloads {
    api: Api,
    tokens: Option<Tokens>,
}

/// The routes. The same callers see the same files as over gRPC.
pub(super) fn routes(api: Api, tokens: Option<Tokens>) -> Router {
    Router::new()
        .route("/v1/files/{file}/content", get(content))
        .route("/v1/batches/{batch}/results", get(results))
        .route("/v1/batches/{batch}/errors", get(errors))
        .with_state(Arc::new(Downloads { api, tokens }))
}

/// Whoever calls over plain HTTP.
///
/// # Errors
/// `UNAUTHENTICATED`, which [`tell`] tells them.
pub(super) fn caller(tokens: Option<&Tokens>, headers: &HeaderMap) -> Result<Caller, Status> {
    tokens.map_or_else(|| Ok(Caller::anonymous()), |tokens| tokens.authenticate(headers))
}

async fn content(State(of): State<Arc<Downloads>>, Path(file): Path<String>, headers: HeaderMap) -> Response {
    of.answer(&headers, async |caller| {
        let id = validate::file_id(&file)?;
        of.send(caller, &id, &headers).await
    })
    .await
}

async fn results(State(of): State<Arc<Downloads>>, Path(batch): Path<String>, headers: HeaderMap) -> Response {
    of.answer(&headers, async |caller| {
        let batch = of.api.find(caller, &validate::batch_id(&batch)?).await?;
        let file = batch.output_file_id.ok_or_else(|| no_file_yet("OUTPUT_FILE_NOT_FOUND", "output"))?;
        of.send(caller, &file, &headers).await
    })
    .await
}

async fn errors(State(of): State<Arc<Downloads>>, Path(batch): Path<String>, headers: HeaderMap) -> Response {
    of.answer(&headers, async |caller| {
        let batch = of.api.find(caller, &validate::batch_id(&batch)?).await?;
        let file = batch.error_file_id.ok_or_else(|| no_file_yet("ERROR_FILE_NOT_FOUND", "error"))?;
        of.send(caller, &file, &headers).await
    })
    .await
}

impl Downloads {
    async fn answer(
        &self,
        headers: &HeaderMap,
        act: impl AsyncFnOnce(&Caller) -> Result<Response, Status>,
    ) -> Response {
        let allowed = caller(self.tokens.as_ref(), headers)
            .and_then(|caller| self.api.limits.request(&caller.owner).map(|()| caller));
        let answer = match allowed {
            Ok(caller) => act(&caller).await,
            Err(refused) => Err(refused),
        };
        answer.unwrap_or_else(|status| tell(&status))
    }

    /// The file, or its end from where the client asks for it. If reading fails on the way the connection breaks, so that
    /// nobody takes a piece for the whole.
    async fn send(&self, caller: &Caller, id: &FileId, headers: &HeaderMap) -> Result<Response, Status> {
        let file = self.api.find_file(caller, id).await?;
        let from = headers.get(header::RANGE).and_then(range_from);
        let request = pb::DownloadFileRequest { file_id: id.as_str().to_owned(), offset: from.unwrap_or(0) };
        let unsatisfiable = from.is_some_and(|from| from >= file.bytes);
        if unsatisfiable {
            let whole = [(header::CONTENT_RANGE, format!("bytes */{}", file.bytes))];
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, whole).into_response());
        }
        let chunks = self.api.download(caller, &request).await?;
        let body = Body::from_stream(chunks.map(|chunk| chunk.map(|chunk| chunk.data)));
        let mut response = Response::new(body);
        let fields = response.headers_mut();
        fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/jsonl"));
        fields.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
        fields.insert(header::CONTENT_LENGTH, (file.bytes - request.offset).into());
        if let Some(from) = from {
            let range = format!("bytes {from}-{}/{}", file.bytes - 1, file.bytes);
            fields.insert(header::CONTENT_RANGE, range.parse().map_err(|_| Status::internal("a range"))?);
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        }
        Ok(response)
    }
}

/// Where `bytes=N-` begins: what a client asks for that goes on where it was cut off. Any other form may be ignored
/// (RFC 9110, 14.2), and is.
fn range_from(value: &HeaderValue) -> Option<i64> {
    let digits = value.to_str().ok()?.strip_prefix("bytes=")?.strip_suffix('-')?;
    let number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    number.then(|| digits.parse().unwrap_or(i64::MAX))
}

fn no_file_yet(reason: &'static str, which: &str) -> Status {
    error(Code::NotFound, reason, format!("the batch has no {which} file, or not yet"))
}

/// A status in HTTP's words.
pub(super) fn tell(status: &Status) -> Response {
    let code = match status.code() {
        Code::InvalidArgument => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let mut response = (code, format!("{}\n", status.message())).into_response();
    if code == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_go_on_where_a_client_was_cut_off() {
        let from = |text: &'static str| range_from(&HeaderValue::from_static(text));
        assert_eq!(from("bytes=0-"), Some(0));
        assert_eq!(from("bytes=1048576-"), Some(1_048_576));
        assert_eq!(from("bytes=99999999999999999999-"), Some(i64::MAX));
        for other in ["bytes=-5", "bytes=1-2", "bytes=1-,5-", "bytes=+1-", "bytes= 1-", "lines=1-", "", "bytes=-"] {
            assert_eq!(from(other), None, "{other}");
        }
    }
}
