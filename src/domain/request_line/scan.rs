//! The scan of a line. The punctuation of the line's object and of its body is read here, and each value is skipped as a
//! whole, by [`skip`] or, where that does not know, by `serde_json`: so the body is both read and kept as it is in a single
//! pass.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, Visitor},
};

use super::{
    Field, Hints, LineError, MAX_CUSTOM_ID_BYTES, MAX_MODEL_BYTES, Problem, RequestLine,
    problem::{self, shown},
    skip,
};
use crate::domain::{Endpoint, text::is_plain};

/// Reads a line that is UTF-8.
pub(super) fn request(line: &str) -> Result<RequestLine<'_>, LineError> {
    let mut seen = Seen::default();
    let problem = match seen.line(line) {
        Err(problem) => problem,
        Ok(()) => match seen.complete() {
            Ok(request) => return Ok(request),
            Err(problem) => problem,
        },
    };
    Err(LineError { custom_id: seen.custom_id.map(|(text, _)| known(&text)), problem })
}

/// Reads a body that is UTF-8.
pub(super) fn body(text: &str) -> Result<Cow<'_, str>, Problem> {
    let mut seen = Seen::default();
    let mut cursor = Cursor::new(text);
    seen.body(&mut cursor)?;
    cursor.end()?;
    seen.problem.map_or_else(|| seen.model.ok_or(Problem::Missing(Field::Model)), Err)
}

fn known(custom_id: &str) -> String {
    if custom_id.len() > MAX_CUSTOM_ID_BYTES { shown(custom_id) } else { custom_id.to_owned() }
}

/// What has been seen of a line so far.
#[derive(Default)]
struct Seen<'a> {
    custom_id: Option<(Cow<'a, str>, &'a str)>,
    method: bool,
    endpoint: Option<Endpoint>,
    body: Option<&'a str>,
    model: Option<Cow<'a, str>>,
    hints: Hints<'a>,
    /// The fields that have been there, as bits.
    fields: u8,
    /// The first thing that is wrong, though the line is JSON so far: the rest is read on for the `custom_id`.
    problem: Option<Problem>,
}

impl<'a> Seen<'a> {
    fn line(&mut self, line: &'a str) -> Result<(), Problem> {
        let mut cursor = Cursor::new(line);
        if cursor.peek() != Some(b'{') {
            let text = &line[cursor.at..];
            let read = cursor.skip().and_then(|(found, _)| cursor.end().map(|()| found));
            return Err(match read {
                Ok(found) => Problem::NotAnObject { found },
                Err(problem) => problem::other_format(text).map_or(problem, Problem::OtherFormat),
            });
        }
        cursor.object(|key, cursor| match key {
            "custom_id" => self.text(Field::CustomId, cursor),
            "method" => self.text(Field::Method, cursor),
            "url" => self.text(Field::Url, cursor),
            "body" => self.body(cursor),
            _ => cursor.skip().map(drop),
        })?;
        cursor.end()
    }

    fn body(&mut self, cursor: &mut Cursor<'a>) -> Result<(), Problem> {
        if !self.is_first(Field::Body) {
            return cursor.skip().map(drop);
        }
        if cursor.peek() != Some(b'{') {
            let (found, _) = cursor.skip()?;
            self.wrong(Problem::WrongKind { field: Field::Body, found });
            return Ok(());
        }
        let start = cursor.at;
        cursor.object(|key, cursor| match key {
            "model" => self.text(Field::Model, cursor),
            "stream" => self.stream(cursor),
            "messages" | "prompt" | "input" => {
                self.hints.prompt = cursor.skip()?.1;
                Ok(())
            }
            "max_tokens" | "max_completion_tokens" | "max_output_tokens" => {
                let limit = cursor.skip()?.1.parse().ok();
                self.hints.max_tokens = limit.or(self.hints.max_tokens);
                Ok(())
            }
            "priority" => {
                self.hints.has_priority = true;
                cursor.skip().map(drop)
            }
            _ => cursor.skip().map(drop),
        })?;
        self.body = Some(&cursor.text[start..cursor.at]);
        Ok(())
    }

