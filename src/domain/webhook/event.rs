//! The events of webhooks, and filters for them.

use crate::domain::BatchStatus;

/// An event that webhooks report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, strum::EnumString, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum WebhookEvent {
    /// The batch has completed.
    Completed,
    /// The batch has failed.
    Failed,
    /// The batch has made progress.
    Progress,
    /// The batch was cancelled.
    Cancelled,
    /// The batch's window closed first.
    Expired,
    /// A test of an endpoint.
    Test,
}

impl WebhookEvent {
    /// The events that can be subscribed to, in the order in which messages list them.
    pub const SUBSCRIBABLE: [Self; 5] = [Self::Completed, Self::Failed, Self::Progress, Self::Cancelled, Self::Expired];

    /// Its name, as in `X-Webhook-Event`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// The event of that name.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    /// The event that reports this state, if there is one.
    #[must_use]
    pub fn of(status: BatchStatus) -> Option<Self> {
        match status {
            BatchStatus::Completed => Some(Self::Completed),
            BatchStatus::Failed => Some(Self::Failed),
            BatchStatus::Expired => Some(Self::Expired),
            BatchStatus::Cancelled => Some(Self::Cancelled),
            BatchStatus::Validating | BatchStatus::InProgress | BatchStatus::Finalizing | BatchStatus::Cancelling => {
                None
            }
        }
    }

    /// Whether the event may be lost: it gets one attempt and never becomes a dead letter.
    #[must_use]
    pub fn is_disposable(self) -> bool {
        match self {
            Self::Progress | Self::Test => true,
            Self::Completed | Self::Failed | Self::Cancelled | Self::Expired => false,
        }
    }

    fn bit(self) -> u8 {
        match self {
            Self::Completed => 1,
            Self::Failed => 2,
            Self::Progress => 4,
            Self::Cancelled => 8,
            Self::Expired => 16,
            Self::Test => 0,
        }
    }
}

/// The events that a target receives. Never empty.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct EventFilter(u8);

/// Names that are not events.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown {noun} {names}; valid are {valid}",
    noun = if .0.len() == 1 { "event" } else { "events" },
    names = .0.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", "),
    valid = WebhookEvent::SUBSCRIBABLE.map(WebhookEvent::as_str).join(", ")
)]
pub struct UnknownEvents(pub Vec<String>);

impl EventFilter {
    /// A filter for the events named; if none is named, for every event that ends a batch. Duplicates have no effect.
    ///
    /// # Errors
    /// [`UnknownEvents`] with every name that is none.
    pub fn parse<S: AsRef<str>>(names: &[S]) -> Result<Self, UnknownEvents> {
        let mut unknown: Vec<String> = Vec::new();
        let mut bits = 0;
        for name in names.iter().map(AsRef::as_ref) {
            match WebhookEvent::SUBSCRIBABLE.into_iter().find(|event| event.as_str() == name) {
                Some(event) => bits |= event.bit(),
                None if unknown.iter().any(|known| known == name) => {}
                None => unknown.push(name.to_owned()),
            }
        }
        if !unknown.is_empty() {
            return Err(UnknownEvents(unknown));
        }
        Ok(if bits == 0 { Self::default() } else { Self(bits) })
    }

    /// Whether the filter includes this event.
    #[must_use]
    pub fn wants(self, event: WebhookEvent) -> bool {
        self.0 & event.bit() != 0
    }

    /// The names of the events in the filter.
    #[must_use]
    pub fn names(self) -> Vec<&'static str> {
        WebhookEvent::SUBSCRIBABLE.into_iter().filter(|event| self.wants(*event)).map(WebhookEvent::as_str).collect()
    }
}

impl Default for EventFilter {
    fn default() -> Self {
        Self(WebhookEvent::SUBSCRIBABLE.into_iter().filter(|event| !event.is_disposable()).map(WebhookEvent::bit).sum())
    }
}

impl std::fmt::Debug for EventFilter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

impl serde::Serialize for EventFilter {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

impl<'de> serde::Deserialize<'de> for EventFilter {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names: Vec<String> = serde::Deserialize::deserialize(deserializer)?;
        Self::parse(&names).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Databases and receivers have them: a variant may be renamed, its name may not.
    #[test]
    fn stored_names_stay_as_they_are() {
        let names = ["completed", "failed", "progress", "cancelled", "expired", "test"];
        let events = names.map(|name| WebhookEvent::from_text(name).unwrap());
        assert_eq!(events.map(WebhookEvent::as_str), names);
    }

    #[test]
    fn every_subset_against_every_outcome() {
        for mask in 1u8..32 {
            let subset: Vec<_> =
                (0..5).filter(|bit| mask & (1 << bit) != 0).map(|bit| WebhookEvent::SUBSCRIBABLE[bit]).collect();
            let filter = EventFilter::parse(&subset.iter().map(|event| event.as_str()).collect::<Vec<_>>()).unwrap();
            for event in WebhookEvent::SUBSCRIBABLE {
                assert_eq!(filter.wants(event), subset.contains(&event), "{filter:?} {event:?}");
            }
            assert_eq!(EventFilter::parse(&filter.names()).unwrap(), filter);
            assert_eq!(serde_json::from_str::<EventFilter>(&serde_json::to_string(&filter).unwrap()).unwrap(), filter);
        }
    }

    #[test]
    fn none_named_is_every_end_but_no_progress() {
        let filter = EventFilter::parse::<&str>(&[]).unwrap();
        assert_eq!(filter.names(), ["completed", "failed", "cancelled", "expired"]);
        assert_eq!(EventFilter::parse(&["failed", "failed"]).unwrap().names(), ["failed"]);
    }

    #[test]
    fn unknown_names_are_all_named_with_what_is_valid() {
        let error = EventFilter::parse(&["completed", "done", "batch.failed", "done", "test"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown events \"done\", \"batch.failed\", \"test\"; valid are completed, failed, progress, cancelled, expired"
        );
        assert_eq!(
            EventFilter::parse(&["Completed"]).unwrap_err().to_string(),
            "unknown event \"Completed\"; valid are completed, failed, progress, cancelled, expired"
        );
    }

    #[test]
    fn only_ends_are_events() {
        let events: Vec<_> =
            BatchStatus::ALL.into_iter().filter_map(|status| Some((status, WebhookEvent::of(status)?))).collect();
        assert_eq!(events.len(), 4);
        for (status, event) in events {
            assert!(status.is_terminal());
            assert_eq!(status.as_str(), event.as_str());
        }
    }
}
