//! Who may do what.

use futures::TryStreamExt;
use tidemill::pb;
use tonic::Code;

use crate::support::{Server, expect, get, inline, lines, of_file, upload};

#[tokio::test]
async fn without_a_good_token_nothing_is_told() {
    let server = Server::guarded().await;
    let mut nobody = server.client_of(None).await;
    expect(nobody.create_batch(inline(1)).await, Code::Unauthenticated, "TOKEN_MISSING");
    expect(
        server.workers(None).await.list_workers(pb::ListWorkersRequest {}).await,
        Code::Unauthenticated,
        "TOKEN_MISSING",
    );
    let mut wrong = server.client_of(Some("rot")).await;
    expect(wrong.create_batch(inline(1)).await, Code::Unauthenticated, "TOKEN_UNKNOWN");
    let mut health = tonic_health::pb::health_client::HealthClient::new(server.channel().await);
    health.check(tonic_health::pb::HealthCheckRequest::default()).await.unwrap();
}

#[tokio::test]
async fn submitters_see_their_own_and_admins_see_all() {
    let server = Server::guarded().await;
    let mut ana = server.client_of(Some("ana")).await;
    let mut bob = server.client_of(Some("bob")).await;
    let mut root = server.client_of(Some("root")).await;
    let file = upload(&mut ana, lines(2)).await;
    let batch = ana.create_batch(of_file(&file)).await.unwrap().into_inner();
    assert_eq!(ana.get_batch(get(&batch.id)).await.unwrap().into_inner().id, batch.id);
    assert_eq!(root.get_batch(get(&batch.id)).await.unwrap().into_inner().id, batch.id);

    let id = batch.id.clone();
    expect(bob.get_batch(get(&id)).await, Code::NotFound, "BATCH_NOT_FOUND");
    let cancel = pb::CancelBatchRequest { batch_id: id.clone() };
    expect(bob.cancel_batch(cancel).await, Code::NotFound, "BATCH_NOT_FOUND");
    let watch = pb::WatchBatchRequest { batch_id: id.clone(), ..Default::default() };
    expect(bob.watch_batch(watch).await.map(drop), Code::NotFound, "BATCH_NOT_FOUND");
    let results = pb::StreamResultsRequest { batch_id: id.clone(), ..Default::default() };
    expect(bob.stream_results(results).await.map(drop), Code::NotFound, "BATCH_NOT_FOUND");
    let retry = pb::RetryFailedRequestsRequest { batch_id: id.clone(), ..Default::default() };
    expect(bob.retry_failed_requests(retry).await, Code::NotFound, "BATCH_NOT_FOUND");
    expect(bob.create_batch(of_file(&file)).await, Code::NotFound, "FILE_NOT_FOUND");
    let get_file = pb::GetFileRequest { file_id: file.id.clone() };
    expect(bob.get_file(get_file).await, Code::NotFound, "FILE_NOT_FOUND");
    let delete = pb::DeleteFileRequest { file_id: file.id.clone() };
    expect(bob.delete_file(delete).await, Code::NotFound, "FILE_NOT_FOUND");
    let download = pb::DownloadFileRequest { file_id: file.id.clone(), offset: 0 };
    expect(bob.download_file(download).await.map(drop), Code::NotFound, "FILE_NOT_FOUND");

    let all = pb::ListBatchesRequest::default();
    assert!(bob.list_batches(all.clone()).await.unwrap().into_inner().batches.is_empty());
    assert_eq!(root.list_batches(all).await.unwrap().into_inner().batches.len(), 1);
    assert!(bob.list_files(pb::ListFilesRequest::default()).await.unwrap().into_inner().files.is_empty());
    assert_eq!(root.list_files(pb::ListFilesRequest::default()).await.unwrap().into_inner().files.len(), 1);

    // Idempotency keys are each caller's own.
    let with_id = pb::CreateBatchRequest { request_id: "same".into(), ..inline(1) };
    let hers = ana.create_batch(with_id.clone()).await.unwrap().into_inner();
    let his = bob.create_batch(with_id).await.unwrap().into_inner();
    assert_ne!(hers.id, his.id);

    // A dashboard shows what its caller may see.
    let events = bob.watch_batches(pb::WatchBatchesRequest::default()).await.unwrap().into_inner();
    let first = Box::pin(events).try_next().await.unwrap().unwrap();
    assert_eq!(first.batch_id, his.id);
}