    fn stream(&mut self, cursor: &mut Cursor<'a>) -> Result<(), Problem> {
        let first = self.is_first(Field::Stream);
        let (_, value) = cursor.skip()?;
        // Workers take 1, "true" and "yes" for true as well.
        if first && !matches!(value, "false" | "null") {
            self.wrong(Problem::Stream);
        }
        Ok(())
    }

    fn text(&mut self, field: Field, cursor: &mut Cursor<'a>) -> Result<(), Problem> {
        if !self.is_first(field) {
            return cursor.skip().map(drop);
        }
        if cursor.peek() != Some(b'"') {
            let (found, _) = cursor.skip()?;
            self.wrong(Problem::WrongKind { field, found });
            return Ok(());
        }
        let (text, raw) = cursor.string()?;
        let wrong_text = || Problem::WrongText { field, found: shown(&text) };
        match field {
            Field::CustomId | Field::Model if text.is_empty() => self.wrong(Problem::Empty(field)),
            Field::CustomId => {
                if text.len() > MAX_CUSTOM_ID_BYTES {
                    self.wrong(Problem::TooLong { field, bytes: text.len() });
                }
                self.custom_id = Some((text, raw));
            }
            Field::Model if text.len() > MAX_MODEL_BYTES => self.wrong(Problem::TooLong { field, bytes: text.len() }),
            // No worker's list has one, so nobody could ever serve it.
            Field::Model if !is_plain(&text) => {
                let found = text.chars().find(|char| char.is_control()).unwrap_or_default();
                self.wrong(Problem::Character { field, found });
            }
            Field::Model => self.model = Some(text),
            Field::Method if text == "POST" => self.method = true,
            Field::Url => match text.parse() {
                Ok(endpoint) => self.endpoint = Some(endpoint),
                Err(_) => self.wrong(wrong_text()),
            },
            Field::Method | Field::Body | Field::Stream => self.wrong(wrong_text()),
        }
        Ok(())
    }

    fn is_first(&mut self, field: Field) -> bool {
        let bit = 1 << field as u8;
        let first = self.fields & bit == 0;
        self.fields |= bit;
        if !first {
            self.wrong(Problem::Twice(field));
        }
        first
    }

    fn wrong(&mut self, problem: Problem) {
        self.problem.get_or_insert(problem);
    }

    fn complete(&mut self) -> Result<RequestLine<'a>, Problem> {
        if let Some(problem) = self.problem.take() {
            return Err(problem);
        }
        if self.custom_id.is_none() {
            return Err(Problem::Missing(Field::CustomId));
        }
        if !self.method {
            return Err(Problem::Missing(Field::Method));
        }
        let endpoint = self.endpoint.ok_or(Problem::Missing(Field::Url))?;
        let body = self.body.ok_or(Problem::Missing(Field::Body))?;
        let model = self.model.take().ok_or(Problem::Missing(Field::Model))?;
        // Taken last: until then an error names it.
        let (custom_id, custom_id_json) = self.custom_id.take().ok_or(Problem::Missing(Field::CustomId))?;
        Ok(RequestLine { custom_id, custom_id_json, endpoint, model, body, hints: self.hints })
    }
}

/// A place in a text.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
    /// [`skip`] may be asked.
    fast: bool,
}

impl<'a> Cursor<'a> {
    fn new(text: &'a str) -> Self {
        Self { text, at: 0, fast: skip::may(text) }
    }

    /// The next byte that is not whitespace; the cursor moves to it.
    fn peek(&mut self) -> Option<u8> {
        let bytes = self.text.as_bytes();
        while let Some(byte) = bytes.get(self.at) {
            if !matches!(byte, b' ' | b'\t' | b'\r' | b'\n') {
                return Some(*byte);
            }
            self.at += 1;
        }
        None
    }

    fn eat(&mut self, byte: u8, name: &str) -> Result<(), Problem> {
        if self.peek() != Some(byte) {
            return Err(self.expected(name));
        }
        self.at += 1;
        Ok(())
    }

