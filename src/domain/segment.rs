//! Segments: the unit of durable work.

use super::ids::SegmentIndex;

/// The most models that one file may name: each is a bit of a segment's `models` mask.
pub const MAX_MODELS_PER_FILE: usize = 32;

/// A run of consecutive lines of an input file, known by its byte range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentSpan {
    /// Its place in the file.
    pub index: SegmentIndex,
    /// The number of its first line in the file, from 1, blank lines counted. That line holds a request.
    pub first_line: i64,
    /// How many lines it spans, blank ones counted: line `first_line + i` is bit `i` of a [`super::LineSet`].
    pub line_span: i32,
    /// How many requests it holds: at least one.
    pub requests: i32,
    /// Where it starts in the file, in bytes.
    pub offset: i64,
    /// How long it is, in bytes.
    pub length: i64,
    /// Bit `i`: some request names the file's model `i`.
    pub models: i64,
    /// The CRC-32C of its bytes; none if an earlier version took the upload.
    pub crc32c: Option<u32>,
}
