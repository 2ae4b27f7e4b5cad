use proptest::prelude::*;

use super::*;

fn verdict_of(endpoint: Endpoint, text: &str) -> Verdict {
    read(endpoint, text.as_bytes()).unwrap().verdict
}

fn chat(text: &str) -> Verdict {
    verdict_of(Endpoint::ChatCompletions, text)
}

fn is_bad(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Bad(_))
}

const FAIR: Verdict = Verdict::Answer(Ending::Named);

#[test]
fn a_text_that_the_engine_cut_off_is_known_in_every_choice() {
    for reason in ["stop", "length", "tool_calls", "function_call", "content_filter", "repetition", "eos_token", "x"] {
        assert_eq!(
            chat(&format!(r#"{{"choices":[{{"message":{{}},"finish_reason":"{reason}"}}]}}"#)),
            FAIR,
            "{reason}"
        );
    }
    for reason in [r#""abort""#, r#""error""#, r#""cancelled""#, r#""\u0061bort""#, r#"{"type":"abort","message":"x"}"#]
    {
        for other in ["", r#"{"finish_reason":"stop"},"#] {
            let text = format!(r#"{{"choices":[{other}{{"text":"a","finish_reason":{reason}}}]}}"#);
            assert!(matches!(verdict_of(Endpoint::Completions, &text), Verdict::CutOff(_)), "{text}");
        }
    }
    assert!(is_bad(&chat(r#"{"choices":[{"finish_reason":"timeout"}]}"#)));
}

#[test]
fn an_answer_without_a_reason_is_told_from_one_with_a_reason() {
    assert_eq!(chat(r#"{"choices":[{"finish_reason":null},{"finish_reason":null}]}"#), Verdict::Answer(Ending::Null));
    assert_eq!(chat(r#"{"choices":[{"finish_reason":"null"},{"finish_reason":""}]}"#), Verdict::Answer(Ending::Null));
    assert_eq!(chat(r#"{"choices":[{"message":{}}]}"#), Verdict::Answer(Ending::Missing));
    assert_eq!(chat(r#"{"choices":[[[[]]]]}"#), Verdict::Answer(Ending::Missing));
    assert!(is_bad(&chat(r#"{"choices":[{"finish_reason":"stop"},{"finish_reason":null}]}"#)));
    assert!(is_bad(&chat(r#"{"choices":[{"delta":{"content":"a"},"finish_reason":null}]}"#)));
}

#[test]
fn an_error_or_nothing_is_no_answer_of_any_endpoint() {
    for endpoint in Endpoint::ALL {
        for text in [
            r#"{"error":{"message":"upstream died"}}"#,
            r#"{"error":"down","usage":{}}"#,
            r#"{"object":"error","message":"no","code":500}"#,
            r#"{"detail":"Not Found"}"#,
            r#"{"choices":null,"data":null,"output":null,"results":null,"content":null,"error":{}}"#,
            r#"{"choices":{},"data":{},"output":{},"results":{}}"#,
            r#"{"choices":7,"data":"x","output":true,"results":1.5}"#,
            "{}",
            "null",
            "[]",
            "[[{}]]",
            "7",
            r#""ok""#,
        ] {
            assert!(is_bad(&verdict_of(endpoint, text)), "{endpoint}: {text}");
        }
    }
    assert!(is_bad(&chat(r#"{"choices":[]}"#)) && is_bad(&verdict_of(Endpoint::Embeddings, r#"{"data":[]}"#)));
    assert_eq!(chat(r#"{"error":{}}"#), Verdict::Bad("it contains an error and no `choices`".into()));
}

#[test]
fn each_endpoint_has_its_shape() {
    let not_asked = Verdict::Answer(Ending::NotAsked);
    assert_eq!(chat(r#"{"content":[{"type":"text","text":"a"}],"stop_reason":"end_turn"}"#), FAIR);
    assert!(matches!(chat(r#"{"content":"a","stop_reason":"abort"}"#), Verdict::CutOff(_)));
    assert_eq!(verdict_of(Endpoint::Embeddings, r#"{"data":[{"embedding":[0.1,-1e-5]}],"error":null}"#), not_asked);
    assert_eq!(verdict_of(Endpoint::Score, r#"{"data":[{"score":1}]}"#), not_asked);
    assert_eq!(verdict_of(Endpoint::Rerank, r#"{"results":[{"index":0}]}"#), not_asked);
    assert_eq!(verdict_of(Endpoint::Rerank, r#"{"results":[]}"#), not_asked, "of no documents");
    assert!(is_bad(&verdict_of(Endpoint::Embeddings, r#"{"choices":[{"finish_reason":"stop"}]}"#)));
}

#[test]
fn the_status_of_a_response_decides() {
    let of =
        |status: &str| verdict_of(Endpoint::Responses, &format!(r#"{{"status":{status},"output":[],"error":null}}"#));
    assert_eq!(of(r#""completed""#), FAIR);
    assert_eq!(of(r#""incomplete""#), FAIR);
    assert!(matches!(of(r#""cancelled""#), Verdict::CutOff(_)) && matches!(of(r#""failed""#), Verdict::CutOff(_)));
    assert!(is_bad(&of(r#""in_progress""#)) && is_bad(&of(r#""queued""#)));
    assert_eq!(of("null"), Verdict::Answer(Ending::Null));
    assert_eq!(verdict_of(Endpoint::Responses, r#"{"output":[]}"#), Verdict::Answer(Ending::Missing));
    assert!(is_bad(&verdict_of(Endpoint::Responses, r#"{"status":"failed","error":{"code":"server_error"}}"#)));
}

fn usage(text: &str) -> TokenUsage {
    let body = format!(r#"{{"choices":[{{"finish_reason":"stop"}}],"usage":{text}}}"#);
    read(Endpoint::ChatCompletions, body.as_bytes()).unwrap().usage
}

#[test]
fn usage_of_every_api_is_read() {
    let expected = TokenUsage { input: 5, cached_input: 3, output: 7, reasoning: 2, total: 12 };
    let chat = r#"{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12,"prompt_tokens_details":{"cached_tokens":3},"completion_tokens_details":{"reasoning_tokens":2}}"#;
    assert_eq!(usage(chat), expected);
    assert_eq!(usage(&chat.replace("prompt", "input").replace("completion", "output")), expected);
    let vllm = r#"{"prompt_tokens":5,"total_tokens":6,"completion_tokens":1,"prompt_tokens_details":null}"#;
    assert_eq!(usage(vllm), TokenUsage { input: 5, output: 1, total: 6, ..TokenUsage::default() });
    let both = r#"{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12,"input_tokens":5,"output_tokens":7}"#;
    assert_eq!(usage(both), TokenUsage { input: 5, output: 7, total: 12, ..TokenUsage::default() });
    assert_eq!(usage(r#""lots""#), TokenUsage::default());
    assert_eq!(usage("null"), TokenUsage::default());
}

#[test]
fn an_odd_count_costs_that_count_only() {
    let expected = TokenUsage { input: 0, cached_input: 3, output: 7, reasoning: 2, total: 12 };
    for odd in ["-1", "5.5", r#""5""#, "[5]", "{}", "true", "1e30", "18446744073709551615", r#"5,"prompt_tokens":5"#] {
        let text = format!(
            r#"{{"prompt_tokens":{odd},"completion_tokens":7,"total_tokens":12,"cost":{{"x":[0.1]}},"prompt_tokens_details":{{"cached_tokens":3,"audio_tokens":null}},"completion_tokens_details":{{"reasoning_tokens":2}}}}"#
        );
        assert_eq!(usage(&text), expected, "{odd}");
    }
    let of_details =
        usage(r#"{"prompt_tokens":5,"completion_tokens":7,"prompt_tokens_details":[1],"total_tokens":"x"}"#);
    assert_eq!(of_details, TokenUsage { input: 5, output: 7, total: 12, ..TokenUsage::default() });
    let most = i64::MAX;
    assert_eq!(usage(&format!(r#"{{"prompt_tokens":{most},"completion_tokens":{most}}}"#)).total, i64::MAX);
    let twice = r#"{"usage":{"total_tokens":1},"choices":[{"finish_reason":"stop"}],"usage":{"total_tokens":2}}"#;
    assert_eq!(
        read(Endpoint::ChatCompletions, twice.as_bytes()).unwrap(),
        Reading { usage: TokenUsage::default(), verdict: FAIR }
    );
}

#[test]
fn what_is_not_json_is_named() {
    let named = |bytes: &[u8]| read(Endpoint::ChatCompletions, bytes).unwrap_err().to_string();
    for (bytes, word) in [
        (&b""[..], "it is empty"),
        (b" \r\n", "it is empty"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b"\xff\xfe{\0}\0", "UTF-16"),
        (b"{\0}\0", "UTF-16"),
        (b"\0{\0}", "UTF-16"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"<!DOCTYPE html><p>", "HTML"),
        (b"\n<HTML>", "HTML"),
        (b"data: {}\n\ndata: [DONE]\n", "event stream"),
        (b"{\"choices\":[{\"logprob\":NaN}]}", "byte 23: NaN is not JSON"),
        (b"{\"logprob\": -Infinity}", "Infinity is not JSON"),
        (b"{\"a\":1", "ends early, after byte 6"),
        (b"{\"a\":\"\xff\"}", "byte 6 is not UTF-8"),
        (b"{} x", "byte 3: trailing characters"),
        (b"{\n\"a\":\n b}", "byte 8: expected value"),
        (b"{\"a\x01b\":1}", "control character"),
        (b"{\"a\":\"\x01\"}", "control character"),
    ] {
        let said = named(bytes);
        assert!(said.contains(word), "{said:?} does not say {word:?}");
    }
}

#[test]
fn odd_json_is_read_all_the_same() {
    let text = r#"{"\ud800":1,"a\nb":"\udfff","choices":[{"x\u0001":0,"finish_reason":"stop","message":{"content":"\ud83d"}}],"usage":{"total_tokens":9}}"#;
    let reading = read(Endpoint::ChatCompletions, text.as_bytes()).unwrap();
    assert_eq!((reading.verdict, reading.usage.total), (FAIR, 9));
    let deep = format!(r#"{{"choices":{}{},"usage":{{"total_tokens":3}}}}"#, "[".repeat(200_000), "]".repeat(200_000));
    assert_eq!(read(Endpoint::ChatCompletions, deep.as_bytes()).unwrap().usage.total, 3);
}

#[test]
fn an_excerpt_is_one_line() {
    assert_eq!(excerpt("<p>\r\n\0é".as_bytes(), 200), "<p>\\r\\n\\x00é");
    assert_eq!(excerpt(b"ab\xff", 200), "ab\\xff");
    assert_eq!(excerpt("ééé".as_bytes(), 3), "é\\xc3…");
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_named(bytes in prop::collection::vec(any::<u8>(), 0..60), pick in 0usize..6) {
        let read = read(Endpoint::ALL[pick], &bytes);
        prop_assert_eq!(read.is_ok(), serde_json::from_slice::<serde_json::Value>(&bytes).is_ok());
        prop_assert!(!excerpt(&bytes, 40).contains(char::is_control));
    }

    /// Whatever the fields hold, what the one pass says is what a tree says.
    #[test]
    fn one_pass_finds_what_a_tree_finds(
        reasons in prop::collection::vec(prop::option::of(prop::sample::select(vec!["stop", "abort", "length"])), 0..4),
        extra in "[a-z]{0,6}",
        total in any::<i64>(),
    ) {
        let choices: Vec<_> = reasons.iter().map(|reason| serde_json::json!({&extra: [{}], "finish_reason": reason})).collect();
        let body = serde_json::json!({"choices": choices, "usage": {"total_tokens": total, &extra: extra}});
        let reading = read(Endpoint::ChatCompletions, body.to_string().as_bytes()).unwrap();
        prop_assert_eq!(reading.usage.total, total.max(0));
        let named = reasons.iter().filter(|reason| reason.is_some()).count();
        match reading.verdict {
            Verdict::CutOff(_) => prop_assert!(reasons.contains(&Some("abort"))),
            Verdict::Bad(_) => prop_assert!(reasons.is_empty() || named < reasons.len()),
            Verdict::Answer(Ending::Named) => prop_assert_eq!(named, reasons.len()),
            Verdict::Answer(Ending::Null) => prop_assert_eq!(named, 0),
            Verdict::Answer(Ending::Missing | Ending::NotAsked) => prop_assert!(false),
        }
    }
}
