//! The engine by promise: store, blobs, fleet and scheduler together, against simulated workers over real sockets.

#![allow(clippy::unwrap_used, missing_docs)]

mod answers;
mod bad_workers;
mod blobs;
mod blobs_s3;
#[path = "../support/direct.rs"]
mod direct;
mod endings;
mod faults;
#[path = "../support/faulty.rs"]
mod faulty;
mod gateways;
mod ghosts;
mod harness;
mod in_time;
mod leftovers;
mod lifecycle;
mod limits;
mod order;
mod outages;
#[allow(dead_code)] // other tests use more of it
#[path = "../support/patience.rs"]
mod patience;
mod places;
mod priority;
mod raw;
mod recovery;
mod refused;
mod rot;
#[path = "../support/s3.rs"]
mod s3;
mod slots;
