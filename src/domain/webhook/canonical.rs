//! JSON in one canonical form: byte for byte what Python's `json.dumps(value, sort_keys=True)` gives, so that a receiver
//! which parses a body and writes it again gets the bytes that were signed.

use std::{collections::BTreeMap, fmt::Write};

/// A JSON value without floats: no two languages print those alike, and no payload needs them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Json {
    Null,
    /// `true`, `false`
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A string.
    Text(String),
    /// An array.
    List(Vec<Json>),
    /// An object. Its keys are in Unicode code point order, as Python sorts them; Rust orders strings the same way.
    Object(BTreeMap<String, Json>),
}

impl Json {
    pub fn object<const N: usize>(members: [(&str, Self); N]) -> Self {
        Self::Object(members.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
    }

    /// The canonical text: ASCII only, keys sorted, `", "` and `": "` between.
    #[must_use]
    pub fn canonical(&self) -> String {
        let mut out = String::new();
        self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) {
        match self {
            Self::Null => out.push_str("null"),
            Self::Bool(true) => out.push_str("true"),
            Self::Bool(false) => out.push_str("false"),
            Self::Int(number) => write_to(out, format_args!("{number}")),
            Self::Text(text) => write_text(out, text),
            Self::List(items) => {
                out.push('[');
                for (at, item) in items.iter().enumerate() {
                    if at > 0 {
                        out.push_str(", ");
                    }
                    item.write(out);
                }
                out.push(']');
            }
            Self::Object(members) => {
                out.push('{');
                for (at, (key, value)) in members.iter().enumerate() {
                    if at > 0 {
                        out.push_str(", ");
                    }
                    write_text(out, key);
                    out.push_str(": ");
                    value.write(out);
                }
                out.push('}');
            }
        }
    }
}

impl From<&str> for Json {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<i64> for Json {
    fn from(number: i64) -> Self {
        Self::Int(number)
    }
}

impl<T: Into<Json>> From<Option<T>> for Json {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

/// CPython's `ESCAPE_ASCII`: short escapes where JSON has them, `\uXXXX` for all else outside space to `~`.
fn write_text(out: &mut String, text: &str) {
    out.push('"');
    for char in text.chars() {
        match char {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(char),
            other => {
                for unit in other.encode_utf16(&mut [0; 2]) {
                    write_to(out, format_args!("\\u{unit:04x}"));
                }
            }
        }
    }
    out.push('"');
}

fn write_to(out: &mut String, what: std::fmt::Arguments<'_>) {
    // Writing to a String can't fail.
    let _ = out.write_fmt(what);
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        process::{Command, Stdio},
    };

    use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};

    use super::*;

    #[test]
    fn escapes_are_pythons() {
        let text = Json::from("\"\\/\u{8}\u{c}\n\r\t\0\u{1f}\u{7f}\u{80}é你😀\u{2028}\u{ffff}\u{10ffff}");
        assert_eq!(
            text.canonical(),
            "\"\\\"\\\\/\\b\\f\\n\\r\\t\\u0000\\u001f\\u007f\\u0080\\u00e9\\u4f60\\ud83d\\ude00\\u2028\\uffff\\udbff\\udfff\""
        );
    }

    #[test]
    fn empty_things_and_order() {
        let value = Json::object([
            ("b", Json::List(vec![])),
            ("a", Json::object([])),
            ("\u{10000}", Json::Null),
            ("\u{ffff}", Json::Bool(true)),
        ]);
        // By code point, not by UTF-16 unit: U+FFFF before U+10000.
        assert_eq!(value.canonical(), r#"{"a": {}, "b": [], "\uffff": true, "\ud800\udc00": null}"#);
    }

    fn any_json() -> impl Strategy<Value = Json> {
        let leaf = prop_oneof![
            Just(Json::Null),
            any::<bool>().prop_map(Json::Bool),
            any::<i64>().prop_map(Json::Int),
            any::<String>().prop_map(Json::Text),
            "[\\x00-\\x7f\u{80}-\u{a0}\u{d7ff}\u{e000}\u{ffff}-\u{10010}]{0,12}".prop_map(Json::Text),
        ];
        leaf.prop_recursive(3, 24, 6, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..5).prop_map(Json::List),
                proptest::collection::btree_map(any::<String>(), inner, 0..5).prop_map(Json::Object),
            ]
        })
    }

    proptest! {
        #[test]
        fn it_is_ascii_json_of_the_same_value(value in any_json()) {
            let text = value.canonical();
            prop_assert!(text.is_ascii());
            let read: serde_json::Value = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(from_serde(&read), value);
        }
    }

    fn from_serde(value: &serde_json::Value) -> Json {
        match value {
            serde_json::Value::Null => Json::Null,
            serde_json::Value::Bool(flag) => Json::Bool(*flag),
            serde_json::Value::Number(number) => Json::Int(number.as_i64().unwrap()),
            serde_json::Value::String(text) => Json::Text(text.clone()),
            serde_json::Value::Array(items) => Json::List(items.iter().map(from_serde).collect()),
            serde_json::Value::Object(members) => {
                Json::Object(members.iter().map(|(key, value)| (key.clone(), from_serde(value))).collect())
            }
        }
    }

    /// The definition itself, where there is a Python.
    #[test]
    fn python_writes_the_same_bytes() {
        const SCRIPT: &str =
            "import json, sys\nfor line in sys.stdin:\n    print(json.dumps(json.loads(line), sort_keys=True))";
        let spawned = Command::new("python3").args(["-c", SCRIPT]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let Ok(mut python) = spawned else {
            eprintln!("no python3: not compared");
            return;
        };
        let mut runner = TestRunner::deterministic();
        let written: Vec<String> =
            (0..500).map(|_| any_json().new_tree(&mut runner).unwrap().current().canonical()).collect();
        let input = written.join("\n") + "\n";
        let mut stdin = python.stdin.take().unwrap();
        let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
        let output = python.wait_with_output().unwrap();
        writer.join().unwrap().unwrap();
        assert!(output.status.success());
        let python: Vec<&str> = std::str::from_utf8(&output.stdout).unwrap().lines().collect();
        assert_eq!(python, written);
    }
}
