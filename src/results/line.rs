//! One line of an output or error file, exactly as OpenAI writes them.

use std::borrow::Cow;

use serde::{Deserialize, de::IgnoredAny};
use serde_json::value::RawValue;

use crate::domain::{BatchId, TokenUsage};

/// The `id` of a request's result: the same whenever and wherever it is made.
#[must_use]
pub fn request_id(batch: &BatchId, line_number: i64) -> String {
    let batch = batch.as_str();
    format!("batch_req_{}_{line_number}", batch.strip_prefix("batch_").unwrap_or(batch))
}

/// A worker's answer, read as far as a result line needs it.
#[derive(Debug)]
pub struct Body<'a> {
    /// What goes into the line: the worker's bytes, but for line feeds between tokens.
    pub json: Cow<'a, [u8]>,
    /// What it says of tokens.
    pub usage: TokenUsage,
    /// It holds an `error` and nothing that any of the APIs answers with.
    pub only_error: bool,
}

/// Reads a worker's body. None: it is not JSON.
#[must_use]
pub fn body_of(bytes: &[u8]) -> Option<Body<'_>> {
    #[derive(Deserialize)]
    struct Answer<'a> {
        #[serde(borrow, default)]
        usage: Option<&'a RawValue>,
        #[serde(default)]
        error: Option<IgnoredAny>,
        // Chat and completions.
        #[serde(default)]
        choices: Option<IgnoredAny>,
        // Embeddings and score.
        #[serde(default)]
        data: Option<IgnoredAny>,
        // Responses.
        #[serde(default)]
        output: Option<IgnoredAny>,
        // Rerank.
        #[serde(default)]
        results: Option<IgnoredAny>,
    }
    let text = simdutf8::basic::from_utf8(bytes).ok()?;
    let (usage, only_error) = match serde_json::from_str::<Answer>(text) {
        Ok(answer) => (
            answer.usage.map(|raw| usage_of(raw.get())).unwrap_or_default(),
            answer.error.is_some()
                && [answer.choices, answer.data, answer.output, answer.results].iter().all(Option::is_none),
        ),
        // Not an object, or one with `usage` twice: good enough if it is JSON at all.
        Err(_) => serde_json::from_str::<IgnoredAny>(text).map(|_| (TokenUsage::default(), false)).ok()?,
    };
    Some(Body { json: one_line(bytes), usage, only_error })
}

/// A worker's body for a line, whatever it is: text that is not JSON becomes a JSON string.
fn body_or_text(bytes: &[u8]) -> Cow<'_, [u8]> {
    match body_of(bytes) {
        Some(body) => body.json,
        None => Cow::Owned(serde_json::Value::from(String::from_utf8_lossy(bytes)).to_string().into_bytes()),
    }
}

/// In valid JSON a line feed can only stand between tokens, where a space means the same.
fn one_line(json: &[u8]) -> Cow<'_, [u8]> {
    let json = json.trim_ascii();
    if memchr::memchr2(b'\n', b'\r', json).is_none() {
        return Cow::Borrowed(json);
    }
    Cow::Owned(json.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }).collect())
}

/// Reads a `usage` object of the chat, completions, embeddings or responses API. What is missing or odd counts as 0.
fn usage_of(json: &str) -> TokenUsage {
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Details {
        cached_tokens: Option<i64>,
        reasoning_tokens: Option<i64>,
    }
    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Usage {
        #[serde(alias = "input_tokens")]
        prompt_tokens: Option<i64>,
        #[serde(alias = "output_tokens")]
        completion_tokens: Option<i64>,
        total_tokens: Option<i64>,
        #[serde(alias = "input_tokens_details")]
        prompt_tokens_details: Option<Details>,
        #[serde(alias = "output_tokens_details")]
        completion_tokens_details: Option<Details>,
    }
    let usage: Usage = serde_json::from_str(json).unwrap_or_default();
    let count = |value: Option<i64>| value.unwrap_or(0).max(0);
    let (input, output) = (count(usage.prompt_tokens), count(usage.completion_tokens));
    TokenUsage {
        input,
        cached_input: count(usage.prompt_tokens_details.and_then(|details| details.cached_tokens)),
        output,
        reasoning: count(usage.completion_tokens_details.and_then(|details| details.reasoning_tokens)),
        total: usage.total_tokens.map_or_else(|| input.saturating_add(output), |total| total.max(0)),
    }
}

/// What a worker replied.
#[derive(Clone, Copy, Debug)]
pub struct Reply<'a> {
    /// HTTP status.
    pub status: u16,
    /// The worker's `x-request-id`; the result's own id stands in for a missing one.
    pub request_id: Option<&'a str>,
    /// The body.
    pub body: &'a [u8],
    /// The body is known to be JSON, and is not looked at again.
    pub is_json: bool,
}

/// The line of a request that a worker answered, with its line feed. `custom_id` is the JSON string as the client wrote it.
#[must_use]
pub fn render_answer(id: &str, custom_id: &[u8], reply: Reply<'_>) -> Vec<u8> {
    let body = if reply.is_json { one_line(reply.body) } else { body_or_text(reply.body) };
    let request_id = serde_json::Value::from(reply.request_id.unwrap_or(id)).to_string();
    let status = reply.status.to_string();
    let pieces: [&[u8]; 11] = [
        b"{\"id\":\"",
        id.as_bytes(),
        b"\",\"custom_id\":",
        custom_id,
        b",\"response\":{\"status_code\":",
        status.as_bytes(),
        b",\"request_id\":",
        request_id.as_bytes(),
        b",\"body\":",
        &body,
        b"},\"error\":null}\n",
    ];
    pieces.concat()
}

