//! What the store promises, on SQLite and on PostgreSQL: the same tests on both.

#![allow(missing_docs, clippy::unwrap_used)]

#[macro_use]
mod fixture;
mod again;
mod batches;
mod claims;
mod events;
mod fencing;
mod files;
mod identity;
mod leftovers;
mod migrations;
mod migrations_rolling;
mod notify;
mod pages;
mod parts;
mod refusals;
mod rivals;
mod start;
#[path = "../support/mod.rs"]
mod support;
mod sweeps;
mod uploads;
mod workers;
