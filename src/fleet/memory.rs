//! Accounts for the memory of answers: from their first byte until their result line is durable, they count against a
//! budget.
//!
//! At the budget nothing more is read and nothing more is sent until something is durable. Two halves keep small answers
//! apart from large ones, so that a batch of embeddings can't hold up a batch of chats. No two answers can wait for each
//! other: one of known length waits before it holds anything, and of those of unknown length one at a time goes on
//! without room, so the budget may be passed by one answer.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// An answer up to this many bytes is small.
pub(super) const SMALL: usize = 64 * 1024;
const BYTES: &str = "tidemill_answer_memory_bytes";
const WAITS: &str = "tidemill_answer_memory_waits_total";
/// Bytes per unit of the budget.
const UNIT: usize = 1_024;

/// The budget of one node.
#[derive(Clone, Debug)]
pub(super) struct AnswerMemory {
    small: Half,
    large: Half,
    /// The permit of the one answer that may continue without a reservation.
    beyond: Arc<Semaphore>,
}

#[derive(Clone, Debug)]
struct Half {
    room: Arc<Semaphore>,
    units: u32,
    /// How often somebody has waited for room here.
    waits: Arc<AtomicU64>,
}

pub(super) fn describe_metrics() {
    metrics::describe_gauge!(BYTES, "bytes that answers hold from their first byte until their result is durable");
    metrics::describe_counter!(WAITS, "times that sending or reading waited for memory for answers");
}

/// A part of the budget, returned when it is dropped.
#[derive(Debug, Default)]
pub struct Held {
    small: Option<OwnedSemaphorePermit>,
    large: Option<OwnedSemaphorePermit>,
    beyond: Option<OwnedSemaphorePermit>,
}

impl Held {
    /// Takes over what `other` holds.
    pub fn absorb(&mut self, other: Self) {
        let merge = |into: &mut Option<OwnedSemaphorePermit>, other: Option<OwnedSemaphorePermit>| match (into, other) {
            (Some(into), Some(other)) => into.merge(other),
            (into @ None, other) => *into = other,
            (Some(_), None) => {}
        };
        merge(&mut self.small, other.small);
        merge(&mut self.large, other.large);
        merge(&mut self.beyond, other.beyond);
    }
}

impl Half {
    fn new(bytes: u64) -> Self {
        let units = u32::try_from(bytes / UNIT as u64).unwrap_or(u32::MAX).max(1);
        Self { room: Arc::new(Semaphore::new(units as usize)), units, waits: Arc::default() }
    }

    /// The units that the bytes need, at most all.
    fn units_of(&self, bytes: usize) -> u32 {
        u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX).clamp(1, self.units)
    }

    fn try_take(&self, units: u32) -> Option<OwnedSemaphorePermit> {
        self.room.clone().try_acquire_many_owned(units).ok()
    }

    async fn take(&self, units: u32) -> Option<OwnedSemaphorePermit> {
        if let Some(permit) = self.try_take(units) {
            return Some(permit);
        }
        self.waits.fetch_add(1, Ordering::Relaxed);
        // It is never closed.
        self.room.clone().acquire_many_owned(units).await.ok()
    }
}

impl AnswerMemory {
    pub(super) fn new(bytes: u64) -> Self {
        Self { small: Half::new(bytes / 2), large: Half::new(bytes - bytes / 2), beyond: Arc::new(Semaphore::new(1)) }
    }

    /// Waits until there is room for more answers of about this size.
    pub(super) async fn open(&self, size: usize) {
        let half = if size > SMALL { &self.large } else { &self.small };
        drop(half.take(1).await);
    }

    /// Waits for the room of an answer whose length is known.
    pub(super) async fn whole(&self, bytes: usize) -> Held {
        match bytes > SMALL {
            true => Held { large: self.large.take(self.large.units_of(bytes)).await, ..Held::default() },
            false => Held { small: self.small.take(self.small.units_of(bytes)).await, ..Held::default() },
        }
    }

