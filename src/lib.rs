//! tidemill: self-hosted batch inference. A file of LLM requests (OpenAI Batch JSONL) goes in, every vLLM worker is kept
//! full, and exactly one answer per request comes out, whatever crashes on the way.
//!
//! The modules; each knows only those above it in this list (`tests/house.rs` holds them to that):
//!
//! - [`words`]: what libraries report, in words for people.
//! - [`domain`]: ids, owners and scopes, the batch lifecycle, request lines, counts. No IO, no async.
//! - [`config`]: the one typed configuration: file, environment, flags.
//! - [`telemetry`]: logs and metrics.
//! - [`fault`]: where tests have the process die.
//! - [`supervise`]: runs the parts of a server, and notices one that dies.
//! - [`blobs`]: input, part and result objects, on a directory or an object store.
//! - [`store`]: the database: every query and every transaction.
//! - [`objects`]: whether the blob store is the one of the database.
//! - [`ingest`]: validates an upload while it streams in and cuts it into segments.
//! - [`results`]: parts, their merge in input order, manifests, reading back.
//! - [`fleet`]: the workers: which there are, how they are, and one HTTP request to one of them.
//! - [`scheduler`]: which segment to claim, which line goes to which worker, and the run of one segment.
//! - [`delivery`]: webhooks: which event to whom, signed, retried, dead-lettered.
//! - [`progress`]: durable changes in, event streams out.
//! - [`access`]: who calls, and how much they may ask.
//! - [`service`]: the use cases, whichever door they come through: every rule, and one error. What a new call does goes
//!   here.
//! - [`api`]: gRPC and HTTP, two doors to the service: they translate and decide nothing. A new protocol goes here.
//! - [`app`]: wires all of it and stops it in order.
//! - [`sim`]: a simulated vLLM worker for the demo, tests and benchmarks.
//! - [`cli`]: the command line, a client of the same gRPC API.

pub mod access;
pub mod api;
pub mod app;
pub mod blobs;
pub mod cli;
pub mod config;
pub mod delivery;
pub mod domain;
pub mod fault;
pub mod fleet;
mod https;
pub mod ingest;
pub mod objects;
pub mod progress;
pub mod results;
pub mod scheduler;
pub mod service;
pub mod sim;
pub mod store;
pub mod supervise;
pub mod telemetry;
pub mod words;

/// The wire contract, generated from `proto/tidemill/v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod pb {
    tonic::include_proto!("tidemill.v1");

    /// The compiled protos, for server reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
