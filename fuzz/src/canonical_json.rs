use serde_json::Value;
use tidemill::domain::webhook::Json;

/// The canonical text means the same to `serde_json`, and is what Python's `json.dumps(value, sort_keys=True)` writes.
pub fn canonical_json(data: &[u8]) {
    let Ok(value) = serde_json::from_slice::<Value>(data) else {
        // Any text is a value too.
        let text = String::from_utf8_lossy(data).into_owned();
        return check(&Value::String(text.clone()), &Json::Text(text));
    };
    if let Some(json) = without_floats(&value) {
        check(&value, &json);
    }
}

fn check(value: &Value, json: &Json) {
    let canonical = json.canonical();
    assert!(canonical.is_ascii());
    assert_eq!(&serde_json::from_str::<Value>(&canonical).unwrap(), value);
    assert_eq!(canonical, dumps(value));
}

fn without_floats(value: &Value) -> Option<Json> {
    Some(match value {
        Value::Null => Json::Null,
        Value::Bool(flag) => Json::Bool(*flag),
        Value::Number(number) => Json::Int(number.as_i64()?),
        Value::String(text) => Json::Text(text.clone()),
        Value::Array(items) => Json::List(items.iter().map(without_floats).collect::<Option<_>>()?),
        Value::Object(members) => Json::Object(
            members.iter().map(|(key, value)| Some((key.clone(), without_floats(value)?))).collect::<Option<_>>()?,
        ),
    })
}

/// Python's rules, written from its documentation and `json/encoder.py`.
fn dumps(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(true) => "true".into(),
        Value::Bool(false) => "false".into(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => quoted(text),
        Value::Array(items) => format!("[{}]", items.iter().map(dumps).collect::<Vec<_>>().join(", ")),
        Value::Object(members) => {
            // sort_keys compares strings by code points.
            let mut members: Vec<_> = members.iter().collect();
            members.sort_by_key(|(key, _)| key.chars().map(u32::from).collect::<Vec<_>>());
            let members: Vec<_> =
                members.into_iter().map(|(key, value)| format!("{}: {}", quoted(key), dumps(value))).collect();
            format!("{{{}}}", members.join(", "))
        }
    }
}

fn quoted(text: &str) -> String {
    let escaped: String = text
        .encode_utf16()
        .map(|unit| match unit {
            0x22 => r#"\""#.into(),
            0x5c => r"\\".into(),
            0x08 => r"\b".into(),
            0x0c => r"\f".into(),
            0x0a => r"\n".into(),
            0x0d => r"\r".into(),
            0x09 => r"\t".into(),
            0x20..=0x7e => char::from(unit as u8).to_string(),
            _ => format!("\\u{unit:04x}"),
        })
        .collect();
    format!("\"{escaped}\"")
}
