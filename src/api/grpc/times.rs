//! Times and spans on the wire.

use std::time::Duration;

use crate::domain::Timestamp;

/// A wire timestamp.
pub(super) fn timestamp(of: Timestamp) -> prost_types::Timestamp {
    let micros = i32::try_from(of.0.rem_euclid(1_000_000)).unwrap_or(0);
    prost_types::Timestamp { seconds: of.unix_seconds(), nanos: micros * 1_000 }
}

pub(super) fn time(at: Option<Timestamp>) -> Option<prost_types::Timestamp> {
    at.map(timestamp)
}

/// A wire duration.
pub(super) fn span(of: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(of.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(of.subsec_nanos()).unwrap_or(0),
    }
}
