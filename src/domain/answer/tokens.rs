//! Reads the token counts of a `usage` object, each by itself, so that an invalid field affects no other.

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::domain::TokenUsage;

/// A count in an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Count {
    #[default]
    Missing,
    Read(i64),
    /// Not a whole number of at least 0, or present twice.
    Odd,
}

impl Count {
    fn set(&mut self, value: &RawValue) {
        let read = match value.get() {
            // As if it was not there.
            "null" => return,
            text => text.parse::<i64>().ok().filter(|count| *count >= 0),
        };
        *self = match (*self, read) {
            (Self::Missing, Some(count)) => Self::Read(count),
            _ => Self::Odd,
        };
    }

    fn known(self) -> Option<i64> {
        match self {
            Self::Read(count) => Some(count),
            Self::Missing | Self::Odd => None,
        }
    }

    /// This count, or `other` if it is missing: two names for the same count are in use, sometimes in one answer.
    fn or(self, other: Self) -> i64 {
        self.known().or_else(|| other.known()).unwrap_or_default()
    }
}

#[derive(Default)]
struct Usage {
    prompt: Count,
    input: Count,
    completion: Count,
    output: Count,
    total: Count,
    prompt_cached: Count,
    input_cached: Count,
    completion_reasoning: Count,
    output_reasoning: Count,
}

/// Reads a `usage` object of the chat, completions, embeddings or responses API. Missing or invalid counts are 0; a
/// missing or invalid total is the sum of input and output.
pub(super) fn usage_of(json: &RawValue) -> TokenUsage {
    let mut usage = Usage::default();
    each_field(json.get(), &mut |key, value| match key {
        "prompt_tokens" => usage.prompt.set(value),
        "input_tokens" => usage.input.set(value),
        "completion_tokens" => usage.completion.set(value),
        "output_tokens" => usage.output.set(value),
        "total_tokens" => usage.total.set(value),
        "prompt_tokens_details" => detail(value, "cached_tokens", &mut usage.prompt_cached),
        "input_tokens_details" => detail(value, "cached_tokens", &mut usage.input_cached),
        "completion_tokens_details" => detail(value, "reasoning_tokens", &mut usage.completion_reasoning),
        "output_tokens_details" => detail(value, "reasoning_tokens", &mut usage.output_reasoning),
        _ => {}
    });
    let (input, output) = (usage.prompt.or(usage.input), usage.completion.or(usage.output));
    TokenUsage {
        input,
        cached_input: usage.prompt_cached.or(usage.input_cached),
        output,
        reasoning: usage.completion_reasoning.or(usage.output_reasoning),
        total: usage.total.known().unwrap_or_else(|| input.saturating_add(output)),
    }
}

fn detail(json: &RawValue, name: &str, into: &mut Count) {
    each_field(json.get(), &mut |key, value| {
        if key == name {
            into.set(value);
        }
    });
}

/// Calls `take` with each field of an object. Anything but an object has none.
fn each_field<'a>(json: &'a str, take: &mut dyn FnMut(&str, &'a RawValue)) {
    struct Each<'t, 'a>(&'t mut dyn FnMut(&str, &'a RawValue));

    impl<'a> Visitor<'a> for Each<'_, 'a> {
        type Value = ();

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<A: MapAccess<'a>>(self, mut map: A) -> Result<(), A::Error> {
            while let Some(key) = map.next_key::<std::borrow::Cow<'_, str>>()? {
                (self.0)(&key, map.next_value()?);
            }
            Ok(())
        }
    }

    // What could not be read to its end, a lone surrogate in a key, costs what stands behind it.
    if json.starts_with('{') {
        let _ = serde_json::Deserializer::from_str(json).deserialize_map(Each(take));
    }
}
