//! Sends one HTTP request to one worker. Bodies are not changed in either direction.

use std::{fmt, hash::BuildHasher, time::Duration};

use bytes::Bytes;
use reqwest::{
    Response,
    header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER},
};
use tokio::time::Instant;

use super::{
    Answer, Failure, FailureKind, Slot,
    body::{self, Unread},
    extras::Extras,
    judge,
    outcome::cause,
    reasons::Worth,
    status,
};
use crate::{
    domain::{
        Endpoint, TokenUsage,
        answer::{self, Verdict, excerpt},
    },
    words,
};

/// The longest pause that a worker may ask for.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// What vLLM (0.32 and later) reads a request's priority from, before its body. With `--scheduling-policy fcfs` it
/// makes no use of it, and other servers do not know it.
const PRIORITY: HeaderName = HeaderName::from_static("x-vllm-priority");

/// Bad answers that have so many first bytes in common look alike: an answer to a request has its id there.
const ALIKE: usize = 64;
/// Bytes of a bad answer that are shown.
const SHOWN: usize = 200;

/// One request to a worker.
#[derive(Clone, Debug)]
pub struct Call<'a> {
    pub endpoint: Endpoint,
    /// The model that the body names.
    pub model: &'a str,
    /// The body, sent unchanged.
    pub body: Bytes,
    /// Lower first. It goes along in a header: workers that do not know it do as if it was not there.
    pub priority: Option<i32>,
    /// Time limit of the whole answer. Waiting for memory is not counted.
    pub timeout: Duration,
    /// The expected size of the answer in bytes, from similar requests; 0 if it is not known.
    pub expected: usize,
    /// Further headers.
    pub extras: Extras,
}

/// Whether an answer refuses the request, and may do so for its `priority`: "Extra inputs are not permitted" or
/// "Unrecognized request argument", with the field's name.
#[must_use]
pub fn may_refuse_priority(answer: &Answer) -> bool {
    matches!(answer.status, 400 | 422) && answer.body.windows(8).any(|word| word.eq_ignore_ascii_case(b"priority"))
}

/// `Retry-After`, in seconds or as a date (RFC 9110, 10.2.3); garbage is no wish, and no wish is granted for over a
/// minute.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wish = match text.parse::<f64>() {
        Ok(seconds) => {
            Duration::try_from_secs_f64(seconds).unwrap_or(if seconds > 0.0 { MAX_PAUSE } else { Duration::ZERO })
        }
        Err(_) => {
            httpdate::parse_http_date(text).ok()?.duration_since(std::time::SystemTime::now()).unwrap_or_default()
        }
    };
    Some(wish.min(MAX_PAUSE))
}

/// What an answer's head says.
struct Head {
    status: u16,
    request_id: Option<String>,
    retry_after: Option<Duration>,
    content_type: Option<HeaderValue>,
    /// Where it redirects to.
    location: Option<String>,
    /// Bytes of the body, as announced or as read.
    length: Option<u64>,
    extras: Extras,
}

impl Head {
    fn of(response: &Response) -> Self {
        let text =
            |name: HeaderName| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        Self {
            status: response.status().as_u16(),
            request_id: text(HeaderName::from_static("x-request-id")),
            retry_after: retry_after(response.headers()),
            content_type: response.headers().get(CONTENT_TYPE).cloned(),
            location: text(LOCATION),
            length: response.content_length(),
            extras: Extras::of(response.headers()),
        }
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "status {}, ", self.status)?;
        match &self.content_type {
            Some(content_type) => write!(f, "content type \"{}\", ", excerpt(content_type.as_bytes(), SHOWN))?,
            None => f.write_str("no content type, ")?,
        }
        match self.length {
            Some(length) => write!(f, "{length} bytes"),
            None => f.write_str("length unknown"),
        }
    }
}

