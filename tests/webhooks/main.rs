//! Webhooks over real sockets, on both databases: what is promised of signing, retrying, dead letters and egress.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../support/mod.rs"]
mod support;

mod atomic;
mod bounded;
mod clock;
mod delivery;
mod endpoints;
mod fixture;
mod groups;
mod late;
mod names;
mod outbox;
mod receiver;
mod refused;
mod retries;
mod rivals;
mod zoo;
