//! The outcome of a request to a worker.

use std::time::Duration;

use bytes::Bytes;

use super::{WorkerKey, cuts::Cut, extras::Extras, memory::Held, outage::Blame};
use crate::{
    domain::TokenUsage,
    words::{self, Peer},
};

/// A worker's answer.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The worker's `x-request-id`.
    pub request_id: Option<String>,
    /// The body, decoded but otherwise unchanged.
    pub body: Bytes,
    /// The token counts of a body that is JSON. `None` if it is not.
    pub usage: Option<TokenUsage>,
    /// The memory that is reserved for the answer, until it is durable.
    pub held: Held,
    /// What of its headers a client needs.
    pub extras: Extras,
}

impl Answer {
    /// Whether the status is a success.
    #[must_use]
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// Whether the status is an error. What is neither a success nor an error, such as a redirect, answers no request.
    #[must_use]
    pub fn is_error(&self) -> bool {
        (400..600).contains(&self.status)
    }
}

/// Why a try gave no answer that can be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum FailureKind {
    /// The connection broke while the worker had the request.
    Connection,
    /// The connection could not be made: the worker never had the request.
    Unreachable,
    /// No whole answer within the request's time.
    Timeout,
    /// The worker went down while it had the request.
    Abandoned,
    /// The worker was removed while it had the request.
    Removed,
    /// A status that says "not now": 408, 409, 425, 5xx.
    Status,
    /// 429, and 503 with `Retry-After`: the worker paces its clients, which says nothing of the request.
    Busy,
    /// 404, because the worker does not have the model that it listed; another one may.
    NoModel,
    /// A success that its endpoint's clients can't use: not JSON, too large, an error, without its list or its end. Also
    /// a status that is neither a success nor an error, such as a redirect, and HTTP that can't be read.
    BadAnswer,
    /// The engine stopped in the middle of the answer and said so: it was stopped or put to sleep, for instance.
    CutOff,
    /// 401, 403, 407 and other statuses below 500 that say nothing of the request, and a 400, 404, 413 or 422 whose
    /// body no API gives: a wrong key, a wrong path or a gateway says so to every request.
    Refused,
    /// The worker fails every request alike: it is at fault, not this one.
    Outage,
    /// This server itself lacks something: file descriptors, memory, a route.
    Local,
}

impl FailureKind {
    /// The label in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// A failed try, which may be retried.
#[derive(Debug)]
pub struct Failure {
    pub kind: FailureKind,
    /// An explanation for people.
    pub message: String,
    /// The worker's answer, if it gave one.
    pub answer: Option<Box<Answer>>,
    /// The pause that the worker asked for.
    pub retry_after: Option<Duration>,
    pub worker: WorkerKey,
    /// The answer may be as good as this worker's answers get: it is taken when there are no more tries.
    pub is_doubtful: bool,
    /// The answer is a success, but a proxy's page or cut short: the worker may not have answered at all.
    pub is_page: bool,
    /// For a 200 that is not an answer: a hash of its beginning, to recognise failures that are alike.
    pub looks: Option<u64>,
    /// What may tell later that the worker was at fault; none: it was not, or that is known already.
    pub blame: Option<Blame>,
    /// For an answer that was cut off: what may tell later that the request is why.
    pub cut: Option<Cut>,
}

/// Describes for people why a request to a worker failed.
pub(super) fn cause(error: &reqwest::Error) -> String {
    words::cause(Peer::Worker, error)
}
