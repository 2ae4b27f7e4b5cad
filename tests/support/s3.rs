//! A small S3 over a real socket: what `object_store` calls, and faults.
//!
//! PUT, GET with `Range`, HEAD, DELETE, bulk delete, ListObjectsV2 and multipart uploads, path-style. It answers only
//! requests that are signed with [`KEY`]; the signature itself is taken on trust.
#![allow(dead_code)] // each test binary uses its part of it

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    fmt::Write as _,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpListener, task::JoinSet};
use url::form_urlencoded;

/// The access key that is let in.
pub const KEY: &str = "tidemill-test";
/// Its bucket.
pub const BUCKET: &str = "bucket";

type Body = UnsyncBoxBody<Bytes, io::Error>;
type Answer = Result<Response<Body>, io::Error>;

/// Which requests a fault is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    Reads,
    Writes,
    All,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// An error answer: status and S3's code.
    Status(u16, &'static str),
    /// Everything takes so long, and works then.
    Slow(Duration),
    /// The connection is closed without a word, each second time.
    Reset,
    /// The body of an answer breaks off half way, each second time.
    Cut,
}

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Bytes>,
    uploads: BTreeMap<String, (String, BTreeMap<u32, Bytes>)>,
    /// Multipart uploads begun so far: the next one's id. No two may share one, however many begin at once.
    begun: u64,
    fault: Option<(On, Fault)>,
    /// Requests that met the fault.
    struck: u64,
    /// Keys whose PUT is answered with success, or about to be.
    answered: BTreeSet<String>,
    requests: u64,
}

/// The server. Clones are the same one.
#[derive(Clone)]
pub struct S3 {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    _running: Arc<tokio_util::task::AbortOnDropHandle<()>>,
}

impl S3 {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let running = tokio::spawn(serve(listener, state.clone()));
        Self { address, state, _running: Arc::new(tokio_util::task::AbortOnDropHandle::new(running)) }
    }

    /// What a process or [`tidemill::blobs::Blobs::url_with`] needs to find it.
    pub fn environment(&self) -> Vec<(String, String)> {
        let endpoint = format!("http://{}", self.address);
        [
            ("AWS_ACCESS_KEY_ID", KEY),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("AWS_ENDPOINT_URL", &endpoint),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_REGION", "us-east-1"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }

    pub fn break_it(&self, on: On, fault: Fault) {
        let mut state = self.state.lock().unwrap();
        state.fault = Some((on, fault));
        state.struck = 0;
    }

    pub fn heal(&self) {
        self.state.lock().unwrap().fault = None;
    }

    /// How many requests have met the present or last fault.
    pub fn struck(&self) -> u64 {
        self.state.lock().unwrap().struck
    }

    pub fn requests(&self) -> u64 {
        self.state.lock().unwrap().requests
    }

    /// Keys of the bucket.
    pub fn keys(&self) -> Vec<String> {
        self.state.lock().unwrap().objects.keys().cloned().collect()
    }

    /// Multipart uploads that were neither completed nor aborted.
    pub fn unfinished(&self) -> usize {
        self.state.lock().unwrap().uploads.len()
    }

    /// Whether a PUT of that key has been answered.
    pub fn answered(&self, key: &str) -> bool {
        self.state.lock().unwrap().answered.contains(key)
    }
}

async fn serve(listener: TcpListener, state: Arc<Mutex<State>>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((tcp, _)) = listener.accept().await else { continue };
        let state = state.clone();
        connections.spawn(async move {
            let service = hyper::service::service_fn(move |request| answer(state.clone(), request));
            // The client sees what went wrong.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(tcp), service).await;
        });
    }
}

