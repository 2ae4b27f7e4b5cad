//! Batches: create, list, show, cancel, delete.

use std::{collections::BTreeMap, time::Duration};

use axum::{
    Extension,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use http::HeaderMap;
use serde_json::{Map, Value, json, value::RawValue};

use super::{
    By, Id, Of, body, inline,
    json::{given, integer, required, text},
    list::{Query, page},
    problem::Problem,
    shapes,
};
use crate::{
    access::Account,
    domain::Endpoint,
    service::{
        ServiceError, Span,
        batches::{BatchInput, CreateBatch, Shown},
        short,
        webhooks::NewWebhook,
    },
};

/// The default and the most of batches in a list.
const LIMIT: (u64, u64) = (20, 100);
/// What a completion window may be.
const WINDOWS: &str = "'24h', or another time from '1h' to '14d', in s, m, h or d";

pub(super) async fn create(
    State(service): Of,
    By(caller): By,
    Extension(account): Extension<Account>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Problem> {
    let key = super::idempotency_key(&headers)?;
    let (object, requests) = body::json_and(&headers, body, inline::MOST, inline::FIELD).await?;
    let new = new_batch(&object, requests.as_deref(), key)?;
    let made = Box::pin(service.create_batch(&caller, &account, new)).await;
    let made = made.map_err(|error| match requests {
        None => no_file(error, &object),
        Some(_) => inline::refused(error),
    })?;
    Ok(shown(&made))
}

pub(super) async fn list(State(service): Of, By(caller): By, query: Query) -> Result<Response, Problem> {
    let limit = query.limit(LIMIT.0, LIMIT.1)?;
    let after = query.after("batch_")?;
    let (batches, has_more) = service.batches_after(&caller, after, limit).await?;
    let batches: Vec<_> = batches.iter().map(|of| shapes::batch(&of.batch, Some(&of.progress))).collect();
    Ok(page(&batches, has_more))
}

pub(super) async fn show(State(service): Of, By(caller): By, Id(id): Id) -> Result<Response, Problem> {
    Ok(shown(&service.batch(&caller, &id).await.map_err(|error| no_such(error, &id))?))
}

pub(super) async fn cancel(State(service): Of, By(caller): By, Id(id): Id) -> Result<Response, Problem> {
    Ok(shown(&service.cancel_batch(&caller, &id).await.map_err(|error| no_such(error, &id))?))
}

/// Not OpenAI's: a batch that has ended goes with its results.
pub(super) async fn delete(State(service): Of, By(caller): By, Id(id): Id) -> Result<Response, Problem> {
    service.delete_batch(&caller, &id).await.map_err(|error| no_such(error, &id))?;
    Ok(axum::Json(json!({"id": id, "object": "batch", "deleted": true})).into_response())
}

fn shown(of: &Shown) -> Response {
    axum::Json(shapes::batch(&of.batch, Some(&of.progress))).into_response()
}

/// An unknown batch in OpenAI's words.
pub(super) fn no_such(error: ServiceError, id: &str) -> Problem {
    let is_unknown = error.reason == "BATCH_NOT_FOUND";
    let problem = Problem::from(error);
    if is_unknown { problem.saying(format!("No batch found with id '{}'.", short(id))) } else { problem }
}

/// A file that is not there is a wrong field of a new batch.
fn no_file(error: ServiceError, object: &Map<String, Value>) -> Problem {
    if error.reason != "FILE_NOT_FOUND" {
        return error.into();
    }
    let id = short(object.get("input_file_id").and_then(Value::as_str).unwrap_or_default());
    let message = format!("Cannot find file {id}, or organization does not have access to it.");
    Problem::invalid("invalid_request", "input_file_id", message)
}

/// What OpenAI checks first is refused first, one thing at a time.
fn new_batch(of: &Map<String, Value>, requests: Option<&RawValue>, key: String) -> Result<CreateBatch, Problem> {
    let file = match requests {
        None => Some(required(of, "input_file_id")?),
        Some(_) => text(of, "input_file_id")?,
    };
    let endpoint = required(of, "endpoint")?;
    // OpenAI knows no batch without a file, so there is no client that sends these as OpenAI's do.
    let window = match requests {
        None => Some(required(of, "completion_window")?),
        Some(_) => text(of, "completion_window")?,
    };
    if endpoint.parse::<Endpoint>().is_err() {
        let supported = Endpoint::ALL.map(|endpoint| format!("'{endpoint}'")).join(", ");
        return Err(Problem::value("endpoint", endpoint, &supported));
    }
    let input = match (file, requests) {
        (Some(_), Some(_)) => {
            let message = "Mutually exclusive parameters: 'input_file_id' and 'requests'.";
            return Err(Problem::invalid("mutually_exclusive_parameters", inline::FIELD, message));
        }
        (file, None) => file.map(|file| BatchInput::File(file.to_owned())),
        (None, Some(requests)) => Some(BatchInput::Inline(inline::requests(requests, endpoint)?)),
    };
    let window = window
        .map(|text| parse_window(text).ok_or_else(|| Problem::value("completion_window", text, WINDOWS)))
        .transpose()?;
    let metadata = metadata(of.get("metadata"))?;
    let output_expires_after = match given(of, "output_expires_after") {
        None => None,
        Some(value) => super::expiry(value, "output_expires_after")?,
    };
    let request_id = match text(of, "idempotency_key")? {
        Some(text) if !text.is_empty() => text.to_owned(),
        Some(_) | None => key,
    };
    Ok(CreateBatch {
        input,
        endpoint: endpoint.to_owned(),
        completion_window: window.map(Ok),
        priority: integer(of, "priority", "priority")?.unwrap_or_default(),
        metadata,
        request_id,
        webhook: given(of, "webhook").map(webhook).transpose()?,
        webhook_endpoint_id: text(of, "webhook_endpoint_id")?.unwrap_or_default().to_owned(),
        output_expires_after,
    })
}

fn metadata(of: Option<&Value>) -> Result<BTreeMap<String, String>, Problem> {
    let pairs = match of {
        None | Some(Value::Null) => return Ok(BTreeMap::new()),
        Some(Value::Object(pairs)) => pairs,
        Some(other) => return Err(Problem::kind("metadata", "an object", other)),
    };
    let pair = |(name, value): (&String, &Value)| match value {
        Value::String(text) => Ok((name.clone(), text.clone())),
        other => Err(Problem::kind(&format!("metadata.{}", short(name)), "a string", other)),
    };
    pairs.iter().map(pair).collect()
}

fn webhook(of: &Value) -> Result<NewWebhook, Problem> {
    let Value::Object(of) = of else { return Err(Problem::kind("webhook", "an object", of)) };
    let named = |problem: Problem, name: &str| problem.on(&format!("webhook.{name}"));
    let field = |name: &str| text(of, name).map_err(|problem| named(problem, name));
    let events = match given(of, "events") {
        None => Vec::new(),
        Some(Value::Array(events)) => {
            let event = |event: &Value| match event {
                Value::String(event) => Ok(event.clone()),
                other => Err(Problem::kind("webhook.events", "strings", other)),
            };
            events.iter().map(event).collect::<Result<_, _>>()?
        }
        Some(other) => return Err(Problem::kind("webhook.events", "an array", other)),
    };
    let timeout = integer(of, "timeout_seconds", "webhook.timeout_seconds")?
        .map(|seconds| u64::try_from(seconds).map(Duration::from_secs).map_err(|_| crate::service::NotASpan));
    Ok(NewWebhook {
        url: field("url")?.unwrap_or_default().to_owned(),
        secret: field("secret")?.unwrap_or_default().to_owned(),
        max_retries: integer(of, "max_retries", "webhook.max_retries")?.unwrap_or_default(),
        timeout: timeout as Option<Span>,
        events,
    })
}

/// A completion window: a number and its unit. How long it may be is for the service to judge.
fn parse_window(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return None,
    };
    if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some(Duration::from_secs(number.parse::<u64>().ok()?.checked_mul(seconds)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(body: &Value) -> Result<CreateBatch, Value> {
        let Value::Object(object) = body else { panic!("{body}") };
        new_batch(object, None, String::new()).map_err(|problem| problem.object())
    }

    fn good() -> Value {
        json!({"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"})
    }

    #[test]
    fn what_is_missing_or_of_another_type_is_named_as_openai_names_it() {
        for name in ["input_file_id", "endpoint", "completion_window"] {
            let mut body = good();
            body.as_object_mut().unwrap().remove(name);
            let error = of(&body).map(drop).unwrap_err();
            assert_eq!((&error["code"], &error["param"]), (&json!("missing_required_parameter"), &json!(name)));
            assert_eq!(error["message"], format!("Missing required parameter: '{name}'."));
            body[name] = json!(7);
            assert_eq!(of(&body).map(drop).unwrap_err()["code"], "invalid_type", "{name}");
        }
        for (name, value, param, code) in [
            ("endpoint", json!("/v1/x"), "endpoint", "invalid_value"),
            ("completion_window", json!("24 h"), "completion_window", "invalid_value"),
            ("metadata", json!([]), "metadata", "invalid_type"),
            ("metadata", json!({"tags": ["a"]}), "metadata.tags", "invalid_type"),
            ("priority", json!("1"), "priority", "invalid_type"),
            ("priority", json!(1.5), "priority", "invalid_type"),
            ("webhook", json!("http://x"), "webhook", "invalid_type"),
            ("webhook", json!({"url": 1}), "webhook.url", "invalid_type"),
            (
                "output_expires_after",
                json!({"anchor": "x", "seconds": 3_600}),
                "output_expires_after.anchor",
                "invalid_value",
            ),
            (
                "output_expires_after",
                json!({"anchor": "created_at"}),
                "output_expires_after.seconds",
                "missing_required_parameter",
            ),
        ] {
            let mut body = good();
            body[name] = value;
            let error = of(&body).map(drop).unwrap_err();
            assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!(code)), "{body}: {error}");
        }
        let tags = of(&json!({"input_file_id": "f", "endpoint": "/v1/score", "completion_window": "1h",
            "metadata": {"tags": [1]}}))
        .map(drop)
        .unwrap_err();
        let said = "Invalid type for 'metadata.tags': expected a string, but got an array instead.";
        assert_eq!(tags["message"], said);
    }

    #[test]
    fn windows_are_read_in_every_unit() {
        let hours = |hours: u64| Some(Duration::from_secs(hours * 3_600));
        assert_eq!(
            (parse_window("24h"), parse_window("1d"), parse_window("90m")),
            (hours(24), hours(24), Some(Duration::from_secs(5_400)))
        );
        assert_eq!((parse_window("3600s"), parse_window("14d")), (hours(1), hours(336)));
        for bad in ["", "h", "+1h", "1.5h", "h24", "99999999999999999999d", "24H", "1é"] {
            assert_eq!(parse_window(bad), None, "{bad}");
        }
    }

    #[test]
    fn null_is_as_good_as_nothing() {
        let mut body = good();
        for name in ["metadata", "output_expires_after", "priority", "webhook", "idempotency_key"] {
            body[name] = Value::Null;
        }
        let new = of(&body).map_err(|error| error.to_string()).unwrap();
        assert!(new.metadata.is_empty() && new.webhook.is_none() && new.output_expires_after.is_none());
    }
}
