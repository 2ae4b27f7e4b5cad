//! The API over real sockets: what clients in any language see.
#![allow(clippy::unwrap_used)] // clippy.toml's exception does not reach the helpers of integration tests

mod access;
mod batches;
mod files;
mod http;
mod shutdown;
mod streams;
mod support;
mod tls;
mod webhooks;
