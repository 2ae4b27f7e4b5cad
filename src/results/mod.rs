//! Results: the lines in OpenAI's format, parts, their merge in input order, and reading back.

mod checked;
mod line;
mod merge;
mod part;
mod reader;
pub mod retry;

pub use line::{Line, Reply, render_answer, render_error, request_id};
pub use merge::merge;
pub use part::{PartBuilder, finished};
pub use reader::{BadCursor, Cursor, ReadError, Reader, ResultLine};

use crate::domain::{Epoch, SegmentRef};

/// The prefix of the keys of a segment's objects.
#[must_use]
pub fn folder(of: &SegmentRef) -> String {
    format!("results/{}/{:06}", of.batch, of.index.0)
}

/// The key of an object of results. Never used twice: `number` counts within the epoch.
#[must_use]
pub fn object_key(of: &SegmentRef, epoch: Epoch, number: u32) -> String {
    format!("{}/{epoch}-{number}", folder(of))
}

/// The epoch in which an object of results was written.
#[must_use]
pub fn epoch_of(object_key: &str) -> Option<Epoch> {
    let (_, name) = object_key.rsplit_once('/')?;
    name.split_once('-')?.0.parse().ok().map(Epoch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{BatchId, SegmentIndex};

    #[test]
    fn keys_name_their_epoch() {
        let of = SegmentRef { batch: BatchId::generate(), index: SegmentIndex(7) };
        let key = object_key(&of, Epoch(12), 3);
        assert!(key.starts_with(&format!("{}/", folder(&of))));
        assert_eq!(epoch_of(&key), Some(Epoch(12)));
        assert_eq!(epoch_of("results/x/y"), None);
    }
}
