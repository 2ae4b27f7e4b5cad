//! Files over the wire.

use futures::TryStreamExt;
use tidemill::{domain::Scope, pb};
use tonic::{Code, codec::CompressionEncoding};
use tonic_types::StatusExt;

use crate::direct;
use crate::support::{Server, chunk, expect, fields, flip, inline, lines, spec, upload};

#[tokio::test]
async fn an_upload_begins_with_its_spec_and_goes_on_in_chunks() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let mut send = async |messages: Vec<pb::UploadFileRequest>| client.upload_file(tokio_stream::iter(messages)).await;
    let start = || spec(pb::FileSpec { filename: "f.jsonl".into(), ..Default::default() });
    assert_eq!(fields(send(vec![]).await), ["spec"]);
    assert_eq!(fields(send(vec![chunk(lines(1))]).await), ["spec"]);
    assert_eq!(fields(send(vec![start(), start()]).await), ["spec"]);
    assert_eq!(fields(send(vec![start(), chunk("")]).await), ["chunk"]);
    assert_eq!(fields(send(vec![start(), pb::UploadFileRequest::default()]).await), ["chunk"]);
    assert_eq!(fields(send(vec![start(), chunk(vec![b'x'; 1_048_577])]).await), ["chunk"]);
    let bad = pb::FileSpec {
        filename: "x".repeat(256),
        purpose: "fine-tune".into(),
        total_bytes: -1,
        request_id: "x".repeat(129),
        expires_after: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
    };
    let expected = ["spec.filename", "spec.purpose", "spec.total_bytes", "spec.request_id", "spec.expires_after"];
    assert_eq!(fields(send(vec![spec(bad)]).await), expected);
    expect(send(vec![start()]).await, Code::InvalidArgument, "FILE_EMPTY");
    let short = spec(pb::FileSpec { total_bytes: 5, ..Default::default() });
    expect(send(vec![short, chunk(lines(1))]).await, Code::InvalidArgument, "FILE_SIZE_MISMATCH");

    let bytes = lines(500);
    let mut messages = vec![start()];
    messages.extend(bytes.chunks(1_000).map(|piece| chunk(piece.to_vec())));
    let file = send(messages).await.unwrap().into_inner();
    assert_eq!((file.filename.as_str(), file.line_count, file.purpose.as_str()), ("f.jsonl", 500, "batch"));
    let got = client.get_file(pb::GetFileRequest { file_id: file.id.clone() }).await.unwrap().into_inner();
    assert_eq!(got, file);
}

#[tokio::test]
async fn an_upload_with_the_same_request_id_is_the_same_file() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let start = || spec(pb::FileSpec { request_id: "r".into(), ..Default::default() });
    let mut send = async || {
        let messages = tokio_stream::iter([start(), chunk(lines(2))]);
        client.upload_file(messages).await.unwrap().into_inner()
    };
    let (first, second) = (send().await, send().await);
    assert_eq!(first, second);
    // Whoever sends nothing asks for it.
    let asked = client.upload_file(tokio_stream::iter([start()])).await.unwrap().into_inner();
    assert_eq!(asked, first);
    let size = i64::try_from(lines(2).len()).unwrap();
    let sized = spec(pb::FileSpec { request_id: "r".into(), total_bytes: size + 1, ..Default::default() });
    let other = String::from_utf8(lines(2)).unwrap().replace("c1", "c9").into_bytes();
    let pieces = other.chunks(7).map(|piece| chunk(piece.to_vec()));
    for messages in [
        vec![start(), chunk(other.clone())],
        std::iter::once(start()).chain(pieces).collect(),
        vec![start(), chunk(lines(3))],
        vec![start(), chunk(lines(1))],
        vec![sized, chunk(lines(2))],
    ] {
        let refused = client.upload_file(tokio_stream::iter(messages)).await;
        expect(refused, Code::AlreadyExists, "REQUEST_ID_REUSED");
    }
    let pieces = lines(2).chunks(7).map(|piece| chunk(piece.to_vec())).collect::<Vec<_>>();
    let again = client.upload_file(tokio_stream::iter(std::iter::once(start()).chain(pieces))).await.unwrap();
    assert_eq!(again.into_inner(), first);
}

