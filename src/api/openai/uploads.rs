//! Uploads in parts: announce, add a part, complete, cancel.

use axum::{
    Extension,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use http::{HeaderMap, StatusCode};
use serde_json::{Map, Value};

use super::{
    By, Id, Of,
    body::{self, Pieces, drain, pieces},
    files::check_purpose,
    form::{Field, Form, announced, twice},
    json::{given, required, text},
    multipart::Piece,
    problem::Problem,
    shapes,
};
use crate::{
    access::{Account, Caller, Received},
    config::BadFiles,
    domain::{UploadId, UploadPart, upload::PART_BYTES},
    service::{
        Service, ServiceError, short,
        uploads::{AnnouncedUpload, CompleteUpload, PartUpload},
    },
};

/// The most bytes of the list of parts: as many as an upload may have, and room for blanks.
const LIST: usize = 1024 * 1024;

pub(super) async fn create(
    State(service): Of,
    By(caller): By,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let object = body::json(&headers, body).await?;
    let upload = service.announce_upload(&caller, announcement(&object)?).await?;
    Ok(axum::Json(shapes::upload(&upload, None)).into_response())
}

pub(super) async fn add_part(
    State(service): Of,
    By(caller): By,
    Id(id): Id,
    Extension(account): Extension<Account>,
    Extension(received): Extension<Received>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let mut pieces = pieces(body);
    let part =
        Part { service: &service, caller: &caller, account: &account, headers: &parts.headers, id: &id, received };
    let taken = Box::pin(service.in_time(part.take(&mut pieces))).await;
    // The answer comes at once, whatever is still on its way.
    drain(&parts.headers, pieces);
    let (upload, part) = taken?;
    Ok(axum::Json(shapes::upload_part(&upload, &part)).into_response())
}

pub(super) async fn complete(
    State(service): Of,
    By(caller): By,
    Id(id): Id,
    Extension(account): Extension<Account>,
    Extension(bad_files): Extension<BadFiles>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let object = body::json_of(&headers, body, LIST).await?;
    let part_ids = part_ids(&object)?;
    let md5 = text(&object, "md5")?.map(str::to_owned);
    let of = CompleteUpload { part_ids, md5, keeps_bad: bad_files == BadFiles::FailBatch };
    let completed = Box::pin(service.complete_upload(&caller, &account, &id, of)).await;
    let (upload, file) = completed.map_err(|error| no_such(error, &id))?;
    Ok(axum::Json(shapes::upload(&upload, file.as_ref())).into_response())
}

pub(super) async fn cancel(State(service): Of, By(caller): By, Id(id): Id) -> Result<Response, Problem> {
    let upload = service.cancel_upload(&caller, &id).await.map_err(|error| no_such(error, &id))?;
    Ok(axum::Json(shapes::upload(&upload, None)).into_response())
}

/// A part that comes.
struct Part<'a> {
    service: &'a Service,
    caller: &'a Caller,
    account: &'a Account,
    headers: &'a HeaderMap,
    id: &'a str,
    received: Received,
}

impl Part<'_> {
    /// Takes the form and adds the file in it to the upload. If that fails, nothing is left of it.
    async fn take(&self, pieces: &mut Pieces) -> Result<(UploadId, UploadPart), Problem> {
        let mut form = Form::begin(self.service, self.headers, self.received.clone(), pieces)?;
        if announced(self.headers).is_some_and(|bytes| bytes > PART_BYTES) {
            return Err(too_large());
        }
        let (mut part, mut field, mut is_data) = (None::<PartUpload>, None::<Field>, false);
        while let Some(piece) = form.next(part.as_ref().map(PartUpload::gives_way)).await? {
            match piece {
                Piece::Begin(head) if head.name == "data" => {
                    if part.is_some() {
                        return Err(twice("data"));
                    }
                    let begun = self.service.begin_part(self.caller, self.account, self.id, self.received.clone());
                    part = Some(begun.await.map_err(|error| no_such(error, self.id))?);
                    is_data = true;
                }
                Piece::Begin(head) => field = Some(Field::new(head.name)),
                Piece::Data(data) => match (&mut part, &mut field) {
                    (Some(part), _) if is_data => part.write(data).await?,
                    (_, Some(field)) => field.push(&data)?,
                    (_, None) => {}
                },
                Piece::End => (is_data, field) = (false, None),
            }
        }
        let part = part.ok_or_else(|| Problem::missing("data"))?;
        part.finish().await.map_err(|error| no_such(error, self.id))
    }
}

