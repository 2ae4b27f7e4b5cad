//! Answers in the shapes that vLLM 0.32 gives them, written without building a tree. What they say follows from the request
//! and the seed alone, so a test can tell whether an answer belongs to its request.

use std::fmt::Write;

use base64::Engine as _;

use super::{
    engine::splitmix64,
    request::{MAX_MODEL_LEN, Refusal, Request, fingerprint},
};
use crate::domain::Endpoint;

/// How much of a prompt an answer repeats, in bytes.
const ECHO: usize = 256;
/// The dimensions of an embedding.
const DIMENSIONS: u64 = 8;

/// The answer to a request. `id` is its id without the prefix, plain ASCII; `created` in seconds since the Unix epoch.
pub(super) fn answer(endpoint: Endpoint, request: &Request<'_>, id: &str, created: i64, seed: u64) -> String {
    match endpoint {
        Endpoint::ChatCompletions => chat(request, id, created),
        Endpoint::Completions => completions(request, id, created),
        Endpoint::Embeddings => embeddings(request, id, created, seed),
        Endpoint::Responses => responses(request, id, created),
        Endpoint::Score => score(request, id, created, seed),
        Endpoint::Rerank => rerank(request, id, seed),
        Endpoint::Messages => messages(request, id),
    }
}

/// The answer with another reason for its end. In its texts quotes are escaped, so only the fields are found.
pub(super) fn cut_off(answer: &str, reason: Option<&str>) -> String {
    let reason = reason.map_or_else(|| "null".to_owned(), quote);
    answer
        .replace(r#""finish_reason":"length""#, &format!(r#""finish_reason":{reason}"#))
        .replace(r#""stop_reason":"max_tokens""#, &format!(r#""stop_reason":{reason}"#))
        .replace(r#""status":"incomplete""#, &format!(r#""status":{reason}"#))
}

/// An error, as vLLM shapes it.
pub(super) fn error(refusal: &Refusal) -> String {
    let Refusal { status, kind, message, param } = refusal;
    let param = param.as_deref().map_or_else(|| "null".to_owned(), quote);
    format!(r#"{{"error":{{"message":{},"type":"{kind}","param":{param},"code":{status}}}}}"#, quote(message))
}

/// The answer of `/v1/models`.
pub(super) fn models(models: &[String], created: i64) -> String {
    let list = joined(models, |model| {
        let model = quote(model);
        format!(
            r#"{{"id":{model},"object":"model","created":{created},"owned_by":"vllm","root":{model},"parent":null,"max_model_len":{MAX_MODEL_LEN},"permission":[]}}"#
        )
    });
    format!(r#"{{"object":"list","data":[{list}]}}"#)
}

fn chat(request: &Request<'_>, id: &str, created: i64) -> String {
    let content = said(request, &request.texts[0]);
    format!(
        r#"{{"id":"chatcmpl-{id}","object":"chat.completion","created":{created},"model":{model},"choices":[{{"index":0,"message":{{"role":"assistant","content":{content},"refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null}},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}}],"service_tier":null,"system_fingerprint":"tidemill-sim","usage":{usage},"prompt_logprobs":null,"prompt_token_ids":null,"kv_transfer_params":null}}"#,
        model = quote(&request.model),
        usage = usage(request),
    )
}

fn messages(request: &Request<'_>, id: &str) -> String {
    let text = said(request, &request.texts[0]);
    format!(
        r#"{{"id":"msg_{id}","type":"message","role":"assistant","content":[{{"type":"text","text":{text}}}],"model":{model},"stop_reason":"max_tokens","stop_sequence":null,"usage":{{"input_tokens":{input},"output_tokens":{output}}}}}"#,
        model = quote(&request.model),
        input = request.cost.prompt_tokens,
        output = request.cost.completion_tokens,
    )
}

fn completions(request: &Request<'_>, id: &str, created: i64) -> String {
    let choices = joined(request.texts.iter().enumerate(), |(index, text)| {
        let text = said(request, text);
        format!(
            r#"{{"index":{index},"text":{text},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null}}"#
        )
    });
    format!(
        r#"{{"id":"cmpl-{id}","object":"text_completion","created":{created},"model":{model},"choices":[{choices}],"service_tier":null,"system_fingerprint":"tidemill-sim","usage":{usage},"kv_transfer_params":null}}"#,
        model = quote(&request.model),
        usage = usage(request),
    )
}

fn responses(request: &Request<'_>, id: &str, created: i64) -> String {
    let (input, output) = (request.cost.prompt_tokens, request.cost.completion_tokens);
    let text = said(request, &request.texts[0]);
    format!(
        r#"{{"id":"resp_{id}","created_at":{created},"incomplete_details":{{"reason":"max_output_tokens"}},"instructions":null,"metadata":null,"model":{model},"object":"response","output":[{{"id":"msg_{id}","content":[{{"annotations":[],"text":{text},"type":"output_text","logprobs":null}}],"role":"assistant","status":"completed","type":"message"}}],"parallel_tool_calls":true,"temperature":1.0,"tool_choice":"none","tools":[],"top_p":1.0,"background":false,"max_output_tokens":{output},"status":"incomplete","usage":{{"input_tokens":{input},"input_tokens_details":{{"cached_tokens":0}},"output_tokens":{output},"output_tokens_details":{{"reasoning_tokens":0}},"total_tokens":{total}}}}}"#,
        model = quote(&request.model),
        total = input + output,
    )
}

fn embeddings(request: &Request<'_>, id: &str, created: i64, seed: u64) -> String {
    let data = joined(request.texts.iter().enumerate(), |(index, text)| {
        let vector = vector(fingerprint(seed, text));
        let embedding = if request.base64 {
            let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
            format!("\"{}\"", base64::engine::general_purpose::STANDARD.encode(bytes))
        } else {
            format!("[{}]", joined(vector, |value| value.to_string()))
        };
        format!(r#"{{"index":{index},"object":"embedding","embedding":{embedding}}}"#)
    });
    list("embd", request, id, created, &data)
}

fn score(request: &Request<'_>, id: &str, created: i64, seed: u64) -> String {
    let data = joined(scores(request, seed), |(index, score)| {
        format!(r#"{{"index":{index},"object":"score","score":{score}}}"#)
    });
    list("score", request, id, created, &data)
}

fn rerank(request: &Request<'_>, id: &str, seed: u64) -> String {
    let mut scores = scores(request, seed);
    scores.sort_by(|a, b| b.1.total_cmp(&a.1));
    let results = joined(scores.into_iter().take(request.top_n), |(index, score)| {
        let text = request.texts.get(index).map_or_else(|| "null".to_owned(), |text| quote(text));
        format!(r#"{{"index":{index},"document":{{"text":{text},"multi_modal":null}},"relevance_score":{score}}}"#)
    });
    let (model, tokens) = (quote(&request.model), request.cost.prompt_tokens);
    format!(
        r#"{{"id":"rerank-{id}","model":{model},"usage":{{"prompt_tokens":{tokens},"total_tokens":{tokens}}},"results":[{results}]}}"#
    )
}

fn list(prefix: &str, request: &Request<'_>, id: &str, created: i64, data: &str) -> String {
    let (model, usage) = (quote(&request.model), usage(request));
    format!(
        r#"{{"id":"{prefix}-{id}","object":"list","created":{created},"model":{model},"data":[{data}],"usage":{usage}}}"#
    )
}

fn usage(request: &Request<'_>) -> String {
    let (prompt, completion) = (request.cost.prompt_tokens, request.cost.completion_tokens);
    format!(
        r#"{{"prompt_tokens":{prompt},"total_tokens":{total},"completion_tokens":{completion},"prompt_tokens_details":null,"completion_tokens_details":null}}"#,
        total = prompt + completion,
    )
}

/// The generated text: the request's fingerprint, then what was asked; where it is to have a form, what was asked alone.
pub(super) fn text_of(request: &Request<'_>, text: &str) -> String {
    let end = text.floor_char_boundary(ECHO);
    if request.is_formed {
        return text[..end].to_owned();
    }
    format!("{:016x} {}", request.fingerprint, &text[..end])
}

/// The generated text as a JSON string.
fn said(request: &Request<'_>, text: &str) -> String {
    quote(&text_of(request, text))
}

/// A unit vector, by the number.
fn vector(of: u64) -> Vec<f32> {
    let raw: Vec<f64> = (0..DIMENSIONS).map(|axis| fraction(splitmix64(of ^ axis)) - 0.5).collect();
    let length = raw.iter().map(|value| value * value).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    #[allow(clippy::cast_possible_truncation)]
    raw.into_iter().map(|value| (value / length) as f32).collect()
}

/// Each text's score against its query.
fn scores(request: &Request<'_>, seed: u64) -> Vec<(usize, f64)> {
    let texts = request.texts.iter().cycle().take(request.texts.len().max(request.queries.len()));
    texts
        .zip(request.queries.iter().cycle())
        .map(|(text, query)| fraction(splitmix64(fingerprint(seed, text) ^ fingerprint(seed, query).rotate_left(1))))
        .enumerate()
        .collect()
}

/// From 0 up to but not including 1.
#[allow(clippy::cast_precision_loss)]
fn fraction(number: u64) -> f64 {
    (number >> 11) as f64 / 2f64.powi(53)
}

/// Quotes a text as a JSON string.
fn quote(text: &str) -> String {
    serde_json::to_string(text).expect("a string is JSON")
}

fn joined<T>(items: impl IntoIterator<Item = T>, mut one: impl FnMut(T) -> String) -> String {
    let mut text = String::new();
    for item in items {
        let comma = if text.is_empty() { "" } else { "," };
        // Writing to a String does not fail.
        let _ = write!(text, "{comma}{}", one(item));
    }
    text
}
