//! A request whose answer passes through while it comes, for a caller who waits: nothing of it is read here but its head,
//! and the beginning of what says that it is no stream of events.

use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use reqwest::{
    Response,
    header::{ACCEPT_ENCODING, CONTENT_TYPE, HeaderValue, LOCATION},
};
use smallvec::SmallVec;
use tokio::{sync::SemaphorePermit, time::Instant};

use super::{
    Fleet, INFER_TRIES, InferError, Rank, Slot, Tenant, Want,
    body::{Decoder, Unread},
    dispatch::retry_after,
    extras::Extras,
    judge,
    outcome::cause,
    passage::{Broken, Entry, passage},
    slots,
    status::{self, is_missing_model},
};
use crate::domain::{Endpoint, WorkerId, answer::excerpt};

/// The most bytes of a refusal that are kept while another worker is tried.
const REFUSAL: usize = 64 * 1024;
/// How long such a refusal may take to come.
const REFUSAL_TIME: Duration = Duration::from_secs(10);
/// Bytes of blank that may come before the answer.
const BLANK: usize = 64 * 1024;
/// Bytes that are shown of what is no answer.
const SHOWN: usize = 200;

/// A request of a caller who waits.
#[derive(Clone, Debug)]
pub struct LiveCall<'a> {
    pub endpoint: Endpoint,
    /// The rest of the path below the endpoint; empty for the endpoint itself.
    pub below: &'static str,
    /// The model that the body names.
    pub model: &'a str,
    /// The body, sent unchanged.
    pub body: Bytes,
    /// Headers that are passed on to the worker.
    pub headers: Extras,
    /// How long a worker may take to begin its answer, and how long it may pause within it; for a whole answer, how long it may
    /// take in all.
    pub timeout: Duration,
}

/// An answer that passes through.
pub struct Passing {
    /// The worker that answers.
    pub worker: WorkerId,
    /// Its HTTP status.
    pub status: u16,
    /// What of its headers its client needs.
    pub headers: Extras,
    /// The body as it comes, decoded. An error is its end.
    pub body: BoxStream<'static, Result<Bytes, Broken>>,
}

/// What a worker answered to a try.
enum Begun {
    Answer(Passing),
    /// Another worker may take the request; this is the answer if none does.
    Refused(Passing),
    /// There is no answer; says why.
    Failed(String),
}

impl Fleet {
    /// Runs one request at once, ahead of all batches, and passes its answer on as it comes. Another worker is tried only
    /// as long as nothing of an answer has been passed on.
    ///
    /// # Errors
    /// [`InferError`].
    pub async fn pass(&self, tenant: Tenant, call: LiveCall<'_>) -> Result<Passing, InferError> {
        let deadline = Instant::now() + call.timeout;
        let rank = Rank::interactive().of(tenant);
        let mut want = Want { model: call.model.into(), rank, avoid: SmallVec::new(), alone: false };
        let mut last = None;
        while want.avoid.len() < INFER_TRIES {
            if self.capacity(call.model) == 0 {
                break;
            }
            let mut waits = slots::Call::new(self.inner.clone(), want.clone());
            let slot = match tokio::time::timeout_at(deadline, waits.slot()).await {
                Ok(Some(slot)) => slot,
                // Only those workers that have refused it serve the model.
                Ok(None) | Err(_) if last.is_some() => break,
                Ok(None) | Err(_) => return Err(InferError::Timeout(call.timeout)),
            };
            want.avoid.push(slot.worker.key);
            let Ok(begun) = tokio::time::timeout_at(deadline, slot.begin(&call)).await else {
                return Err(InferError::Timeout(call.timeout));
            };
            match begun {
                Begun::Answer(passing) => return Ok(passing),
                other => last = Some(other),
            }
            // With all of them tried there is nobody to wait for.
            let tried = |worker: &super::WorkerKey| want.avoid.contains(worker);
            if self.inner.desks.lock().board.serving(call.model).all(|worker| tried(&worker)) {
                break;
            }
        }
        match last {
            Some(Begun::Answer(passing) | Begun::Refused(passing)) => Ok(passing),
            Some(Begun::Failed(why)) => Err(InferError::Failed(why)),
            None => Err(InferError::NoWorker(call.model.to_owned())),
        }
    }
}