async fn answer(state: Arc<Mutex<State>>, request: Request<Incoming>) -> Answer {
    let (parts, body) = request.into_parts();
    let reads = matches!(parts.method, Method::GET | Method::HEAD);
    let fault = {
        let mut state = state.lock().unwrap();
        state.requests += 1;
        let fault = state.fault.filter(|(on, _)| match on {
            On::Reads => reads,
            On::Writes => !reads,
            On::All => true,
        });
        state.struck += u64::from(fault.is_some());
        let every_second = state.struck % 2 == 1;
        fault.map(|(_, fault)| fault).filter(|fault| match fault {
            Fault::Reset | Fault::Cut => every_second,
            Fault::Status(..) | Fault::Slow(_) => true,
        })
    };
    if fault == Some(Fault::Reset) {
        return Err(io::ErrorKind::ConnectionReset.into());
    }
    let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
    match fault {
        Some(Fault::Status(status, code)) => return Ok(error(status, code)),
        Some(Fault::Slow(wait)) => tokio::time::sleep(wait).await,
        Some(Fault::Cut | Fault::Reset) | None => {}
    }
    let known = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    if !known.is_some_and(|text| text.starts_with(&format!("AWS4-HMAC-SHA256 Credential={KEY}/"))) {
        return Ok(error(403, "InvalidAccessKeyId"));
    }
    let path = percent_decoded(parts.uri.path());
    let Some(key) = path.strip_prefix(&format!("/{BUCKET}")) else { return Ok(error(404, "NoSuchBucket")) };
    let key = key.trim_start_matches('/').to_owned();
    let query: BTreeMap<String, String> =
        form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
    let mut state = state.lock().unwrap();
    let answer = match (&parts.method, key.is_empty()) {
        (&Method::GET, true) => state.list(&query),
        (&Method::POST, true) if query.contains_key("delete") => state.bulk_delete(&String::from_utf8_lossy(&body)),
        (&Method::PUT, false) => state.put(key, &query, body),
        (&Method::POST, false) => state.multipart(&key, &query),
        (&Method::DELETE, false) => state.delete(&key, &query),
        (&Method::GET | &Method::HEAD, false) => {
            let range = parts.headers.get(header::RANGE).and_then(|range| range.to_str().ok());
            let cut = fault == Some(Fault::Cut);
            state.get(&key, range, parts.method == Method::HEAD, cut)
        }
        _ => error(405, "MethodNotAllowed"),
    };
    Ok(answer)
}

impl State {
    fn put(&mut self, key: String, query: &BTreeMap<String, String>, body: Bytes) -> Response<Body> {
        let etag = etag(&body);
        match (query.get("uploadId"), query.get("partNumber").and_then(|number| number.parse().ok())) {
            (Some(id), Some(number)) => match self.uploads.get_mut(id) {
                Some((_, parts)) => drop(parts.insert(number, body)),
                None => return error(404, "NoSuchUpload"),
            },
            _ => {
                self.objects.insert(key.clone(), body);
                self.answered.insert(key);
            }
        }
        head(200).header(header::ETAG, etag).body(whole(Bytes::new())).unwrap()
    }

    fn multipart(&mut self, key: &str, query: &BTreeMap<String, String>) -> Response<Body> {
        if query.contains_key("uploads") {
            self.begun += 1;
            let id = format!("upload-{}", self.begun);
            self.uploads.insert(id.clone(), (key.to_owned(), BTreeMap::new()));
            return xml(&format!(
                "<InitiateMultipartUploadResult><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
            ));
        }
        let Some((_, parts)) = query.get("uploadId").and_then(|id| self.uploads.remove(id)) else {
            return error(404, "NoSuchUpload");
        };
        let bytes: Bytes = parts.into_values().flatten().collect();
        let etag = etag(&bytes);
        self.objects.insert(key.to_owned(), bytes);
        self.answered.insert(key.to_owned());
        xml(&format!("<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>"))
    }

    fn delete(&mut self, key: &str, query: &BTreeMap<String, String>) -> Response<Body> {
        match query.get("uploadId") {
            Some(id) => drop(self.uploads.remove(id)),
            None => drop(self.objects.remove(key)),
        }
        head(204).body(whole(Bytes::new())).unwrap()
    }

