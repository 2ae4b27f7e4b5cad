//! Reads the parts of an upload one after the other, as the file that they make.

use bytes::Bytes;
use futures::{Stream, StreamExt};

use super::{ReadError, Reader, checked::sealed};
use crate::domain::UploadPart;

/// Bytes read at a time.
const PIECE: u64 = 1024 * 1024;
/// Pieces that are fetched ahead, because an object store takes its time for each.
const AHEAD: usize = 4;

impl Reader {
    /// The bytes of the parts in this order. Each part is verified by its checksum before its last piece is returned.
    pub fn joined(
        &self,
        parts: Vec<UploadPart>,
    ) -> impl Stream<Item = Result<Bytes, ReadError>> + Send + 'static + use<> {
        let blobs = self.blobs.clone();
        futures::stream::iter(parts).flat_map(move |part| {
            let size = u64::try_from(part.bytes).unwrap_or(0);
            let (blobs, key) = (blobs.clone(), part.object_key);
            let pieces = futures::stream::iter((0..size).step_by(1024 * 1024)).map(move |start| {
                let (blobs, key) = (blobs.clone(), key.clone());
                async move { blobs.get_range(&key, start..(start + PIECE).min(size)).await }
            });
            sealed(pieces.buffered(AHEAD), size, Some(part.crc32c), 0..size, format!("the part {}", part.id))
        })
    }
}
