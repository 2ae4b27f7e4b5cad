//! Ids and counters that must not be mixed up.

use std::fmt;

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The beginning of every id of this kind.
            pub const PREFIX: &'static str = $prefix;

            /// An id from outside. Any text is accepted: an id that names nothing is simply not found.
            pub fn from_text(text: impl Into<String>) -> Self {
                Self(text.into())
            }

            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The id as an owned text.
            #[must_use]
            pub fn into_string(self) -> String {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_id!(
    /// A batch: `batch_…`.
    BatchId,
    "batch_"
);
text_id!(
    /// A file: `file-…`.
    FileId,
    "file-"
);
text_id!(
    /// An upload in parts: `upload_…`.
    UploadId,
    "upload_"
);
text_id!(
    /// A part of an upload: `part_…`.
    UploadPartId,
    "part_"
);
text_id!(
    /// A worker: `worker_…`.
    WorkerId,
    "worker_"
);
text_id!(
    /// One run of a tidemill process: `node_…`. A restarted process is a new node, so its leases differ from those of
    /// its last run.
    NodeId,
    "node_"
);
text_id!(
    /// One event for one target: `msg_…`, the `webhook-id` header of every attempt. The receiver's key against duplicates.
    DeliveryId,
    "msg_"
);
text_id!(
    /// A webhook that could not be delivered: `dl_…`.
    DeadLetterId,
    "dl_"
);
text_id!(
    /// A registered webhook target: `we_…`.
    WebhookEndpointId,
    "we_"
);
text_id!(
    /// A job that retries many dead letters: `rj_…`.
    RetryJobId,
    "rj_"
);

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number!(
    /// The number of claims of a segment: the fencing token of every write by its holder.
    Epoch,
    i64
);
number!(
    /// Increases with every durable change of one batch.
    Revision,
    i64
);
number!(
    /// Increases with every state change of any batch.
    Sequence,
    i64
);
number!(
    /// A segment's index in its file, from 0.
    SegmentIndex,
    i32
);

/// One segment of one batch.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SegmentRef {
    /// The batch.
    pub batch: BatchId,
    /// The index of the segment.
    pub index: SegmentIndex,
}

impl fmt::Display for SegmentRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.batch, self.index)
    }
}