fn too_large() -> Problem {
    let message = format!("a part may have {} MiB: send the file in smaller ones", PART_BYTES / (1024 * 1024));
    Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "part_too_large", message).on("data")
}

/// What is missing is refused first, one thing at a time.
fn announcement(of: &Map<String, Value>) -> Result<AnnouncedUpload, Problem> {
    let bytes = match given(of, "bytes") {
        None => return Err(Problem::missing("bytes")),
        Some(value) => value.as_i64().ok_or_else(|| Problem::kind("bytes", "an integer", value))?,
    };
    let filename = required(of, "filename")?;
    let _kind = required(of, "mime_type")?;
    let purpose = required(of, "purpose")?;
    check_purpose(purpose)?;
    if bytes < 1 {
        let message =
            format!("Invalid 'bytes': integer below minimum value. Expected a value >= 1, but got {bytes} instead.");
        return Err(Problem::invalid("integer_below_min_value", "bytes", message));
    }
    let file_expires_after = match given(of, "expires_after") {
        None => None,
        Some(value) => super::expiry(value, "expires_after")?,
    };
    Ok(AnnouncedUpload { filename: filename.to_owned(), purpose: purpose.to_owned(), bytes, file_expires_after })
}

fn part_ids(of: &Map<String, Value>) -> Result<Vec<String>, Problem> {
    let list = match given(of, "part_ids") {
        None => return Err(Problem::missing("part_ids")),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(Problem::kind("part_ids", "an array", other)),
    };
    let id = |(at, id): (usize, &Value)| match id {
        Value::String(id) => Ok(id.clone()),
        other => Err(Problem::kind(&format!("part_ids[{at}]"), "a string", other)),
    };
    list.iter().enumerate().map(id).collect()
}

/// An unknown upload in the words of an unknown file.
fn no_such(error: ServiceError, id: &str) -> Problem {
    let is_unknown = error.reason == "UPLOAD_NOT_FOUND";
    let problem = Problem::from(error);
    if is_unknown { problem.saying(format!("No such Upload object: {}", short(id))) } else { problem }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(body: &Value) -> Result<AnnouncedUpload, Value> {
        announcement(body.as_object().unwrap()).map_err(|problem| problem.object())
    }

    #[test]
    fn what_is_missing_or_of_another_type_is_named() {
        let good = json!({"bytes": 10, "filename": "a", "mime_type": "text/jsonl", "purpose": "batch"});
        assert!(of(&good).is_ok());
        for name in ["bytes", "filename", "mime_type", "purpose"] {
            let mut body = good.clone();
            body[name] = Value::Null;
            let error = of(&body).map(drop).unwrap_err();
            assert_eq!((&error["code"], &error["param"]), (&json!("missing_required_parameter"), &json!(name)));
            body[name] = json!([]);
            assert_eq!(of(&body).map(drop).unwrap_err()["code"], "invalid_type", "{name}");
        }
        for (name, value, param, code) in [
            ("bytes", json!(0), "bytes", "integer_below_min_value"),
            ("bytes", json!(1.5), "bytes", "invalid_type"),
            ("bytes", json!(u64::MAX), "bytes", "invalid_type"),
            ("purpose", json!("assistants"), "purpose", "invalid_value"),
            ("expires_after", json!(1), "expires_after", "invalid_type"),
        ] {
            let mut body = good.clone();
            body[name] = value;
            let error = of(&body).map(drop).unwrap_err();
            assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!(code)), "{body}");
        }
        let ids = |list: Value| part_ids(json!({"part_ids": list}).as_object().unwrap()).map_err(|p| p.object());
        assert_eq!(ids(json!(["a", "b"])).unwrap(), ["a", "b"]);
        assert_eq!(ids(json!("a")).unwrap_err()["param"], "part_ids");
        assert_eq!(ids(json!(["a", 7])).unwrap_err()["param"], "part_ids[1]");
    }
}
