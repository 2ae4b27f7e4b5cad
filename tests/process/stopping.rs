//! SIGTERM ends the server within the documented time, whatever hangs: the drain timeout and 5 s. What it could not
//! write down is given back by its leases, and is done at the next start.

use std::{any::Any, time::Duration};

use sea_orm::{ConnectionTrait, TransactionTrait};
use tidemill::{
    pb::{
        BatchStatus, CreateBatchRequest, DownloadFileRequest, FileSpec, GetBatchRequest, StreamResultsRequest,
        UploadFileRequest, WatchBatchRequest, WatchBatchesRequest, WebhookConfig, create_batch_request::Input,
        upload_file_request::Payload,
    },
    sim::{Fault, Sim, SimConfig},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::Code;

use crate::support::direct;
use crate::{
    assert_complete, create, input,
    receiver::{Receiver, SECRET, SILENT},
    s3::{self, BUCKET, S3},
    server::{Client, Server},
    support::{patience::until, postgres},
    upload, worker,
};

/// Short, so that the tests are. After that and 5 s more, the process ends by its own clock, and its exit code says so.
const DRAIN: &str = "1s";
const LINES: usize = 200;

/// What a state needs to last: dropped after the server has ended.
type Kept = Vec<Box<dyn Any>>;

/// A server in some state, about to be told to stop.
struct World {
    server: Server,
    kept: Kept,
}

/// The shortest lease, so that what a server has left is soon claimed.
fn flags<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let mut flags = vec!["--drain-timeout", DRAIN, "--flush-interval", "50ms", "--lease", "3s"];
    flags.extend(["--webhook-allow-cidr", "127.0.0.0/8"]);
    flags.extend(more);
    flags
}

/// Tells it to stop, and looks that it does, in order: before its own clock ends it.
async fn ends_in_time(server: &mut Server) {
    server.signal("TERM").await;
    let status = server.ended().await;
    assert!(status.success(), "{status}:\n{}", server.log());
}

async fn completes(server: &mut Server, batch: &str, count: usize) {
    server.restart().await;
    let client = server.client().await;
    until("the batch completes", async || is_completed(client.clone(), batch).await).await;
    assert_complete(&mut server.client().await, batch, count).await;
    server.kill().await;
}

async fn is_completed(mut client: Client, batch: &str) -> bool {
    let request = GetBatchRequest { batch_id: batch.to_owned() };
    client.get_batch(request).await.is_ok_and(|batch| batch.into_inner().status() == BatchStatus::Completed)
}

/// A worker that takes its time, and a batch that it is in the middle of.
async fn running(more: &[&str], environment: Vec<(String, String)>) -> (Server, Sim, String) {
    let config = SimConfig { latency: Duration::from_millis(100), max_num_seqs: 8, ..SimConfig::default() };
    let (sim, url) = worker(config).await;
    let flags = flags(&[&["--worker", &url, "--worker-max-in-flight", "8"], more].concat());
    let server = Server::in_environment(&flags, environment, None).await;
    let mut client = server.client().await;
    let file = upload(&mut client, input(LINES)).await;
    let batch = create(&mut client, &file, "").await;
    until("the batch runs", async || sim.faults().received() > 20).await;
    (server, sim, batch)
}

async fn with_webhook(client: &mut Client, file: &str, url: &str, timeout: i64) -> String {
    let timeout = Some(prost_types::Duration { seconds: timeout, nanos: 0 });
    let webhook = WebhookConfig { url: url.into(), secret: SECRET.into(), timeout, ..WebhookConfig::default() };
    let request = CreateBatchRequest {
        input: Some(Input::InputFileId(file.to_owned())),
        webhook: Some(webhook),
        ..CreateBatchRequest::default()
    };
    client.create_batch(request).await.unwrap().into_inner().id
}

