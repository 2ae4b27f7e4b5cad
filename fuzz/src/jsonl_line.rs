use std::borrow::Cow;

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::value::RawValue;
use tidemill::domain::{Endpoint, request_line};

/// A line is a request if and only if `serde_json` and the rules of `docs/` say so, and its fields are what `serde_json`
/// reads.
pub fn jsonl_line(data: &[u8]) {
    let ours = request_line::parse(data);
    let expected = std::str::from_utf8(data).ok().and_then(expected);
    match (&ours, &expected) {
        (Ok(ours), Some(expected)) => {
            assert_eq!(ours.custom_id, expected.custom_id);
            assert_eq!(serde_json::from_str::<String>(ours.custom_id_json).unwrap(), expected.custom_id);
            assert_eq!(ours.model, expected.model);
            assert_eq!(ours.endpoint.path(), expected.url);
            assert_eq!(ours.body, expected.body);
            assert_eq!(request_line::model_of(ours.body.as_bytes()).unwrap(), expected.model);
        }
        (Err(error), None) => assert!(!error.to_string().is_empty()),
        (Ok(_), None) => panic!("accepted, but it is no request: {:?}", String::from_utf8_lossy(data)),
        (Err(error), Some(_)) => panic!("refused: {error}: {:?}", String::from_utf8_lossy(data)),
    }
}

struct Expected {
    custom_id: String,
    url: String,
    model: String,
    body: String,
}

fn expected(text: &str) -> Option<Expected> {
    serde_json::from_str::<IgnoredAny>(text).ok()?;
    let line = serde_json::from_str::<Members>(text).ok()?;
    let body_text = line.once("body")??;
    let body = serde_json::from_str::<Members>(body_text).ok()?;
    let string = |raw: Option<&str>| raw.and_then(|raw| serde_json::from_str::<String>(raw).ok());
    let custom_id = string(line.once("custom_id")?).filter(|id| (1..=512).contains(&id.len()))?;
    let url = string(line.once("url")?).filter(|url| url.parse::<Endpoint>().is_ok_and(|known| known.path() == url))?;
    string(line.once("method")?).filter(|method| method == "POST")?;
    let model = string(body.once("model")?)
        .filter(|model| (1..=1_024).contains(&model.len()) && !model.contains(char::is_control))?;
    if !matches!(body.once("stream")?, None | Some("false" | "null")) {
        return None;
    }
    Some(Expected { custom_id, url, model, body: body_text.to_owned() })
}

/// An object's members in order, with their values as written.
struct Members(Vec<(String, Box<RawValue>)>);

impl Members {
    /// The member of that name; none: it is there twice.
    fn once(&self, name: &str) -> Option<Option<&str>> {
        let mut found = self.0.iter().filter(|(key, _)| key == name).map(|(_, value)| value.get());
        let first = found.next();
        found.next().is_none().then_some(first)
    }
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    members.push((key.into_owned(), map.next_value()?));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Object)
    }
}
