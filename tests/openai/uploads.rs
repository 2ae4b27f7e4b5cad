//! Uploads in parts.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use tidemill::{
    access::CallerLimits,
    api::ServerOptions,
    config::BadFiles,
    domain::{NodeId, Scope, UploadId, upload::PART_BYTES},
    upkeep::{self, Upkeep},
};

use crate::{
    client::{Field, Said, ask, content_type, create, form, get, post},
    support::{Server, lines},
};

fn announced(bytes: usize) -> Value {
    json!({"bytes": bytes, "filename": "in.jsonl", "mime_type": "text/jsonl", "purpose": "batch"})
}

async fn announce(server: &Server, bytes: usize) -> String {
    let said = post(server, "/v1/uploads", &announced(bytes)).await;
    assert_eq!((said.status, &said.json["status"]), (200, &json!("pending")), "{said:?}");
    said.id()
}

async fn send_part(server: &Server, upload: &str, fields: &[Field<'_>]) -> Said {
    let request = reqwest::Client::new().post(server.url(&format!("/v1/uploads/{upload}/parts")));
    Said::of(request.header("content-type", content_type()).body(form(fields)).send().await.unwrap()).await
}

async fn part(server: &Server, upload: &str, bytes: &[u8]) -> String {
    // As Python's package sends it.
    let said = send_part(server, upload, &[("data", Some("upload"), bytes)]).await;
    assert_eq!((said.status, &said.json["object"]), (200, &json!("upload.part")), "{said:?}");
    assert_eq!(said.json["upload_id"], upload);
    said.id()
}

async fn complete(server: &Server, upload: &str, parts: &[&String], md5: Option<&str>) -> Said {
    post(server, &format!("/v1/uploads/{upload}/complete"), &json!({"part_ids": parts, "md5": md5})).await
}

/// Objects of parts that are there.
fn objects(server: &Server) -> usize {
    fn count(folder: &std::path::Path) -> usize {
        let entries = std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path());
        entries.map(|path| if path.is_dir() { count(&path) } else { 1 }).sum()
    }
    count(&server.folder.path().join("blobs/uploads"))
}

async fn until_gone(what: &str, left: impl Fn() -> usize) {
    let gone = async {
        while left() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), gone).await.unwrap_or_else(|_| panic!("{what} is left"));
}

#[tokio::test]
async fn parts_become_a_file_in_the_order_of_their_list() {
    let server = Server::start().await;
    let bytes = lines(40);
    let (head, tail) = bytes.split_at(999);
    let said = post(&server, "/v1/uploads", &announced(bytes.len())).await;
    let upload = said.id();
    let created = said.json["created_at"].as_i64().unwrap();
    let expected = json!({
        "id": upload, "object": "upload", "bytes": bytes.len(), "created_at": created, "expires_at": created + 86_400,
        "filename": "in.jsonl", "purpose": "batch", "status": "pending", "file": null,
    });
    assert_eq!(said.json, expected);
    // The second half comes first, and one part is not used.
    let (two, unused, one) =
        tokio::join!(part(&server, &upload, tail), part(&server, &upload, b"unused"), part(&server, &upload, head));
    assert_eq!(objects(&server), 3);
    let md5 = hex::encode(<md5::Md5 as md5::Digest>::digest(&bytes)).to_uppercase();
    // Whatever is wrong, the upload stays as it is.
    for (parts, md5, status, param) in [
        (vec![&two, &one], Some(md5.as_str()), 400, "md5"),
        (vec![&one, &two], Some("00000000000000000000000000000000"), 400, "md5"),
        (vec![&one, &two], Some("nonsense"), 400, "md5"),
        (vec![&two, &one], None, 400, "file"),
        (vec![&one], None, 400, "part_ids"),
        (vec![&one, &two, &unused], None, 400, "part_ids"),
        (vec![&one, &two, &one], None, 400, "part_ids"),
        (vec![&one, &upload], None, 400, "part_ids"),
        (vec![], None, 400, "part_ids"),
    ] {
        let said = complete(&server, &upload, &parts, md5).await;
        let (said_status, code, said_param) = said.error();
        assert_eq!((said_status, said_param), (status, Some(param)), "{said:?}");
        assert_ne!(code, Some("upload_ended"));
        assert!(get(&server, "/v1/files").await.ids().is_empty());
    }
    let said = complete(&server, &upload, &[&one, &two], Some(&md5)).await;
    assert_eq!((said.status, &said.json["status"], &said.json["id"]), (200, &json!("completed"), &json!(upload)));
    let file = said.json["file"]["id"].as_str().unwrap().to_owned();
    assert_eq!(get(&server, &format!("/v1/files/{file}")).await.json, said.json["file"]);
    assert_eq!(said.json["file"]["filename"], "in.jsonl");
    let content = reqwest::get(server.url(&format!("/v1/files/{file}/content"))).await.unwrap();
    assert_eq!(content.bytes().await.unwrap(), bytes);
    // A repeated call is answered the same; other parts are not.
    assert_eq!(complete(&server, &upload, &[&one, &two], None).await.json, said.json);
    for parts in [vec![&two, &one], vec![&one]] {
        assert_eq!(complete(&server, &upload, &parts, None).await.error(), (400, Some("upload_ended"), None));
    }
    let late = send_part(&server, &upload, &[("data", Some("upload"), b"late")]).await;
    assert_eq!(late.error(), (400, Some("upload_ended"), None));
    let cancelled = ask(&server, Method::POST, &format!("/v1/uploads/{upload}/cancel")).await;
    assert_eq!(cancelled.error(), (400, Some("upload_ended"), None));
    let batch = create(&server, &file).await;
    server.run_batch(&batch, 40).await;
    assert_eq!(get(&server, &format!("/v1/batches/{batch}")).await.json["status"], "completed");
}