#[tokio::test]
async fn only_admins_change_workers_and_see_dead_letters() {
    let server = Server::guarded().await;
    let register = pb::RegisterWorkerRequest { url: "http://127.0.0.1:9".into(), ..Default::default() };
    let mut ana = server.workers(Some("ana")).await;
    let mut root = server.workers(Some("root")).await;
    expect(ana.register_worker(register.clone()).await, Code::PermissionDenied, "ADMIN_ONLY");
    let worker = root.register_worker(register.clone()).await.unwrap().into_inner();
    assert_eq!(root.register_worker(register).await.unwrap().into_inner().id, worker.id);
    let listed = ana.list_workers(pb::ListWorkersRequest {}).await.unwrap().into_inner().workers;
    assert_eq!(listed.iter().map(|one| &one.id).collect::<Vec<_>>(), [&worker.id]);
    assert!(listed[0].url.is_empty() && listed[0].last_error.is_empty(), "where it is, is for admins: {listed:?}");
    assert_eq!(worker.url, "http://127.0.0.1:9");
    let drain = pb::DrainWorkerRequest { worker_id: worker.id.clone() };
    let remove = pb::RemoveWorkerRequest { worker_id: worker.id.clone() };
    expect(ana.drain_worker(drain.clone()).await, Code::PermissionDenied, "ADMIN_ONLY");
    expect(ana.remove_worker(remove.clone()).await, Code::PermissionDenied, "ADMIN_ONLY");
    let drained = root.drain_worker(drain).await.unwrap().into_inner();
    assert_eq!(drained.state(), pb::WorkerState::Draining);
    root.remove_worker(remove.clone()).await.unwrap();
    expect(root.remove_worker(remove).await, Code::NotFound, "WORKER_NOT_FOUND");
    let bad = root.register_worker(pb::RegisterWorkerRequest { url: "ftp://x".into(), ..Default::default() }).await;
    expect(bad, Code::InvalidArgument, "INVALID_REQUEST");

    // A worker's own health check: its path is for admins too.
    let url = "http://127.0.0.1:9".to_owned();
    let with = |path: &str, seconds| pb::RegisterWorkerRequest {
        url: url.clone(),
        health_path: Some(path.into()),
        health_interval: Some(prost_types::Duration { seconds, nanos: 0 }),
    };
    let own = root.register_worker(with("/ok", 5)).await.unwrap().into_inner();
    assert_eq!((own.health_path.as_str(), own.health_interval.unwrap().seconds), ("/ok", 5));
    let listed = ana.list_workers(pb::ListWorkersRequest {}).await.unwrap().into_inner().workers;
    assert_eq!((listed[0].health_path.as_str(), listed[0].health_interval), ("", own.health_interval));
    let defaults = root.register_worker(with("", 0)).await.unwrap().into_inner();
    assert_eq!((defaults.health_path.as_str(), defaults.health_interval), ("", None));
    for (path, seconds) in [("health", 5), ("/a?b", 5), ("/a\0", 5), ("/ok", -1), ("/ok", 3_601), ("/ok", i64::MIN)] {
        expect(root.register_worker(with(path, seconds)).await, Code::InvalidArgument, "INVALID_REQUEST");
    }

    // Everybody sees their own endpoints, and admins all.
    let create = pb::CreateEndpointRequest { url: "http://127.0.0.1:9/".into(), ..Default::default() };
    let made = server.webhooks(Some("ana")).await.create_endpoint(create).await.unwrap().into_inner().endpoint.unwrap();
    let get = pb::GetEndpointRequest { endpoint_id: made.id };
    assert!(server.webhooks(Some("root")).await.get_endpoint(get.clone()).await.is_ok());
    assert!(server.webhooks(Some("ana")).await.get_endpoint(get.clone()).await.is_ok());
    expect(server.webhooks(Some("bob")).await.get_endpoint(get).await, Code::NotFound, "ENDPOINT_NOT_FOUND");
}

#[tokio::test]
async fn metrics_are_for_admins_and_probes_for_all() {
    let server = Server::guarded().await;
    let http = reqwest::Client::new();
    for path in ["/healthz", "/readyz"] {
        assert_eq!(http.get(server.url(path)).send().await.unwrap().status(), 200);
    }
    let metrics = || http.get(server.url("/metrics"));
    assert_eq!(metrics().send().await.unwrap().status(), 401);
    assert_eq!(metrics().bearer_auth("rot").send().await.unwrap().status(), 401);
    assert_eq!(metrics().bearer_auth("ana").send().await.unwrap().status(), 403);
    assert_eq!(metrics().bearer_auth("root").send().await.unwrap().status(), 200);
}
