//! Requests in the call that creates their batch: `requests` instead of `input_file_id`.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::{Value, value::RawValue};

use super::problem::Problem;
use crate::{ingest::InlineRequest, service::ServiceError};

/// The field's name.
pub(super) const FIELD: &str = "requests";
/// The most bytes of a call with requests: they have 3 MiB together.
pub(super) const MOST: usize = 4 * 1024 * 1024;

/// Reads the requests. Their bodies stay as they came.
///
/// # Errors
/// [`Problem`].
pub(super) fn requests(of: &RawValue, endpoint: &str) -> Result<Vec<InlineRequest>, Problem> {
    let list: Vec<&RawValue> =
        serde_json::from_str(of.get()).map_err(|_| Problem::kind(FIELD, "an array", &value(of)))?;
    list.into_iter().enumerate().map(|(at, one)| request(at, one, endpoint)).collect()
}

fn request(at: usize, of: &RawValue, endpoint: &str) -> Result<InlineRequest, Problem> {
    let name = |field: &str| format!("{FIELD}[{at}].{field}");
    let fields: BTreeMap<String, &RawValue> = serde_json::from_str(of.get())
        .map_err(|_| Problem::kind(&format!("{FIELD}[{at}]"), "an object", &value(of)))?;
    let text = |field: &str| match fields.get(field).map(|given| value(given)) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(Problem::kind(&name(field), "a string", &other)),
    };
    let custom_id = text("custom_id")?.ok_or_else(|| Problem::missing(&name("custom_id")))?;
    // A line of a file has these, too.
    for (field, expected) in [("method", "POST"), ("url", endpoint)] {
        if let Some(given) = text(field)?.filter(|given| given != expected) {
            return Err(Problem::value(&name(field), &given, &format!("'{expected}'")));
        }
    }
    let body = fields.get("body").filter(|body| body.get() != "null").ok_or_else(|| Problem::missing(&name("body")))?;
    if !body.get().starts_with('{') {
        return Err(Problem::kind(&name("body"), "an object", &value(body)));
    }
    Ok(InlineRequest { custom_id, body: Bytes::copy_from_slice(body.get().as_bytes()) })
}

/// The value, for its kind. What is nested too deeply to be read has the kind of a list.
fn value(of: &RawValue) -> Value {
    serde_json::from_str(of.get()).unwrap_or_else(|_| Value::Array(Vec::new()))
}

/// Why the requests were refused. Bad ones are named by their number, from 1.
pub(super) fn refused(error: ServiceError) -> Problem {
    let is_of_requests = match error.reason {
        "INVALID_FILE" | "FILE_EMPTY" | "FILE_TOO_LARGE" | "FILE_TOO_MANY_LINES" => true,
        _ => error.violations.iter().any(|one| one.field.starts_with("inline_requests")),
    };
    let error = ServiceError {
        message: error.message.replace("inline_requests.requests", FIELD).replace("inline_requests", FIELD),
        ..error
    };
    let problem = Problem::from(error);
    if is_of_requests { problem.on(FIELD) } else { problem }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(list: &str) -> Result<Vec<InlineRequest>, Value> {
        let raw = RawValue::from_string(list.to_owned()).unwrap();
        requests(&raw, "/v1/score").map_err(|problem| problem.object())
    }

    #[test]
    fn bodies_stay_as_they_came() {
        let read = of(r#" [{"body" : {"b":1.0,  "a":[ ]}, "custom_id":"\u00fc", "method":"POST", "url":"/v1/score"}]"#);
        let read = read.unwrap();
        assert_eq!((read[0].custom_id.as_str(), &read[0].body[..]), ("ü", &br#"{"b":1.0,  "a":[ ]}"#[..]));
        assert!(of("[]").unwrap().is_empty());
    }

    #[test]
    fn what_is_wrong_is_named_by_its_place() {
        for (list, param, code) in [
            ("{}", "requests", "invalid_type"),
            ("\"x\"", "requests", "invalid_type"),
            ("[7]", "requests[0]", "invalid_type"),
            (r#"[{"custom_id":"a","body":{}},{"body":{}}]"#, "requests[1].custom_id", "missing_required_parameter"),
            (r#"[{"custom_id":7,"body":{}}]"#, "requests[0].custom_id", "invalid_type"),
            (r#"[{"custom_id":"a"}]"#, "requests[0].body", "missing_required_parameter"),
            (r#"[{"custom_id":"a","body":null}]"#, "requests[0].body", "missing_required_parameter"),
            (r#"[{"custom_id":"a","body":[1]}]"#, "requests[0].body", "invalid_type"),
            (r#"[{"custom_id":"a","url":"/v1/x","body":{}}]"#, "requests[0].url", "invalid_value"),
            (r#"[{"custom_id":"a","method":"GET","body":{}}]"#, "requests[0].method", "invalid_value"),
        ] {
            let error = of(list).map(drop).unwrap_err();
            assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!(code)), "{list}: {error}");
        }
        let deep = format!("[{{\"custom_id\":{}{}, \"body\":{{}}}}]", "[".repeat(10_000), "]".repeat(10_000));
        assert_eq!(of(&deep).map(drop).unwrap_err()["param"], "requests[0].custom_id");
    }
}
