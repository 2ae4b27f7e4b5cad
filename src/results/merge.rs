//! Merges a segment's parts into its final object in input order, line by line, so that memory does not grow with the
//! parts.

use std::{cmp::Reverse, collections::BinaryHeap};

use bytes::{Bytes, BytesMut};

use super::ReadError;
use crate::{
    blobs::{Blobs, ObjectWriter},
    domain::LineSet,
    store::{FinalObject, NewPart},
};

/// Bytes of each part in memory at a time, except for longer lines.
const READ_AHEAD: u64 = 64 * 1024;
/// The most bytes read at once for a longer line, because extra bytes stay in memory for each part.
const READ_MOST: u64 = 1024 * 1024;

/// Merges parts that together contain every line of a segment once. The parts' objects are deleted afterwards, so each
/// is verified by its checksum here for the last time.
///
/// # Errors
/// [`ReadError`]; then there is no final object.
pub async fn merge(blobs: &Blobs, parts: &[&NewPart], object_key: String) -> Result<FinalObject, ReadError> {
    let mut merged = Merged { writer: blobs.writer(&object_key).await?, crc: 0, bytes: 0 };
    match merged.all(blobs, parts).await {
        Ok(sizes) => {
            merged.writer.finish().await?;
            let Sizes { output_bytes, error_bytes, output_lines, error_lines } = sizes;
            Ok(FinalObject { object_key, output_bytes, error_bytes, output_lines, error_lines, crc32c: merged.crc })
        }
        Err(error) => {
            if let Err(error) = merged.writer.abort().await {
                tracing::warn!(object_key, %error, "a merge could not be aborted");
            }
            Err(error)
        }
    }
}

struct Sizes {
    output_bytes: u64,
    error_bytes: u64,
    output_lines: u64,
    error_lines: u64,
}

struct Merged {
    writer: ObjectWriter,
    crc: u32,
    bytes: u64,
}

impl Merged {
    async fn all(&mut self, blobs: &Blobs, parts: &[&NewPart]) -> Result<Sizes, ReadError> {
        let outputs =
            parts.iter().map(|part| Section::new(blobs, part, 0..part.output_bytes, &part.completed, 0)).collect();
        let (output_lines, crcs) = self.section(outputs).await?;
        let output_bytes = self.bytes;
        let error_range = |part: &NewPart| part.output_bytes..part.output_bytes + part.error_bytes;
        let errors = parts
            .iter()
            .zip(crcs)
            .map(|(part, crc)| Section::new(blobs, part, error_range(part), &part.failed, crc))
            .collect();
        let (error_lines, crcs) = self.section(errors).await?;
        if let Some((part, _)) = parts.iter().zip(crcs).find(|(part, crc)| part.crc32c != *crc) {
            return Err(ReadError::Corrupt(format!("{} is not what was written", part.object_key)));
        }
        Ok(Sizes { output_bytes, error_bytes: self.bytes - output_bytes, output_lines, error_lines })
    }

    /// Returns the number of lines, and each part's checksum up to here.
    async fn section(&mut self, mut sections: Vec<Section>) -> Result<(u64, Vec<u32>), ReadError> {
        let mut next: BinaryHeap<_> = sections
            .iter()
            .enumerate()
            .filter_map(|(at, section)| section.lines.last().map(|line| Reverse((*line, at))))
            .collect();
        let mut written = 0;
        while let Some(Reverse((_, at))) = next.pop() {
            let section = &mut sections[at];
            let text = section.next_line().await?;
            self.crc = crc32c::crc32c_append(self.crc, &text);
            self.bytes += text.len() as u64;
            self.writer.write(text).await?;
            written += 1;
            section.lines.pop();
            if let Some(line) = section.lines.last() {
                next.push(Reverse((*line, at)));
            }
        }
        let crcs = sections.into_iter().map(Section::finish).collect::<Result<_, _>>()?;
        Ok((written, crcs))
    }
}

/// The output or error lines of one part, read in order.
struct Section {
    blobs: Blobs,
    object_key: String,
    position: u64,
    end: u64,
    buffer: BytesMut,
    /// The CRC-32C of the part's bytes up to `position`.
    crc: u32,
    /// The remaining lines, the next one last.
    lines: Vec<u32>,
}

impl Section {
    /// `crc` is the checksum of the part's bytes before these lines.
    fn new(blobs: &Blobs, part: &NewPart, bytes: std::ops::Range<u64>, lines: &LineSet, crc: u32) -> Self {
        let mut lines: Vec<u32> = lines.iter().collect();
        lines.reverse();
        Self {
            blobs: blobs.clone(),
            object_key: part.object_key.clone(),
            position: bytes.start,
            end: bytes.end,
            buffer: BytesMut::new(),
            crc,
            lines,
        }
    }

