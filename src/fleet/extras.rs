//! Headers that a live call and its answer carry.

use reqwest::header::{CONTENT_TYPE, HeaderMap, RETRY_AFTER};

/// Headers that go along with a request or an answer.
#[derive(Clone, Debug, Default)]
pub struct Extras(pub HeaderMap);

impl Extras {
    /// The headers of an answer that its client needs.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let kept = [CONTENT_TYPE, RETRY_AFTER].into_iter();
        Self(kept.filter_map(|name| Some((name.clone(), headers.get(name)?.clone()))).collect())
    }
}
