//! Decides by its status and body whether an answer other than a success is the request's, and in what way the try has
//! failed if it is not. Pure.
//!
//! Gateways answer for workers that they don't reach, and for callers that they don't know: with pages, with redirects
//! to a login, with statuses that no inference server has. Such an answer says nothing of the request. It is the
//! request's only if the API's own error comes with a status that stands for a bad request.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;

use super::FailureKind;

/// Bytes of a redirect's target that are shown.
const SHOWN: usize = 200;

/// How the try has failed. None: this is the request's answer. `paces`: whether it has a `Retry-After`.
pub(super) fn failure_of(status: u16, body: &[u8], paces: bool) -> Option<FailureKind> {
    match status {
        200..=299 => None,
        404 if is_missing_model(body) => Some(FailureKind::NoModel),
        400 | 404 | 413 | 422 if is_api_error(status, body) => None,
        429 => Some(FailureKind::Busy),
        503 if paces => Some(FailureKind::Busy),
        408 | 409 | 425 | 500..=599 => Some(FailureKind::Status),
        400..=499 => Some(FailureKind::Refused),
        // Neither a success nor an error.
        _ => Some(FailureKind::BadAnswer),
    }
}

/// What a status that is not the request's answer says.
pub(super) fn in_words(status: u16, location: Option<&str>) -> String {
    match (status, location) {
        (300..=399, Some(to)) => {
            let to: String = to.chars().take(SHOWN).collect();
            format!(
                "the worker answered {status}, a redirect to {to}: requests are not redirected, so give that server's base \
                 URL instead"
            )
        }
        (200..=299 | 400..=599, _) => format!("the worker answered {status}"),
        _ => format!("the worker answered {status}, which is neither a success nor an error"),
    }
}

/// Whether the body of a 404 says that the model is missing, not the path or something that the request names: as vLLM
/// says it, now and before it wrapped errors in `error`, and as OpenAI does.
pub(super) fn is_missing_model(body: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Page<'a> {
        #[serde(borrow)]
        error: Option<Refusal<'a>>,
    }
    #[derive(Deserialize)]
    struct Refusal<'a> {
        #[serde(borrow, default)]
        message: Cow<'a, str>,
        #[serde(borrow, default, rename = "type")]
        kind: Option<Cow<'a, str>>,
        #[serde(default)]
        param: Option<Value>,
        #[serde(default)]
        code: Option<Value>,
    }
    let wrapped = serde_json::from_slice(body).ok().and_then(|page: Page<'_>| page.error);
    let Some(refusal) = wrapped.or_else(|| serde_json::from_slice(body).ok()) else { return false };
    let of_model = refusal.param.is_some_and(|param| param == "model") || refusal.message.starts_with("The model");
    refusal.code.is_some_and(|code| code == "model_not_found")
        || (of_model && refusal.kind.is_some_and(|kind| kind == "NotFoundError"))
}

/// Whether an inference server itself says with this body why it does not answer the request.
fn is_api_error(status: u16, body: &[u8]) -> bool {
    let Ok(page) = serde_json::from_slice::<Value>(body) else { return status == 422 && is_text(body) };
    // Google's servers put it into a list.
    let page = page.get(0).unwrap_or(&page);
    let says = |value: &Value| value.get("message").is_some_and(Value::is_string);
    // OpenAI's and Anthropic's form; and vLLM's of old, which a gateway's bare `{"message": …}` is not.
    let is_plain = says(page) && ["object", "type", "code"].iter().any(|name| page.get(name).is_some());
    if is_plain || page.get("error").is_some_and(says) {
        return true;
    }
    // So speak FastAPI and others of a bad body. With 404 it is the path that they don't have.
    let is_filled = |name: &str| page.get(name).is_some_and(|value| !value.is_null() && *value != "");
    status != 404 && (is_filled("detail") || page.get("error").is_some_and(Value::is_string))
}

