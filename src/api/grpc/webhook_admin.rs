//! The `WebhookAdmin` service.

use prost::Message;
use tonic::{Request, Response, Status};

use super::{
    gate::caller_of,
    read::{self, delivery_state, micros, span},
    webhooks::{dead_letter, delivery, endpoint, retry_job},
};
use crate::{
    access::Caller,
    pb::{self, webhook_admin_server::WebhookAdmin},
    service::{
        Service,
        webhooks::{DeadLettersWanted, DeliveriesWanted},
    },
};

type Reply<T> = Result<Response<T>, Status>;

/// Dead letters, deliveries, endpoints.
pub(super) struct Hooks {
    pub(super) service: Service,
}

fn open<T>(request: Request<T>) -> Result<(Caller, T), Status> {
    Ok((caller_of(&request)?, request.into_inner()))
}

#[tonic::async_trait]
impl WebhookAdmin for Hooks {
    async fn list_dead_letters(
        &self,
        request: Request<pb::ListDeadLettersRequest>,
    ) -> Reply<pb::ListDeadLettersResponse> {
        let (caller, request) = open(request)?;
        let wanted = DeadLettersWanted {
            batch_id: request.batch_id,
            event: request.event,
            url_host: request.url_host,
            delivered: request.delivered,
            created_from: micros(request.created_from),
            created_before: micros(request.created_before),
        };
        let found = self.service.dead_letters(&caller, wanted, request.page_size, &request.page_token).await?;
        let items = found.items.into_iter().map(|one| dead_letter(one, Vec::new())).collect();
        let (dead_letters, next_page_token) =
            found.page.finish(items, Message::encoded_len, |one: &pb::DeadLetter| &one.id);
        Ok(Response::new(pb::ListDeadLettersResponse { dead_letters, next_page_token }))
    }

    async fn get_dead_letter(&self, request: Request<pb::GetDeadLetterRequest>) -> Reply<pb::DeadLetter> {
        let (caller, request) = open(request)?;
        let (found, attempts) = self.service.dead_letter(&caller, request.dead_letter_id).await?;
        Ok(Response::new(dead_letter(found, attempts)))
    }

    async fn retry_dead_letter(
        &self,
        request: Request<pb::RetryDeadLetterRequest>,
    ) -> Reply<pb::RetryDeadLetterResponse> {
        let (caller, request) = open(request)?;
        let pb::RetryDeadLetterRequest { dead_letter_id, force, request_id } = request;
        let retried = self.service.retry_dead_letter(&caller, dead_letter_id, force, request_id).await?;
        Ok(Response::new(pb::RetryDeadLetterResponse {
            retry_success: retried.success,
            forced: retried.forced,
            http_status: retried.http_status.map(i32::from).unwrap_or_default(),
            error_message: retried.error_message.unwrap_or_default(),
            dead_letter: Some(dead_letter(retried.dead_letter, Vec::new())),
        }))
    }

    async fn delete_dead_letter(&self, request: Request<pb::DeleteDeadLetterRequest>) -> Reply<()> {
        let (caller, request) = open(request)?;
        Ok(Response::new(self.service.delete_dead_letter(&caller, request.dead_letter_id).await?))
    }

    async fn retry_dead_letters(
        &self,
        request: Request<pb::RetryDeadLettersRequest>,
    ) -> Reply<pb::RetryDeadLettersResponse> {
        let (caller, request) = open(request)?;
        let wanted = DeadLettersWanted {
            batch_id: request.batch_id,
            event: request.event,
            url_host: request.url_host,
            delivered: None,
            created_from: micros(request.created_from),
            created_before: micros(request.created_before),
        };
        let retried = self.service.retry_dead_letters(&caller, wanted, request.dry_run).await?;
        let job = retried.job.map(retry_job);
        Ok(Response::new(pb::RetryDeadLettersResponse { matched: retried.matched, job }))
    }

    async fn purge_dead_letters(
        &self,
        request: Request<pb::PurgeDeadLettersRequest>,
    ) -> Reply<pb::PurgeDeadLettersResponse> {
        let (caller, request) = open(request)?;
        let purged = self.service.purge_dead_letters(&caller, span(request.older_than)).await?;
        Ok(Response::new(pb::PurgeDeadLettersResponse { purged: i64::try_from(purged).unwrap_or(i64::MAX) }))
    }

    async fn get_retry_job(&self, request: Request<pb::GetRetryJobRequest>) -> Reply<pb::RetryJob> {
        let (caller, request) = open(request)?;
        Ok(Response::new(retry_job(self.service.retry_job(&caller, request.retry_job_id).await?)))
    }

    async fn list_retry_jobs(&self, request: Request<pb::ListRetryJobsRequest>) -> Reply<pb::ListRetryJobsResponse> {
        let (caller, request) = open(request)?;
        let found = self.service.retry_jobs(&caller, request.page_size, &request.page_token).await?;
        let items = found.items.into_iter().map(retry_job).collect();
        let (retry_jobs, next_page_token) =
            found.page.finish(items, Message::encoded_len, |one: &pb::RetryJob| &one.id);
        Ok(Response::new(pb::ListRetryJobsResponse { retry_jobs, next_page_token }))
    }