#[tokio::test]
async fn completing_twice_at_the_same_time_makes_one_file() {
    let server = Server::start().await;
    let bytes = lines(500);
    let upload = announce(&server, bytes.len()).await;
    let one = part(&server, &upload, &bytes).await;
    let parts = [&one];
    let said = futures::future::join_all((0..4).map(|_| complete(&server, &upload, &parts, None))).await;
    for one in &said {
        assert_eq!((one.status, &one.json), (200, &said[0].json));
    }
    assert_eq!(get(&server, "/v1/files").await.ids().len(), 1);
}

#[tokio::test]
async fn bad_lines_are_named_as_at_an_upload_and_other_parts_may_follow() {
    let server = Server::start().await;
    let bytes = lines(3);
    let bad = vec![b'x'; bytes.len()];
    let upload = announce(&server, bytes.len()).await;
    let (wrong, good) = (part(&server, &upload, &bad).await, part(&server, &upload, &bytes).await);
    let said = complete(&server, &upload, &[&wrong], None).await;
    assert_eq!(said.error(), (400, Some("invalid_json_line"), Some("file")));
    assert_eq!(said.json["error"]["errors"]["data"][0]["line"], 1);
    assert_eq!(complete(&server, &upload, &[&good], None).await.status, 200);
    until_gone("an input", || server.blobs_begun() - 1).await;
    // OpenAI's way where the operator wants it.
    let options = ServerOptions { bad_files: BadFiles::FailBatch, ..ServerOptions::default() };
    let server = Server::with(options).await;
    let text = [bytes, b"nonsense\n".to_vec()].concat();
    let upload = announce(&server, text.len()).await;
    let one = part(&server, &upload, &text).await;
    let said = complete(&server, &upload, &[&one], None).await;
    assert_eq!((said.status, &said.json["file"]["status"]), (200, &json!("processed")), "{said:?}");
}

