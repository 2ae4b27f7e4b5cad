//! Bad input: an error in OpenAI's shape, nothing kept, nothing leaked, and never the server's fault.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tidemill::api::ServerOptions;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    client::{Field, Said, ask, content_type, create, form, get, post, send_form, upload, upload_form},
    support::{Server, lines},
};

/// Waits until nothing of an upload is left.
async fn nothing_is_left(server: &Server) {
    let until = async {
        while server.blobs_begun() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), until).await.expect("what was begun is cleaned up");
    assert!(get(server, "/v1/files").await.ids().is_empty());
}

/// What a server says to bytes on a bare socket, up to the end of the connection or of patience.
async fn said_to(server: &Server, bytes: &[u8]) -> String {
    let mut tcp = TcpStream::connect(server.address).await.unwrap();
    // It may have answered and gone before all is sent.
    let _ = tcp.write_all(bytes).await;
    let mut said = Vec::new();
    let mut buffer = [0; 4_096];
    loop {
        let read = tokio::time::timeout(Duration::from_secs(30), tcp.read(&mut buffer)).await.expect("an answer");
        let read = read.unwrap_or(0);
        said.extend_from_slice(&buffer[..read]);
        let text = String::from_utf8_lossy(&said).into_owned();
        let whole = text.split_once("\r\n\r\n").is_some_and(|(head, body)| {
            let length = head
                .to_ascii_lowercase()
                .split("content-length: ")
                .nth(1)
                .and_then(|rest| rest.split("\r\n").next()?.parse::<usize>().ok());
            length.is_some_and(|length| body.len() >= length)
        });
        if read == 0 || whole {
            return text;
        }
    }
}

