//! The way of an answer from a worker to its client. A little of it is kept between the two, and a client that takes nothing
//! gives way to those who wait: no client holds a worker's slot for longer than the worker needs, by not reading.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures::stream::BoxStream;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::Instant,
};

/// Bytes that are taken from a worker before its client has taken them.
const BUFFER: usize = 64 * 1024;
/// The most that is handed on at once, so that slow progress is seen.
const STEP: usize = 8 * 1024;
/// How long a client may take nothing while more of its answer is ready than is kept for it.
const PATIENCE: Duration = Duration::from_secs(300);
/// The same while requests wait for a slot of the worker.
pub(super) const CROWDED: Duration = Duration::from_secs(10);
/// Bytes that make up for a second's wait: every network is faster, and so is every reader of text.
const LEAST: u64 = 1024;
/// The longest time between two checks.
const LOOK: Duration = Duration::from_secs(1);

/// Why an answer ends before its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Broken {
    /// Its worker broke off; says how.
    Worker(String),
    /// Its client takes nothing of it; says for how long.
    Client(String),
}

/// How long a client has let the server wait, less what it has taken. Pure: the caller measures the time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Slowness {
    waited: Duration,
}

impl Slowness {
    /// Counts a wait, and the bytes that were taken after it.
    fn took(&mut self, waited: Duration, bytes: usize) {
        let worth = Duration::from_secs(bytes as u64) / LEAST as u32;
        self.waited = (self.waited + waited).saturating_sub(worth);
    }

    /// Whether the client gives way, after a further wait.
    fn is_over(self, waited: Duration, patience: Duration) -> bool {
        self.waited + waited >= patience
    }
}

type Sent = Result<(Bytes, OwnedSemaphorePermit), Broken>;

/// The worker's end of the way.
pub(super) struct Entry {
    sender: mpsc::UnboundedSender<Sent>,
    room: Arc<Semaphore>,
    slowness: Slowness,
    /// How long a client may take nothing while others wait.
    crowded: Duration,
}

/// A way for one answer: where it goes in, and where it comes out.
pub(super) fn passage(crowded: Duration) -> (Entry, BoxStream<'static, Result<Bytes, Broken>>) {
    let (sender, mut receiver) = mpsc::unbounded_channel::<Sent>();
    let pieces = async_stream::stream! {
        while let Some(sent) = receiver.recv().await {
            // Its room is free again as it is handed out.
            yield sent.map(|(piece, _room)| piece);
        }
    };
    let entry = Entry { sender, room: Arc::new(Semaphore::new(BUFFER)), slowness: Slowness::default(), crowded };
    (entry, Box::pin(pieces))
}

impl Entry {
    /// Hands on a piece as soon as there is room. `is_crowded`: whether requests wait for a slot of the worker.
    ///
    /// # Errors
    /// The client takes nothing, or has gone away (`None`).
    pub(super) async fn hand(&mut self, mut piece: Bytes, is_crowded: impl Fn() -> bool) -> Result<(), Option<Broken>> {
        while !piece.is_empty() {
            let step = piece.split_to(piece.len().min(STEP));
            let room = self.room(step.len(), &is_crowded).await?;
            self.sender.send(Ok((step, room))).map_err(|_| None::<Broken>)?;
        }
        Ok(())
    }

    async fn room(
        &mut self,
        bytes: usize,
        is_crowded: impl Fn() -> bool,
    ) -> Result<OwnedSemaphorePermit, Option<Broken>> {
        let began = Instant::now();
        let taking = self.room.clone().acquire_many_owned(u32::try_from(bytes).unwrap_or(u32::MAX));
        let mut taking = std::pin::pin!(taking);
        loop {
            tokio::select! {
                biased;
                room = &mut taking => {
                    self.slowness.took(began.elapsed(), bytes);
                    // It is never closed.
                    return room.map_err(|_| None);
                }
                () = self.sender.closed() => return Err(None),
                () = tokio::time::sleep(LOOK.min(self.crowded)) => {}
            }
            let (patience, others) = match is_crowded() {
                true => (self.crowded, ", and others waited for its place at the worker"),
                false => (PATIENCE, ""),
            };
            if self.slowness.is_over(began.elapsed(), patience) {
                let why = format!("the client took hardly anything for {} s{others}", patience.as_secs_f64());
                return Err(Some(Broken::Client(why)));
            }
        }
    }

    /// Ready when the client has gone away.
    pub(super) async fn closed(&self) {
        self.sender.closed().await;
    }

    /// Ends the answer before its end, behind what has been handed on.
    pub(super) fn end(&self, why: Broken) {
        // Nobody reads it if the client has gone away.
        let _ = self.sender.send(Err(why));
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    #[test]
    fn a_wait_is_made_good_by_what_is_taken_after_it() {
        let mut slowness = Slowness::default();
        slowness.took(Duration::from_secs(9), 1_024);
        assert_eq!(slowness.waited, Duration::from_secs(8));
        for (more, is_over) in [(1, false), (2, true)] {
            assert_eq!(slowness.is_over(Duration::from_secs(more), CROWDED), is_over, "{more}");
            assert_eq!(slowness.is_over(Duration::from_secs(290 + more), PATIENCE), is_over, "{more}");
        }
        slowness.took(Duration::ZERO, STEP);
        assert_eq!(slowness, Slowness::default());
    }

    /// Seconds until a client that takes a step after each of these waits is cut off, if it ever is.
    async fn cut_off(wait: Option<u64>, is_crowded: bool) -> Option<u64> {
        let (mut entry, mut pieces) = passage(CROWDED);
        let began = Instant::now();
        let reads = async {
            loop {
                match wait {
                    Some(wait) => tokio::time::sleep(Duration::from_secs(wait)).await,
                    None => std::future::pending().await,
                }
                let _ = pieces.next().await;
            }
        };
        let piece = Bytes::from(vec![b'x'; 4 * BUFFER]);
        tokio::select! {
            handed = entry.hand(piece, || is_crowded) => match handed {
                Ok(()) => None,
                Err(why) => {
                    assert!(matches!(why, Some(Broken::Client(_))));
                    Some(began.elapsed().as_secs())
                }
            },
            () = reads => None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_is_cut_off_and_who_takes_a_little_is_not() {
        assert_eq!(cut_off(None, true).await, Some(10));
        assert_eq!(cut_off(None, false).await, Some(300));
        assert_eq!(cut_off(Some(7), true).await, None, "8 KiB in 7 s are over 1 KiB/s");
        assert_eq!(cut_off(Some(9), false).await, None);
        assert!(cut_off(Some(9), true).await.is_some_and(|seconds| seconds < 120));
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_handed_on_arrives_before_the_end() {
        let (mut entry, pieces) = passage(CROWDED);
        entry.hand(Bytes::from(vec![b'x'; STEP + 1]), || true).await.unwrap();
        let why = Broken::Worker("gone".into());
        entry.end(why.clone());
        drop(entry);
        let came: Vec<_> = pieces.map(|piece| piece.map(|piece| piece.len())).collect().await;
        assert_eq!(came, [Ok(STEP), Ok(1), Err(why)]);
        let (mut entry, pieces) = passage(CROWDED);
        drop(pieces);
        assert_eq!(entry.hand(Bytes::from_static(b"x"), || true).await, Err(None));
    }
}
