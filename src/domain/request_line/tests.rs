use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

const GOOD: &str = r#"{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"m"}}"#;

fn problem(line: &str) -> String {
    parse(line.as_bytes()).expect_err(line).to_string()
}

#[test]
fn a_line_is_read_and_its_bytes_are_kept() {
    let line = concat!(
        "\t{ \"extra\":[1,{\"body\":2}] , \"body\" : {\"n\":1.0e2, \"messages\":[{\"content\":\"\\u00e9}\"}],\"model\":\"m\\/x\",",
        "\"stream\":false } ,\"url\":\"/v1/embeddings\",\"custom_id\": \"\\u0061\\n\" ,\"method\":\"POST\"} \r"
    );
    let read = parse(line.as_bytes()).unwrap();
    assert_eq!(read.custom_id, "a\n");
    assert_eq!(read.custom_id_json, r#""\u0061\n""#);
    assert_eq!(read.endpoint, Endpoint::Embeddings);
    assert_eq!(read.model, "m/x");
    assert_eq!(read.body, r#"{"n":1.0e2, "messages":[{"content":"\u00e9}"}],"model":"m\/x","stream":false }"#);
    assert!(matches!(parse(GOOD.as_bytes()).unwrap().custom_id, Cow::Borrowed("a")));
    assert!(matches!(parse(GOOD.as_bytes()).unwrap().model, Cow::Borrowed("m")));
}

#[test]
fn what_says_how_to_send_it_is_found_and_not_checked() {
    let hints = |body: &str| {
        let line = GOOD.replace(r#"{"model":"m"}"#, body);
        let hints = parse(line.as_bytes()).unwrap().hints;
        (hints.prompt.to_owned(), hints.max_tokens, hints.has_priority)
    };
    let messages = r#"[{"role":"user","content":"priority"}]"#;
    assert_eq!(
        hints(&format!(r#"{{"max_tokens": 7,"model":"m","messages" : {messages}}}"#)),
        (messages.into(), Some(7), false)
    );
    assert_eq!(hints(r#"{"model":"m","input":"x","priority":"high"}"#), (r#""x""#.into(), None, true));
    assert_eq!(hints(r#"{"model":"m","prompt":[1,2],"max_tokens":1e9}"#), ("[1,2]".into(), None, false));
    assert_eq!(hints(r#"{"model":"m","x":{"messages":1,"priority":2}}"#), (String::new(), None, false));
}

#[test]
fn a_file_of_another_format_is_named_with_what_to_do() {
    for line in [
        "custom_id,method,url,body",
        "custom_id;method;url;body\r",
        "custom_id\tmethod\turl\tbody",
        r#""custom_id","method","url","body""#,
        r#"r-1,POST,/v1/chat/completions,"{""model"":""m""}""#,
        "1,POST,/v1/chat/completions,x",
        "prompt text,model",
    ] {
        let text = problem(line);
        assert!(text.contains("CSV or TSV; write each request as a JSON object on one line"), "{line}: {text}");
    }
    assert!(problem("[").contains("one JSON list; write each of its objects on one line"), "{}", problem("["));
    assert!(problem("<!DOCTYPE html>").contains("HTML or XML"));
    for (line, words) in [
        ("'a', 'b'", "is not a quote in JSON"),
        (r#""custom_id": "a", "method": "POST""#, "the braces around the object are missing"),
        ("custom_id: a, method: POST", "expected a value"),
        ("NaN, 1", "NaN"),
        ("[1, 2]", "found an array"),
        ("{\"a\",1}", "not valid JSON"),
    ] {
        assert!(problem(line).contains(words) && !problem(line).contains("CSV"), "{line}: {}", problem(line));
    }
}

/// It is in no database and no log, so it may be anything: the results carry it as it was written.
#[test]
fn a_custom_id_may_hold_any_character() {
    let line = GOOD.replace(r#""a""#, r#""n\u0000\u001bm""#);
    let read = parse(line.as_bytes()).unwrap();
    assert_eq!((&*read.custom_id, read.custom_id_json), ("n\0\u{1b}m", r#""n\u0000\u001bm""#));
}

#[test]
fn keys_are_known_however_they_are_written() {
    let line = GOOD.replace("body", r"b\u006fdy").replace("\"model", r#""\u006dodel"#);
    assert_eq!(parse(line.as_bytes()).unwrap().model, "m");
    let twice = GOOD.replace("{\"model", r#"{"\u006dodel":"other","model"#);
    assert_eq!(problem(&twice), "body.model is given more than once; expected it once");
}

#[test]
fn every_rule_has_its_message() {
    let cases = [
        (
            r#""custom_id":"a""#,
            r#""x":1"#,
            "custom_id is missing; expected a string of 1 to 512 bytes, unique in the file",
        ),
        (r#""a""#, r#""""#, "custom_id is empty; expected a string of 1 to 512 bytes, unique in the file"),
        (r#""a""#, "7", "custom_id is a number; expected a string of 1 to 512 bytes, unique in the file"),
        (r#""a""#, "null", "custom_id is null; expected a string of 1 to 512 bytes, unique in the file"),
        (r#""method":"POST","#, "", "method is missing; expected \"POST\""),
        ("POST", "GET", "method is \"GET\"; expected \"POST\""),
        (r#""POST""#, "true", "method is a boolean; expected \"POST\""),
        (
            r#""url":"/v1/chat/completions","#,
            "",
            "url is missing; expected one of /v1/chat/completions, /v1/completions",
        ),
        ("/v1/chat/completions", "/v1/files", "url is \"/v1/files\"; expected one of /v1/chat/completions, /v1/comp"),
        (r#","body":{"model":"m"}"#, "", "body is missing; expected a JSON object"),
        (r#"{"model":"m"}"#, "[]", "body is an array; expected a JSON object"),
        (r#"{"model":"m"}"#, "\"{}\"", "body is a string; expected a JSON object"),
        (r#"{"model":"m"}"#, "{}", "body.model is missing; expected a string of 1 to 1024 bytes"),
        (r#""m""#, "\"\"", "body.model is empty; expected a string of 1 to 1024 bytes"),
        (r#""m""#, "1", "body.model is a number; expected a string"),
        (r#""m""#, "-1.5", "body.model is a number; expected a string"),
        (r#""m""#, "[[\"m\"]]", "body.model is an array; expected a string"),
        (r#""m""#, r#"{"a":{"b":1}}"#, "body.model is an object; expected a string"),
        (r#""m""#, r#""m","stream":true"#, "body.stream is on; expected false, null or no such field"),
        (r#""m""#, r#""m","stream":"yes""#, "body.stream is on; expected"),
        (r#""m""#, r#""m","stream":1"#, "body.stream is on; expected"),
        (r#"{"custom"#, r#"{"custom_id":"b","custom"#, "custom_id is given more than once; expected it once"),
        (r#"{"custom"#, r#"{"body":{},"custom"#, "body is given more than once; expected it once"),
        (r#""m""#, r#""m","model":"m""#, "body.model is given more than once; expected it once"),
        (
            r#""m"}}"#,
            r#""m"}"#,
            "not valid JSON: the text ends, expected `,` or `}` at byte 83; expected one JSON object",
        ),
        (r#""m"}}"#, r#""m"}}}"#, "not valid JSON: more text after the object at byte 84;"),
        (r#""m"}}"#, r#""m"}};"#, "not valid JSON: more text after the object at byte 84;"),
        (r#""m"}}"#, r#""m"},}"#, "not valid JSON: expected a key in quotes at byte 84;"),
        (r#""m"}}"#, r#""m",}}"#, "not valid JSON: expected a key in quotes at byte 83;"),
        (r#""method":"#, r#""method" "#, "not valid JSON: expected `:` at byte 27;"),
        (r#","method":"#, r#""method":"#, "not valid JSON: expected `,` or `}` at byte 17;"),
        (
            r#""m""#,
            r#""a\u0000b""#,
            "body.model has the character U+0000; expected a string of 1 to 1024 bytes, without control",
        ),
        (
            r#""m""#,
            r#""a\u001b[1m""#,
            "body.model has the character U+001B; expected a string of 1 to 1024 bytes, without",
        ),
        (
            r#""a""#,
            r#""\ud800""#,
            "not valid JSON: half of a surrogate pair (an escape from \\ud800 to \\udfff without its",
        ),
        (r#""a""#, "", "not valid JSON: expected a value at byte 14"),
        (
            r#""a""#,
            "'a'",
            "not valid JSON: ' is not a quote in JSON: use \", as json.dumps writes it and str() does not at byte 14",
        ),
        (r#""a""#, "NaN", "not valid JSON: NaN and Infinity are not JSON: use null"),
        (r#""a""#, "-Infinity", "not valid JSON: a number that JSON does not have"),
        (r#""a""#, "None", "not valid JSON: None, True and False are Python's"),
        (r#""a""#, "undefined", "not valid JSON: undefined is JavaScript's"),
        (r#""a""#, "01", "not valid JSON: a number that JSON does not have, such as 01"),
        (
            r#""a""#,
            r#""\q""#,
            "not valid JSON: a \\ that does not begin an escape (write a backslash itself as \\\\) at byte",
        ),
        (r#""a""#, "\u{a0}1", "not valid JSON: the character U+00A0 stands outside of a string at byte 14"),
        (r#"{"custom_id""#, "{'custom_id'", "not valid JSON: ' is not a quote in JSON: use \""),
        (
            r#""m"}}"#,
            r#""m"}}{"a":1}"#,
            "not valid JSON: more text after the object: a second object on the same line at byte 84",
        ),
        (
            r#""m"}}"#,
            "\"m\"}}\r{",
            "not valid JSON: more text after the object: lines end with a line feed, not with CR alone, at",
        ),
        (r#""m"}}"#, r#""m"#, "not valid JSON: the text ends inside a string at byte"),
        (r#"{"cus"#, "\u{feff}{\"cus", "not valid JSON: a byte order mark (U+FEFF), which some editors write"),
        (
            r#""a""#,
            "\"a\tb\"",
            "not valid JSON: a control character inside a string (write it as an escape, such as \\n or \\u0000) at byte 1",
        ),
    ];
    for (from, to, expected) in cases {
        let found = problem(&GOOD.replacen(from, to, 1));
        assert!(found.starts_with(expected), "{from} -> {to}\n   found: {found}\nexpected: {expected}");
    }
    assert_eq!(
        problem("[1,2]"),
        "found an array; expected one JSON object on one line: the file is JSONL, not one JSON list"
    );
    for (wrong, right) in [
        ("/score", "/v1/score"),
        ("/v2/rerank", "/v1/rerank"),
        ("/chat/completions", "/v1/chat/completions"),
        ("v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("https://api.openai.com/v1/embeddings", "/v1/embeddings"),
    ] {
        let found = problem(&GOOD.replace("/v1/chat/completions", wrong));
        assert!(found.contains(&format!("; did you mean {right}? Expected one of ")), "{found}");
    }
    assert_eq!(problem("17"), "found a number; expected a JSON object");
    assert!(problem("{").starts_with("not valid JSON: the text ends, expected a key in quotes at byte 2"));
    assert!(problem("nonsense").starts_with("not valid JSON: "), "{}", problem("nonsense"));
    assert!(problem("{}").starts_with("custom_id is missing"));
    assert!(problem("").starts_with("not valid JSON: the text ends, expected a value at byte 1;"));
    let bad = [&GOOD.as_bytes()[..14], b"\xff", &GOOD.as_bytes()[14..]].concat();
    let text = parse(&bad).unwrap_err().to_string();
    assert!(text.starts_with("not UTF-8 at byte 15; expected UTF-8 text: is the file in Latin-1"), "{text}");
}

#[test]
fn the_custom_id_is_named_wherever_it_stands() {
    let known = |line: &str| parse(line.as_bytes()).unwrap_err().custom_id;
    assert_eq!(known(r#"{"method":"GET","url":7,"custom_id":"x"}"#).as_deref(), Some("x"));
    assert_eq!(known(r#"{"custom_id":"x","#).as_deref(), Some("x"));
    assert_eq!(known(r#"{"custom_id":"x","custom_id":"y"}"#).as_deref(), Some("x"));
    assert_eq!(known(r#"{"custom_id":"x"#), None);
}

#[test]
fn lengths_are_of_the_decoded_text() {
    let with = |id: &str| GOOD.replace("\"a\"", &format!("\"{id}\""));
    assert!(parse(with(&r"\u0061".repeat(512)).as_bytes()).is_ok());
    let long = parse(with(&"é".repeat(257)).as_bytes()).unwrap_err();
    assert!(long.to_string().starts_with("custom_id has 514 bytes; expected"), "{long}");
    assert_eq!(long.custom_id.unwrap(), format!("{}…", "é".repeat(60)));
    let model = GOOD.replace("\"m\"", &format!("\"{}\"", "m".repeat(1_025)));
    assert!(problem(&model).starts_with("body.model has 1025 bytes"));
}

#[test]
fn nesting_does_not_reach_the_stack() {
    let deep = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
    for place in [r#"{"model":"m"}"#, r#""m""#, r#""a""#, r#""POST""#] {
        let line = GOOD.replacen(place, &deep(100_000), 1);
        assert!(parse(line.as_bytes()).is_err(), "{place}");
        let line = GOOD.replacen(place, &"{\"a\":".repeat(100_000), 1);
        assert!(parse(line.as_bytes()).is_err(), "{place}");
    }
    // Accepted: whether it is too deep is the worker's to say.
    let line = GOOD.replacen(r#""m""#, &format!(r#""m","x":{}"#, deep(100_000)), 1);
    assert_eq!(parse(line.as_bytes()).unwrap().body.len(), line.len() - GOOD.len() + 13);
    assert!(parse(deep(100_000).as_bytes()).is_err());
    assert!(parse("[".repeat(1_000_000).as_bytes()).is_err());
}

#[test]
fn bodies_alone_follow_the_same_rules() {
    assert_eq!(model_of(b" {\"model\":\"m\",\n\"stream\":null}\n").unwrap(), "m");
    let cases: [(&[u8], &str); 8] = [
        (b"", "not valid JSON: the text ends, expected a value at byte 1"),
        (b"[]", "body is an array; expected a JSON object"),
        (b"{}", "body.model is missing"),
        (br#"{"model":"m"},"url":"x""#, "not valid JSON: more text after the object at byte 14"),
        (br#"{"model":"m","stream":true}"#, "body.stream is on"),
        (b"{\"model\":\"m\"", "not valid JSON: the text ends, expected `,` or `}` at byte 13"),
        (b"{\n\"model\":\n\"m\";", "not valid JSON: expected `,` or `}` at byte 15"),
        (b"{\"model\":\"\xff\"}", "not UTF-8 at byte 11"),
    ];
    for (body, expected) in cases {
        let found = model_of(body).unwrap_err().to_string();
        assert!(found.starts_with(expected), "{found}");
    }
}

#[test]
fn the_lines_of_a_segment_keep_their_places() {
    let lines = |text: &'static str| {
        super::lines(text.as_bytes()).map(|(at, line)| (at, std::str::from_utf8(line).unwrap())).collect::<Vec<_>>()
    };
    assert_eq!(lines("a\n\n \t\r\nb\r\nc"), [(0, "a"), (3, "b\r"), (4, "c")]);
    assert_eq!(lines("a\n"), [(0, "a")]);
    assert_eq!(lines(""), []);
    assert_eq!(lines("\n"), []);
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::btree_map("[a-z\"\\\\]{1,5}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn what_a_json_library_writes_is_read_back(
        custom_id in ".{1,40}", model in "\\PC{1,20}", x in any_json(), y in any_json(), pretty in any::<bool>(),
    ) {
        let body = json!({"model": model, "x": x, "messages": y});
        let line = json!({"custom_id": custom_id, "method": "POST", "url": "/v1/score", "body": body, "metadata": x});
        let text = if pretty { serde_json::to_string_pretty(&line).unwrap() } else { line.to_string() };
        let read = parse(text.as_bytes()).unwrap();
        prop_assert_eq!(&read.custom_id, &custom_id);
        prop_assert_eq!(serde_json::from_str::<String>(read.custom_id_json).unwrap(), custom_id);
        prop_assert_eq!(&read.model, &model);
        prop_assert_eq!(read.endpoint, Endpoint::Score);
        prop_assert!(text.contains(read.body));
        let whole: Value = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(&serde_json::from_str::<Value>(read.body).unwrap(), &whole["body"]);
        prop_assert_eq!(model_of(read.body.as_bytes()).unwrap(), model);
    }

    /// No bytes crash it, and what it takes for a line is JSON.
    #[test]
    fn damaged_lines_are_refused_or_still_json(
        at in 0..GOOD.len(), remove in 0usize..6, insert in proptest::collection::vec(any::<u8>(), 0..6),
    ) {
        let mut line = GOOD.as_bytes().to_vec();
        line.splice(at..(at + remove).min(GOOD.len()), insert);
        match parse(&line) {
            Ok(read) => {
                prop_assert!(serde_json::from_slice::<Value>(&line).is_ok());
                prop_assert!(!read.custom_id.is_empty() && !read.model.is_empty());
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}
