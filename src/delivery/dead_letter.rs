//! Retries one dead letter by hand, once.

use super::{Webhooks, send::Sent};
use crate::{
    domain::{DeadLetterId, Scope, webhook::AttemptResult},
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
pub enum RetryError {
    /// There is no such dead letter.
    #[error("there is no such dead letter")]
    NotFound,
    /// An earlier retry has delivered it.
    #[error("an earlier retry has delivered this dead letter; force=true sends it again all the same")]
    AlreadyDelivered,
    /// Another retry is running.
    #[error("somebody else is retrying this dead letter")]
    Busy,
    /// Its endpoint was deleted.
    #[error("the webhook endpoint of this dead letter was deleted, and with it the address and the secret")]
    EndpointDeleted,
    /// The attempt took longer than its lease, or the dead letter was deleted meanwhile.
    #[error("the retry was sent, but its result came too late to be written down")]
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
    /// [`RetryError`].
    pub async fn retry(
        &self,
        id: DeadLetterId,
        scope: Scope,
        force: bool,
        request_id: Option<String>,
    ) -> Result<Retried, RetryError> {
        let webhooks = self.clone();
        let retry = async move { webhooks.retry_here(&id, &scope, force, request_id.as_deref()).await };
        // Once sent, the attempt must be recorded even if the caller has disconnected.
        tokio::spawn(retry).await.map_err(|_| RetryError::Stopped)?
    }

    pub(super) async fn retry_here(
        &self,
        id: &DeadLetterId,
        scope: &Scope,
        force: bool,
        request_id: Option<&str>,
    ) -> Result<Retried, RetryError> {
        self.take_over().await;
        let (claim, forced) = match self.inner.store.begin_retry(id, scope, force, request_id).await? {
            BeginRetry::Started { claim, forced } => (claim, forced),
            BeginRetry::Repeated(dead_letter, attempt) => {
                return Ok(Retried {
                    success: attempt.outcome == "succeeded",
                    forced: attempt.forced,
                    http_status: attempt.http_status,
                    error_message: attempt.error_message,
                    dead_letter: *dead_letter,
                });
            }
            BeginRetry::AlreadyDelivered => return Err(RetryError::AlreadyDelivered),
            BeginRetry::Busy => return Err(RetryError::Busy),
            BeginRetry::NotFound => return Err(RetryError::NotFound),
            BeginRetry::EndpointDeleted => return Err(RetryError::EndpointDeleted),
        };
        let Sent { result, .. } = self.send(&claim).await;
        let dead_letter = self.inner.store.finish_retry(id, &claim, &result).await?.ok_or(RetryError::LeaseLost)?;
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
