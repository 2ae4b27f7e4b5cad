//! The API over real sockets: what clients in any language see.

mod access;
mod batches;
mod files;
mod http;
mod shutdown;
mod streams;
mod support;
mod tls;