/// A webhook and a request that hang, both with all the time in the world.
async fn hanging(webhook: bool, request: bool) -> World {
    let (sim, url) = worker(SimConfig::default()).await;
    let receiver = Receiver::start(SILENT).await;
    let server = Server::start(&flags(&["--worker", &url, "--request-timeout", "300s"])).await;
    let mut client = server.client().await;
    let file = upload(&mut client, input(3)).await;
    if webhook {
        with_webhook(&mut client, &file, &receiver.url, 300).await;
        receiver.wait(1).await;
    }
    if request {
        sim.faults().always(Some(Fault::Hang));
        create(&mut client, &file, "").await;
        until("a request hangs", async || sim.faults().in_flight() > 0).await;
    }
    World { server, kept: vec![Box::new(sim), Box::new(receiver)] }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_hangs() {
    ends_in_time(&mut hanging(true, false).await.server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_hangs() {
    ends_in_time(&mut hanging(false, true).await.server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_and_a_request_hang() {
    let mut world = hanging(true, true).await;
    ends_in_time(&mut world.server).await;
    drop(world.kept);
}

/// Uploads, watches, connections that have said half a word or stopped reading: all there are to the same server.
#[tokio::test(flavor = "multi_thread")]
async fn clients_hang() {
    let (mut server, _sim, batch) = running(&[], Vec::new()).await;
    let mut kept: Kept = Vec::new();
    // An upload that says nothing more.
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let spec = FileSpec { filename: "half.jsonl".into(), ..FileSpec::default() };
    sender.send(UploadFileRequest { payload: Some(Payload::Spec(spec)) }).await.unwrap();
    sender.send(UploadFileRequest { payload: Some(Payload::Chunk(input(10).into())) }).await.unwrap();
    let mut client = server.client().await;
    let uploading = async move { client.upload_file(tokio_stream::wrappers::ReceiverStream::new(receiver)).await };
    let uploading = tokio::spawn(uploading);
    kept.push(Box::new(sender));
    // A watcher that does not read.
    let request = WatchBatchRequest { batch_id: batch.clone(), after_revision: 0, min_interval: None };
    kept.push(Box::new(server.client().await.watch_batch(request).await.unwrap()));
    // Connections: silent, in the middle of HTTP/2's preface, after it without a word, in the middle of an HTTP/1
    // request.
    for text in ["", "PRI * HTT", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "GET /healthz HTTP/1.1\r\nhost:"] {
        let mut tcp = TcpStream::connect(server.address()).await.unwrap();
        tcp.write_all(text.as_bytes()).await.unwrap();
        kept.push(Box::new(tcp));
    }
    let inputs = server.folder().join("blobs/inputs");
    let count = || std::fs::read_dir(&inputs).map(Iterator::count).unwrap_or(0);
    until("the upload is under way", async || count() > 1).await;
    ends_in_time(&mut server).await;
    assert!(uploading.await.unwrap().is_err());
    completes(&mut server, &batch, LINES).await;
}

/// Asks for a file over HTTP/1.1, and returns the connection once the head of the answer is there, with the length that it
/// announces and what has come of the body.
async fn http_download(server: &Server, file: &str) -> (TcpStream, usize, usize) {
    let mut tcp = TcpStream::connect(server.address()).await.unwrap();
    let request = format!("GET /v1/files/{file}/content HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n");
    tcp.write_all(request.as_bytes()).await.unwrap();
    let mut read = Vec::new();
    let end = loop {
        assert!(tcp.read_buf(&mut read).await.unwrap() > 0, "{}", String::from_utf8_lossy(&read));
        if let Some(at) = read.windows(4).position(|four| four == b"\r\n\r\n") {
            break at + 4;
        }
    };
    let head = String::from_utf8_lossy(&read[..end]).to_lowercase();
    assert!(head.starts_with("http/1.1 200"), "{head}");
    let length =
        head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length").parse().unwrap();
    (tcp, length, read.len() - end)
}

/// Downloads that are read slowly or not at all, over both protocols; streams that follow a batch, read or not.
#[tokio::test(flavor = "multi_thread")]
async fn readers_are_slow() {
    let (mut server, sim, batch) = running(&[], Vec::new()).await;
    // The batch is to outlast all of this.
    sim.faults().always(Some(Fault::Hang));
    let mut client = server.client().await;
    // More than the sockets' buffers hold.
    let text = input(1).replace("number 0", &"x".repeat(300_000));
    let large: String = (0..150).map(|number| text.replace("\"r0\"", &format!("\"r{number}\""))).collect();
    let bytes = large.len();
    let file = upload(&mut client, large).await;
    let (still, length, seen) = http_download(&server, &file).await;
    assert_eq!(length, bytes);
    let (mut slow, ..) = http_download(&server, &file).await;
    let slowly = tokio::spawn(async move {
        let (mut read, mut piece) = (0, vec![0; 2_048]);
        loop {
            match slow.read(&mut piece).await {
                Ok(0) | Err(_) => return read,
                Ok(count) => read += count,
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    // A client that tells a short answer from a whole one by its length, as they all do.
    let url = format!("http://{}/v1/files/{file}/content", server.address());
    let mut paused = reqwest::get(url).await.unwrap();
    let mut of_paused = paused.chunk().await.unwrap().expect("a piece").len();
    let download = DownloadFileRequest { file_id: file, offset: 0 };
    let mut download = client.clone().download_file(download).await.unwrap().into_inner();
    let mut of_download = download.message().await.unwrap().expect("a piece").data.len();
    let request = StreamResultsRequest { batch_id: batch.clone(), follow: true, ..StreamResultsRequest::default() };
    let mut results = client.clone().stream_results(request.clone()).await.unwrap().into_inner();
    results.message().await.unwrap().expect("a first result");
    let unread = server.client().await.stream_results(request).await.unwrap();
    let request = WatchBatchRequest { batch_id: batch.clone(), after_revision: 0, min_interval: None };
    let mut watch = client.clone().watch_batch(request).await.unwrap().into_inner();
    watch.message().await.unwrap().expect("the present state");
    let mut all = client.watch_batches(WatchBatchesRequest::default()).await.unwrap().into_inner();
    all.message().await.unwrap().expect("the present states");

    ends_in_time(&mut server).await;
    // Streams end with the reason; nobody is to take what came for all there is.
    async fn end<T>(stream: &mut tonic::Streaming<T>, count: impl Fn(&T) -> usize) -> (tonic::Status, usize) {
        let mut counted = 0;
        loop {
            match stream.message().await {
                Ok(Some(message)) => counted += count(&message),
                Ok(None) => panic!("a clean end after {counted}"),
                Err(status) => return (status, counted),
            }
        }
    }
    for status in [end(&mut watch, |_| 1).await.0, end(&mut all, |_| 1).await.0, end(&mut results, |_| 1).await.0] {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    }
    drop(unread);
    let (status, more) = end(&mut download, |chunk| chunk.data.len()).await;
    of_download += more;
    assert!(of_download < bytes, "{status:?} after {of_download} of {bytes}");
    let broken = loop {
        match paused.chunk().await {
            Ok(Some(piece)) => of_paused += piece.len(),
            Ok(None) => break None,
            Err(error) => break Some(error),
        }
    };
    assert!(broken.is_some() && of_paused < bytes, "{of_paused} of {bytes} bytes, and a clean end");
    // What was never read, and what was read slowly, ends short of its length.
    let mut rest = still;
    let mut of_still = Vec::new();
    let _ = rest.read_to_end(&mut of_still).await;
    assert!(seen + of_still.len() < length);
    assert!(slowly.await.unwrap() < length);
    sim.faults().always(None);
    completes(&mut server, &batch, LINES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn objects_cannot_be_written() {
    let (mut server, _sim, batch) = running(&[], Vec::new()).await;
    // Whoever runs the test may be root, whom no mode stops: a file where the folder was stops everybody.
    let (blobs, away) = (server.folder().join("blobs"), server.folder().join("away"));
    std::fs::rename(&blobs, &away).unwrap();
    std::fs::write(&blobs, "").unwrap();
    until("a write has failed", async || server.log().contains("can't write a part")).await;
    ends_in_time(&mut server).await;
    std::fs::remove_file(&blobs).unwrap();
    std::fs::rename(&away, &blobs).unwrap();
    completes(&mut server, &batch, LINES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn s3_hangs() {
    let s3 = S3::start().await;
    let blobs = format!("s3://{BUCKET}/objects");
    let (mut server, _sim, batch) = running(&["--blobs", &blobs], s3.environment()).await;
    s3.break_it(s3::On::All, s3::Fault::Slow(Duration::from_secs(600)));
    until("something waits for it", async || s3.struck() > 0).await;
    ends_in_time(&mut server).await;
    s3.heal();
    completes(&mut server, &batch, LINES).await;
}

/// What is done to a database, and undone.
#[derive(Clone, Copy)]
enum Ill {
    Stopped,
    Frozen,
}

impl Ill {
    fn begin(self, own: &postgres::Own) {
        match self {
            Self::Stopped => own.stop(),
            Self::Frozen => own.freeze(),
        }
    }

    fn end(self, own: &postgres::Own) {
        match self {
            Self::Stopped => own.start(),
            Self::Frozen => own.thaw(),
        }
    }
}

async fn database_is(how: Ill) {
    let Some((own, url)) = postgres::own() else { return };
    let (mut server, _sim, batch) = running(&["--database-url", &url], Vec::new()).await;
    how.begin(&own);
    // Until the server has noticed, or has had the time to.
    tokio::time::sleep(Duration::from_secs(1)).await;
    ends_in_time(&mut server).await;
    how.end(&own);
    completes(&mut server, &batch, LINES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_stopped() {
    database_is(Ill::Stopped).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_frozen() {
    database_is(Ill::Frozen).await;
}

/// Everything at once, and clients that wait for answers of the database.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_frozen_and_everything_else_hangs_too() {
    let Some((own, url)) = postgres::own() else { return };
    let receiver = Receiver::start(SILENT).await;
    let (mut server, sim, _) = running(&["--database-url", &url, "--request-timeout", "300s"], Vec::new()).await;
    let mut client = server.client().await;
    let file = upload(&mut client, input(20)).await;
    with_webhook(&mut client, &file, &receiver.url, 300).await;
    receiver.wait(1).await;
    sim.faults().always(Some(Fault::Hang));
    create(&mut client, &file, "").await;
    until("requests hang", async || sim.faults().in_flight() >= 8).await;
    own.freeze();
    let asking = tokio::spawn(async move { client.list_batches(tidemill::pb::ListBatchesRequest::default()).await });
    ends_in_time(&mut server).await;
    assert!(asking.await.unwrap().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn it_waits_for_a_frozen_database_at_its_start() {
    let Some((own, url)) = postgres::own() else { return };
    own.freeze();
    let mut server = Server::new(&flags(&["--database-url", &url]));
    server.spawn_unready();
    server.handles_signals().await;
    // It has the time to come to the database, and does not give up by itself as soon.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(server.is_alive(), "{}", server.log());
    ends_in_time(&mut server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_waits_to_migrate() {
    let Some(url) = postgres::database().await else { return };
    let other = direct::connect(&url).await;
    // As a node does that migrates a large database for an hour.
    let migrating = other.begin().await.unwrap();
    let lock = format!("SELECT pg_advisory_xact_lock({})", i64::from_be_bytes(*b"tidemill"));
    migrating.execute_unprepared(&lock).await.unwrap();
    let mut server = Server::new(&flags(&["--database-url", &url]));
    server.spawn_unready();
    let waiting = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
    let waits = async || {
        let row = sea_orm::Statement::from_string(sea_orm::DatabaseBackend::Postgres, waiting);
        other.query_one_raw(row).await.unwrap().is_some()
    };
    until("it waits for its turn to migrate", waits).await;
    ends_in_time(&mut server).await;
    migrating.rollback().await.unwrap();
}

/// Nobody reads the log, and its pipe is full: every thread that says something stands still.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_reads_the_log() {
    let mut server = Server::new(&flags(&["--log", "trace"]));
    let log = server.spawn_with_full_log();
    ends_by_the_clock(&mut server).await;
    drop(log);
}

/// Not in order, and its exit code says so.
async fn ends_by_the_clock(server: &mut Server) {
    server.signal("TERM").await;
    assert_eq!(server.ended().await.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_it_at_once() {
    for (first, second) in [("TERM", "TERM"), ("INT", "INT"), ("TERM", "INT")] {
        let mut world = hanging(false, true).await;
        world.server.signal(first).await;
        until("it stops", async || world.server.log().contains("stopping")).await;
        world.server.signal(second).await;
        // In order would be 0, and by its clock 1.
        assert_eq!(world.server.ended().await.code(), Some(130), "{first} {second}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hangup_does_not_end_it() {
    let mut server = Server::start(&flags(&[])).await;
    server.signal("HUP").await;
    until("it says so", async || server.log().contains("SIGHUP does nothing")).await;
    assert!(server.is_alive());
    ends_in_time(&mut server).await;
}
