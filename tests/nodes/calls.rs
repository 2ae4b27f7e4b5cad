//! Calls by a client that knows all nodes and asks the next one when one does not answer.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tidemill::pb::{
    Batch, BatchStatus, CancelBatchRequest, CreateBatchRequest, DownloadFileRequest, FileSpec, GetBatchRequest,
    StreamResultsRequest, UploadFileRequest, WatchBatchRequest, WatchBatchesRequest, batch_event::Event,
    create_batch_request::Input, upload_file_request::Payload,
};
use tonic::{Code, Status};

use crate::{
    cluster::{Client, client},
    support::patience::HANG,
};

/// No call takes longer, but for streams; those are quiet for longer only if their node is gone.
const QUIET: Duration = Duration::from_secs(20);

/// A state as a watcher was told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub batch: String,
    pub revision: i64,
    pub sequence: i64,
    pub status: BatchStatus,
}

/// A client of all nodes. Clones take turns on them.
#[derive(Clone)]
pub struct Anybody {
    addresses: Arc<[SocketAddr]>,
    next: Arc<AtomicUsize>,
}

impl Anybody {
    pub fn new(addresses: Vec<SocketAddr>) -> Self {
        Self { addresses: addresses.into(), next: Arc::default() }
    }

    /// A connection to the next node that takes one.
    pub async fn connect(&self) -> Client {
        loop {
            let address = self.addresses[self.next.fetch_add(1, Ordering::Relaxed) % self.addresses.len()];
            if let Ok(client) = client(address).await {
                return client;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Calls until a node answers. What a client must not meet whatever breaks fails the test.
    async fn call<T, F: Future<Output = Result<T, Status>>>(&self, call: impl Fn(Client) -> F) -> T {
        loop {
            let client = self.connect().await;
            match tokio::time::timeout(QUIET, call(client)).await {
                Ok(Ok(answer)) => return answer,
                Ok(Err(status)) => assert_excusable(&status),
                Err(_) => {}
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub async fn upload(&self, text: &str, request_id: &str) -> String {
        let spec = FileSpec { filename: "in.jsonl".into(), request_id: request_id.into(), ..FileSpec::default() };
        let mut messages = vec![UploadFileRequest { payload: Some(Payload::Spec(spec)) }];
        for chunk in text.as_bytes().chunks(100_000) {
            messages.push(UploadFileRequest { payload: Some(Payload::Chunk(chunk.to_vec().into())) });
        }
        let messages = &messages;
        self.call(async |mut client: Client| client.upload_file(tokio_stream::iter(messages.clone())).await)
            .await
            .into_inner()
            .id
    }

    pub async fn create(&self, file: &str, request_id: &str) -> String {
        self.create_from(&of_file(file, request_id)).await
    }

    pub async fn create_from(&self, request: &CreateBatchRequest) -> String {
        self.call(async |mut client: Client| client.create_batch(request.clone()).await).await.into_inner().id
    }

    pub async fn get(&self, batch_id: &str) -> Batch {
        let request = GetBatchRequest { batch_id: batch_id.to_owned() };
        let request = &request;
        self.call(async |mut client: Client| client.get_batch(request.clone()).await).await.into_inner()
    }

    /// Cancels; a batch that has ended before is fine.
    pub async fn cancel(&self, batch_id: &str) {
        let request = CancelBatchRequest { batch_id: batch_id.to_owned() };
        let request = &request;
        self.call(async |mut client: Client| match client.cancel_batch(request.clone()).await {
            Err(status) if status.code() == Code::FailedPrecondition => Ok(()),
            other => other.map(|_| ()),
        })
        .await;
    }

    /// A whole file, on from where a node broke off.
    pub async fn download(&self, file_id: &str) -> Vec<u8> {
        let mut bytes: Vec<u8> = Vec::new();
        loop {
            let mut client = self.connect().await;
            let request = DownloadFileRequest { file_id: file_id.to_owned(), offset: bytes.len() as i64 };
            let mut stream = match client.download_file(request).await {
                Ok(stream) => stream.into_inner(),
                Err(status) => {
                    assert_excusable(&status);
                    continue;
                }
            };
            loop {
                match tokio::time::timeout(QUIET, stream.message()).await {
                    Ok(Ok(Some(chunk))) => {
                        assert_eq!(chunk.offset, bytes.len() as i64);
                        bytes.extend_from_slice(&chunk.data);
                    }
                    Ok(Ok(None)) => return bytes,
                    Ok(Err(status)) => {
                        assert_excusable(&status);
                        break;
                    }
                    Err(_) => break,
                }
            }
        }
    }

    /// Watches a batch to its end over all nodes: every state that it was told of.
    pub async fn watch(self, batch_id: String) -> Vec<State> {
        let mut states: Vec<State> = Vec::new();
        let mut after_revision = 0;
        loop {
            let mut client = self.connect().await;
            let request = WatchBatchRequest { batch_id: batch_id.clone(), after_revision, min_interval: None };
            let mut stream = match client.watch_batch(request).await {
                Ok(stream) => stream.into_inner(),
                Err(status) => {
                    assert_excusable(&status);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            loop {
                match tokio::time::timeout(QUIET, stream.message()).await {
                    Ok(Ok(Some(event))) => {
                        assert!(event.revision >= after_revision, "{event:?} after {after_revision}");
                        after_revision = event.revision;
                        if let Some(Event::StateChanged(batch)) = &event.event {
                            assert_eq!(batch.id, batch_id);
                            states.push(State {
                                batch: batch_id.clone(),
                                revision: event.revision,
                                sequence: event.sequence,
                                status: batch.status(),
                            });
                        }
                    }
                    Ok(Ok(None)) => return states,
                    Ok(Err(status)) => {
                        assert_excusable(&status);
                        break;
                    }
                    Err(_) => break,
                }
            }
        }
    }

    /// Follows a batch's results to its end over all nodes: how often each line came.
    pub async fn follow(self, batch_id: String) -> BTreeMap<String, usize> {
        let mut seen = BTreeMap::new();
        let mut cursor = String::new();
        loop {
            let mut client = self.connect().await;
            let request = StreamResultsRequest {
                batch_id: batch_id.clone(),
                cursor: cursor.clone(),
                follow: true,
                ..Default::default()
            };
            let mut stream = match client.stream_results(request).await {
                Ok(stream) => stream.into_inner(),
                Err(status) => {
                    assert_excusable(&status);
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            loop {
                match tokio::time::timeout(QUIET, stream.message()).await {
                    Ok(Ok(Some(result))) => {
                        *seen.entry(result.custom_id).or_default() += 1;
                        cursor = result.cursor;
                    }
                    Ok(Ok(None)) => return seen,
                    Ok(Err(status)) => {
                        assert_excusable(&status);
                        break;
                    }
                    Err(_) => break,
                }
            }
        }
    }

    /// Every state change of every batch after the sequence: until all are there, and nothing more comes for 3 s.
    pub async fn all_states(&self, mut after_sequence: i64, all: impl Fn(&[State]) -> bool) -> Vec<State> {
        let mut states = Vec::new();
        let mut client = self.connect().await;
        let request = WatchBatchesRequest { after_sequence, min_interval: None };
        let mut stream = client.watch_batches(request).await.unwrap().into_inner();
        loop {
            let patience = if all(&states) { Duration::from_secs(3) } else { HANG };
            let Ok(event) = tokio::time::timeout(patience, stream.message()).await else { break };
            let event = event.unwrap().unwrap();
            if let Some(Event::StateChanged(batch)) = event.event {
                assert!(event.sequence > after_sequence, "sequences grow");
                after_sequence = event.sequence;
                states.push(State {
                    batch: event.batch_id,
                    revision: event.revision,
                    sequence: event.sequence,
                    status: batch.status(),
                });
            }
        }
        states
    }
}

/// What creates a batch of a file.
pub fn of_file(file: &str, request_id: &str) -> CreateBatchRequest {
    CreateBatchRequest {
        input: Some(Input::InputFileId(file.to_owned())),
        request_id: request_id.to_owned(),
        ..CreateBatchRequest::default()
    }
}

/// A node or the database is away; the same call elsewhere or later works.
fn assert_excusable(status: &Status) {
    // What the transport makes of a connection that breaks in the middle of a call.
    let broken = matches!(status.code(), Code::Unknown | Code::Internal | Code::Cancelled)
        && std::error::Error::source(status).is_some();
    assert!(status.code() == Code::Unavailable || broken, "a client must not meet this: {status:?}");
}
