//! tidemill: self-hosted batch inference. A file of LLM requests (OpenAI Batch JSONL) goes in, every vLLM worker is kept
//! full, and exactly one answer per request comes out, whatever crashes on the way.
//!
//! The modules, each of which uses only those above it in this list (`tests/house.rs` checks that):
//!
//! - [`words`]: turns errors of libraries into messages for people.
//! - [`domain`]: ids, owners and scopes, the batch lifecycle, request lines, counts. No IO, no async, no clock, no
//!   randomness: `ambient` reads the clock and makes new ids and secrets.
//! - [`config`]: the one typed configuration: file, environment, flags.
//! - [`telemetry`]: logs and metrics.
//! - [`fault`]: points at which tests make the process die.
//! - [`supervise`]: runs the parts of a server, and notices one that dies.
//! - [`blobs`]: input, part and result objects, on a directory or an object store.
//! - [`store`]: the database: every query and every transaction.
//! - [`objects`]: checks that the blob store belongs to the database.
//! - [`ingest`]: validates an upload while it streams in and cuts it into segments.
//! - [`results`]: parts, their merge in input order, manifests, reading back.
//! - [`fleet`]: the workers: their state, their slots, and one HTTP request to one of them.
//! - [`scheduler`]: claims segments, decides which line goes to which worker, and runs a segment.
//! - [`delivery`]: webhooks: signs, sends and retries them, keeps dead letters.
//! - [`progress`]: durable changes in, event streams out.
//! - [`upkeep`]: everything periodic: windows, garbage, retention. A new sweep goes here.
//! - [`access`]: who calls: tokens, roles, owners, and the limits per caller.
//! - [`service`]: the use cases behind every API: all rules, and one error type. The logic of a new call goes here.
//! - [`api`]: gRPC and HTTP: they translate calls for the service and decide nothing. A new protocol goes here.
//! - [`app`]: wires all of it and stops it in order.
//! - [`sim`]: a simulated vLLM worker for the demo, tests and benchmarks.
//! - [`cli`]: the command line, a client of the same gRPC API.

pub mod access;
mod ambient;
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
pub mod upkeep;
pub mod words;

/// The wire contract, generated from `proto/tidemill/v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod pb {
    tonic::include_proto!("tidemill.v1");

    /// The compiled protos, for server reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}
