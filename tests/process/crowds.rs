//! Too much for the real program: all of it ends, its memory stays bounded, and another client's small call is answered
//! meanwhile.

use std::{
    collections::BTreeSet,
    fs::File,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use futures::{StreamExt, future::join_all, stream};
use tidemill::{
    pb::{
        BatchStatus, CancelBatchRequest, CreateBatchRequest, FileSpec, GetBatchRequest, InlineRequest, InlineRequests,
        ListBatchesRequest, ListFilesRequest, UploadFileRequest, WatchBatchRequest, create_batch_request::Input,
        upload_file_request::Payload,
    },
    sim::SimConfig,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tonic::{Code, Status, transport::Endpoint};
use tonic_types::StatusExt;

use crate::{
    create, download, input,
    server::{Client, Server},
    support::patience::{ends, goes_on, until},
    try_upload, upload, worker,
};

const MIB: usize = 1024 * 1024;
/// How long a small call may take while a crowd is served, by an unoptimized program on two cores. On a machine that is so
/// slow that this is too little, the crowd takes longer too: a call that has to wait for a large part of it is held up.
const SOON: Duration = Duration::from_secs(20);
const PART: u32 = 4;

/// One crowd at a time, among the processes that run tests too: each is to be measured alone.
pub async fn alone() -> File {
    let file = File::create(concat!(env!("CARGO_TARGET_TMPDIR"), "/crowds.lock")).unwrap();
    tokio::task::spawn_blocking(move || file.lock().map(|()| file)).await.unwrap().unwrap()
}

/// Another client, which makes a small call again and again on a connection of its own.
struct Bystander {
    began: Instant,
    stop: Arc<AtomicBool>,
    running: JoinHandle<(usize, Duration)>,
}

impl Bystander {
    async fn start(server: &Server) -> Self {
        let (stop, mut client) = (Arc::new(AtomicBool::new(false)), server.client().await);
        let stopped = stop.clone();
        let running = tokio::spawn(async move {
            let (mut calls, mut worst) = (0, Duration::ZERO);
            while !stopped.load(Ordering::Relaxed) {
                let begun = Instant::now();
                client.list_files(ListFilesRequest { page_size: 1, ..Default::default() }).await.unwrap();
                worst = worst.max(begun.elapsed());
                calls += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            (calls, worst)
        });
        Self { began: Instant::now(), stop, running }
    }

    /// It was answered, each time soon enough.
    async fn check(self, what: &str) {
        let crowd = self.began.elapsed();
        self.stop.store(true, Ordering::Relaxed);
        let (calls, worst) = self.running.await.unwrap();
        println!("{what}: {calls} calls of a bystander, the slowest took {worst:?} of {crowd:?}");
        assert!(calls > 3 && worst < SOON.max(crowd / PART), "{calls} calls, the slowest took {worst:?} of {crowd:?}");
    }
}

async fn clients(server: &Server, count: usize) -> Vec<Client> {
    join_all((0..count).map(|_| server.client())).await
}

/// Calls again when it is told to: a server that has more to do than it gets done says UNAVAILABLE, and when to come again.
async fn insist<T>(mut call: impl AsyncFnMut() -> Result<T, Status>) -> T {
    loop {
        match call().await {
            Ok(done) => return done,
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                tokio::time::sleep(status.get_details_retry_info().unwrap().retry_delay.unwrap()).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_uploads_at_once_take_turns() {
    const UPLOADS: usize = 1_000;
    const AT_A_TIME: usize = 16;
    let _alone = alone().await;
    let server = Server::start(&["--limit-concurrent-uploads", "16"]).await;
    let clients = clients(&server, 8).await;
    let text = input(300);
    let before = server.memory("VmRSS");
    let bystander = Bystander::start(&server).await;
    // What is being written has a "#" in its name until it is whole.
    let (done, inputs) = (Arc::new(AtomicBool::new(false)), server.folder().join("blobs/inputs"));
    let sampler = std::thread::spawn({
        let done = done.clone();
        move || {
            let list = || -> BTreeSet<_> {
                let names = std::fs::read_dir(&inputs).into_iter().flatten().flatten().map(|entry| entry.file_name());
                names.filter(|name| name.to_string_lossy().contains('#')).collect()
            };
            // A list is not of one moment, but what is in two of them was there between them.
            let (mut before, mut most) = (list(), 0);
            while !done.load(Ordering::Relaxed) {
                let now = list();
                most = most.max(now.intersection(&before).count());
                before = now;
            }
            most
        }
    });
    let (begun, refused, ended) = (Instant::now(), AtomicUsize::new(0), AtomicUsize::new(0));
    let uploads = (0..UPLOADS).map(|at| {
        let (mut client, text) = (clients[at % clients.len()].clone(), &text);
        let (refused, ended) = (&refused, &ended);
        async move {
            loop {
                match try_upload(&mut client, text.clone(), "").await {
                    Ok(id) => {
                        ended.fetch_add(1, Ordering::Relaxed);
                        return id;
                    }
                    Err(status) => {
                        // Whoever has waited for 30 s is told when to come again, and does.
                        let reason = status.get_details_error_info().unwrap().reason;
                        let told = (status.code(), reason.as_str());
                        let turn = told == (Code::ResourceExhausted, "TOO_MANY_UPLOADS");
                        assert!(turn || told == (Code::Unavailable, "DATABASE_UNAVAILABLE"), "{status:?}");
                        let wait = status.get_details_retry_info().unwrap().retry_delay.unwrap();
                        refused.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(wait).await;
                    }
                }
            }
        }
    });
    let mut ids = goes_on("uploads end", || ended.load(Ordering::Relaxed), join_all(uploads)).await;
    done.store(true, Ordering::Relaxed);
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), UPLOADS);
    bystander.check("a thousand uploads").await;
    let most = sampler.join().unwrap();
    assert!((2..=AT_A_TIME).contains(&most), "{most} at a time");
    let grown = server.memory("VmHWM").saturating_sub(before);
    println!(
        "{UPLOADS} uploads in {:?}, {most} at a time, {refused:?} told to wait, {} MiB",
        begun.elapsed(),
        grown / MIB
    );
    assert!(grown < 300 * MIB, "{} MiB", grown / MIB);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_watchers_all_see_the_end() {
    const WATCHERS: usize = 10_000;
    let _alone = alone().await;
    let server = Server::start(&[]).await;
    // A connection takes 1,024 streams.
    let clients = clients(&server, 10).await;
    let mut client = clients[0].clone();
    let file = upload(&mut client, input(10)).await;
    let batch_id = create(&mut client, &file, "").await;
    let before = server.memory("VmRSS");
    let bystander = Bystander::start(&server).await;
    let begun = Instant::now();
    let watch = |at: usize| {
        let (mut client, batch_id) = (clients[at % clients.len()].clone(), batch_id.clone());
        async move {
            let request = WatchBatchRequest { batch_id, ..Default::default() };
            insist(async || {
                let mut events = client.watch_batch(request.clone()).await?.into_inner();
                events.next().await.expect("the present state")?;
                Ok(events)
            })
            .await
        }
    };
    let watching: Vec<_> = stream::iter(0..WATCHERS).map(watch).buffer_unordered(500).collect().await;
    let each = server.memory("VmRSS").saturating_sub(before) / WATCHERS;
    let came = begun.elapsed();
    let mut other = server.client().await;
    other.cancel_batch(CancelBatchRequest { batch_id: batch_id.clone() }).await.unwrap();
    let ended = Instant::now();
    let heard = &AtomicUsize::new(0);
    let told = watching.into_iter().map(|mut events| async move {
        let mut last = BatchStatus::Unspecified;
        // Until the server ends the stream in order.
        while let Some(event) = events.message().await.unwrap() {
            if let Some(tidemill::pb::batch_event::Event::StateChanged(batch)) = event.event {
                last = batch.status();
            }
        }
        assert_eq!(last, BatchStatus::Cancelled);
        heard.fetch_add(1, Ordering::Relaxed);
    });
    goes_on("watchers see the end", || heard.load(Ordering::Relaxed), join_all(told)).await;
    println!("{WATCHERS} watchers came in {came:?}, {each} B each, and were told the end in {:?}", ended.elapsed());
    bystander.check("ten thousand watchers").await;
    assert!(each < 40 * 1024, "{each} B for each watcher");
}

/// How many; `TIDEMILL_TEST_BATCHES` for more.
fn batches() -> usize {
    std::env::var("TIDEMILL_TEST_BATCHES").map_or(1_000, |count| count.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_small_batches_all_complete_and_none_starves() {
    let _alone = alone().await;
    let count = batches();
    let (sim, url) = worker(SimConfig::default()).await;
    let server = Server::start(&["--worker", &url]).await;
    let clients = clients(&server, 8).await;
    let before = server.memory("VmRSS");
    let bystander = Bystander::start(&server).await;
    let begun = Instant::now();
    let small = |at: usize| {
        let mut client = clients[at % clients.len()].clone();
        async move {
            let requests = (0..=at % 3).map(|line| InlineRequest {
                custom_id: format!("r{line}"),
                body: r#"{"model":"sim","messages":[{"role":"user","content":"x"}],"max_tokens":1}"#.into(),
            });
            let request = CreateBatchRequest {
                input: Some(Input::InlineRequests(InlineRequests { requests: requests.collect() })),
                endpoint: "/v1/chat/completions".into(),
                request_id: format!("batch {at}"),
                ..Default::default()
            };
            insist(async || client.create_batch(request.clone()).await).await.into_inner().id
        }
    };
    let ids: Vec<String> = stream::iter(0..count).map(small).buffer_unordered(64).collect().await;
    let created = begun.elapsed();
    let mut client = server.client().await;
    let statuses = vec![BatchStatus::InProgress.into(), BatchStatus::Finalizing.into()];
    let request = ListBatchesRequest { statuses, page_size: 1, ..Default::default() };
    let mut running = usize::MAX;
    while running > 0 {
        // Any number of batches takes its time; one that none of them completes in is too long.
        let done = sim.faults().received();
        let goes_on = async || {
            running = client.list_batches(request.clone()).await.unwrap().into_inner().batches.len();
            running == 0 || sim.faults().received() > done
        };
        until("the batches complete", goes_on).await;
    }
    let all = begun.elapsed();
    bystander.check("small batches").await;
    let looked = ids.iter().zip(clients.iter().cycle()).map(|(id, client)| {
        let (mut client, request) = (client.clone(), GetBatchRequest { batch_id: id.clone() });
        async move { insist(async || client.get_batch(request.clone()).await).await.into_inner() }
    });
    let looked: Vec<_> = stream::iter(looked.collect::<Vec<_>>()).buffer_unordered(32).collect().await;
    let (mut lines, mut spans) = (0, Vec::new());
    for batch in looked {
        assert_eq!(batch.status(), BatchStatus::Completed);
        let time = |time: Option<prost_types::Timestamp>| SystemTime::try_from(time.unwrap()).unwrap();
        spans.push((time(batch.create_time), time(batch.completed_time)));
        lines += usize::try_from(batch.request_counts.unwrap().completed).unwrap();
    }
    assert_eq!(lines, (0..count).map(|at| at % 3 + 1).sum::<usize>());
    // A machine that stands still for seconds seems to lose requests: what ran twice has failed before.
    let (received, failed) = (sim.faults().received(), server.metric_sum("tidemill_tries_failed_total").await);
    let twice = received - lines as u64;
    assert!(twice <= failed, "{twice} requests ran twice, and {failed} tries have failed");
    let grown = server.memory("VmHWM").saturating_sub(before);
    spans.sort();
    let worst = spans.iter().map(|(from, to)| to.duration_since(*from).unwrap_or_default()).max().unwrap();
    println!(
        "{count} batches created in {created:?}, all completed after {all:?}, the slowest within {worst:?}, {} MiB",
        grown / MIB
    );
    // Nobody is overtaken by the crowd: the first tenth is done before any of the last tenth.
    let (first, last) = (&spans[..count / 10], &spans[count - count / 10..]);
    let (late, early) = (first.iter().map(|span| span.1).max().unwrap(), last.iter().map(|span| span.1).min().unwrap());
    assert!(late < early, "one of the first waited until {late:?}, one of the last until {early:?}");
    assert!(grown < 200 * MIB, "{} MiB", grown / MIB);
}

fn chunk(bytes: Vec<u8>) -> UploadFileRequest {
    UploadFileRequest { payload: Some(Payload::Chunk(bytes.into())) }
}

/// The frame of a gRPC message.
fn framed(message: &UploadFileRequest) -> Vec<u8> {
    let bytes = prost::Message::encode_to_vec(message);
    [&[0], &u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], &bytes].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_trickle_give_way_to_others() {
    let _alone = alone().await;
    let server = Server::start(&["--limit-concurrent-uploads", "4"]).await;
    let spec = UploadFileRequest { payload: Some(Payload::Spec(FileSpec::default())) };
    let mut trickling = Vec::new();
    for whole in [true, true, false] {
        // Each byte a message, or one message that comes byte by byte.
        let pieces: Vec<Vec<u8>> = if whole {
            input(10).into_bytes().into_iter().map(|byte| framed(&chunk(vec![byte]))).collect()
        } else {
            framed(&chunk(input(10).into_bytes())).into_iter().map(|byte| vec![byte]).collect()
        };
        let begin = stream::iter([Ok::<_, std::io::Error>(framed(&spec))]);
        let rest = stream::iter(pieces).then(|piece| async move {
            tokio::time::sleep(Duration::from_millis(700)).await;
            Ok(piece)
        });
        let client = reqwest::Client::builder().http2_prior_knowledge().build().unwrap();
        let url = format!("http://{}/tidemill.v1.BatchService/UploadFile", server.address());
        let body = reqwest::Body::wrap_stream(begin.chain(rest));
        let request = client.post(url).header("content-type", "application/grpc").header("te", "trailers").body(body);
        trickling.push(tokio::spawn(async move {
            let answer = request.send().await.unwrap();
            answer.headers()["grpc-status"].to_str().unwrap().to_owned()
        }));
    }
    // And one that says nothing at all once it has begun.
    let mut silent = server.client().await;
    let begin = stream::iter([spec.clone()]).chain(stream::pending());
    trickling.push(tokio::spawn(async move {
        let status = silent.upload_file(begin).await.unwrap_err();
        assert_eq!(status.get_details_error_info().unwrap().reason, "UPLOAD_IDLE", "{status:?}");
        (status.code() as i32).to_string()
    }));
    let notes = || std::fs::read_dir(server.folder().join("blobs/inputs")).map(Iterator::count).unwrap_or(0);
    // A full house. While nobody waits they may go on.
    until("all four are let in", async || notes() >= 4).await;
    let before = server.memory("VmRSS");
    let bystander = Bystander::start(&server).await;
    // Four more that are slow, but send, for eighteen seconds: each needs a place of its own.
    let begun = Instant::now();
    let honest = (0..4).map(|_| async {
        let text = input(2_000).into_bytes();
        let pieces: Vec<Vec<u8>> = text.chunks(text.len() / 60 + 1).map(<[u8]>::to_vec).collect();
        let rest = stream::iter(pieces).then(|piece| async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            chunk(piece)
        });
        let mut client = server.client().await;
        client.upload_file(stream::iter([spec.clone()]).chain(rest)).await.expect("it gets a place within 30 s")
    });
    ends("they are served", join_all(honest)).await;
    println!("four uploads behind four that trickle took {:?}", begun.elapsed());
    let all = async {
        for one in &mut trickling {
            let code = one.await.unwrap();
            assert_eq!(code, (Code::DeadlineExceeded as i32).to_string());
        }
    };
    ends("they are all given up", all).await;
    bystander.check("uploads that trickle").await;
    let mut client = server.client().await;
    let files = client.list_files(ListFilesRequest::default()).await.unwrap().into_inner().files;
    assert_eq!(files.len(), 4);
    until("nothing is left of them", async || notes() == 4).await;
    assert!(server.memory("VmHWM").saturating_sub(before) < 64 * MIB);
}

/// A way to the server on which answers come a byte at a time, 20 a second, after the first 256 KiB; and how many
/// connections have come so far.
async fn slow_way(server: &Server) -> (std::net::SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, target) = (listener.local_addr().unwrap(), server.address());
    let slow = Arc::new(AtomicUsize::new(0));
    let counted = slow.clone();
    tokio::spawn(async move {
        loop {
            let (client, _) = listener.accept().await.unwrap();
            let server = TcpStream::connect(target).await.unwrap();
            let (mut from_client, mut to_client) = client.into_split();
            let (mut from_server, mut to_server) = server.into_split();
            let slow = slow.clone();
            tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
            tokio::spawn(async move {
                let mut quick = vec![0; 256 * 1024];
                let (mut passed, mut byte) = (0, [0]);
                while passed < quick.len() {
                    let Ok(read @ 1..) = from_server.read(&mut quick).await else { return };
                    passed += read;
                    if to_client.write_all(&quick[..read]).await.is_err() {
                        return;
                    }
                }
                slow.fetch_add(1, Ordering::SeqCst);
                while from_server.read_exact(&mut byte).await.is_ok() && to_client.write_all(&byte).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            });
        }
    });
    (address, counted)
}

#[tokio::test(flavor = "multi_thread")]
async fn downloads_that_trickle_cost_little_memory_and_stall_nobody() {
    let _alone = alone().await;
    let server = Server::start(&[]).await;
    let mut client = server.client().await;
    let padding = "x".repeat(200_000);
    let text = input(100).replace("number ", &format!("{padding} number "));
    let bytes = text.len();
    assert!(bytes > 19_000_000);
    let file_id = upload(&mut client, text).await;
    let (way, slow) = slow_way(&server).await;
    let before = server.memory("VmRSS");
    let bystander = Bystander::start(&server).await;
    let mut trickling = Vec::new();
    for at in 0..20 {
        if at % 2 == 0 {
            let channel = Endpoint::from_shared(format!("http://{way}")).unwrap().connect().await.unwrap();
            let request = tidemill::pb::DownloadFileRequest { file_id: file_id.clone(), offset: 0 };
            trickling.push(tokio::spawn(async move {
                let mut pieces = Client::new(channel).download_file(request).await.unwrap().into_inner();
                while pieces.message().await.unwrap().is_some() {}
            }));
        } else {
            let mut tcp = TcpStream::connect(way).await.unwrap();
            let request = format!("GET /v1/files/{file_id}/content HTTP/1.1\r\nhost: x\r\n\r\n");
            tcp.write_all(request.as_bytes()).await.unwrap();
            trickling.push(tokio::spawn(async move { drop(tcp.read_to_end(&mut Vec::new()).await) }));
        }
    }
    until("all of them trickle", async || slow.load(Ordering::SeqCst) == trickling.len()).await;
    // The server has the time to read ahead, if it does.
    tokio::time::sleep(Duration::from_secs(3)).await;
    // Somebody who reads gets all of it meanwhile.
    let begun = Instant::now();
    let read = ends("it is served", download_lines(&mut client, &file_id)).await;
    assert_eq!(read, 100);
    assert!(trickling.iter().all(|one| !one.is_finished()), "they are still at it");
    let grown = server.memory("VmHWM").saturating_sub(before);
    println!(
        "20 downloads of {} MiB that trickle: {} MiB; another one took {:?}",
        bytes / MIB,
        grown / MIB,
        begun.elapsed()
    );
    assert!(grown < 100 * MIB, "{} MiB", grown / MIB);
    bystander.check("downloads that trickle").await;
    for one in trickling {
        one.abort();
    }
}

async fn download_lines(client: &mut Client, file_id: &str) -> usize {
    download(client, file_id).await.len()
}
