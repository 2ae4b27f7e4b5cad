//! How slow an upload may be: it holds one of the places of [`super::limits`], which others may be waiting for.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};

/// An upload that the server has waited so long for is given up: it holds temporary files, too.
pub(super) const IDLE: Duration = Duration::from_secs(300);
/// The same while other uploads wait for their turn: in time for these, which wait no longer than 30 s.
pub(super) const CROWDED: Duration = Duration::from_secs(10);
/// Bytes that make good for a second's wait: slower than any line, so that only who hardly sends at all is meant.
const LEAST: u64 = 1024;
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

#[cfg(test)]
mod tests {
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
