//! Makes finished lines durable: first the object, then the row, each retried until it succeeds.

use std::{future::Future, time::Duration};

use bytes::Bytes;
use tokio::sync::watch;

use super::{
    Control,
    troubles::{On, Troubles, in_words},
};
use crate::{
    blobs::Blobs,
    domain::{Epoch, SegmentRef},
    fault::{self, Fault},
    results::{self, PartBuilder},
    store::{Commit, FinalObject, NewPart, Store, StoreError},
};

/// The wait between two attempts to reach a database or blob store that is unreachable; it doubles up to
/// [`PATIENCE_CAP`].
const PATIENCE: Duration = Duration::from_millis(100);
const PATIENCE_CAP: Duration = Duration::from_secs(5);
/// A write without an answer for this long counts as stuck, and the batch says so.
const SLOW: Duration = Duration::from_secs(5);

/// Why a run stops before its lines are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The segment is no longer this node's, and its writes have no effect.
    Lost,
    /// Parts are torn: their lines run again.
    Torn,
    /// The results don't have one line for each request: all parts are dropped, and all lines run again.
    Incomplete,
    /// The database refuses this write, and would refuse it again: the batch can't continue.
    Refused(&'static str),
    /// A step failed because of stored data or a bug; another run may fail too.
    Broken(&'static str),
}

/// Writes one segment's parts and its end.
#[derive(Clone)]
pub struct Checkpoint {
    store: Store,
    blobs: Blobs,
    segment: SegmentRef,
    epoch: Epoch,
    control: watch::Receiver<Control>,
    troubles: Troubles,
}

impl Checkpoint {
    /// A checkpoint for a segment that this node has claimed.
    #[must_use]
    pub fn new(
        store: Store,
        blobs: Blobs,
        segment: SegmentRef,
        epoch: Epoch,
        control: watch::Receiver<Control>,
        troubles: Troubles,
    ) -> Self {
        Self { store, blobs, segment, epoch, control, troubles }
    }

    /// The key of the segment's object of that number, counted within the epoch.
    #[must_use]
    pub fn object_key(&self, number: u32) -> String {
        results::object_key(&self.segment, self.epoch, number)
    }

    /// Writes a part's object and its row.
    ///
    /// # Errors
    /// [`Stop::Lost`], [`Stop::Refused`].
    pub async fn part(self, builder: PartBuilder, number: u32) -> Result<NewPart, Stop> {
        let part = self.object(builder, number).await?;
        fault::point(Fault::PartObject);
        let commit =
            self.patiently("commit a part", || self.store.commit_part(&self.segment, self.epoch, &part)).await?;
        fault::point(Fault::PartRow);
        metrics::counter!("tidemill_parts_total").increment(1);
        match commit {
            Commit::Done => Ok(part),
            Commit::Fenced | Commit::Incomplete => {
                self.note_leftovers().await;
                Err(Stop::Lost)
            }
        }
    }

    /// What this run has written since it lost its lease is named by nobody, and whoever ended the batch may have looked for
    /// such objects before this one was there.
    async fn note_leftovers(&self) {
        if let Err(error) = self.store.note_leftovers(&self.segment.batch).await {
            tracing::warn!(segment = %self.segment, %error, "an object that nothing names could not be noted");
        }
    }

    /// Writes a part's object only.
    ///
    /// # Errors
    /// [`Stop::Lost`], [`Stop::Refused`].
    pub async fn object(&self, builder: PartBuilder, number: u32) -> Result<NewPart, Stop> {
        let (object, part): (Bytes, NewPart) = builder.build(self.object_key(number));
        self.patiently("write a part", || self.blobs.put(&part.object_key, object.clone())).await?;
        Ok(part)
    }

    /// Ends the segment.
    ///
    /// # Errors
    /// [`Stop::Lost`], [`Stop::Refused`].
    pub async fn finish(
        &self,
        last: Option<&NewPart>,
        object: &FinalObject,
        superseded: &[String],
    ) -> Result<(), Stop> {
        fault::point(Fault::SegmentFinish);
        let finish = || self.store.finish_segment(&self.segment, self.epoch, last, object, superseded);
        let commit = self.patiently("finish a segment", finish).await?;
        fault::point(Fault::SegmentFinished);
        match commit {
            Commit::Done => Ok(()),
            Commit::Fenced => {
                self.note_leftovers().await;
                Err(Stop::Lost)
            }
            Commit::Incomplete => Err(Stop::Incomplete),
        }
    }

    /// Retries `act` until it succeeds or the segment is lost; meanwhile the batch says why it waits. What the database
    /// refuses, or can't be read, is not retried: then the run ends.
    ///
    /// # Errors
    /// [`Stop::Lost`], [`Stop::Refused`], [`Stop::Broken`].
    pub async fn patiently<T, E: std::error::Error + Trouble + 'static, F: Future<Output = Result<T, E>>>(
        &self,
        what: &'static str,
        mut act: impl FnMut() -> F,
    ) -> Result<T, Stop> {
        let mut control = self.control.clone();
        let mut wait = PATIENCE;
        let mut stuck = None;
        loop {
            let mut acting = std::pin::pin!(act());
            let done = match tokio::time::timeout(SLOW, &mut acting).await {
                Ok(done) => done,
                Err(_) => {
                    stuck
                        .get_or_insert_with(|| self.troubles.stuck(&self.segment, E::ON, what, "no answer yet".into()));
                    acting.await
                }
            };
            match done {
                Ok(done) => return Ok(done),
                Err(error) if error.is_refusal() => {
                    tracing::error!(segment = %self.segment, %error, "can't {what}, and a retry can't help; the batch fails");
                    return Err(Stop::Refused(what));
                }
                Err(error) if error.is_final() => {
                    tracing::error!(segment = %self.segment, %error, "can't {what}; the run is ended");
                    return Err(Stop::Broken(what));
                }
                Err(error) => {
                    tracing::warn!(segment = %self.segment, %error, "can't {what}; trying again");
                    let why = in_words(&error);
                    match &stuck {
                        None => stuck = Some(self.troubles.stuck(&self.segment, E::ON, what, why)),
                        Some(stuck) => stuck.still(why),
                    }
                }
            }
            let abandoned = control.wait_for(|control| *control == Control::Abandon);
            if tokio::time::timeout(wait, abandoned).await.is_ok() {
                return Err(Stop::Lost);
            }
            wait = (wait * 2).min(PATIENCE_CAP);
        }
    }
}

/// What failed, and whether a retry can help.
pub trait Trouble {
    /// What failed.
    const ON: On;

    /// Whether a retry can't help.
    fn is_final(&self) -> bool;

    /// Whether it would fail on every node, because the database or the store refuses the content.
    fn is_refusal(&self) -> bool {
        false
    }
}

impl Trouble for StoreError {
    const ON: On = On::Database;

    fn is_final(&self) -> bool {
        Self::is_final(self)
    }

    fn is_refusal(&self) -> bool {
        matches!(self, Self::Rejected(_))
    }
}

impl Trouble for crate::blobs::BlobError {
    const ON: On = On::BlobStore;

    fn is_final(&self) -> bool {
        match self {
            // When the store is repaired, the segment is where it was.
            Self::Failed(_) | Self::Refused(_) | Self::Foreign(_) => false,
            Self::Missing(_) | Self::Open(_) => true,
        }
    }
}
