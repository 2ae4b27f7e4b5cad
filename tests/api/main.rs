//! The API over real sockets: what clients in any language see.
#![allow(clippy::unwrap_used)] // clippy.toml's exception does not reach the helpers of integration tests

mod access;
mod batches;
#[path = "../support/direct.rs"]
mod direct;
#[path = "../support/faulty.rs"]
mod faulty;
mod files;
mod foreign;
mod http;
mod overload;
#[allow(dead_code)] // other tests use more of it
#[path = "../support/patience.rs"]
mod patience;
#[path = "../support/raw.rs"]
mod raw;
mod shutdown;
mod streams;
mod support;
mod tls;
mod webhooks;
