//! Why results can't be read.

use crate::{blobs::BlobError, domain::BatchId, store::StoreError};

/// Why results can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The blob store failed.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// An object does not match its row.
    #[error("{0}")]
    Corrupt(String),
    /// A segment's bytes are not those that were written. Names the segment.
    #[error("{0}")]
    Damaged(String),
    /// The results have been deleted.
    #[error("the results of {0} have been deleted")]
    Deleted(BatchId),
}
