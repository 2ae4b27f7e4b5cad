//! A cache of results that never change.

use std::collections::HashMap;

use parking_lot::Mutex;

/// The most results kept. When it is exceeded, all are dropped and computed again when needed.
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
    /// The result for `key`, from `find` if it is not cached. Errors of `find` are not cached.
    pub(super) fn get<E>(&self, key: &[u8], find: impl FnOnce() -> Result<V, E>) -> Result<V, E> {
        if let Some(known) = self.known.lock().get(key) {
            return Ok(known.clone());
        }
        // Outside of the lock, so that others need not wait.
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
