//! What the simulated worker reads out of a request, without building a tree: the model, the limits, the prompt's texts.

use std::{borrow::Cow, hash::BuildHasher};

use serde::Deserialize;
use serde_json::value::RawValue;

use super::engine::Cost;
use crate::domain::Endpoint;

/// The longest prompt and answer together, as `/v1/models` lists it.
pub(super) const MAX_MODEL_LEN: u64 = 32_768;
/// Completion tokens where the request sets no limit: what `/v1/completions` has for a default in vLLM.
const DEFAULT_MAX_TOKENS: u64 = 16;

#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    model: Option<Cow<'a, str>>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    max_output_tokens: Option<u64>,
    stream: Option<bool>,
    encoding_format: Option<Cow<'a, str>>,
    #[serde(borrow)]
    response_format: Option<&'a RawValue>,
    top_n: Option<usize>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
    #[serde(borrow)]
    query: Option<&'a RawValue>,
    #[serde(borrow)]
    documents: Option<&'a RawValue>,
    #[serde(borrow)]
    text_1: Option<&'a RawValue>,
    #[serde(borrow)]
    text_2: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    role: Cow<'a, str>,
    #[serde(borrow)]
    content: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// A request that can be answered.
#[derive(Debug)]
pub(super) struct Request<'a> {
    /// The name to answer under.
    pub(super) model: Cow<'a, str>,
    /// What to answer to: one text an answer. Of a chat the last user message.
    pub(super) texts: Vec<Cow<'a, str>>,
    /// For rerank and score: the texts to compare with, one for all or one for each.
    pub(super) queries: Vec<Cow<'a, str>>,
    /// For rerank: the number of results.
    pub(super) top_n: usize,
    /// For chats: whether the answer is to have a form of its own, such as JSON.
    pub(super) is_formed: bool,
    /// For embeddings: whether they are encoded in base64.
    pub(super) base64: bool,
    /// A hash of everything that determines the answer.
    pub(super) fingerprint: u64,
    /// Whether the answer is to come as a stream.
    pub(super) streams: bool,
    /// The work that the simulated engine has with it.
    pub(super) cost: Cost,
}

/// Why a request is answered with an error, in vLLM's words.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) kind: &'static str,
    pub(super) message: String,
    pub(super) param: Option<String>,
}

impl Refusal {
    /// The body does not have the right form.
    pub(super) fn invalid(message: &str, param: Option<&str>) -> Self {
        let message = format!("1 validation error:\n  {message}");
        Self { status: 400, kind: "Bad Request", message, param: param.map(str::to_owned) }
    }

    fn missing(field: &str) -> Self {
        Self::invalid(
            &format!("{{'type': 'missing', 'loc': 'body.{field}', 'msg': 'Field required'}}"),
            Some(&format!("body.{field}")),
        )
    }

    fn bad(message: String, param: &str) -> Self {
        Self { status: 400, kind: "BadRequestError", message, param: Some(param.to_owned()) }
    }
}

/// Reads a request to a worker that serves `models`.
pub(super) fn read<'a>(
    endpoint: Endpoint,
    body: &'a [u8],
    models: &[String],
    seed: u64,
) -> Result<Request<'a>, Refusal> {
    let body: Body<'a> =
        serde_json::from_slice(body).map_err(|error| Refusal::invalid(&error.to_string(), Some("body")))?;
    // vLLM takes a request without a model for its first one.
    let model = match body.model {
        Some(model) if models.iter().any(|known| *known == model) => model,
        Some(model) if !model.is_empty() => {
            let message = format!("The model `{model}` does not exist. Valid aliases: {}.", models.join(", "));
            return Err(Refusal { status: 404, kind: "NotFoundError", message, param: Some("model".into()) });
        }
        Some(_) | None => Cow::Owned(models.first().cloned().unwrap_or_default()),
    };
    let streams = body.stream == Some(true);
    let mut request = Request {
        model,
        texts: Vec::new(),
        queries: Vec::new(),
        top_n: body.top_n.unwrap_or(usize::MAX),
        is_formed: body.response_format.is_some(),
        base64: body.encoding_format.as_deref() == Some("base64"),
        fingerprint: seed,
        streams,
        cost: Cost::default(),
    };
    let mut max_tokens = None;
    let one = |raw: Option<&'a RawValue>, field| raw.ok_or_else(|| Refusal::missing(field)).map(RawValue::get);
    match endpoint {
        Endpoint::ChatCompletions | Endpoint::Messages => {
            request.chat(one(body.messages, "messages")?, "messages", seed)?;
            max_tokens = body.max_completion_tokens.or(body.max_tokens).map(|value| (value, "max_tokens"));
        }
        Endpoint::Responses => {
            let input = one(body.input, "input")?;
            if input.starts_with('[') {
                request.chat(input, "input", seed)?;
            } else {
                request.texts_of(input, "input", seed)?;
            }
            max_tokens = body.max_output_tokens.map(|value| (value, "max_output_tokens"));
        }
        Endpoint::Completions => {
            request.texts_of(one(body.prompt, "prompt")?, "prompt", seed)?;
            max_tokens = body.max_tokens.map(|value| (value, "max_tokens"));
        }
        Endpoint::Embeddings => request.texts_of(one(body.input, "input")?, "input", seed)?,
        Endpoint::Score => {
            request.queries = texts(one(body.text_1, "text_1")?, "text_1")?;
            request.texts_of(one(body.text_2, "text_2")?, "text_2", seed)?;
        }
        Endpoint::Rerank => {
            request.queries = texts(one(body.query, "query")?, "query")?;
            request.texts_of(one(body.documents, "documents")?, "documents", seed)?;
        }
    }
    for query in &request.queries {
        request.cost.prompt_tokens += words(query);
        request.fingerprint ^= fingerprint(seed, query);
    }
    let writes = match endpoint {
        Endpoint::ChatCompletions | Endpoint::Completions | Endpoint::Responses | Endpoint::Messages => true,
        Endpoint::Embeddings | Endpoint::Score | Endpoint::Rerank => false,
    };
    if writes {
        let (value, param) = max_tokens.unwrap_or((DEFAULT_MAX_TOKENS, "max_tokens"));
        request.limit(value, param)?;
    } else if streams {
        return Err(Refusal::bad("Answers of this endpoint are not streamed.".into(), "stream"));
    }
    Ok(request)
}

