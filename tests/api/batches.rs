//! Batches over the wire.

use tidemill::{domain::FileId, pb};
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{CHAT, Server, expect, fields, get, inline, lines, lines_of, of_file, upload};

#[tokio::test]
async fn a_batch_is_made_of_a_file_and_says_why_it_waits() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let file = upload(&mut client, lines(3)).await;
    assert_eq!((file.line_count, file.models.clone(), file.endpoint.as_str()), (3, vec!["m".to_owned()], CHAT));
    let mut request = of_file(&file);
    request.metadata.insert("team".into(), "blue".into());
    request.priority = 1;
    let batch = client.create_batch(request).await.unwrap().into_inner();
    assert_eq!(batch.status(), pb::BatchStatus::InProgress);
    assert_eq!(batch.completion_window.unwrap().seconds, 86_400);
    assert_eq!(batch.request_counts.unwrap().total, 3);
    assert_eq!((batch.priority, batch.metadata["team"].as_str(), batch.endpoint.as_str()), (1, "blue", CHAT));
    assert!(batch.waiting_reason.contains("no worker is registered"), "{}", batch.waiting_reason);
    let again = client.get_batch(get(&batch.id)).await.unwrap().into_inner();
    assert_eq!(again, batch);
    expect(client.get_batch(get("batch_none")).await, Code::NotFound, "BATCH_NOT_FOUND");
    expect(client.get_batch(get("batch_\0")).await, Code::NotFound, "BATCH_NOT_FOUND");
    expect(client.get_batch(get("")).await, Code::InvalidArgument, "INVALID_REQUEST");
}

#[tokio::test]
async fn bad_requests_name_their_fields() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let file = upload(&mut client, lines(1)).await;
    let bad = pb::CreateBatchRequest {
        completion_window: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
        priority: 2,
        ..of_file(&file)
    };
    assert_eq!(fields(client.create_batch(bad).await), ["completion_window", "priority"]);
    let bad = pb::CreateBatchRequest { endpoint: "/v1/completions".into(), ..of_file(&file) };
    assert_eq!(fields(client.create_batch(bad).await), ["endpoint"]);
    let bad = pb::CreateBatchRequest { endpoint: String::new(), ..inline(1) };
    assert_eq!(fields(client.create_batch(bad).await), ["endpoint"]);
    assert_eq!(fields(client.create_batch(inline(0)).await), ["inline_requests.requests"]);
    assert_eq!(fields(client.create_batch(inline(1_001)).await), ["inline_requests.requests"]);
    assert_eq!(fields(client.create_batch(pb::CreateBatchRequest::default()).await), ["input"]);
    let mut bad = inline(2);
    let Some(pb::create_batch_request::Input::InlineRequests(requests)) = &mut bad.input else { panic!() };
    requests.requests[1].body = "{}".into();
    let status = client.create_batch(bad).await.unwrap_err();
    assert_eq!(status.get_details_error_info().unwrap().reason, "INVALID_FILE");
    assert_eq!(fields::<()>(Err(status)), ["inline_requests.requests[1]"]);
    let missing = pb::File { id: FileId::generate().into_string(), ..file };
    expect(client.create_batch(of_file(&missing)).await, Code::NotFound, "FILE_NOT_FOUND");
}

#[tokio::test]
async fn the_same_request_id_gives_the_same_batch_whatever_became_of_its_file() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let file = upload(&mut client, lines(2)).await;
    let request = pb::CreateBatchRequest { request_id: "r1".into(), ..of_file(&file) };
    let first = client.create_batch(request.clone()).await.unwrap().into_inner();
    assert_eq!(client.create_batch(request.clone()).await.unwrap().into_inner().id, first.id);
    let delete = pb::DeleteFileRequest { file_id: file.id.clone() };
    expect(client.delete_file(delete.clone()).await, Code::FailedPrecondition, "FILE_IN_USE");
    for other in [
        pb::CreateBatchRequest { priority: 1, ..request.clone() },
        pb::CreateBatchRequest { metadata: [("a".to_owned(), "b".to_owned())].into(), ..request.clone() },
        pb::CreateBatchRequest { request_id: "r1".into(), ..inline(1) },
    ] {
        expect(client.create_batch(other).await, Code::AlreadyExists, "REQUEST_ID_REUSED");
    }
    server.run_batch(&first.id, 2).await;
    client.delete_file(delete.clone()).await.unwrap();
    expect(client.delete_file(delete).await, Code::NotFound, "FILE_NOT_FOUND");
    let again = client.create_batch(request).await.unwrap().into_inner();
    assert_eq!((again.id.as_str(), again.status()), (first.id.as_str(), pb::BatchStatus::Completed));
    assert!(!again.output_file_id.is_empty() && again.error_file_id.is_empty());
}

#[tokio::test]
async fn inline_requests_with_a_request_id_leave_one_file() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let request = pb::CreateBatchRequest { request_id: "r1".into(), ..inline(3) };
    let (mut a, mut b) = (client.clone(), client.clone());
    let (a, b) = tokio::join!(a.create_batch(request.clone()), b.create_batch(request.clone()));
    let (a, b) = (a.unwrap().into_inner(), b.unwrap().into_inner());
    let c = client.create_batch(request).await.unwrap().into_inner();
    assert!(a.id == b.id && b.id == c.id && a.input_file_id == c.input_file_id);
    let files = client.list_files(pb::ListFilesRequest::default()).await.unwrap().into_inner().files;
    assert_eq!(files.len(), 1);
    assert_eq!(files[0].id, a.input_file_id);
    let other = pb::CreateBatchRequest { request_id: "r1".into(), ..inline(2) };
    expect(client.create_batch(other).await, Code::AlreadyExists, "REQUEST_ID_REUSED");
}

