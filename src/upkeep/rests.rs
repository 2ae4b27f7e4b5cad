//! What failed and rests for a while, so that it keeps nothing else waiting. Pure.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

/// The first rest; it doubles with each failure, up to the longest.
const FIRST: Duration = Duration::from_secs(10);
const LONGEST: Duration = Duration::from_secs(3_600);
/// The most that rests at a time. Beyond that, whatever is to rest for the shortest time is tried again at once.
const MOST: usize = 1_000;

/// What rests, and until when.
#[derive(Debug)]
pub(super) struct Rests<K> {
    of: HashMap<K, Rest>,
}

#[derive(Clone, Copy, Debug)]
struct Rest {
    failures: u32,
    until: Instant,
}

impl<K> Default for Rests<K> {
    fn default() -> Self {
        Self { of: HashMap::new() }
    }
}

impl<K: Clone + Eq + std::hash::Hash> Rests<K> {
    /// Records a failure.
    pub(super) fn failed(&mut self, key: K, now: Instant) {
        let failures = self.of.get(&key).map_or(0, |rest| rest.failures);
        let until = now + FIRST.saturating_mul(1 << failures.min(16)).min(LONGEST);
        self.of.insert(key, Rest { failures: failures.saturating_add(1), until });
        if self.of.len() > MOST {
            let next = self.of.iter().min_by_key(|(_, rest)| rest.until).map(|(key, _)| key.clone());
            next.and_then(|key| self.of.remove(&key));
        }
    }

    /// The keys that rest now. Forgets keys that have not failed again for an hour after their rest.
    pub(super) fn resting(&mut self, now: Instant) -> Vec<K> {
        self.of.retain(|_, rest| rest.until + LONGEST > now);
        self.of.iter().filter(|(_, rest)| rest.until > now).map(|(key, _)| key.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_again_and_again_rests_longer_and_longer() {
        let (mut rests, mut now) = (Rests::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..12 {
            rests.failed("a", now);
            assert_eq!(rests.resting(now), ["a"]);
            let before = now;
            while !rests.resting(now).is_empty() {
                now += Duration::from_secs(5);
            }
            waits.push((now - before).as_secs());
        }
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 640, 1_280, 2_560, 3_600, 3_600, 3_600]);
        now += LONGEST;
        assert!(rests.resting(now).is_empty());
        rests.failed("a", now);
        assert!(rests.resting(now + FIRST).is_empty(), "it begins anew");
    }

    #[test]
    fn no_more_rest_than_the_most() {
        let (mut rests, now) = (Rests::default(), Instant::now());
        (0..MOST + 10).for_each(|key| rests.failed(key, now));
        assert_eq!(rests.resting(now).len(), MOST);
    }
}
