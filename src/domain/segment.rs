//! Segments: the unit of durable work.

use super::ids::SegmentIndex;

/// The most models that one file may name: each is a bit of a segment's `models` mask.
pub const MAX_MODELS_PER_FILE: usize = 32;

/// A range of consecutive lines of an input file, with its byte range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentSpan {
    /// Its index in the file.
    pub index: SegmentIndex,
    /// The number of its first line in the file, from 1, counting blank lines. That line holds a request.
    pub first_line: i64,
    /// The number of lines that it spans, counting blank ones: line `first_line + i` is bit `i` of a
    /// [`super::LineSet`].
    pub line_span: i32,
    /// The number of requests, at least one.
    pub requests: i32,
    /// The offset of its first byte in the file.
    pub offset: i64,
    /// Its length in bytes.
    pub length: i64,
    /// Bit `i` is set if a request names the file's model `i`.
    pub models: i64,
    /// The CRC-32C of its bytes. `None` for uploads to an earlier version.
    pub crc32c: Option<u32>,
}
