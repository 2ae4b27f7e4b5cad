//! Too much of everything: bounded, fair, and refused with when to try again.

use std::{io::ErrorKind, time::Duration};

use futures::{StreamExt, future::join_all, stream};
use tidemill::{
    access::{CallerLimits, Tokens, hash_token},
    api::ServerOptions,
    blobs::Blobs,
    domain::Scope,
    pb,
    sim::{Fault, Sim, SimConfig},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinSet,
};
use tonic::Code;
use tonic_types::StatusExt;

use crate::{
    faulty::{Faults, FaultyStore},
    patience::{HANG, ends, until},
    support::{CHAT, Server, chunk, expect, get, inline, lines, of_file, spec, upload},
};

async fn limited(limits: CallerLimits) -> Server {
    Server::limited(limits, ServerOptions::default()).await
}

#[tokio::test]
async fn uploads_are_told_when_the_blob_store_fails_and_leave_nothing() {
    let faults = Faults::default();
    let theirs = faults.clone();
    let server = Server::with_blobs(ServerOptions::default(), move |folder| {
        Blobs::over(FaultyStore::new(&folder.join("blobs"), theirs))
    })
    .await;
    let mut client = server.client().await;
    faults.writes(Some(ErrorKind::StorageFull));
    let send = || stream::iter([spec(pb::FileSpec::default()), chunk(lines(3))]);
    let refusal = client.upload_file(send()).await.unwrap_err();
    assert!(refusal.get_details_retry_info().is_some() && !refusal.message().contains("secret"), "{refusal:?}");
    expect(Err::<(), _>(refusal), Code::Unavailable, "BLOB_STORE_UNAVAILABLE");
    expect(client.create_batch(inline(2)).await, Code::Unavailable, "BLOB_STORE_UNAVAILABLE");
    let all = client.list_files(pb::ListFilesRequest::default()).await.unwrap().into_inner();
    assert!(all.files.is_empty());
    faults.writes(None);
    let file = client.upload_file(send()).await.unwrap().into_inner();
    faults.reads(Some(ErrorKind::TimedOut));
    let download = pb::DownloadFileRequest { file_id: file.id, ..Default::default() };
    let mut pieces = client.download_file(download.clone()).await.unwrap().into_inner();
    expect(pieces.next().await.unwrap(), Code::Unavailable, "BLOB_STORE_UNAVAILABLE");
    faults.reads(None);
    let mut pieces = client.download_file(download).await.unwrap().into_inner();
    assert_eq!(pieces.next().await.unwrap().unwrap().data, lines(3));
}

#[tokio::test]
async fn calls_past_the_rate_are_refused_with_when_to_try_again() {
    let server = limited(CallerLimits { requests_per_second: 1, ..CallerLimits::default() }).await;
    let mut client = server.client().await;
    let calls = (0..100).map(|_| {
        let mut client = client.clone();
        async move { client.list_files(pb::ListFilesRequest::default()).await }
    });
    let refused =
        join_all(calls).await.into_iter().find_map(Result::err).expect("a hundred at once are over one a second");
    let wait = refused.get_details_retry_info().unwrap().retry_delay.unwrap();
    assert!(wait <= Duration::from_millis(1_001), "{wait:?}");
    expect(Err::<(), _>(refused), Code::ResourceExhausted, "TOO_MANY_REQUESTS");
    tokio::time::sleep(wait).await;
    client.list_files(pb::ListFilesRequest::default()).await.unwrap();
}

#[tokio::test]
async fn bytes_and_lines_have_their_limits() {
    let size = lines(10).len() as u64;
    let limits = CallerLimits { bytes_per_day: 2 * size, queued_lines: 15, ..CallerLimits::default() };
    let server = limited(limits).await;
    let mut client = server.client().await;
    let file = upload(&mut client, lines(10)).await;
    client.create_batch(of_file(&file)).await.unwrap();
    expect(client.create_batch(of_file(&file)).await, Code::ResourceExhausted, "TOO_MANY_QUEUED_LINES");
    let batches = client.list_batches(pb::ListBatchesRequest::default()).await.unwrap().into_inner().batches;
    client.cancel_batch(pb::CancelBatchRequest { batch_id: batches[0].id.clone() }).await.unwrap();
    upload(&mut client, lines(10)).await;
    let messages = stream::iter([spec(pb::FileSpec::default()), chunk(lines(10))]);
    let refused = client.upload_file(messages).await.unwrap_err();
    assert!(refused.get_details_retry_info().is_some());
    expect(Err::<(), _>(refused), Code::ResourceExhausted, "TOO_MANY_BYTES");
}

