//! Events and results over the wire.

use futures::TryStreamExt;
use tidemill::pb::{self, batch_event::Event};
use tonic::{Code, Status};

use crate::support::{Server, expect, fields, inline};

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

#[tokio::test]
async fn a_watcher_that_comes_back_misses_no_state() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let batch = client.create_batch(inline(3)).await.unwrap().into_inner();
    let watch = |after_revision| pb::WatchBatchRequest {
        batch_id: batch.id.clone(),
        after_revision,
        min_interval: seconds(60),
    };
    let mut events = client.watch_batch(watch(0)).await.unwrap().into_inner();
    let first = events.message().await.unwrap().unwrap();
    let Some(Event::StateChanged(now)) = &first.event else { panic!("{first:?}") };
    assert_eq!((now.status(), now.revision), (pb::BatchStatus::InProgress, first.revision));
    assert_eq!(now.progress.as_ref().unwrap().request_counts.unwrap().total, 3);
    drop(events);
    server.run_batch(&batch.id, 3).await;
    let events: Vec<_> =
        client.watch_batch(watch(first.revision)).await.unwrap().into_inner().try_collect().await.unwrap();
    let states: Vec<_> = events
        .iter()
        .filter_map(|event| match &event.event {
            Some(Event::StateChanged(batch)) => Some(batch.status()),
            _ => None,
        })
        .collect();
    assert_eq!(states, [pb::BatchStatus::Finalizing, pb::BatchStatus::Completed]);
    let last = events.last().unwrap().revision;
    let Some(Event::StateChanged(end)) = &events.last().unwrap().event else { panic!() };
    assert!(!end.output_file_id.is_empty() && end.completed_time.is_some());
    let rest: Vec<_> = client.watch_batch(watch(last)).await.unwrap().into_inner().try_collect().await.unwrap();
    assert!(rest.is_empty());
}

#[tokio::test]
async fn what_can_not_be_watched_is_refused_at_once() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let batch = client.create_batch(inline(1)).await.unwrap().into_inner();
    let watch = pb::WatchBatchRequest { batch_id: batch.id.clone(), ..Default::default() };
    let mut refused = async |request: pb::WatchBatchRequest| fields(client.watch_batch(request).await.map(drop));
    assert_eq!(refused(pb::WatchBatchRequest { after_revision: 99, ..watch.clone() }).await, ["after_revision"]);
    assert_eq!(refused(pb::WatchBatchRequest { after_revision: -1, ..watch.clone() }).await, ["after_revision"]);
    assert_eq!(refused(pb::WatchBatchRequest { min_interval: seconds(61), ..watch.clone() }).await, ["min_interval"]);
    let missing = pb::WatchBatchRequest { batch_id: "batch_x".into(), ..watch };
    expect(client.watch_batch(missing).await.map(drop), Code::NotFound, "BATCH_NOT_FOUND");
    let all = pb::WatchBatchesRequest { after_sequence: 99, ..Default::default() };
    assert_eq!(fields(client.watch_batches(all).await.map(drop)), ["after_sequence"]);
}

#[tokio::test]
async fn results_are_followed_and_resumed_by_cursor() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let batch = client.create_batch(inline(4)).await.unwrap().into_inner();
    let lease = server.claim(&batch.id).await;
    let results = |cursor: &str, follow| pb::StreamResultsRequest {
        batch_id: batch.id.clone(),
        cursor: cursor.to_owned(),
        follow,
        ..Default::default()
    };
    let mut follower = client.stream_results(results("", true)).await.unwrap().into_inner();
    let key = server.part(&lease, 0..4, 3).await;
    let mut got = Vec::new();
    for _ in 0..4 {
        got.push(follower.message().await.unwrap().unwrap());
    }
    let seen: Vec<_> = got.iter().map(|one| (one.custom_id.as_str(), one.line_number, one.succeeded)).collect();
    assert_eq!(seen, [("c0", 1, true), ("c1", 2, true), ("c2", 3, true), ("c3", 4, false)]);
    assert!(!got[0].line.ends_with(b"\n"));
    for (at, result) in got.iter().enumerate() {
        let rest: Vec<_> = client
            .stream_results(results(&result.cursor, false))
            .await
            .unwrap()
            .into_inner()
            .try_collect()
            .await
            .unwrap();
        assert_eq!(rest, got[at + 1..]);
    }
    server.finish(&lease, &key).await;
    assert!(follower.message().await.unwrap().is_none());
    let refused: Result<(), Status> = client.stream_results(results("r1.x", false)).await.map(drop);
    assert_eq!(fields(refused), ["cursor"]);
    let other = client.create_batch(inline(1)).await.unwrap().into_inner();
    let mixed_up = pb::StreamResultsRequest { batch_id: other.id, ..results(&got[3].cursor, false) };
    assert_eq!(fields(client.stream_results(mixed_up).await.map(drop)), ["cursor"]);
}
