//! The scan of a line. The outer object's punctuation is read here and each value by `serde_json`, because only between
//! two values does it tell where it is, and the body must be both read and kept as it is in a single pass.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::{Field, LineError, MAX_CUSTOM_ID_BYTES, MAX_MODEL_BYTES, Problem, RequestLine, problem::shown};
use crate::domain::Endpoint;

/// Reads a line that is UTF-8.
pub(super) fn request(line: &str) -> Result<RequestLine<'_>, LineError> {
    let mut seen = Seen::default();
    let problem = match object(line, &mut seen) {
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
    let mut cursor = Cursor { text, at: 0 };
    if cursor.peek() != Some(b'{') {
        let found = cursor.skip()?;
        return Err(Problem::WrongKind { field: Field::Body, found });
    }
    let (body, _) = cursor.value::<Body>()?;
    cursor.end()?;
    body.model()
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
    body: Option<(Body<'a>, &'a str)>,
    fields: FieldSet,
    /// The first thing that is wrong, though the line is JSON so far: the rest is read on for the `custom_id`.
    problem: Option<Problem>,
}

/// The fields that have been there, as bits.
#[derive(Clone, Copy, Default)]
struct FieldSet(u8);

impl FieldSet {
    /// Returns whether it is new.
    fn insert(&mut self, field: Field) -> bool {
        let bit = 1 << field as u8;
        let new = self.0 & bit == 0;
        self.0 |= bit;
        new
    }
}

impl<'a> Seen<'a> {
    fn wrong(&mut self, problem: Problem) {
        self.problem.get_or_insert(problem);
    }

    fn complete(&mut self) -> Result<RequestLine<'a>, Problem> {
        if let Some(problem) = self.problem.take() {
            return Err(problem);
        }
        let Some((custom_id, custom_id_json)) = self.custom_id.clone() else {
            return Err(Problem::Missing(Field::CustomId));
        };
        if !self.method {
            return Err(Problem::Missing(Field::Method));
        }
        let endpoint = self.endpoint.ok_or(Problem::Missing(Field::Url))?;
        let (body, raw) = self.body.take().ok_or(Problem::Missing(Field::Body))?;
        Ok(RequestLine { custom_id, custom_id_json, endpoint, model: body.model()?, body: raw })
    }

    fn field(&mut self, field: Field, cursor: &mut Cursor<'a>) -> Result<(), Problem> {
        if !self.fields.insert(field) {
            self.wrong(Problem::Twice(field));
            cursor.skip()?;
            return Ok(());
        }
        if field == Field::Body {
            if cursor.peek() == Some(b'{') {
                self.body = Some(cursor.value()?);
                return Ok(());
            }
        } else if cursor.peek() == Some(b'"') {
            let (Text(text), raw) = cursor.value()?;
            self.text(field, text, raw);
            return Ok(());
        }
        let found = cursor.skip()?;
        self.wrong(Problem::WrongKind { field, found });
        Ok(())
    }

    fn text(&mut self, field: Field, text: Cow<'a, str>, raw: &'a str) {
        match field {
            Field::CustomId => {
                if text.is_empty() {
                    return self.wrong(Problem::Empty(field));
                }
                if text.len() > MAX_CUSTOM_ID_BYTES {
                    self.wrong(Problem::TooLong { field, bytes: text.len() });
                }
                self.custom_id = Some((text, raw));
            }
            Field::Method if text == "POST" => self.method = true,
            Field::Method => self.wrong(Problem::WrongText { field, found: shown(&text) }),
            Field::Url => match text.parse() {
                Ok(endpoint) => self.endpoint = Some(endpoint),
                Err(_) => self.wrong(Problem::WrongText { field, found: shown(&text) }),
            },
            // Not read as texts of the line.
            Field::Body | Field::Model | Field::Stream => {}
        }
    }
}

fn object<'a>(line: &'a str, seen: &mut Seen<'a>) -> Result<(), Problem> {
    let mut cursor = Cursor { text: line, at: 0 };
    if cursor.peek() != Some(b'{') {
        let found = cursor.skip()?;
        cursor.end()?;
        return Err(Problem::NotAnObject { found });
    }
    cursor.at += 1;
    if cursor.peek() == Some(b'}') {
        cursor.at += 1;
        return cursor.end();
    }
    loop {
        if cursor.peek() != Some(b'"') {
            return Err(cursor.expected("a key in quotes"));
        }
        let (Key(field), _) = cursor.value()?;
        cursor.eat(b':', "`:`")?;
        match field {
            Some(field) => seen.field(field, &mut cursor)?,
            None => {
                cursor.skip()?;
            }
        }
        if cursor.peek() == Some(b'}') {
            cursor.at += 1;
            return cursor.end();
        }
        cursor.eat(b',', "`,` or `}`")?;
    }
}

