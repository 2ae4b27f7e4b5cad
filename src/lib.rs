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
//! - [`engines`]: which model is loaded on which GPUs, and when that changes.
//! - [`scheduler`]: claims segments, decides which line goes to which worker, and runs a segment.
//! - [`delivery`]: webhooks: signs, sends and retries them, keeps dead letters.
//! - [`progress`]: durable changes in, event streams out.
//! - [`upkeep`]: everything periodic: windows, garbage, retention.
//! - [`access`]: who calls: tokens, roles, owners, and the limits per caller.
//! - [`service`]: the use cases behind every API: all rules, and one error type.
//! - [`api`]: gRPC and HTTP: they translate calls for the service and decide nothing.
//! - [`app`]: wires all of it and stops it in order.
//! - [`sim`]: a simulated vLLM worker for the demo, tests and benchmarks.
//! - [`cli`]: the command line, a client of the same gRPC API.
//!
//! Where something new goes:
//!
//! - A call or a rule of one: a method of [`service::Service`], which takes the caller and domain types. Its queries go to
//!   [`store`] and take a [`domain::Scope`]. Its limits go to [`access`].
//! - Another HTTP dialect: a folder of [`api`] beside `openai`. It translates its requests for the service and a
//!   [`service::ServiceError`] into its own errors. `api/http` adds its routes to the port.
//! - A dashboard: a folder `ui` of [`api`] with its files and its session. It shows what the service returns, and
//!   [`progress`] streams changes to it.
//! - A worker that this server starts and stops: a module between [`fleet`] and [`scheduler`], with the decisions in pure
//!   files. It registers the worker with [`fleet`], which sends it requests like any other, and runs as a
//!   [`supervise::Part`].
//! - A retention rule, or anything else that is periodic: a [`upkeep::Sweep`] in a file of [`upkeep`], and a query with a
//!   bounded number of rows in [`store`].

pub mod access;
mod ambient;
pub mod api;
pub mod app;
pub mod blobs;
pub mod cli;
pub mod config;
pub mod delivery;
pub mod domain;
pub mod engines;
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
