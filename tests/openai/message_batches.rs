//! Anthropic's Message Batches: a second dialect of the batches of `/v1/messages`.

use std::time::Duration;

use bytes::Bytes;
use reqwest::{Client, Method};
use serde_json::{Value, json};
use tidemill::{
    domain::{BatchId, LineSet, Scope, SegmentIndex, SegmentRef, TokenUsage, lifecycle::Ending},
    pb,
    results::{Reply, object_key, render_answer, render_error, request_id},
    store::{Commit, FinalObject, NewPart},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    client::{Said, ask, create, get, post, upload},
    support::{Server, flip, lines},
};

const PATH: &str = "/v1/messages/batches";

fn request(id: &str) -> Value {
    json!({"custom_id": id, "params": {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "hi"}]}})
}

fn body(count: usize) -> Value {
    json!({"requests": (0..count).map(|at| request(&format!("c{at}"))).collect::<Vec<_>>()})
}

/// Creates a batch of so many requests and returns its id.
async fn make(server: &Server, count: usize) -> String {
    let said = post(server, PATH, &body(count)).await;
    assert_eq!(said.status, 200, "{said:?}");
    said.id()
}

/// The id of the same batch in the other dialects.
fn plain(id: &str) -> String {
    format!("batch_{}", id.strip_prefix("msgbatch_").unwrap())
}

/// The status, the type and the message of an error, which names its request.
fn wrong(said: &Said) -> (u16, String, String) {
    let (all, error) = (&said.json, &said.json["error"]);
    assert_eq!((&all["type"], said.headers["content-type"].as_bytes()), (&json!("error"), &b"application/json"[..]));
    for name in ["x-request-id", "request-id"] {
        assert_eq!(all["request_id"].as_str().unwrap(), said.headers[name], "{said:?}");
    }
    let text = |value: &Value| value.as_str().unwrap_or_else(|| panic!("{said:?}")).to_owned();
    (said.status, text(&error["type"]), text(&error["message"]))
}

fn kind(said: &Said) -> (u16, String) {
    let (status, kind, _) = wrong(said);
    (status, kind)
}

fn invalid() -> (u16, String) {
    (400, "invalid_request_error".into())
}

fn unknown() -> (u16, String) {
    (404, "not_found_error".into())
}

/// Nothing is left of what was begun, and there is no file and no batch.
async fn nothing_is_left(server: &Server) {
    let until = async {
        while server.blobs_begun() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), until).await.expect("what was begun is cleaned up");
    assert!(get(server, "/v1/files").await.ids().is_empty() && get(server, PATH).await.ids().is_empty());
}

/// Runs a batch of one segment: a line for each of these, in output lines first.
async fn run(server: &Server, batch: &str, good: &[Vec<u8>], bad: &[Vec<u8>], not_run: u32) {
    let (of, epoch) = server.claim(batch).await;
    let key = object_key(&of, epoch, 0);
    let object = [good.concat(), bad.concat()];
    server.blobs.put(&key, object.concat().into()).await.unwrap();
    let (split, end) = (u32::try_from(good.len()).unwrap(), u32::try_from(good.len() + bad.len()).unwrap());
    let crc32c = crc32c::crc32c(&object.concat());
    let (output_bytes, error_bytes) = (object[0].len() as u64, object[1].len() as u64);
    let part = NewPart {
        object_key: key.clone(),
        output_bytes,
        error_bytes,
        crc32c,
        completed: LineSet::from_iter(0..split),
        failed: LineSet::from_iter(split..end),
        not_run,
        usage: TokenUsage::default(),
    };
    let lines = (good.len() as u64, bad.len() as u64);
    let object =
        FinalObject { object_key: key, output_bytes, error_bytes, output_lines: lines.0, error_lines: lines.1, crc32c };
    assert_eq!(server.store.finish_segment(&of, epoch, Some(&part), &object, &[]).await.unwrap(), Commit::Done);
}

/// The line of a request in a result file: a worker's answer, or an error's code.
fn line(at: u32, said: Result<(u16, &str), &str>) -> Vec<u8> {
    let batch = BatchId::from_text("batch_x");
    let (id, custom_id) = (request_id(&batch, i64::from(at) + 1), format!("\"c{at}\""));
    match said {
        Ok((status, body)) => {
            let body = Bytes::copy_from_slice(body.as_bytes());
            let reply = Reply { status, request_id: Some("r"), body: &body, is_json: true, error: None };
            render_answer(&id, custom_id.as_bytes(), reply).into_bytes()
        }
        Err(code) => render_error(&id, custom_id.as_bytes(), code, "why"),
    }
}

