//! A server on a port of its own, and clients of it.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use tidemill::{
    access::{CallerLimits, Tokens, hash_token},
    api::{ServeError, ServerOptions, serve},
    blobs::Blobs,
    delivery::{
        Options, Webhooks,
        egress::{Guard, Policy},
        secrets::Vault,
    },
    domain::{BatchId, Epoch, LineSet, NodeId, Scope, SegmentRef, TokenUsage},
    fleet::{Fleet, FleetOptions, InFlight},
    ingest::{Ingest, Limits},
    pb::{
        self, batch_service_client::BatchServiceClient, webhook_admin_client::WebhookAdminClient,
        worker_admin_client::WorkerAdminClient,
    },
    progress::Hub,
    results::Reader,
    scheduler::{Stages, Troubles},
    service::{Parts, Service},
    store::{Commit, FinalObject, Store},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{
    Code, Request, Status,
    metadata::MetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;

async fn no_workers(store: &Store, shutdown: &CancellationToken) -> Fleet {
    let slow_client = Duration::from_millis(300);
    let options = FleetOptions { limit: InFlight::Fixed(1), slow_client, ..FleetOptions::default() };
    Fleet::start(store.clone(), options, &TaskTracker::new(), shutdown.clone()).await.unwrap()
}

pub struct Server {
    pub address: SocketAddr,
    pub store: Store,
    pub blobs: Blobs,
    pub folder: tempfile::TempDir,
    pub shutdown: CancellationToken,
    pub running: JoinHandle<Result<(), ServeError>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Sends a token with every call.
#[derive(Clone)]
pub struct Bearer(Option<&'static str>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = self.0 {
            let value = MetadataValue::try_from(format!("Bearer {token}")).unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

type Transport = InterceptedService<Channel, Bearer>;

impl Server {
    pub async fn start() -> Self {
        Self::with(ServerOptions { drain_timeout: Duration::from_secs(2), ..ServerOptions::default() }).await
    }

    /// With the tokens "root" (admin), "ana" and "bob" (submit).
    pub async fn guarded() -> Self {
        let [root, ana, bob] = ["root", "ana", "bob"].map(hash_token);
        let text = format!("root admin {root}\nana submit {ana}\nbob submit {bob}\n");
        let tokens = Some(Tokens::parse(&text).unwrap());
        Self::with(ServerOptions { tokens, ..ServerOptions::default() }).await
    }

    pub async fn with(options: ServerOptions) -> Self {
        Self::with_blobs(options, |folder| Blobs::directory(&folder.join("blobs")).unwrap()).await
    }

    pub async fn with_blobs(options: ServerOptions, blobs: impl FnOnce(&std::path::Path) -> Blobs) -> Self {
        Self::build(options, CallerLimits::default(), blobs).await
    }

    pub async fn limited(limits: CallerLimits, options: ServerOptions) -> Self {
        Self::build(options, limits, |folder| Blobs::directory(&folder.join("blobs")).unwrap()).await
    }

    async fn build(
        options: ServerOptions,
        limits: CallerLimits,
        blobs: impl FnOnce(&std::path::Path) -> Blobs,
    ) -> Self {
        // As the binary does: the one TLS provider.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = tempfile::tempdir().unwrap();
        let store = Store::sqlite(&folder.path().join("db")).await.unwrap();
        let blobs = blobs(folder.path());
        let shutdown = CancellationToken::new();
        let fleet = no_workers(&store, &shutdown).await;
        let hub = Hub::new(store.clone(), fleet.clone(), Troubles::default(), shutdown.clone());
        tokio::spawn({
            let hub = hub.clone();
            async move { hub.run().await }
        });
        let parts = Parts {
            store: store.clone(),
            blobs: blobs.clone(),
            ingest: Ingest::new(store.clone(), blobs.clone(), Limits::default(), folder.path().to_owned()),
            reader: Reader::new(store.clone(), blobs.clone()),
            hub,
            fleet,
            stages: Stages::default(),
            webhooks: webhooks(&store),
        };
        let weights = options.tokens.as_ref().map(Tokens::weights).unwrap_or_default();
        let service = Service::new(parts, limits, weights, shutdown.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let running = tokio::spawn(serve(listener, service, options, shutdown.clone()));
        Self { address, store, blobs, folder, shutdown, running }
    }

    /// Inputs that have begun to come, and those that are there.
    pub fn blobs_begun(&self) -> usize {
        std::fs::read_dir(self.folder.path().join("blobs/inputs")).map(Iterator::count).unwrap_or(0)
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub async fn channel(&self) -> Channel {
        Endpoint::from_shared(self.url("")).unwrap().connect().await.unwrap()
    }

    pub async fn client(&self) -> BatchServiceClient<Transport> {
        self.client_of(None).await
    }

    pub async fn client_of(&self, token: Option<&'static str>) -> BatchServiceClient<Transport> {
        BatchServiceClient::with_interceptor(self.channel().await, Bearer(token))
    }

    pub async fn workers(&self, token: Option<&'static str>) -> WorkerAdminClient<Transport> {
        WorkerAdminClient::with_interceptor(self.channel().await, Bearer(token))
    }

    pub async fn webhooks(&self, token: Option<&'static str>) -> WebhookAdminClient<Transport> {
        WebhookAdminClient::with_interceptor(self.channel().await, Bearer(token))
    }

    /// Runs a batch of one segment as a scheduler would, up to its end: lines up to `good` succeed, the others fail.
    pub async fn run_batch(&self, id: &str, good: u32) {
        let lease = self.claim(id).await;
        let lines = self.store.batch(&lease.0.batch, &Scope::All).await.unwrap().unwrap().counts.total;
        let key = self.part(&lease, 0..u32::try_from(lines).unwrap(), good).await;
        self.finish(&lease, &key).await;
    }

    pub async fn claim(&self, id: &str) -> (SegmentRef, Epoch) {
        let node = NodeId::generate();
        let id = BatchId::from_text(id);
        let claimed = self.store.claim_segment(&node, &id, 1, Duration::from_secs(60)).await.unwrap().unwrap();
        (claimed.segment, claimed.epoch)
    }

    /// Makes results durable. Returns their object's key.
    pub async fn part(&self, lease: &(SegmentRef, Epoch), lines: std::ops::Range<u32>, good: u32) -> String {
        let key = tidemill::results::object_key(&lease.0, lease.1, lines.start);
        let text = |line: u32| format!("{{\"custom_id\":\"c{line}\",\"error\":null}}\n").into_bytes();
        let split = good.clamp(lines.start, lines.end);
        let (completed, failed) = (lines.start..split, split..lines.end);
        let objects: [Vec<u8>; 2] = [completed.clone(), failed.clone()].map(|some| some.flat_map(text).collect());
        self.blobs.put(&key, objects.concat().into()).await.unwrap();
        let part = tidemill::store::NewPart {
            object_key: key.clone(),
            output_bytes: objects[0].len() as u64,
            error_bytes: objects[1].len() as u64,
            crc32c: crc32c::crc32c(&objects.concat()),
            completed: LineSet::from_iter(completed),
            failed: LineSet::from_iter(failed),
            not_run: 0,
            usage: TokenUsage { output: 3, total: 3, ..TokenUsage::default() },
        };
        assert_eq!(self.store.commit_part(&lease.0, lease.1, &part).await.unwrap(), Commit::Done);
        key
    }

    /// Ends a segment whose only part is `key`.
    pub async fn finish(&self, lease: &(SegmentRef, Epoch), key: &str) {
        let part = self.store.parts_of(&lease.0).await.unwrap().remove(0).content;
        let object = FinalObject {
            object_key: key.to_owned(),
            output_bytes: part.output_bytes,
            error_bytes: part.error_bytes,
            output_lines: part.completed.len() as u64,
            error_lines: part.failed.len() as u64,
            crc32c: part.crc32c,
        };
        assert_eq!(self.store.finish_segment(&lease.0, lease.1, None, &object, &[]).await.unwrap(), Commit::Done);
    }
}

pub const CHAT: &str = "/v1/chat/completions";

pub fn lines(count: usize) -> Vec<u8> {
    lines_of(count, "m")
}

pub fn lines_of(count: usize, model: &str) -> Vec<u8> {
    (0..count)
        .map(|at| {
            format!(
                "{{\"custom_id\":\"c{at}\",\"method\":\"POST\",\"url\":\"{CHAT}\",\"body\":{{\"model\":\"{model}\",\"messages\":[]}}}}\n"
            )
        })
        .collect::<String>()
        .into_bytes()
}

/// Changes a byte of an object where it lies, in this place.
pub fn flip(server: &Server, key: &str, at: usize) {
    let path = server.folder.path().join("blobs").join(key);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
}

pub fn spec(spec: pb::FileSpec) -> pb::UploadFileRequest {
    pb::UploadFileRequest { payload: Some(pb::upload_file_request::Payload::Spec(spec)) }
}

pub fn chunk(bytes: impl Into<bytes::Bytes>) -> pb::UploadFileRequest {
    pb::UploadFileRequest { payload: Some(pb::upload_file_request::Payload::Chunk(bytes.into())) }
}

pub async fn upload(client: &mut BatchServiceClient<Transport>, bytes: Vec<u8>) -> pb::File {
    let messages = tokio_stream::iter([spec(pb::FileSpec::default()), chunk(bytes)]);
    client.upload_file(messages).await.unwrap().into_inner()
}

pub fn of_file(file: &pb::File) -> pb::CreateBatchRequest {
    pb::CreateBatchRequest {
        input: Some(pb::create_batch_request::Input::InputFileId(file.id.clone())),
        ..Default::default()
    }
}

pub fn inline(count: usize) -> pb::CreateBatchRequest {
    let requests = (0..count)
        .map(|at| pb::InlineRequest { custom_id: format!("c{at}"), body: r#"{"model":"m"}"#.into() })
        .collect();
    pb::CreateBatchRequest {
        input: Some(pb::create_batch_request::Input::InlineRequests(pb::InlineRequests { requests })),
        endpoint: CHAT.into(),
        metadata: BTreeMap::new(),
        ..Default::default()
    }
}

pub fn get(id: &str) -> pb::GetBatchRequest {
    pb::GetBatchRequest { batch_id: id.to_owned() }
}

/// The code and the reason, which every error has.
pub fn told<T: std::fmt::Debug>(answer: Result<T, Status>) -> (Code, String) {
    let status = answer.expect_err("an error");
    let info = status.get_details_error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, "tidemill");
    (status.code(), info.reason)
}

pub fn expect<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, reason: &str) {
    assert_eq!(told(answer), (code, reason.to_owned()));
}

/// The fields that a bad request names.
pub fn fields<T: std::fmt::Debug>(answer: Result<T, Status>) -> Vec<String> {
    let status = answer.expect_err("an error");
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let bad = status.get_details_bad_request().expect("a BadRequest");
    bad.field_violations.into_iter().map(|one| one.field).collect()
}

/// Webhooks may go to this machine.
fn webhooks(store: &Store) -> Webhooks {
    let policy = Policy { allow: vec!["127.0.0.0/8".parse().unwrap()], https_only: false };
    Webhooks::new(store.clone(), Options::new(Guard::new(policy), Vault::default())).unwrap()
}
