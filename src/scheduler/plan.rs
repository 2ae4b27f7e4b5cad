//! Which segments a node claims: pure.

use std::{collections::BTreeMap, sync::Arc};

/// Lines that a node wants at hand, at the least, for a model that is served: the next segment is there before the present
/// one is sent, even with workers that answer at once.
const AT_HAND: u32 = 2_000;
/// Segments that one node runs at a time.
pub const MAX_SEGMENTS: usize = 256;
/// Bytes of input that one node holds at a time; one segment is always allowed.
pub const MAX_BYTES: u64 = 64 * 1024 * 1024;

/// How many more lines of each served model this node wants at hand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    missing: BTreeMap<Arc<str>, i64>,
    segments: usize,
    bytes: u64,
}

impl Demand {
    /// Nothing is served and nothing is running yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Workers can take `capacity` requests for a model at once.
    pub fn serve(&mut self, model: Arc<str>, capacity: u32) {
        let wanted = capacity.saturating_mul(2).max(AT_HAND);
        *self.missing.entry(model).or_default() += i64::from(wanted);
    }

    /// A segment of `bytes` runs here.
    pub fn running(&mut self, bytes: u64) {
        self.segments += 1;
        self.bytes += bytes;
    }

    /// `lines` of a model are at hand.
    pub fn at_hand(&mut self, model: &str, lines: usize) {
        if let Some(missing) = self.missing.get_mut(model) {
            *missing -= i64::try_from(lines).unwrap_or(i64::MAX);
        }
    }

    /// Whether this node may run one more segment.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.segments == 0 || (self.segments < MAX_SEGMENTS && self.bytes < MAX_BYTES)
    }

    /// Those of the models of which more lines are wanted, as a mask.
    #[must_use]
    pub fn wanted(&self, models: &[String]) -> i64 {
        let wants = |model: &String| self.missing.get(model.as_str()).is_some_and(|missing| *missing > 0);
        (0u32..).zip(models).filter(|(_, model)| wants(model)).fold(0, |mask, (bit, _)| mask | 1i64 << bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_served_and_not_at_hand_is_wanted() {
        let models = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let mut demand = Demand::new();
        assert_eq!(demand.wanted(&models), 0);
        demand.serve("a".into(), 64);
        demand.serve("c".into(), 5_000);
        assert_eq!(demand.wanted(&models), 0b101);
        demand.at_hand("a", 1_999);
        demand.at_hand("b", 5);
        assert_eq!(demand.wanted(&models), 0b101);
        demand.at_hand("a", 1);
        demand.at_hand("c", 9_999);
        assert_eq!(demand.wanted(&models), 0b100);
        demand.at_hand("c", 1);
        assert_eq!(demand.wanted(&models), 0);
    }

    #[test]
    fn memory_is_bounded_but_one_segment_always_runs() {
        let mut demand = Demand::new();
        assert!(demand.has_room());
        demand.running(MAX_BYTES - 1);
        assert!(demand.has_room());
        demand.running(1);
        assert!(!demand.has_room());
        let mut demand = Demand::new();
        for _ in 0..MAX_SEGMENTS {
            demand.running(0);
        }
        assert!(!demand.has_room());
    }
}
