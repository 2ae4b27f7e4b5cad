//! What went wrong, as OpenAI's and Anthropic's clients read it: status, type, code and param, and whether to try again.

use std::time::Duration;

use axum::response::{IntoResponse, Response};
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use crate::{
    ingest::LineReport,
    service::{Code, ServiceError, short},
};

/// Whether the SDKs' own retry would help: they retry 408, 409, 429 and 5xx by themselves.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");
/// The longest wait that is asked for: Node's SDK sleeps whatever it is told, Python's ignores more than two minutes.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// OpenAI's type of nearly all errors that a client can mend.
const INVALID: &str = "invalid_request_error";

/// Whose clients call: the paths of both APIs are below `/v1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::api) enum Dialect {
    /// OpenAI's.
    OpenAi,
    /// Anthropic's.
    Anthropic,
}

impl Dialect {
    /// The dialect of a path.
    pub(in crate::api) fn of(path: &str) -> Self {
        match path.strip_prefix("/v1/messages") {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => Self::Anthropic,
            _ => Self::OpenAi,
        }
    }
}

/// An error as it is sent.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::api) struct Problem {
    status: StatusCode,
    kind: &'static str,
    code: Option<String>,
    param: Option<String>,
    message: String,
    retry_after: Option<Duration>,
    /// Trying the same again can't help, although the status says so to the SDKs.
    is_final: bool,
    /// Bad lines of a file, as a batch's `errors` list them.
    errors: Option<Box<Value>>,
}

impl Problem {
    /// A problem with a code of its own.
    pub(in crate::api) fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            kind: if status.is_server_error() { "server_error" } else { INVALID },
            code: Some(code.to_owned()),
            param: None,
            message: message.into(),
            retry_after: None,
            is_final: false,
            errors: None,
        }
    }

    /// A request that can't be right, for what it says in one field.
    pub(in crate::api) fn invalid(code: &str, param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::new(StatusCode::BAD_REQUEST, code, message) }
    }

    /// A field that must be there and is not.
    pub(in crate::api) fn missing(param: &str) -> Self {
        Self::invalid("missing_required_parameter", param, format!("Missing required parameter: '{param}'."))
    }

    /// A field with a value that it can't have. `supported`: what it can have.
    pub(in crate::api) fn value(param: &str, found: &str, supported: &str) -> Self {
        let message = format!("Invalid value: '{}'. Supported values are: {supported}.", short(found));
        Self::invalid("invalid_value", param, message)
    }

    /// A field of another type than it must have.
    pub(in crate::api) fn kind(param: &str, expected: &str, found: &Value) -> Self {
        let found = match found {
            Value::Null => "null",
            Value::Bool(_) => "a boolean",
            Value::Number(number) if number.is_f64() => "a decimal number",
            Value::Number(_) => "an integer",
            Value::String(_) => "a string",
            Value::Array(_) => "an array",
            Value::Object(_) => "an object",
        };
        let message = format!("Invalid type for '{param}': expected {expected}, but got {found} instead.");
        Self::invalid("invalid_type", param, message)
    }

    /// There is no such path.
    pub(in crate::api) fn unknown_url(method: &http::Method, path: &str) -> Self {
        let message = format!("Unknown request URL: {method} {}", short(path));
        Self::new(StatusCode::NOT_FOUND, "unknown_url", message)
    }

    /// The path takes other methods.
    pub(in crate::api) fn method(method: &http::Method, path: &str) -> Self {
        let message = format!("Not allowed to {method} on {}", short(path));
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_supported", message)
    }

    /// The server has met a bug.
    pub(in crate::api) fn internal(message: &str) -> Self {
        Self { is_final: true, ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message) }
    }

    /// This node does not serve the API.
    pub(in crate::api) fn not_an_api_node() -> Self {
        let message = "this node runs without the role api; call one that has it";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_an_api_node", message)
    }

    /// The same with another field.
    pub(in crate::api) fn on(self, param: &str) -> Self {
        Self { param: Some(param.to_owned()), ..self }
    }

    /// The same in other words.
    pub(in crate::api) fn saying(self, message: impl Into<String>) -> Self {
        Self { message: message.into(), ..self }
    }

    /// The error's code and message, for the end of a stream that breaks.
    pub(in crate::api) fn object(&self) -> Value {
        let Self { message, kind, param, code, .. } = self;
        json!({"message": message, "type": kind, "param": param, "code": code})
    }

    /// The whole response.
    pub(in crate::api) fn respond(&self, dialect: Dialect) -> Response {
        let body = match dialect {
            Dialect::OpenAi => {
                let mut error = self.object();
                if let Some(errors) = &self.errors {
                    error["errors"] = Value::clone(errors);
                }
                json!({"error": error})
            }
            Dialect::Anthropic => json!({
                "type": "error",
                "error": {"type": anthropic_kind(self.status), "message": self.message},
            }),
        };
        let status = match dialect {
            Dialect::OpenAi => self.status,
            Dialect::Anthropic => anthropic_status(self.status),
        };
        let mut response = (status, axum::Json(&body)).into_response();
        if dialect == Dialect::Anthropic {
            response.extensions_mut().insert(Unsigned(body));
        }
        let headers = response.headers_mut();
        if self.is_final {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if let Some(wait) = self.retry_after {
            let wait = wait.min(LONGEST_WAIT);
            headers.insert(header::RETRY_AFTER, (wait.as_secs() + u64::from(wait.subsec_nanos() > 0)).into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        self.respond(Dialect::OpenAi)
    }
}

/// An error of Anthropic's that does not name its request yet.
#[derive(Clone)]
struct Unsigned(Value);

/// Writes the id of the request into an error of Anthropic's, as its clients expect it.
pub(in crate::api) fn sign(response: &mut Response, id: &HeaderValue) {
    if let Some(Unsigned(mut error)) = response.extensions_mut().remove() {
        error["request_id"] = String::from_utf8_lossy(id.as_bytes()).into();
        *response.body_mut() = error.to_string().into();
    }
}

/// The same status as Anthropic's API has it: it has no conflicts, and a number of its own for "not now".
fn anthropic_status(of: StatusCode) -> StatusCode {
    match of {
        StatusCode::CONFLICT => StatusCode::BAD_REQUEST,
        StatusCode::GONE => StatusCode::NOT_FOUND,
        StatusCode::SERVICE_UNAVAILABLE => StatusCode::from_u16(529).unwrap_or(of),
        other => other,
    }
}

/// The type of an error with this status, in Anthropic's words.
pub(in crate::api) fn anthropic_kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 | 410 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 | 529 => "overloaded_error",
        504 => "timeout_error",
        500.. => "api_error",
        _ => "invalid_request_error",
    }
}

