//! What can be wrong with a line, in words that say what is expected.

use std::fmt;

use super::{MAX_CUSTOM_ID_BYTES, MAX_MODEL_BYTES};
use crate::domain::Endpoint;

/// How much of a client's own text a message repeats, in characters.
const SHOWN: usize = 60;

/// Why a line is no request.
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
    /// `custom_id`
    CustomId,
    /// `method`
    Method,
    /// `url`
    Url,
    /// `body`
    Body,
    /// `body.model`
    Model,
    /// `body.stream`
    Stream,
}

impl Field {
    /// Its path in the line.
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
    /// Not JSON.
    NotJson {
        /// Why not.
        message: String,
        /// Where, in bytes from 0.
        at: usize,
    },
    /// JSON, but not an object.
    NotAnObject {
        /// What it is.
        found: &'static str,
    },
    /// A field is not there.
    Missing(Field),
    /// A field is there more than once: which one counts would depend on the reader.
    Twice(Field),
    /// A field has a value of the wrong kind.
    WrongKind {
        /// Which.
        field: Field,
        /// What it is.
        found: &'static str,
    },
    /// A field has a text that it can't have.
    WrongText {
        /// Which.
        field: Field,
        /// The text, cut if long.
        found: String,
    },
    /// A string is empty.
    Empty(Field),
    /// A string is too long.
    TooLong {
        /// Which.
        field: Field,
        /// Its size in bytes.
        bytes: usize,
    },
    /// A string has a character that can't be kept or shown.
    Character {
        /// Which.
        field: Field,
        /// The first of them.
        found: char,
    },
    /// The request asks for a stream.
    Stream,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotUtf8 { at } => write!(f, "not UTF-8 at byte {}; expected UTF-8 text", at + 1),
            Self::NotJson { message, at } => {
                write!(f, "not valid JSON: {message} at byte {}; expected one JSON object on one line", at + 1)
            }
            Self::NotAnObject { found } => write!(f, "found {found}; expected a JSON object"),
            Self::Missing(field) => write!(f, "{} is missing; expected {}", field.path(), field.expected()),
            Self::Twice(field) => write!(f, "{} is there more than once; expected it once", field.path()),
            Self::WrongKind { field, found } => {
                write!(f, "{} is {found}; expected {}", field.path(), field.expected())
            }
            Self::WrongText { field, found } => {
                write!(f, "{} is {found:?}; expected {}", field.path(), field.expected())
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

/// A client's text as messages repeat it.
pub(super) fn shown(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
