//! What OpenAI does not have: requests in the call that creates their batch, and results before its end.

use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    client::{Said, ask, create, get, of_file, post, upload},
    support::{Server, lines},
};

fn inline(count: usize) -> Value {
    let request = |at: usize| json!({"custom_id": format!("c{at}"), "body": {"model": "m", "messages": []}});
    json!({"endpoint": "/v1/chat/completions", "requests": (0..count).map(request).collect::<Vec<_>>()})
}

#[tokio::test]
async fn requests_in_the_call_become_a_file_and_a_batch_of_it() {
    let server = Server::start().await;
    // The body is passed on as it is written, blanks, numbers and all.
    let odd = r#"{"model":"m",  "temperature": 1.0e0, "messages":[]}"#;
    let body = format!(
        "{{\"requests\": [{{\"custom_id\":\"ü\", \"body\": {odd}}}], \"endpoint\": \"/v1/chat/completions\", \
         \"metadata\": {{\"team\": \"search\"}}}}"
    );
    let said = Said::of(reqwest::Client::new().post(server.url("/v1/batches")).body(body).send().await.unwrap()).await;
    assert_eq!((said.status, &said.json["request_counts"]["total"]), (200, &json!(1)), "{said:?}");
    assert_eq!((&said.json["completion_window"], &said.json["metadata"]), (&json!("24h"), &json!({"team": "search"})));
    let file = said.json["input_file_id"].as_str().unwrap();
    let content = reqwest::get(server.url(&format!("/v1/files/{file}/content"))).await.unwrap().text().await.unwrap();
    let line = format!("{{\"custom_id\":\"ü\",\"method\":\"POST\",\"url\":\"/v1/chat/completions\",\"body\":{odd}}}\n");
    assert_eq!(content, line);
    // A thousand of them are more than other bodies may be.
    let said = post(&server, "/v1/batches", &inline(1_000)).await;
    assert_eq!((said.status, &said.json["request_counts"]["total"]), (200, &json!(1_000)), "{said:?}");
}

#[tokio::test]
async fn wrong_requests_in_the_call_are_named_and_nothing_is_kept() {
    let server = Server::start().await;
    let with = |field: &str, value: Value| {
        let mut body = inline(2);
        body[field] = value;
        body
    };
    let bad = json!([{"custom_id": "a", "body": {"model": "m", "messages": []}}, {"custom_id": "a", "body": {}}]);
    for (body, status, code, param) in [
        (with("requests", json!([])), 400, "invalid_value", "requests"),
        (with("requests", json!(7)), 400, "invalid_type", "requests"),
        (with("requests", json!([{"body": {}}])), 400, "missing_required_parameter", "requests[0].custom_id"),
        (with("requests", bad), 400, "invalid_request", "requests"),
        (with("input_file_id", json!("file-x")), 400, "mutually_exclusive_parameters", "requests"),
        (with("endpoint", Value::Null), 400, "missing_required_parameter", "endpoint"),
        (with("endpoint", json!("/v1/x")), 400, "invalid_value", "endpoint"),
        (with("completion_window", json!("1s")), 400, "invalid_value", "completion_window"),
        (inline(1_001), 400, "invalid_value", "requests"),
        (
            with("requests", json!([{"custom_id": "a", "body": {"x": "y".repeat(4 * 1024 * 1024)}}])),
            413,
            "request_too_large",
            "",
        ),
        (with("metadata", json!({"a": "b".repeat(70_000)})), 413, "request_too_large", ""),
        (
            with("requests", json!([{"custom_id": "a", "body": {"model": "m", "x": "y".repeat(3_500_000)}}])),
            400,
            "invalid_value",
            "requests",
        ),
    ] {
        let said = post(&server, "/v1/batches", &body).await;
        let text = said.json.to_string();
        assert_eq!(said.error(), (status, Some(code), (!param.is_empty()).then_some(param)), "{said:?}");
        assert!(!text.contains("inline_requests"), "{text}");
    }
    // Without either, the message is OpenAI's.
    let said = post(&server, "/v1/batches", &json!({"endpoint": "/v1/score"})).await;
    assert_eq!(said.json["error"]["message"], "Missing required parameter: 'input_file_id'.");
    let said = post(&server, "/v1/batches", &with("requests", Value::Null)).await;
    assert_eq!(said.error(), (400, Some("missing_required_parameter"), Some("input_file_id")));
    assert!(get(&server, "/v1/files").await.ids().is_empty() && get(&server, "/v1/batches").await.ids().is_empty());
}

