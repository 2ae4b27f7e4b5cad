//! The tables as SeaORM entities. Only `store` sees them.
#![allow(missing_docs)]

pub(super) mod batch;
pub(super) mod batch_event;
pub(super) mod batch_metadata;
pub(super) mod batch_model;
pub(super) mod blob_store;
pub(super) mod counter;
pub(super) mod file;
pub(super) mod file_segment;
pub(super) mod garbage;
pub(super) mod leftover;
pub(super) mod node;
pub(super) mod part;
pub(super) mod segment;
pub(super) mod sweep;
pub(super) mod upload;
pub(super) mod upload_part;
pub(super) mod webhook_attempt;
pub(super) mod webhook_dead_letter;
pub(super) mod webhook_delivery;
pub(super) mod webhook_endpoint;
pub(super) mod webhook_retry_job;
pub(super) mod worker;
