//! Managed engines: which model is loaded on which GPUs, and when that changes.
//!
//! - [`policy`]: what to load, swap, put to sleep and stop, from the queue and from what swaps cost.
//! - [`place`]: on which GPUs an engine goes.

pub mod place;
pub mod policy;