#[tokio::test]
async fn bad_lines_come_back_with_their_numbers() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let mut bytes = lines(2);
    bytes.extend(b"{}\n".repeat(5_000));
    let messages = tokio_stream::iter([spec(pb::FileSpec::default()), chunk(bytes)]);
    let status = client.upload_file(messages).await.unwrap_err();
    assert!(status.message().starts_with("5000 bad lines"), "{}", status.message());
    assert!(status.details().len() < 5_500, "{}", status.details().len());
    let bad = status.get_details_bad_request().unwrap().field_violations;
    assert!(bad.len() > 30, "{}", bad.len());
    assert_eq!((bad[0].field.as_str(), bad[1].field.as_str()), ("line 3", "line 4"));
    expect::<()>(Err(status), Code::InvalidArgument, "INVALID_FILE");
    assert!(server.store.files(&tidemill::store::FileFilter::within(Scope::All), None, 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_download_resumes_anywhere_up_to_the_end() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let bytes = lines(30_000);
    let pieces = bytes.chunks(1 << 20).map(|piece| chunk(piece.to_vec()));
    let messages: Vec<_> = std::iter::once(spec(pb::FileSpec::default())).chain(pieces).collect();
    let file = client.upload_file(tokio_stream::iter(messages)).await.unwrap().into_inner();
    let size = i64::try_from(bytes.len()).unwrap();
    assert!(size > 2 << 20);
    let from = |offset: i64| pb::DownloadFileRequest { file_id: file.id.clone(), offset };
    for offset in [0, 1, 1 << 20, size - 1, size] {
        let chunks: Vec<_> =
            client.download_file(from(offset)).await.unwrap().into_inner().try_collect().await.unwrap();
        let mut at = offset;
        let mut got = Vec::new();
        for chunk in chunks {
            assert_eq!(chunk.offset, at);
            assert!(chunk.data.len() <= 1 << 20);
            at += i64::try_from(chunk.data.len()).unwrap();
            got.extend(chunk.data);
        }
        assert!(got == bytes[usize::try_from(offset).unwrap()..], "from {offset}");
    }
    expect(client.download_file(from(size + 1)).await, Code::OutOfRange, "OFFSET_OUT_OF_RANGE");
    assert_eq!(fields(client.download_file(from(-1)).await), ["offset"]);
    let missing = pb::DownloadFileRequest { file_id: "file-none".into(), offset: 0 };
    expect(client.download_file(missing).await, Code::NotFound, "FILE_NOT_FOUND");
}

#[tokio::test]
async fn a_reader_that_stands_still_does_not_stop_another_on_its_connection() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let bytes = lines(80_000);
    let pieces = bytes.chunks(1 << 20).map(|piece| chunk(piece.to_vec()));
    let messages: Vec<_> = std::iter::once(spec(pb::FileSpec::default())).chain(pieces).collect();
    let file = client.upload_file(tokio_stream::iter(messages)).await.unwrap().into_inner();
    let request = pb::DownloadFileRequest { file_id: file.id, offset: 0 };
    // Far more than a stream's window, so the one that stands still fills its own.
    assert!(bytes.len() > 6 << 20);
    let mut still = client.download_file(request.clone()).await.unwrap().into_inner();
    still.message().await.unwrap().unwrap();
    let chunks: Vec<_> = client.download_file(request).await.unwrap().into_inner().try_collect().await.unwrap();
    assert_eq!(chunks.iter().map(|chunk| chunk.data.len()).sum::<usize>(), bytes.len());
    let rest: Vec<_> = still.try_collect().await.unwrap();
    assert!(rest.len() > 1);
}

