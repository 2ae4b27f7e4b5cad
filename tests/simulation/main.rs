//! Deterministic simulation of the segment, lease and part protocol and of the webhook outbox: the real store, plan of lines,
//! parts and merge, run by simulated nodes on a simulated clock. A seed decides every step and every fault: crashes between
//! any two steps, frozen nodes that thaw with a lease long lost, calls that come late or twice, answers that are lost, clocks
//! that jump, torn objects, cancellations, windows that close, receivers that fail. After every step the database must be what
//! a model of the protocol says, and at the end every line has exactly one answer and every webhook is delivered or dead.
//!
//! `TIDEMILL_SIM_SEEDS=100000 cargo test --test simulation` for a soak; a seed that fails prints how to replay it.

#![allow(missing_docs, clippy::unwrap_used)]

mod database;
mod deliveries;
#[path = "../support/direct.rs"]
mod direct;
mod dispatch;
mod flaky;
mod model;
mod node;
mod outbox;
mod seeds;
mod world;

/// With a database, by default. CI runs 10,000 in an optimised build (`.ci/run simulation`).
const SEEDS: u64 = 400;
/// Of the pure cores.
const CORE_SEEDS: u64 = 10_000;

#[test]
fn whatever_breaks_every_line_has_exactly_one_answer() {
    seeds::run("whatever_breaks", SEEDS, database::Database::open, async |database, seed| {
        world::World::run(database, seed).await;
    });
}

#[test]
fn every_line_is_run_until_it_ends_once() {
    seeds::run("every_line", CORE_SEEDS, async || (), async |(), seed| dispatch::Dispatch::run(seed));
}

#[test]
fn every_delivery_is_settled_once() {
    seeds::run("every_delivery", CORE_SEEDS, async || (), async |(), seed| deliveries::Deliveries::run(seed));
}
