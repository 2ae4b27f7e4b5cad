//! The `BatchService`: which call goes where.

use std::sync::Arc;

use futures::stream::BoxStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{Services, files::Incoming, gate::caller_of};
use crate::{
    access::{Account, Caller, Limiter, Received, Tokens},
    domain::Weights,
    pb::{self, batch_service_server::BatchService},
};

/// Files, batches, live progress and results.
pub(super) struct Api {
    pub(super) services: Services,
    /// How much one caller may ask.
    pub(super) limits: Arc<Limiter>,
    /// How large the callers' shares of the workers are.
    pub(super) weights: Weights,
    /// Ends streams that would not end by themselves.
    pub(super) shutdown: CancellationToken,
}

impl Api {
    pub(super) fn new(
        services: Services,
        tokens: Option<&Tokens>,
        limits: Arc<Limiter>,
        shutdown: CancellationToken,
    ) -> Self {
        Self { services, limits, weights: tokens.map(Tokens::weights).unwrap_or_default(), shutdown }
    }
}

type Reply<T> = Result<Response<T>, Status>;
type Events<T> = BoxStream<'static, Result<T, Status>>;

fn open<T>(request: Request<T>) -> Result<(Caller, T), Status> {
    Ok((caller_of(&request)?, request.into_inner()))
}

/// Whom the request counts for. Every request that passes the gate has one.
fn account<T>(request: &Request<T>) -> Result<Account, Status> {
    let account = request.extensions().get::<Account>().cloned();
    account.map_or_else(|| Ok(Account::of(&caller_of(request)?, None)), Ok)
}

#[tonic::async_trait]
impl BatchService for Api {
    type DownloadFileStream = Events<pb::FileChunk>;
    type WatchBatchStream = Events<pb::BatchEvent>;
    type WatchBatchesStream = Events<pb::BatchEvent>;
    type StreamResultsStream = Events<pb::BatchResult>;

    async fn upload_file(&self, request: Request<Streaming<pb::UploadFileRequest>>) -> Reply<pb::File> {
        let received = request.extensions().get::<Received>().cloned().unwrap_or_default();
        let account = account(&request)?;
        let (caller, messages) = open(request)?;
        self.upload(&caller, &account, Incoming::new(messages, received)).await.map(Response::new)
    }

    async fn get_file(&self, request: Request<pb::GetFileRequest>) -> Reply<pb::File> {
        let (caller, request) = open(request)?;
        self.file(&caller, &request).await.map(Response::new)
    }

    async fn list_files(&self, request: Request<pb::ListFilesRequest>) -> Reply<pb::ListFilesResponse> {
        let (caller, request) = open(request)?;
        self.files(&caller, request).await.map(Response::new)
    }

    async fn delete_file(&self, request: Request<pb::DeleteFileRequest>) -> Reply<()> {
        let (caller, request) = open(request)?;
        self.remove_file(&caller, &request).await.map(Response::new)
    }

    async fn download_file(&self, request: Request<pb::DownloadFileRequest>) -> Reply<Self::DownloadFileStream> {
        let (caller, request) = open(request)?;
        self.download(&caller, &request).await.map(Response::new)
    }

    async fn create_batch(&self, request: Request<pb::CreateBatchRequest>) -> Reply<pb::Batch> {
        let account = account(&request)?;
        let (caller, request) = open(request)?;
        self.create(&caller, &account, request).await.map(Response::new)
    }

    async fn get_batch(&self, request: Request<pb::GetBatchRequest>) -> Reply<pb::Batch> {
        let (caller, request) = open(request)?;
        self.batch(&caller, &request).await.map(Response::new)
    }

    async fn list_batches(&self, request: Request<pb::ListBatchesRequest>) -> Reply<pb::ListBatchesResponse> {
        let (caller, request) = open(request)?;
        self.batches(&caller, request).await.map(Response::new)
    }

    async fn cancel_batch(&self, request: Request<pb::CancelBatchRequest>) -> Reply<pb::Batch> {
        let (caller, request) = open(request)?;
        self.cancel(&caller, &request).await.map(Response::new)
    }

    async fn watch_batch(&self, request: Request<pb::WatchBatchRequest>) -> Reply<Self::WatchBatchStream> {
        let (caller, request) = open(request)?;
        self.watch_one(&caller, &request).await.map(Response::new)
    }

    async fn watch_batches(&self, request: Request<pb::WatchBatchesRequest>) -> Reply<Self::WatchBatchesStream> {
        let (caller, request) = open(request)?;
        self.watch_all(&caller, &request).await.map(Response::new)
    }

    async fn stream_results(&self, request: Request<pb::StreamResultsRequest>) -> Reply<Self::StreamResultsStream> {
        let (caller, request) = open(request)?;
        self.results(&caller, &request).await.map(Response::new)
    }

    async fn retry_failed_requests(&self, request: Request<pb::RetryFailedRequestsRequest>) -> Reply<pb::Batch> {
        let account = account(&request)?;
        let (caller, request) = open(request)?;
        self.retry_failed(&caller, &account, request).await.map(Response::new)
    }

    async fn infer(&self, request: Request<pb::InferRequest>) -> Reply<pb::InferResponse> {
        let deadline = super::batches::deadline(request.metadata());
        let account = account(&request)?;
        let (caller, request) = open(request)?;
        self.run_now(&caller, &account, request, deadline).await.map(Response::new)
    }
}
