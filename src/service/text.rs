//! Clients' texts in messages, and what is wrong with them.

use crate::domain::request_line::{self, Problem};

/// A client's text, fit for a message.
#[must_use]
pub fn short(text: &str) -> String {
    if text.chars().count() <= 80 {
        text.to_owned()
    } else {
        format!("{}…", text.chars().take(79).collect::<String>())
    }
}

/// Why a request's body can't be read, for people: `error` is what the reader says, in words that only its authors know.
#[must_use]
pub fn not_json(body: &[u8], error: &serde_json::Error) -> String {
    let words = error.to_string();
    if let Some((_, rest)) = words.split_once("duplicate field `") {
        return format!("the field {:?} is there twice", rest.split('`').next().unwrap_or_default());
    }
    if words.starts_with("recursion limit exceeded") {
        return "it is nested too deeply".to_owned();
    }
    match request_line::model_of(body) {
        Err(Problem::NotUtf8 { at }) => format!("not UTF-8 at byte {}", at + 1),
        Err(Problem::NotJson { message, at }) => format!("{message} at byte {}", at + 1),
        // The line's reader minds less.
        Ok(_) | Err(_) => words,
    }
}
