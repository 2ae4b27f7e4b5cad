//! A client that sends what it is told, and forms as every SDK writes them.

use std::time::Duration;

use reqwest::{Method, Response};
use serde_json::Value;
use tidemill::pb;

use crate::support::Server;

/// The boundary of all forms here.
pub const BOUNDARY: &str = "----the-boundary";

/// A field of a form: its name, its file's name if it is one, and its bytes.
pub type Field<'a> = (&'a str, Option<&'a str>, &'a [u8]);

/// A form as bytes.
pub fn form(fields: &[Field<'_>]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, filename, data) in fields {
        let filename = filename.map(|name| format!("; filename=\"{name}\"")).unwrap_or_default();
        let head = format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"{filename}\r\n\r\n");
        body.extend([head.as_bytes(), data, b"\r\n"].concat());
    }
    body.extend(format!("--{BOUNDARY}--\r\n").bytes());
    body
}

pub fn content_type() -> String {
    format!("multipart/form-data; boundary={BOUNDARY}")
}

/// The form that Python's SDK sends.
pub fn upload_form(lines: &[u8]) -> Vec<u8> {
    form(&[("purpose", None, b"batch"), ("file", Some("in.jsonl"), lines)])
}

/// An answer: its status, its headers and its JSON.
#[derive(Debug)]
pub struct Said {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub json: Value,
}

impl Said {
    pub async fn of(answer: Response) -> Self {
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        assert!(headers.contains_key("x-request-id"), "{status} {headers:?}");
        let body = answer.bytes().await.unwrap();
        let json = serde_json::from_slice(&body)
            .unwrap_or_else(|_| panic!("no JSON: {status} {}", String::from_utf8_lossy(&body)));
        Self { status, headers, json }
    }

    /// The status, code and param of an error, which has all of OpenAI's keys.
    pub fn error(&self) -> (u16, Option<&str>, Option<&str>) {
        let error = self.json["error"].as_object().unwrap_or_else(|| panic!("no error: {self:?}"));
        for key in ["message", "type", "param", "code"] {
            assert!(error.contains_key(key), "no {key} in {self:?}");
        }
        assert!(!error["message"].as_str().unwrap().is_empty() && error["type"].is_string());
        assert_eq!(self.headers["content-type"], "application/json");
        (self.status, error["code"].as_str(), error["param"].as_str())
    }

    pub fn id(&self) -> String {
        self.json["id"].as_str().unwrap_or_else(|| panic!("no id: {self:?}")).to_owned()
    }

    pub fn ids(&self) -> Vec<String> {
        let data = self.json["data"].as_array().unwrap_or_else(|| panic!("no list: {self:?}"));
        data.iter().map(|item| item["id"].as_str().unwrap().to_owned()).collect()
    }
}

/// A call without a body.
pub async fn ask(server: &Server, method: Method, path: &str) -> Said {
    Said::of(reqwest::Client::new().request(method, server.url(path)).send().await.unwrap()).await
}

pub async fn get(server: &Server, path: &str) -> Said {
    ask(server, Method::GET, path).await
}

/// A call with a JSON body.
pub async fn post(server: &Server, path: &str, body: &Value) -> Said {
    Said::of(reqwest::Client::new().post(server.url(path)).body(body.to_string()).send().await.unwrap()).await
}

pub async fn send_form(server: &Server, body: Vec<u8>) -> Said {
    let request = reqwest::Client::new().post(server.url("/v1/files")).header("content-type", content_type());
    Said::of(request.body(body).send().await.unwrap()).await
}

/// Uploads a file and returns its id.
pub async fn upload(server: &Server, lines: &[u8]) -> String {
    let said = send_form(server, upload_form(lines)).await;
    assert_eq!(said.status, 200, "{said:?}");
    said.id()
}

/// What creates a batch of a file.
pub fn of_file(file: &str) -> Value {
    serde_json::json!({"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"})
}

/// Creates a batch and returns its id.
pub async fn create(server: &Server, file: &str) -> String {
    let said = post(server, "/v1/batches", &of_file(file)).await;
    assert_eq!(said.status, 200, "{said:?}");
    said.id()
}

/// Makes a worker known, and waits until it is healthy.
pub async fn register(server: &Server, url: &str) {
    // Without tokens everybody is admin, and any token is ignored.
    let mut admin = server.workers(Some("root")).await;
    admin.register_worker(pb::RegisterWorkerRequest { url: url.to_owned(), ..Default::default() }).await.unwrap();
    let healthy = async {
        loop {
            let list = admin.list_workers(pb::ListWorkersRequest {}).await.unwrap().into_inner().workers;
            if list.iter().any(|worker| worker.url == url && worker.state() == pb::WorkerState::Healthy) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), healthy).await.expect("the worker is healthy");
}