impl Slot {
    /// Sends a request and waits for the whole answer. First it waits until there is memory for answers. The slot stays
    /// taken until it is dropped.
    ///
    /// # Errors
    /// [`Failure`]: another try may help. The worker is held back or looked at as the failure suggests.
    pub async fn send(&self, call: Call<'_>) -> Result<Answer, Failure> {
        // Never closed; without a place it waits as for a slot.
        let _socket = self.fleet.sockets.acquire().await;
        tokio::select! {
            biased;
            () = self.fleet.memory.open(call.expected) => {}
            () = self.abandoned.cancelled() => return Err(self.left()),
        }
        let began = Instant::now();
        let (head, body) = tokio::select! {
            biased;
            exchanged = self.exchange(&call, began + call.timeout) => exchanged?,
            () = self.abandoned.cancelled() => return Err(self.left()),
        };
        let Head { status, retry_after: wish, .. } = head;
        let mut answer = Answer {
            status,
            request_id: head.request_id.clone(),
            body: body.bytes,
            usage: None,
            held: body.held,
            extras: head.extras.clone(),
        };
        let Some(kind) = status::failure_of(status, &answer.body, wish.is_some()) else {
            self.worker.returned(began.elapsed());
            if answer.is_success() {
                return self.judge(&call, &head, answer);
            }
            answer.usage = answer::is_json(&answer.body).then(TokenUsage::default);
            return Ok(answer);
        };
        if matches!(status, 429 | 503) {
            self.fleet.pushed_back(self, wish, began);
        }
        if kind == FailureKind::NoModel {
            self.worker.look_at_models();
        }
        let what = status::in_words(status, head.location.as_deref());
        let failure = match kind {
            FailureKind::BadAnswer => self.bad(kind, &what, &head, &answer.body),
            _ => self.failure(kind, what),
        };
        Err(Failure { answer: Some(Box::new(answer)), retry_after: wish, ..failure })
    }

    /// One request and its whole response.
    async fn exchange(&self, call: &Call<'_>, deadline: Instant) -> Result<(Head, body::Body), Failure> {
        let request = self.fleet.client.post(self.worker.endpoint(call.endpoint)).headers(call.extras.0.clone());
        let mut request =
            self.fleet.authorized(request).header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(priority) = call.priority {
            request = request.header(PRIORITY, HeaderValue::from(priority));
        }
        let sent = tokio::time::timeout_at(deadline, request.body(call.body.clone()).send()).await;
        let mut response = sent.map_err(|_| self.timed_out(call.timeout))?.map_err(|error| self.broken(&error))?;
        let mut head = Head::of(&response);
        match body::read(&mut response, &self.fleet.memory, deadline).await {
            Ok(body) => {
                head.length = Some(body.bytes.len() as u64);
                Ok((head, body))
            }
            Err(Unread::TimedOut) => Err(self.timed_out(call.timeout)),
            Err(Unread::Broken(error)) => Err(self.broken(&error)),
            Err(Unread::Bad(why)) => {
                let message = format!("the worker's answer can't be read: {why}");
                let failure = self.bad(FailureKind::BadAnswer, &message, &head, &[]);
                // Nothing was seen of it, so it is like no other: a line whose answer is too large is at fault itself.
                Err(Failure { looks: None, ..failure })
            }
        }
    }

    /// Whether a success is the request's answer.
    fn judge(&self, call: &Call<'_>, head: &Head, answer: Answer) -> Result<Answer, Failure> {
        let reading = answer::read(call.endpoint, &answer.body).map_err(|not_json| {
            let message = format!("the worker's answer is not JSON: {not_json}");
            let failure = self.bad(FailureKind::BadAnswer, &message, head, &answer.body);
            Failure { is_page: not_json.is_page(), ..failure }
        })?;
        let answer = Answer { usage: Some(reading.usage), ..answer };
        let path = call.endpoint;
        let (kind, message, is_doubtful) = match reading.verdict {
            Verdict::Answer(ending) => match self.worker.reasons.lock().note(call.model, path, ending) {
                Worth::Fair => return Ok(answer),
                worth @ (Worth::Doubtful | Worth::Unfinished) => {
                    let message = format!("the worker's answer to {path} does not say why its text ended");
                    (FailureKind::BadAnswer, message, worth == Worth::Doubtful)
                }
            },
            Verdict::Bad(why) => {
                (FailureKind::BadAnswer, format!("the worker's answer is not one to {path}: {why}"), false)
            }
            Verdict::CutOff(why) => (FailureKind::CutOff, format!("the worker's answer is incomplete: {why}"), false),
        };
        if kind == FailureKind::CutOff {
            // It may be on its way down.
            self.worker.probe_now.notify_one();
        }
        let failure = self.bad(kind, &message, head, &answer.body);
        Err(Failure { answer: Some(Box::new(answer)), is_doubtful, ..failure })
    }