impl<'a> Request<'a> {
    fn chat(&mut self, raw: &'a str, field: &str, seed: u64) -> Result<(), Refusal> {
        let messages: Vec<Message<'a>> = parse(raw, field)?;
        if messages.is_empty() {
            let message = "Cannot apply chat template to an empty conversation. Provide at least one message.";
            return Err(Refusal { status: 400, kind: "BadRequestError", message: message.into(), param: None });
        }
        let mut last = Cow::Borrowed("");
        for (place, message) in messages.into_iter().enumerate() {
            let content = message.content.map(|raw| text(raw, field)).transpose()?.unwrap_or_default();
            let tokens = words(&content);
            self.cost.prompt_tokens += tokens;
            if place == 0 {
                (self.cost.prefix, self.cost.prefix_tokens) = (fingerprint(seed, &content), tokens);
            }
            if message.role == "user" {
                last = content;
            }
        }
        self.fingerprint = fingerprint(seed, raw);
        self.texts = vec![last];
        Ok(())
    }

    fn texts_of(&mut self, raw: &'a str, field: &str, seed: u64) -> Result<(), Refusal> {
        self.texts = texts(raw, field)?;
        self.cost.prompt_tokens += self.texts.iter().map(|text| words(text)).sum::<u64>();
        self.fingerprint = fingerprint(seed, raw);
        (self.cost.prefix, self.cost.prefix_tokens) = (self.fingerprint, self.cost.prompt_tokens);
        Ok(())
    }

    fn limit(&mut self, max_tokens: u64, param: &str) -> Result<(), Refusal> {
        if max_tokens == 0 {
            return Err(Refusal::bad(
                format!("{param} must be at least 1, got 0. (parameter={param}, value=0)"),
                param,
            ));
        }
        let prompt_tokens = self.cost.prompt_tokens;
        if max_tokens.saturating_add(prompt_tokens) > MAX_MODEL_LEN {
            let message = format!(
                "This model's maximum context length is {MAX_MODEL_LEN} tokens. However, you requested {max_tokens} output \
                 tokens and your prompt contains {prompt_tokens} input tokens. Please reduce either. \
                 (parameter={param}, value={max_tokens})"
            );
            return Err(Refusal::bad(message, param));
        }
        self.cost.completion_tokens = max_tokens.saturating_mul(self.texts.len() as u64);
        Ok(())
    }
}

/// A number for a text: the same for the same text and seed.
pub(super) fn fingerprint(seed: u64, text: &str) -> u64 {
    foldhash::quality::FixedState::with_seed(seed).hash_one(text)
}

/// The tokens of a text, in this simulation.
fn words(text: &str) -> u64 {
    text.split_ascii_whitespace().count() as u64
}

fn parse<'a, T: Deserialize<'a>>(raw: &'a str, field: &str) -> Result<T, Refusal> {
    serde_json::from_str(raw).map_err(|error| Refusal::invalid(&error.to_string(), Some(&format!("body.{field}"))))
}

