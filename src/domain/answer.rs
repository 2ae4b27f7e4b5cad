//! Reads a worker's answer in one pass without building a tree: whether it is an answer of its endpoint, whether the
//! engine finished it, and its token counts. Pure.
//!
//! Clients rely on one field of each endpoint's answers, such as `choices` for a chat. A success without that field is
//! really an error. If the engine cut the text off, `finish_reason` or `status` says so; vLLM answers `abort` to all
//! running requests when it is stopped or put to sleep.

mod broken;
mod fields;
mod tokens;

use serde_json::value::RawValue;
use smallvec::SmallVec;

pub use broken::{NotJson, excerpt};

use self::fields::{Choices, Field, Fields};
use super::{Endpoint, TokenUsage};

/// A body that is JSON.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The token counts; missing or invalid ones are 0.
    pub usage: TokenUsage,
    /// Whether the body is an answer, and if not, why.
    pub verdict: Verdict,
}

/// Whether a body is an answer of its endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Answer(Ending),
    /// The engine stopped before the text was complete; says why.
    CutOff(String),
    /// It is not an answer; says why.
    Bad(String),
}

/// What an answer says about how its text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// A reason that leaves the text complete, or as long as the request allows.
    Named,
    /// The field is `null`.
    Null,
    /// There is no such field.
    Missing,
    /// Answers of this endpoint have no such field.
    NotAsked,
}

/// Reads the body of a success.
///
/// # Errors
/// [`NotJson`].
pub fn read(endpoint: Endpoint, bytes: &[u8]) -> Result<Reading, NotJson> {
    let fields = Fields::read(bytes)?;
    Ok(Reading { usage: fields.usage.map(tokens::usage_of).unwrap_or_default(), verdict: verdict(endpoint, &fields) })
}

/// Whether a body is JSON.
#[must_use]
pub fn is_json(bytes: &[u8]) -> bool {
    let text = simdutf8::basic::from_utf8(bytes).ok();
    text.is_some_and(|text| serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok())
}

fn verdict(endpoint: Endpoint, fields: &Fields<'_>) -> Verdict {
    if !fields.is_object {
        return Verdict::Bad("it is not a JSON object".into());
    }
    match endpoint {
        Endpoint::ChatCompletions | Endpoint::Completions => match (&fields.choices, fields.content) {
            (Some(choices), _) if choices.list == Field::Filled => of_choices(choices),
            // The form of Anthropic's API and llama.cpp's own.
            (_, Some(Field::Empty | Field::Filled | Field::Text)) => of_reason("stop_reason", fields.stop_reason),
            (choices, _) => lacks("choices", choices.as_ref().map(|choices| choices.list), fields),
        },
        Endpoint::Messages => match fields.content {
            Some(Field::Empty | Field::Filled) => of_reason("stop_reason", fields.stop_reason),
            content => lacks("content", content, fields),
        },
        Endpoint::Responses => match fields.output {
            Some(Field::Empty | Field::Filled) => of_reason("status", fields.status),
            output => lacks("output", output, fields),
        },
        Endpoint::Embeddings => match fields.data {
            Some(Field::Filled) => Verdict::Answer(Ending::NotAsked),
            data => lacks("data", data, fields),
        },
        // Both shapes are in use for both.
        Endpoint::Score | Endpoint::Rerank => match (fields.data, fields.results) {
            (Some(Field::Empty | Field::Filled), _) | (_, Some(Field::Empty | Field::Filled)) => {
                Verdict::Answer(Ending::NotAsked)
            }
            (data, _) if endpoint == Endpoint::Score => lacks("data", data, fields),
            (_, results) => lacks("results", results, fields),
        },
    }
}

fn lacks(name: &str, found: Option<Field>, fields: &Fields<'_>) -> Verdict {
    Verdict::Bad(match found {
        None if fields.has_error => format!("it contains an error and no `{name}`"),
        None => format!("it has no `{name}`"),
        Some(Field::Empty) => format!("its `{name}` is empty"),
        Some(Field::Filled | Field::Text | Field::Other) => format!("its `{name}` is not a list"),
    })
}

/// One choice that was cut off makes the whole answer incomplete, because the request asked for all of them.
fn of_choices(choices: &Choices<'_>) -> Verdict {
    if choices.has_piece {
        return Verdict::Bad("it is one piece of a stream".into());
    }
    let mut endings = SmallVec::<[Ending; 4]>::new();
    for reason in &choices.reasons {
        match of_reason("finish_reason", *reason) {
            Verdict::Answer(ending) => endings.push(ending),
            problem @ (Verdict::CutOff(_) | Verdict::Bad(_)) => return problem,
        }
    }
    if !endings.contains(&Ending::Named) {
        let null = endings.contains(&Ending::Null);
        return Verdict::Answer(if null { Ending::Null } else { Ending::Missing });
    }
    match endings.iter().all(|ending| *ending == Ending::Named) {
        true => Verdict::Answer(Ending::Named),
        false => Verdict::Bad("one of its choices names no `finish_reason`, and another does".into()),
    }
}

/// Reads a `finish_reason`, a `stop_reason` or a `status`. An unknown word counts as a normal end, because new ones
/// appear every year.
fn of_reason(name: &str, value: Option<&RawValue>) -> Verdict {
    let Some(value) = value else { return Verdict::Answer(Ending::Missing) };
    let Some(word) = fields::word_of(value) else { return Verdict::Answer(Ending::Null) };
    match word.to_ascii_lowercase().as_str() {
        // Some servers write these while they generate.
        "" | "null" | "none" => Verdict::Answer(Ending::Null),
        "abort" | "aborted" | "error" | "cancelled" | "canceled" | "failed" => {
            Verdict::CutOff(format!("the engine cut it off (`{name}` is {word:?})"))
        }
        "in_progress" | "queued" | "timeout" | "timed_out" => {
            Verdict::Bad(format!("its text is not complete (`{name}` is {word:?})"))
        }
        _ => Verdict::Answer(Ending::Named),
    }
}

#[cfg(test)]
mod tests;