#[tokio::test]
async fn an_upload_that_breaks_off_leaves_no_file() {
    let server = Server::start().await;
    let client = server.client().await;
    let (send, receive) = tokio::sync::mpsc::channel(4);
    let mut other = client.clone();
    let call =
        tokio::spawn(async move { other.upload_file(tokio_stream::wrappers::ReceiverStream::new(receive)).await });
    send.send(spec(pb::FileSpec::default())).await.unwrap();
    for _ in 0..20 {
        send.send(chunk(lines(10))).await.unwrap();
    }
    // The client goes away in the middle: its stream is reset, not ended.
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    drop(send);
    // Another call on the same connection comes after the reset.
    let mut client = client;
    upload(&mut client, lines(1)).await;
    let files = client.list_files(pb::ListFilesRequest::default()).await.unwrap().into_inner().files;
    assert_eq!(files.len(), 1);
}

#[tokio::test]
async fn results_are_files_of_their_own_purpose() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let batch = client.create_batch(inline(3)).await.unwrap().into_inner();
    server.run_batch(&batch.id, 2).await;
    let purpose = |purpose: &str| pb::ListFilesRequest { purpose: purpose.into(), ..Default::default() };
    let results = client.list_files(purpose("batch_output")).await.unwrap().into_inner().files;
    assert_eq!(results.len(), 2);
    let inputs = client.list_files(purpose("batch")).await.unwrap().into_inner().files;
    assert_eq!(inputs.iter().map(|file| &file.id).collect::<Vec<_>>(), [&batch.input_file_id]);
    assert_eq!(fields(client.list_files(purpose("other")).await), ["purpose"]);
    let mut request = inline(1);
    request.input = Some(pb::create_batch_request::Input::InputFileId(results[0].id.clone()));
    assert_eq!(fields(client.create_batch(request).await), ["input_file_id"]);
}

