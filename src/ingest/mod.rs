//! Uploads: validated line by line while they stream in and cut into segments, in memory that does not grow with the
//! file.
//!
//! [`Validator`] is the synchronous core: chunks in, the segment index or the bad lines out. [`Upload`] runs it in
//! parallel with writing the object, off the async threads, and inserts the file's row at the end. [`IncomingPart`] takes a part of
//! an upload in parts, unread.

mod error;
mod format;
mod inline;
mod part;
mod report;
mod segments;
mod splitter;
mod unique;
mod upload;
mod validator;

pub use error::IngestError;
pub use inline::{INLINE_MAX_BYTES, INLINE_MAX_REQUESTS, InlineRequest};
pub use part::IncomingPart;
pub use report::{Fault, LineReport, MAX_REPORTS};
pub use segments::{SEGMENT_BYTES, SEGMENT_LINES, SEGMENT_REQUESTS};
pub use upload::{Begun, Ingest, NewUpload, Upload};
pub use validator::{Validated, Validator};

/// The limits of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most lines that are not blank. Default: 1 million.
    pub max_lines: u64,
    /// The most bytes. Default: 10 GB.
    pub max_bytes: u64,
    /// The most bytes of one line without its line feed. Default: 8 MiB, which is the most of a line that an upload
    /// keeps in memory.
    pub max_line_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_lines: 1_000_000, max_bytes: 10_000_000_000, max_line_bytes: 8 * 1024 * 1024 }
    }
}
