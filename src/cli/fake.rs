//! A server that breaks off, for the tests of what clients do then.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};
use tonic_types::{ErrorDetails, StatusExt};

use super::{Client, ClientArgs};
use crate::pb::{
    self,
    batch_service_server::{BatchService, BatchServiceServer},
    upload_file_request::Payload,
};

/// What the server was asked.
#[derive(Default)]
pub(super) struct Log {
    /// Request id and bytes of each upload.
    pub uploads: Vec<(String, usize)>,
    /// `after_revision` of each watch.
    pub watches: Vec<i64>,
    /// `offset` of each download.
    pub downloads: Vec<i64>,
    /// `cursor` of each stream of results.
    pub cursors: Vec<String>,
}

/// Serves one file and one batch.
#[derive(Clone)]
pub(super) struct Fake {
    /// The file's bytes; also the result lines.
    pub data: Bytes,
    log: Arc<Mutex<Log>>,
}

type Events<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn events<T: Send + 'static>(items: Vec<Result<T, Status>>) -> Result<Response<Events<T>>, Status> {
    Ok(Response::new(stream::iter(items).boxed()))
}

fn state(revision: i64, status: pb::BatchStatus) -> pb::BatchEvent {
    let batch = pb::Batch { id: "batch_1".into(), status: status.into(), revision, ..pb::Batch::default() };
    let event = Some(pb::batch_event::Event::StateChanged(batch));
    pb::BatchEvent { batch_id: "batch_1".into(), revision, event, ..pb::BatchEvent::default() }
}

impl Fake {
    /// Starts it.
    pub(super) async fn start(data: impl Into<Bytes>) -> (Self, String) {
        let fake = Self { data: data.into(), log: Arc::default() };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(
            Server::builder().add_service(BatchServiceServer::new(fake.clone())).serve_with_incoming(incoming),
        );
        (fake, url)
    }

    pub(super) fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap()
    }
}

/// A client of a server.
pub(super) fn client(url: &str) -> Client {
    ClientArgs { json: true, ..ClientArgs::of(url.to_owned()) }.client().unwrap()
}

/// A way to a server that is cut off once, after the server has sent so many bytes.
pub(super) async fn cut_after(server: &str, mut bytes: usize) -> String {
    let server = server.trim_start_matches("http://").to_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let mut far = TcpStream::connect(&server).await.unwrap();
            if bytes == 0 {
                tokio::spawn(async move { tokio::io::copy_bidirectional(&mut near, &mut far).await });
                continue;
            }
            let ((mut near_in, mut near_out), (mut far_in, mut far_out)) = (near.split(), far.split());
            let down = async {
                let mut buffer = vec![0; 16 * 1024];
                while bytes > 0 {
                    let count = far_in.read(&mut buffer).await.unwrap();
                    near_out.write_all(&buffer[..count]).await.unwrap();
                    bytes = bytes.saturating_sub(count);
                }
            };
            tokio::select! { () = down => {}, _ = tokio::io::copy(&mut near_in, &mut far_out) => {} }
        }
    });
    url
}

#[tonic::async_trait]
impl BatchService for Fake {
    type DownloadFileStream = Events<pb::FileChunk>;
    type WatchBatchStream = Events<pb::BatchEvent>;
    type WatchBatchesStream = Events<pb::BatchEvent>;
    type StreamResultsStream = Events<pb::BatchResult>;

    /// Breaks off the first time.
    async fn upload_file(
        &self,
        request: Request<Streaming<pb::UploadFileRequest>>,
    ) -> Result<Response<pb::File>, Status> {
        let mut messages = request.into_inner();
        let (mut spec, mut bytes) = (pb::FileSpec::default(), 0);
        while let Some(message) = messages.message().await? {
            match message.payload {
                Some(Payload::Spec(first)) => spec = first,
                Some(Payload::Chunk(chunk)) => bytes += chunk.len(),
                None => {}
            }
        }
        let mut log = self.log();
        log.uploads.push((spec.request_id, bytes));
        match log.uploads.len() {
            1 => Err(Status::unavailable("restarting")),
            _ => Ok(Response::new(pb::File { id: "file-1".into(), bytes: spec.total_bytes, ..pb::File::default() })),
        }
    }