/// The line of a request that no worker answered, with its line feed.
#[must_use]
pub fn render_error(id: &str, custom_id: &[u8], code: &str, message: &str) -> Vec<u8> {
    let error = serde_json::json!({ "code": code, "message": message }).to_string();
    let pieces: [&[u8]; 7] = [
        b"{\"id\":\"",
        id.as_bytes(),
        b"\",\"custom_id\":",
        custom_id,
        b",\"response\":null,\"error\":",
        error.as_bytes(),
        b"}\n",
    ];
    pieces.concat()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn an_answer_that_is_only_an_error_is_known() {
        let only = |text: &str| body_of(text.as_bytes()).unwrap().only_error;
        assert!(only(r#"{"error":{"message":"upstream died"}}"#));
        assert!(only(r#"{"id":"x","usage":{},"error":"down"}"#));
        for fine in [
            "{}",
            "[]",
            r#"{"error":null}"#,
            r#"{"error":null,"output":[]}"#,
            r#"{"error":{"code":"max"},"status":"incomplete","output":[]}"#,
            r#"{"choices":[],"error":"x"}"#,
            r#"{"data":[],"results":[],"error":"x","usage":{"total_tokens":3}}"#,
        ] {
            assert!(!only(fine), "{fine}");
        }
    }

    #[test]
    fn usage_of_every_api_is_read() {
        let chat = br#"{"usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12,"prompt_tokens_details":{"cached_tokens":3},"completion_tokens_details":{"reasoning_tokens":2}}}"#;
        let responses = br#"{"usage":{"input_tokens":5,"output_tokens":7,"total_tokens":12,"input_tokens_details":{"cached_tokens":3},"output_tokens_details":{"reasoning_tokens":2}}}"#;
        let expected = TokenUsage { input: 5, cached_input: 3, output: 7, reasoning: 2, total: 12 };
        assert_eq!(body_of(chat).unwrap().usage, expected);
        assert_eq!(body_of(responses).unwrap().usage, expected);
        let vllm =
            br#"{"usage":{"prompt_tokens":5,"total_tokens":6,"completion_tokens":1,"prompt_tokens_details":null}}"#;
        assert_eq!(body_of(vllm).unwrap().usage, TokenUsage { input: 5, output: 1, total: 6, ..TokenUsage::default() });
        assert_eq!(body_of(br#"{"usage":"lots"}"#).unwrap().usage, TokenUsage::default());
        assert_eq!(body_of(b"[1]").unwrap().usage, TokenUsage::default());
    }

    #[test]
    fn what_is_not_json_is_told_apart() {
        for bad in [&b"<html>"[..], b"{\"a\":1", b"", b"{\"a\":\"\xff\"}", b"{} x"] {
            assert!(body_of(bad).is_none(), "{bad:?}");
        }
        let reply = Reply { status: 400, request_id: None, body: b"<h1>\n\"no\"</h1>", is_json: false };
        let line: Value = serde_json::from_slice(&render_answer("r", b"\"c\"", reply)).unwrap();
        assert_eq!(line["response"]["body"], "<h1>\n\"no\"</h1>");
    }

    #[test]
    fn the_bodys_bytes_are_kept() {
        let body = br#"{ "n":1.0e2, "b":"\u00e9" ,"a":[ ] }"#;
        let line =
            render_answer("r", br#""\u0061""#, Reply { status: 200, request_id: Some("q\"1"), body, is_json: true });
        assert_eq!(
            String::from_utf8(line).unwrap(),
            concat!(
                r#"{"id":"r","custom_id":"\u0061","response":{"status_code":200,"request_id":"q\"1","body":"#,
                r#"{ "n":1.0e2, "b":"\u00e9" ,"a":[ ] }},"error":null}"#,
                "\n"
            )
        );
    }

    #[test]
    fn an_error_line_is_openais() {
        let line: Value =
            serde_json::from_slice(&render_error("r", b"\"c\"", "request_timeout", "no \"answer\"")).unwrap();
        assert_eq!(
            line,
            json!({"id": "r", "custom_id": "c", "response": null, "error": {"code": "request_timeout", "message": "no \"answer\""}})
        );
    }

    proptest! {
        #[test]
        fn any_body_gives_one_line_of_json(body in proptest::collection::vec(any::<u8>(), 0..60), id in ".{0,12}") {
            let custom_id = Value::from(id.clone()).to_string();
            let line = render_answer("r", custom_id.as_bytes(), Reply { status: 200, request_id: Some(&id), body: &body, is_json: false });
            prop_assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            let line: Value = serde_json::from_slice(&line).unwrap();
            prop_assert_eq!(&line["custom_id"], &Value::from(id));
        }

        #[test]
        fn pretty_json_means_the_same_on_one_line(text in "[a-z\\n ]{0,20}", number in any::<i32>()) {
            let value = json!({"text": text, "list": [number, {"x": null}]});
            let pretty = serde_json::to_vec_pretty(&value).unwrap();
            let body = body_of(&pretty).unwrap();
            prop_assert!(!body.json.contains(&b'\n'));
            prop_assert_eq!(serde_json::from_slice::<Value>(&body.json).unwrap(), value);
        }
    }
}
