//! The `BatchService`.

use futures::{StreamExt, stream::BoxStream};
use prost::Message;
use tonic::{Request, Response, Status, Streaming};

use super::{
    convert,
    gate::{account_of, caller_of},
    read::{self, span},
    upload::upload,
};
use crate::{
    access::{Caller, Received},
    api::{LONGEST_MESSAGE, MESSAGE_LIMIT},
    pb::{self, batch_service_server::BatchService},
    service::{Code, Service, ServiceError, files::ListFiles},
};

/// Files, batches, live progress and results.
pub(super) struct Batches {
    pub(super) service: Service,
}

type Reply<T> = Result<Response<T>, Status>;
type Stream<T> = BoxStream<'static, Result<T, Status>>;

fn open<T>(request: Request<T>) -> Result<(Caller, T), Status> {
    Ok((caller_of(&request)?, request.into_inner()))
}

#[tonic::async_trait]
impl BatchService for Batches {
    type DownloadFileStream = Stream<pb::FileChunk>;
    type WatchBatchStream = Stream<pb::BatchEvent>;
    type WatchBatchesStream = Stream<pb::BatchEvent>;
    type StreamResultsStream = Stream<pb::BatchResult>;

    async fn upload_file(&self, request: Request<Streaming<pb::UploadFileRequest>>) -> Reply<pb::File> {
        let received = request.extensions().get::<Received>().cloned().unwrap_or_default();
        let account = account_of(&request)?;
        let (caller, messages) = open(request)?;
        upload(&self.service, &caller, &account, messages, received).await.map(Response::new)
    }

    async fn get_file(&self, request: Request<pb::GetFileRequest>) -> Reply<pb::File> {
        let (caller, request) = open(request)?;
        Ok(Response::new(convert::file(self.service.file(&caller, &request.file_id).await?)))
    }

    async fn list_files(&self, request: Request<pb::ListFilesRequest>) -> Reply<pb::ListFilesResponse> {
        let (caller, request) = open(request)?;
        let pb::ListFilesRequest { page_size, page_token, purpose } = request;
        let found = self.service.files(&caller, ListFiles { purpose, page_size, page_token }).await?;
        let files = found.items.into_iter().map(convert::file).collect();
        let (files, next_page_token) = found.page.finish(files, Message::encoded_len, |file: &pb::File| &file.id);
        Ok(Response::new(pb::ListFilesResponse { files, next_page_token }))
    }

    async fn delete_file(&self, request: Request<pb::DeleteFileRequest>) -> Reply<()> {
        let (caller, request) = open(request)?;
        Ok(Response::new(self.service.delete_file(&caller, &request.file_id).await?))
    }

    async fn download_file(&self, request: Request<pb::DownloadFileRequest>) -> Reply<Self::DownloadFileStream> {
        let (caller, request) = open(request)?;
        let file = self.service.file_from(&caller, &request.file_id, request.offset).await?;
        let mut offset = request.offset;
        let pieces = self.service.read_file(&file, offset).await?;
        let chunks = pieces.map(move |piece| {
            let data = piece?;
            let at = offset;
            offset += i64::try_from(data.len()).unwrap_or(0);
            Ok(pb::FileChunk { offset: at, data })
        });
        Ok(Response::new(chunks.boxed()))
    }

    async fn create_batch(&self, request: Request<pb::CreateBatchRequest>) -> Reply<pb::Batch> {
        let account = account_of(&request)?;
        let (caller, request) = open(request)?;
        let made = self.service.create_batch(&caller, &account, read::create_batch(request)).await?;
        Ok(Response::new(convert::shown(made, &self.service)))
    }

    async fn get_batch(&self, request: Request<pb::GetBatchRequest>) -> Reply<pb::Batch> {
        let (caller, request) = open(request)?;
        let found = self.service.batch(&caller, &request.batch_id).await?;
        Ok(Response::new(convert::shown(found, &self.service)))
    }

