//! Why an upload is refused or fails.

use super::LineReport;
use crate::{blobs::BlobError, store::StoreError};

/// Why an upload made no file. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// There are bad lines.
    #[error("{total} bad line(s){}", first(.errors))]
    Invalid {
        /// The first bad lines, in order.
        errors: Vec<LineReport>,
        /// The number of bad lines in all.
        total: u64,
    },
    /// A file of another format; the text says which, and what to do.
    #[error("the file is not JSONL: {0}")]
    NotJsonl(&'static str),
    /// It has more requests than allowed.
    #[error("more than {max} requests; split the file")]
    TooManyLines {
        /// The limit.
        max: u64,
    },
    /// It has more bytes than allowed.
    #[error("more than {max} bytes; split the file")]
    TooManyBytes {
        /// The limit.
        max: u64,
    },
    /// It contains no request.
    #[error("no request; expected at least one line of JSON")]
    Empty,
    /// It has another size than announced: bytes were lost, or there are too many.
    #[error("received {received} bytes of {expected}; upload the file again")]
    SizeMismatch {
        /// The announced size in bytes.
        expected: u64,
        /// The number of bytes received.
        received: u64,
    },
    /// The upload in parts that it was to complete has been completed, cancelled or given up meanwhile.
    #[error("the upload has ended meanwhile")]
    UploadEnded,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The blob store failed.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The scratch folder can't be written; most likely it is full.
    #[error("scratch space: {}", crate::words::file(.0))]
    Scratch(#[source] std::io::Error),
    /// The server is stopping.
    #[error("interrupted; upload the file again")]
    Interrupted,
}

fn first(errors: &[LineReport]) -> String {
    errors.first().map(|first| format!("; line {}: {}", first.line, first.message)).unwrap_or_default()
}
