//! Wires everything (placeholder).
use std::net::SocketAddr;

use tokio_util::sync::CancellationToken;

use crate::config::ServeConfig;

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// It could not listen.
    #[error("listen: {0}")]
    Listen(#[from] std::io::Error),
}

/// A running server.
pub struct App {
    listener: tokio::net::TcpListener,
    addr: SocketAddr,
}

impl App {
    /// Starts it.
    ///
    /// # Errors
    /// [`AppError`].
    pub async fn start(config: ServeConfig) -> Result<Self, AppError> {
        let listener = tokio::net::TcpListener::bind(config.listen).await?;
        let addr = listener.local_addr()?;
        Ok(Self { listener, addr })
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Runs until told to stop, then drains.
    pub async fn run_until(self, shutdown: CancellationToken) -> Result<(), AppError> {
        shutdown.cancelled().await;
        drop(self.listener);
        Ok(())
    }

    /// Stops it.
    pub async fn stop(self) {}
}