    async fn list_batches(&self, request: Request<pb::ListBatchesRequest>) -> Reply<pb::ListBatchesResponse> {
        let (caller, request) = open(request)?;
        let found = self.service.batches(&caller, read::list_batches(request)).await?;
        let batches = found.items.into_iter().map(|one| convert::shown(one, &self.service)).collect();
        let (batches, next_page_token) =
            found.page.finish(batches, Message::encoded_len, |batch: &pb::Batch| &batch.id);
        Ok(Response::new(pb::ListBatchesResponse { batches, next_page_token }))
    }

    async fn cancel_batch(&self, request: Request<pb::CancelBatchRequest>) -> Reply<pb::Batch> {
        let (caller, request) = open(request)?;
        let cancelled = self.service.cancel_batch(&caller, &request.batch_id).await?;
        Ok(Response::new(convert::shown(cancelled, &self.service)))
    }

    async fn delete_batch(&self, request: Request<pb::DeleteBatchRequest>) -> Reply<()> {
        let (caller, request) = open(request)?;
        Ok(Response::new(self.service.delete_batch(&caller, &request.batch_id).await?))
    }

    async fn watch_batch(&self, request: Request<pb::WatchBatchRequest>) -> Reply<Self::WatchBatchStream> {
        let (caller, request) = open(request)?;
        let pb::WatchBatchRequest { batch_id, after_revision, min_interval } = request;
        let events = self.service.watch_batch(&caller, &batch_id, after_revision, span(min_interval)).await?;
        let service = self.service.clone();
        Ok(Response::new(events.map(move |event| Ok(convert::event(event?, &service))).boxed()))
    }

    async fn watch_batches(&self, request: Request<pb::WatchBatchesRequest>) -> Reply<Self::WatchBatchesStream> {
        let (caller, request) = open(request)?;
        let events = self.service.watch_batches(&caller, request.after_sequence, span(request.min_interval)).await?;
        let service = self.service.clone();
        Ok(Response::new(events.map(move |event| Ok(convert::event(event?, &service))).boxed()))
    }

    async fn stream_results(&self, request: Request<pb::StreamResultsRequest>) -> Reply<Self::StreamResultsStream> {
        let (caller, request) = open(request)?;
        let pb::StreamResultsRequest { batch_id, cursor, follow, max_message_bytes } = request;
        let most = usize::try_from(max_message_bytes).unwrap_or(0).clamp(MESSAGE_LIMIT, LONGEST_MESSAGE);
        let lines = self.service.results(&caller, &batch_id, &cursor, follow).await?;
        // A line that does not fit into a message is the last one of its stream.
        let lines = async_stream::try_stream! {
            for await line in lines {
                yield convert::result(line?, most)?;
            }
        };
        Ok(Response::new(lines.boxed()))
    }

    async fn retry_failed_requests(&self, request: Request<pb::RetryFailedRequestsRequest>) -> Reply<pb::Batch> {
        let account = account_of(&request)?;
        let (caller, request) = open(request)?;
        let pb::RetryFailedRequestsRequest { batch_id, completion_window, request_id } = request;
        let window = span(completion_window);
        let made = self.service.retry_failed(&caller, &account, &batch_id, window, request_id).await?;
        Ok(Response::new(convert::shown(made, &self.service)))
    }

    async fn infer(&self, request: Request<pb::InferRequest>) -> Reply<pb::InferResponse> {
        let deadline = read::deadline(request.metadata());
        let account = account_of(&request)?;
        let (caller, request) = open(request)?;
        let answer = self.service.infer(&caller, &account, &request.endpoint, request.body, deadline).await?;
        if answer.body.len() > MESSAGE_LIMIT - 4_096 {
            let message = format!("the answer is {} bytes long, more than a message can carry", answer.body.len());
            return Err(ServiceError::new(Code::ResourceExhausted, "ANSWER_TOO_LARGE", message).into());
        }
        Ok(Response::new(pb::InferResponse {
            status_code: answer.status.into(),
            body: answer.body,
            worker_id: answer.worker.into_string(),
        }))
    }
}