    /// The next line with its line feed.
    async fn next_line(&mut self) -> Result<Bytes, ReadError> {
        let mut searched = 0;
        loop {
            if let Some(at) = memchr::memchr(b'\n', &self.buffer[searched..]) {
                let line = self.buffer.split_to(searched + at + 1).freeze();
                if line.len() as u64 > READ_AHEAD {
                    // Without a copy, the rest would keep the whole read in memory for each part until its last line is
                    // merged.
                    self.buffer = BytesMut::from(&self.buffer[..]);
                }
                return Ok(line);
            }
            searched = self.buffer.len();
            if self.position >= self.end {
                return Err(ReadError::Corrupt(format!("{} ends in the middle of a line", self.object_key)));
            }
            let until = (self.position + READ_AHEAD.max(searched as u64).min(READ_MOST)).min(self.end);
            let more = self.blobs.get_range(&self.object_key, self.position..until).await?;
            if more.is_empty() {
                return Err(ReadError::Corrupt(format!("{} is shorter than its row says", self.object_key)));
            }
            self.position += more.len() as u64;
            self.crc = crc32c::crc32c_append(self.crc, &more);
            self.buffer.reserve(more.len());
            self.buffer.extend_from_slice(&more);
        }
    }

    /// Returns the checksum of the part up to here. Called after the last line.
    fn finish(self) -> Result<u32, ReadError> {
        if self.position < self.end || !self.buffer.is_empty() {
            return Err(ReadError::Corrupt(format!("{} has more lines than its row says", self.object_key)));
        }
        Ok(self.crc)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{domain::TokenUsage, results::PartBuilder};

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn parts_in_any_order_give_input_order(
            lines in proptest::collection::vec((0usize..4, any::<bool>(), 0usize..3_000), 1..120),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let folder = tempfile::tempdir().unwrap();
                let blobs = Blobs::directory(folder.path()).unwrap();
                let mut builders: Vec<PartBuilder> = (0..4).map(|_| PartBuilder::default()).collect();
                let (mut output, mut errors) = (String::new(), String::new());
                for (line, (part, good, length)) in lines.iter().enumerate() {
                    let text = format!("{line}:{}\n", "x".repeat(*length * 40));
                    let index = u32::try_from(line).unwrap();
                    if *good {
                        output.push_str(&text);
                        builders[*part].complete(index, text.into_bytes(), TokenUsage::default());
                    } else {
                        errors.push_str(&text);
                        builders[*part].fail(index, text.into_bytes());
                    }
                }
                let mut parts = Vec::new();
                for (at, builder) in builders.into_iter().enumerate().filter(|(_, builder)| builder.lines() > 0) {
                    let (object, part) = builder.build(format!("part/{at}"));
                    blobs.put(&part.object_key, object).await.unwrap();
                    parts.push(part);
                }
                let parts: Vec<&NewPart> = parts.iter().collect();
                let object = merge(&blobs, &parts, "final".into()).await.unwrap();
                let bytes = blobs.get("final").await.unwrap();
                assert_eq!(bytes, format!("{output}{errors}"));
                assert_eq!(object.output_bytes as usize, output.len());
                assert_eq!(object.error_bytes as usize, errors.len());
                assert_eq!((object.output_lines + object.error_lines) as usize, lines.len());
                assert_eq!(object.crc32c, crc32c::crc32c(&bytes));
            });
        }
    }

    #[tokio::test]
    async fn a_torn_part_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::directory(folder.path()).unwrap();
        let mut builder = PartBuilder::default();
        builder.complete(0, b"whole\n".to_vec(), TokenUsage::default());
        let (object, part) = builder.build("p".into());
        blobs.put("p", object.slice(0..3)).await.unwrap();
        // Not reported as an unreachable blob store, which would be retried for ever.
        assert!(matches!(merge(&blobs, &[&part], "final".into()).await, Err(ReadError::Corrupt(_))));
        assert!(blobs.get("final").await.is_err());
    }

    #[tokio::test]
    async fn a_changed_byte_is_noticed_wherever_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::directory(folder.path()).unwrap();
        let mut builder = PartBuilder::default();
        builder.complete(0, b"good\n".to_vec(), TokenUsage::default());
        builder.fail(1, b"bad\n".to_vec());
        let (object, part) = builder.build("p".into());
        let other = {
            let mut builder = PartBuilder::default();
            builder.complete(2, b"other\n".to_vec(), TokenUsage::default());
            let (object, part) = builder.build("other".into());
            blobs.put("other", object).await.unwrap();
            part
        };
        for at in [0, 3, 5, 7] {
            let mut changed = object.to_vec();
            changed[at] ^= 1;
            blobs.put("p", changed.into()).await.unwrap();
            let refused = merge(&blobs, &[&part, &other], "final".into()).await.unwrap_err();
            assert!(matches!(&refused, ReadError::Corrupt(message) if message.starts_with("p ")), "{refused}");
            assert!(blobs.get("final").await.is_err());
        }
        blobs.put("p", object).await.unwrap();
        merge(&blobs, &[&part, &other], "final".into()).await.unwrap();
        assert_eq!(blobs.get("final").await.unwrap(), "good\nother\nbad\n");
    }
}
