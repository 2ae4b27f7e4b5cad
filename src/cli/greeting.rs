//! The first contact with a server: checks that it answers before anything is sent or uploaded.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::future::BoxFuture;
use tokio::{sync::OnceCell, time::timeout};
use tonic::{Status, body::Body, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tower::{BoxError, Service, ServiceExt as _};

use super::{error, meter};

/// Time limit of a server's first answer, including the connection.
pub const FIRST_ANSWER: Duration = Duration::from_secs(10);
/// A longer wait is reported.
const SAY_AFTER: Duration = Duration::from_secs(2);

/// A channel whose first call first waits for an answer to a health check. Otherwise a port that accepts connections
/// and sends nothing would block a call until keep-alive gives up, at every try; calls themselves have no deadline,
/// because an upload or a model's answer may take any time.
#[derive(Clone)]
pub struct Greeted {
    channel: Channel,
    server: Arc<str>,
    /// Set once the server has answered in any way.
    met: Arc<OnceCell<()>>,
}

impl Greeted {
    /// `server` is the server's name in messages.
    pub fn new(channel: Channel, server: &str) -> Self {
        Self { channel, server: server.into(), met: Arc::default() }
    }

    async fn meet(&self) -> Result<(), Status> {
        self.met.get_or_try_init(|| self.greet()).await.copied()
    }

    async fn greet(&self) -> Result<(), Status> {
        let mut health = HealthClient::new(self.channel.clone());
        let answer = timeout(FIRST_ANSWER, health.check(HealthCheckRequest::default()));
        let mut answer = std::pin::pin!(answer);
        let answer = tokio::select! {
            biased;
            answer = &mut answer => answer,
            () = tokio::time::sleep(SAY_AFTER) => {
                meter::note(&format!("waiting for {} to answer", self.server));
                answer.await
            }
        };
        match answer {
            // Any answer will do.
            Ok(Err(status)) if error::is_lost_connection(&status) => Err(status),
            Ok(_) => Ok(()),
            Err(_) => Err(Status::deadline_exceeded(format!(
                "no answer from {} within {} s: a firewall may drop the connection, or another program listens there",
                self.server,
                FIRST_ANSWER.as_secs()
            ))),
        }
    }
}

impl Service<http::Request<Body>> for Greeted {
    type Response = http::Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            this.meet().await?;
            Ok(this.channel.oneshot(request).await?)
        })
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::{super::error::report, *};
    use crate::pb;

    /// A port that accepts and says nothing: every command gives up at the documented time, on a clock that needs no waiting.
    #[tokio::test(start_paused = true)]
    async fn a_silent_port_is_told_after_ten_seconds() {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap());
        let client = super::super::fake::client(&url);
        let began = Instant::now();
        let request = pb::ListBatchesRequest::default();
        let listed =
            super::super::client::retry(|| async { client.batches().list_batches(request.clone()).await }).await;
        let text = report(&listed.unwrap_err().into()).unwrap();
        assert!(began.elapsed() < FIRST_ANSWER + Duration::from_secs(1), "{:?}", began.elapsed());
        assert!(text.starts_with(&format!("no answer from {url} within 10 s: ")), "{text}");
    }

    #[tokio::test]
    async fn a_server_is_greeted_once_and_a_refused_health_check_is_an_answer() {
        let (fake, url) = super::super::fake::Fake::start("").await;
        let client = super::super::fake::client(&url);
        for _ in 0..2 {
            let status = client.batches().list_files(pb::ListFilesRequest::default()).await.unwrap_err();
            assert_eq!(status.code(), tonic::Code::Unimplemented, "the fake's own answer: {status:?}");
        }
        drop(fake);
    }
}
