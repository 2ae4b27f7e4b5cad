//! Bodies with an observer: what counts their bytes, records how a call ended, holds a place until they are
//! gone, or gives up one that comes too slowly.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tracing::Span;

use crate::access::Received;

/// Sees a body pass. It is dropped with the body.
pub(in crate::api) trait Observer: Send + Unpin + 'static {
    /// The span in which the body is polled.
    fn span(&self) -> Span {
        Span::none()
    }

    /// Called for each frame.
    fn passed(&mut self, _: &Frame<Bytes>) {}

    /// Called when the whole body was sent.
    fn ended(&mut self) {}

    /// Nothing of the body is there now. An error is its end: it has been waited for too long.
    fn waits(&mut self, _: &mut Context<'_>) -> Poll<axum::Error> {
        Poll::Pending
    }
}

pub(in crate::api) fn observed(body: Body, observer: impl Observer) -> Body {
    Body::new(Observed { body, observer })
}

/// Keeps something until the body is gone.
pub(in crate::api) struct Keeps<T> {
    pub(in crate::api) _kept: T,
}

impl<T: Send + Unpin + 'static> Observer for Keeps<T> {}

/// Counts the bytes of a request's body while they come, those of an unfinished message too.
impl Observer for Received {
    fn passed(&mut self, frame: &Frame<Bytes>) {
        self.add(frame.data_ref().map_or(0, |data| data.len() as u64));
    }
}

struct Observed<O> {
    body: Body,
    observer: O,
}

impl<O: Observer> HttpBody for Observed<O> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Self { body, observer } = &mut *self;
        let span = observer.span();
        let _entered = span.enter();
        let polled = Pin::new(&mut *body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            observer.passed(frame);
        }
        if matches!(polled, Poll::Ready(None)) || body.is_end_stream() {
            observer.ended();
        }
        match polled {
            Poll::Pending => observer.waits(cx).map(|error| Some(Err(error))),
            ready => ready,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    use futures::StreamExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Seen {
        bytes: Arc<AtomicUsize>,
        ends: Arc<AtomicUsize>,
    }

    impl Observer for Seen {
        fn passed(&mut self, frame: &Frame<Bytes>) {
            self.bytes.fetch_add(frame.data_ref().map_or(0, Bytes::len), Ordering::SeqCst);
        }

        fn ended(&mut self) {
            self.ends.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[tokio::test]
    async fn what_passes_and_the_end_are_seen_and_the_length_stays_known() {
        let seen = Seen::default();
        let body = observed(Body::from("12345"), seen.clone());
        assert_eq!(body.size_hint().exact(), Some(5), "or responses would lose their Content-Length");
        let whole = body.into_data_stream().map(Result::unwrap).collect::<Vec<_>>().await.concat();
        assert_eq!(whole, b"12345");
        assert_eq!(seen.bytes.load(Ordering::SeqCst), 5);
        assert!(seen.ends.load(Ordering::SeqCst) > 0);

        let seen = Seen::default();
        let pieces = futures::stream::iter(["12", "3"].map(Ok::<_, std::io::Error>)).chain(futures::stream::pending());
        let mut body = observed(Body::from_stream(pieces), seen.clone()).into_data_stream();
        body.next().await.unwrap().unwrap();
        body.next().await.unwrap().unwrap();
        drop(body);
        let came = (seen.bytes.load(Ordering::SeqCst), seen.ends.load(Ordering::SeqCst));
        assert_eq!((came, Arc::strong_count(&seen.bytes)), ((3, 0), 1), "given up in the middle, and let go of");
    }
}
