//! `tidemill infer …`: runs one request at once.

use std::{fs, io::Read as _, time::Duration};

use anyhow::Context;
use clap::Args;
use serde_json::{Value, json};

use super::{
    client::{Client, patiently},
    json as render,
    meter::{self, note},
    out,
};
use crate::pb;

/// Arguments of `infer`.
#[derive(Debug, Args)]
pub struct InferArgs {
    /// The model's name.
    #[arg(required_unless_present = "body", conflicts_with = "body", requires = "prompt")]
    model: Option<String>,
    /// The prompt.
    #[arg(conflicts_with = "body")]
    prompt: Option<String>,
    /// The most tokens of the answer. Default: the worker's.
    #[arg(long, value_name = "N", conflicts_with = "body")]
    max_tokens: Option<u32>,
    /// A complete request body instead: JSON, @FILE, or "-" for stdin. The answer's body is printed unchanged.
    #[arg(long, value_name = "JSON")]
    body: Option<String>,
    /// The endpoint for --body.
    #[arg(long, value_name = "PATH", default_value = "/v1/chat/completions")]
    endpoint: String,
}

/// Sends the request. Returns the exit code: 1 if the worker answered with an error.
///
/// # Errors
/// What went wrong, for people.
pub async fn run(args: InferArgs, client: &Client) -> anyhow::Result<u8> {
    let plain = args.body.is_none();
    let body = match &args.body {
        Some(body) => read_body(body)?,
        None => chat(&args).into_bytes(),
    };
    // Not repeated: a request may be expensive, and the server has already tried several workers.
    let mut batches = client.batches();
    let asked = batches.infer(pb::InferRequest { endpoint: args.endpoint, body: body.into() });
    let say = |waited: Duration| note(&format!("still waiting for the model's answer, {} s", waited.as_secs()));
    let answer = patiently(asked, say).await?.into_inner();
    let succeeded = (200..300).contains(&answer.status_code);
    if client.json {
        out::line(render::of(&answer))?;
    } else {
        let text = String::from_utf8_lossy(&answer.body);
        let content = content(&answer.body).filter(|_| plain && succeeded);
        out::data(content.as_deref().unwrap_or(&text))?;
        if !succeeded {
            note(&format!("the worker answered with status {}", answer.status_code));
        }
    }
    Ok(u8::from(!succeeded))
}

fn read_body(body: &str) -> anyhow::Result<Vec<u8>> {
    match (body, body.strip_prefix('@')) {
        ("-", _) => {
            meter::note_terminal();
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes).context("stdin")?;
            Ok(bytes)
        }
        (_, Some(file)) => fs::read(file).with_context(|| format!("--body {file}")),
        (text, None) => Ok(text.as_bytes().to_vec()),
    }
}

fn chat(args: &InferArgs) -> String {
    let mut body = json!({ "model": args.model, "messages": [{ "role": "user", "content": args.prompt }] });
    if let Some(most) = args.max_tokens {
        body["max_tokens"] = most.into();
    }
    body.to_string()
}

/// The text of a chat completion. `None` if it has none.
#[must_use]
pub fn content(body: &[u8]) -> Option<String> {
    let body: Value = serde_json::from_slice(body).ok()?;
    Some(body["choices"][0]["message"]["content"].as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_text_or_a_file() {
        assert_eq!(read_body("{\"a\":1}").unwrap(), b"{\"a\":1}");
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "{}").unwrap();
        assert_eq!(read_body(&format!("@{}", file.path().display())).unwrap(), b"{}");
        assert!(read_body("@/nowhere").is_err());
    }

    #[test]
    fn the_answers_text_is_found() {
        assert_eq!(content(br#"{"choices":[{"message":{"content":"hi"}}]}"#).as_deref(), Some("hi"));
        assert_eq!(content(br#"{"choices":[]}"#), None);
        assert_eq!(content(b"<h1>"), None);
    }
}