    fn bulk_delete(&mut self, text: &str) -> Response<Body> {
        let mut answer = String::from("<DeleteResult>");
        for piece in text.split("<Key>").skip(1) {
            let key = piece.split("</Key>").next().unwrap();
            self.objects.remove(key);
            write!(answer, "<Deleted><Key>{key}</Key></Deleted>").unwrap();
        }
        xml(&(answer + "</DeleteResult>"))
    }

    /// All at once: no test has a thousand objects.
    fn list(&self, query: &BTreeMap<String, String>) -> Response<Body> {
        let prefix = query.get("prefix").map_or("", String::as_str);
        let mut answer = String::from("<ListBucketResult>");
        for (key, bytes) in self.objects.iter().filter(|(key, _)| key.starts_with(prefix)) {
            write!(
                answer,
                "<Contents><Key>{key}</Key><Size>{}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
                 <ETag>{}</ETag></Contents>",
                bytes.len(),
                etag(bytes)
            )
            .unwrap();
        }
        xml(&(answer + "</ListBucketResult>"))
    }

    fn get(&self, key: &str, range: Option<&str>, head_only: bool, cut: bool) -> Response<Body> {
        let Some(bytes) = self.objects.get(key) else { return error(404, "NoSuchKey") };
        let size = bytes.len();
        let mut answer = head(200);
        let mut body = bytes.clone();
        if let Some((from, to)) = range.and_then(|range| range.strip_prefix("bytes=")).and_then(|r| r.split_once('-')) {
            let from: usize = from.parse().unwrap();
            if from >= size {
                return error(416, "InvalidRange");
            }
            let end = to.parse::<usize>().map_or(size, |to| (to + 1).min(size));
            body = bytes.slice(from..end);
            answer = head(206).header(header::CONTENT_RANGE, format!("bytes {from}-{}/{size}", end - 1));
        }
        let answer = answer
            .header(header::ETAG, etag(bytes))
            .header(header::LAST_MODIFIED, "Thu, 01 Jan 2026 00:00:00 GMT")
            .header(header::CONTENT_LENGTH, body.len());
        let body = if head_only {
            whole(Bytes::new())
        } else if cut {
            broken(body.slice(..body.len() / 2))
        } else {
            whole(body)
        };
        answer.body(body).unwrap()
    }
}

fn head(status: u16) -> http::response::Builder {
    Response::builder().status(StatusCode::from_u16(status).unwrap())
}

fn whole(bytes: Bytes) -> Body {
    http_body_util::Full::new(bytes).map_err(|never: Infallible| match never {}).boxed_unsync()
}

/// These bytes, and then the connection breaks.
fn broken(begun: Bytes) -> Body {
    let begin = futures::stream::iter([Ok(Frame::data(begun))]);
    let end = futures::stream::once(async {
        // The server writes out what it has when there is no more for now; an error at once would swallow it.
        tokio::task::yield_now().await;
        Err(io::Error::from(io::ErrorKind::ConnectionReset))
    });
    StreamBody::new(begin.chain(end)).boxed_unsync()
}

fn xml(text: &str) -> Response<Body> {
    let text = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>{text}");
    head(200).header(header::CONTENT_TYPE, "application/xml").body(whole(text.into())).unwrap()
}

fn error(status: u16, code: &str) -> Response<Body> {
    let text = format!("<Error><Code>{code}</Code><Message>injected, at /secret/path</Message></Error>");
    head(status).header(header::CONTENT_TYPE, "application/xml").body(whole(text.into())).unwrap()
}

fn etag(bytes: &[u8]) -> String {
    format!("\"{:08x}-{}\"", crc32c::crc32c(bytes), bytes.len())
}

fn percent_decoded(path: &str) -> String {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = tail.get(..2).and_then(|two| std::str::from_utf8(two).ok()).map(|two| u8::from_str_radix(two, 16));
        match (first, hex) {
            (b'%', Some(Ok(byte))) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8(bytes).unwrap()
}
