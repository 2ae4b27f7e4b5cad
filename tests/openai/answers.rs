//! What a worker, or whatever sits at its URL, may answer to a live call; and clients that neither read nor send.

use std::{
    io::Write,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::json;
use tidemill::{access::CallerLimits, api::ServerOptions};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use crate::{
    client::{Said, create, get, post, register, upload},
    support::{Server, lines},
};

const CHAT: &str = "/v1/chat/completions";
const COUNT: &str = "/v1/messages/count_tokens";
const ANSWER: &str = r#"{"id":"c","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"x"},"finish_reason":"stop"}]}"#;
const EVENTS: &str = "data: {\"choices\":[]}\n\ndata: [DONE]\n\n";

/// A worker that answers every request with the same bytes, and then closes the connection. With `None` it sends events
/// without an end to those who ask for a stream.
struct Worker {
    answer: Arc<Mutex<Option<Vec<u8>>>>,
    running: JoinHandle<()>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.running.abort();
    }
}

/// An answer as bytes.
fn raw(status: &str, headers: &[&str], body: &[u8]) -> Vec<u8> {
    let mut head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n");
    for header in headers {
        head += &format!("{header}\r\n");
    }
    [head.as_bytes(), b"\r\n", body].concat()
}

fn json_of(body: &str) -> Vec<u8> {
    raw("200 OK", &["content-type: application/json", &format!("content-length: {}", body.len())], body.as_bytes())
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

impl Worker {
    async fn start(server: &Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let answer: Arc<Mutex<Option<Vec<u8>>>> = Arc::default();
        let shared = answer.clone();
        let running = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                connections.spawn(serve(tcp, shared.clone()));
            }
        });
        register(server, &url).await;
        Self { answer, running }
    }

    fn says(&self, answer: Vec<u8>) {
        *self.answer.lock().unwrap() = Some(answer);
    }
}

