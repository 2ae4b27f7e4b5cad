//! What must hold for whatever bytes come: one function a target. Each compares the real code with something written
//! independently of it. `cargo fuzz` runs them, and so does tidemill's own `cargo test --test fuzz`, with the seeds.

mod canonical_json;
mod jsonl_line;
mod multipart;
mod sse;
mod tokens;
mod upload;
mod webhook_url;

pub use canonical_json::canonical_json;
pub use jsonl_line::jsonl_line;
pub use multipart::multipart;
pub use sse::sse;
pub use tokens::{page_token, resume_cursor};
pub use upload::upload;
pub use webhook_url::webhook_url;
