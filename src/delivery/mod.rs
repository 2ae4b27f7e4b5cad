//! Webhooks: which event to whom, signed, retried, dead-lettered.

pub mod fairness;
pub mod schedule;
pub mod signature;
