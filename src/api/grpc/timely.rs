//! How slowly the message of a call may arrive, except in uploads.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use hyper::body::Frame;
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::Code;

use super::status::error;
use crate::{
    access::LEAST,
    api::http::observed::{Observer, observed},
};

/// The time for a message besides what its bytes take at the least rate.
const MESSAGE_GRACE: Duration = Duration::from_secs(10);
/// The longest time for a message, at any rate: enough for the largest message at 300 kbit/s.
const MESSAGE_LONGEST: Duration = Duration::from_secs(120);

/// Makes a request body arrive in time, so that a client can't keep a call open by sending a byte now and then.
pub(super) struct Timely {
    came: u64,
    began: Instant,
    /// Created when the body is first waited for.
    over: Option<Pin<Box<Sleep>>>,
}

impl Timely {
    pub(super) fn wrap(body: Body) -> Body {
        observed(body, Self { came: 0, began: Instant::now(), over: None })
    }

    fn until(&self) -> Instant {
        self.began + (MESSAGE_GRACE + Duration::from_secs(self.came / LEAST)).min(MESSAGE_LONGEST)
    }
}

impl Observer for Timely {
    fn passed(&mut self, frame: &Frame<Bytes>) {
        self.came += frame.data_ref().map_or(0, |data| data.len() as u64);
    }

    fn waits(&mut self, cx: &mut Context<'_>) -> Poll<axum::Error> {
        let until = self.until();
        let over = self.over.get_or_insert_with(|| Box::pin(sleep_until(until)));
        if over.deadline() != until {
            over.as_mut().reset(until);
        }
        over.as_mut().poll(cx).map(|()| {
            let message =
                "the request did not come in time: its message must come within 10 s, or at 1 KiB/s, and within 2 min";
            axum::Error::new(error(Code::DeadlineExceeded, "REQUEST_TOO_SLOW", message))
        })
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

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
}
