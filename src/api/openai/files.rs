//! Files: upload, list, show, delete.

use axum::{
    Extension,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{HeaderMap, StatusCode, header};
use serde_json::{Value, json};

use super::{
    By, Id, Of,
    body::{broken_off, drain, length, plain},
    list::{Query, page},
    multipart::{Malformed, Multipart, Piece, boundary},
    problem::Problem,
    shapes,
};
use crate::{
    access::{Account, Caller, Received},
    config::BadFiles,
    domain::File,
    service::{
        Service, Span,
        files::{FileOrder, FileUpload, NewFile, Patience},
    },
};

/// The most bytes of a form field that is no file.
const FIELD: usize = 64 * 1024;
/// What a form may add to its file: its other fields and all heads.
const FORM: u64 = 4 * 1024 * 1024;
/// The default and the most of files in a list that OpenAI takes.
const LIMIT: (u64, u64) = (10_000, 10_000);
/// The most files in one answer. A client asks for the next page where `has_more` says so.
const PAGE: u64 = 1_000;

pub(super) async fn upload(
    State(service): Of,
    By(caller): By,
    Extension(account): Extension<Account>,
    Extension(received): Extension<Received>,
    Extension(bad_files): Extension<BadFiles>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let mut pieces = body.into_data_stream().map(|piece| piece.map_err(|_| broken_off())).boxed();
    let keeps_bad = bad_files == BadFiles::FailBatch;
    let headers = &parts.headers;
    let upload = Upload { service: &service, caller: &caller, account: &account, headers, received, keeps_bad };
    let taken = Box::pin(service.in_time(upload.take(&mut pieces))).await;
    // The answer comes at once, whatever is still on its way.
    drain(&parts.headers, pieces);
    Ok(axum::Json(shapes::file(&taken?)).into_response())
}

/// One upload.
struct Upload<'a> {
    service: &'a Service,
    caller: &'a Caller,
    account: &'a Account,
    headers: &'a HeaderMap,
    received: Received,
    keeps_bad: bool,
}

/// The fields beside the file, which come before or after it.
#[derive(Default)]
struct Form {
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
    /// Both in one, as JSON.
    expires_after: Option<String>,
}

/// The field that is being read.
enum Open {
    File,
    Text(String, Vec<u8>),
}

impl Upload<'_> {
    /// Takes the form and makes its file. If that fails, nothing is left of it.
    async fn take(&self, pieces: &mut (impl Stream<Item = Result<Bytes, Problem>> + Unpin)) -> Result<File, Problem> {
        let mut multipart = Multipart::new(&self.boundary()?);
        let mut patience = Patience::new(self.received.clone());
        let (mut form, mut file, mut open) = (Form::default(), None::<FileUpload>, None::<Open>);
        let mut read = Vec::new();
        while !multipart.is_done() {
            let next = match &file {
                Some(file) => tokio::select! {
                    biased;
                    gives_way = file.gives_way() => return Err(gives_way.into()),
                    next = patience.next(|| self.service.is_crowded(), pieces) => next?,
                },
                None => patience.next(|| false, pieces).await?,
            };
            let Some(bytes) = next else { break };
            multipart.push(bytes, &mut read).map_err(malformed)?;
            for piece in std::mem::take(&mut read) {
                match piece {
                    Piece::Begin(head) if head.name == "file" => {
                        if file.is_some() {
                            let message = "the form has two parts named 'file': upload one file at a time";
                            return Err(Problem::invalid("invalid_multipart", "file", message));
                        }
                        if let Some(purpose) = &form.purpose {
                            check_purpose(purpose)?;
                        }
                        file = Some(self.begin(head.filename.unwrap_or_default()).await?);
                        open = Some(Open::File);
                    }
                    Piece::Begin(head) => open = Some(Open::Text(head.name, Vec::new())),
                    Piece::Data(data) => match (&mut open, &mut file) {
                        (Some(Open::File), Some(file)) => file.write(data).await?,
                        (Some(Open::Text(name, text)), _) => {
                            if text.len() + data.len() > FIELD {
                                let message = format!("the form field is longer than {FIELD} bytes");
                                return Err(Problem::invalid("invalid_multipart", name, message));
                            }
                            text.extend_from_slice(&data);
                        }
                        (Some(Open::File) | None, _) => {}
                    },
                    Piece::End => {
                        if let Some(Open::Text(name, text)) = open.take() {
                            form.set(&name, &text);
                        }
                    }
                }
            }
        }
        multipart.finish().map_err(malformed)?;
        check_purpose(form.purpose.as_deref().ok_or_else(|| Problem::missing("purpose"))?)?;
        let mut file = file.ok_or_else(|| Problem::missing("file"))?;
        file.expires_after(form.expiry()?)?;
        Ok(file.finish().await?)
    }

    fn boundary(&self) -> Result<String, Problem> {
        plain(self.headers)?;
        let kind = self.headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let boundary = boundary(kind).ok_or_else(|| {
            let message = "a file is uploaded as multipart/form-data with a boundary, not in another content-type";
            Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_content_type", message)
        })?;
        if let Some(length) = length(self.headers) {
            self.service.check_upload_size(length.saturating_sub(FORM))?;
        }
        Ok(boundary)
    }

    async fn begin(&self, filename: String) -> Result<FileUpload, Problem> {
        let request_id = super::idempotency_key(self.headers)?;
        let new = NewFile { filename, request_id, keeps_bad: self.keeps_bad, ..NewFile::default() };
        Ok(self.service.begin_upload(self.caller, self.account, new, self.received.clone()).await?)
    }
}

