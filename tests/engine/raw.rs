//! A worker whose bytes the test chooses: for faults that no HTTP server of its own accord commits.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_util::sync::CancellationToken;

/// What happens to a request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// The head's status and content type, and the body.
    Answer(u16, &'static str, String),
    /// As [`Reply::good`], with these lines in its head.
    Head(String),
    /// A good head; then the body, a byte at a time.
    Drip(Duration),
    /// A head that promises more than the body has, and the end.
    Short,
    /// Nothing: the connection stays open, and is not read any more.
    Nothing,
    /// As [`Reply::good`], after a while.
    Later(Duration),
    /// As [`Reply::good`], once there is a permit.
    When(Arc<Semaphore>),
    /// The whole worker dies: every connection is reset, and nobody listens for a moment.
    Die,
}

impl Reply {
    pub fn good() -> Self {
        Self::Answer(200, "application/json", GOOD.into())
    }
}

pub const GOOD: &str = r#"{"id":"chatcmpl-1","object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"ok"}}],"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}"#;

type Decide = dyn Fn(&str) -> Reply + Send + Sync;

/// A worker of the model `sim`.
pub struct Raw {
    pub address: SocketAddr,
    inner: Arc<Inner>,
    task: tokio::task::JoinHandle<()>,
}

struct Inner {
    decide: Box<Decide>,
    models: &'static [&'static str],
    received: AtomicUsize,
    checks: AtomicUsize,
    deaths: AtomicU32,
    /// Cancelled at a death.
    life: Mutex<CancellationToken>,
    down: Duration,
}

impl Raw {
    /// Replies as `decide` says, given the request's body.
    pub async fn start(decide: impl Fn(&str) -> Reply + Send + Sync + 'static) -> Self {
        Self::serving(&["sim"], decide).await
    }

    /// The same, with other models.
    pub async fn serving(
        models: &'static [&'static str],
        decide: impl Fn(&str) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let inner = Arc::new(Inner {
            decide: Box::new(decide),
            models,
            received: AtomicUsize::new(0),
            checks: AtomicUsize::new(0),
            deaths: AtomicU32::new(0),
            life: Mutex::new(CancellationToken::new()),
            down: Duration::from_millis(300),
        });
        let task = tokio::spawn(live(inner.clone(), Some(listener), address));
        Self { address, inner, task }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn received(&self) -> usize {
        self.inner.received.load(Ordering::SeqCst)
    }

    /// Health checks so far.
    pub fn checks(&self) -> usize {
        self.inner.checks.load(Ordering::SeqCst)
    }

    pub fn deaths(&self) -> u32 {
        self.inner.deaths.load(Ordering::SeqCst)
    }

    /// Kills it; it comes back by itself.
    pub fn kill(&self) {
        self.inner.die();
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        self.task.abort();
        self.inner.die();
    }
}

impl Inner {
    fn die(&self) {
        self.deaths.fetch_add(1, Ordering::SeqCst);
        self.life.lock().unwrap().cancel();
    }
}

/// One life after the other.
async fn live(inner: Arc<Inner>, mut listener: Option<TcpListener>, address: SocketAddr) {
    loop {
        let listening = match listener.take() {
            Some(listener) => listener,
            None => match TcpListener::bind(address).await {
                Ok(listener) => listener,
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            },
        };
        let life = CancellationToken::new();
        *inner.life.lock().unwrap() = life.clone();
        loop {
            tokio::select! {
                () = life.cancelled() => break,
                Ok((stream, _)) = listening.accept() => {
                    let (inner, life) = (inner.clone(), life.clone());
                    tokio::spawn(async move {
                        // As a killed process leaves it: a reset, not an orderly end.
                        #[allow(deprecated)] // it does not wait: the time is zero
                        stream.set_linger(Some(Duration::ZERO)).unwrap();
                        tokio::select! {
                            () = life.cancelled() => {}
                            _ = serve(inner, stream) => {}
                        }
                    });
                }
            }
        }
        drop(listening);
        tokio::time::sleep(inner.down).await;
    }
}

async fn serve(inner: Arc<Inner>, stream: TcpStream) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).await? == 0 {
                return Ok(());
            }
            if line.trim().is_empty() {
                break;
            }
            head.push(line.trim().to_ascii_lowercase());
        }
        let length = head
            .iter()
            .find_map(|line| line.strip_prefix("content-length:"))
            .map_or(0, |length| length.trim().parse().unwrap());
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await?;
        if head[0].starts_with("get /v1/models") {
            let models: Vec<String> = inner.models.iter().map(|model| format!(r#"{{"id":"{model}"}}"#)).collect();
            let list = format!(r#"{{"object":"list","data":[{}]}}"#, models.join(","));
            answer(&mut stream, 200, "application/json", &list).await?;
        } else if head[0].starts_with("get /health") {
            inner.checks.fetch_add(1, Ordering::SeqCst);
            answer(&mut stream, 200, "text/plain", "").await?;
        } else if head[0].starts_with("get ") {
            answer(&mut stream, 404, "text/plain", "").await?;
        } else {
            let body = String::from_utf8(body).unwrap();
            inner.received.fetch_add(1, Ordering::SeqCst);
            reply(&inner, &mut stream, (inner.decide)(&body)).await?;
        }
    }
}

async fn reply(inner: &Inner, stream: &mut BufReader<TcpStream>, reply: Reply) -> std::io::Result<()> {
    match reply {
        Reply::Answer(status, kind, body) => answer(stream, status, kind, &body).await,
        Reply::Head(lines) => {
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n{lines}\r\n{GOOD}", GOOD.len());
            stream.write_all(head.as_bytes()).await
        }
        Reply::Later(after) => {
            tokio::time::sleep(after).await;
            answer(stream, 200, "application/json", GOOD).await
        }
        Reply::Drip(every) => {
            stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 999999\r\n\r\n")
                .await?;
            loop {
                stream.write_all(b" ").await?;
                tokio::time::sleep(every).await;
            }
        }
        Reply::Short => {
            stream
                .write_all(
                    format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{}", GOOD.len(), &GOOD[..40]).as_bytes(),
                )
                .await?;
            Err(std::io::Error::other("the end"))
        }
        Reply::Nothing => std::future::pending().await,
        Reply::When(permits) => {
            permits.acquire().await.unwrap().forget();
            answer(stream, 200, "application/json", GOOD).await
        }
        Reply::Die => {
            inner.die();
            std::future::pending().await
        }
    }
}

async fn answer(stream: &mut BufReader<TcpStream>, status: u16, kind: &str, body: &str) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).await
}
