//! A webhook receiver that outlives the servers.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU16, Ordering},
};

use axum::{Router, body::Bytes, extract::State, http::HeaderMap, routing::post};
use http::StatusCode;
use serde_json::Value;
use tidemill::{
    delivery::signature::{Verified, verify},
    domain::{Timestamp, webhook::Secret},
};
use tokio::sync::watch;

pub const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
/// Answer nothing, for ever.
pub const SILENT: u16 = 0;

/// A webhook as it came, verified.
#[derive(Clone, Debug)]
pub struct Webhook {
    pub id: String,
    pub event: String,
    pub attempt: String,
    pub body: Value,
}

#[derive(Clone)]
pub struct Receiver {
    pub url: String,
    inner: Arc<Inner>,
}

struct Inner {
    status: AtomicU16,
    received: Mutex<Vec<Webhook>>,
    count: watch::Sender<usize>,
}

impl Receiver {
    /// Answers with this status, until told otherwise.
    pub async fn start(status: u16) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/hook", listener.local_addr().unwrap());
        let (status, received) = (AtomicU16::new(status), Mutex::default());
        let inner = Arc::new(Inner { status, received, count: watch::Sender::new(0) });
        let app = Router::new().route("/hook", post(receive)).with_state(inner.clone());
        tokio::spawn(async { axum::serve(listener, app).await.unwrap() });
        Self { url, inner }
    }

    pub fn answer(&self, status: u16) {
        self.inner.status.store(status, Ordering::SeqCst);
    }

    pub fn received(&self) -> Vec<Webhook> {
        self.inner.received.lock().unwrap().clone()
    }

    /// Waits for so many webhooks.
    pub async fn wait(&self, count: usize) {
        let mut seen = self.inner.count.subscribe();
        crate::support::patience::ends("a webhook comes", seen.wait_for(|seen| *seen >= count)).await.unwrap();
    }
}

async fn receive(State(inner): State<Arc<Inner>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let text = |name: &str| headers[name].to_str().unwrap().to_owned();
    let secret = [Secret::try_new(SECRET).unwrap()];
    assert_eq!(verify(&secret, &headers, &body, Timestamp::now().unix_seconds()), Ok(Verified::Standard));
    let webhook = Webhook {
        id: text("webhook-id"),
        event: text("x-webhook-event"),
        attempt: text("x-webhook-attempt"),
        body: serde_json::from_slice(&body).unwrap(),
    };
    inner.received.lock().unwrap().push(webhook);
    let status = inner.status.load(Ordering::SeqCst);
    inner.count.send_modify(|count| *count += 1);
    if status == SILENT {
        std::future::pending::<()>().await;
    }
    StatusCode::from_u16(status).unwrap()
}