/// A place in a text.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
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
            Some(_) => Err(Problem::NotJson { message: "more text after the object".to_owned(), at: self.at }),
        }
    }

    fn expected(&self, what: &str) -> Problem {
        let message = if self.at < self.text.len() {
            format!("expected {what}")
        } else {
            format!("the line ends, expected {what}")
        };
        Problem::NotJson { message, at: self.at }
    }

    /// The next value and its text. The cursor stands at it.
    fn value<T: Deserialize<'a>>(&mut self) -> Result<(T, &'a str), Problem> {
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

    /// Skips the next value and says what it is.
    fn skip(&mut self) -> Result<&'static str, Problem> {
        let found = match self.peek() {
            Some(b'{') => "an object",
            Some(b'[') => "an array",
            Some(b'"') => "a string",
            Some(b'n') => "null",
            Some(b't' | b'f') => "a boolean",
            Some(_) | None => "a number",
        };
        self.value::<IgnoredAny>()?;
        Ok(found)
    }
}

/// `serde_json` counts lines and columns from 1, within the value.
fn not_json(error: &serde_json::Error, value: &str, start: usize) -> Problem {
    let text = error.to_string();
    let message = text.rfind(" at line ").map_or(text.as_str(), |end| &text[..end]).to_owned();
    let line_start = match error.line() {
        0 | 1 => 0,
        line => memchr::memchr_iter(b'\n', value.as_bytes()).nth(line - 2).map_or(0, |at| at + 1),
    };
    Problem::NotJson { message, at: start + line_start + error.column().saturating_sub(1) }
}

/// A key of the line: one of those that are read, or another.
struct Key(Option<Field>);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl Visitor<'_> for Keys {
            type Value = Key;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E: Error>(self, key: &str) -> Result<Key, E> {
                Ok(Key(match key {
                    "custom_id" => Some(Field::CustomId),
                    "method" => Some(Field::Method),
                    "url" => Some(Field::Url),
                    "body" => Some(Field::Body),
                    _ => None,
                }))
            }
        }
        deserializer.deserialize_str(Keys)
    }
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

/// What is read of a body.
#[derive(Default)]
struct Body<'a> {
    model: Option<Cow<'a, str>>,
    problem: Option<Problem>,
}

impl<'a> Body<'a> {
    fn model(self) -> Result<Cow<'a, str>, Problem> {
        match (self.problem, self.model) {
            (Some(problem), _) => Err(problem),
            (None, Some(model)) => Ok(model),
            (None, None) => Err(Problem::Missing(Field::Model)),
        }
    }

    fn wrong(&mut self, problem: Problem) {
        self.problem.get_or_insert(problem);
    }

    fn field(&mut self, field: Field, value: Scalar<'a>) {
        match (field, value) {
            (Field::Stream, Scalar::Null | Scalar::Bool(false)) => {}
            // Workers take 1, "true" and "yes" for true as well.
            (Field::Stream, _) => self.wrong(Problem::Stream),
            (_, Scalar::Text(model)) if model.is_empty() => self.wrong(Problem::Empty(field)),
            (_, Scalar::Text(model)) if model.len() > MAX_MODEL_BYTES => {
                self.wrong(Problem::TooLong { field, bytes: model.len() });
            }
            (_, Scalar::Text(model)) => self.model = Some(model),
            (_, Scalar::Null) => self.wrong(Problem::WrongKind { field, found: "null" }),
            (_, Scalar::Bool(_)) => self.wrong(Problem::WrongKind { field, found: "a boolean" }),
            (_, Scalar::Other(found)) => self.wrong(Problem::WrongKind { field, found }),
        }
    }
}

impl<'de> Deserialize<'de> for Body<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bodies;
        impl<'de> Visitor<'de> for Bodies {
            type Value = Body<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Body<'de>, A::Error> {
                let (mut body, mut fields) = (Body::default(), FieldSet::default());
                while let Some(BodyKey(field)) = map.next_key()? {
                    match field {
                        Some(field) if fields.insert(field) => body.field(field, map.next_value()?),
                        Some(field) => {
                            map.next_value::<IgnoredAny>()?;
                            body.wrong(Problem::Twice(field));
                        }
                        None => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(body)
            }
        }
        deserializer.deserialize_map(Bodies)
    }
}

/// A key of a body: one of those that are read, or another.
struct BodyKey(Option<Field>);

impl<'de> Deserialize<'de> for BodyKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl Visitor<'_> for Keys {
            type Value = BodyKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_str<E: Error>(self, key: &str) -> Result<BodyKey, E> {
                Ok(BodyKey(match key {
                    "model" => Some(Field::Model),
                    "stream" => Some(Field::Stream),
                    _ => None,
                }))
            }
        }
        deserializer.deserialize_str(Keys)
    }
}

/// The value of a field that should be a string or a boolean.
enum Scalar<'a> {
    Text(Cow<'a, str>),
    Bool(bool),
    Null,
    Other(&'static str),
}

impl<'de> Deserialize<'de> for Scalar<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Scalars;
        impl<'de> Visitor<'de> for Scalars {
            type Value = Scalar<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Text(Cow::Owned(text.to_owned())))
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Bool(value))
            }

            fn visit_unit<E: Error>(self) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Null)
            }

            fn visit_i64<E: Error>(self, _: i64) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Other("a number"))
            }

            fn visit_u64<E: Error>(self, _: u64) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Other("a number"))
            }

            fn visit_f64<E: Error>(self, _: f64) -> Result<Scalar<'de>, E> {
                Ok(Scalar::Other("a number"))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Scalar<'de>, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other("an array"))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Scalar<'de>, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other("an object"))
            }
        }
        deserializer.deserialize_any(Scalars)
    }
}
