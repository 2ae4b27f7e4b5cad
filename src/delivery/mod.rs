//! Webhooks: which event to whom, signed, retried, dead-lettered.

pub mod egress;
pub mod fairness;
pub mod schedule;
pub mod secrets;
pub mod signature;