/// The results of a batch, by their custom ids.
async fn results(server: &Server, id: &str) -> std::collections::BTreeMap<String, Value> {
    let answer = reqwest::get(server.url(&format!("{PATH}/{id}/results"))).await.unwrap();
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["content-type"]),
        (200, &"application/x-jsonl".parse().unwrap())
    );
    let text = answer.text().await.unwrap();
    let read = |line: &str| serde_json::from_str::<Value>(line).unwrap();
    text.lines().map(read).map(|of| (of["custom_id"].as_str().unwrap().to_owned(), of["result"].clone())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_made_shown_run_read_and_deleted() {
    let server = Server::start().await;
    let made = post(&server, PATH, &body(3)).await;
    let (id, path) = (made.id(), format!("{PATH}/{}", made.id()));
    let (batch, created) = (&made.json, made.json["created_at"].as_str().unwrap());
    assert_eq!((made.status, &batch["type"], id.len()), (200, &json!("message_batch"), 41), "{made:?}");
    assert_eq!((&batch["processing_status"], &batch["results_url"]), (&json!("in_progress"), &Value::Null));
    let counts = |processing, succeeded, errored, canceled, expired| json!({"processing": processing, "succeeded": succeeded, "errored": errored, "canceled": canceled, "expired": expired});
    assert_eq!(batch["request_counts"], counts(3, 0, 0, 0, 0));
    for key in ["ended_at", "cancel_initiated_at", "archived_at"] {
        assert_eq!(batch.get(key), Some(&Value::Null), "{key}");
    }
    assert!(created.starts_with("20") && created.ends_with('Z') && batch["expires_at"].as_str().unwrap() > created);
    assert_eq!(get(&server, &path).await.json["created_at"], batch["created_at"]);
    let early = get(&server, &format!("{path}/results")).await;
    assert_eq!(kind(&early), invalid(), "there are none yet");
    assert_eq!(kind(&ask(&server, Method::DELETE, &path).await), invalid(), "it has not ended");

    let answer = r#"{"type":"message","content":[{"type":"text","text":"é\n"}],"x":1.0e2}"#;
    let refused = r#"{"type":"error","error":{"type":"invalid_request_error","message":"too long"}}"#;
    let bad = [line(1, Ok((400, refused))), line(2, Err("request_timeout"))];
    run(&server, &plain(&id), &[line(0, Ok((200, answer)))], &bad, 0).await;
    let ended = get(&server, &path).await.json;
    assert_eq!((&ended["processing_status"], &ended["request_counts"]), (&json!("ended"), &counts(0, 1, 2, 0, 0)));
    assert_eq!(ended["results_url"], format!("{path}/results"), "relative");
    assert!(ended["ended_at"].is_string());
    let found = results(&server, &id).await;
    assert_eq!(found["c0"], json!({"type": "succeeded", "message": serde_json::from_str::<Value>(answer).unwrap()}));
    let error = |kind: &str, message: &str| json!({"type": kind, "message": message});
    assert_eq!(found["c1"]["type"], "errored");
    assert_eq!(found["c1"]["error"]["error"], error("invalid_request_error", "too long"));
    assert_eq!(found["c2"]["error"]["error"], error("timeout_error", "why"));
    let raw = reqwest::get(server.url(&format!("{path}/results"))).await.unwrap().text().await.unwrap();
    assert!(raw.contains(&format!("\"message\":{answer}")), "byte for byte: {raw}");

    let late = ask(&server, Method::POST, &format!("{path}/cancel")).await;
    assert_eq!((kind(&late), late.headers["x-should-retry"].as_bytes()), (invalid(), &b"false"[..]));
    let deleted = ask(&server, Method::DELETE, &path).await;
    assert_eq!((deleted.status, deleted.json), (200, json!({"id": id, "type": "message_batch_deleted"})));
    for gone in [ask(&server, Method::DELETE, &path).await, get(&server, &path).await] {
        assert_eq!(kind(&gone), unknown());
    }
    assert!(get(&server, "/v1/files").await.ids().is_empty(), "its requests have gone with it");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_run_is_canceled_or_expired_and_not_errored() {
    let server = Server::start().await;
    for (ending, word) in [(Ending::Cancelled, "canceled"), (Ending::Expired, "expired")] {
        let id = make(&server, 4).await;
        let (batch, path) = (BatchId::from_text(plain(&id)), format!("{PATH}/{id}"));
        if ending == Ending::Cancelled {
            let canceling = ask(&server, Method::POST, &format!("{path}/cancel")).await.json;
            assert_eq!(canceling["processing_status"], "canceling");
            assert!(canceling["cancel_initiated_at"].is_string() && canceling["results_url"].is_null());
            let again = ask(&server, Method::POST, &format!("{path}/cancel")).await;
            assert_eq!((again.status, again.id()), (200, id.clone()));
        } else {
            server.store.set_expiry(&batch, tidemill::domain::Timestamp(1)).await.unwrap();
            assert_eq!(server.store.close_windows(10).await.unwrap(), std::slice::from_ref(&batch));
        }
        let code = ending.error_code();
        let bad = [line(1, Ok((500, "{}"))), line(2, Err(code)), line(3, Err(code))];
        run(&server, batch.as_str(), &[line(0, Ok((200, "{}")))], &bad, 2).await;
        let counts = get(&server, &path).await.json["request_counts"].clone();
        let mut expected = json!({"processing": 0, "succeeded": 1, "errored": 1, "canceled": 0, "expired": 0});
        expected[word] = json!(2);
        assert_eq!(counts, expected);
        let found = results(&server, &id).await;
        assert_eq!((&found["c2"], &found["c3"]), (&json!({"type": word}), &json!({"type": word})));
        assert_eq!(found["c1"]["error"]["error"]["type"], "api_error");
    }
}

#[tokio::test]
async fn damaged_results_are_never_taken_for_whole_ones() {
    let server = Server::start().await;
    let id = make(&server, 2).await;
    let path = format!("{PATH}/{id}/results");
    let good: Vec<Vec<u8>> = (0..2).map(|at| line(at, Ok((200, r#"{"type":"message"}"#)))).collect();
    run(&server, &plain(&id), &good, &[], 0).await;
    let segment = SegmentRef { batch: BatchId::from_text(plain(&id)), index: SegmentIndex(0) };
    let key = server.store.parts_of(&segment).await.unwrap().remove(0).content.object_key;
    assert_eq!(results(&server, &id).await.len(), 2);
    flip(&server, &key, 30);
    assert_eq!(kind(&get(&server, &path).await), (500, "api_error".into()));
    server.blobs.delete(&key).await.unwrap();
    assert_eq!(kind(&get(&server, &path).await), (500, "api_error".into()));
}

/// A creation over a bare socket, its body in chunks of this size.
async fn in_chunks(server: &Server, body: &[u8], size: usize) -> Value {
    let mut tcp = TcpStream::connect(server.address).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    let head =
        format!("POST {PATH} HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n");
    tcp.write_all(head.as_bytes()).await.unwrap();
    for piece in body.chunks(size) {
        tcp.write_all(&[format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat()).await.unwrap();
    }
    tcp.write_all(b"0\r\n\r\n").await.unwrap();
    let mut said = Vec::new();
    tcp.read_to_end(&mut said).await.unwrap();
    let said = String::from_utf8(said).unwrap();
    assert!(said.starts_with("HTTP/1.1 200"), "{said}");
    serde_json::from_str(said.split("\r\n\r\n").nth(1).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn params_are_kept_byte_for_byte_however_the_body_is_cut() {
    let server = Server::start().await;
    let params = [r#"{ "model":"m", "n":1.0e2,"x":"\u00e9]}\"" }"#, r#"{"y":[{}],"model":"\u006d"}"#];
    let ids = [r#""a""#, r#""\u0062""#];
    let body = format!(
        "{{\"other\":{{\"requests\":[]}},\n\"requests\" : [ {{\"custom_id\":{},\"params\":{}}} ,\n {{\"params\":{},\"custom_id\":{},\"z\":0}} ] }}\n",
        ids[0], params[0], params[1], ids[1]
    );
    for size in [1, 7, 100_000] {
        let made = in_chunks(&server, body.as_bytes(), size).await;
        let batch = plain(made["id"].as_str().unwrap());
        let input = get(&server, &format!("/v1/batches/{batch}")).await.json["input_file_id"].clone();
        let content =
            reqwest::get(server.url(&format!("/v1/files/{}/content", input.as_str().unwrap()))).await.unwrap();
        let text = content.text().await.unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        for (at, line) in lines.iter().enumerate() {
            let (id, params) = (ids[at], params[at]);
            assert!(line.contains(&format!("\"custom_id\":{id},")), "{line}");
            assert!(line.contains(&format!("\"body\":{params},")), "{line}");
        }
    }
}

#[tokio::test]
async fn one_batch_is_the_same_in_all_dialects_and_others_are_unknown_here() {
    let server = Server::start().await;
    let mut grpc = server.client().await;
    let id = make(&server, 2).await;
    let seen = grpc.get_batch(pb::GetBatchRequest { batch_id: plain(&id) }).await.unwrap().into_inner();
    assert_eq!((seen.endpoint.as_str(), seen.request_counts.unwrap().total), ("/v1/messages", 2));
    let seen = get(&server, &format!("/v1/batches/{}", plain(&id))).await;
    assert_eq!((&seen.json["endpoint"], &seen.json["status"]), (&json!("/v1/messages"), &json!("in_progress")));
    grpc.cancel_batch(pb::CancelBatchRequest { batch_id: plain(&id) }).await.unwrap();
    assert_eq!(get(&server, &format!("{PATH}/{id}")).await.json["processing_status"], "canceling");

    // The other way round, and a batch of another endpoint.
    let text = String::from_utf8(lines(1)).unwrap().replace("/v1/chat/completions", "/v1/messages");
    let file = upload(&server, text.as_bytes()).await;
    let new = json!({"input_file_id": file, "endpoint": "/v1/messages", "completion_window": "24h"});
    let over_openai = post(&server, "/v1/batches", &new).await.id();
    let chat = create(&server, &upload(&server, &lines(1)).await).await;
    let known = over_openai.replace("batch_", "msgbatch_");
    assert_eq!(get(&server, PATH).await.ids(), [known.clone(), id]);
    let chat = chat.replace("batch_", "msgbatch_");
    for (method, rest) in
        [(Method::GET, ""), (Method::POST, "/cancel"), (Method::DELETE, ""), (Method::GET, "/results")]
    {
        assert_eq!(kind(&ask(&server, method, &format!("{PATH}/{chat}{rest}")).await), unknown(), "{rest}");
    }
    assert_eq!(get(&server, "/v1/batches").await.ids().len(), 3);
    // The file of a batch that came another way is its client's.
    server.run_batch(&over_openai, 1).await;
    assert_eq!(ask(&server, Method::DELETE, &format!("{PATH}/{known}")).await.status, 200);
    assert_eq!(get(&server, &format!("/v1/files/{file}")).await.status, 200);
}

#[tokio::test]
async fn a_list_is_paged_both_ways() {
    let server = Server::start().await;
    let mut all = Vec::new();
    for _ in 0..5 {
        all.insert(0, make(&server, 1).await);
    }
    let page = async |query: &str| {
        let said = get(&server, &format!("{PATH}?{query}")).await;
        let ids = said.ids();
        assert_eq!(said.json["first_id"], json!(ids.first()), "{query}");
        assert_eq!(said.json["last_id"], json!(ids.last()), "{query}");
        (ids, said.json["has_more"].as_bool().unwrap())
    };
    let part = |range: std::ops::Range<usize>, more: bool| (all[range].to_vec(), more);
    assert_eq!(page("").await, part(0..5, false));
    assert_eq!(page("limit=2").await, part(0..2, true));
    assert_eq!(page(&format!("limit=2&after_id={}", all[1])).await, part(2..4, true));
    assert_eq!(page(&format!("limit=2&after_id={}", all[3])).await, part(4..5, false));
    assert_eq!(page(&format!("limit=2&before_id={}", all[4])).await, part(2..4, true));
    assert_eq!(page(&format!("limit=2&before_id={}", all[2])).await, part(0..2, false));
    assert_eq!(page(&format!("before_id={}", all[0])).await, part(0..0, false));
    for bad in [
        "limit=0".to_owned(),
        "limit=1001".into(),
        "limit=x".into(),
        "after_id=2".into(),
        format!("after_id={}", plain(&all[0])),
        format!("after_id={}&before_id={}", all[0], all[1]),
    ] {
        assert_eq!(kind(&get(&server, &format!("{PATH}?{bad}")).await), invalid(), "{bad}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_none_is_refused_with_what_and_where_and_leaves_nothing() {
    let server = Server::start().await;
    let raw = async |body: String| {
        let request = Client::new().post(server.url(PATH)).header("content-type", "application/json");
        Said::of(request.body(body).send().await.unwrap()).await
    };
    let with = |change: &dyn Fn(&mut Value)| {
        let mut body = body(3);
        change(&mut body["requests"]);
        body.to_string()
    };
    let in_params = |name: &'static str, value: Value| with(&move |all| all[1]["params"][name] = value.clone());
    let good = body(3).to_string();
    for (body, parts) in [
        (String::new(), &["ends before its end"][..]),
        ("[]".into(), &["not a JSON object"]),
        ("{}".into(), &["requests", "required"]),
        (r#"{"requests":[]}"#.into(), &["requests", "at least one"]),
        (r#"{"requests":{}}"#.into(), &["requests", "a list"]),
        (r#"{"requests":"x"}"#.into(), &["requests", "a list"]),
        (good[..good.len() - 1].into(), &["ends before its end"]),
        (format!("{good}x"), &["after the object"]),
        (format!("{good}{good}"), &["after the object"]),
        (good.replace(r#"{"custom_id":"c1""#, r#"{"custom_id":"c1",}"#), &["requests[1]", "not valid JSON"]),
        (with(&|all| all[2] = json!(7)), &["requests[2]", "an object"]),
        (with(&|all| all[1] = json!({})), &["requests[1]", "custom_id is missing"]),
        (with(&|all| all[1] = json!({"custom_id": "x"})), &["requests[1]", "\"x\"", "params is missing"]),
        (with(&|all| all[1]["custom_id"] = json!(7)), &["requests[1]", "custom_id is a number"]),
        (with(&|all| all[1]["custom_id"] = json!("")), &["requests[1]", "custom_id is empty"]),
        (with(&|all| all[1]["custom_id"] = json!("x".repeat(600))), &["requests[1]", "custom_id has 600 bytes"]),
        (with(&|all| all[1]["params"] = json!([])), &["requests[1]", "\"c1\"", "params is an array"]),
        (with(&|all| all[2]["custom_id"] = json!("c0")), &["requests[2]", "\"c0\"", "already in requests[0]"]),
        (in_params("stream", json!(true)), &["requests[1]", "\"c1\"", "params.stream is on"]),
        (in_params("model", json!(7)), &["requests[1]", "\"c1\"", "params.model is a number"]),
        (
            with(&|all| drop(all[1]["params"].as_object_mut().unwrap().remove("model"))),
            &["requests[1]", "params.model is missing"],
        ),
        (with(&|all| (0..2).for_each(|at| all[at]["params"]["stream"] = json!(1))), &["requests[0]", "requests[1]"]),
    ] {
        let said = raw(body.clone()).await;
        let (status, kind, message) = wrong(&said);
        assert_eq!((status, kind), invalid(), "{body}: {said:?}");
        assert!(parts.iter().all(|part| message.contains(part)), "{parts:?}: {message}");
    }
    let zipped = Client::new().post(server.url(PATH)).header("content-encoding", "gzip").body(good.clone());
    assert_eq!(wrong(&Said::of(zipped.send().await.unwrap()).await).0, 415);
    let many = format!("{{\"requests\":[{}{{}}]}}", "{},".repeat(100_000));
    assert!(wrong(&raw(many).await).2.contains("at most 100000"));
    nothing_is_left(&server).await;
    assert_eq!(raw(good).await.status, 200, "the server goes on");
}

/// What a server says to the head of a creation and the beginning of its body.
async fn said_to(server: &Server, length: u64, begin: &[u8]) -> String {
    let mut tcp = TcpStream::connect(server.address).await.unwrap();
    let head = format!("POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n");
    tcp.write_all(&[head.as_bytes(), begin].concat()).await.unwrap();
    let mut said = vec![0; 4_096];
    let read = tokio::time::timeout(Duration::from_secs(30), tcp.read(&mut said)).await.expect("an answer").unwrap();
    String::from_utf8(said[..read].to_vec()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_too_large_is_refused_before_it_is_sent_and_a_client_that_goes_leaves_nothing() {
    let server = Server::start().await;
    let said = said_to(&server, 300_000_000, b"{").await;
    assert!(said.starts_with("HTTP/1.1 413") && said.contains("request_too_large"), "{said}");
    let long = [br#"{"requests":[{"custom_id":""#, &[b'x'; 9 * 1024 * 1024][..]].concat();
    let said = said_to(&server, 200_000_000, &long).await;
    assert!(said.starts_with("HTTP/1.1 400") && said.contains("requests[0]: longer than"), "one is too long: {said}");

    let whole = body(400).to_string();
    let head = format!("POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n", whole.len());
    for cut in [0, 1, 14, 40, 300, 9_000, whole.len() - 1] {
        let mut tcp = TcpStream::connect(server.address).await.unwrap();
        tcp.write_all(&[head.as_bytes(), &whole.as_bytes()[..cut]].concat()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(30)).await;
        drop(tcp);
    }
    nothing_is_left(&server).await;
}

#[tokio::test]
async fn a_repeated_creation_with_a_key_is_the_same_batch() {
    let server = Server::start().await;
    let send = async |body: &Value, key: &str| {
        let request = Client::new().post(server.url(PATH)).header("idempotency-key", key).body(body.to_string());
        Said::of(request.send().await.unwrap()).await
    };
    let first = send(&body(3), "k").await.id();
    assert_eq!(send(&body(3), "k").await.id(), first);
    let other = send(&body(2), "k").await;
    assert_eq!((kind(&other), other.headers["x-should-retry"].as_bytes()), (invalid(), &b"false"[..]));
    assert_ne!(send(&body(3), "l").await.id(), first);
    assert_ne!(make(&server, 3).await, make(&server, 3).await, "without a key there are two");
    // The key of a batch of another endpoint.
    let file = upload(&server, &lines(1)).await;
    let new = json!({"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h", "idempotency_key": "m"});
    assert_eq!(post(&server, "/v1/batches", &new).await.status, 200);
    let files = get(&server, "/v1/files").await.ids();
    assert_eq!(kind(&send(&body(3), "m").await), invalid());
    assert_eq!(get(&server, "/v1/files").await.ids(), files, "nothing is left of it");
}

#[tokio::test]
async fn whoever_is_unknown_gets_nowhere_and_nobody_sees_what_is_anothers() {
    let server = Server::guarded().await;
    let send = async |method: Method, path: &str, token: Option<(&str, &str)>, body: String| {
        let mut request = Client::new().request(method, server.url(path)).body(body);
        if let Some((name, value)) = token {
            request = request.header(name, value);
        }
        Said::of(request.send().await.unwrap()).await
    };
    for token in [None, Some(("x-api-key", "nobody")), Some(("authorization", "Bearer nobody"))] {
        let said = send(Method::POST, PATH, token, body(2_000).to_string()).await;
        assert_eq!(kind(&said), (401, "authentication_error".into()), "{token:?}");
    }
    assert_eq!(server.blobs_begun(), 0, "it never reached the store");
    let anas = send(Method::POST, PATH, Some(("x-api-key", "ana")), body(1).to_string()).await.id();
    let path = format!("{PATH}/{anas}");
    let own = send(Method::GET, &path, Some(("authorization", "Bearer ana")), String::new()).await;
    assert_eq!(own.id(), anas);
    let bob = Some(("x-api-key", "bob"));
    for (method, rest) in
        [(Method::GET, ""), (Method::POST, "/cancel"), (Method::DELETE, ""), (Method::GET, "/results")]
    {
        let said = send(method, &format!("{path}{rest}"), bob, String::new()).await;
        assert_eq!(kind(&said), unknown(), "{rest}");
    }
    assert!(send(Method::GET, PATH, bob, String::new()).await.ids().is_empty());
    let batch = server.store.batch(&BatchId::from_text(plain(&anas)), &Scope::All).await.unwrap().unwrap();
    assert!(batch.times.cancelling.is_none());
}

#[tokio::test]
async fn ids_and_paths_that_are_none_are_told_so_in_this_dialect() {
    let server = Server::start().await;
    let id = make(&server, 1).await;
    for other in ["x", "msgbatch_", "msgbatch_x", &plain(&id), "%00", "%FF", "a%2Fb", &"x".repeat(2_000)] {
        for (method, rest) in
            [(Method::GET, ""), (Method::POST, "/cancel"), (Method::DELETE, ""), (Method::GET, "/results")]
        {
            assert_eq!(kind(&ask(&server, method, &format!("{PATH}/{other}{rest}")).await), unknown(), "{other}{rest}");
        }
    }
    assert_eq!(kind(&get(&server, &format!("{PATH}/{id}/nothing")).await), unknown());
    for (method, path) in [
        (Method::PUT, PATH.to_owned()),
        (Method::GET, format!("{PATH}/{id}/cancel")),
        (Method::POST, format!("{PATH}/{id}/results")),
    ] {
        let said = ask(&server, method, &path).await;
        assert_eq!(wrong(&said).0, 405, "{path}");
        assert!(said.headers.contains_key("allow"));
    }
}