#[tokio::test]
async fn what_is_too_large_or_no_part_is_refused_and_leaves_nothing() {
    let server = Server::start().await;
    for (field, value, status, code) in [
        ("bytes", json!(10_000_000_001_i64), 413, "file_too_large"),
        ("bytes", json!(0), 400, "integer_below_min_value"),
        ("purpose", json!("fine-tune"), 400, "invalid_value"),
        ("filename", json!(""), 400, "invalid_value"),
        ("filename", json!("x".repeat(256)), 400, "invalid_value"),
        ("expires_after", json!({"anchor": "created_at", "seconds": 1}), 400, "invalid_value"),
    ] {
        let mut body = announced(10);
        body[field] = value;
        let said = post(&server, "/v1/uploads", &body).await;
        let (found, said_code, param) = said.error();
        let named = param.unwrap_or_default().split('.').next().unwrap_or_default().to_owned();
        assert_eq!((found, said_code), (status, Some(code)), "{said:?}");
        assert!(named == field || status == 413, "{said:?}");
    }
    let upload = announce(&server, 10).await;
    let data: Field<'_> = ("data", Some("upload"), b"{}");
    for (fields, code, param) in [
        (vec![], "missing_required_parameter", Some("data")),
        (vec![("file", Some("f"), &b"{}"[..])], "missing_required_parameter", Some("data")),
        (vec![data, data], "invalid_multipart", Some("data")),
        (vec![("data", Some("upload"), b"")], "invalid_value", Some("data")),
        (vec![("other", None, &[b'x'; 70_000]), data], "invalid_multipart", Some("other")),
    ] {
        assert_eq!(send_part(&server, &upload, &fields).await.error(), (400, Some(code), param), "{fields:?}");
    }
    // A byte too many, whether its length is known before or not.
    let large = vec![b'x'; usize::try_from(PART_BYTES).unwrap() + 1];
    let said = send_part(&server, &upload, &[("data", Some("upload"), &large)]).await;
    assert_eq!(said.error(), (413, Some("part_too_large"), Some("data")));
    let kind = reqwest::Client::new().post(server.url(&format!("/v1/uploads/{upload}/parts"))).body("{}");
    assert_eq!(Said::of(kind.send().await.unwrap()).await.error().0, 415);
    until_gone("a part", || objects(&server)).await;
    assert!(server.store.upload_parts(&UploadId::from_text(&*upload)).await.unwrap().is_empty());
    for path in ["/v1/uploads", "/v1/uploads/x/complete"] {
        for body in ["", "[]", "{", "null", "\"\""] {
            let said = reqwest::Client::new().post(server.url(path)).body(body).send().await.unwrap();
            assert_eq!(Said::of(said).await.error(), (400, Some("invalid_json"), None), "{path} {body}");
        }
    }
    for path in ["parts", "complete", "cancel"] {
        let path = format!("/v1/uploads/{}/{path}", "upload_x");
        let request = reqwest::Client::new().post(server.url(&path));
        let request = match path.ends_with("parts") {
            true => request.header("content-type", content_type()).body(form(&[data])),
            false => request.body(r#"{"part_ids": ["part_x"]}"#),
        };
        assert_eq!(Said::of(request.send().await.unwrap()).await.error(), (404, None, Some("id")), "{path}");
        assert_eq!(ask(&server, Method::GET, &path).await.error().0, 405);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_given_up_or_forgotten_goes() {
    let server = Server::start().await;
    let (given_up, late) = (announce(&server, 10).await, announce(&server, 10).await);
    let parts = [part(&server, &given_up, b"12345").await, part(&server, &late, b"12345").await];
    for _ in 0..2 {
        // As SDKs send it: without a body.
        let said = ask(&server, Method::POST, &format!("/v1/uploads/{given_up}/cancel")).await;
        assert_eq!((said.status, &said.json["status"], &said.json["file"]), (200, &json!("cancelled"), &Value::Null));
    }
    let direct = crate::direct::connect(&format!("sqlite://{}", server.folder.path().join("db").display())).await;
    let expire = "UPDATE uploads SET expires_at = expires_at - 86400000000 WHERE status = 'pending'";
    sea_orm::ConnectionTrait::execute_unprepared(&direct, expire).await.unwrap();
    for (upload, part) in [&given_up, &late].into_iter().zip(&parts) {
        assert_eq!(complete(&server, upload, &[part], None).await.error(), (400, Some("upload_ended"), None));
    }
    let sweeps = upkeep::of_batches(&server.store, &server.blobs, Duration::from_secs(30));
    tokio::spawn(Upkeep::new(server.store.clone(), NodeId::generate(), sweeps).run(server.shutdown.clone()));
    let swept = async {
        while !server.store.upload_parts(&UploadId::from_text(&*late)).await.unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Readers that have begun have some minutes; these did not begin.
        let due = "UPDATE garbage SET delete_after = 1";
        sea_orm::ConnectionTrait::execute_unprepared(&direct, due).await.unwrap();
        while objects(&server) > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), swept).await.expect("the parts are deleted");
    let found = server.store.parted_upload(&UploadId::from_text(late), &Scope::All).await.unwrap().unwrap();
    assert_eq!(found.state, tidemill::domain::UploadState::Expired);
}

#[tokio::test]
async fn the_bytes_of_parts_count_once() {
    let bytes = lines(20);
    let most = bytes.len() as u64 + 10;
    let limits = CallerLimits { bytes_per_day: most, ..CallerLimits::default() };
    let server = Server::limited(limits, ServerOptions::default()).await;
    let upload = announce(&server, bytes.len()).await;
    let one = part(&server, &upload, &bytes).await;
    let said = send_part(&server, &upload, &[("data", Some("upload"), &[b'x'; 100])]).await;
    assert_eq!(said.error(), (429, Some("insufficient_quota"), None));
    assert_eq!(complete(&server, &upload, &[&one], None).await.status, 200);
}
