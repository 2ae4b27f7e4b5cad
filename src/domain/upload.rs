//! Uploads in parts: a client announces a file, sends parts of it in any order, and says at the end which parts make it,
//! in which order.

use std::time::Duration;

use super::{FileId, Owner, Timestamp, UploadId, UploadPartId};

/// How long a client may take for all parts and the end.
pub const LASTS: Duration = Duration::from_secs(24 * 3_600);
/// How long an upload that has ended is remembered after its time: so long the call that ended it answers the same again.
pub const REMEMBERED: Duration = Duration::from_secs(24 * 3_600);
/// The most bytes of a part.
pub const PART_BYTES: u64 = 64 * 1024 * 1024;
/// The most parts of an upload.
pub const MOST_PARTS: u64 = 10_000;

/// An upload in parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartedUpload {
    /// Its id.
    pub id: UploadId,
    /// The owner.
    pub owner: Owner,
    /// The name of the file that it becomes.
    pub filename: String,
    /// The announced size of the file.
    pub bytes: i64,
    /// How long the file stays after it is complete. `None`: until it is deleted.
    pub file_expires_after: Option<Duration>,
    /// What has become of it.
    pub state: UploadState,
    /// When it was announced.
    pub created_at: Timestamp,
    /// When it ends by itself.
    pub expires_at: Timestamp,
}

/// What has become of an upload in parts. Only a pending one takes parts and can be completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UploadState {
    /// It takes parts.
    Pending,
    /// It has become a file.
    Completed {
        /// The file, which may have been deleted since.
        file: FileId,
        /// Identifies the parts that it was made of, and their order.
        parts: String,
    },
    /// Its client has given it up.
    Cancelled,
    /// Its time is up.
    Expired,
}

impl UploadState {
    /// The state in OpenAI's words.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Completed { .. } => "completed",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
        }
    }
}

/// A part of an upload: an object of its own until the upload has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UploadPart {
    /// Its id.
    pub id: UploadPartId,
    /// Its size.
    pub bytes: i64,
    /// The CRC-32C of its bytes.
    pub crc32c: u32,
    /// The object with its bytes.
    pub object_key: String,
    /// When it was complete.
    pub created_at: Timestamp,
}

/// A file that an upload in parts becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The upload.
    pub upload: UploadId,
    /// Identifies the parts and their order.
    pub parts: String,
}