#[tokio::test]
async fn an_idempotency_key_stands_for_one_request() {
    let server = Server::start().await;
    let file = upload(&server, &lines(2)).await;
    let send = async |body: Value| {
        let request = reqwest::Client::new().post(server.url("/v1/batches")).header("idempotency-key", "k");
        Said::of(request.body(body.to_string()).send().await.unwrap()).await
    };
    let first = send(of_file(&file)).await;
    assert_eq!(first.status, 200);
    // The same words in another order and with what is the default anyway.
    let mut same = of_file(&file);
    (same["completion_window"], same["priority"], same["metadata"]) = (json!("1d"), json!(0), json!({}));
    assert_eq!(send(same).await.id(), first.id());
    for (field, value) in [("priority", json!(1)), ("completion_window", json!("2h")), ("metadata", json!({"a": "b"}))]
    {
        let mut other = of_file(&file);
        other[field] = value;
        let said = send(other).await;
        assert_eq!(said.error(), (409, Some("idempotency_conflict"), Some("idempotency_key")), "{field}");
        assert_eq!(said.headers["x-should-retry"], "false");
    }
    assert_eq!(send(inline(1)).await.error().0, 409);
    assert_eq!(get(&server, "/v1/batches").await.ids(), [first.id()]);
    assert_eq!(get(&server, "/v1/files").await.ids(), [file]);
}

/// What is there after so many lines: the ids, whether more will come, and the number of the last line.
async fn output(server: &Server, batch: &str, offset: usize) -> (Vec<String>, bool, usize) {
    let answer = reqwest::get(server.url(&format!("/v1/batches/{batch}/output?offset={offset}"))).await.unwrap();
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["content-type"]),
        (200, &"application/jsonl".parse().unwrap())
    );
    let header = |name: &str| answer.headers()[name].to_str().unwrap().to_owned();
    let (incomplete, last) = (header("x-incomplete") == "true", header("x-last-line").parse().unwrap());
    let text = answer.text().await.unwrap();
    let id = |line: &str| serde_json::from_str::<Value>(line).unwrap()["custom_id"].as_str().unwrap().to_owned();
    (text.lines().map(id).collect(), incomplete, last)
}

#[tokio::test]
async fn results_can_be_polled_before_the_end() {
    let server = Server::start().await;
    let batch = create(&server, &upload(&server, &lines(6)).await).await;
    assert_eq!(output(&server, &batch, 0).await, (vec![], true, 0));
    let lease = server.claim(&batch).await;
    server.part(&lease, 2..4, 4).await;
    let ids = |of: &[u32]| of.iter().map(|at| format!("c{at}")).collect::<Vec<_>>();
    assert_eq!(output(&server, &batch, 0).await, (ids(&[2, 3]), true, 2));
    assert_eq!(output(&server, &batch, 1).await, (ids(&[3]), true, 2));
    assert_eq!(output(&server, &batch, 2).await, (vec![], true, 2));
    // What failed comes too, and what is there keeps its place.
    server.part(&lease, 0..2, 1).await;
    assert_eq!(output(&server, &batch, 2).await, (ids(&[0, 1]), true, 4));
    assert_eq!(output(&server, &batch, 3).await, (ids(&[1]), true, 4));
    assert_eq!(output(&server, &batch, 0).await, (ids(&[2, 3, 0, 1]), true, 4));
    assert_eq!(output(&server, &batch, 99).await, (vec![], true, 4));
    // No file before the end, as at OpenAI.
    assert_eq!(get(&server, &format!("/v1/batches/{batch}")).await.json["output_file_id"], Value::Null);
    let ended = create(&server, &upload(&server, &lines(3)).await).await;
    server.run_batch(&ended, 2).await;
    assert_eq!(output(&server, &ended, 0).await, (ids(&[0, 1, 2]), false, 3));
    assert_eq!(output(&server, &ended, 3).await, (vec![], false, 3));
    for wrong in ["-1", "x", "1.5", "99999999999999999999"] {
        let said = get(&server, &format!("/v1/batches/{batch}/output?offset={wrong}")).await;
        assert_eq!(said.error(), (400, Some("invalid_value"), Some("offset")), "{wrong}");
    }
    assert_eq!(get(&server, "/v1/batches/batch_x/output").await.error(), (404, None, None));
    assert_eq!(ask(&server, Method::POST, &format!("/v1/batches/{batch}/output")).await.error().0, 405);
}
