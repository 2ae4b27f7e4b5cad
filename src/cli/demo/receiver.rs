//! The demo's webhook receiver, on a loopback port. It accepts only webhooks with a valid signature.

use std::time::Duration;

use anyhow::{Context, bail};
use axum::{Router, body::Bytes, extract::State, http::HeaderMap, routing::post};
use http::StatusCode;
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle, time::timeout};

use crate::{
    delivery::signature::{STANDARD_ID, Verified, verify},
    domain::{Timestamp, webhook::Secret},
};

/// Time to wait for the webhook. It is sent as soon as the batch ends; the rest allows for a busy machine and a retry.
const PATIENCE: Duration = Duration::from_secs(15);
/// Unverified webhooks remembered at most.
const REMEMBERED: usize = 16;

/// A webhook that has arrived.
pub(super) struct Received {
    /// The `X-Webhook-Event` header: not verified, only printed.
    event: String,
    id: String,
    verdict: Result<(), String>,
}

struct Door {
    secret: Secret,
    received: mpsc::Sender<Received>,
}

pub(super) struct Receiver {
    url: String,
    secret: Secret,
    received: mpsc::Receiver<Received>,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Receiver {
    /// Starts listening, with a new secret.
    pub(super) async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("webhook receiver")?;
        let url = format!("http://{}/webhook", listener.local_addr()?);
        let secret = Secret::generate();
        let (sender, received) = mpsc::channel(REMEMBERED);
        let door = Door { secret: secret.clone(), received: sender };
        let app = Router::new().route("/webhook", post(receive)).with_state(std::sync::Arc::new(door));
        let serving = tokio::spawn(async { axum::serve(listener, app).await });
        Ok(Self { url, secret, received, serving })
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.secret
    }

    /// Waits for the first webhook and describes it.
    ///
    /// # Errors
    /// None came in time, or what came is not what the secret has signed.
    pub(super) async fn wait(&mut self) -> anyhow::Result<String> {
        let Ok(received) = timeout(PATIENCE, self.received.recv()).await else {
            bail!(
                "no webhook arrived within {} s; start your own server with `--log info` to see why",
                PATIENCE.as_secs()
            );
        };
        let Received { event, id, verdict } = received.context("the webhook receiver has stopped")?;
        match verdict {
            Ok(()) => Ok(format!("webhook {event} received, signature verified (webhook-id {id})")),
            Err(why) => bail!("a webhook could not be verified ({event}, webhook-id {id}): {why}"),
        }
    }

    pub(super) async fn stop(self) {
        self.serving.abort();
        let _ = self.serving.await;
    }
}

async fn receive(State(door): State<std::sync::Arc<Door>>, headers: HeaderMap, body: Bytes) -> StatusCode {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("-").to_owned();
    let verdict = match verify(std::slice::from_ref(&door.secret), &headers, &body, Timestamp::now().unix_seconds()) {
        Ok(Verified::Standard) => Ok(()),
        Ok(Verified::BodyOnly) => Err("it has no webhook-signature".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    let status = if verdict.is_ok() { StatusCode::NO_CONTENT } else { StatusCode::UNAUTHORIZED };
    // If the channel is full, the demo has seen enough.
    let _ = door.received.try_send(Received { event: text("x-webhook-event"), id: text(STANDARD_ID), verdict });
    status
}

#[cfg(test)]
mod tests {
    use crate::delivery::signature::{STANDARD_SIGNATURE, STANDARD_TIMESTAMP, sign_standard};

    use super::*;

    async fn tell(receiver: &Receiver, secret: &Secret, body: &'static str) -> u16 {
        crate::telemetry::install_tls_provider();
        let now = Timestamp::now().unix_seconds();
        let signature = sign_standard(std::slice::from_ref(secret), "msg_1", now, b"{}");
        let request = reqwest::Client::new()
            .post(receiver.url())
            .header("x-webhook-event", "completed")
            .header(STANDARD_ID, "msg_1")
            .header(STANDARD_TIMESTAMP, now)
            .header(STANDARD_SIGNATURE, signature)
            .body(body);
        request.send().await.unwrap().status().as_u16()
    }

    #[tokio::test]
    async fn it_believes_only_what_is_signed() {
        let mut receiver = Receiver::start().await.unwrap();
        let secret = receiver.secret().clone();
        assert_eq!(tell(&receiver, &secret, "{}").await, 204);
        let said = receiver.wait().await.unwrap();
        assert_eq!(said, "webhook completed received, signature verified (webhook-id msg_1)");
        assert_eq!(tell(&receiver, &secret, "{ }").await, 401);
        assert!(receiver.wait().await.unwrap_err().to_string().contains("no signature matches"));
        assert_eq!(tell(&receiver, &Secret::generate(), "{}").await, 401);
        assert!(receiver.wait().await.is_err());
        receiver.stop().await;
    }
}