#[tokio::test]
async fn retries_and_inline_requests_pass_the_same_limits_as_batches() {
    let size: u64 = 10 * r#"{"model":"m"}"#.len() as u64;
    let limits = CallerLimits { queued_lines: 15, bytes_per_day: 40 * size, ..CallerLimits::default() };
    let server = limited(limits).await;
    let mut client = server.client().await;
    let batch = client.create_batch(inline(10)).await.unwrap().into_inner();
    expect(client.create_batch(inline(6)).await, Code::ResourceExhausted, "TOO_MANY_QUEUED_LINES");
    server.run_batch(&batch.id, 0).await;
    let retry = || pb::RetryFailedRequestsRequest { batch_id: batch.id.clone(), ..Default::default() };
    client.retry_failed_requests(retry()).await.unwrap();
    for _ in 0..20 {
        let refused = client.retry_failed_requests(retry()).await.unwrap_err();
        assert!(refused.get_details_retry_info().is_some(), "{refused:?}");
        expect(Err::<(), _>(refused), Code::ResourceExhausted, "TOO_MANY_QUEUED_LINES");
    }
    let files = client.list_files(pb::ListFilesRequest::default()).await.unwrap().into_inner().files;
    assert_eq!(files.iter().filter(|file| file.filename.starts_with("failed-of-")).count(), 1, "refused: not written");
}

#[tokio::test]
async fn retries_count_their_bytes() {
    let size: u64 = 10 * r#"{"model":"m"}"#.len() as u64;
    let server = limited(CallerLimits { bytes_per_day: size + 100, ..CallerLimits::default() }).await;
    let mut client = server.client().await;
    let batch = client.create_batch(inline(10)).await.unwrap().into_inner();
    server.run_batch(&batch.id, 0).await;
    let retry = pb::RetryFailedRequestsRequest { batch_id: batch.id, ..Default::default() };
    expect(client.retry_failed_requests(retry).await, Code::ResourceExhausted, "TOO_MANY_BYTES");
}

