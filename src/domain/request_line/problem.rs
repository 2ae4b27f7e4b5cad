//! The problems of a line, with messages that say what is expected.

use std::fmt;

use super::{MAX_CUSTOM_ID_BYTES, MAX_MODEL_BYTES};
use crate::domain::Endpoint;

/// Characters of a client's text that a message repeats.
const SHOWN: usize = 60;

/// Why a line is not a valid request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{problem}")]
pub struct LineError {
    /// The request's `custom_id`, if it could be read; a too long one is cut.
    pub custom_id: Option<String>,
    /// What is wrong.
    pub problem: Problem,
}

/// The fields that rules are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    CustomId,
    Method,
    Url,
    Body,
    /// `body.model`
    Model,
    /// `body.stream`
    Stream,
}

impl Field {
    /// The field's path in the line.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Self::CustomId => "custom_id",
            Self::Method => "method",
            Self::Url => "url",
            Self::Body => "body",
            Self::Model => "body.model",
            Self::Stream => "body.stream",
        }
    }

    fn expected(self) -> String {
        match self {
            Self::CustomId => format!("a string of 1 to {MAX_CUSTOM_ID_BYTES} bytes, unique in the file"),
            Self::Method => "\"POST\"".to_owned(),
            Self::Url => format!("one of {}", Endpoint::list()),
            Self::Body => "a JSON object".to_owned(),
            Self::Model => format!("a string of 1 to {MAX_MODEL_BYTES} bytes"),
            Self::Stream => "false, null or no such field: batch results are not streamed".to_owned(),
        }
    }
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// Not UTF-8.
    NotUtf8 {
        /// The first bad byte, from 0.
        at: usize,
    },
    NotJson {
        /// Why not.
        message: String,
        /// The byte offset, from 0.
        at: usize,
    },
    /// A file of another format.
    OtherFormat(&'static str),
    /// JSON, but not an object.
    NotAnObject {
        /// The kind of value found.
        found: &'static str,
    },
    /// A field is not there.
    Missing(Field),
    /// A field appears more than once: readers differ in which one counts.
    Twice(Field),
    /// A field has a value of the wrong kind.
    WrongKind {
        field: Field,
        /// The kind of value found.
        found: &'static str,
    },
    /// A field has a text that is not allowed.
    WrongText {
        field: Field,
        /// The text, cut if long.
        found: String,
    },
    /// A string is empty.
    Empty(Field),
    /// A string is too long.
    TooLong {
        field: Field,
        /// Its size in bytes.
        bytes: usize,
    },
    /// A string has a character that can't be stored or shown.
    Character {
        field: Field,
        /// The first of them.
        found: char,
    },
    /// The request asks for a stream.
    Stream,
}

impl Problem {
    /// OpenAI's code for such a mistake.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotUtf8 { .. } | Self::NotJson { .. } | Self::OtherFormat(_) | Self::NotAnObject { .. } => {
                "invalid_json_line"
            }
            Self::Missing(Field::Model) => "invalid_request",
            Self::Missing(_) => "missing_required_parameter",
            Self::WrongText { field: Field::Method, .. } => "invalid_method",
            Self::WrongText { field: Field::Url, .. } => "invalid_url",
            Self::Stream => "streaming_unsupported",
            Self::WrongText { .. }
            | Self::Twice(_)
            | Self::WrongKind { .. }
            | Self::Empty(_)
            | Self::TooLong { .. }
            | Self::Character { .. } => "invalid_request",
        }
    }

    /// The field that is wrong. `None`: the line as a whole.
    #[must_use]
    pub fn field(&self) -> Option<Field> {
        match self {
            Self::NotUtf8 { .. } | Self::NotJson { .. } | Self::OtherFormat(_) | Self::NotAnObject { .. } => None,
            Self::Missing(field)
            | Self::Twice(field)
            | Self::WrongKind { field, .. }
            | Self::WrongText { field, .. }
            | Self::Empty(field)
            | Self::TooLong { field, .. }
            | Self::Character { field, .. } => Some(*field),
            Self::Stream => Some(Field::Stream),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotUtf8 { at } => write!(
                f,
                "not UTF-8 at byte {}; expected UTF-8 text: is the file in Latin-1 or Windows-1252? Convert it first, such as by \
                 iconv -f WINDOWS-1252 -t UTF-8",
                at + 1
            ),
            Self::NotJson { message, at } => {
                write!(f, "not valid JSON: {message} at byte {}; expected one JSON object on one line", at + 1)
            }
            Self::OtherFormat(what) => write!(f, "not JSONL: {what}"),
            Self::NotAnObject { found: "an array" } => f.write_str(
                "found an array; expected one JSON object on one line: the file is JSONL, not one JSON list",
            ),
            Self::NotAnObject { found } => write!(f, "found {found}; expected a JSON object"),
            Self::Missing(field) => write!(f, "{} is missing; expected {}", field.path(), field.expected()),
            Self::Twice(field) => write!(f, "{} is given more than once; expected it once", field.path()),
            Self::WrongKind { field, found } => {
                write!(f, "{} is {found}; expected {}", field.path(), field.expected())
            }
            Self::WrongText { field, found } => {
                write!(f, "{} is {found:?}; ", field.path())?;
                match meant(found).filter(|_| *field == Field::Url) {
                    Some(meant) => write!(f, "did you mean {meant}? Expected {}", field.expected()),
                    None => write!(f, "expected {}", field.expected()),
                }
            }
            Self::Empty(field) => write!(f, "{} is empty; expected {}", field.path(), field.expected()),
            Self::TooLong { field, bytes } => {
                write!(f, "{} has {bytes} bytes; expected {}", field.path(), field.expected())
            }
            Self::Character { field, found } => {
                let code = u32::from(*found);
                write!(f, "{} has the character U+{code:04X}; expected {}", field.path(), field.expected())?;
                f.write_str(", without control characters")
            }
            Self::Stream => write!(f, "{} is on; expected {}", Field::Stream.path(), Field::Stream.expected()),
        }
    }
}

