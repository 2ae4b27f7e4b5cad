//! A request whose answer passes through while it comes, for a caller who waits: nothing of it is read here but its head.

use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use reqwest::{
    Response,
    header::{CONTENT_TYPE, HeaderValue, LOCATION},
};
use smallvec::SmallVec;
use tokio::{sync::SemaphorePermit, time::Instant};

use super::{
    Fleet, INFER_TRIES, InferError, Rank, Slot, Tenant, Want,
    dispatch::retry_after,
    extras::Extras,
    judge,
    outcome::cause,
    slots,
    status::{self, is_missing_model},
};
use crate::domain::{Endpoint, WorkerId};

/// The most bytes of a refusal that are kept while another worker is tried.
const REFUSAL: usize = 64 * 1024;
/// How long such a refusal may take to come.
const REFUSAL_TIME: Duration = Duration::from_secs(10);

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
    /// The body as it comes. An error is its end: the worker broke off, says the text.
    pub body: BoxStream<'static, Result<Bytes, String>>,
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
            200..=299 | 400..=599 => Begun::Answer(held.passing(response, began, call.timeout)),
            // A redirect, for instance: no client of the API knows what to do with it.
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
        let is_missing = status == 404 && is_missing_model(&body);
        if is_missing {
            self.slot.worker.look_at_models();
        }
        let worker = self.slot.worker.id.clone();
        let body: BoxStream<'static, _> = Box::pin(futures::stream::iter([Ok(Bytes::from(body))]));
        (Passing { worker, status, headers, body }, is_missing)
    }

    /// Passes an answer through. It holds the slot until it ends.
    fn passing(self, mut response: Response, began: Instant, pause: Duration) -> Passing {
        let worker = self.slot.worker.id.clone();
        let (status, headers) = (response.status().as_u16(), Extras::of(response.headers()));
        if (200..300).contains(&status) {
            // A worker that was held answers again.
            let _ = self.slot.tell_of_call(began, Ok(()));
        }
        let body = async_stream::stream! {
            let held = self;
            let slot = &held.slot;
            loop {
                let next = tokio::select! {
                    biased;
                    next = tokio::time::timeout(pause, response.chunk()) => next,
                    () = slot.abandoned.cancelled() => {
                        yield Err(slot.left().message);
                        return;
                    }
                };
                match next {
                    Ok(Ok(Some(piece))) => yield Ok(piece),
                    Ok(Ok(None)) => break,
                    Ok(Err(error)) => {
                        if judge::own_fault(&error).is_none() {
                            slot.fleet.suspect(&slot.worker, &cause(&error));
                        }
                        yield Err("the connection to the worker broke while it answered".to_owned());
                        return;
                    }
                    Err(_) => {
                        yield Err(format!("the worker sent nothing for {} s", pause.as_secs()));
                        return;
                    }
                }
            }
            slot.worker.returned(began.elapsed());
            slot.worker.count(0);
        };
        Passing { worker, status, headers, body: Box::pin(body) }
    }
}
