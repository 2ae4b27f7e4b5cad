//! Why somebody may not call, or not now.

use std::time::Duration;

/// How long to wait before trying again what waits for others to end.
pub(super) const LATER: Duration = Duration::from_secs(10);
/// Counts refused calls, by reason.
pub(super) const REFUSED: &str = "tidemill_refused_total";

/// The caller is unknown, or may not do this.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No token came.
    #[error("this server needs an access token: send the header \"authorization: Bearer TOKEN\"")]
    TokenMissing,
    /// The token is not in the token file.
    #[error("the access token is not known here")]
    TokenUnknown,
    /// The token's role does not allow it.
    #[error("this call needs a token with the role admin")]
    AdminOnly,
}

/// A limited resource, as the error names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// The error's stable reason, for programs.
    pub reason: &'static str,
    /// Such as "streams that watch batches".
    pub what: &'static str,
    /// What the caller can do.
    pub advice: &'static str,
    /// When to try again.
    pub again: Duration,
}

/// The caller has used up a limit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitReached {
    /// Calls a second.
    #[error("the limit is {per_second} calls a second; slow down")]
    Requests {
        per_second: u32,
        /// Until the next call is allowed.
        wait: Duration,
    },
    /// Uploaded bytes a day.
    #[error("the limit is {per_day} bytes uploaded in a day")]
    Bytes {
        per_day: u64,
        /// Until these bytes are allowed.
        wait: Duration,
    },
    /// Requests without a result.
    #[error(
        "you have {queued} requests waiting, and {added} more would exceed the limit of {most}; wait for some to end, or cancel a batch"
    )]
    QueuedLines {
        /// The number of waiting requests.
        queued: i64,
        /// The number of requests that the call would add.
        added: i64,
        most: i64,
    },
    /// No place for an upload became free in time.
    #[error("{most} uploads are under way; try again")]
    Uploads { most: u32 },
    /// An upload was ended to make room for a caller with fewer uploads.
    #[error(
        "this upload was ended to make room for other callers, because it was the slowest of your uploads; send it again, with fewer uploads at a time"
    )]
    GaveWay,
    /// Too much of one kind at a time.
    #[error("you already have {} {} at this server, and {} is the limit; {}", .used, .kind.what, .most, .kind.advice)]
    AtATime {
        kind: Kind,
        /// What the caller has under way.
        used: u64,
        most: u64,
    },
}

impl LimitReached {
    /// A stable name for programs.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Requests { .. } => "TOO_MANY_REQUESTS",
            Self::Bytes { .. } => "TOO_MANY_BYTES",
            Self::QueuedLines { .. } => "TOO_MANY_QUEUED_LINES",
            Self::Uploads { .. } => "TOO_MANY_UPLOADS",
            Self::GaveWay => "UPLOAD_GAVE_WAY",
            Self::AtATime { kind, .. } => kind.reason,
        }
    }

    /// When to try again.
    #[must_use]
    pub fn retry_after(&self) -> Duration {
        let wait = match self {
            Self::Requests { wait, .. } | Self::Bytes { wait, .. } => *wait,
            Self::QueuedLines { .. } | Self::Uploads { .. } | Self::GaveWay => LATER,
            Self::AtATime { kind, .. } => kind.again,
        };
        wait.max(Duration::from_millis(1))
    }

    /// Counts the refusal. Every one is counted where a call is refused.
    pub(crate) fn counted(self) -> Self {
        metrics::counter!(REFUSED, "reason" => self.reason()).increment(1);
        self
    }
}
