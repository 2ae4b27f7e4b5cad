//! Results: lines in OpenAI's format, parts, their merge in input order, and reading back.

mod checked;
mod error;
mod joined;
mod line;
mod merge;
mod part;
mod reader;

pub(crate) use checked::name_of;
pub use error::ReadError;
pub use line::{Line, Reply, render_answer, render_error, request_id};
pub use merge::merge;
pub use part::{PartBuilder, finished};
pub use reader::{BadCursor, Cursor, Reader, ResultLine};

pub use crate::domain::result_keys::{epoch_of, folder, object_key, prefix, segment_of};
