//! Renders one line of an output or error file in OpenAI's format.

use bytes::Bytes;

use crate::domain::{BatchId, answer};

/// The `id` of a request's result, which depends only on the batch and the line.
#[must_use]
pub fn request_id(batch: &BatchId, line_number: i64) -> String {
    let batch = batch.as_str();
    format!("batch_req_{}_{line_number}", batch.strip_prefix("batch_").unwrap_or(batch))
}

/// Lines of at least this many bytes refer to the worker's bytes instead of copying them.
const LARGE: usize = 64 * 1024;

/// A result line with its line feed.
#[derive(Clone, Debug, Default)]
pub struct Line {
    head: Vec<u8>,
    /// The body of a large answer, in its own memory.
    body: Bytes,
    tail: Vec<u8>,
}

impl Line {
    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.head.len() + self.body.len() + self.tail.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends the line to `object`.
    pub fn write_to(&self, object: &mut Vec<u8>) {
        object.extend_from_slice(&self.head);
        object.extend_from_slice(&self.body);
        object.extend_from_slice(&self.tail);
    }

    /// The line's bytes in one piece.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        if self.body.is_empty() && self.tail.is_empty() {
            return self.head;
        }
        let mut all = Vec::with_capacity(self.len());
        self.write_to(&mut all);
        all
    }
}

impl From<Vec<u8>> for Line {
    fn from(head: Vec<u8>) -> Self {
        Self { head, ..Self::default() }
    }
}

/// A worker's body as JSON: text that is not JSON becomes a JSON string.
fn body_or_text(bytes: &Bytes) -> Bytes {
    if answer::is_json(bytes) {
        one_line(bytes)
    } else {
        serde_json::Value::from(String::from_utf8_lossy(bytes)).to_string().into()
    }
}

/// In valid JSON a line feed occurs only between tokens, where a space means the same.
fn one_line(json: &Bytes) -> Bytes {
    let trimmed = json.trim_ascii();
    if memchr::memchr2(b'\n', b'\r', trimmed).is_none() {
        return json.slice_ref(trimmed);
    }
    trimmed.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }).collect()
}

/// A worker's response.
#[derive(Clone, Copy, Debug)]
pub struct Reply<'a> {
    /// HTTP status.
    pub status: u16,
    /// The worker's `x-request-id`. `None`: the result's own id is used.
    pub request_id: Option<&'a str>,
    pub body: &'a Bytes,
    /// Whether the body is known to be JSON, so that it is not checked again.
    pub is_json: bool,
    /// What is wrong with a response whose status is a success: a code and a message.
    pub error: Option<(&'a str, &'a str)>,
}

/// Renders the line of a request with a response, with its line feed. `custom_id` is the JSON string as the client
/// wrote it.
#[must_use]
pub fn render_answer(id: &str, custom_id: &[u8], reply: Reply<'_>) -> Line {
    let body = if reply.is_json { one_line(reply.body) } else { body_or_text(reply.body) };
    let request_id = serde_json::Value::from(reply.request_id.unwrap_or(id)).to_string();
    let status = reply.status.to_string();
    let error = reply.error.map_or_else(|| "null".into(), |(code, message)| error_object(code, message));
    let before: [&[u8]; 9] = [
        b"{\"id\":\"",
        id.as_bytes(),
        b"\",\"custom_id\":",
        custom_id,
        b",\"response\":{\"status_code\":",
        status.as_bytes(),
        b",\"request_id\":",
        request_id.as_bytes(),
        b",\"body\":",
    ];
    let after: [&[u8]; 3] = [b"},\"error\":", error.as_bytes(), b"}\n"];
    if body.len() >= LARGE {
        return Line { head: before.concat(), body, tail: after.concat() };
    }
    let size = before.iter().chain(&after).map(|piece| piece.len()).sum::<usize>() + body.len();
    let mut line = Vec::with_capacity(size);
    for piece in before.iter().chain([&&body[..]]).chain(&after) {
        line.extend_from_slice(piece);
    }
    line.into()
}

fn error_object(code: &str, message: &str) -> String {
    serde_json::json!({ "code": code, "message": message }).to_string()
}

/// Renders the line of a request without a response, with its line feed.
#[must_use]
pub fn render_error(id: &str, custom_id: &[u8], code: &str, message: &str) -> Vec<u8> {
    let error = error_object(code, message);
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

    fn line_of(
        id: &str,
        custom_id: &[u8],
        status: u16,
        request_id: Option<&str>,
        body: &[u8],
        is_json: bool,
    ) -> Vec<u8> {
        let body = Bytes::copy_from_slice(body);
        render_answer(id, custom_id, Reply { status, request_id, body: &body, is_json, error: None }).into_bytes()
    }

    #[test]
    fn what_is_not_json_becomes_a_string() {
        let line = line_of("r", b"\"c\"", 400, None, b"<h1>\n\"no\"</h1>", false);
        let line: Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(line["response"]["body"], "<h1>\n\"no\"</h1>");
    }

    #[test]
    fn a_large_body_is_not_copied_and_the_line_is_the_same() {
        let body = Bytes::from(format!("{{\"a\":\"{}\"}}", "x".repeat(2 * LARGE)));
        let reply = Reply { status: 200, request_id: None, body: &body, is_json: true, error: Some(("c", "m")) };
        let line = render_answer("r", b"\"c\"", reply);
        assert_eq!(line.body.as_ptr(), body.as_ptr());
        let (length, bytes) = (line.len(), line.into_bytes());
        assert_eq!((length, bytes.last()), (bytes.len(), Some(&b'\n')));
        let line: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(line["response"]["body"]["a"].as_str().unwrap().len(), 2 * LARGE);
        assert_eq!(line["error"], json!({"code": "c", "message": "m"}));
    }

    #[test]
    fn the_bodys_bytes_are_kept() {
        let body = br#"{ "n":1.0e2, "b":"\u00e9" ,"a":[ ] }"#;
        let line = line_of("r", br#""\u0061""#, 200, Some("q\"1"), body, true);
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
            let line = line_of("r", custom_id.as_bytes(), 200, Some(&id), &body, false);
            prop_assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            let line: Value = serde_json::from_slice(&line).unwrap();
            prop_assert_eq!(&line["custom_id"], &Value::from(id));
        }

        #[test]
        fn pretty_json_means_the_same_on_one_line(text in "[a-z\\n ]{0,20}", number in any::<i32>()) {
            let value = json!({"text": text, "list": [number, {"x": null}]});
            let pretty = serde_json::to_vec_pretty(&value).unwrap();
            let line = one_line(&pretty.into());
            prop_assert!(!line.contains(&b'\n'));
            prop_assert_eq!(serde_json::from_slice::<Value>(&line).unwrap(), value);
        }
    }
}
