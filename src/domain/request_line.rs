//! One line of an input file: a request in OpenAI's batch format.
//!
//! A line is scanned once and no tree is built: the body's bytes reach the worker as the client wrote them.

mod problem;
mod scan;
mod skip;

use std::borrow::Cow;

pub use problem::{Field, LineError, Problem};

use super::Endpoint;

/// The longest `custom_id`, in bytes of UTF-8 once its escapes are decoded.
pub const MAX_CUSTOM_ID_BYTES: usize = 512;
/// The longest `model`, in bytes. It is kept with each file and batch; the longest that workers serve are paths.
pub const MAX_MODEL_BYTES: usize = 1_024;

/// A valid line, borrowed from its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestLine<'a> {
    /// The client's name for the request, escapes decoded.
    pub custom_id: Cow<'a, str>,
    /// The `custom_id` as the client wrote it: a JSON string with its quotes, for the result line.
    pub custom_id_json: &'a str,
    /// The endpoint that its `url` names.
    pub endpoint: Endpoint,
    /// The body's `model`.
    pub model: Cow<'a, str>,
    /// The body, a JSON object, byte for byte.
    pub body: &'a str,
    /// Facts of the body that affect how and in which order it is sent.
    pub hints: Hints<'a>,
}

/// Facts of a body that no rule depends on and that are not validated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hints<'a> {
    /// The JSON of what the model reads: `messages`, `prompt` or `input`. Empty if there is none.
    pub prompt: &'a str,
    /// The most tokens of the answer, if the body says so.
    pub max_tokens: Option<u32>,
    /// Whether it has a `priority` of its own.
    pub has_priority: bool,
}

/// Parses a line, with or without its line end. Unknown fields are accepted and ignored. Takes time and memory in
/// proportion to the line, however it is nested.
///
/// # Errors
/// [`LineError`]: the first thing that is wrong with it.
pub fn parse(line: &[u8]) -> Result<RequestLine<'_>, LineError> {
    let text = utf8(line).map_err(|problem| LineError { custom_id: None, problem })?;
    scan::request(text)
}

/// Validates a request body without a line and returns its model, by the rules of a line's `body`.
///
/// # Errors
/// [`Problem`].
pub fn model_of(body: &[u8]) -> Result<Cow<'_, str>, Problem> {
    scan::body(utf8(body)?)
}

/// Whether a line holds nothing but JSON whitespace: such lines are skipped, but they count in line numbers.
#[must_use]
pub fn is_blank(line: &[u8]) -> bool {
    line.iter().all(|byte| matches!(byte, b' ' | b'\t' | b'\r'))
}

/// The lines of a segment that are not blank, without their line feeds, each with its place in the segment: bit `i` of a
/// [`super::LineSet`].
pub fn lines(segment: &[u8]) -> impl Iterator<Item = (u32, &[u8])> {
    let mut start = 0;
    let ends = memchr::memchr_iter(b'\n', segment).chain(std::iter::once(segment.len()));
    let lines = ends.map(move |end| {
        let line = &segment[start.min(end)..end];
        start = end + 1;
        line
    });
    (0..).zip(lines).filter(|(_, line)| !is_blank(line))
}

fn utf8(bytes: &[u8]) -> Result<&str, Problem> {
    simdutf8::basic::from_utf8(bytes).map_err(|_| Problem::NotUtf8 {
        at: std::str::from_utf8(bytes).map_or_else(|error| error.valid_up_to(), str::len),
    })
}

#[cfg(test)]
mod tests;