#[tokio::test]
async fn lists_go_page_by_page_with_the_same_filters() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let mut ids = Vec::new();
    for at in 0..5 {
        let file = upload(&mut client, lines_of(1, if at % 2 == 0 { "even" } else { "odd" })).await;
        let mut request = of_file(&file);
        request.metadata.insert("at".into(), at.to_string());
        ids.push(client.create_batch(request).await.unwrap().into_inner().id);
    }
    let newest_first: Vec<_> = ids.iter().rev().cloned().collect();
    let (mut seen, mut token) = (Vec::new(), String::new());
    loop {
        let request = pb::ListBatchesRequest { page_size: 2, page_token: token, ..Default::default() };
        let page = client.list_batches(request).await.unwrap().into_inner();
        assert!(page.batches.len() <= 2);
        seen.extend(page.batches.into_iter().map(|batch| batch.id));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, newest_first);

    let list = async |request: pb::ListBatchesRequest| {
        let page = client.clone().list_batches(request).await.unwrap().into_inner();
        (page.batches.into_iter().map(|batch| batch.id).collect::<Vec<_>>(), page.next_page_token)
    };
    let even = pb::ListBatchesRequest { model: "even".into(), page_size: 2, ..Default::default() };
    let (found, token) = list(even.clone()).await;
    assert_eq!(found, [ids[4].clone(), ids[2].clone()]);
    let (rest, end) = list(pb::ListBatchesRequest { page_token: token.clone(), ..even.clone() }).await;
    assert_eq!((rest, end.as_str()), (vec![ids[0].clone()], ""));
    let at = pb::ListBatchesRequest { metadata: [("at".to_owned(), "3".to_owned())].into(), ..Default::default() };
    assert_eq!(list(at).await.0, [ids[3].clone()]);
    let done = pb::ListBatchesRequest { statuses: vec![pb::BatchStatus::Completed.into()], ..Default::default() };
    assert!(list(done.clone()).await.0.is_empty());
    server.run_batch(&ids[1], 1).await;
    assert_eq!(list(done).await.0, [ids[1].clone()]);

    let odd = pb::ListBatchesRequest { model: "odd".into(), page_token: token.clone(), ..Default::default() };
    assert_eq!(fields(client.list_batches(odd).await), ["page_token"]);
    let files = pb::ListFilesRequest { page_token: token, ..Default::default() };
    assert_eq!(fields(client.list_files(files).await), ["page_token"]);
    let bad = pb::ListBatchesRequest { page_size: 1_001, ..Default::default() };
    assert_eq!(fields(client.list_batches(bad).await), ["page_size"]);
}

#[tokio::test]
async fn cancelling_is_idempotent_until_the_batch_has_ended_otherwise() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let batch = client.create_batch(inline(2)).await.unwrap().into_inner();
    let cancel = |id: &str| pb::CancelBatchRequest { batch_id: id.to_owned() };
    for _ in 0..2 {
        let now = client.cancel_batch(cancel(&batch.id)).await.unwrap().into_inner();
        assert_eq!(now.status(), pb::BatchStatus::Cancelling);
    }
    let done = client.create_batch(inline(2)).await.unwrap().into_inner();
    server.run_batch(&done.id, 2).await;
    expect(client.cancel_batch(cancel(&done.id)).await, Code::FailedPrecondition, "BATCH_TERMINAL");
    expect(client.cancel_batch(cancel("batch_x")).await, Code::NotFound, "BATCH_NOT_FOUND");
}

#[tokio::test]
async fn only_failed_requests_of_an_ended_batch_are_retried() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let batch = client.create_batch(inline(2)).await.unwrap().into_inner();
    let retry = |id: &str| pb::RetryFailedRequestsRequest { batch_id: id.to_owned(), ..Default::default() };
    let answer = client.retry_failed_requests(retry(&batch.id)).await;
    expect(answer, Code::FailedPrecondition, "BATCH_NOT_ENDED");
    server.run_batch(&batch.id, 2).await;
    let answer = client.retry_failed_requests(retry(&batch.id)).await;
    expect(answer, Code::FailedPrecondition, "NO_FAILED_REQUESTS");
    expect(client.retry_failed_requests(retry("batch_x")).await, Code::NotFound, "BATCH_NOT_FOUND");
}

#[tokio::test]
async fn a_request_to_run_now_needs_a_worker() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let infer = |body: &str| pb::InferRequest { endpoint: CHAT.into(), body: body.to_owned().into() };
    let status = client.infer(infer(r#"{"model":"m"}"#)).await.unwrap_err();
    assert!(status.get_details_retry_info().is_some());
    expect::<()>(Err(status), Code::Unavailable, "NO_WORKER");
    assert_eq!(fields(client.infer(infer(r#"{"model":"m","stream":true}"#)).await), ["body"]);
    assert_eq!(fields(client.infer(pb::InferRequest::default()).await), ["endpoint", "body"]);
}
