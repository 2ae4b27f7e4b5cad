//! A connection that notes what it does.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
    time::Instant,
};

use super::activity::{Activity, Ending};

/// A connection's activity. Shared by the connection, its requests and the task that closes idle connections.
pub(super) struct Watch {
    activity: Mutex<Activity>,
    /// Notified when the connection's deadline has moved forward.
    pub(super) sooner: Notify,
}

impl Watch {
    pub(super) fn new() -> Self {
        Self { activity: Mutex::new(Activity::new(Instant::now())), sooner: Notify::new() }
    }

    pub(super) fn due(&self) -> Option<(Instant, Ending)> {
        self.activity.lock().due()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.activity.lock().is_idle()
    }

    /// A request has come. Returns how many are open.
    pub(super) fn began(&self) -> usize {
        self.activity.lock().began()
    }

    /// A response has ended. Returns how many are open.
    pub(super) fn ended(&self) -> usize {
        let open = self.activity.lock().ended(Instant::now());
        self.sooner.notify_one();
        open
    }

    fn read(&self, bytes: &[u8]) {
        if self.activity.lock().read(bytes, Instant::now()) {
            self.sooner.notify_one();
        }
    }

    fn wrote(&self, polled: &Poll<io::Result<usize>>) {
        let mut activity = self.activity.lock();
        match polled {
            Poll::Ready(_) => activity.unblocked(),
            Poll::Pending => {
                if activity.blocked(Instant::now()) {
                    self.sooner.notify_one();
                }
            }
        }
    }
}

/// A connection, plain or decrypted, whose reads and writes are noted.
pub(super) struct Watched<S> {
    stream: S,
    watch: Arc<Watch>,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, watch: Arc<Watch>) -> Self {
        Self { stream, watch }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        let came = &buf.filled()[before..];
        if !came.is_empty() {
            self.watch.read(came);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.watch.wrote(&polled);
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.watch.wrote(&polled);
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
