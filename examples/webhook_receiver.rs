//! A webhook receiver that uses tidemill's own verifier.
//!
//! ```sh
//! TIDEMILL_WEBHOOK_SECRET=whsec_... cargo run --example webhook_receiver -- 9000
//! ```

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
};

use axum::{Router, body::Bytes, extract::State, http::HeaderMap, routing::post};
use http::StatusCode;
use tidemill::{
    delivery::signature::verify,
    domain::{Timestamp, webhook::Secret},
};

type Receiver = Arc<(Secret, Mutex<HashSet<String>>)>;

async fn receive(State(receiver): State<Receiver>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let (secret, seen) = &*receiver;
    if let Err(error) = verify(std::slice::from_ref(secret), &headers, &body, Timestamp::now().unix_seconds()) {
        println!("refused: {error}");
        return StatusCode::UNAUTHORIZED;
    }
    let id = headers.get("webhook-id").and_then(|id| id.to_str().ok()).unwrap_or_default().to_owned();
    // Delivered at least once: count it once. In earnest: a table with a unique column.
    if seen.lock().is_ok_and(|mut seen| seen.insert(id)) {
        println!("{}", String::from_utf8_lossy(&body));
    }
    StatusCode::NO_CONTENT
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let secret = Secret::try_new(std::env::var("TIDEMILL_WEBHOOK_SECRET")?)?;
    let receiver: Receiver = Arc::new((secret, Mutex::default()));
    let app = Router::new().route("/", post(receive)).with_state(receiver);
    let port = std::env::args().nth(1).map_or(Ok(9000), |port| port.parse())?;
    axum::serve(tokio::net::TcpListener::bind(("127.0.0.1", port)).await?, app).await?;
    Ok(())
}
