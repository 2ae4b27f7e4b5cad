//! The doors: gRPC and HTTP on one port. Each translates to and from [`crate::service`]; what is decided is decided there.
//!
//! - [`serve`] assembles the server and stops it in order.
//! - `gate`: what every request passes: who calls, and how much of the server they may hold.
//! - `grpc`: `BatchService`, `WebhookAdmin`, `WorkerAdmin`, health, reflection.
//! - `openai`: OpenAI's HTTP API below `/v1`, and live calls in Anthropic's form.
//! - `anthropic`: Anthropic's Message Batches. `v1`: what both have in common.
//! - `http`: `/healthz`, `/readyz`, `/metrics`; and what lies below all protocols: the listener, the gate of HTTP, the
//!   names that the server answers to, handlers that panic.

mod anthropic;
mod gate;
mod grpc;
mod http;
mod openai;
mod server;
mod v1;

pub use gate::TraceId;
/// Two readers of bytes from outside, for `fuzz/`.
pub use openai::{multipart, sse};
pub use server::{ServeError, ServerOptions, TlsFiles, serve};

/// The most bytes of one gRPC message, both ways. Uploads, downloads and lists stay under it by cutting; a result or an
/// answer that does not fit is refused with a reason.
pub const MESSAGE_LIMIT: usize = 4 * 1024 * 1024;

/// The most bytes of a message for a client that says that it takes so many: more than the largest result line, which holds a
/// worker's largest answer.
pub const LONGEST_MESSAGE: usize = crate::fleet::MAX_ANSWER + 16 * 1024 * 1024;