#[tokio::test]
async fn messages_may_be_compressed_and_must_not_be_too_large() {
    let server = Server::start().await;
    for encoding in [CompressionEncoding::Gzip, CompressionEncoding::Zstd] {
        let client = server.client().await;
        let mut client = client.send_compressed(encoding).accept_compressed(encoding);
        let file = upload(&mut client, lines(100)).await;
        assert_eq!(file.line_count, 100);
    }
    let mut client = server.client().await;
    let messages = tokio_stream::iter([spec(pb::FileSpec::default()), chunk(vec![b'x'; 5 << 20])]);
    expect(client.upload_file(messages).await, Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
    // A kilobyte that would become 64 MiB is refused too.
    let mut client = server.client().await.send_compressed(CompressionEncoding::Gzip);
    let messages = tokio_stream::iter([spec(pb::FileSpec::default()), chunk(vec![b'x'; 64 << 20])]);
    expect(client.upload_file(messages).await, Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
}

/// A byte that has changed in the blob store never comes with an OK, whichever way it is read.
#[tokio::test]
async fn a_changed_byte_is_data_loss_and_names_the_segment() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let input = upload(&mut client, lines(2_500)).await;
    let create = pb::CreateBatchRequest {
        input: Some(pb::create_batch_request::Input::InputFileId(input.id.clone())),
        endpoint: crate::support::CHAT.into(),
        ..Default::default()
    };
    let batch = client.create_batch(create).await.unwrap().into_inner();
    for (lines, good) in [(1_000, 1_000), (1_000, 990), (500, 500)] {
        let lease = server.claim(&batch.id).await;
        let key = server.part(&lease, 0..lines, good).await;
        server.finish(&lease, &key).await;
    }
    let get = pb::GetBatchRequest { batch_id: batch.id.clone() };
    let ended = client.get_batch(get).await.unwrap().into_inner();
    let segment = tidemill::domain::SegmentIndex(1);
    let id = tidemill::domain::BatchId::from_text(&batch.id);
    let record = server.store.segments(&id, segment, 1).await.unwrap().remove(0);
    let (output, errors) = (ended.output_file_id.clone(), ended.error_file_id.clone());
    let ways = async |client: &mut pb::batch_service_client::BatchServiceClient<_>| {
        let mut all = Vec::new();
        for (file, offset) in [(&input.id, 0), (&input.id, 150_000), (&output, 0), (&output, 40_000), (&errors, 0)] {
            let download = pb::DownloadFileRequest { file_id: file.clone(), offset };
            let chunks: Result<Vec<_>, _> =
                client.download_file(download).await.unwrap().into_inner().try_collect().await;
            all.push(chunks.map(|chunks| chunks.iter().map(|chunk| chunk.data.len()).sum::<usize>()));
        }
        let stream = pb::StreamResultsRequest { batch_id: batch.id.clone(), ..Default::default() };
        let results: Result<Vec<_>, _> = client.stream_results(stream).await.unwrap().into_inner().try_collect().await;
        all.push(results.map(|results| results.len()));
        for url in [
            format!("/v1/files/{}/content", input.id),
            format!("/v1/batches/{}/results", batch.id),
            format!("/v1/batches/{}/errors", batch.id),
        ] {
            let read = async { reqwest::get(server.url(&url)).await?.error_for_status()?.bytes().await };
            all.push(read.await.map(|bytes| bytes.len()).map_err(|_| tonic::Status::data_loss("segment 1 of")));
        }
        all
    };
    assert!(ways(&mut client).await.iter().all(Result::is_ok), "as long as nothing has changed");
    let span = record.span;
    let key = record.object_key.unwrap();
    flip(&server, &key, 40);
    flip(&server, &key, usize::try_from(record.output_bytes).unwrap() + 40);
    let input_key = server
        .store
        .file(&tidemill::domain::FileId::from_text(&input.id), &Scope::All)
        .await
        .unwrap()
        .unwrap()
        .object_key;
    flip(&server, &input_key.unwrap(), usize::try_from(span.offset).unwrap() + 700);
    for (way, read) in ways(&mut client).await.into_iter().enumerate() {
        let refused = read.expect_err(&format!("way {way}"));
        assert_eq!(refused.code(), Code::DataLoss, "way {way}: {refused}");
        assert!(refused.message().contains("segment 1 of"), "way {way}: {refused}");
    }
    // The lines to be tried again would come from it.
    let retry = pb::RetryFailedRequestsRequest { batch_id: batch.id.clone(), ..Default::default() };
    let refused = client.retry_failed_requests(retry).await.unwrap_err();
    assert_eq!(refused.code(), Code::DataLoss, "{refused}");
    // What an earlier version stored without checksums is still read.
    let raw = direct::connect(format!("sqlite://{}", server.folder.path().join("db").display())).await;
    for sql in [
        "UPDATE segments SET crc32c = NULL, input_crc32c = NULL",
        "UPDATE file_segments SET crc32c = NULL",
        "UPDATE files SET crc32c = NULL",
    ] {
        sea_orm::ConnectionTrait::execute_unprepared(&raw, sql).await.unwrap();
    }
    let all = ways(&mut client).await;
    assert!(all.iter().enumerate().all(|(way, read)| way == 5 || read.is_ok()), "{all:?}");
}

/// An object that is shorter than it was does not end its file early with an OK.
#[tokio::test]
async fn a_torn_input_does_not_just_end() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let input = upload(&mut client, lines(100)).await;
    let file = server.store.file(&tidemill::domain::FileId::from_text(&input.id), &Scope::All).await.unwrap().unwrap();
    let path = server.folder.path().join("blobs").join(file.object_key.unwrap());
    let bytes = std::fs::read(&path).unwrap();
    for left in [0, 1, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..left]).unwrap();
        let download = pb::DownloadFileRequest { file_id: input.id.clone(), offset: 0 };
        let chunks: Result<Vec<_>, _> = client.download_file(download).await.unwrap().into_inner().try_collect().await;
        assert_eq!(chunks.unwrap_err().code(), Code::DataLoss, "{left} bytes are left");
    }
}