async fn serve(mut tcp: TcpStream, answer: Arc<Mutex<Option<Vec<u8>>>>) {
    let (mut came, mut buffer) = (Vec::new(), [0; 4_096]);
    let request = loop {
        let read = tcp.read(&mut buffer).await.unwrap_or(0);
        came.extend_from_slice(&buffer[..read]);
        let text = String::from_utf8_lossy(&came).to_ascii_lowercase();
        let length = |head: &str| head.split("content-length: ").nth(1)?.split("\r\n").next()?.parse::<usize>().ok();
        match text.split_once("\r\n\r\n") {
            Some((head, body)) if body.len() >= length(head).unwrap_or(0) => break text.clone(),
            _ if read == 0 => return,
            _ => {}
        }
    };
    let planned = answer.lock().unwrap().clone();
    let bytes = match (request.starts_with("post"), planned) {
        (false, _) if request.starts_with("get /v1/models") => json_of(r#"{"object":"list","data":[{"id":"m"}]}"#),
        (false, _) if request.starts_with("get /health") => raw("200 OK", &["content-length: 0"], b""),
        (false, _) => raw("404 Not Found", &["content-length: 0"], b""),
        (true, Some(bytes)) => bytes,
        (true, None) if request.contains("\"stream\":true") => {
            let head = raw("200 OK", &["content-type: text/event-stream"], b"");
            let event = format!("data: {}\n\n", "x".repeat(8_000));
            let mut sent = tcp.write_all(&head).await;
            while sent.is_ok() {
                sent = tcp.write_all(event.as_bytes()).await;
            }
            return;
        }
        (true, None) => json_of(ANSWER),
    };
    let _ = tcp.write_all(&bytes).await;
    let _ = tcp.shutdown().await;
}

fn chat(stream: bool) -> serde_json::Value {
    json!({"model": "m", "stream": stream, "messages": [{"role": "user", "content": "a"}]})
}

async fn send(server: &Server, path: &str, stream: bool) -> reqwest::Response {
    reqwest::Client::new().post(server.url(path)).body(chat(stream).to_string()).send().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_an_answer_is_a_failure_of_the_worker() {
    let server = Server::start().await;
    let worker = Worker::start(&server).await;
    let html = "<html>log in</html>";
    let length = format!("content-length: {}", html.len());
    for (status, headers, body) in [
        ("101 Switching Protocols", &["upgrade: x", "connection: upgrade"][..], ""),
        ("204 No Content", &[], ""),
        ("205 Reset Content", &["content-length: 0"], ""),
        ("302 Found", &["location: http://other/", "content-length: 0"], ""),
        ("304 Not Modified", &[], ""),
        ("307 Temporary Redirect", &["location: http://other/", "content-length: 0"], ""),
        ("600 Odd", &["content-length: 0"], ""),
        ("999 Odd", &["content-length: 0"], ""),
        ("200 OK", &["content-type: text/html", &length], html),
        ("200 OK", &["content-type: application/json", &length], html),
        ("200 OK", &["content-type: application/json", "content-length: 0"], ""),
    ] {
        worker.says(raw(status, headers, body.as_bytes()));
        for stream in [true, false] {
            let said = Said::of(send(&server, CHAT, stream).await).await;
            assert_eq!(said.error(), (502, Some("worker_failed"), None), "{status} {stream} {said:?}");
            let message = said.json["error"]["message"].as_str().unwrap();
            assert!(message.contains(&status[..3]), "{message}");
        }
        assert_eq!(send(&server, COUNT, false).await.status().as_u16(), 502, "{status}");
    }
    // Under another name it is still an answer.
    worker.says(raw(
        "200 OK",
        &["content-type: text/plain", &format!("content-length: {}", ANSWER.len())],
        ANSWER.as_bytes(),
    ));
    for stream in [true, false] {
        let said = send(&server, CHAT, stream).await;
        assert_eq!((said.status().as_u16(), said.text().await.unwrap().as_str()), (200, ANSWER));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encoded_answer_arrives_decoded_and_a_stream_is_known_in_any_case() {
    let server = Server::start().await;
    let worker = Worker::start(&server).await;
    for kind in ["Text/Event-Stream", "text/event-stream; charset=utf-8", "text/plain"] {
        worker.says(raw("200 OK", &[&format!("content-type: {kind}"), "content-encoding: gzip"], &gzip(EVENTS)));
        let said = send(&server, CHAT, true).await;
        assert_eq!((said.status().as_u16(), said.headers().get("content-encoding")), (200, None), "{kind}");
        assert_eq!(said.headers()["cache-control"], "no-cache", "{kind}");
        assert_eq!(said.text().await.unwrap(), EVENTS, "{kind}");
        // Its early end is no end.
        worker.says(raw("200 OK", &[&format!("content-type: {kind}")], b"data: {\"choices\":[]}\n\n"));
        let said = send(&server, CHAT, true).await.text().await.unwrap();
        assert!(said.contains("worker_lost"), "{kind} {said}");
    }
    let refusal = r#"{"error":{"message":"no","type":"x","param":null,"code":null}}"#;
    for (status, code, body) in
        [("200 OK", 200, r#"{"input_tokens":3}"#), ("400 Bad", 400, refusal), ("429 Slow", 429, refusal)]
    {
        worker.says(raw(status, &["content-type: application/json", "content-encoding: gzip"], &gzip(body)));
        for path in [CHAT, COUNT] {
            let said = send(&server, path, true).await;
            assert_eq!((said.status().as_u16(), said.text().await.unwrap().as_str()), (code, body), "{path} {status}");
        }
    }
    worker.says(raw("200 OK", &["content-type: text/event-stream", "content-encoding: br"], b"\x0b"));
    let said = Said::of(send(&server, CHAT, true).await).await;
    assert_eq!(said.error(), (502, Some("worker_failed"), None));
    assert!(said.json["error"]["message"].as_str().unwrap().contains("\"br\""), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_nothing_gives_way_to_those_who_wait() {
    let server = Server::start().await;
    // Its one place goes to a stream that nobody reads.
    let _worker = Worker::start(&server).await;
    let mut stalled = TcpStream::connect(server.address).await.unwrap();
    let body = chat(true).to_string();
    let request = format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stalled.write_all(request.as_bytes()).await.unwrap();
    let mut first = [0; 12];
    stalled.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    let waits = chat(false);
    let waited = tokio::time::timeout(Duration::from_secs(60), post(&server, CHAT, &waits));
    assert_eq!(waited.await.expect("the place is free").status, 200);
    // Whoever reads on after all finds out why it ends.
    let mut rest = Vec::new();
    let mut buffer = vec![0; 1 << 20];
    while !rest.ends_with(b"\r\n0\r\n\r\n") {
        let read = tokio::time::timeout(Duration::from_secs(60), stalled.read(&mut buffer)).await.unwrap().unwrap();
        assert!(read > 0, "the stream has an end");
        rest.extend_from_slice(&buffer[..read]);
    }
    let end = String::from_utf8_lossy(&rest[rest.len() - 300..]).into_owned();
    assert!(end.contains("client_too_slow"), "{end}");
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_of_live_calls_count_before_they_have_come() {
    // So many that have only begun are as many as may run.
    let limits = CallerLimits { infer_calls: 3, ..CallerLimits::default() };
    let server = Server::limited(limits, ServerOptions::default()).await;
    let begun = begin(&server, 3, 2).await;
    until(&server, "too_many_infer_calls").await;
    drop(begun);
    until(&server, "no_worker").await;
    // And their bytes: 256 MiB is the most of one caller.
    let server = Server::start().await;
    let begun = begin(&server, 8, 32 * 1024 * 1024).await;
    until(&server, "too_many_infer_bytes").await;
    drop(begun);
    until(&server, "no_worker").await;
}

/// Calls whose bodies only begin, and are to be so long.
async fn begin(server: &Server, calls: usize, length: usize) -> Vec<TcpStream> {
    let mut begun = Vec::new();
    for _ in 0..calls {
        let mut tcp = TcpStream::connect(server.address).await.unwrap();
        let head = format!("POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n\r\n{{");
        tcp.write_all(head.as_bytes()).await.unwrap();
        begun.push(tcp);
    }
    begun
}

/// Calls until this is the error.
async fn until(server: &Server, code: &str) {
    // What has begun has 10 s to come.
    let asking = async {
        while post(server, CHAT, &chat(false)).await.error().1 != Some(code) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(9), asking).await.unwrap_or_else(|_| panic!("never {code}"));
}

#[tokio::test]
async fn what_is_lost_in_the_objects_is_an_error_and_no_empty_file() {
    let server = Server::start().await;
    let file = upload(&server, &lines(40)).await;
    let batch = create(&server, &file).await;
    server.run_batch(&batch, 40).await;
    let output = {
        let shown = get(&server, &format!("/v1/batches/{batch}")).await.json;
        shown["output_file_id"].as_str().unwrap_or_else(|| panic!("{shown}")).to_owned()
    };
    let paths = [
        format!("/v1/files/{file}/content"),
        format!("/v1/files/{output}/content"),
        format!("/v1/batches/{batch}/results"),
    ];
    let folder = server.folder.path().join("blobs");
    let objects = ["inputs", "results"].map(|part| objects_in(&folder.join(part))).concat();
    let damage = |change: &dyn Fn(&std::path::Path)| objects.iter().for_each(|path| change(path));
    let expect = async |code: &str| {
        for path in &paths {
            for range in ["bytes=0-", "bytes=0-9"] {
                let request = reqwest::Client::new().get(server.url(path)).header("range", range);
                let said = Said::of(request.send().await.unwrap()).await;
                assert_eq!(said.error(), (500, Some(code), None), "{path} {said:?}");
                assert_eq!(said.json["error"]["type"], "server_error");
                assert_eq!(said.headers["x-should-retry"], "false", "{path}");
            }
        }
    };
    for path in &paths {
        assert_eq!(reqwest::get(server.url(path)).await.unwrap().status().as_u16(), 200, "{path}");
    }
    damage(&|path| {
        let mut bytes = std::fs::read(path).unwrap();
        bytes[1] ^= 1;
        std::fs::write(path, bytes).unwrap();
    });
    expect("data_damaged").await;
    damage(&|path| std::fs::remove_file(path).unwrap());
    expect("object_missing").await;
}

/// All objects below a folder.
fn objects_in(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(objects_in(&path)),
            false => found.push(path),
        }
    }
    found
}

#[tokio::test]
async fn wrong_types_and_huge_numbers_are_named_as_what_they_are() {
    let server = Server::start().await;
    let raw = async |path: &str, body: String| {
        Said::of(reqwest::Client::new().post(server.url(path)).body(body).send().await.unwrap()).await
    };
    for (body, code, param) in [
        (r#"{"model":1}"#, "invalid_type", Some("model")),
        (r#"{"model":{},"stream":true}"#, "invalid_type", Some("model")),
        (r#"{"model":"m","stream":"true"}"#, "invalid_type", Some("stream")),
        (r#"{"model":"m","\ud800":1}"#, "invalid_json", None),
        (r#"{"model":"m","model":"n"}"#, "invalid_json", None),
    ] {
        let said = raw(CHAT, body.to_owned()).await;
        assert_eq!(said.error(), (400, Some(code), param), "{body} {said:?}");
        let message = said.json["error"]["message"].as_str().unwrap();
        assert!(!message.contains("hex escape") && !message.contains('`'), "{message}");
    }
    let good = r#""input_file_id":"f","endpoint":"/v1/score","completion_window":"1h""#;
    for (field, param) in [
        (r#""priority":1180591620717411303424"#, "priority"),
        (r#""priority":-9223372036854775808"#, "priority"),
        (
            r#""output_expires_after":{"anchor":"created_at","seconds":9223372036854775808}"#,
            "output_expires_after.seconds",
        ),
    ] {
        let said = raw("/v1/batches", format!("{{{good},{field}}}")).await;
        assert_eq!(said.error(), (400, Some("invalid_value"), Some(param)), "{field} {said:?}");
    }
    let said = raw("/v1/batches", format!(r#"{{{good},"\ud800":1}}"#)).await;
    let message = said.json["error"]["message"].as_str().unwrap();
    assert!(said.status == 400 && message.contains("surrogate pair"), "{message}");
}
