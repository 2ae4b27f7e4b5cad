//! Files as clients see them.

use super::{BatchId, Endpoint, FileId, Owner, Timestamp};

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
    /// The file's purpose in OpenAI's terms.
    #[must_use]
    pub fn purpose(&self) -> &'static str {
        match self {
            Self::Input => "batch",
            Self::Output(_) | Self::Error(_) => "batch_output",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    pub id: FileId,
    pub owner: Owner,
    pub kind: FileKind,
    /// A name for people.
    pub filename: String,
    /// Size in bytes.
    pub bytes: i64,
    /// The number of requests or results.
    pub line_count: i64,
    /// The models that its requests name, in order of first use: bit `i` of a segment's mask is model `i`.
    pub models: Vec<String>,
    /// The url of all its requests. `None` for results.
    pub endpoint: Option<Endpoint>,
    /// When it was complete.
    pub created_at: Timestamp,
    /// When it will be deleted automatically. `None`: never.
    pub expires_at: Option<Timestamp>,
    /// The object with its bytes. `None` for results, which are spread over their batch's segments.
    pub object_key: Option<String>,
    /// The CRC-32C of an input's bytes. `None` for results, and for uploads to an earlier version.
    pub crc32c: Option<u32>,
}