    /// A bad answer, with all that helps to find out what sent it. It is logged too, but not each one of thousands.
    fn bad(&self, kind: FailureKind, what: &str, head: &Head, body: &[u8]) -> Failure {
        let message = format!("{what} ({head}{}{})", if body.is_empty() { "" } else { ": " }, excerpt(body, SHOWN));
        if let Some(unlogged) = self.worker.bad_answers.may() {
            let (worker, url) = (&self.worker.id, &self.worker.url);
            tracing::warn!(%worker, url, kind = kind.as_str(), unlogged, "{message}");
        }
        let begins = &body[..body.len().min(ALIKE)];
        let content_type = head.content_type.as_ref().map(HeaderValue::as_bytes);
        let looks = foldhash::quality::FixedState::default().hash_one((head.status, content_type, begins));
        Failure { looks: Some(looks), ..self.failure(kind, message) }
    }

    fn timed_out(&self, timeout: Duration) -> Failure {
        // A hang looks like a slow request from here: the probe tells them apart.
        self.worker.probe_now.notify_one();
        self.worker.pushed_back();
        self.failure(FailureKind::Timeout, format!("no answer within {} s", timeout.as_secs_f64()))
    }

    pub(super) fn left(&self) -> Failure {
        if self.worker.gone.is_cancelled() {
            self.failure(FailureKind::Removed, "the worker was removed while it had the request".into())
        } else {
            self.failure(FailureKind::Abandoned, "the worker went down while it had the request".into())
        }
    }

    pub(super) fn broken(&self, error: &reqwest::Error) -> Failure {
        if let Some(lack) = judge::own_fault(error) {
            self.fleet.note_own_fault(lack, "a request to a worker");
            return self.failure(FailureKind::Local, format!("this server could not send the request: {lack}"));
        }
        if let Some(why) = words::unreadable_answer(error) {
            // The worker lives, and has answered.
            let looks = foldhash::quality::FixedState::default().hash_one(why);
            let message = format!("the worker's answer can't be read: {why}");
            if let Some(unlogged) = self.worker.bad_answers.may() {
                tracing::warn!(worker = %self.worker.id, url = %self.worker.url, unlogged, "{message}");
            }
            return Failure { looks: Some(looks), ..self.failure(FailureKind::BadAnswer, message) };
        }
        self.fleet.suspect(&self.worker, &cause(error));
        let kind = if error.is_connect() { FailureKind::Unreachable } else { FailureKind::Connection };
        if kind == FailureKind::Unreachable {
            self.worker.state.lock().cuts.begin_new_life();
        }
        self.failure(kind, format!("connection to the worker failed: {}", cause(error)))
    }

    /// A failed try on this slot's worker.
    #[must_use]
    pub fn failure(&self, kind: FailureKind, message: String) -> Failure {
        Failure {
            kind,
            message,
            answer: None,
            retry_after: None,
            worker: self.worker.key,
            is_doubtful: false,
            is_page: false,
            looks: None,
            blame: None,
            cut: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::memory::Held, *};

    #[test]
    fn wishes_are_read_and_capped() {
        let wish = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, HeaderValue::from_str(text).unwrap());
            retry_after(&headers)
        };
        assert_eq!(wish("7"), Some(Duration::from_secs(7)));
        assert_eq!(wish("1e18"), Some(MAX_PAUSE));
        assert_eq!(wish("-5"), Some(Duration::ZERO));
        assert_eq!(wish("soon"), None);
        assert_eq!(wish("Fri, 01 Jan 1999 00:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(wish("Tue, 01 Jan 2999 00:00:00 GMT"), Some(MAX_PAUSE));
    }

    #[test]
    fn a_refused_priority_is_told_from_what_else_is_refused() {
        let refuses = |status: u16, body: &'static str| {
            let held = Held::default();
            may_refuse_priority(&Answer {
                status,
                request_id: None,
                body: body.into(),
                usage: None,
                held,
                extras: Extras::default(),
            })
        };
        assert!(refuses(400, r#"{"error":{"message":"Got priority 10 but Priority scheduling is not enabled."}}"#));
        assert!(refuses(400, r#"{"error":{"message":"Unrecognized request argument supplied: priority"}}"#));
        assert!(refuses(422, r#"{"detail":[{"type":"extra_forbidden","loc":["body","priority"]}]}"#));
        assert!(!refuses(400, r#"{"error":{"message":"max_tokens must be at least 1, got 0."}}"#));
        assert!(!refuses(200, "priority") && !refuses(500, "priority") && !refuses(400, ""));
    }
}
