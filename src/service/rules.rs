//! The rules for the fields of requests, in every protocol: lengths, ranges and texts. Errors name the fields.
//!
//! Lengths are in bytes.

use std::{collections::BTreeMap, time::Duration};

use super::{
    ServiceError,
    error::{Violations, no_batch, no_file},
    text::short,
};
use crate::{
    domain::{
        BatchId, Endpoint, FileId, HealthChange, HealthInterval, WorkerId,
        batch::{DEFAULT_WINDOW, EXPIRY_RANGE, WINDOW_RANGE},
        text::{is_plain, is_storable},
    },
    fleet::FleetError,
    progress::{DEFAULT_INTERVAL, INTERVAL_RANGE},
};

/// The most bytes of a request id.
pub(super) const REQUEST_ID: usize = 128;
/// The most bytes of an id, a model or another short text that is looked up. Nothing has a longer name.
pub(super) const NAME: usize = 512;
/// The most pairs of metadata, and bytes of a key and of a value.
const METADATA: (usize, usize, usize) = (16, 64, 512);

/// A duration as the client wrote it.
pub type Span = Result<Duration, NotASpan>;

/// It is negative or malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotASpan;

pub(super) fn storable(text: &str, most: usize) -> bool {
    text.len() <= most && is_storable(text)
}

/// A batch's id. A text that can't be one is an unknown batch.
pub(super) fn batch_id(text: &str) -> Result<BatchId, ServiceError> {
    if text.is_empty() {
        return Err(ServiceError::field("batch_id", "is empty"));
    }
    let id = BatchId::from_text(text);
    if storable(text, NAME) { Ok(id) } else { Err(no_batch(&id)) }
}

/// A file's id. A text that can't be one is an unknown file.
pub(super) fn file_id(text: &str) -> Result<FileId, ServiceError> {
    if text.is_empty() {
        return Err(ServiceError::field("file_id", "is empty"));
    }
    let id = FileId::from_text(text);
    if storable(text, NAME) { Ok(id) } else { Err(no_file(&id)) }
}

/// A worker's id. A text that can't be one is an unknown worker.
pub(super) fn worker_id(text: &str) -> Result<WorkerId, ServiceError> {
    if text.is_empty() {
        return Err(ServiceError::field("worker_id", "is empty"));
    }
    let id = WorkerId::from_text(text);
    if storable(text, NAME) { Ok(id) } else { Err(FleetError::NotFound(id).into()) }
}

/// How to check a worker's health. An empty path and a duration of 0 mean the server's settings.
pub(super) fn health_change(path: Option<&str>, interval: Option<Span>) -> Result<HealthChange, ServiceError> {
    let path = match path {
        None => None,
        Some("") => Some(None),
        Some(path) => Some(Some(path.parse().map_err(|wrong: &str| ServiceError::field("health_path", wrong))?)),
    };
    let interval = match interval {
        None => None,
        Some(Ok(Duration::ZERO)) => Some(None),
        Some(given) => {
            let interval = given.ok().and_then(HealthInterval::new);
            let wrong = || ServiceError::field("health_interval", "must be 0.100s to 3600s (1 h), or 0s");
            Some(Some(interval.ok_or_else(wrong)?))
        }
    };
    Ok(HealthChange { path, interval })
}

/// An idempotency key. Empty: none.
pub(super) fn request_id(text: String, wrong: &mut Violations, field: &str) -> Option<String> {
    // Control characters are kept for the keys that the server makes itself.
    let good = text.len() <= REQUEST_ID && is_plain(&text);
    wrong.check(good, field, format!("must be at most {REQUEST_ID} bytes without control characters"));
    (!text.is_empty()).then_some(text)
}

/// A completion window.
pub(super) fn window(of: Option<Span>, wrong: &mut Violations) -> Duration {
    let Some(given) = of else { return DEFAULT_WINDOW };
    let (least, most) = WINDOW_RANGE;
    let window = given.ok().filter(|window| (least..=most).contains(window));
    wrong.check(window.is_some(), "completion_window", "must be 3600s (1 h) to 1209600s (14 d)");
    window.unwrap_or(DEFAULT_WINDOW)
}