    /// Adjusts what an answer holds to `bytes`, the size of the answer so far.
    pub(super) async fn grow(&self, held: &mut Held, bytes: usize) {
        if held.beyond.is_some() {
            return;
        }
        if bytes <= SMALL {
            if held.small.is_none() {
                // All that a small one may need, so that no two wait for each other half way.
                held.small = self.small.take(self.small.units_of(SMALL)).await;
            }
            return;
        }
        let has = held.large.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = self.large.units_of(bytes).saturating_sub(u32::try_from(has).unwrap_or(u32::MAX));
        if more > 0 {
            let grown = match self.large.try_take(more) {
                Some(permit) => Held { large: Some(permit), ..Held::default() },
                None => {
                    self.large.waits.fetch_add(1, Ordering::Relaxed);
                    tokio::select! {
                        biased;
                        permit = self.large.room.clone().acquire_many_owned(more) => {
                            Held { large: permit.ok(), ..Held::default() }
                        }
                        permit = self.beyond.clone().acquire_owned() => {
                            Held { beyond: permit.ok(), ..Held::default() }
                        }
                    }
                }
            };
            held.absorb(grown);
        }
        held.small = None;
    }

    /// Returns what an answer holds beyond its size.
    pub(super) fn shrink(&self, held: &mut Held, bytes: usize) {
        if let Some(permit) = &mut held.small {
            let needs = self.small.units_of(bytes) as usize;
            drop(permit.split(permit.num_permits().saturating_sub(needs)));
        }
    }

    /// Bytes that answers hold now.
    pub(super) fn used(&self) -> u64 {
        let used = |half: &Half| (half.units as usize).saturating_sub(half.room.available_permits());
        ((used(&self.small) + used(&self.large)) * UNIT) as u64
    }

    /// Publishes the metrics.
    #[allow(clippy::cast_precision_loss)] // a gauge for people
    pub(super) fn publish(&self) {
        metrics::gauge!(BYTES).set(self.used() as f64);
        metrics::counter!(WAITS).absolute(self.waits());
    }

    /// How often somebody has waited for room.
    pub(super) fn waits(&self) -> u64 {
        self.small.waits.load(Ordering::Relaxed) + self.large.waits.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MIB: usize = 1024 * 1024;

    async fn waits(future: impl Future) -> bool {
        tokio::time::timeout(Duration::from_secs(3_600), future).await.is_err()
    }

    #[tokio::test(start_paused = true)]
    async fn answers_wait_for_room_and_get_it_when_others_are_done() {
        let memory = AnswerMemory::new(8 * MIB as u64);
        let first = memory.whole(3 * MIB).await;
        assert!(waits(memory.whole(2 * MIB)).await, "there is 1 MiB");
        let second = memory.whole(MIB).await;
        assert!(waits(memory.open(MIB)).await);
        memory.open(100).await;
        assert_eq!(memory.used(), 4 * MIB as u64);
        drop(second);
        memory.open(MIB).await;
        drop(first);
        assert_eq!(memory.used(), 0);
        assert_eq!(memory.waits(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_larger_than_the_budget_goes_alone() {
        let memory = AnswerMemory::new(2 * MIB as u64);
        let small = memory.whole(100).await;
        let other = memory.whole(200_000).await;
        assert!(waits(memory.whole(128 * MIB)).await);
        drop(other);
        let large = memory.whole(128 * MIB).await;
        assert!(waits(memory.whole(200_000)).await);
        drop((small, large));
        memory.whole(200_000).await;
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_that_grow_one_goes_on_without_room_and_then_the_other() {
        let memory = AnswerMemory::new(4 * MIB as u64);
        let (mut a, mut b) = (Held::default(), Held::default());
        memory.grow(&mut a, MIB).await;
        memory.grow(&mut b, MIB).await;
        memory.grow(&mut a, 100 * MIB).await;
        assert!(waits(memory.grow(&mut b, 50 * MIB)).await, "only one at a time");
        assert_eq!(memory.used(), 2 * MIB as u64);
        memory.grow(&mut a, 120 * MIB).await;
        drop(a);
        memory.grow(&mut b, 50 * MIB).await;
        drop(b);
        assert_eq!(memory.used(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_small_one_of_unknown_length_holds_its_size_in_the_end() {
        let memory = AnswerMemory::new(4 * MIB as u64);
        let mut held = Held::default();
        memory.grow(&mut held, 100).await;
        assert_eq!(memory.used(), SMALL as u64);
        memory.shrink(&mut held, 100);
        assert_eq!(memory.used(), UNIT as u64);
        let mut other = memory.whole(5 * UNIT).await;
        other.absorb(held);
        assert_eq!(memory.used(), 6 * UNIT as u64);
        drop(other);
        assert_eq!(memory.used(), 0);
    }
}