    fn end(&mut self) -> Result<(), Problem> {
        match self.peek() {
            None => Ok(()),
            Some(next) => {
                let message = match (next, self.text.as_bytes()[..self.at].ends_with(b"\r")) {
                    // Only a line feed ends a line: old Macs' files have none.
                    (_, true) => "more text after the object: lines end with a line feed, not with CR alone,",
                    (b'{', _) => "more text after the object: a second object on the same line",
                    (_, _) => "more text after the object",
                };
                Err(Problem::NotJson { message: message.to_owned(), at: self.at })
            }
        }
    }

    #[cold]
    fn expected(&self, what: &str) -> Problem {
        let ends = if self.at < self.text.len() { "" } else { "the text ends, " };
        let message = problem::odd(&self.text[self.at..]).unwrap_or_else(|| format!("{ends}expected {what}"));
        Problem::NotJson { message, at: self.at }
    }

    /// Reads an object, at whose brace the cursor stands; `value` reads the value of each key.
    fn object(&mut self, mut value: impl FnMut(&str, &mut Self) -> Result<(), Problem>) -> Result<(), Problem> {
        self.at += 1;
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(());
        }
        loop {
            if self.peek() != Some(b'"') {
                return Err(self.expected("a key in quotes"));
            }
            let (key, _) = self.string()?;
            self.eat(b':', "`:`")?;
            value(&key, self)?;
            if self.peek() == Some(b'}') {
                self.at += 1;
                return Ok(());
            }
            self.eat(b',', "`,` or `}`")?;
        }
    }

    /// Reads a string, at whose quote the cursor stands: it and its JSON.
    fn string(&mut self) -> Result<(Cow<'a, str>, &'a str), Problem> {
        let rest = &self.text[self.at..];
        // Most have no escapes and need no deserializer.
        if self.fast
            && let Some(length) = skip::plain(&rest.as_bytes()[1..])
        {
            self.at += length + 2;
            return Ok((Cow::Borrowed(&rest[1..=length]), &rest[..length + 2]));
        }
        let (Text(text), raw) = self.value()?;
        Ok((text, raw))
    }

    /// Reads a value and its JSON.
    fn value<T: Deserialize<'a>>(&mut self) -> Result<(T, &'a str), Problem> {
        self.peek();
        let rest = &self.text[self.at..];
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<T>();
        match values.next() {
            Some(Ok(value)) => {
                let length = values.byte_offset();
                self.at += length;
                Ok((value, &rest[..length]))
            }
            Some(Err(error)) => Err(not_json(&error, rest, self.at)),
            None => Err(self.expected("a value")),
        }
    }

    /// Skips a value; says what it is, and its JSON.
    fn skip(&mut self) -> Result<(&'static str, &'a str), Problem> {
        let found = match self.peek() {
            Some(b'{') => "an object",
            Some(b'[') => "an array",
            Some(b'"') => "a string",
            Some(b'n') => "null",
            Some(b't' | b'f') => "a boolean",
            Some(_) | None => "a number",
        };
        if self.fast
            && let Some(end) = skip::value(self.text.as_bytes(), self.at)
        {
            let json = &self.text[self.at..end];
            self.at = end;
            return Ok((found, json));
        }
        // Does not recurse, so that no nesting is too deep for the stack.
        let (_, json) = self.value::<IgnoredAny>()?;
        Ok((found, json))
    }
}

/// `serde_json` counts lines and columns from 1, within the value.
#[cold]
fn not_json(error: &serde_json::Error, value: &str, start: usize) -> Problem {
    let text = error.to_string();
    let reason = text.rfind(" at line ").map_or(text.as_str(), |end| &text[..end]);
    let line_start = match error.line() {
        0 | 1 => 0,
        line => memchr::memchr_iter(b'\n', value.as_bytes()).nth(line - 2).map_or(0, |at| at + 1),
    };
    let at = line_start + error.column().saturating_sub(1);
    let rest = &value[value.floor_char_boundary(at)..];
    Problem::NotJson { message: problem::not_json(reason, rest), at: start + at }
}

/// A string, borrowed where it has no escapes.
struct Text<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> Visitor<'de> for Texts {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Texts)
    }
}