    async fn cancel_retry_job(&self, request: Request<pb::CancelRetryJobRequest>) -> Reply<pb::RetryJob> {
        let (caller, request) = open(request)?;
        Ok(Response::new(retry_job(self.service.cancel_retry_job(&caller, request.retry_job_id).await?)))
    }

    async fn list_deliveries(&self, request: Request<pb::ListDeliveriesRequest>) -> Reply<pb::ListDeliveriesResponse> {
        let (caller, request) = open(request)?;
        let wanted = DeliveriesWanted {
            batch_id: request.batch_id,
            endpoint_id: request.endpoint_id,
            event: request.event,
            state: delivery_state(request.state),
        };
        let found = self.service.deliveries(&caller, wanted, request.page_size, &request.page_token).await?;
        let items = found.items.into_iter().map(|one| delivery(one, None)).collect();
        let (deliveries, next_page_token) =
            found.page.finish(items, Message::encoded_len, |one: &pb::Delivery| &one.id);
        Ok(Response::new(pb::ListDeliveriesResponse { deliveries, next_page_token }))
    }

    async fn get_delivery(&self, request: Request<pb::GetDeliveryRequest>) -> Reply<pb::Delivery> {
        let (caller, request) = open(request)?;
        let (found, attempts) = self.service.delivery(&caller, request.delivery_id).await?;
        Ok(Response::new(delivery(found, Some(attempts))))
    }

    async fn create_endpoint(&self, request: Request<pb::CreateEndpointRequest>) -> Reply<pb::CreateEndpointResponse> {
        let (caller, request) = open(request)?;
        let (made, secret) = self.service.create_endpoint(&caller, read::endpoint(request)).await?;
        Ok(Response::new(pb::CreateEndpointResponse {
            endpoint: Some(endpoint(made, &self.service)),
            secret: secret.expose().to_owned(),
        }))
    }

    async fn get_endpoint(&self, request: Request<pb::GetEndpointRequest>) -> Reply<pb::WebhookEndpoint> {
        let (caller, request) = open(request)?;
        Ok(Response::new(endpoint(self.service.endpoint(&caller, request.endpoint_id).await?, &self.service)))
    }

    async fn list_endpoints(&self, request: Request<pb::ListEndpointsRequest>) -> Reply<pb::ListEndpointsResponse> {
        let (caller, request) = open(request)?;
        let found = self.service.endpoints(&caller, request.page_size, &request.page_token).await?;
        let items = found.items.into_iter().map(|one| endpoint(one, &self.service)).collect();
        let (endpoints, next_page_token) =
            found.page.finish(items, Message::encoded_len, |one: &pb::WebhookEndpoint| &one.id);
        Ok(Response::new(pb::ListEndpointsResponse { endpoints, next_page_token }))
    }

    async fn update_endpoint(&self, request: Request<pb::UpdateEndpointRequest>) -> Reply<pb::WebhookEndpoint> {
        let (caller, request) = open(request)?;
        let (id, change) = read::update_endpoint(request);
        Ok(Response::new(endpoint(self.service.update_endpoint(&caller, id, change).await?, &self.service)))
    }

    async fn delete_endpoint(&self, request: Request<pb::DeleteEndpointRequest>) -> Reply<()> {
        let (caller, request) = open(request)?;
        Ok(Response::new(self.service.delete_endpoint(&caller, request.endpoint_id).await?))
    }

    async fn rotate_secret(&self, request: Request<pb::RotateSecretRequest>) -> Reply<pb::RotateSecretResponse> {
        let (caller, request) = open(request)?;
        let pb::RotateSecretRequest { endpoint_id, secret, overlap } = request;
        let (changed, secret) = self.service.rotate_secret(&caller, endpoint_id, secret, span(overlap)).await?;
        Ok(Response::new(pb::RotateSecretResponse {
            endpoint: Some(endpoint(changed, &self.service)),
            secret: secret.expose().to_owned(),
        }))
    }

    async fn send_test_event(&self, request: Request<pb::SendTestEventRequest>) -> Reply<pb::SendTestEventResponse> {
        let (caller, request) = open(request)?;
        let tested = self.service.test_endpoint(&caller, request.endpoint_id).await?;
        let failed = tested.result.error;
        Ok(Response::new(pb::SendTestEventResponse {
            success: failed.is_none(),
            http_status: tested.result.http_status.map(i32::from).unwrap_or_default(),
            error_kind: failed.as_ref().map(|error| error.kind.as_str().to_owned()).unwrap_or_default(),
            error_message: failed.map(|error| error.message).unwrap_or_default(),
            response_excerpt: tested.result.response_excerpt.unwrap_or_default(),
            delivery_id: tested.claim.id.into_string(),
        }))
    }
}