/// Whether it is plain text, as servers in Rust say which field of a body they can't read. No gateway answers 422.
fn is_text(body: &[u8]) -> bool {
    let text = body.trim_ascii_start();
    !text.is_empty() && !text.starts_with(b"<")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPENAI: &str = r#"{"error":{"message":"no","type":"invalid_request_error","param":null,"code":null}}"#;

    #[test]
    fn a_missing_model_is_told_from_what_else_is_not_found() {
        for body in [
            r#"{"error":{"message":"The model `x` does not exist.","type":"NotFoundError","param":"model","code":404}}"#,
            r#"{"object":"error","message":"The model `x` does not exist.","type":"NotFoundError","param":null,"code":404}"#,
            r#"{"error":{"message":"no","type":"invalid_request_error","param":null,"code":"model_not_found"}}"#,
        ] {
            assert_eq!(failure_of(404, body.as_bytes(), false), Some(FailureKind::NoModel), "{body}");
        }
        for body in [
            "",
            "<html>",
            r#"{"detail":"Not Found"}"#,
            r#"{"error":"The model is a teapot"}"#,
            r#"{"error":{"message":"Response with id 'x' not found.","type":"NotFoundError","param":null,"code":404}}"#,
        ] {
            assert!(!is_missing_model(body.as_bytes()), "{body}");
        }
    }

    #[test]
    fn a_404_of_the_api_is_told_from_that_of_a_gateway() {
        for body in [
            "",
            "<html>404</html>",
            r#"{"detail":"Not Found"}"#,
            r#"{"error":"no route"}"#,
            "[]",
            r#"{"message":"no Route matched with those values"}"#,
        ] {
            assert_eq!(failure_of(404, body.as_bytes(), false), Some(FailureKind::Refused), "{body}");
        }
        for body in [
            r#"{"error":{"message":"Response with id 'x' not found.","type":"NotFoundError"}}"#,
            r#"{"object":"error","message":"no such response","code":404}"#,
        ] {
            assert_eq!(failure_of(404, body.as_bytes(), false), None, "{body}");
        }
    }

    #[test]
    fn what_the_api_says_of_a_bad_request_is_its_answer_and_a_page_is_not() {
        for status in [400, 413, 422] {
            for body in [
                OPENAI,
                r#"{"type":"error","error":{"type":"invalid_request_error","message":"no"}}"#,
                r#"{"object":"error","message":"no","type":"BadRequestError","param":null,"code":400}"#,
                r#"{"detail":[{"type":"missing","loc":["body","messages"],"msg":"Field required"}]}"#,
                r#"[{"error":{"code":400,"message":"no","status":"INVALID_ARGUMENT"}}]"#,
                r#"{"error":"batch size 65 > maximum allowed batch size 32","error_type":"Validation"}"#,
            ] {
                assert_eq!(failure_of(status, body.as_bytes(), false), None, "{status} {body}");
            }
            for body in ["", "<html>no</html>", r#"{"message":"The plain HTTP request was sent to HTTPS port"}"#, "{}"]
            {
                assert_eq!(failure_of(status, body.as_bytes(), false), Some(FailureKind::Refused), "{status} {body}");
            }
        }
        let text = b"Failed to deserialize the JSON body into the target type: messages: invalid type: null";
        assert_eq!(failure_of(422, text, false), None);
        let go = b"Client sent an HTTP request to an HTTPS server.\n";
        assert_eq!(failure_of(400, go, false), Some(FailureKind::Refused));
    }

    #[test]
    fn every_status_has_its_place() {
        use FailureKind::{BadAnswer, Busy, Refused, Status};
        for status in 100..=999 {
            let expected = match status {
                200..=299 | 400 | 404 | 413 | 422 => None,
                429 => Some(Busy),
                408 | 409 | 425 | 500..=599 => Some(Status),
                // With the API's error too: nobody has paid, the server is gone, it wants another protocol.
                400..=499 => Some(Refused),
                _ => Some(BadAnswer),
            };
            assert_eq!(failure_of(status, OPENAI.as_bytes(), false), expected, "{status}");
        }
        assert_eq!(failure_of(503, b"", true), Some(Busy));
        assert_eq!(failure_of(502, b"", true), Some(Status));
    }

    #[test]
    fn a_redirect_is_named_with_its_target() {
        assert_eq!(in_words(502, None), "the worker answered 502");
        let redirect = in_words(302, Some("https://sso.example.com/login"));
        assert!(redirect.starts_with("the worker answered 302, a redirect to https://sso.example.com/login:"));
        for status in [101, 304, 600] {
            assert!(in_words(status, None).contains("neither a success nor an error"), "{status}");
        }
        assert!(in_words(307, Some(&"x".repeat(9_999))).len() < 400);
    }
}
