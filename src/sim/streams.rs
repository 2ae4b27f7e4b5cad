//! Streamed answers: the same texts as [`super::answers`], a word at a time, as events in the shapes that vLLM 0.32 gives
//! them.

use serde_json::{Value, json};

use super::{answers::text_of, request::Request};
use crate::domain::Endpoint;

/// The events of an answer, in order. `id` and `created` as of [`super::answers::answer`].
pub(super) fn events(endpoint: Endpoint, request: &Request<'_>, id: &str, created: i64) -> Vec<String> {
    let text = text_of(request, &request.texts[0]);
    let words: Vec<&str> = text.split_inclusive(' ').collect();
    match endpoint {
        Endpoint::ChatCompletions => {
            let chunk = |delta: Value, reason: Value| {
                json!({"id": format!("chatcmpl-{id}"), "object": "chat.completion.chunk", "created": created,
                    "model": request.model, "choices": [{"index": 0, "delta": delta, "logprobs": null,
                    "finish_reason": reason}]})
            };
            let begin = chunk(json!({"role": "assistant", "content": ""}), Value::Null);
            let middle = words.iter().map(|word| chunk(json!({"content": word}), Value::Null));
            let end = chunk(json!({}), "length".into());
            done([begin].into_iter().chain(middle).chain([end]))
        }
        Endpoint::Completions => {
            let chunk = |text: &str, reason: Value| {
                json!({"id": format!("cmpl-{id}"), "object": "text_completion", "created": created,
                    "model": request.model, "choices": [{"index": 0, "text": text, "logprobs": null,
                    "finish_reason": reason}]})
            };
            let middle = words.iter().map(|word| chunk(word, Value::Null));
            done(middle.chain([chunk("", "length".into())]))
        }
        Endpoint::Responses => {
            let response = |status: &str, output: Value| {
                json!({"id": format!("resp_{id}"), "object": "response", "created_at": created, "status": status,
                    "model": request.model, "output": output, "parallel_tool_calls": true, "tool_choice": "auto",
                    "tools": [], "error": null, "incomplete_details": null, "instructions": null, "metadata": null,
                    "temperature": 1.0, "top_p": 1.0})
            };
            let whole = json!([{"id": format!("msg_{id}"), "type": "message", "role": "assistant",
                "status": "completed", "content": [{"type": "output_text", "text": text, "annotations": []}]}]);
            let begin = json!({"type": "response.created", "response": response("in_progress", json!([]))});
            let delta = |word: &&str| {
                json!({"type": "response.output_text.delta", "item_id": format!("msg_{id}"), "output_index": 0,
                    "content_index": 0, "delta": word, "logprobs": []})
            };
            let end = json!({"type": "response.completed", "response": response("completed", whole)});
            let all = [begin].into_iter().chain(words.iter().map(delta)).chain([end]);
            all.zip(0..)
                .map(|(mut data, number)| {
                    data["sequence_number"] = json!(number);
                    named(&data)
                })
                .collect()
        }
        Endpoint::Messages => {
            let usage = json!({"input_tokens": request.cost.prompt_tokens, "output_tokens": 0});
            let message = json!({"id": format!("msg_{id}"), "type": "message", "role": "assistant", "content": [],
                "model": request.model, "stop_reason": null, "stop_sequence": null, "usage": usage});
            let delta = |word: &&str| json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}});
            let end = json!({"type": "message_delta",
                "delta": {"stop_reason": "max_tokens", "stop_sequence": null},
                "usage": {"output_tokens": request.cost.completion_tokens}});
            let begin = [
                json!({"type": "message_start", "message": message}),
                json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
            ];
            let end = [json!({"type": "content_block_stop", "index": 0}), end, json!({"type": "message_stop"})];
            begin.into_iter().chain(words.iter().map(delta)).chain(end).map(|data| named(&data)).collect()
        }
        // They have no stream.
        Endpoint::Embeddings | Endpoint::Score | Endpoint::Rerank => Vec::new(),
    }
}

/// Events without names, and the one that ends them.
fn done(all: impl Iterator<Item = Value>) -> Vec<String> {
    all.map(|data| format!("data: {data}\n\n")).chain(["data: [DONE]\n\n".to_owned()]).collect()
}

/// An event that is named by its type.
fn named(data: &Value) -> String {
    format!("event: {}\ndata: {data}\n\n", data["type"].as_str().unwrap_or_default())
}
