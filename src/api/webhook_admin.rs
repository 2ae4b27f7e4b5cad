//! The `WebhookAdmin` service: declared, not there yet.

use tonic::{Code, Request, Response, Status};

use super::{auth::Caller, status::error};
use crate::pb::{self, webhook_admin_server::WebhookAdmin};

/// Answers UNIMPLEMENTED.
pub(super) struct Webhooks;

fn not_yet<T>(request: &Request<T>) -> Status {
    if let Err(denied) = Caller::of(request).and_then(|caller| caller.require_admin()) {
        return denied;
    }
    error(Code::Unimplemented, "NOT_IMPLEMENTED_YET", "webhooks are not implemented yet")
}

#[tonic::async_trait]
impl WebhookAdmin for Webhooks {
    async fn list_dead_letters(
        &self,
        request: Request<pb::ListDeadLettersRequest>,
    ) -> Result<Response<pb::ListDeadLettersResponse>, Status> {
        Err(not_yet(&request))
    }

    async fn get_dead_letter(
        &self,
        request: Request<pb::GetDeadLetterRequest>,
    ) -> Result<Response<pb::DeadLetter>, Status> {
        Err(not_yet(&request))
    }

    async fn retry_dead_letter(
        &self,
        request: Request<pb::RetryDeadLetterRequest>,
    ) -> Result<Response<pb::RetryDeadLetterResponse>, Status> {
        Err(not_yet(&request))
    }

    async fn delete_dead_letter(&self, request: Request<pb::DeleteDeadLetterRequest>) -> Result<Response<()>, Status> {
        Err(not_yet(&request))
    }

    async fn retry_dead_letters(
        &self,
        request: Request<pb::RetryDeadLettersRequest>,
    ) -> Result<Response<pb::RetryDeadLettersResponse>, Status> {
        Err(not_yet(&request))
    }

    async fn purge_dead_letters(
        &self,
        request: Request<pb::PurgeDeadLettersRequest>,
    ) -> Result<Response<pb::PurgeDeadLettersResponse>, Status> {
        Err(not_yet(&request))
    }
}
