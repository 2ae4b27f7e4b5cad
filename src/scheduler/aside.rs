//! Batches that this node leaves to other nodes for a while, because it could not read their input or record their end.
//!
//! If only this node has a problem, another one continues them meanwhile. If all nodes fail alike, the work is not
//! repeated at once.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::domain::BatchId;

/// The first pause; it doubles up to [`LONGEST`].
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(300);
/// A batch that has not failed for this long is forgotten.
const FORGET: Duration = Duration::from_secs(3_600);

#[derive(Debug)]
struct Aside {
    times: u32,
    until: Instant,
}

/// The batches left to other nodes, and until when. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(super) struct Asides {
    batches: Arc<Mutex<HashMap<BatchId, Aside>>>,
}

impl Asides {
    /// How often the batch has been left.
    pub(super) fn times(&self, batch: &BatchId) -> u32 {
        self.batches.lock().get(batch).map_or(0, |aside| aside.times)
    }

    /// Whether the batch is left to others now.
    pub(super) fn has(&self, batch: &BatchId, now: Instant) -> bool {
        self.batches.lock().get(batch).is_some_and(|aside| aside.until > now)
    }

    /// Leaves the batch, longer each time. Segments that fail at the same time count once.
    pub(super) fn leave(&self, batch: &BatchId, now: Instant) {
        let mut batches = self.batches.lock();
        batches.retain(|_, aside| aside.until + FORGET > now);
        let aside = batches.entry(batch.clone()).or_insert(Aside { times: 0, until: now });
        if aside.until <= now {
            aside.until = now + (FIRST * 2u32.saturating_pow(aside.times)).min(LONGEST);
            aside.times += 1;
        }
    }

    /// Forgets the batch after a success.
    pub(super) fn forget(&self, batch: &BatchId) {
        self.batches.lock().remove(batch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_batch_is_left_longer_each_time_until_it_goes_well() {
        let (asides, batch) = (Asides::default(), BatchId::generate());
        for (times, seconds) in [1, 2, 4, 8].into_iter().enumerate() {
            let now = Instant::now();
            assert!(!asides.has(&batch, now));
            assert_eq!(asides.times(&batch) as usize, times);
            // All its segments fail alike.
            asides.leave(&batch, now);
            asides.leave(&batch, now);
            assert!(asides.has(&batch, now + Duration::from_secs(seconds) - Duration::from_millis(1)));
            assert!(!asides.has(&BatchId::generate(), now), "others are not concerned");
            tokio::time::advance(Duration::from_secs(seconds)).await;
        }
        asides.forget(&batch);
        assert_eq!(asides.times(&batch), 0);
        for _ in 0..40 {
            tokio::time::advance(LONGEST).await;
            asides.leave(&batch, Instant::now());
        }
        assert!(!asides.has(&batch, Instant::now() + LONGEST));
    }
}
