//! Managed engines: which model is loaded on which GPUs, and when that changes.
//!
//! - [`policy`]: what to load, swap, put to sleep and stop, from the queue and from what swaps cost.
//! - [`failures`]: why a start failed, and when the next one makes sense.
//! - [`gpus`]: the GPUs of this machine and who holds their memory.
//! - [`models`]: the models that may be loaded, from `models.toml`.
//! - [`place`]: on which GPUs an engine goes.

pub mod failures;
pub mod gpus;
pub mod models;
pub mod place;
pub mod policy;
