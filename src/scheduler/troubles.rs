//! Records which runs can't reach the blob store or the database, so that a batch's `waiting_reason` can say so.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{
    blobs::BlobError,
    domain::{BatchId, SegmentRef},
};

/// Gauge of this node's segments that are stuck, by `on`: `blob_store` or `database`.
pub(super) const STUCK: &str = "tidemill_segments_stuck";

/// What a run can be stuck on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum On {
    /// The objects.
    BlobStore,
    /// The rows.
    Database,
}

impl On {
    fn label(self) -> &'static str {
        match self {
            Self::BlobStore => "blob_store",
            Self::Database => "database",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::BlobStore => "blob store",
            Self::Database => "database",
        }
    }
}

/// The records of this node's runs. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Troubles {
    notes: Arc<Mutex<Notes>>,
}

#[derive(Debug, Default)]
struct Notes {
    next: u64,
    by_batch: BTreeMap<(BatchId, u64), Note>,
}

#[derive(Debug)]
struct Note {
    on: On,
    what: &'static str,
    why: String,
    since: Instant,
}

impl Troubles {
    /// Why a batch is stuck: the oldest trouble of its segments on this node. `None`: it is not.
    #[must_use]
    pub fn of(&self, batch: &BatchId, now: Instant) -> Option<String> {
        let notes = self.notes.lock();
        let of_batch = notes.by_batch.range((batch.clone(), 0)..=(batch.clone(), u64::MAX));
        let note = of_batch.map(|(_, note)| note).min_by_key(|note| note.since)?;
        let seconds = Duration::from_secs(now.saturating_duration_since(note.since).as_secs());
        let since =
            if seconds.is_zero() { String::new() } else { format!(" for {}", humantime::format_duration(seconds)) };
        Some(format!(
            "the {} has failed{since}: can't {}: {}; nothing is lost, and the batch continues when it works again",
            note.on.name(),
            note.what,
            note.why
        ))
    }

    /// The batches that are stuck.
    #[must_use]
    pub fn batches(&self) -> Vec<BatchId> {
        self.notes.lock().by_batch.keys().map(|(batch, _)| batch.clone()).collect()
    }

    /// Records that a segment is stuck, until the returned value is dropped.
    pub(super) fn stuck(&self, segment: &SegmentRef, on: On, what: &'static str, why: String) -> Stuck {
        let mut notes = self.notes.lock();
        notes.next += 1;
        let key = (segment.batch.clone(), notes.next);
        notes.by_batch.insert(key.clone(), Note { on, what, why, since: Instant::now() });
        metrics::gauge!(STUCK, "on" => on.label()).increment(1);
        Stuck { troubles: self.clone(), key, on }
    }
}

/// A segment that is stuck.
#[derive(Debug)]
pub(super) struct Stuck {
    troubles: Troubles,
    key: (BatchId, u64),
    on: On,
}

impl Stuck {
    /// Updates the reason.
    pub(super) fn still(&self, why: String) {
        if let Some(note) = self.troubles.notes.lock().by_batch.get_mut(&self.key) {
            note.why = why;
        }
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        self.troubles.notes.lock().by_batch.remove(&self.key);
        metrics::gauge!(STUCK, "on" => self.on.label()).decrement(1);
    }
}

/// Why something failed, safe to show to clients: no path, no query, no secret. The log has the details.
pub(super) fn in_words(error: &(dyn std::error::Error + 'static)) -> String {
    let mut at = Some(error);
    while let Some(error) = at {
        if let Some(words) = error.downcast_ref::<BlobError>().and_then(BlobError::in_words) {
            return words;
        }
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return io.kind().to_string();
        }
        at = error.source();
    }
    "the server's log has the details".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::SegmentIndex;

    #[tokio::test(start_paused = true)]
    async fn the_oldest_trouble_is_told_until_it_is_over() {
        let (troubles, batch) = (Troubles::default(), BatchId::generate());
        let segment = |index| SegmentRef { batch: batch.clone(), index: SegmentIndex(index) };
        assert_eq!(troubles.of(&batch, Instant::now()), None);
        let disk = std::io::Error::new(std::io::ErrorKind::StorageFull, "/secret/path is full");
        let first = troubles.stuck(&segment(0), On::BlobStore, "write a part", in_words(&disk));
        tokio::time::advance(Duration::from_secs(90)).await;
        let second = troubles.stuck(&segment(1), On::Database, "finish a segment", "x".into());
        let told = troubles.of(&batch, Instant::now()).unwrap();
        assert!(
            told.starts_with("the blob store has failed for 1m 30s: can't write a part: no storage space;"),
            "{told}"
        );
        assert_eq!(troubles.of(&BatchId::generate(), Instant::now()), None, "others are not stuck");
        drop(first);
        second.still("y".into());
        let told = troubles.of(&batch, Instant::now()).unwrap();
        assert!(told.starts_with("the database has failed: can't finish a segment: y;"), "{told}");
        drop(second);
        assert_eq!(troubles.of(&batch, Instant::now()), None);
    }
}