impl Slot {
    /// Sends the request and waits for the head of the answer. The slot stays taken until the answer has passed.
    async fn begin(self, call: &LiveCall<'_>) -> Begun {
        let socket = self.fleet.sockets.acquire().await.map(SemaphorePermit::forget);
        // Given back when this is dropped.
        let held = HeldSlot { slot: self, has_socket: socket.is_ok() };
        let slot = &held.slot;
        let began = Instant::now();
        let mut url = slot.worker.endpoint(call.endpoint);
        if !call.below.is_empty() {
            url.set_path(&format!("{}{}", url.path(), call.below));
        }
        let request = slot.fleet.authorized(slot.fleet.client.post(url).headers(call.headers.0.clone()));
        let request = request.header(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        // A coder in between would hold events back.
        let request = request.header(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let sent = tokio::select! {
            biased;
            sent = request.body(call.body.clone()).send() => sent,
            () = slot.abandoned.cancelled() => return Begun::Failed(slot.left().message),
        };
        let response = match sent {
            Ok(response) => response,
            Err(error) => return Begun::Failed(slot.broken(&error).message),
        };
        let code = response.status().as_u16();
        match code {
            429 | 502 | 503 => {
                if code != 502 {
                    slot.fleet.pushed_back(slot, retry_after(response.headers()), began);
                }
                Begun::Refused(held.refusal(response).await.0)
            }
            404 => {
                let (refusal, is_missing) = held.refusal(response).await;
                if is_missing { Begun::Refused(refusal) } else { Begun::Answer(refusal) }
            }
            200..=203 | 206..=299 | 400..=599 => held.passing(response, began, call.timeout).await,
            // A redirect, for instance, or one without an answer: no client of the API knows what to do with it.
            _ => {
                let location = response.headers().get(LOCATION).and_then(|to| to.to_str().ok());
                Begun::Failed(status::in_words(code, location))
            }
        }
    }
}

/// A slot with the permit for its connection.
struct HeldSlot {
    slot: Slot,
    has_socket: bool,
}

impl Drop for HeldSlot {
    fn drop(&mut self) {
        if self.has_socket {
            self.slot.fleet.sockets.add_permits(1);
        }
    }
}

impl HeldSlot {
    /// A short answer, read here, and whether it says that the model is missing.
    async fn refusal(self, mut response: Response) -> (Passing, bool) {
        let headers = Extras::of(response.headers());
        let status = response.status().as_u16();
        let mut body = Vec::new();
        let read = async {
            while let Ok(Some(piece)) = response.chunk().await {
                body.extend_from_slice(&piece[..piece.len().min(REFUSAL - body.len())]);
            }
        };
        // What has come by then will do.
        let _ = tokio::time::timeout(REFUSAL_TIME, read).await;
        let body = decoded(&response, body);
        let is_missing = status == 404 && is_missing_model(&body);
        if is_missing {
            self.slot.worker.look_at_models();
        }
        let worker = self.slot.worker.id.clone();
        let body: BoxStream<'static, _> = Box::pin(futures::stream::iter([Ok(Bytes::from(body))]));
        (Passing { worker, status, headers, body }, is_missing)
    }

    /// Passes an answer through. It holds the slot until the worker has sent all of it.
    async fn passing(self, response: Response, began: Instant, pause: Duration) -> Begun {
        let worker = self.slot.worker.id.clone();
        let (status, mut headers) = (response.status().as_u16(), Extras::of(response.headers()));
        let mut source = match Source::of(response) {
            Ok(source) => source,
            Err(unread) => return Begun::Failed(self.broke(unread, pause)),
        };
        let mut first = Bytes::new();
        if (200..300).contains(&status) {
            if !headers.is_events() {
                first = match self.beginning(&mut source, pause).await {
                    Ok(first) => first,
                    Err(why) => return Begun::Failed(why),
                };
                match Form::of(&first) {
                    Some(Form::Json) => {}
                    Some(Form::Events) => headers.name_events(),
                    None => return Begun::Failed(is_neither(status, &headers, &first)),
                }
            }
            // A worker that was held answers again.
            let _ = self.slot.tell_of_call(began, Ok(()));
        }
        let (entry, body) = passage(self.slot.fleet.options.slow_client);
        tokio::spawn(self.carry(source, first, entry, began, pause));
        Begun::Answer(Passing { worker, status, headers, body })
    }

    /// The first bytes of an answer that are not blank.
    async fn beginning(&self, source: &mut Source, pause: Duration) -> Result<Bytes, String> {
        let mut first = Bytes::new();
        while first.trim_ascii().is_empty() && first.len() <= BLANK {
            let Some(piece) = self.next(source, pause).await? else { break };
            first = if first.is_empty() { piece } else { [first, piece].concat().into() };
        }
        Ok(first)
    }

    /// Carries an answer to its client. Another task than the client's, so that a client that takes nothing can't stop it.
    async fn carry(self, mut source: Source, first: Bytes, mut entry: Entry, began: Instant, pause: Duration) {
        let slot = &self.slot;
        let mut piece = first;
        loop {
            let is_crowded = || slot.fleet.desks.lock().board.is_wanted(slot.worker.key);
            let handed = tokio::select! {
                biased;
                handed = entry.hand(piece, is_crowded) => handed,
                () = slot.abandoned.cancelled() => Err(Some(Broken::Worker(slot.left().message))),
            };
            match handed {
                Ok(()) => {}
                Err(Some(why)) => return entry.end(why),
                Err(None) => return,
            }
            let next = tokio::select! {
                biased;
                next = self.next(&mut source, pause) => next,
                () = entry.closed() => return,
            };
            piece = match next {
                Ok(Some(next)) => next,
                Ok(None) => break,
                Err(why) => return entry.end(Broken::Worker(why)),
            };
        }
        slot.worker.returned(began.elapsed());
        slot.worker.count(0);
    }

    /// The next piece of an answer; none: it is whole.
    async fn next(&self, source: &mut Source, pause: Duration) -> Result<Option<Bytes>, String> {
        tokio::select! {
            biased;
            next = tokio::time::timeout(pause, source.next()) => {
                next.unwrap_or(Err(Unread::TimedOut)).map_err(|unread| self.broke(unread, pause))
            }
            () = self.slot.abandoned.cancelled() => Err(self.slot.left().message),
        }
    }

    /// Why an answer can't be read to its end.
    fn broke(&self, unread: Unread, pause: Duration) -> String {
        match unread {
            Unread::Broken(error) => {
                if judge::own_fault(&error).is_none() {
                    self.slot.fleet.suspect(&self.slot.worker, &cause(&error));
                }
                "the connection to the worker broke while it answered".to_owned()
            }
            Unread::TimedOut => format!("the worker sent nothing for {} s", pause.as_secs()),
            Unread::Bad(why) => format!("the worker's answer can't be read: {why}"),
        }
    }
}

/// The body of a response, decoded.
struct Source {
    response: Response,
    decoder: Option<Decoder>,
    is_over: bool,
}

impl Source {
    fn of(response: Response) -> Result<Self, Unread> {
        let decoder = Decoder::of(response.headers())?;
        Ok(Self { response, decoder, is_over: false })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Unread> {
        while !self.is_over {
            let piece = self.response.chunk().await?;
            self.is_over = piece.is_none();
            let piece = match (&mut self.decoder, piece) {
                (None, piece) => piece.unwrap_or_default(),
                (Some(decoder), Some(piece)) => {
                    decoder.push(&piece)?;
                    decoder.take().into()
                }
                (decoder @ Some(_), None) => {
                    decoder.take().map(Decoder::finish).transpose()?.unwrap_or_default().into()
                }
            };
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }
}

/// What has come of a short body, decoded as far as that goes.
fn decoded(response: &Response, body: Vec<u8>) -> Vec<u8> {
    match Decoder::of(response.headers()) {
        Ok(None) => body,
        Ok(Some(mut decoder)) => {
            let _ = decoder.push(&body);
            let mut body = decoder.take();
            body.truncate(REFUSAL);
            body
        }
        // Nobody could read it.
        Err(_) => Vec::new(),
    }
}

/// The form of an answer, by its first bytes: gateways name it wrongly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Json,
    Events,
}

impl Form {
    fn of(first: &[u8]) -> Option<Self> {
        let text = first.strip_prefix(b"\xef\xbb\xbf").unwrap_or(first).trim_ascii_start();
        match text.first() {
            Some(b'{' | b'[') => Some(Self::Json),
            _ => ["data:", "event:", "id:", "retry:", ":"]
                .iter()
                .any(|field| text.starts_with(field.as_bytes()))
                .then_some(Self::Events),
        }
    }
}

/// What is said of a page in place of an answer.
fn is_neither(status: u16, headers: &Extras, first: &[u8]) -> String {
    let kind = headers.0.get(CONTENT_TYPE).map(|kind| format!(" ({})", excerpt(kind.as_bytes(), SHOWN)));
    let kind = kind.unwrap_or_default();
    let begins = match excerpt(first, SHOWN) {
        nothing if nothing.is_empty() => "it is empty".to_owned(),
        text => format!("it begins {text}"),
    };
    format!("the worker answered {status}{kind} with neither JSON nor a stream of events: {begins}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_known_by_its_first_bytes() {
        for json in ["{\"a\"", " \r\n[", "\u{feff}{"] {
            assert_eq!(Form::of(json.as_bytes()), Some(Form::Json), "{json}");
        }
        for events in ["data: {", "\n: ping", "event:x", "id: 1"] {
            assert_eq!(Form::of(events.as_bytes()), Some(Form::Events), "{events}");
        }
        for neither in ["", "  ", "<html>", "OK", "date: x"] {
            assert_eq!(Form::of(neither.as_bytes()), None, "{neither}");
        }
    }
}
