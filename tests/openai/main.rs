//! OpenAI's and Anthropic's HTTP APIs over real sockets: what their SDKs rely on, and what hostile clients try.
#![allow(clippy::unwrap_used)] // clippy.toml's exception does not reach the helpers of integration tests

mod answers;
mod batches;
mod client;
#[path = "../support/direct.rs"]
mod direct;
mod early;
mod files;
mod hostile;
mod live;
mod message_batches;
#[allow(dead_code)] // it serves the tests of gRPC, too
#[path = "../api/support.rs"]
mod support;
mod uploads;
