//! The keys of a batch's result objects, which name their segment and epoch.

use super::{BatchId, Epoch, SegmentRef};

/// The prefix of the keys of a segment's objects.
#[must_use]
pub fn folder(of: &SegmentRef) -> String {
    format!("{}{:06}", prefix(&of.batch), of.index.0)
}

/// The key of a result object. Never used twice, because `number` counts within the epoch.
#[must_use]
pub fn object_key(of: &SegmentRef, epoch: Epoch, number: u32) -> String {
    format!("{}/{epoch}-{number}", folder(of))
}

/// The epoch in which a result object was written. `None`: not such a key.
#[must_use]
pub fn epoch_of(object_key: &str) -> Option<Epoch> {
    let (_, name) = object_key.rsplit_once('/')?;
    name.split_once('-')?.0.parse().ok().map(Epoch)
}

/// The index of the segment that a result object of the batch belongs to. `None`: not such a key.
#[must_use]
pub fn segment_of(batch: &BatchId, object_key: &str) -> Option<i32> {
    epoch_of(object_key)?;
    let (index, _) = object_key.strip_prefix(&prefix(batch))?.split_once('/')?;
    index.parse().ok()
}

/// The prefix of the keys of a batch's results.
#[must_use]
pub fn prefix(of: &BatchId) -> String {
    format!("results/{of}/")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::SegmentIndex;

    #[test]
    fn keys_name_their_epoch() {
        let of = SegmentRef { batch: BatchId::generate(), index: SegmentIndex(7) };
        let key = object_key(&of, Epoch(12), 3);
        assert!(key.starts_with(&format!("{}/", folder(&of))));
        assert_eq!(epoch_of(&key), Some(Epoch(12)));
        assert_eq!(epoch_of("results/x/y"), None);
        assert_eq!(segment_of(&of.batch, &key), Some(7));
        for other in [key.replace("/12-3", "/note"), format!("a{key}"), prefix(&of.batch), format!("{key}/1-1")] {
            assert!(segment_of(&of.batch, &other).is_none_or(|index| index == 7 && other.ends_with("/1-1")), "{other}");
        }
        assert_eq!(segment_of(&BatchId::generate(), &key), None);
    }
}
