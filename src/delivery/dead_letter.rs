//! Retries by hand: one dead letter, now, once.

use super::{Webhooks, send::Sent};
use crate::{
    domain::{DeadLetterId, Scope, webhook::AttemptResult},
    store::{BeginRetry, DeadLetter, StoreError},
};

/// What came of a retry.
#[derive(Debug)]
pub struct Retried {
    /// The receiver has it.
    pub success: bool,
    /// It had been delivered before.
    pub forced: bool,
    /// What the receiver answered, if it did.
    pub http_status: Option<u16>,
    /// Why it failed.
    pub error_message: Option<String>,
    /// As it is now.
    pub dead_letter: DeadLetter,
}

/// Why nothing was sent, or nobody knows what came of it.
#[derive(Debug, thiserror::Error)]
pub enum RetryError {
    /// There is none.
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
    /// Sends a dead letter now, once, signed with the secrets valid now, under the same `webhook-id`. The same `request_id`
    /// again sends nothing and answers the same. Goes on if the caller does not wait for it.
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
        // Once sent it must be written down, also when the caller has hung up.
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
