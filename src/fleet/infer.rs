//! One request at once, whose whole answer its caller waits for.

use bytes::Bytes;
use smallvec::SmallVec;
use tokio::time::Instant;

use super::{
    Answer, Call, Extras, Failure, FailureKind, Fleet, INFER_TRIES, InferError, Rank, Tenant, Want, live::LiveCall,
    slots,
};
use crate::domain::WorkerId;

/// An answer to [`Fleet::infer`].
#[derive(Clone, Debug)]
pub struct Inferred {
    /// The worker that answered.
    pub worker: WorkerId,
    /// Its HTTP status.
    pub status: u16,
    /// Its body, byte for byte.
    pub body: Bytes,
    /// What of its headers a client needs.
    pub extras: Extras,
}

impl Fleet {
    /// Runs one request at once, ahead of all batches. Calls of several tenants share the slots. The whole answer has to come
    /// within the call's timeout. It counts against the memory for answers while it comes.
    ///
    /// # Errors
    /// [`InferError`].
    pub async fn infer(&self, tenant: Tenant, of: LiveCall<'_>) -> Result<Inferred, InferError> {
        let LiveCall { endpoint, model, timeout, .. } = of;
        let deadline = Instant::now() + timeout;
        let rank = Rank::interactive().of(tenant);
        let mut want = Want { model: model.into(), rank, avoid: SmallVec::new(), alone: false };
        let mut last = None;
        while want.avoid.len() < INFER_TRIES {
            if self.capacity(model) == 0 {
                return Err(InferError::NoWorker(model.to_owned()));
            }
            let mut call = slots::Call::new(self.inner.clone(), want.clone());
            let Ok(Some(slot)) = tokio::time::timeout_at(deadline, call.slot()).await else {
                return Err(InferError::Timeout(timeout));
            };
            let at = Instant::now();
            let left = deadline.saturating_duration_since(at);
            let call = Call {
                endpoint,
                model,
                body: of.body.clone(),
                priority: None,
                timeout: left,
                expected: 0,
                extras: of.headers.clone(),
            };
            let Ok(sent) = tokio::time::timeout_at(deadline, slot.send(call)).await else {
                return Err(InferError::Timeout(timeout));
            };
            let sent = match slot.tell_of_call(at, sent) {
                Err(Failure { answer: Some(answer), is_doubtful: true, .. }) => Ok(*answer),
                sent => sent,
            };
            match sent {
                Ok(answer) => {
                    slot.worker.count(0);
                    return Ok(inferred(slot.worker.id.clone(), answer));
                }
                Err(failure) if failure.kind == FailureKind::Timeout => return Err(InferError::Timeout(timeout)),
                Err(failure) => {
                    want.avoid.push(failure.worker);
                    last = Some((slot.worker.id.clone(), failure));
                }
            }
        }
        match last {
            // After all tries, a worker's error is an answer too, if its status says that it is one.
            Some((worker, Failure { answer: Some(answer), .. })) if answer.is_error() => Ok(inferred(worker, *answer)),
            Some((_, failure)) => Err(InferError::Failed(failure.message)),
            None => Err(InferError::NoWorker(model.to_owned())),
        }
    }
}

fn inferred(worker: WorkerId, answer: Answer) -> Inferred {
    Inferred { worker, status: answer.status, body: answer.body, extras: answer.extras }
}
