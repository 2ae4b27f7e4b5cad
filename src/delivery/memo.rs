//! Answers that are always the same, kept for whoever asks again.

use std::collections::HashMap;

use parking_lot::Mutex;

/// So many are kept. One more, and all are forgotten: what is asked for again is found anew.
const MOST: usize = 1_024;

pub(super) struct Memo<V> {
    known: Mutex<HashMap<Vec<u8>, V>>,
}

impl<V> Default for Memo<V> {
    fn default() -> Self {
        Self { known: Mutex::default() }
    }
}

impl<V: Clone> Memo<V> {
    /// The answer for `key`, from `find` if it is not known. What `find` could not answer is not kept.
    pub(super) fn get<E>(&self, key: &[u8], find: impl FnOnce() -> Result<V, E>) -> Result<V, E> {
        if let Some(known) = self.known.lock().get(key) {
            return Ok(known.clone());
        }
        // Not under the lock: others need not wait for it.
        let found = find()?;
        let mut known = self.known.lock();
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(key.to_vec(), found.clone());
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_is_not_asked_again_and_failures_are() {
        let memo = Memo::default();
        assert_eq!(memo.get(b"a", || Err::<u32, _>("no")), Err("no"));
        assert_eq!(memo.get(b"a", || Ok::<_, &str>(1)), Ok(1));
        assert_eq!(memo.get(b"a", || Err::<u32, _>("no")), Ok(1));
        for n in 0..MOST * 3 {
            assert_eq!(memo.get(&n.to_be_bytes(), || Ok::<_, &str>(7)), Ok(7));
            assert!(memo.known.lock().len() <= MOST);
        }
        assert_eq!(memo.get(b"a", || Err::<u32, _>("no")), Err("no"), "forgotten");
    }
}