impl Form {
    fn set(&mut self, name: &str, text: &[u8]) {
        let text = String::from_utf8_lossy(text).into_owned();
        match name {
            "purpose" => self.purpose = Some(text),
            "expires_after[anchor]" => self.anchor = Some(text),
            "expires_after[seconds]" => self.seconds = Some(text),
            "expires_after" => self.expires_after = Some(text),
            _ => {}
        }
    }

    fn expiry(&self) -> Result<Option<Span>, Problem> {
        if let Some(text) = &self.expires_after {
            let value: Value = serde_json::from_str(text)
                .map_err(|_| Problem::invalid("invalid_value", "expires_after", "expires_after is not JSON"))?;
            return super::expiry(&value, "expires_after");
        }
        let Some(seconds) = &self.seconds else {
            return match self.anchor {
                None => Ok(None),
                Some(_) => Err(Problem::missing("expires_after.seconds")),
            };
        };
        let seconds = seconds.trim().parse::<i64>().map_or_else(|_| json!(seconds), |seconds| json!(seconds));
        super::expiry(&json!({"anchor": self.anchor, "seconds": seconds}), "expires_after")
    }
}

fn check_purpose(purpose: &str) -> Result<(), Problem> {
    if purpose == "batch" { Ok(()) } else { Err(Problem::value("purpose", purpose, "'batch'")) }
}

#[allow(clippy::needless_pass_by_value)] // as map_err gives it
fn malformed(why: Malformed) -> Problem {
    Problem::new(StatusCode::BAD_REQUEST, "invalid_multipart", why.to_string())
}

pub(super) async fn list(State(service): Of, By(caller): By, query: Query) -> Result<Response, Problem> {
    let limit = query.limit(LIMIT.0, LIMIT.1)?.min(PAGE);
    let after = query.after("file-")?;
    let order = match query.get("order").as_deref() {
        None | Some("desc") => FileOrder::Newest,
        Some("asc") => FileOrder::Oldest,
        Some(other) => return Err(Problem::value("order", other, "'asc', 'desc'")),
    };
    let purpose = query.get("purpose").filter(|purpose| !purpose.is_empty());
    let known = purpose.as_deref().is_none_or(|purpose| matches!(purpose, "batch" | "batch_output"));
    let (files, has_more) =
        if known { service.files_after(&caller, purpose, order, after, limit).await? } else { (Vec::new(), false) };
    Ok(page(&files.iter().map(shapes::file).collect::<Vec<_>>(), has_more))
}

pub(super) async fn show(State(service): Of, By(caller): By, Id(id): Id) -> Result<Response, Problem> {
    let found = service.file(&caller, &id).await;
    Ok(axum::Json(shapes::file(&found.map_err(|error| no_such(error, &id))?)).into_response())
}

pub(super) async fn delete(State(service): Of, By(caller): By, Id(id): Id) -> Result<Response, Problem> {
    service.hide_file(&caller, &id).await.map_err(|error| no_such(error, &id))?;
    Ok(axum::Json(json!({"id": id, "object": "file", "deleted": true})).into_response())
}

/// An unknown file in OpenAI's words.
fn no_such(error: crate::service::ServiceError, id: &str) -> Problem {
    let is_unknown = error.reason == "FILE_NOT_FOUND";
    let problem = Problem::from(error);
    if is_unknown { problem.saying(format!("No such File object: {}", crate::service::short(id))) } else { problem }
}
