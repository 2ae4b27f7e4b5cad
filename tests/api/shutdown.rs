//! The end of a server: told, in order, and in time.

use std::time::{Duration, Instant};

use tidemill::pb;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, Status};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt;

use crate::{
    patience::ends,
    support::{Server, chunk, expect, inline, lines, spec},
};

fn end(status: &Status) {
    assert!(status.get_details_retry_info().is_some(), "{status:?}");
    expect::<()>(Err(status.clone()), Code::Unavailable, "SHUTTING_DOWN");
}

#[tokio::test]
async fn streams_end_with_a_reason_and_health_says_so_first() {
    let mut server = Server::start().await;
    let mut client = server.client().await;
    let batch = client.create_batch(inline(1)).await.unwrap().into_inner();
    let watch = pb::WatchBatchRequest { batch_id: batch.id.clone(), ..Default::default() };
    let mut one = client.watch_batch(watch).await.unwrap().into_inner();
    one.message().await.unwrap().unwrap();
    let mut all = client.watch_batches(pb::WatchBatchesRequest::default()).await.unwrap().into_inner();
    all.message().await.unwrap().unwrap();
    let follow = pb::StreamResultsRequest { batch_id: batch.id, follow: true, ..Default::default() };
    let mut results = client.stream_results(follow).await.unwrap().into_inner();
    let mut health = HealthClient::new(server.channel().await);
    let mut health = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(health.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    server.shutdown.cancel();
    assert_eq!(health.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    end(&health.message().await.unwrap_err());
    let ended = loop {
        if let Err(status) = one.message().await {
            break status;
        }
    };
    end(&ended);
    let ended = loop {
        if let Err(status) = all.message().await {
            break status;
        }
    };
    end(&ended);
    end(&results.message().await.unwrap_err());
    (&mut server.running).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_is_under_way_may_end_within_the_deadline() {
    let mut server = Server::start().await;
    let client = server.client().await;
    let (send, receive) = tokio::sync::mpsc::channel(4);
    let mut other = client.clone();
    let call =
        tokio::spawn(async move { other.upload_file(tokio_stream::wrappers::ReceiverStream::new(receive)).await });
    send.send(spec(pb::FileSpec::default())).await.unwrap();
    send.send(chunk(lines(2))).await.unwrap();
    // The server has the call once it has answered a later one of the same connection.
    client.clone().list_files(pb::ListFilesRequest::default()).await.unwrap();
    server.shutdown.cancel();
    send.send(chunk(lines(1))).await.unwrap();
    drop(send);
    // What came is judged as ever: the id of the last line was there before.
    let answer = call.await.unwrap();
    assert_ne!(answer.err().map(|status| status.code()), Some(Code::Unavailable));
    (&mut server.running).await.unwrap().unwrap();
}

#[tokio::test]
async fn clients_that_hang_do_not_hold_the_server_up() {
    let mut server = Server::start().await;
    // One that has sent half a request and stays.
    let mut half = tokio::net::TcpStream::connect(server.address).await.unwrap();
    half.write_all(b"POST /tidemill.v1.BatchService/GetBatch HTTP/1.1\r\nhost: x\r\ncontent-type: application/grpc-web\r\ncontent-length: 100\r\n\r\nabc").await.unwrap();
    // One that has begun HTTP/2 and says no more.
    let mut idle = tokio::net::TcpStream::connect(server.address).await.unwrap();
    idle.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    // One in the middle of an upload.
    let client = server.client().await;
    let (send, receive) = tokio::sync::mpsc::channel(4);
    let mut other = client.clone();
    let call =
        tokio::spawn(async move { other.upload_file(tokio_stream::wrappers::ReceiverStream::new(receive)).await });
    send.send(spec(pb::FileSpec::default())).await.unwrap();
    client.clone().list_files(pb::ListFilesRequest::default()).await.unwrap();
    let began = Instant::now();
    server.shutdown.cancel();
    ends("the server ends", &mut server.running).await.unwrap().unwrap();
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(2), "{took:?}");
    // They are cut, not forgotten.
    let mut rest = Vec::new();
    let _ = ends("the connection is closed", half.read_to_end(&mut rest)).await;
    let status = call.await.unwrap().unwrap_err();
    assert!(matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled), "{status:?}");
    drop(send);
}
