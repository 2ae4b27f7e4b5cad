//! The engine by promise: store, blobs, fleet and scheduler together, against simulated workers over real sockets.

mod faults;
mod harness;
mod lifecycle;
mod recovery;
