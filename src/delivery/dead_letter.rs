//! Retries one dead letter by hand, once.

use super::{Webhooks, send::Sent};
use crate::{
    domain::{
        DeadLetterId, Scope,
        webhook::{AttemptOutcome, AttemptResult},
    },
    store::{BeginRetry, DeadLetter, StoreError},
};

/// The outcome of a retry.
#[derive(Debug)]
pub struct Retried {
    /// Whether the receiver accepted it.
    pub success: bool,
    /// Whether it had been delivered before.
    pub forced: bool,
    /// The receiver's HTTP status. `None` if it did not answer.
    pub http_status: Option<u16>,
    /// Why it failed.
    pub error_message: Option<String>,
    /// The dead letter after the retry.
    pub dead_letter: DeadLetter,
}

/// Why nothing was sent, or the outcome is not known.
#[derive(Debug, thiserror::Error)]
pub enum DeadLetterRetryError {
    /// There is no such dead letter.
    #[error("there is no such dead letter")]
    NotFound,
    /// An earlier retry has delivered it.
    #[error("an earlier retry has delivered this dead letter; force=true sends it again anyway")]
    AlreadyDelivered,
    /// Another retry is running.
    #[error("another retry of this dead letter is running")]
    Busy,
    /// Its endpoint was deleted.
    #[error("the webhook endpoint of this dead letter was deleted, and with it the address and the secret")]
    EndpointDeleted,
    /// The attempt took longer than its lease, or the dead letter was deleted meanwhile.
    #[error("the retry was sent, but its result came too late to be recorded")]
    LeaseLost,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The server is stopping.
    #[error("the server stopped during the retry")]
    Stopped,
}

impl Webhooks {
    /// Sends a dead letter once, signed with the secrets valid now, under the same `webhook-id`. A repeated call with
    /// the same `request_id` sends nothing and returns the same outcome. Continues even if the caller stops waiting.
    ///
    /// # Errors
    /// [`DeadLetterRetryError`].
    pub async fn retry(
        &self,
        id: DeadLetterId,
        scope: Scope,
        force: bool,
        request_id: Option<String>,
    ) -> Result<Retried, DeadLetterRetryError> {
        let webhooks = self.clone();
        let retry = async move { webhooks.retry_here(&id, &scope, force, request_id.as_deref()).await };
        // Once sent, the attempt must be recorded even if the caller has disconnected.
        tokio::spawn(retry).await.map_err(|_| DeadLetterRetryError::Stopped)?
    }

    pub(super) async fn retry_here(
        &self,
        id: &DeadLetterId,
        scope: &Scope,
        force: bool,
        request_id: Option<&str>,
    ) -> Result<Retried, DeadLetterRetryError> {
        self.take_over().await;
        let (claim, forced) = match self.inner.store.begin_retry(id, scope, force, request_id).await? {
            BeginRetry::Started { claim, forced } => (claim, forced),
            BeginRetry::Repeated(dead_letter, attempt) => {
                return Ok(Retried {
                    success: attempt.outcome == AttemptOutcome::Succeeded,
                    forced: attempt.forced,
                    http_status: attempt.http_status,
                    error_message: attempt.error_message,
                    dead_letter: *dead_letter,
                });
            }
            BeginRetry::AlreadyDelivered => return Err(DeadLetterRetryError::AlreadyDelivered),
            BeginRetry::Busy => return Err(DeadLetterRetryError::Busy),
            BeginRetry::NotFound => return Err(DeadLetterRetryError::NotFound),
            BeginRetry::EndpointDeleted => return Err(DeadLetterRetryError::EndpointDeleted),
        };
        let Sent { result, .. } = self.send(&claim).await;
        let dead_letter =
            self.inner.store.finish_retry(id, &claim, &result).await?.ok_or(DeadLetterRetryError::LeaseLost)?;
        let AttemptResult { error, http_status, .. } = result;
        Ok(Retried {
            success: error.is_none(),
            forced,
            http_status,
            error_message: error.map(|error| error.message),
            dead_letter,
        })
    }
}
