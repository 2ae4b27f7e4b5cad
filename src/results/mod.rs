//! Results: the lines in OpenAI's format, parts, their merge in input order, and reading back.

mod line;
mod merge;
mod part;
mod reader;
pub mod retry;

pub use line::{Body, Reply, body_of, render_answer, render_error, request_id};
pub use merge::merge;
pub use part::{PartBuilder, finished};
pub use reader::{BadCursor, Cursor, ReadError, Reader, ResultLine};

use crate::domain::{Epoch, SegmentRef};

/// The key of an object of results. Never used twice: `number` counts within the epoch.
#[must_use]
pub fn object_key(of: &SegmentRef, epoch: Epoch, number: u32) -> String {
    format!("results/{}/{:06}/{}-{number}", of.batch, of.index.0, epoch)
}
