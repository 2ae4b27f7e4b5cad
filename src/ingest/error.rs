//! Why an upload is refused or fails.

use super::LineReport;
use crate::{blobs::BlobError, store::StoreError};

/// Why there is no file. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// Lines are bad.
    #[error("{total} bad line(s){}", first(.errors))]
    Invalid {
        /// The lowest bad lines, in order.
        errors: Vec<LineReport>,
        /// How many bad lines there are in all.
        total: u64,
    },
    /// Not text in UTF-8 at all: what it is, and what to do.
    #[error("the file is not JSONL: {0}")]
    NotJsonl(&'static str),
    /// Too many lines.
    #[error("more than {max} requests; split the file")]
    TooManyLines {
        /// The limit.
        max: u64,
    },
    /// Too large.
    #[error("more than {max} bytes; split the file")]
    TooManyBytes {
        /// The limit.
        max: u64,
    },
    /// No request in it.
    #[error("no request; expected at least one line of JSON")]
    Empty,
    /// Not the size that was announced: bytes were lost on the way, or are too many.
    #[error("{received} bytes came, {expected} were announced; upload the file again")]
    SizeMismatch {
        /// As announced.
        expected: u64,
        /// As received.
        received: u64,
    },
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The blob store failed.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The scratch folder can't be written: it is full, most likely.
    #[error("scratch space: {}", crate::words::file(.0))]
    Scratch(#[source] std::io::Error),
    /// The server is stopping.
    #[error("interrupted; upload the file again")]
    Interrupted,
}

fn first(errors: &[LineReport]) -> String {
    errors.first().map(|first| format!("; line {}: {}", first.line, first.message)).unwrap_or_default()
}