/// The fields of the service in OpenAI's words.
fn param_of(field: &str) -> String {
    match field {
        "input" => "input_file_id".to_owned(),
        "inline_requests" | "inline_requests.requests" => "requests".to_owned(),
        "page_token" => "after".to_owned(),
        "request_id" | "spec.request_id" => "idempotency_key".to_owned(),
        "after_revision" => "Last-Event-ID".to_owned(),
        "output_expires_after" => "output_expires_after.seconds".to_owned(),
        other => other.strip_prefix("spec.").unwrap_or(other).to_owned(),
    }
}

impl From<ServiceError> for Problem {
    #[allow(clippy::too_many_lines)] // a table
    fn from(error: ServiceError) -> Self {
        let ServiceError { code, reason, message, violations, bad_lines, retry_after, facts } = error;
        let fact = |name: &str| facts.iter().find(|(fact, _)| *fact == name).map(|(_, value)| value.clone());
        let status = |status: StatusCode, code: &str| Self { retry_after, ..Self::new(status, code, message.clone()) };
        let param = violations.first().map(|first| param_of(&first.field));
        let lower = reason.to_ascii_lowercase();
        match reason {
            "INVALID_FILE" => {
                let listed = bad_lines.as_ref().map(|lines| lines.reports.as_slice()).unwrap_or_default();
                let code = listed.first().map_or("invalid_file_format", |first| first.fault.code);
                let errors = bad_lines.as_ref().map(|lines| Box::new(list_of(&lines.reports)));
                let not_jsonl = "Invalid file format for Batch API. Must be .jsonl";
                let message = if listed.is_empty() { format!("{not_jsonl}: {message}") } else { message };
                Self { errors, ..Self::invalid(code, "file", message) }
            }
            "FILE_EMPTY" => {
                let message = format!("Invalid file format for Batch API. Must be .jsonl: {message}");
                Self::invalid("empty_file", "file", message)
            }
            "FILE_TOO_LARGE" => status(StatusCode::PAYLOAD_TOO_LARGE, "file_too_large").on("file"),
            "FILE_TOO_MANY_LINES" => status(StatusCode::PAYLOAD_TOO_LARGE, "too_many_tasks").on("file"),
            "PART_TOO_LARGE" => status(StatusCode::PAYLOAD_TOO_LARGE, "part_too_large").on("data"),
            "UPLOAD_ENDED" => status(StatusCode::BAD_REQUEST, "upload_ended"),
            "UPLOAD_NOT_FOUND" => Self { code: None, ..status(StatusCode::NOT_FOUND, "").on("id") },
            "UPLOAD_IDLE" => status(StatusCode::REQUEST_TIMEOUT, "upload_idle"),
            "TOKEN_MISSING" | "TOKEN_UNKNOWN" => status(StatusCode::UNAUTHORIZED, "invalid_api_key"),
            "ADMIN_ONLY" => status(StatusCode::FORBIDDEN, "insufficient_permissions"),
            "HOST_NOT_ALLOWED" => status(StatusCode::MISDIRECTED_REQUEST, "host_not_allowed"),
            "FILE_NOT_FOUND" | "OUTPUT_FILE_NOT_FOUND" | "ERROR_FILE_NOT_FOUND" => {
                Self { code: None, ..status(StatusCode::NOT_FOUND, "").on("id") }
            }
            "BATCH_NOT_FOUND" => Self { code: None, ..status(StatusCode::NOT_FOUND, "") },
            "BATCH_TERMINAL" => {
                let state = fact("status").unwrap_or_else(|| "ended".into());
                let message = format!("Cannot cancel a batch with status '{state}'.");
                Self { code: None, is_final: true, ..status(StatusCode::CONFLICT, "").saying(message) }
            }
            "REQUEST_ID_REUSED" => {
                let message =
                    "the idempotency key is in conflict: it was used before with other parameters or contents";
                let problem = status(StatusCode::CONFLICT, "idempotency_conflict").on("idempotency_key");
                Self { is_final: true, ..problem.saying(message) }
            }
            "TOO_MANY_REQUESTS" => {
                Self { kind: "requests", ..status(StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded") }
            }
            "TOO_MANY_BYTES" | "TOO_MANY_QUEUED_LINES" => {
                Self { kind: "tokens", is_final: true, ..status(StatusCode::TOO_MANY_REQUESTS, "insufficient_quota") }
            }
            "MODEL_MISSING" => Self::missing("model"),
            "INVALID_TYPE" => Self { param, ..status(StatusCode::BAD_REQUEST, "invalid_type") },
            "BODY_UNREADABLE" => status(StatusCode::BAD_REQUEST, "invalid_json"),
            "MODEL_NOT_FOUND" => status(StatusCode::NOT_FOUND, "model_not_found").on("model"),
            "WORKER_FAILED" => status(StatusCode::BAD_GATEWAY, "worker_failed"),
            "WORKER_TIMEOUT" => Self { is_final: true, ..status(StatusCode::GATEWAY_TIMEOUT, "request_timeout") },
            _ => match code {
                Code::InvalidArgument | Code::OutOfRange => {
                    Self { param, ..status(StatusCode::BAD_REQUEST, "invalid_value") }
                }
                Code::Unauthenticated => status(StatusCode::UNAUTHORIZED, &lower),
                Code::PermissionDenied => status(StatusCode::FORBIDDEN, &lower),
                Code::NotFound => status(StatusCode::NOT_FOUND, &lower),
                Code::AlreadyExists | Code::Aborted => Self { is_final: true, ..status(StatusCode::CONFLICT, &lower) },
                Code::FailedPrecondition => match reason {
                    // The server's fault, which only its operator can mend.
                    "BLOB_STORE_REFUSED" => Self { is_final: true, ..status(StatusCode::SERVICE_UNAVAILABLE, &lower) },
                    // What is asked for was there, and is not any more.
                    "RESULTS_DELETED" | "INPUT_FILE_GONE" | "ENDPOINT_DELETED" => status(StatusCode::GONE, &lower),
                    _ => Self { is_final: true, ..status(StatusCode::CONFLICT, &lower) },
                },
                Code::ResourceExhausted => Self { kind: "requests", ..status(StatusCode::TOO_MANY_REQUESTS, &lower) },
                Code::Unavailable => status(StatusCode::SERVICE_UNAVAILABLE, &lower),
                Code::DeadlineExceeded => Self { is_final: true, ..status(StatusCode::GATEWAY_TIMEOUT, &lower) },
                Code::Cancelled | Code::DataLoss | Code::Internal => {
                    let code = if code == Code::Internal { "internal_error" } else { &lower };
                    Self { is_final: true, ..status(StatusCode::INTERNAL_SERVER_ERROR, code) }
                }
            },
        }
    }
}

/// Bad lines as a batch's `errors` list them.
fn list_of(reports: &[LineReport]) -> Value {
    let error = |report: &LineReport| {
        let LineReport { line, custom_id, message, fault } = report;
        let message = match custom_id {
            Some(id) => format!("{}{message} (custom_id {:?})", openais(fault.code, fault.param), short(id)),
            None => format!("{}{message}", openais(fault.code, fault.param)),
        };
        json!({"code": fault.code, "line": line, "message": message, "param": fault.param})
    };
    json!({"object": "list", "data": reports.iter().map(error).collect::<Vec<_>>()})
}

/// OpenAI's sentence for a bad line, which programs look for, before this server's.
pub(in crate::api) fn openais(code: &str, param: Option<&str>) -> String {
    match code {
        "invalid_json_line" => "This line is not parseable as valid JSON. ".into(),
        "missing_required_parameter" => format!("Missing required parameter: '{}'. ", param.unwrap_or_default()),
        "invalid_request" if param == Some("body.model") => "Model parameter is required. ".into(),
        "invalid_url" => "The URL provided for this request does not match the batch endpoint. ".into(),
        "streaming_unsupported" => "Streaming is not supported in the Batch API. ".into(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(error: ServiceError) -> (u16, Option<String>, bool) {
        let problem = Problem::from(error);
        let response = problem.respond(Dialect::OpenAi);
        let final_ = response.headers().get(SHOULD_RETRY).is_some();
        (response.status().as_u16(), problem.code, final_)
    }

    #[test]
    fn every_refusal_says_whether_the_sdk_should_try_again() {
        let of = |code, reason| said(ServiceError::new(code, reason, "x"));
        let code = |text: &str| Some(text.to_owned());
        assert_eq!(of(Code::FailedPrecondition, "BATCH_TERMINAL"), (409, None, true));
        assert_eq!(of(Code::ResourceExhausted, "FILE_TOO_LARGE"), (413, code("file_too_large"), false));
        assert_eq!(of(Code::ResourceExhausted, "TOO_MANY_BYTES"), (429, code("insufficient_quota"), true));
        assert_eq!(of(Code::ResourceExhausted, "TOO_MANY_REQUESTS"), (429, code("rate_limit_exceeded"), false));
        assert_eq!(of(Code::ResourceExhausted, "TOO_MANY_DOWNLOADS"), (429, code("too_many_downloads"), false));
        assert_eq!(of(Code::NotFound, "FILE_NOT_FOUND"), (404, None, false));
        assert_eq!(of(Code::Internal, "INTERNAL"), (500, code("internal_error"), true));
        assert_eq!(of(Code::Unavailable, "DATABASE_UNAVAILABLE"), (503, code("database_unavailable"), false));
        // The server's faults are not the client's, and what lies in between says which it is.
        let refused = of(Code::FailedPrecondition, "BLOB_STORE_REFUSED");
        assert_eq!(refused, (503, code("blob_store_refused"), true));
        assert_eq!(of(Code::DataLoss, "OBJECT_MISSING"), (500, code("object_missing"), true));
        assert_eq!(of(Code::FailedPrecondition, "RESULTS_DELETED"), (410, code("results_deleted"), false));
        assert_eq!(of(Code::FailedPrecondition, "ENDPOINT_DISABLED"), (409, code("endpoint_disabled"), true));
        for (code, reason) in [
            (Code::FailedPrecondition, "BLOB_STORE_REFUSED"),
            (Code::DataLoss, "DATA_DAMAGED"),
            (Code::Unavailable, "WORKER_FAILED"),
        ] {
            assert_eq!(Problem::from(ServiceError::new(code, reason, "x")).kind, "server_error", "{reason}");
        }
        assert_eq!(of(Code::DeadlineExceeded, "UPLOAD_IDLE"), (408, code("upload_idle"), false));
        assert_eq!(of(Code::InvalidArgument, "INVALID_WEBHOOK"), (400, code("invalid_value"), false));
    }

    #[test]
    fn no_wait_is_longer_than_the_sdks_take() {
        let wait = Duration::from_secs(3_600);
        let slow = Problem::from(ServiceError::retry(Code::ResourceExhausted, "TOO_MANY_REQUESTS", "x", wait));
        assert_eq!(slow.respond(Dialect::OpenAi).headers()[header::RETRY_AFTER], "60");
        let soon = Problem::from(ServiceError::retry(Code::Unavailable, "X", "x", Duration::from_millis(1_200)));
        assert_eq!(soon.respond(Dialect::OpenAi).headers()[header::RETRY_AFTER], "2");
    }

    #[test]
    fn a_path_tells_the_dialect() {
        for path in ["/v1/messages", "/v1/messages/count_tokens", "/v1/messages/batches/x"] {
            assert_eq!(Dialect::of(path), Dialect::Anthropic, "{path}");
        }
        assert_eq!(Dialect::of("/v1/messagesX"), Dialect::OpenAi);
    }
}