/// A string's text; anything else (content parts, token ids) as it was written.
fn text<'a>(raw: &'a RawValue, field: &str) -> Result<Cow<'a, str>, Refusal> {
    let raw = raw.get();
    if raw.starts_with('"') { Ok(parse::<Text<'a>>(raw, field)?.0) } else { Ok(Cow::Borrowed(raw)) }
}

/// A string, an array of token ids, or an array of either.
fn texts<'a>(raw: &'a str, field: &str) -> Result<Vec<Cow<'a, str>>, Refusal> {
    if !raw.starts_with('[') {
        return Ok(vec![text(parse(raw, field)?, field)?]);
    }
    let items: Vec<&'a RawValue> = parse(raw, field)?;
    match items.first() {
        None => Err(Refusal::bad(format!("{field} must be provided and non-empty. (parameter={field})"), field)),
        Some(first) if first.get().starts_with(|c: char| c.is_ascii_digit()) => Ok(vec![Cow::Borrowed(raw)]),
        Some(_) => items.into_iter().map(|item| text(item, field)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn models() -> Vec<String> {
        vec!["tiny".into(), "other".into()]
    }

    fn chat(body: &str) -> Result<(u64, u64), Refusal> {
        read(Endpoint::ChatCompletions, body.as_bytes(), &models(), 1)
            .map(|request| (request.cost.prompt_tokens, request.cost.completion_tokens))
    }

    #[test]
    fn tokens_are_words_and_the_limit() {
        let messages = r#"[{"role":"system","content":"be kind"},{"role":"user","content":"what is\n it"}]"#;
        assert_eq!(chat(&format!(r#"{{"model":"tiny","messages":{messages}}}"#)).unwrap(), (5, 16));
        assert_eq!(chat(&format!(r#"{{"messages":{messages},"max_tokens":4}}"#)).unwrap(), (5, 4));
        let both = format!(r#"{{"messages":{messages},"max_tokens":4,"max_completion_tokens":2}}"#);
        assert_eq!(chat(&both).unwrap(), (5, 2), "as a real vLLM prefers");
    }

    #[test]
    fn what_a_real_vllm_refuses_is_refused_in_its_words() {
        let unknown = chat(r#"{"model":"nope","messages":[]}"#).unwrap_err();
        assert_eq!((unknown.status, unknown.kind, unknown.param.as_deref()), (404, "NotFoundError", Some("model")));
        assert_eq!(unknown.message, "The model `nope` does not exist. Valid aliases: tiny, other.");
        for (body, kind, param) in [
            (r#"{"model":"tiny","messages":"#, "Bad Request", Some("body")),
            ("[]", "Bad Request", Some("body")),
            (r#"{"model":"tiny"}"#, "Bad Request", Some("body.messages")),
            (r#"{"messages":[]}"#, "BadRequestError", None),
            (r#"{"messages":[{"role":"user","content":"x"}],"max_tokens":0}"#, "BadRequestError", Some("max_tokens")),
            (
                r#"{"messages":[{"role":"user","content":"x"}],"max_tokens":99999}"#,
                "BadRequestError",
                Some("max_tokens"),
            ),
        ] {
            let refusal = chat(body).unwrap_err();
            assert_eq!((refusal.status, refusal.kind, refusal.param.as_deref()), (400, kind, param), "{body}");
        }
    }

    #[test]
    fn prompts_come_as_texts_lists_and_token_ids() {
        let count = |prompt: &str| {
            let body = format!(r#"{{"model":"tiny","prompt":{prompt}}}"#);
            read(Endpoint::Completions, body.as_bytes(), &models(), 1).map(|request| request.texts.len())
        };
        assert_eq!(count(r#""a b""#).unwrap(), 1);
        assert_eq!(count(r#"["a","b"]"#).unwrap(), 2);
        assert_eq!(count("[1,2,3]").unwrap(), 1);
        assert_eq!(count("[[1,2],[3]]").unwrap(), 2);
        assert_eq!(count("[]").unwrap_err().param.as_deref(), Some("prompt"));
    }

    proptest! {
        #[test]
        fn no_body_panics(body in proptest::collection::vec(any::<u8>(), 0..200), pick in 0usize..7) {
            let _ = read(Endpoint::ALL[pick], &body, &models(), 1);
        }

        #[test]
        fn a_chat_is_known_by_its_last_user_message(said in "\\PC{0,40}") {
            let body = serde_json::json!({"messages": [{"role": "user", "content": "first"},
                {"role": "user", "content": said}, {"role": "assistant", "content": "so"}]}).to_string();
            let request = read(Endpoint::ChatCompletions, body.as_bytes(), &models(), 1).unwrap();
            prop_assert_eq!(&request.texts, &[Cow::from(said)]);
        }
    }
}
