//! Results as Anthropic writes them, from the lines of the output and the error file.

use bytes::Bytes;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

use crate::{api::v1::problem::anthropic_kind, domain::lifecycle::Ending, results::ResultLine};

/// A line of a result file.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    custom_id: &'a RawValue,
    #[serde(borrow)]
    response: Option<Response<'a>>,
    error: Option<Error>,
}

#[derive(Deserialize)]
struct Response<'a> {
    status_code: u16,
    request_id: Option<String>,
    #[serde(borrow)]
    body: &'a RawValue,
}

#[derive(Deserialize)]
struct Error {
    code: String,
    message: String,
}

/// A result, with its line feed. The message of one that succeeded keeps its bytes.
///
/// # Errors
/// The line is none of a result file.
pub(super) fn result(of: &ResultLine) -> Result<Bytes, serde_json::Error> {
    let line: Line<'_> = serde_json::from_slice(&of.line)?;
    let id = line.custom_id.get();
    let result = match (&line.response, &line.error) {
        (Some(response), _) if of.succeeded => {
            let message = response.body.get();
            return Ok(
                format!("{{\"custom_id\":{id},\"result\":{{\"type\":\"succeeded\",\"message\":{message}}}}}\n").into()
            );
        }
        (None, Some(error)) => match Ending::from_error_code(&error.code) {
            Some(Ending::Cancelled) => json!({"type": "canceled"}),
            Some(Ending::Expired) => json!({"type": "expired"}),
            None => {
                let kind = if error.code == "request_timeout" { "timeout_error" } else { "api_error" };
                errored(kind, &error.message, None)
            }
        },
        // A success that is no answer.
        (Some(response), Some(error)) => errored("api_error", &error.message, response.request_id.as_deref()),
        (Some(response), None) => {
            let (kind, message) = said(response);
            errored(&kind, &message, response.request_id.as_deref())
        }
        (None, None) => errored("api_error", "the request has no answer", None),
    };
    Ok(format!("{{\"custom_id\":{id},\"result\":{result}}}\n").into())
}

fn errored(kind: &str, message: &str, request_id: Option<&str>) -> Value {
    let error = json!({"type": kind, "message": message});
    json!({"type": "errored", "error": {"type": "error", "error": error, "request_id": request_id}})
}

/// What a worker says is wrong: in Anthropic's words if it speaks them, else by its status and its message.
fn said(response: &Response<'_>) -> (String, String) {
    let body: Value = serde_json::from_str(response.body.get()).unwrap_or_default();
    let (error, text) = (&body["error"], |value: &Value| value.as_str().map(str::to_owned));
    let is_anthropics = body["type"] == "error";
    let by_status = || anthropic_kind(StatusCode::from_u16(response.status_code).unwrap_or_default()).to_owned();
    let kind = text(&error["type"]).filter(|_| is_anthropics).unwrap_or_else(by_status);
    let message = [&error["message"], error, &body["message"], &body["detail"], &body].into_iter().find_map(text);
    (kind, message.unwrap_or_else(|| format!("the worker answered {}: {body}", response.status_code)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::BatchId;

    fn of(line: &str, succeeded: bool) -> Value {
        let cursor = crate::results::Cursor::parse(
            &format!("r1.{:08x}.1.1", crc32c::crc32c(b"batch_x")),
            &BatchId::from_text("batch_x"),
        );
        let line = ResultLine {
            custom_id: String::new(),
            cursor: cursor.unwrap(),
            line_number: 1,
            succeeded,
            line: Bytes::copy_from_slice(line.as_bytes()),
        };
        let bytes = result(&line).unwrap();
        assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), 1);
        serde_json::from_slice(&bytes).unwrap()
    }

    #[test]
    fn each_kind_of_line_is_the_result_that_it_means() {
        let answer = |status: u16, body: &str, error: &str| {
            let response = format!(r#"{{"status_code":{status},"request_id":"r","body":{body}}}"#);
            format!(r#"{{"id":"x","custom_id":"\u0061","response":{response},"error":{error}}}"#)
        };
        let good = of(&answer(200, r#"{"type":"message","n":1.0}"#, "null"), true);
        let message = json!({"type": "message", "n": 1.0});
        assert_eq!(good, json!({"custom_id": "a", "result": {"type": "succeeded", "message": message}}));
        let none = |code: &str| {
            let error = format!(r#"{{"code":"{code}","message":"why"}}"#);
            of(&format!(r#"{{"id":"x","custom_id":"a","response":null,"error":{error}}}"#), false)["result"].clone()
        };
        assert_eq!(
            (none("batch_cancelled"), none("batch_expired")),
            (json!({"type": "canceled"}), json!({"type": "expired"}))
        );
        let kind = |result: &Value| {
            assert_eq!((&result["type"], &result["error"]["type"]), (&json!("errored"), &json!("error")));
            let error = &result["error"]["error"];
            (error["type"].as_str().unwrap().to_owned(), error["message"].as_str().unwrap().to_owned())
        };
        let pair = |kind: &str, message: &str| (kind.to_owned(), message.to_owned());
        assert_eq!(kind(&none("request_timeout")), pair("timeout_error", "why"));
        assert_eq!(kind(&none("worker_error")), pair("api_error", "why"));
        let said = |status, body: &str, error: &str| kind(&of(&answer(status, body, error), false)["result"]);
        let own = r#"{"type":"error","error":{"type":"overloaded_error","message":"later"}}"#;
        assert_eq!(said(400, own, "null"), pair("overloaded_error", "later"));
        let openais = r#"{"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}"#;
        assert_eq!(said(400, openais, "null"), pair("invalid_request_error", "no"));
        assert_eq!(said(404, r#"{"error":"gone"}"#, "null"), pair("not_found_error", "gone"));
        assert_eq!(said(500, r#""<h1>no</h1>""#, "null"), pair("api_error", "<h1>no</h1>"));
        assert_eq!(said(413, "[]", "null"), pair("request_too_large", "the worker answered 413: []"));
        assert_eq!(said(200, "{}", r#"{"code":"bad_answer","message":"no list"}"#), pair("api_error", "no list"));
    }
}