/// When a file expires, counted from when it is complete. `None`: never.
pub(super) fn expiry(of: Option<Span>, wrong: &mut Violations, field: &str) -> Option<Duration> {
    let (least, most) = EXPIRY_RANGE;
    let span = of?.ok().filter(|span| (least..=most).contains(span));
    wrong.check(span.is_some(), field, "must be 3600s (1 h) to 2592000s (30 d)");
    span
}

/// The shortest time between two progress events.
pub(super) fn min_interval(of: Option<Span>) -> Result<Duration, ServiceError> {
    let Some(given) = of else { return Ok(DEFAULT_INTERVAL) };
    let (least, most) = INTERVAL_RANGE;
    given
        .ok()
        .filter(|interval| (least..=most).contains(interval))
        .ok_or_else(|| ServiceError::field("min_interval", "must be 0.050s to 60s"))
}

/// A duration of any length.
pub(super) fn span(of: Option<Span>, field: &str) -> Result<Option<Duration>, ServiceError> {
    of.transpose().map_err(|NotASpan| ServiceError::field(field, "must not be negative"))
}

/// Where to go on.
pub(super) fn not_negative(value: i64, field: &str) -> Result<i64, ServiceError> {
    if value < 0 { Err(ServiceError::field(field, "must not be negative")) } else { Ok(value) }
}

pub(super) fn metadata(of: &BTreeMap<String, String>, wrong: &mut Violations) {
    let (pairs, key_bytes, value_bytes) = METADATA;
    wrong.check(of.len() <= pairs, "metadata", format!("must have at most {pairs} pairs, has {}", of.len()));
    for (key, value) in of.iter().take(pairs) {
        let field = || format!("metadata[{:?}]", short(key));
        if key.is_empty() || !storable(key, key_bytes) {
            wrong.add(field(), format!("the key must be 1 to {key_bytes} bytes without NUL"));
        }
        if !storable(value, value_bytes) {
            wrong.add(field(), format!("the value must be at most {value_bytes} bytes without NUL"));
        }
    }
}

pub(super) fn endpoint(text: &str, wrong: &mut Violations) -> Option<Endpoint> {
    let known = text.parse().ok();
    wrong.check(known.is_some(), "endpoint", format!("must be one of {}", Endpoint::list()));
    known
}

/// A short text for a lookup. Empty: none.
pub(super) fn text(of: String, field: &str) -> Result<Option<String>, ServiceError> {
    if !storable(&of, NAME) {
        return Err(ServiceError::field(field, format!("must be at most {NAME} bytes without NUL")));
    }
    Ok((!of.is_empty()).then_some(of))
}

/// A required id.
pub(super) fn id(of: String, field: &str) -> Result<String, ServiceError> {
    text(of, field)?.ok_or_else(|| ServiceError::field(field, "is empty"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::Code;

    #[test]
    fn the_edges_are_inside() {
        let given = |seconds, nanos| Some(Ok(Duration::new(seconds, nanos)));
        for (good, span) in [
            (true, given(3_600, 0)),
            (true, given(1_209_600, 0)),
            (false, given(3_599, 999_999_999)),
            (false, given(1_209_600, 1)),
            (false, Some(Err(NotASpan))),
        ] {
            let mut wrong = Violations::default();
            window(span, &mut wrong);
            assert_eq!(wrong.finish().is_ok(), good, "{span:?}");
        }
        assert!(min_interval(given(0, 50_000_000)).is_ok() && min_interval(given(0, 49_999_999)).is_err());
        assert!(min_interval(given(60, 0)).is_ok() && min_interval(given(60, 1)).is_err());
    }

    #[test]
    fn nul_never_reaches_the_database() {
        assert_eq!(batch_id("batch_\0").unwrap_err().code, Code::NotFound);
        assert_eq!(file_id("\0").unwrap_err().code, Code::NotFound);
        let mut wrong = Violations::default();
        request_id("a\u{1}".into(), &mut wrong, "request_id");
        assert!(wrong.finish().is_err());
    }
}
