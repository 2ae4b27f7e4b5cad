//! Files: upload, list, show, delete.

use axum::{
    Extension,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use http::HeaderMap;
use serde_json::{Value, json};

use super::{
    By, Id, Of,
    body::{Pieces, drain, pieces},
    form::{Field, Form, announced, twice},
    list::{Query, page},
    multipart::Piece,
    problem::Problem,
    shapes,
};
use crate::{
    access::{Account, Caller, Received},
    config::BadFiles,
    domain::File,
    service::{
        Service, Span,
        files::{FileOrder, FileUpload, NewFile},
    },
};

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
    let mut pieces = pieces(body);
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
struct Fields {
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
    /// Both in one, as JSON.
    expires_after: Option<String>,
}

impl Upload<'_> {
    /// Takes the form and makes its file. If that fails, nothing is left of it.
    async fn take(&self, pieces: &mut Pieces) -> Result<File, Problem> {
        let mut form = Form::begin(self.service, self.headers, self.received.clone(), pieces)?;
        if let Some(bytes) = announced(self.headers) {
            self.service.check_upload_size(bytes)?;
        }
        let (mut fields, mut file, mut field, mut is_file) =
            (Fields::default(), None::<FileUpload>, None::<Field>, false);
        while let Some(piece) = form.next(file.as_ref().map(FileUpload::gives_way)).await? {
            match piece {
                Piece::Begin(head) if head.name == "file" => {
                    if file.is_some() {
                        return Err(twice("file"));
                    }
                    if let Some(purpose) = &fields.purpose {
                        check_purpose(purpose)?;
                    }
                    file = Some(self.begin(head.filename.unwrap_or_default()).await?);
                    is_file = true;
                }
                Piece::Begin(head) => field = Some(Field::new(head.name)),
                Piece::Data(data) => match (&mut file, &mut field) {
                    (Some(file), _) if is_file => file.write(data).await?,
                    (_, Some(field)) => field.push(&data)?,
                    (_, None) => {}
                },
                Piece::End => {
                    is_file = false;
                    if let Some(field) = field.take() {
                        fields.set(&field.name, field.text());
                    }
                }
            }
        }
        check_purpose(fields.purpose.as_deref().ok_or_else(|| Problem::missing("purpose"))?)?;
        let mut file = file.ok_or_else(|| Problem::missing("file"))?;
        file.expires_after(fields.expiry()?)?;
        Ok(file.finish().await?)
    }

    async fn begin(&self, filename: String) -> Result<FileUpload, Problem> {
        let request_id = super::idempotency_key(self.headers)?;
        let new = NewFile { filename, request_id, keeps_bad: self.keeps_bad, ..NewFile::default() };
        Ok(self.service.begin_upload(self.caller, self.account, new, self.received.clone()).await?)
    }
}

impl Fields {
    fn set(&mut self, name: &str, text: String) {
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
        let number = seconds.trim().parse::<i128>().map(|number| number.clamp(i64::MIN.into(), i64::MAX.into()));
        let seconds = match number.map(i64::try_from) {
            Ok(Ok(number)) => json!(number),
            _ => json!(seconds),
        };
        super::expiry(&json!({"anchor": self.anchor, "seconds": seconds}), "expires_after")
    }
}

pub(super) fn check_purpose(purpose: &str) -> Result<(), Problem> {
    if purpose == "batch" { Ok(()) } else { Err(Problem::value("purpose", purpose, "'batch'")) }
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
