//! Finds the relevant fields of an answer in one pass over its bytes.

use std::borrow::Cow;

use serde::{
    Deserialize,
    de::{self, DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;
use smallvec::SmallVec;

use super::broken::NotJson;

/// The kind of a field's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    /// A list without entries.
    Empty,
    /// A list with entries.
    Filled,
    /// A string.
    Text,
    /// Anything else.
    Other,
}

/// The relevant fields of an answer. If a field appears twice, the last one counts, as in most JSON readers; but two
/// `usage` fields count as none.
#[derive(Debug, Default)]
pub(super) struct Fields<'a> {
    pub(super) is_object: bool,
    pub(super) usage: Option<&'a RawValue>,
    pub(super) status: Option<&'a RawValue>,
    pub(super) stop_reason: Option<&'a RawValue>,
    pub(super) has_error: bool,
    pub(super) choices: Option<Choices<'a>>,
    pub(super) content: Option<Field>,
    pub(super) data: Option<Field>,
    pub(super) output: Option<Field>,
    pub(super) results: Option<Field>,
}

/// The choices of a chat or of completions.
#[derive(Debug)]
pub(super) struct Choices<'a> {
    pub(super) list: Field,
    /// Each one's `finish_reason`; `None` where it has none.
    pub(super) reasons: SmallVec<[Option<&'a RawValue>; 2]>,
    /// One has a `delta` and neither `message` nor `text`.
    pub(super) has_piece: bool,
}

impl<'a> Fields<'a> {
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, NotJson> {
        let text = simdutf8::basic::from_utf8(bytes).map_err(|_| NotJson::of(bytes, None))?;
        let read = |trusted: bool| {
            let mut json = serde_json::Deserializer::from_str(text);
            let fields = Top { trusted }.deserialize(&mut json)?;
            json.end().map(|()| fields)
        };
        read(false).or_else(|_| {
            // Not JSON, or JSON that this reader finds odd: a lone surrogate, a control character in a key.
            match serde_json::from_str::<IgnoredAny>(text) {
                Err(error) => Err(NotJson::of(bytes, Some(&error))),
                Ok(_) => Ok(read(true).unwrap_or_else(|_| Self { is_object: true, ..Self::default() })),
            }
        })
    }
}

/// The text of a string, or of the `type` of an object such as `{"type":"abort"}`. `None`: it is `null`.
pub(super) fn word_of(value: &RawValue) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    struct Typed<'a> {
        #[serde(borrow, rename = "type")]
        kind: Cow<'a, str>,
    }
    let raw = value.get();
    match raw.as_bytes().first() {
        Some(b'n') => None,
        Some(b'"') if !raw.contains('\\') => Some(Cow::Borrowed(raw.trim_matches('"'))),
        Some(b'"') => Some(serde_json::from_str::<String>(raw).map_or(Cow::Borrowed(raw), Cow::Owned)),
        Some(b'{') => Some(serde_json::from_str::<Typed<'_>>(raw).map_or(Cow::Borrowed(raw), |typed| typed.kind)),
        _ => Some(Cow::Borrowed(raw)),
    }
}

/// Reads a key, by its bytes: a lone surrogate in a key that nobody asked for does no harm. Such strings are read without a
/// look at control characters, so that is done here, but where the text is known to be JSON.
#[derive(Clone, Copy)]
struct Key<T> {
    trusted: bool,
    of: fn(&[u8]) -> T,
}

impl<'de, T> DeserializeSeed<'de> for Key<T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        deserializer.deserialize_bytes(self)
    }
}

impl<T> Visitor<'_> for Key<T> {
    type Value = T;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a key")
    }

    fn visit_bytes<E: de::Error>(self, key: &[u8]) -> Result<T, E> {
        if !self.trusted && key.iter().any(|byte| *byte < b' ') {
            return Err(E::custom("a control character in a key"));
        }
        Ok((self.of)(key))
    }
}

enum TopKey {
    Usage,
    Status,
    StopReason,
    Error,
    Choices,
    Content,
    Data,
    Output,
    Results,
    Other,
}

fn top_key(key: &[u8]) -> TopKey {
    match key {
        b"usage" => TopKey::Usage,
        b"status" => TopKey::Status,
        b"stop_reason" => TopKey::StopReason,
        b"error" => TopKey::Error,
        b"choices" => TopKey::Choices,
        b"content" => TopKey::Content,
        b"data" => TopKey::Data,
        b"output" => TopKey::Output,
        b"results" => TopKey::Results,
        _ => TopKey::Other,
    }
}

/// Implements what a visitor makes of every kind of value but those that it looks into.
macro_rules! whatever_else {
    ($value:expr) => {
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("any value")
        }

        fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
            Ok($value)
        }

        fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
            Ok($value)
        }

        fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
            Ok($value)
        }

        fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
            Ok($value)
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok($value)
        }
    };
}

fn skip_entries<'de, A: MapAccess<'de>>(mut map: A, trusted: bool) -> Result<(), A::Error> {
    while map.next_key_seed(Key { trusted, of: |_| () })?.is_some() {
        map.next_value::<IgnoredAny>()?;
    }
    Ok(())
}