#[tokio::test]
async fn one_callers_streams_are_limited_and_not_anothers() {
    let [ana, bob] = ["ana", "bob"].map(hash_token);
    let tokens = Tokens::parse(&format!("ana submit {ana}\nbob submit {bob}\n")).unwrap();
    let limits = CallerLimits { watches: 3, downloads: 2, ..CallerLimits::default() };
    let server = Server::limited(limits, ServerOptions { tokens: Some(tokens), ..ServerOptions::default() }).await;
    let (mut ana, mut bob) = (server.client_of(Some("ana")).await, server.client_of(Some("bob")).await);
    let batch = ana.create_batch(inline(1)).await.unwrap().into_inner();
    let watch = || pb::WatchBatchRequest { batch_id: batch.id.clone(), ..Default::default() };
    let mut watching = Vec::new();
    for _ in 0..3 {
        watching.push(ana.watch_batch(watch()).await.unwrap().into_inner());
    }
    let all = pb::WatchBatchesRequest::default();
    let refused = ana.watch_batches(all).await.unwrap_err();
    assert!(refused.get_details_retry_info().is_some() && refused.message().contains("--limit-watches"), "{refused:?}");
    expect(Err::<(), _>(refused), Code::ResourceExhausted, "TOO_MANY_WATCHES");
    let _bobs = bob.watch_batches(all).await.unwrap();
    // A place is free again as soon as its stream has ended.
    watching.pop();
    let again = async {
        while ana.watch_batches(all).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    ends("a place comes back", again).await;
    let follow = || pb::StreamResultsRequest { batch_id: batch.id.clone(), follow: true, ..Default::default() };
    let mut following = vec![ana.stream_results(follow()).await.unwrap(), ana.stream_results(follow()).await.unwrap()];
    expect(ana.stream_results(follow()).await, Code::ResourceExhausted, "TOO_MANY_DOWNLOADS");
    let get = async |token: &str| {
        let url = server.url(&format!("/v1/batches/{}/results", batch.id));
        reqwest::Client::new().get(url).bearer_auth(token).send().await.unwrap()
    };
    let refused = get("ana").await;
    assert_eq!((refused.status().as_u16(), &refused.headers()["retry-after"]), (429, &"10".parse().unwrap()));
    assert_eq!(get("bob").await.status().as_u16(), 404, "it is not his, but he is not too many");
    following.clear();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_callers_waiting_infer_calls_are_limited_and_not_anothers() {
    let [root, ana, bob] = ["root", "ana", "bob"].map(hash_token);
    let tokens = Tokens::parse(&format!("root admin {root}\nana submit {ana}\nbob submit {bob}\n")).unwrap();
    let limits = CallerLimits { infer_calls: 2, ..CallerLimits::default() };
    let server = Server::limited(limits, ServerOptions { tokens: Some(tokens), ..ServerOptions::default() }).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let sim = Sim::new(SimConfig { models: vec!["m".into()], ..SimConfig::default() }).unwrap();
    tokio::spawn(sim.clone().serve(listener, server.shutdown.clone()));
    server
        .workers(Some("root"))
        .await
        .register_worker(pb::RegisterWorkerRequest { url, ..Default::default() })
        .await
        .unwrap();
    let (ana, bob) = (server.client_of(Some("ana")).await, server.client_of(Some("bob")).await);
    let infer = |within: Duration| {
        let body = r#"{"model":"m","messages":[{"role":"user","content":"x"}]}"#.to_owned().into();
        let mut request = tonic::Request::new(pb::InferRequest { endpoint: CHAT.into(), body });
        request.set_timeout(within);
        request
    };
    let (long, short) = (Duration::from_secs(600), Duration::from_millis(300));
    let ready = async { while bob.clone().infer(infer(long)).await.is_err() {} };
    ends("the worker is found", ready).await;
    // The worker has one place, and never gives it back: one call runs, the next wait.
    sim.faults().always(Some(Fault::Hang));
    let mut calls = JoinSet::new();
    for _ in 0..3 {
        let mut ana = ana.clone();
        calls.spawn(async move { ana.infer(infer(long)).await.map(|_| ()) });
    }
    let refused = calls.join_next().await.unwrap().unwrap().unwrap_err();
    assert!(refused.get_details_retry_info().is_some(), "{refused:?}");
    assert!(refused.message().contains("--limit-infer-calls"), "{refused:?}");
    expect(Err::<(), _>(refused), Code::ResourceExhausted, "TOO_MANY_INFER_CALLS");
    let bobs = bob.clone().infer(infer(short)).await.unwrap_err();
    // The server's clock or his own ends it, whichever is first; nobody refuses it.
    assert!(matches!(bobs.code(), Code::DeadlineExceeded | Code::Cancelled), "his waits its turn: {bobs:?}");
    assert_eq!(calls.len(), 2, "ana's others are not touched");
    // Whoever hangs up has his place back.
    calls.shutdown().await;
    let again = async {
        while ana.clone().infer(infer(short)).await.unwrap_err().code() == Code::ResourceExhausted {
            tokio::task::yield_now().await;
        }
    };
    ends("a place comes back", again).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_has_a_longest_time_however_fast_it_comes() {
    assert_eq!(CallerLimits::default().longest_upload, Duration::from_secs(24 * 60 * 60));
    let limits =
        CallerLimits { longest_upload: Duration::from_secs(2), concurrent_uploads: 1, ..CallerLimits::default() };
    let server = limited(limits).await;
    let mut client = server.client().await;
    // 80 KiB/s, without an end.
    let pieces = stream::iter(0..).then(async |at: u64| {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let padding = "x".repeat(4_096);
        chunk(format!(
            "{{\"custom_id\":\"c{at}\",\"method\":\"POST\",\"url\":\"{CHAT}\",\"body\":{{\"model\":\"m\",\"user\":\"{padding}\"}}}}\n"
        ))
    });
    let messages = stream::iter([spec(pb::FileSpec::default())]).chain(pieces);
    expect(ends("the upload", client.upload_file(messages)).await, Code::DeadlineExceeded, "UPLOAD_TOO_LONG");
    let files = client.list_files(pb::ListFilesRequest::default()).await.unwrap().into_inner().files;
    assert!(files.is_empty(), "nothing is left of it");
    let next = upload(&mut client, lines(3)).await;
    assert_eq!(next.line_count, 3, "its place is free");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_callers_trickling_uploads_make_place_for_another() {
    let [ana, bob] = ["ana", "bob"].map(hash_token);
    let tokens = Tokens::parse(&format!("ana submit {ana}\nbob submit {bob}\n")).unwrap();
    // Only a place that is made lets another one in.
    let upload_patience = 10 * HANG;
    let limits = CallerLimits { concurrent_uploads: 8, upload_patience, ..CallerLimits::default() };
    let server = Server::limited(limits, ServerOptions { tokens: Some(tokens), ..ServerOptions::default() }).await;
    // Eight that run and eight that wait, each at 2 KiB/s: enough not to be idle.
    let client = server.client_of(Some("ana")).await;
    let trickling: Vec<_> = (0..16)
        .map(|_| {
            let mut client = client.clone();
            let line = lines(1);
            let pieces = stream::iter(0..).then(move |at: u64| {
                let mut piece = line.clone();
                piece.resize(2_048, b' ');
                let text =
                    String::from_utf8(piece).unwrap().replace("\"c0\"", &format!("\"c{at}\"")).replace('\n', " ");
                async move {
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    chunk(format!("{text}\n").into_bytes())
                }
            });
            let messages = stream::iter([spec(pb::FileSpec::default())]).chain(pieces);
            tokio::spawn(async move { client.upload_file(messages).await })
        })
        .collect();
    until("eight are let in", async || server.blobs_begun() >= 8).await;
    let mut client = server.client_of(Some("bob")).await;
    let file = ends("another one is let in", upload(&mut client, lines(3))).await;
    assert_eq!(file.line_count, 3);
    // The one that made place was told so; nobody else was harmed.
    let mut told = Vec::new();
    for one in trickling {
        if one.is_finished() {
            told.push(one.await.unwrap().unwrap_err());
        } else {
            one.abort();
        }
    }
    assert!((1..=2).contains(&told.len()), "{told:?}");
    for refused in told {
        assert!(refused.get_details_retry_info().is_some());
        expect(Err::<(), _>(refused), Code::ResourceExhausted, "UPLOAD_GAVE_WAY");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_uploads_at_once_take_turns() {
    // None is refused for how slow the machine's disk is.
    let upload_patience = Duration::from_secs(3_600);
    let server = limited(CallerLimits { concurrent_uploads: 8, upload_patience, ..CallerLimits::default() }).await;
    let clients: Vec<_> = join_all((0..4).map(|_| server.client())).await;
    let uploads = (0..400).map(|at| {
        let mut client = clients[at % clients.len()].clone();
        async move { upload(&mut client, lines(20)).await.id }
    });
    let mut ids = join_all(uploads).await;
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_watchers_all_see_the_end() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let batch = client.create_batch(inline(1)).await.unwrap().into_inner();
    // A connection takes 1,024 streams.
    let clients: Vec<_> = join_all((0..4).map(|_| server.client())).await;
    let watchers = (0..2_000).map(|at| {
        let (mut client, batch_id) = (clients[at % clients.len()].clone(), batch.id.clone());
        async move {
            let request = pb::WatchBatchRequest { batch_id, ..Default::default() };
            let mut events = client.watch_batch(request).await.unwrap().into_inner();
            events.next().await.unwrap().unwrap();
            events
        }
    });
    let watching = join_all(watchers).await;
    // Others are served meanwhile.
    ends("a call meanwhile", client.get_batch(get(&batch.id))).await.unwrap();
    server.store.cancel_batch(&tidemill::domain::BatchId::from_text(&batch.id), &Scope::All).await.unwrap();
    let told = watching.into_iter().map(|mut events| async move {
        // Every watcher hears of the new state.
        loop {
            let event = events.next().await.unwrap().unwrap();
            if matches!(event.event, Some(pb::batch_event::Event::StateChanged(_))) {
                return;
            }
        }
    });
    ends("all are told", join_all(told)).await;
}

/// Resident memory of this process.
fn resident() -> usize {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4_096
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_hardly_read_cost_little_memory_and_stall_nobody() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let size = 24 * 1024 * 1024;
    let mut big = lines(1);
    let padding = "x".repeat(1_000_000);
    while big.len() < size {
        let line = format!(
            "{{\"custom_id\":\"b{}\",\"method\":\"POST\",\"url\":\"/v1/chat/completions\",\"body\":{{\"model\":\"m\",\"messages\":[{{\"role\":\"user\",\"content\":\"{padding}\"}}]}}}}\n",
            big.len()
        );
        big.extend_from_slice(line.as_bytes());
    }
    let messages: Vec<_> = std::iter::once(spec(pb::FileSpec::default()))
        .chain(big.chunks(1 << 20).map(|piece| chunk(piece.to_vec())))
        .collect();
    let file = client.upload_file(stream::iter(messages)).await.unwrap().into_inner();
    drop(big);
    let before = resident();
    // Twenty downloads of 24 MiB each, none of which is read on.
    let mut stalled = Vec::new();
    for _ in 0..20 {
        let mut client = server.client().await;
        let request = pb::DownloadFileRequest { file_id: file.id.clone(), ..Default::default() };
        let mut pieces = client.download_file(request).await.unwrap().into_inner();
        pieces.next().await.unwrap().unwrap();
        stalled.push((client, pieces));
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let grown = resident().saturating_sub(before);
    assert!(grown < 200 * 1024 * 1024, "{} MiB more for 480 MiB that nobody reads", grown >> 20);
    ends("a call meanwhile", client.get_file(pb::GetFileRequest { file_id: file.id.clone() })).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_never_get_going_stall_nobody() {
    let server = Server::start().await;
    let mut slow = Vec::new();
    for _ in 0..100 {
        let mut tcp = tokio::net::TcpStream::connect(server.address).await.unwrap();
        tcp.write_all(b"P").await.unwrap();
        slow.push(tcp);
    }
    let mut client = server.client().await;
    let file = upload(&mut client, lines(5)).await;
    assert_eq!(file.line_count, 5);
    // They are still there, unanswered.
    let mut byte = [0];
    let read = tokio::time::timeout(Duration::from_millis(50), slow[0].read(&mut byte)).await;
    assert!(read.is_err() || read.unwrap().is_ok_and(|read| read > 0));
}
