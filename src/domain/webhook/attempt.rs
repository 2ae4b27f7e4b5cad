//! The outcome of an attempt.

/// Why an attempt failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, strum::EnumString, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum ErrorKind {
    /// The receiver answered with a status other than 2xx.
    Status,
    /// The receiver answered 410: it does not want this delivery.
    Gone,
    /// It took too long.
    Timeout,
    /// The name did not resolve.
    Dns,
    /// There was no connection.
    Connect,
    /// The connection broke, or the answer was not HTTP.
    Transport,
    /// Webhooks may not go to the address.
    ForbiddenAddress,
    /// Webhooks can't be sent to the URL.
    InvalidUrl,
    /// The secret can't be decrypted.
    SecretUnopenable,
    /// The registered endpoint has been deleted.
    EndpointDeleted,
    /// The server stopped before it knew the outcome.
    Unknown,
}

impl ErrorKind {
    /// The name that is stored and used in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    /// The kind of that name.
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    /// Whether a retry can't help.
    #[must_use]
    pub fn is_for_good(self) -> bool {
        match self {
            Self::Gone | Self::ForbiddenAddress | Self::InvalidUrl | Self::SecretUnopenable | Self::EndpointDeleted => {
                true
            }
            Self::Status | Self::Timeout | Self::Dns | Self::Connect | Self::Transport | Self::Unknown => false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumString, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum AttemptOutcome {
    /// It is being made.
    Started,
    /// The receiver accepted it.
    Succeeded,
    Failed,
    /// The server stopped during the attempt; the receiver may have it.
    Unknown,
}

impl AttemptOutcome {
    /// Its name, as stored.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }

    #[must_use]
    pub fn of(result: &AttemptResult) -> Self {
        match result.error.as_ref().map(|error| error.kind) {
            None => Self::Succeeded,
            Some(ErrorKind::Unknown) => Self::Unknown,
            Some(_) => Self::Failed,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptResult {
    /// Why it failed. `None` if it succeeded.
    pub error: Option<AttemptError>,
    /// The receiver's HTTP status. `None` if it did not answer.
    pub http_status: Option<u16>,
    /// The first characters of its answer.
    pub response_excerpt: Option<String>,
}

/// Why an attempt failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttemptError {
    /// The kind of failure.
    pub kind: ErrorKind,
    /// An explanation for people. Contains no secret and no control character.
    pub message: String,
}

impl AttemptResult {
    /// The outcome of an attempt that failed before the receiver answered.
    pub fn failed(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { error: Some(AttemptError { kind, message: message.into() }), http_status: None, response_excerpt: None }
    }

    /// Whether the receiver accepted it.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        self.error.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Databases have them: a variant may be renamed, its name may not.
    #[test]
    fn stored_names_stay_as_they_are() {
        let names = [
            "status",
            "gone",
            "timeout",
            "dns",
            "connect",
            "transport",
            "forbidden_address",
            "invalid_url",
            "secret_unopenable",
            "endpoint_deleted",
            "unknown",
        ];
        let kinds = names.map(|name| ErrorKind::from_text(name).unwrap());
        assert_eq!(kinds.map(ErrorKind::as_str), names);
        assert_eq!(ErrorKind::from_text("nothing"), None);
        use AttemptOutcome::{Failed, Started, Succeeded, Unknown};
        let outcomes = [Started, Succeeded, Failed, Unknown].map(AttemptOutcome::as_str);
        assert_eq!(outcomes, ["started", "succeeded", "failed", "unknown"]);
    }
}
