//! Files as clients see them.

use super::{BatchId, Endpoint, FileId, Owner, Timestamp};

/// What a file is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// An uploaded input (purpose `batch`).
    Input,
    /// The successful lines of a batch (purpose `batch_output`).
    Output(BatchId),
    /// The other lines of a batch (purpose `batch_output`).
    Error(BatchId),
}

impl FileKind {
    /// OpenAI's word for it.
    #[must_use]
    pub fn purpose(&self) -> &'static str {
        match self {
            Self::Input => "batch",
            Self::Output(_) | Self::Error(_) => "batch_output",
        }
    }
}

/// A file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// Its id.
    pub id: FileId,
    /// Who may see it.
    pub owner: Owner,
    /// What it is for.
    pub kind: FileKind,
    /// A name for people.
    pub filename: String,
    /// Size in bytes.
    pub bytes: i64,
    /// Requests or results in it.
    pub line_count: i64,
    /// The models that its requests name, in order of first use: bit `i` of a segment's mask is model `i`.
    pub models: Vec<String>,
    /// The one url of its requests; none for results.
    pub endpoint: Option<Endpoint>,
    /// When it was complete.
    pub created_at: Timestamp,
    /// When it will be deleted.
    pub expires_at: Option<Timestamp>,
    /// The object that holds it; results are spread over their batch's segments instead.
    pub object_key: Option<String>,
    /// The CRC-32C of an input's bytes; none for results, and if an earlier version took the upload.
    pub crc32c: Option<u32>,
}