/// Whether the list had entries.
fn skip_items<'de, A: SeqAccess<'de>>(mut list: A) -> Result<bool, A::Error> {
    let mut filled = false;
    while list.next_element::<IgnoredAny>()?.is_some() {
        filled = true;
    }
    Ok(filled)
}

struct Top {
    trusted: bool,
}

impl<'de> DeserializeSeed<'de> for Top {
    type Value = Fields<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Fields<'de>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Top {
    type Value = Fields<'de>;

    whatever_else!(Fields::default());

    fn visit_str<E>(self, _: &str) -> Result<Fields<'de>, E> {
        Ok(Fields::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Fields<'de>, A::Error> {
        skip_items(list).map(|_| Fields::default())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
        let trusted = self.trusted;
        let mut fields = Fields { is_object: true, ..Fields::default() };
        let mut usages = 0;
        while let Some(key) = map.next_key_seed(Key { trusted, of: top_key })? {
            match key {
                TopKey::Usage => {
                    usages += 1;
                    fields.usage = Some(map.next_value()?);
                }
                TopKey::Status => fields.status = Some(map.next_value()?),
                TopKey::StopReason => fields.stop_reason = Some(map.next_value()?),
                TopKey::Error => fields.has_error = map.next_value::<Option<IgnoredAny>>()?.is_some(),
                TopKey::Choices => fields.choices = Some(map.next_value_seed(ChoiceList { trusted })?),
                TopKey::Content => fields.content = Some(map.next_value_seed(Held { trusted })?),
                TopKey::Data => fields.data = Some(map.next_value_seed(Held { trusted })?),
                TopKey::Output => fields.output = Some(map.next_value_seed(Held { trusted })?),
                TopKey::Results => fields.results = Some(map.next_value_seed(Held { trusted })?),
                TopKey::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        if usages > 1 {
            fields.usage = None;
        }
        Ok(fields)
    }
}

/// Finds what a field holds.
struct Held {
    trusted: bool,
}

impl<'de> DeserializeSeed<'de> for Held {
    type Value = Field;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Field, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Held {
    type Value = Field;

    whatever_else!(Field::Other);

    fn visit_str<E>(self, _: &str) -> Result<Field, E> {
        Ok(Field::Text)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Field, A::Error> {
        Ok(if skip_items(list)? { Field::Filled } else { Field::Empty })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Field, A::Error> {
        skip_entries(map, self.trusted).map(|()| Field::Other)
    }
}

/// Reads `choices`.
struct ChoiceList {
    trusted: bool,
}

impl<'de> DeserializeSeed<'de> for ChoiceList {
    type Value = Choices<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Choices<'de>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Choices<'_> {
    fn none(list: Field) -> Self {
        Self { list, reasons: SmallVec::new(), has_piece: false }
    }
}

impl<'de> Visitor<'de> for ChoiceList {
    type Value = Choices<'de>;

    whatever_else!(Choices::none(Field::Other));

    fn visit_str<E>(self, _: &str) -> Result<Choices<'de>, E> {
        Ok(Choices::none(Field::Other))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Choices<'de>, A::Error> {
        let mut choices = Choices { list: Field::Empty, reasons: SmallVec::new(), has_piece: false };
        while let Some(choice) = list.next_element_seed(Choice { trusted: self.trusted })? {
            choices.list = Field::Filled;
            choices.reasons.push(choice.reason);
            choices.has_piece |= choice.has_delta && !choice.has_text;
        }
        Ok(choices)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Choices<'de>, A::Error> {
        skip_entries(map, self.trusted).map(|()| Choices::none(Field::Other))
    }
}

/// Reads one of the choices.
struct Choice {
    trusted: bool,
}

#[derive(Default)]
struct Chosen<'a> {
    reason: Option<&'a RawValue>,
    has_delta: bool,
    has_text: bool,
}

enum ChoiceKey {
    Reason,
    Delta,
    Text,
    Other,
}

fn choice_key(key: &[u8]) -> ChoiceKey {
    match key {
        b"finish_reason" => ChoiceKey::Reason,
        b"delta" => ChoiceKey::Delta,
        b"message" | b"text" => ChoiceKey::Text,
        _ => ChoiceKey::Other,
    }
}

impl<'de> DeserializeSeed<'de> for Choice {
    type Value = Chosen<'de>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Chosen<'de>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Choice {
    type Value = Chosen<'de>;

    whatever_else!(Chosen::default());

    fn visit_str<E>(self, _: &str) -> Result<Chosen<'de>, E> {
        Ok(Chosen::default())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Chosen<'de>, A::Error> {
        skip_items(list).map(|_| Chosen::default())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Chosen<'de>, A::Error> {
        let mut chosen = Chosen::default();
        while let Some(key) = map.next_key_seed(Key { trusted: self.trusted, of: choice_key })? {
            match key {
                ChoiceKey::Reason => chosen.reason = Some(map.next_value()?),
                ChoiceKey::Delta => {
                    chosen.has_delta = true;
                    map.next_value::<IgnoredAny>()?;
                }
                ChoiceKey::Text => {
                    chosen.has_text = true;
                    map.next_value::<IgnoredAny>()?;
                }
                ChoiceKey::Other => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(chosen)
    }
}
