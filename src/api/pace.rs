//! How slow an upload may be: it holds one of the places of [`super::limits`], which others may be waiting for.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Code;

use super::status::error;

/// An upload that the server has waited so long for is given up: it holds temporary files, too.
pub(super) const IDLE: Duration = Duration::from_secs(300);
/// The same while other uploads wait for their turn: in time for these, which wait no longer than 30 s.
pub(super) const CROWDED: Duration = Duration::from_secs(10);
/// Bytes that make good for a second's wait: slower than any line, so that only who hardly sends at all is meant.
const LEAST: u64 = 1024;
/// How long an upload may take in all: as long as a file may be on its way, however fast it comes.
pub(super) const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// How long the message of a call that is no upload may take to come, at the least rate.
const MESSAGE_GRACE: Duration = Duration::from_secs(10);
/// The same at any rate: enough for the largest message over a line of 300 kbit/s.
const MESSAGE_LONGEST: Duration = Duration::from_secs(120);
/// How often is looked, at least.
pub(super) const LOOK: Duration = Duration::from_secs(1);

/// How long an upload has kept the server waiting, less what it has sent. Pure: the time comes from the caller, who counts
/// only what was waited for the client, not what the client was made to wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pace {
    waited: Duration,
}

impl Pace {
    /// So long was waited, and so many bytes have come.
    pub(super) fn came(&mut self, waited: Duration, bytes: u64) {
        let worth = Duration::from_secs(bytes / LEAST) + Duration::from_secs(bytes % LEAST) / LEAST as u32;
        self.waited = (self.waited + waited).saturating_sub(worth);
    }

    /// Whether to wait no longer.
    pub(super) fn is_over(self, crowded: bool) -> bool {
        self.waited >= if crowded { CROWDED } else { IDLE }
    }
}

/// The bytes of a request's body that have come so far, those of an unfinished message too. An extension of the request.
#[derive(Clone, Debug, Default)]
pub(super) struct Received(Arc<AtomicU64>);

impl Received {
    pub(super) fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    #[cfg(test)]
    pub(super) fn of(bytes: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes)))
    }

    /// The body, counted.
    pub(super) fn count(&self, body: Body) -> Body {
        Body::new(Counted { body, received: self.clone() })
    }
}

struct Counted {
    body: Body,
    received: Received,
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(data) = frame.data_ref()
        {
            self.received.0.fetch_add(data.len() as u64, Ordering::Relaxed);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The body of a call whose message must come in time: a client can't keep a call open by sending a byte now and then.
pub(super) struct Timely {
    body: Body,
    came: u64,
    began: Instant,
    /// Made when the body first has to be waited for.
    over: Option<Pin<Box<Sleep>>>,
}

impl Timely {
    pub(super) fn wrap(body: Body) -> Body {
        Body::new(Self { body, came: 0, began: Instant::now(), over: None })
    }

    fn until(&self) -> Instant {
        self.began + (MESSAGE_GRACE + Duration::from_secs(self.came / LEAST)).min(MESSAGE_LONGEST)
    }
}

impl HttpBody for Timely {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            if let Some(Ok(frame)) = &frame {
                this.came += frame.data_ref().map_or(0, |data| data.len() as u64);
            }
            return Poll::Ready(frame);
        }
        let until = this.until();
        let over = this.over.get_or_insert_with(|| Box::pin(sleep_until(until)));
        if over.deadline() != until {
            over.as_mut().reset(until);
        }
        ready!(over.as_mut().poll(cx));
        let message =
            "the request did not come in time: its message must come within 10 s, or at 1 KiB/s, and within 2 min";
        Poll::Ready(Some(Err(axum::Error::new(error(Code::DeadlineExceeded, "REQUEST_TOO_SLOW", message)))))
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
    use futures::StreamExt;
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Seconds until an upload of so many bytes a second is given up, if it is within an hour.
    fn given_up(bytes: u64, crowded: bool) -> Option<u64> {
        let mut pace = Pace::default();
        (1..3_600).find(|_| {
            pace.came(SECOND, bytes);
            pace.is_over(crowded)
        })
    }

    #[test]
    fn who_hardly_sends_is_given_up_and_who_sends_is_not() {
        assert_eq!(given_up(0, false), Some(300));
        assert_eq!(given_up(1, false), Some(301));
        assert_eq!(given_up(512, false), Some(600));
        assert_eq!(given_up(1_024, false), None);
        assert_eq!(given_up(0, true), Some(10));
        assert_eq!(given_up(1, true), Some(11));
        assert_eq!(given_up(1_024, true), None);
    }

    #[test]
    fn a_pause_is_made_good_by_what_comes_after_it() {
        let mut pace = Pace::default();
        pace.came(Duration::from_secs(299), 0);
        pace.came(SECOND, 1024 * 1024);
        assert_eq!(pace, Pace::default());
        // But nothing is saved up for later.
        pace.came(Duration::from_secs(300), 0);
        assert!(pace.is_over(false));
    }

    #[tokio::test(start_paused = true)]
    async fn a_message_that_trickles_is_given_up_and_a_slow_one_is_not() {
        let body = |bytes: usize| {
            let pieces = futures::stream::repeat(()).then(move |()| async move {
                tokio::time::sleep(SECOND).await;
                Ok::<_, std::io::Error>(Bytes::from(vec![0; bytes]))
            });
            Timely::wrap(Body::from_stream(pieces)).into_data_stream()
        };
        for (bytes, wanted) in [(1, 10), (512, 19), (4_096, 120)] {
            let began = Instant::now();
            let mut body = body(bytes);
            let error = loop {
                if let Err(error) = body.next().await.unwrap() {
                    break error;
                }
            };
            assert_eq!(began.elapsed().as_secs(), wanted, "{bytes}");
            let status = tonic::Status::from_error(error.into());
            assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
            assert!(!status.details().is_empty());
        }
    }

    proptest! {
        #[test]
        fn never_given_up_above_the_least_rate(steps in proptest::collection::vec((1u64..9_000, 0u64..5_000), 1..100)) {
            let mut pace = Pace::default();
            for (millis, more) in steps {
                pace.came(Duration::from_millis(millis), millis * LEAST / 1_000 + 1 + more);
                prop_assert!(!pace.is_over(true));
            }
        }
    }
}
