//! Describes what is wrong with a body that is not JSON.

use std::fmt::Write;

/// Why a body is not JSON.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct NotJson {
    why: String,
    is_page: bool,
}

impl NotJson {
    /// `error` is the JSON reader's error; `None` if the text is not UTF-8.
    pub(super) fn of(bytes: &[u8], error: Option<&serde_json::Error>) -> Self {
        Self { why: known(bytes).map_or_else(|| at(bytes, error), str::to_owned), is_page: is_page(bytes, error) }
    }

    /// Whether it may come from a proxy and not from an engine: a page, plain text, or an answer that ends early.
    #[must_use]
    pub fn is_page(&self) -> bool {
        self.is_page
    }
}

fn is_page(bytes: &[u8], error: Option<&serde_json::Error>) -> bool {
    let text = bytes.trim_ascii_start();
    let is_stream = text.starts_with(b"data:") || text.starts_with(b"event:");
    let is_text = text.first().is_some_and(|first| *first == b'<' || first.is_ascii_alphabetic());
    error.is_some_and(|error| error.is_eof() || (is_text && !is_stream))
}

/// The format that the first bytes reveal.
fn known(bytes: &[u8]) -> Option<&'static str> {
    let text = bytes.trim_ascii_start();
    let begins = |word: &str| text.len() >= word.len() && text[..word.len()].eq_ignore_ascii_case(word.as_bytes());
    Some(match bytes {
        _ if text.is_empty() => "it is empty",
        [0xef, 0xbb, 0xbf, ..] => "it begins with a byte order mark, which JSON does not allow",
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, b'{' | b'[', ..] | [b'{' | b'[', 0, ..] => {
            "it is UTF-16, and JSON is UTF-8"
        }
        [0x1f, 0x8b, ..] => "it is gzip, and no Content-Encoding says so",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is zstd, and no Content-Encoding says so",
        _ if begins("<!doctype html") || begins("<html") => "it is an HTML page",
        _ if begins("<") => "it is markup such as HTML or XML",
        _ if begins("data:") || begins("event:") || begins(": ") => {
            "it is an event stream, although the request did not ask for one"
        }
        _ => return None,
    })
}

fn at(bytes: &[u8], error: Option<&serde_json::Error>) -> String {
    let Some(error) = error else {
        let place = std::str::from_utf8(bytes).err().map_or(0, |error| error.valid_up_to());
        return format!("byte {place} is not UTF-8");
    };
    if error.is_eof() {
        return format!("it ends early, after byte {}", bytes.len());
    }
    let place = place_of(bytes, error);
    let around = &bytes[place.saturating_sub(4)..bytes.len().min(place + 9)];
    for word in ["NaN", "Infinity"] {
        if around.windows(word.len()).any(|some| some == word.as_bytes()) {
            return format!("byte {place}: {word} is not JSON");
        }
    }
    // Without the reader's own line and column, which say the same in another way.
    let said = error.to_string();
    let said = said.rsplit_once(" at line ").map_or(said.as_str(), |(said, _)| said);
    format!("byte {place}: {said}")
}

/// The byte offset of an error, from 0.
fn place_of(bytes: &[u8], error: &serde_json::Error) -> usize {
    let lines_before = error.line().saturating_sub(1);
    let start = match lines_before {
        0 => 0,
        _ => memchr::memchr_iter(b'\n', bytes).nth(lines_before - 1).map_or(0, |at| at + 1),
    };
    (start + error.column().saturating_sub(1)).min(bytes.len())
}

/// The first bytes of a body, at most `most`, as one line of text; control characters and invalid UTF-8 are escaped.
#[must_use]
pub fn excerpt(bytes: &[u8], most: usize) -> String {
    let shown = &bytes[..bytes.len().min(most)];
    let mut text = String::with_capacity(shown.len() + 8);
    for chunk in shown.utf8_chunks() {
        for character in chunk.valid().chars() {
            match character {
                '\n' | '\r' | '\t' => text.extend(character.escape_default()),
                // Writing to a String does not fail.
                _ if character.is_control() => {
                    let _ = write!(text, "\\x{:02x}", u32::from(character));
                }
                _ => text.push(character),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    if bytes.len() > most {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::read;
    use crate::domain::Endpoint;

    #[test]
    fn what_a_proxy_sends_is_told_from_what_an_engine_sends() {
        for (bytes, is_page) in [
            (&b"<html>log in</html>"[..], true),
            (b"", true),
            (b"no healthy upstream", true),
            (br#"{"id":"chatcmpl-1","choices":[{"ind"#, true),
            (br#"{"choices":[],"logprob":-Infinity}"#, false),
            (b"data: {\"choices\":[]}\n\n", false),
            (b"\x1f\x8b\x08", false),
        ] {
            let not_json = read(Endpoint::ChatCompletions, bytes).unwrap_err();
            assert_eq!(not_json.is_page(), is_page, "{not_json}");
        }
    }
}
