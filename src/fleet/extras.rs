//! Headers that a live call and its answer carry.

use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};

const EVENTS: HeaderValue = HeaderValue::from_static("text/event-stream");

/// Headers that go along with a request or an answer.
#[derive(Clone, Debug, Default)]
pub struct Extras(pub HeaderMap);

impl Extras {
    /// The headers of an answer that its client needs. Its body is passed on decoded, so its encoding is left out.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let kept = [CONTENT_TYPE, RETRY_AFTER].into_iter();
        Self(kept.filter_map(|name| Some((name.clone(), headers.get(name)?.clone()))).collect())
    }

    /// Whether the body is a stream of events. Case does not matter in a media type (RFC 9110, 8.3.1).
    #[must_use]
    pub fn is_events(&self) -> bool {
        let kind = self.0.get(CONTENT_TYPE).and_then(|kind| kind.as_bytes().split(|byte| *byte == b';').next());
        kind.is_some_and(|kind| kind.trim_ascii().eq_ignore_ascii_case(EVENTS.as_bytes()))
    }

    /// Says that the body is a stream of events.
    pub(super) fn name_events(&mut self) {
        self.0.insert(CONTENT_TYPE, EVENTS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_known_in_any_case_and_with_parameters() {
        let is_events = |kind: &'static str| {
            Extras(HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))])).is_events()
        };
        assert!(is_events("text/event-stream") && is_events("Text/Event-Stream ; charset=UTF-8"));
        for other in ["", "text/event-streams", "text/event", "application/json", ";text/event-stream"] {
            assert!(!is_events(other), "{other}");
        }
        assert!(!Extras::default().is_events());
    }
}