    /// Only its size is of interest.
    async fn get_file(&self, _: Request<pb::GetFileRequest>) -> Result<Response<pb::File>, Status> {
        Ok(Response::new(pb::File { bytes: self.data.len() as i64, ..pb::File::default() }))
    }

    async fn download_file(
        &self,
        request: Request<pb::DownloadFileRequest>,
    ) -> Result<Response<Self::DownloadFileStream>, Status> {
        let from = request.into_inner().offset;
        self.log().downloads.push(from);
        let mut offset = from;
        let mut chunks = Vec::new();
        for data in self.data.slice(from as usize..).chunks(10_000) {
            chunks.push(Ok(pb::FileChunk { offset, data: Bytes::copy_from_slice(data) }));
            offset += data.len() as i64;
        }
        events(chunks)
    }

    /// Breaks off, then ends too early, then tells of the end.
    async fn watch_batch(
        &self,
        request: Request<pb::WatchBatchRequest>,
    ) -> Result<Response<Self::WatchBatchStream>, Status> {
        let mut log = self.log();
        log.watches.push(request.into_inner().after_revision);
        match log.watches.len() {
            1 => events(vec![Ok(state(3, pb::BatchStatus::InProgress)), Err(Status::unavailable("restarting"))]),
            2 => Err(Status::unavailable("restarting")),
            3 => events(vec![Ok(state(5, pb::BatchStatus::Finalizing))]),
            _ => events(vec![Ok(state(7, pb::BatchStatus::Completed))]),
        }
    }

    /// Two lines, then it breaks off.
    async fn stream_results(
        &self,
        request: Request<pb::StreamResultsRequest>,
    ) -> Result<Response<Self::StreamResultsStream>, Status> {
        let cursor = request.into_inner().cursor;
        self.log().cursors.push(cursor.clone());
        let from = cursor.parse().unwrap_or(0);
        let lines = self.data.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).enumerate().skip(from);
        let mut results: Vec<_> = lines
            .map(|(number, line)| {
                let line = Bytes::copy_from_slice(line);
                Ok(pb::BatchResult { cursor: (number + 1).to_string(), succeeded: true, line, ..Default::default() })
            })
            .collect();
        if results.len() > 2 {
            results.truncate(2);
            results.push(Err(Status::unavailable("restarting")));
        }
        events(results)
    }

    /// As bad as an upload can be.
    async fn create_batch(&self, _: Request<pb::CreateBatchRequest>) -> Result<Response<pb::Batch>, Status> {
        let mut details = ErrorDetails::new();
        for line in 1..=100 {
            details.add_bad_request_violation(format!("line {line}"), "x".repeat(300));
        }
        Err(Status::with_error_details(Code::InvalidArgument, "100 bad lines", details))
    }

    async fn delete_batch(&self, _: Request<pb::DeleteBatchRequest>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_files(&self, _: Request<pb::ListFilesRequest>) -> Result<Response<pb::ListFilesResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn delete_file(&self, _: Request<pb::DeleteFileRequest>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn get_batch(&self, _: Request<pb::GetBatchRequest>) -> Result<Response<pb::Batch>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn list_batches(
        &self,
        _: Request<pb::ListBatchesRequest>,
    ) -> Result<Response<pb::ListBatchesResponse>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn cancel_batch(&self, _: Request<pb::CancelBatchRequest>) -> Result<Response<pb::Batch>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn watch_batches(
        &self,
        _: Request<pb::WatchBatchesRequest>,
    ) -> Result<Response<Self::WatchBatchesStream>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn retry_failed_requests(
        &self,
        _: Request<pb::RetryFailedRequestsRequest>,
    ) -> Result<Response<pb::Batch>, Status> {
        Err(Status::unimplemented(""))
    }
    async fn infer(&self, _: Request<pb::InferRequest>) -> Result<Response<pb::InferResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}
