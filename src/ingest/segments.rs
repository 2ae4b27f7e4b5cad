//! Cuts a file into segments.

use crate::domain::{SegmentIndex, SegmentSpan};

/// The most requests of a segment.
pub const SEGMENT_REQUESTS: i32 = 1_000;
/// The most bytes of a segment, except that a longer line has a segment of its own.
pub const SEGMENT_BYTES: u64 = 4 * 1024 * 1024;
/// The most lines that a segment spans, counting blank ones, so that its line sets are at most 8 KiB.
pub const SEGMENT_LINES: u64 = 65_536;

/// A line that holds a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct RequestAt<'a> {
    /// The line number, from 1.
    pub(super) line: u64,
    /// The offset of its first byte in the file.
    pub(super) start: u64,
    /// The offset after its line feed.
    pub(super) end: u64,
    /// The index of its model in the file's list.
    pub(super) model: usize,
    /// Its text, without the line feed.
    pub(super) text: &'a [u8],
}

/// Divides requests into segments as they arrive.
#[derive(Debug, Default)]
pub(super) struct Segments {
    done: Vec<SegmentSpan>,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    first_line: u64,
    start: u64,
    last_line: u64,
    end: u64,
    requests: i32,
    models: i64,
    /// The CRC-32C of its bytes.
    crc: u32,
    /// The CRC-32C including the blank lines since, which belong to the segment if another request does.
    ahead: u32,
}

impl Segments {
    pub(super) fn push(&mut self, request: RequestAt<'_>) {
        let RequestAt { line, start, end, model, text } = request;
        if let Some(open) = &mut self.open {
            let fits = open.requests < SEGMENT_REQUESTS
                && end - open.start <= SEGMENT_BYTES
                && line - open.first_line < SEGMENT_LINES;
            if fits {
                open.last_line = line;
                open.end = end;
                open.requests += 1;
                open.models |= 1 << model;
                open.ahead = checksum_on(open.ahead, text, end - start);
                open.crc = open.ahead;
                return;
            }
        }
        self.close();
        let crc = checksum_on(0, text, end - start);
        self.open = Some(Open {
            first_line: line,
            start,
            last_line: line,
            end,
            requests: 1,
            models: 1 << model,
            crc,
            ahead: crc,
        });
    }

    /// Adds a blank line.
    pub(super) fn blank(&mut self, text: &[u8], length: u64) {
        if let Some(open) = &mut self.open {
            open.ahead = checksum_on(open.ahead, text, length);
        }
    }

    pub(super) fn finish(mut self) -> Vec<SegmentSpan> {
        self.close();
        self.done
    }

    fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        // In range: limits keep files far below 2^63 bytes, and SEGMENT_LINES keeps spans below 2^31.
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        self.done.push(SegmentSpan {
            index: SegmentIndex(i32::try_from(self.done.len()).unwrap_or(i32::MAX)),
            first_line: number(open.first_line),
            line_span: i32::try_from(open.last_line - open.first_line + 1).unwrap_or(i32::MAX),
            requests: open.requests,
            offset: number(open.start),
            length: number(open.end - open.start),
            models: open.models,
            crc32c: Some(open.crc),
        });
    }
}

/// The checksum with one more line. `length` counts its line feed, if it has one.
fn checksum_on(crc: u32, text: &[u8], length: u64) -> u32 {
    let crc = crc32c::crc32c_append(crc, text);
    if length > text.len() as u64 { crc32c::crc32c_append(crc, b"\n") } else { crc }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(requests: impl IntoIterator<Item = (u64, u64, u64, usize)>) -> Vec<(i64, i32, i32, i64, i64, i64)> {
        let mut segments = Segments::default();
        for (line, start, end, model) in requests {
            segments.push(RequestAt { line, start, end, model, text: b"" });
        }
        let spans = segments.finish();
        assert!(spans.iter().zip(0..).all(|(span, at)| span.index.0 == at));
        spans.iter().map(|s| (s.first_line, s.line_span, s.requests, s.offset, s.length, s.models)).collect()
    }

    #[test]
    fn a_segment_ends_by_count_by_size_and_by_span() {
        let by_count = cut((0..2_001).map(|i| (i + 1, i * 10, i * 10 + 10, usize::from(i == 1_500))));
        assert_eq!(
            by_count,
            [(1, 1_000, 1_000, 0, 10_000, 1), (1_001, 1_000, 1_000, 10_000, 10_000, 3), (2_001, 1, 1, 20_000, 10, 1)]
        );
        let mib = 1024 * 1024;
        let by_size = cut((0..6).map(|i| (i + 1, i * mib, i * mib + mib, 31)));
        assert_eq!(by_size, [(1, 4, 4, 0, 4 << 20, 1 << 31), (5, 2, 2, 4 << 20, 2 << 20, 1 << 31)]);
        // A line that alone exceeds the limit has a segment of its own.
        assert_eq!(cut([(1, 0, 9, 0), (2, 9, 9 + 8 * mib, 0), (3, 9 + 8 * mib, 10 + 8 * mib, 0)]).len(), 3);
        let by_span = cut([(1, 0, 5, 0), (65_536, 70_000, 70_005, 0), (65_537, 70_005, 70_010, 0)]);
        assert_eq!(by_span, [(1, 65_536, 2, 0, 70_005, 1), (65_537, 1, 1, 70_005, 5, 1)]);
        assert_eq!(cut([]), []);
    }
}
