//! The process dies while a file is uploaded in parts, and is started again: the client goes on where it was.

use std::path::Path;

use reqwest::StatusCode;
use sea_orm::{ConnectionTrait, Statement};
use serde_json::{Value, json};
use tidemill::fault::Fault;

use crate::{input, server::Server, support::direct};

async fn post(server: &Server, path: &str, body: &Value) -> Result<Value, reqwest::Error> {
    let url = format!("http://{}/v1/uploads{path}", server.address());
    let answer = reqwest::Client::new().post(url).body(body.to_string()).send().await?;
    assert_eq!(answer.status(), StatusCode::OK);
    Ok(serde_json::from_slice(&answer.bytes().await?).unwrap())
}

async fn part(server: &Server, upload: &str, text: &str) -> Result<Value, reqwest::Error> {
    let body =
        format!("--b\r\ncontent-disposition: form-data; name=\"data\"; filename=\"upload\"\r\n\r\n{text}\r\n--b--\r\n");
    let url = format!("http://{}/v1/uploads/{upload}/parts", server.address());
    let request = reqwest::Client::new().post(url).header("content-type", "multipart/form-data; boundary=b");
    let answer = request.body(body).send().await?;
    assert_eq!(answer.status(), StatusCode::OK);
    Ok(serde_json::from_slice(&answer.bytes().await?).unwrap())
}

/// Objects below a folder that no row names: neither a part, nor a file, nor garbage.
async fn unnamed(server: &Server) -> Vec<String> {
    let file = server.folder().join("tidemill.db");
    let database = direct::connect(&format!("sqlite://{}", file.display())).await;
    let sql =
        "SELECT object_key FROM upload_parts UNION SELECT object_key FROM files UNION SELECT object_key FROM garbage";
    let rows = database.query_all_raw(Statement::from_string(database.get_database_backend(), sql)).await.unwrap();
    let named: Vec<String> = rows.iter().map(|row| row.try_get("", "object_key").unwrap()).collect();
    database.close().await.unwrap();
    let mut found = Vec::new();
    for folder in ["uploads", "inputs"] {
        files(&server.folder().join("blobs"), folder, &mut found);
    }
    found.into_iter().filter(|key| !named.contains(key)).collect()
}

fn files(folder: &Path, within: &str, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder.join(within)).into_iter().flatten() {
        let entry = entry.unwrap();
        let name = format!("{within}/{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_dir() {
            files(folder, &name, found);
        } else {
            found.push(name);
        }
    }
}

async fn announce(server: &Server, bytes: usize) -> String {
    let upload = json!({"bytes": bytes, "filename": "f", "mime_type": "text/jsonl", "purpose": "batch"});
    id(&post(server, "", &upload).await.unwrap())
}

fn id(of: &Value) -> String {
    of["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_whose_row_was_not_written_is_sent_again() {
    let text = input(50);
    let (head, tail) = text.split_at(100);
    let mut server = Server::armed(&[], Fault::UploadedPart, 2).await;
    let upload = announce(&server, text.len()).await;
    let one = id(&part(&server, &upload, head).await.unwrap());
    part(&server, &upload, tail).await.unwrap_err();
    server.died().await;
    server.restart().await;
    assert!(unnamed(&server).await.is_empty());
    let two = id(&part(&server, &upload, tail).await.unwrap());
    let body = json!({"part_ids": [one, two]});
    let said = post(&server, &format!("/{upload}/complete"), &body).await.unwrap();
    assert_eq!((&said["status"], &said["file"]["tidemill"]["line_count"]), (&json!("completed"), &json!(50)));
    assert!(unnamed(&server).await.is_empty());
    server.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_whose_file_was_not_written_is_completed_again() {
    let text = input(50);
    let mut server = Server::armed(&[], Fault::UploadObject, 1).await;
    let upload = announce(&server, text.len()).await;
    let one = id(&part(&server, &upload, &text).await.unwrap());
    let (path, body) = (format!("/{upload}/complete"), json!({"part_ids": [one]}));
    post(&server, &path, &body).await.unwrap_err();
    server.died().await;
    server.restart().await;
    let said = post(&server, &path, &body).await.unwrap();
    assert_eq!((&said["status"], &said["file"]["tidemill"]["line_count"]), (&json!("completed"), &json!(50)));
    assert!(unnamed(&server).await.is_empty());
    // As if its answer had been lost.
    server.kill().await;
    server.restart().await;
    assert_eq!(post(&server, &path, &body).await.unwrap(), said);
    server.kill().await;
}
