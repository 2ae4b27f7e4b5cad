//! The domain without IO: ids, owners, the batch and its lifecycle, request lines, counts, time.

pub mod answer;
pub mod batch;
pub mod clocks;
pub mod endpoint;
pub mod file;
pub mod ids;
pub mod lifecycle;
pub mod line_set;
pub mod owner;
pub mod request_line;
pub mod result_keys;
pub mod segment;
pub mod text;
pub mod time;
pub mod upload;
pub mod usage;
pub mod webhook;
pub mod weight;
pub mod worker_health;
pub mod worker_priority;

use strum::VariantArray;

pub use batch::{Batch, BatchError, Counts, NewBatch, Priority};
pub use clocks::Clocks;
pub use endpoint::Endpoint;
pub use file::{File, FileKind};
pub use ids::{
    BatchId, DeadLetterId, DeliveryId, Epoch, FileId, NodeId, RetryJobId, Revision, SegmentIndex, SegmentRef, Sequence,
    UploadId, UploadPartId, WebhookEndpointId, WorkerId,
};
pub use lifecycle::BatchStatus;
pub use line_set::LineSet;
pub use owner::{Owner, Scope};
pub use segment::SegmentSpan;
pub use time::Timestamp;
pub use upload::{Completion, PartedUpload, UploadPart, UploadState};
pub use usage::TokenUsage;
pub use weight::{BadWeight, Weight, Weights};
pub use worker_health::{HealthChange, HealthInterval, HealthPath, OwnHealth};
pub use worker_priority::WorkerPriority;

/// All variants of an enum, of which there must be `N`.
const fn variants<T: Copy + VariantArray, const N: usize>() -> [T; N] {
    match T::VARIANTS.first_chunk() {
        Some(all) => *all,
        None => panic!("an enum has as many variants as its count says"),
    }
}