impl std::error::Error for Problem {}

/// The endpoint that was probably meant by a url without `/v1`, with a host, or with a slash at its end.
fn meant(url: &str) -> Option<Endpoint> {
    let url = url.trim_end_matches('/');
    let bare = |endpoint: &Endpoint| endpoint.path().trim_start_matches("/v1").to_owned();
    let ends = Endpoint::ALL.into_iter().filter(|endpoint| format!("/{url}").ends_with(&bare(endpoint)));
    ends.max_by_key(|endpoint| endpoint.path().len())
}

/// Describes what is wrong with a text that is not JSON: `reason` is `serde_json`'s message, `rest` the text at the
/// error.
pub(super) fn not_json(reason: &str, rest: &str) -> String {
    let between_values = reason.starts_with("expected") || reason == "key must be a string";
    if let Some(odd) = odd(rest).filter(|_| between_values) {
        return odd;
    }
    let words = match reason {
        "EOF while parsing a string" => "the text ends inside a string",
        "EOF while parsing an object" => "the text ends inside an object",
        "EOF while parsing a list" => "the text ends inside an array",
        "EOF while parsing a value" => "the text ends where a value was expected",
        "expected value" => "expected a value",
        "expected ident" => "expected true, false or null",
        "key must be a string" => "expected a key in quotes",
        "trailing comma" => "a comma before a closing bracket",
        "invalid number" => "a number that JSON does not have, such as 01, .5, +1 or 1.",
        "number out of range" => "a number that is too large",
        "invalid escape" => r"a \ that does not begin an escape (write a backslash itself as \\)",
        "lone leading surrogate in hex escape" | "unexpected end of hex escape" | "invalid unicode code point" => {
            r"half of a surrogate pair (an escape from \ud800 to \udfff without its other half): a text was cut inside an emoji"
        }
        _ if reason.starts_with("control character") => {
            r"a control character inside a string (write it as an escape, such as \n or \u0000)"
        }
        other => other,
    };
    words.to_owned()
}

/// The format of a line that begins no object and is not JSON, with what to do.
pub(super) fn other_format(line: &str) -> Option<&'static str> {
    if line.starts_with('[') {
        return Some(
            "a list over several lines: the file is one JSON list; write each of its objects on one line, such as by \
             jq -c '.[]'",
        );
    }
    if line.starts_with('<') {
        return Some("this is HTML or XML: a web page or an error may have been saved instead of the file");
    }
    let key = line.strip_prefix('"').and_then(|key| key.split_once('"'));
    if key.is_some_and(|(_, rest)| rest.trim_start().starts_with(':')) {
        return Some("the braces around the object are missing, or it is spread over several lines");
    }
    is_row(line).then_some(
        "this is a row of a table: the file is CSV or TSV; write each request as a JSON object on one line, such as by \
         json.dumps",
    )
}

/// Whether a line looks like a row of a table: its first cell, in quotes or not, ends with a separator.
fn is_row(line: &str) -> bool {
    const SEPARATORS: [char; 4] = [',', ';', '\t', '|'];
    let rest = match line.strip_prefix('"') {
        Some(quoted) => quoted.split_once('"').map_or("", |(_, rest)| rest),
        None => line.trim_start_matches(|char: char| char.is_alphanumeric() || matches!(char, ' ' | '_' | '-' | '.')),
    };
    rest.starts_with(SEPARATORS) && odd(line).is_none()
}

/// Describes text that is not allowed in JSON at this place, if it is a common mistake.
pub(super) fn odd(rest: &str) -> Option<String> {
    let begins = |words: &[&str]| words.iter().any(|word| rest.starts_with(word));
    let words = if rest.starts_with('\u{feff}') {
        "a byte order mark (U+FEFF), which some editors write and nobody sees, stands in the middle of the file: remove it"
    } else if rest.starts_with('\'') {
        "' is not a quote in JSON: use \", as json.dumps writes it and str() does not"
    } else if begins(&["NaN", "Infinity", "-Infinity"]) {
        "NaN and Infinity are not JSON: use null, or leave the field out"
    } else if begins(&["None", "True", "False"]) {
        "None, True and False are Python's: JSON has null, true and false"
    } else if begins(&["undefined"]) {
        "undefined is JavaScript's: JSON has null"
    } else if begins(&["//", "/*", "#"]) {
        "JSON has no comments"
    } else {
        let odd = rest.chars().next().filter(|char| !char.is_ascii())?;
        return Some(format!("the character U+{:04X} stands outside of a string", u32::from(odd)));
    };
    Some(words.to_owned())
}

/// A client's text as messages repeat it.
pub(super) fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
