//! Webhooks: signs, sends and retries them, and keeps dead letters.
//!
//! What the store must know to write its outbox is in [`crate::domain::webhook`]: events and their filter, the canonical
//! body, a delivery's state machine. Here is the rest, pure first: [`signature`], [`schedule`] and [`fairness`] decide,
//! [`secrets`] and [`egress`] guard, `send` makes one attempt, `outbox` is the loop over what is due, [`dead_letter`] and
//! `jobs` retry by hand, [`deliverer`] runs all of it. [`Webhooks`] is what the API holds, [`Deliverer`] what the application runs.

pub mod dead_letter;
pub mod deliverer;
pub mod egress;
pub mod fairness;
mod jobs;
mod metrics;
mod outbox;
pub mod schedule;
pub mod secrets;
mod send;
pub mod signature;
mod webhooks;

pub use dead_letter::{DeadLetterRetryError, Retried};
pub use deliverer::Deliverer;
pub use webhooks::{AcceptError, Options, TestError, Tested, Webhooks};
