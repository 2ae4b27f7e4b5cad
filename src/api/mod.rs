//! gRPC and HTTP on one port: request to domain call to response. What is decided is decided elsewhere.
//!
//! - [`serve`] assembles the server and stops it in order. `listener` takes the connections and ends them.
//! - `hosts`: by which names the server may be called, and from which web pages.
//! - `gate`: what every RPC passes: who calls, a span, a count and a time.
//! - `counted`, `timely`: how much of a request's body has come, and how slow it may be.
//! - `status`: every error on the wire. `validate`, `convert`: wire to domain and back.
//! - `service`, `batches`, `files`, `streams`: `BatchService`. `workers`: `WorkerAdmin`. `webhook_admin`, `webhooks`: `WebhookAdmin`.
//! - `http`: `/healthz`, `/readyz`, `/metrics`. `downloads`: files over plain HTTP.

mod batches;
mod convert;
mod counted;
mod downloads;
mod files;
mod gate;
mod health;
mod hosts;
mod http;
mod listener;
#[doc(hidden)]
pub mod page;
mod panics;
mod server;
mod service;
mod status;
mod streams;
mod timely;
mod validate;
mod webhook_admin;
mod webhooks;
mod workers;

use std::sync::Arc;

pub use gate::TraceId;
pub use server::{ServeError, ServerOptions, TlsFiles, serve};

use crate::{
    blobs::Blobs,
    delivery::Webhooks,
    fleet::{Fleet, MAX_ANSWER},
    ingest::Ingest,
    progress::Hub,
    results::Reader,
    scheduler::Stages,
    store::Store,
};

/// The most bytes of one gRPC message, both ways. Uploads, downloads and lists stay under it by cutting; a result or an
/// answer that does not fit is refused with a reason.
pub const MESSAGE_LIMIT: usize = 4 * 1024 * 1024;

/// The most bytes of a message for a client that says that it takes so many: more than the largest result line, which holds a
/// worker's largest answer.
pub const LONGEST_MESSAGE: usize = MAX_ANSWER + 16 * 1024 * 1024;

/// What the services call. Cheap to clone.
#[derive(Clone)]
pub struct Services {
    /// The database.
    pub store: Store,
    /// The objects.
    pub blobs: Blobs,
    /// Takes uploads.
    pub ingest: Ingest,
    /// Reads files and results.
    pub reader: Reader,
    /// Tells how far batches are.
    pub hub: Hub,
    /// The workers.
    pub fleet: Fleet,
    /// Where the time of this process's requests goes.
    pub stages: Stages,
    /// Whom to tell of batches.
    pub webhooks: Webhooks,
    /// Renders this process's metrics in Prometheus's text format.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
}
