//! The metrics of webhooks. Durations are in seconds; counters end in `_total`.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

use crate::domain::webhook::AttemptResult;

const ATTEMPTS: &str = "tidemill_webhook_attempts_total";
const ATTEMPT_SECONDS: &str = "tidemill_webhook_attempt_seconds";
const DELIVERED_AFTER: &str = "tidemill_webhook_delivered_after_seconds";
const DEAD_LETTERS: &str = "tidemill_webhook_dead_letters_total";
const REAPED: &str = "tidemill_webhook_reaped_total";
const LEASES_LOST: &str = "tidemill_webhook_leases_lost_total";
const IN_FLIGHT: &str = "tidemill_webhook_in_flight";
const TARGETS_HELD: &str = "tidemill_webhook_targets_held";
const OLDEST_DUE: &str = "tidemill_webhook_oldest_due_seconds";

/// Registers the help texts.
pub(super) fn describe() {
    describe_counter!(ATTEMPTS, "attempts to deliver a webhook, by outcome and kind of error");
    describe_histogram!(ATTEMPT_SECONDS, Unit::Seconds, "how long attempts to deliver a webhook took");
    describe_histogram!(DELIVERED_AFTER, Unit::Seconds, "how long after its event a webhook was delivered");
    describe_counter!(DEAD_LETTERS, "webhooks that became dead letters, by reason");
    describe_counter!(REAPED, "attempts with an unknown outcome, because their server died");
    describe_counter!(LEASES_LOST, "outcomes of attempts that came after their lease had expired");
    describe_gauge!(IN_FLIGHT, "webhooks that this server is sending");
    describe_gauge!(TARGETS_HELD, "receivers that this server holds or only probes because they fail");
    describe_gauge!(OLDEST_DUE, Unit::Seconds, "how long the longest waiting delivery has been due");
}

/// Records the end of an attempt.
pub(super) fn attempt(result: &AttemptResult, took: Duration) {
    let outcome = if result.succeeded() { "succeeded" } else { "failed" };
    let kind = result.error.as_ref().map_or("none", |error| error.kind.as_str());
    counter!(ATTEMPTS, "outcome" => outcome, "error_kind" => kind).increment(1);
    histogram!(ATTEMPT_SECONDS).record(took.as_secs_f64());
}

/// Records a delivery, with the time since its event.
pub(super) fn delivered(after: Duration) {
    histogram!(DELIVERED_AFTER).record(after.as_secs_f64());
}

/// Counts a dead letter.
pub(super) fn dead(reason: &'static str) {
    counter!(DEAD_LETTERS, "reason" => reason).increment(1);
}

/// Counts attempts with an unknown outcome.
pub(super) fn reaped(count: u64) {
    counter!(REAPED).increment(count);
}

/// Counts a result that came after its lease was lost.
pub(super) fn lease_lost() {
    counter!(LEASES_LOST).increment(1);
}

/// Sets the gauges.
pub(super) fn state(in_flight: usize, held: usize) {
    // Both are at most some thousands.
    #[allow(clippy::cast_precision_loss)]
    let [in_flight, held] = [in_flight, held].map(|count| count as f64);
    gauge!(IN_FLIGHT).set(in_flight);
    gauge!(TARGETS_HELD).set(held);
}

/// How long the oldest due delivery has been due; zero if none is.
pub(super) fn oldest_due(age: Duration) {
    gauge!(OLDEST_DUE).set(age.as_secs_f64());
}
