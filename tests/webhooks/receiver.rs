//! A receiver that behaves as told, down to the bytes.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue};
use tidemill::{
    delivery::signature::{Verified, VerifyError, verify},
    domain::{Timestamp, webhook::Secret},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::sleep,
};

/// How long a slow machine may take for what is to happen.
const PATIENCE: Duration = Duration::from_secs(120);

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub path: String,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    pub fn verify(&self, secret: &str) -> Result<Verified, VerifyError> {
        verify(&[Secret::try_new(secret).unwrap()], &self.headers, &self.body, Timestamp::now().unix_seconds())
    }
}

/// Holds answers back until the test opens it.
pub struct Gate(watch::Sender<bool>);

impl Gate {
    pub fn closed() -> Self {
        Self(watch::channel(false).0)
    }

    pub fn reply(&self, status: u16) -> Reply {
        Reply::Held(status, self.0.subscribe())
    }

    pub fn open(&self) {
        self.0.send_replace(true);
    }
}

/// What a receiver does with a request.
#[derive(Clone, Debug)]
pub enum Reply {
    Status(u16),
    With(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// Begins to answer and never gets past the headers.
    DripHeaders,
    /// Answers with this status and never ends the body.
    DripBody(u16),
    /// Sends a body without end as fast as it can.
    Endless(u16),
    /// Reads and says nothing.
    Silent,
    /// Reads the request and breaks the connection.
    Reset,
    /// Sends something that is no HTTP.
    Nonsense,
    /// Answers with this status once its [`Gate`] is open.
    Held(u16, watch::Receiver<bool>),
    /// Answers with this status after a while.
    #[allow(dead_code, reason = "tests/nodes shares this file, and only it answers slowly")]
    Slow(u16, Duration),
}

type Script = dyn Fn(usize, &Request) -> Reply + Send + Sync;

pub struct Receiver {
    pub address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    seen: watch::Receiver<usize>,
}

impl Receiver {
    /// Answers the `n`th request (from 1) as the script says.
    pub async fn start(script: impl Fn(usize, &Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (count, seen) = watch::channel(0);
        let (log, count, script): (_, _, Arc<Script>) = (requests.clone(), Arc::new(count), Arc::new(script));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, log.clone(), count.clone(), script.clone()));
            }
        });
        Self { address, requests, seen }
    }

    /// Answers every request with this status.
    pub async fn always(status: u16) -> Self {
        Self::start(move |_, _| Reply::Status(status)).await
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// Waits for so many requests.
    pub async fn wait(&self, count: usize) -> Vec<Request> {
        let mut seen = self.seen.clone();
        let waited = tokio::time::timeout(PATIENCE, seen.wait_for(|seen| *seen >= count)).await;
        assert!(waited.is_ok(), "{} requests instead of {count}", self.requests().len());
        self.requests()
    }
}

async fn serve(
    mut stream: TcpStream,
    log: Arc<Mutex<Vec<Request>>>,
    count: Arc<watch::Sender<usize>>,
    script: Arc<Script>,
) {
    let Some(request) = read(&mut stream).await else { return };
    let n = {
        let mut log = log.lock().unwrap();
        log.push(request.clone());
        log.len()
    };
    let reply = script(n, &request);
    count.send_replace(n);
    // The other side may hang up at any time: that is its business.
    let _ = answer(stream, reply).await;
}

async fn answer(mut stream: TcpStream, reply: Reply) -> std::io::Result<()> {
    let head = |status: u16, rest: &str| format!("HTTP/1.1 {status} X\r\nconnection: close\r\n{rest}");
    match reply {
        Reply::Status(status) => stream.write_all(head(status, "content-length: 0\r\n\r\n").as_bytes()).await?,
        Reply::With(status, headers, body) => {
            let mut rest: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
            rest.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
            stream.write_all(head(status, &rest).as_bytes()).await?;
            stream.write_all(&body).await?;
        }
        Reply::DripHeaders => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n").await?;
            loop {
                stream.write_all(b"x: y\r\n").await?;
                sleep(Duration::from_millis(50)).await;
            }
        }
        Reply::DripBody(status) => {
            stream.write_all(head(status, "content-length: 100000\r\n\r\n").as_bytes()).await?;
            loop {
                stream.write_all(b".").await?;
                sleep(Duration::from_millis(50)).await;
            }
        }
        Reply::Endless(status) => {
            stream.write_all(head(status, "\r\n").as_bytes()).await?;
            loop {
                stream.write_all(&[b'e'; 65_536]).await?;
            }
        }
        Reply::Silent => std::future::pending().await,
        Reply::Reset => {
            // Closing with a linger of zero is a reset.
            stream.set_zero_linger()?;
        }
        Reply::Held(status, mut gate) => {
            // A gate that is gone is open.
            let _ = gate.wait_for(|open| *open).await;
            stream.write_all(head(status, "content-length: 0\r\n\r\n").as_bytes()).await?;
        }
        Reply::Nonsense => stream.write_all(b"SSH-2.0-OpenSSH_9.9\r\n").await?,
        Reply::Slow(status, wait) => {
            sleep(wait).await;
            stream.write_all(head(status, "content-length: 0\r\n\r\n").as_bytes()).await?;
        }
    }
    stream.shutdown().await
}

async fn read(stream: &mut TcpStream) -> Option<Request> {
    let mut bytes = Vec::new();
    let end = loop {
        let mut some = [0; 4_096];
        let count = stream.read(&mut some).await.ok().filter(|count| *count > 0)?;
        bytes.extend_from_slice(&some[..count]);
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end;
        }
    };
    let head = std::str::from_utf8(&bytes[..end]).unwrap();
    let mut lines = head.split("\r\n");
    let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
    let headers: HeaderMap = lines
        .map(|line| {
            let (name, value) = line.split_once(':').unwrap();
            (name.parse::<HeaderName>().unwrap(), HeaderValue::from_str(value.trim()).unwrap())
        })
        .collect();
    let length: usize = headers["content-length"].to_str().unwrap().parse().unwrap();
    let mut body = bytes[end + 4..].to_vec();
    while body.len() < length {
        let mut some = [0; 4_096];
        let count = stream.read(&mut some).await.ok().filter(|count| *count > 0)?;
        body.extend_from_slice(&some[..count]);
    }
    Some(Request { path, headers, body })
}