fn request(headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("POST /v1/files HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

/// The status and the code of an answer on a bare socket.
fn error(said: &str) -> (u16, String) {
    let status = said.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{said}"));
    let body = said.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{said}")).1;
    let body: Value = serde_json::from_str(body).unwrap_or_else(|_| panic!("{said}"));
    (status, body["error"]["code"].as_str().unwrap_or("null").to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_form_that_is_none_is_refused_and_leaves_nothing() {
    let server = Server::start().await;
    let bytes = lines(50);
    let (purpose, file): (Field<'_>, Field<'_>) = (("purpose", None, b"batch"), ("file", Some("f.jsonl"), &bytes));
    let other: Field<'_> = ("purpose", None, b"fine-tune");
    for (fields, code, param) in [
        (vec![file], "missing_required_parameter", Some("purpose")),
        (vec![purpose], "missing_required_parameter", Some("file")),
        (vec![], "missing_required_parameter", Some("purpose")),
        (vec![other, file], "invalid_value", Some("purpose")),
        (vec![file, other], "invalid_value", Some("purpose")),
        (vec![purpose, file, file], "invalid_multipart", Some("file")),
        (vec![("other", None, &[b'x'; 70_000]), purpose, file], "invalid_multipart", Some("other")),
        (vec![("x", None, b""); 40], "invalid_multipart", None),
    ] {
        let said = send_form(&server, form(&fields)).await;
        assert_eq!(said.error(), (400, Some(code), param), "{said:?}");
        nothing_is_left(&server).await;
    }
    let said = send_form(&server, form(&[other, file])).await;
    assert_eq!(said.json["error"]["message"], "Invalid value: 'fine-tune'. Supported values are: 'batch'.");

    let whole = upload_form(&bytes);
    let kind = format!("content-type: {}\r\n", content_type());
    let length = |bytes: usize| format!("content-length: {bytes}\r\n");
    for (headers, body, status, code) in [
        (String::new(), &b""[..], 415, "unsupported_content_type"),
        ("content-length: 0\r\n".into(), b"", 415, "unsupported_content_type"),
        (kind.clone() + &length(0), b"", 400, "invalid_multipart"),
        ("content-type: application/json\r\n".to_owned() + &length(2), b"{}", 415, "unsupported_content_type"),
        ("content-type: multipart/form-data\r\n".to_owned() + &length(2), b"--", 415, "unsupported_content_type"),
        (format!("{kind}content-encoding: gzip\r\n{}", length(2)), b"\x1f\x8b", 415, "unsupported_content_encoding"),
        // Torn: as long as it says, but without its closing boundary.
        (kind.clone() + &length(whole.len() - 20), &whole[..whole.len() - 20], 400, "invalid_multipart"),
        (kind.clone() + &length(60), &whole[..60], 400, "invalid_multipart"),
        (kind.clone() + &length(3), b"abc", 400, "invalid_multipart"),
        (kind.clone() + "content-length: 99999999999\r\n", b"", 413, "file_too_large"),
    ] {
        let said = said_to(&server, &request(&headers, body)).await;
        assert_eq!(error(&said), (status, code.to_owned()), "{headers} {said}");
        nothing_is_left(&server).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_gigabytes_of_preamble_are_not_read() {
    let server = Server::start().await;
    let headers = format!("content-type: {}\r\ncontent-length: 10000000000\r\n", content_type());
    let said = said_to(&server, &request(&headers, &vec![b'x'; 1024 * 1024])).await;
    assert_eq!(error(&said), (400, "invalid_multipart".into()));
    nothing_is_left(&server).await;
    // The same in the head of a part.
    let head = format!("--{}\r\nx: ", crate::client::BOUNDARY);
    let body = [head.as_bytes(), &vec![b'x'; 1024 * 1024]].concat();
    assert_eq!(error(&said_to(&server, &request(&headers, &body)).await), (400, "invalid_multipart".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_answer_arrives_while_the_client_still_sends() {
    let server = Server::start().await;
    let purpose: Field<'_> = ("purpose", None, b"fine-tune");
    let megabytes = lines(100_000);
    let body = form(&[purpose, ("file", Some("f"), &megabytes)]);
    // A client that looks at the answer only when all is sent: the connection must still be there.
    for _ in 0..3 {
        let said = send_form(&server, body.clone()).await;
        assert_eq!(said.error(), (400, Some("invalid_value"), Some("purpose")));
    }
    nothing_is_left(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_at_any_stage_leaves_nothing() {
    let server = Server::start().await;
    let body = upload_form(&lines(400));
    let headers = format!("content-type: {}\r\ncontent-length: {}\r\n", content_type(), body.len());
    let whole = request(&headers, &body);
    let begins = whole.len() - body.len();
    let cuts = [
        10,
        begins - 2,
        begins,
        begins + 1,
        begins + 100,
        begins + 250,
        begins + 9_000,
        whole.len() - 60,
        whole.len() - 3,
    ];
    for cut in cuts {
        let mut tcp = TcpStream::connect(server.address).await.unwrap();
        tcp.write_all(&whole[..cut]).await.unwrap();
        tcp.flush().await.unwrap();
        tokio::time::sleep(Duration::from_millis(30)).await;
        drop(tcp);
    }
    // Whoever sends all but does not wait for the answer has a file, or not.
    nothing_is_left_but_whole_files(&server).await;
    assert_eq!(upload(&server, &lines(1)).await.len(), 37, "the server goes on");
}

async fn nothing_is_left_but_whole_files(server: &Server) {
    let until = async {
        while server.blobs_begun() != get(server, "/v1/files").await.ids().len() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), until).await.expect("what was begun is cleaned up");
    // The last cut lacks only what follows the closing boundary's dashes.
    assert!(get(server, "/v1/files").await.ids().len() <= 1);
}

#[tokio::test]
async fn json_of_every_wrong_kind_is_refused_in_its_place() {
    let server = Server::start().await;
    let raw = async |body: &str| {
        let request = reqwest::Client::new().post(server.url("/v1/batches")).body(body.to_owned());
        Said::of(request.send().await.unwrap()).await
    };
    for body in ["", "{", "[]", "7", "null", "\"x\"", "{\"a\":}", "\u{0}"] {
        assert_eq!(raw(body).await.error(), (400, Some("invalid_json"), None), "{body}");
    }
    let large = format!(r#"{{"metadata":{{"k":"{}"}}}}"#, "x".repeat(70_000));
    assert_eq!(raw(&large).await.error(), (413, Some("request_too_large"), None));
    for (field, value) in [
        ("input_file_id", json!(7)),
        ("endpoint", json!(["/v1/score"])),
        ("completion_window", json!(24)),
        ("metadata", json!("x")),
        ("output_expires_after", json!(3_600)),
        ("webhook", json!([])),
        ("idempotency_key", json!({})),
    ] {
        let mut body = crate::client::of_file("file-x");
        body[field] = value;
        let said = post(&server, "/v1/batches", &body).await;
        assert_eq!(said.error(), (400, Some("invalid_type"), Some(field)), "{said:?}");
    }
    let deep = "[".repeat(30_000);
    assert_eq!(raw(&deep).await.error().0, 400);
    let zipped = reqwest::Client::new().post(server.url("/v1/batches")).header("content-encoding", "gzip").body("x");
    let zipped = Said::of(zipped.send().await.unwrap()).await;
    assert_eq!(zipped.error(), (415, Some("unsupported_content_encoding"), None));
}

/// Every field of these bodies, as the way to it.
fn fields(of: &Value) -> Vec<String> {
    let below = |name: String, value: &Value| {
        let inner = fields(value).into_iter().map(|inner| format!("/{name}{inner}")).collect::<Vec<_>>();
        std::iter::once(format!("/{name}")).chain(inner).collect::<Vec<_>>()
    };
    match of {
        Value::Object(fields) => fields.iter().flat_map(|(name, value)| below(name.clone(), value)).collect(),
        Value::Array(list) => list.iter().enumerate().flat_map(|(at, value)| below(at.to_string(), value)).collect(),
        _ => Vec::new(),
    }
}

/// What a fuzzer does with the shapes that it knows: one field is something else, in every place.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_field_is_the_answer_is_an_error_of_the_client_or_none() {
    let server = Server::start().await;
    let file = upload(&server, &lines(1)).await;
    let announced = json!({"bytes": 10, "filename": "f", "mime_type": "m", "purpose": "batch",
        "expires_after": {"anchor": "created_at", "seconds": 3600}});
    let announced_id = post(&server, "/v1/uploads", &announced).await.id();
    let webhook = json!({"url": "http://127.0.0.1:9/x", "secret": "whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0", "max_retries": 1,
        "timeout_seconds": 5, "events": ["completed"]});
    let requests = json!([{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": []}}]);
    let bodies = [
        (
            "/v1/batches".to_owned(),
            json!({"input_file_id": file, "endpoint": "/v1/chat/completions", "metadata": {"a": "b"},
            "completion_window": "24h", "priority": 0, "output_expires_after": {"anchor": "created_at", "seconds": 3600},
            "webhook": webhook}),
        ),
        (
            "/v1/batches".to_owned(),
            json!({"endpoint": "/v1/chat/completions", "requests": requests,
            "webhook_endpoint_id": "we_x", "idempotency_key": "k"}),
        ),
        ("/v1/uploads".to_owned(), announced),
        (format!("/v1/uploads/{announced_id}/complete"), json!({"part_ids": ["part_x"], "md5": "0".repeat(32)})),
    ];
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(1e300),
        json!(""),
        json!("\u{0}"),
        json!("x".repeat(600)),
        json!([]),
        json!([null]),
        json!({"": {}}),
    ];
    let client = reqwest::Client::new();
    for (path, good) in &bodies {
        for field in fields(good) {
            for value in &values {
                let mut body = good.clone();
                *body.pointer_mut(&field).unwrap() = value.clone();
                let said = client.post(server.url(path)).body(body.to_string()).send().await.unwrap();
                let said = Said::of(said).await;
                if said.status != 200 {
                    let (status, _, _) = said.error();
                    assert!((400..500).contains(&status), "{field} {value}: {said:?}");
                }
            }
        }
    }
}

#[tokio::test]
async fn ids_paths_and_queries_that_are_none_are_told_so() {
    let server = Server::start().await;
    let unknown =
        ["x", "file-x", "batch_x", "%00", "%FF", "..%2F..%2Fetc", "a%2Fb", &"x".repeat(2_000), "%F0%9F%98%80"];
    for id in unknown {
        for (method, path) in [
            (Method::GET, format!("/v1/files/{id}")),
            (Method::GET, format!("/v1/files/{id}/content")),
            (Method::DELETE, format!("/v1/files/{id}")),
            (Method::GET, format!("/v1/batches/{id}")),
            (Method::GET, format!("/v1/batches/{id}/events")),
            (Method::GET, format!("/v1/batches/{id}/output")),
            (Method::POST, format!("/v1/uploads/{id}/cancel")),
            (Method::POST, format!("/v1/batches/{id}/cancel")),
            (Method::GET, format!("/v1/models/{id}")),
        ] {
            assert_eq!(ask(&server, method, &path).await.error().0, 404, "{path}");
        }
    }
    for (path, code) in [
        ("/v1/files?limit=0", "integer_below_min_value"),
        ("/v1/files?limit=10001", "integer_above_max_value"),
        ("/v1/batches?limit=0", "integer_below_min_value"),
        ("/v1/batches?limit=101", "integer_above_max_value"),
        ("/v1/batches?limit=ten", "invalid_type"),
        ("/v1/batches?after=2", "invalid_value"),
        ("/v1/files?after=batch_00000000000000000000000000000000", "invalid_value"),
        ("/v1/files?order=up", "invalid_value"),
    ] {
        let said = get(&server, path).await;
        assert_eq!((said.status, said.error().1), (400, Some(code)), "{path}");
    }
    for path in
        ["/v1/nothing", "/v1/", "/v1/files/a/b", "/v1/audio/speech", "/v1/batches/x/y/z", "/v1/responses/resp_1"]
    {
        let said = get(&server, path).await;
        assert_eq!(said.error(), (404, Some("unknown_url"), None), "{path}");
    }
    for (method, path) in [
        (Method::PUT, "/v1/files"),
        (Method::DELETE, "/v1/batches"),
        (Method::GET, "/v1/batches/x/cancel"),
        (Method::GET, "/v1/chat/completions"),
        (Method::POST, "/v1/models"),
    ] {
        let said = ask(&server, method, path).await;
        assert_eq!(said.error(), (405, Some("method_not_supported"), None), "{path}");
        assert!(said.headers.contains_key("allow"), "{path}");
    }
}

#[tokio::test]
async fn whoever_is_unknown_gets_nowhere() {
    let server = Server::guarded().await;
    let form = upload_form(&lines(5_000));
    for (header, value) in
        [("x", "y"), ("authorization", "Bearer nobody"), ("authorization", "Basic cm9vdA=="), ("x-api-key", "ana")]
    {
        let request = reqwest::Client::new().post(server.url("/v1/files")).header("content-type", content_type());
        let said = Said::of(request.header(header, value).body(form.clone()).send().await.unwrap()).await;
        assert_eq!(said.error(), (401, Some("invalid_api_key"), None), "{header}");
        assert_eq!(said.headers["www-authenticate"], "Bearer");
        let chat = reqwest::Client::new().post(server.url("/v1/chat/completions")).header(header, value).body("{}");
        assert_eq!(Said::of(chat.send().await.unwrap()).await.error().0, 401);
    }
    assert_eq!(server.blobs_begun(), 0, "it never reached the store");
    let own = reqwest::Client::new().get(server.url("/v1/files")).bearer_auth("ana").header("x-request-id", "mine");
    let own = Said::of(own.send().await.unwrap()).await;
    assert_eq!((own.status, &own.headers["x-request-id"]), (200, &"mine".parse().unwrap()));
}

#[tokio::test]
async fn a_strangers_name_is_refused_in_the_same_shape() {
    let server = Server::start().await;
    let request = reqwest::Client::new().get(server.url("/v1/files")).header("host", "attacker.example");
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status().as_u16(), 421);
    let said: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
    assert_eq!(said["error"]["code"], "host_not_allowed");
    let request = reqwest::Client::new().post(server.url("/v1/batches")).header("origin", "https://attacker.example");
    assert_eq!(request.body("{}").send().await.unwrap().status().as_u16(), 403);
}

#[tokio::test]
async fn a_node_without_the_role_api_does_not_say_that_there_are_no_files() {
    let server = Server::with(ServerOptions { rpcs: false, ..ServerOptions::default() }).await;
    for path in ["/v1/files", "/v1/models", "/v1/batches/x"] {
        assert_eq!(get(&server, path).await.error(), (503, Some("not_an_api_node"), None), "{path}");
    }
}

#[tokio::test]
async fn a_finished_batch_stays_as_it_is() {
    let server = Server::start().await;
    let file = upload(&server, &lines(2)).await;
    let batch = create(&server, &file).await;
    server.run_batch(&batch, 2).await;
    let path = format!("/v1/batches/{batch}");
    let before = get(&server, &path).await.json;
    for _ in 0..2 {
        assert_eq!(ask(&server, Method::POST, &format!("{path}/cancel")).await.error().0, 409);
    }
    assert_eq!(get(&server, &path).await.json, before);
}
