//! A worker and a receiver of webhooks whose answers hold odd text.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderValue, Response},
    routing::{any, get, post},
};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::json;
use tokio::net::TcpListener;

#[derive(Clone)]
struct Chance(Arc<AtomicU64>);

impl Chance {
    fn next(&self) -> StdRng {
        StdRng::seed_from_u64(self.0.fetch_add(1, Ordering::Relaxed))
    }
}

async fn serve(router: Router) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

/// A worker that serves the model `m`, and lists others that no database could hold.
pub async fn worker(seed: u64) -> String {
    let models = r#"{"object":"list","data":[{"id":"a\u0000b"},{"id":"\ud800"},{"id":"m"},{"id":"\u001b[2J"},{"id":7},{"id":""}]}"#;
    let router = Router::new()
        .route("/health", get(async || "ok"))
        .route("/v1/models", get(move || async move { models }))
        .route("/v1/chat/completions", post(answer))
        .with_state(Chance(Arc::new(AtomicU64::new(seed))));
    serve(router).await
}

async fn answer(State(chance): State<Chance>) -> Response<Body> {
    let mut random = chance.next();
    let texts = crate::calls::odd_texts(&mut random);
    let text = texts.choose(&mut random).unwrap();
    let whole = json!({
        "id": text,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2, text.as_str(): 1},
    });
    let surrogate = r#"{"choices":[{"index":0,"message":{"content":"\ud800\u0000"},"finish_reason":"stop"}]}"#;
    let (status, body) = match random.random_range(0..20) {
        0 => (400, json!({"error": {"message": text, "type": text, "code": 400}}).to_string()),
        1 => (400, text.clone()),
        2 => (200, text.clone()),
        3 => (500, text.clone()),
        4..8 => (200, surrogate.to_owned()),
        _ => (200, whole.to_string()),
    };
    let mut answer = Response::new(Body::from(body));
    *answer.status_mut() = status.try_into().unwrap();
    for name in ["x-request-id", "content-type", "retry-after", "server"] {
        if random.random_bool(0.5)
            && let Ok(value) = HeaderValue::from_bytes(&text.as_bytes()[..text.len().min(4_000)])
        {
            answer.headers_mut().insert(name, value);
        }
    }
    answer
}

/// A receiver that answers anything.
pub async fn receiver(seed: u64) -> String {
    let router = Router::new().fallback(any(receive)).with_state(Chance(Arc::new(AtomicU64::new(seed))));
    serve(router).await + "/hook"
}

async fn receive(State(chance): State<Chance>) -> Response<Body> {
    let mut random = chance.next();
    let texts = crate::calls::odd_texts(&mut random);
    let text = texts.choose(&mut random).unwrap();
    let mut body = text.clone().into_bytes();
    if random.random_bool(0.3) {
        body.extend(b"\0\xff\xfe");
    }
    let mut answer = Response::new(Body::from(body));
    *answer.status_mut() =
        [200, 204, 301, 400, 404, 410, 429, 500, 503].choose(&mut random).copied().unwrap().try_into().unwrap();
    if let Ok(value) = HeaderValue::from_bytes(&text.as_bytes()[..text.len().min(4_000)]) {
        answer.headers_mut().insert("retry-after", value);
    }
    answer
}
