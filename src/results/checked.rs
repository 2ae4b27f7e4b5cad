//! Reads bytes of objects and verifies them: a stream that ends without an error contains only what was written.
//!
//! A checksum covers a segment, so a segment is read from its beginning, even if only its end is asked for, and its
//! last piece is returned only after the checksum has been verified. So memory stays at two pieces and nothing is read
//! twice. A damaged segment ends the stream with an error that names it; earlier pieces of it may have been returned.

use std::ops::Range;

use bytes::Bytes;
use futures::{Stream, StreamExt};

use super::ReadError;
use crate::{blobs::Blobs, domain::SegmentSpan};

/// A range to read.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) object_key: String,
    /// The range within the object.
    pub(super) range: Range<u64>,
    /// The part of that range to return.
    pub(super) wanted: Range<u64>,
    /// The CRC-32C of the whole range. `None`: an earlier version did not record it.
    pub(super) crc32c: Option<u32>,
    /// The segment's name in messages.
    pub(super) name: String,
}

/// The name of a segment for people.
pub(crate) fn name_of(whose: impl std::fmt::Display, span: &SegmentSpan) -> String {
    let last = span.first_line + i64::from(span.line_span) - 1;
    format!("segment {} of {whose} (its input lines {} to {last})", span.index.0, span.first_line)
}

/// Reads a block.
pub(super) fn read(blobs: &Blobs, of: Block) -> impl Stream<Item = Result<Bytes, ReadError>> + Send + 'static + use<> {
    // Without a checksum only the wanted part is read.
    let range = if of.crc32c.is_some() { of.range } else { of.wanted.clone() };
    let skip = of.wanted.start - range.start;
    let pieces = blobs.stream(of.object_key, range.clone());
    let keep = of.wanted.end - of.wanted.start;
    sealed(pieces, range.end - range.start, of.crc32c, skip..skip + keep, of.name)
}

/// Returns pieces, and the last of them only if all together have the expected length and checksum.
pub(super) fn sealed<E: Into<ReadError> + Send + 'static>(
    pieces: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    length: u64,
    crc32c: Option<u32>,
    wanted: Range<u64>,
    name: String,
) -> impl Stream<Item = Result<Bytes, ReadError>> + Send + 'static {
    async_stream::try_stream! {
        let mut pieces = std::pin::pin!(pieces);
        let (mut at, mut crc, mut held) = (0, 0, None);
        while let Some(piece) = pieces.next().await {
            let piece = piece.map_err(Into::into)?;
            crc = crc32c::crc32c_append(crc, &piece);
            let end = at + piece.len() as u64;
            let within = |place: u64| usize::try_from(place.clamp(at, end) - at).unwrap_or(0);
            let piece = piece.slice(within(wanted.start)..within(wanted.end).max(within(wanted.start)));
            at = end;
            if !piece.is_empty() && let Some(before) = held.replace(piece) {
                yield before;
            }
        }
        if at != length {
            Err(ReadError::Damaged(format!("{name}: {at} bytes are left of {length}")))?;
        }
        if crc32c.is_some_and(|expected| expected != crc) {
            Err(ReadError::Damaged(format!("{name}: its bytes are not those that were written")))?;
        }
        if let Some(last) = held {
            yield last;
        }
    }
}

/// Verifies bytes that have been read at once.
pub(super) fn check(
    bytes: &[u8],
    length: u64,
    crc32c: Option<u32>,
    name: impl FnOnce() -> String,
) -> Result<(), ReadError> {
    if bytes.len() as u64 != length {
        return Err(ReadError::Damaged(format!("{}: {} bytes are left of {length}", name(), bytes.len())));
    }
    if crc32c.is_some_and(|expected| expected != crc32c::crc32c(bytes)) {
        return Err(ReadError::Damaged(format!("{}: its bytes are not those that were written", name())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is asked for of whichever pieces, it is handed out exactly; and if a byte is another one or the end is
        /// missing, the stream ends with an error and never has all of it.
        #[test]
        fn what_ends_well_is_what_was_written(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 1..8),
            (from, to) in (0usize..160, 0usize..160),
            fault in prop::option::of((0usize..160, 1u8..=255)),
            cut in any::<bool>(),
        ) {
            let whole = pieces.concat();
            let (from, to) = (from.min(whole.len()), to.min(whole.len()));
            let (from, to) = (from.min(to), from.max(to));
            let crc = crc32c::crc32c(&whole);
            let mut read = pieces;
            let fault = fault.filter(|(at, _)| *at < whole.len());
            if let Some((mut at, flip)) = fault {
                let piece = read.iter_mut().find(|piece| {
                    let here = at < piece.len();
                    at -= if here { 0 } else { piece.len() };
                    here
                });
                let piece = piece.unwrap();
                if cut { piece.truncate(at) } else { piece[at] ^= flip }
            }
            let pieces: Vec<Result<Bytes, ReadError>> = read.into_iter().map(|piece| Ok(piece.into())).collect();
            let wanted = from as u64..to as u64;
            let stream = sealed(futures::stream::iter(pieces), whole.len() as u64, Some(crc), wanted, "it".into());
            let mut handed = Vec::new();
            let ended = futures::executor::block_on(async {
                let mut stream = std::pin::pin!(stream);
                while let Some(piece) = stream.try_next().await? {
                    handed.extend_from_slice(&piece);
                }
                Ok::<_, ReadError>(())
            });
            if fault.is_some() {
                prop_assert!(matches!(ended, Err(ReadError::Damaged(_))), "{ended:?}");
                prop_assert!(handed.len() < to - from || from == to, "all was handed out");
            } else {
                prop_assert!(ended.is_ok());
                prop_assert_eq!(&handed[..], &whole[from..to]);
            }
        }
    }
}
