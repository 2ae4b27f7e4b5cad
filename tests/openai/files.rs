//! Files.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tidemill::{
    api::ServerOptions,
    config::BadFiles,
    domain::{FileId, NodeId, Scope},
    pb,
    store::FileFilter,
    upkeep::{self, Upkeep},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    client::{Field, Said, ask, content_type, create, form, get, of_file, post, send_form, upload, upload_form},
    support::{Server, chunk, lines, spec},
};

#[tokio::test]
async fn a_file_is_uploaded_shown_read_and_deleted() {
    let server = Server::start().await;
    let bytes = lines(40);
    let said = send_form(&server, upload_form(&bytes)).await;
    let file = &said.json;
    let keys = ["id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "status_details"];
    for key in keys {
        assert!(file.as_object().unwrap().contains_key(key), "{key}");
    }
    assert_eq!((said.status, &file["object"], &file["status"]), (200, &json!("file"), &json!("processed")));
    assert_eq!(
        (&file["filename"], &file["purpose"], &file["bytes"]),
        (&json!("in.jsonl"), &json!("batch"), &json!(bytes.len()))
    );
    assert_eq!((&file["tidemill"]["line_count"], &file["expires_at"]), (&json!(40), &Value::Null));
    assert!(file["created_at"].is_i64(), "whole seconds");
    assert!(said.headers.contains_key("openai-processing-ms"));
    let path = format!("/v1/files/{}", said.id());
    assert_eq!(get(&server, &path).await.json, *file);

    let content = reqwest::get(server.url(&format!("{path}/content"))).await.unwrap();
    assert_eq!(content.headers()["content-type"], "application/octet-stream");
    assert_eq!(content.headers()["content-length"], bytes.len().to_string());
    assert_eq!(content.headers()["content-disposition"], "attachment; filename=\"in.jsonl\"");
    assert!(content.headers().contains_key("x-request-id"));
    assert_eq!(content.bytes().await.unwrap(), bytes);
    let part = reqwest::Client::new().get(server.url(&format!("{path}/content"))).header("range", "bytes=7-");
    let part = part.send().await.unwrap();
    assert_eq!((part.status().as_u16(), part.bytes().await.unwrap()), (206, bytes[7..].to_vec().into()));
    let beyond = reqwest::Client::new().get(server.url(&format!("{path}/content"))).header("range", "bytes=999999-");
    let beyond = Said::of(beyond.send().await.unwrap()).await;
    assert_eq!(beyond.error(), (416, Some("range_not_satisfiable"), None));

    let deleted = ask(&server, Method::DELETE, &path).await;
    assert_eq!((deleted.status, deleted.json), (200, json!({"id": said.id(), "object": "file", "deleted": true})));
    for gone in [ask(&server, Method::DELETE, &path).await, get(&server, &path).await] {
        assert_eq!(gone.error(), (404, None, Some("id")));
    }
    assert_eq!(get(&server, &format!("{path}/content")).await.error(), (404, None, Some("id")));
}

/// An upload over a bare socket, its body in chunks of these sizes.
async fn upload_in_chunks(server: &Server, body: &[u8], size: usize) -> Value {
    let mut tcp = tokio::net::TcpStream::connect(server.address).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    let head = format!(
        "POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: {}\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n",
        content_type()
    );
    tcp.write_all(head.as_bytes()).await.unwrap();
    for piece in body.chunks(size) {
        tcp.write_all(format!("{:x}\r\n", piece.len()).as_bytes()).await.unwrap();
        tcp.write_all(&[piece, b"\r\n"].concat()).await.unwrap();
    }
    tcp.write_all(b"0\r\n\r\n").await.unwrap();
    let mut said = Vec::new();
    tcp.read_to_end(&mut said).await.unwrap();
    let said = String::from_utf8(said).unwrap();
    assert!(said.starts_with("HTTP/1.1 200"), "{said}");
    serde_json::from_str(said.split("\r\n\r\n").nth(1).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn any_order_of_fields_and_any_chunking_is_the_same_file() {
    let server = Server::start().await;
    let bytes = lines(3);
    let purpose: Field<'_> = ("purpose", None, b"batch");
    let file: Field<'_> = ("file", Some("in.jsonl"), &bytes);
    let anchor: Field<'_> = ("expires_after[anchor]", None, b"created_at");
    let seconds: Field<'_> = ("expires_after[seconds]", None, b"3600");
    let other: Field<'_> = ("custom_llm_provider", None, b"openai");
    let orders = [
        vec![purpose, anchor, seconds, file],
        vec![file, purpose, anchor, seconds],
        vec![anchor, seconds, file, purpose],
        vec![other, seconds, file, other, anchor, purpose],
    ];
    for (fields, sizes) in orders.iter().zip([[1, 7], [64, 13], [999, 2], [3, 100_000]]) {
        for size in sizes {
            let made = upload_in_chunks(&server, &form(fields), size).await;
            let id = made["id"].as_str().unwrap();
            assert_eq!((&made["bytes"], &made["filename"]), (&json!(bytes.len()), &json!("in.jsonl")), "{size}");
            let (created, expires) = (made["created_at"].as_i64().unwrap(), made["expires_at"].as_i64().unwrap());
            assert_eq!(expires, created + 3_600);
            let content = reqwest::get(server.url(&format!("/v1/files/{id}/content"))).await.unwrap();
            assert_eq!(content.bytes().await.unwrap(), bytes);
        }
    }
}

#[tokio::test]
async fn when_a_file_expires_may_be_said_in_every_form() {
    let server = Server::start().await;
    let bytes = lines(1);
    let send = async |more: &[Field<'_>]| {
        let fields = [&[("purpose", None, &b"batch"[..]), ("file", Some("f"), &bytes)][..], more].concat();
        send_form(&server, form(&fields)).await
    };
    let json_form = send(&[("expires_after", None, br#"{"anchor":"created_at","seconds":7200}"#)]).await.json;
    assert_eq!(json_form["expires_at"].as_i64().unwrap(), json_form["created_at"].as_i64().unwrap() + 7_200);
    let anchor: Field<'_> = ("expires_after[anchor]", None, b"created_at");
    for (bad, param) in [
        (vec![anchor, ("expires_after[seconds]", None, b"3599")], "expires_after.seconds"),
        (vec![anchor, ("expires_after[seconds]", None, b"2592001")], "expires_after.seconds"),
        (vec![anchor, ("expires_after[seconds]", None, b"-5")], "expires_after.seconds"),
        (vec![anchor, ("expires_after[seconds]", None, b"soon")], "expires_after.seconds"),
        (vec![anchor], "expires_after.seconds"),
        (vec![("expires_after[seconds]", None, b"3600")], "expires_after.anchor"),
        (vec![("expires_after", None, b"{}")], "expires_after.anchor"),
        (vec![("expires_after", None, b"never")], "expires_after"),
    ] {
        let said = send(&bad).await;
        assert_eq!((said.status, said.error().2), (400, Some(param)), "{said:?}");
    }
    let files = server.store.files(&FileFilter::within(Scope::All), None, 9).await.unwrap();
    assert_eq!(files.len(), 1, "nothing of the others is kept");
}

#[tokio::test]
async fn a_file_in_use_is_deleted_at_once_and_its_batch_finishes() {
    let server = Server::start().await;
    let file = upload(&server, &lines(10)).await;
    let batch = create(&server, &file).await;
    let path = format!("/v1/files/{file}");
    assert_eq!(ask(&server, Method::DELETE, &path).await.json["deleted"], true);
    assert_eq!(get(&server, &path).await.status, 404);
    assert!(get(&server, "/v1/files").await.ids().is_empty());
    assert!(server.store.delete_due_files(9).await.unwrap().is_empty(), "its batch reads it");
    server.run_batch(&batch, 10).await;
    let ended = get(&server, &format!("/v1/batches/{batch}")).await.json;
    assert_eq!((&ended["status"], &ended["input_file_id"]), (&json!("completed"), &json!(file)));
    let due = server.store.delete_due_files(9).await.unwrap();
    assert_eq!(due.iter().map(FileId::as_str).collect::<Vec<_>>(), [file]);
}

#[tokio::test]
async fn bad_lines_come_back_with_code_line_and_param() {
    let server = Server::start().await;
    let good = String::from_utf8(lines(1)).unwrap();
    let bad = [
        "not json",
        r#"{"method":"POST","url":"/v1/chat/completions","body":{"model":"m"}}"#,
        r#"{"custom_id":"a","method":"GET","url":"/v1/chat/completions","body":{"model":"m"}}"#,
        r#"{"custom_id":"b","method":"POST","url":"/v1/nothing","body":{"model":"m"}}"#,
        r#"{"custom_id":"c","method":"POST","url":"/v1/chat/completions","body":{}}"#,
        r#"{"custom_id":"d","method":"POST","url":"/v1/chat/completions","body":{"model":"m","stream":true}}"#,
        good.trim(),
    ];
    let said = send_form(&server, upload_form(format!("{good}{}\n", bad.join("\n")).as_bytes())).await;
    assert_eq!(said.error(), (400, Some("invalid_json_line"), Some("file")));
    let listed = said.json["error"]["errors"]["data"].as_array().unwrap();
    let found: Vec<_> = listed
        .iter()
        .map(|one| (one["line"].as_i64().unwrap(), one["code"].as_str().unwrap(), one["param"].as_str()))
        .collect();
    let expected = [
        (2, "invalid_json_line", None),
        (3, "missing_required_parameter", Some("custom_id")),
        (4, "invalid_method", Some("method")),
        (5, "invalid_url", Some("url")),
        (6, "invalid_request", Some("body.model")),
        (7, "streaming_unsupported", Some("body.stream")),
        (8, "duplicate_custom_id", Some("custom_id")),
    ];
    assert_eq!(found, expected);
    assert!(listed[0]["message"].as_str().unwrap().starts_with("This line is not parseable as valid JSON. "));
    assert!(listed[1]["message"].as_str().unwrap().starts_with("Missing required parameter: 'custom_id'. "));
    let many = send_form(&server, upload_form("nonsense\n".repeat(150).as_bytes())).await;
    assert_eq!(many.json["error"]["errors"]["data"].as_array().unwrap().len(), 100);
    assert!(many.json["error"]["message"].as_str().unwrap().starts_with("150 bad lines"), "{many:?}");
    let empty = send_form(&server, upload_form(b"")).await;
    assert_eq!(empty.error(), (400, Some("empty_file"), Some("file")));
    assert!(
        empty.json["error"]["message"]
            .as_str()
            .unwrap()
            .starts_with("Invalid file format for Batch API. Must be .jsonl")
    );
    assert!(get(&server, "/v1/files").await.ids().is_empty(), "nothing is kept");
}

#[tokio::test]
async fn lists_go_on_after_an_id_in_both_orders() {
    let server = Server::start().await;
    let mut made = Vec::new();
    for _ in 0..5 {
        made.push(upload(&server, &lines(1)).await);
    }
    let page = get(&server, "/v1/files?limit=2").await;
    assert_eq!(page.ids(), [made[4].clone(), made[3].clone()]);
    assert_eq!(page.json["has_more"], true);
    assert_eq!((&page.json["first_id"], &page.json["last_id"]), (&json!(made[4]), &json!(made[3])));
    // What the page ended with may be gone when the next one is asked for.
    ask(&server, Method::DELETE, &format!("/v1/files/{}", made[3])).await;
    let page = get(&server, &format!("/v1/files?limit=2&after={}", made[3])).await;
    assert_eq!(page.ids(), [made[2].clone(), made[1].clone()]);
    let last = get(&server, &format!("/v1/files?limit=2&after={}", made[1])).await;
    assert_eq!((last.ids(), &last.json["has_more"]), (vec![made[0].clone()], &json!(false)));
    let oldest = get(&server, "/v1/files?order=asc&limit=2&purpose=batch").await;
    assert_eq!(oldest.ids(), made[..2]);
    let next = get(&server, &format!("/v1/files?order=asc&after={}", made[2])).await;
    assert_eq!((next.ids(), &next.json["has_more"]), (vec![made[4].clone()], &json!(false)));
    let none = get(&server, "/v1/files?purpose=fine-tune&provider=openai").await;
    assert_eq!((none.status, none.ids().len(), &none.json["has_more"]), (200, 0, &json!(false)));
    assert_eq!((&none.json["first_id"], &none.json["last_id"]), (&Value::Null, &Value::Null));
}

#[tokio::test]
async fn a_repeated_upload_with_a_key_is_the_same_file() {
    let server = Server::start().await;
    let send = async |bytes: &[u8]| {
        let request = reqwest::Client::new().post(server.url("/v1/files")).header("content-type", content_type());
        let request = request.header("idempotency-key", "my-key").body(upload_form(bytes));
        Said::of(request.send().await.unwrap()).await
    };
    let (first, again) = (send(&lines(2)).await, send(&lines(2)).await);
    assert_eq!((first.status, &first.json), (200, &again.json));
    let other = send(&lines(3)).await;
    assert_eq!(other.error(), (409, Some("idempotency_conflict"), Some("idempotency_key")));
    assert_eq!(other.headers["x-should-retry"], "false");
    assert!(other.json["error"]["message"].as_str().unwrap().contains("conflict"));
}

#[tokio::test]
async fn bad_files_fail_their_batch_where_the_operator_wants_openais_way() {
    let options = ServerOptions { bad_files: BadFiles::FailBatch, ..ServerOptions::default() };
    let server = Server::with(options).await;
    let good = String::from_utf8(lines(2)).unwrap();
    let text = format!("{good}nonsense\n{{\"custom_id\":\"x\"}}\n");
    let said = send_form(&server, upload_form(text.as_bytes())).await;
    assert_eq!(
        (said.status, &said.json["status"], &said.json["bytes"]),
        (200, &json!("processed"), &json!(text.len()))
    );
    let content = reqwest::get(server.url(&format!("/v1/files/{}/content", said.id()))).await.unwrap();
    assert_eq!(content.bytes().await.unwrap(), text.as_bytes());
    let batch = post(&server, "/v1/batches", &of_file(&said.id())).await;
    assert_eq!((batch.status, &batch.json["status"]), (200, &json!("failed")), "{batch:?}");
    assert!(batch.json["failed_at"].is_i64());
    assert_eq!(batch.json["request_counts"], json!({"total": 0, "completed": 0, "failed": 0}));
    let errors = batch.json["errors"]["data"].as_array().unwrap();
    let found: Vec<_> =
        errors.iter().map(|one| (one["line"].as_i64().unwrap(), one["code"].as_str().unwrap())).collect();
    assert_eq!(found, [(3, "invalid_json_line"), (4, "missing_required_parameter")]);
    assert!(errors[0]["message"].as_str().unwrap().starts_with("This line is not parseable as valid JSON. "));
    // What is no JSONL at all is refused at OpenAI, too.
    for none in ["nonsense\n", ""] {
        assert_eq!(send_form(&server, upload_form(none.as_bytes())).await.status, 400, "{none}");
    }
    // gRPC keeps its promise: bad lines never become a file.
    let mut grpc = server.client().await;
    let messages = tokio_stream::iter([spec(pb::FileSpec::default()), chunk(text.into_bytes())]);
    assert_eq!(grpc.upload_file(messages).await.unwrap_err().code(), tonic::Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_upkeep_deletes_what_was_hidden_once_its_batch_has_ended() {
    let server = Server::start().await;
    let file = upload(&server, &lines(2)).await;
    let batch = create(&server, &file).await;
    ask(&server, Method::DELETE, &format!("/v1/files/{file}")).await;
    server.run_batch(&batch, 2).await;
    assert_eq!(server.store.count_files().await.unwrap(), 2, "the input and the output");
    let sweeps = upkeep::of_batches(&server.store, &server.blobs, Duration::from_secs(30));
    tokio::spawn(Upkeep::new(server.store.clone(), NodeId::generate(), sweeps).run(server.shutdown.clone()));
    let gone = async {
        while server.store.count_files().await.unwrap() > 1 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.expect("the input is deleted");
}
