//! The metrics of webhooks, all in one place. Seconds are seconds; counters end in `_total`.

use std::time::Duration;

use metrics::{counter, gauge, histogram};

use crate::domain::webhook::AttemptResult;

/// An attempt has ended.
pub(super) fn attempt(result: &AttemptResult, took: Duration) {
    let outcome = if result.succeeded() { "succeeded" } else { "failed" };
    let kind = result.error.as_ref().map_or("none", |error| error.kind.as_str());
    counter!("tidemill_webhook_attempts_total", "outcome" => outcome, "error_kind" => kind).increment(1);
    histogram!("tidemill_webhook_attempt_seconds").record(took.as_secs_f64());
}

/// A delivery has arrived, so long after its event.
pub(super) fn delivered(after: Duration) {
    histogram!("tidemill_webhook_delivered_after_seconds").record(after.as_secs_f64());
}

/// A delivery was given up.
pub(super) fn dead(reason: &'static str) {
    counter!("tidemill_webhook_dead_letters_total", "reason" => reason).increment(1);
}

/// Attempts of which nobody will say what came of them.
pub(super) fn reaped(count: u64) {
    counter!("tidemill_webhook_reaped_total").increment(count);
}

/// A result came after its lease was lost.
pub(super) fn lease_lost() {
    counter!("tidemill_webhook_leases_lost_total").increment(1);
}

/// How things are.
pub(super) fn state(in_flight: usize, in_line: usize, held: usize) {
    // All are at most some thousands.
    #[allow(clippy::cast_precision_loss)]
    let [in_flight, in_line, held] = [in_flight, in_line, held].map(|count| count as f64);
    gauge!("tidemill_webhook_in_flight").set(in_flight);
    gauge!("tidemill_webhook_in_line").set(in_line);
    gauge!("tidemill_webhook_targets_held").set(held);
}

/// For how long the delivery that has been due longest has been so; zero if none is.
pub(super) fn oldest_due(age: Duration) {
    gauge!("tidemill_webhook_oldest_due_seconds").set(age.as_secs_f64());
}
