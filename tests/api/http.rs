//! What probes, proxies, browsers and generic clients see.

use futures::StreamExt;
use prost::Message;
use tidemill::{
    api::ServerOptions,
    pb::{self, worker_admin_client::WorkerAdminClient},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::{Code, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    patience::ends,
    support::{Server, expect, inline},
};

#[tokio::test]
async fn plain_http_is_answered_on_the_same_port() {
    let server = Server::start().await;
    let http = reqwest::Client::new();
    let get = async |path: &str| {
        let answer = http.get(server.url(path)).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    assert_eq!(get("/healthz").await, (200, "ok\n".into()));
    assert_eq!(get("/readyz").await, (200, "ready\n".into()));
    assert_eq!(get("/metrics").await.0, 200);
    // What is counted before the page is first asked for is not on it.
    let (code, page) = get("/metrics").await;
    assert!(code == 200 && page.contains(r#"tidemill_http_requests_total{route="/metrics",status="200"}"#), "{page}");
    assert_eq!(get("/else").await.0, 404);
    server.store.close().await;
    assert_eq!(get("/healthz").await.0, 200);
    assert_eq!(get("/readyz").await, (503, "the database is not available\n".into()));
    let mut client = server.client().await;
    expect(client.create_batch(inline(1)).await, Code::Unavailable, "DATABASE_UNAVAILABLE");
}

#[tokio::test]
async fn files_are_served_over_plain_http_to_those_who_may_see_them() {
    let server = Server::guarded().await;
    let mut ana = server.client_of(Some("ana")).await;
    let batch = ana.create_batch(inline(1_000)).await.unwrap().into_inner();
    let http = reqwest::Client::new();
    let get = async |path: &str, token: &str, range: &str| {
        let request = http.get(server.url(path)).bearer_auth(token);
        let request = if range.is_empty() { request } else { request.header("range", range) };
        let answer = request.send().await.unwrap();
        let range = answer.headers().get("content-range").map(|value| value.to_str().unwrap().to_owned());
        let status = answer.status().as_u16();
        (status, range, answer.bytes().await.unwrap())
    };
    let results = format!("/v1/batches/{}/results", batch.id);
    let (status, _, said) = get(&results, "ana", "").await;
    let said: serde_json::Value = serde_json::from_slice(&said).unwrap();
    assert_eq!((status, &said["error"]["message"]), (404, &"the batch has no output file (yet)".into()));
    server.run_batch(&batch.id, 900).await;
    let ended = ana.get_batch(pb::GetBatchRequest { batch_id: batch.id.clone() }).await.unwrap().into_inner();
    let request = pb::DownloadFileRequest { file_id: ended.output_file_id.clone(), offset: 0 };
    let mut chunks = ana.download_file(request).await.unwrap().into_inner();
    let mut whole = Vec::new();
    while let Some(chunk) = chunks.message().await.unwrap() {
        whole.extend_from_slice(&chunk.data);
    }
    let size = whole.len();
    assert!(size > 10_000);
    let content = format!("/v1/files/{}/content", ended.output_file_id);
    for path in [&results, &content] {
        assert_eq!(get(path, "ana", "").await, (200, None, whole.clone().into()));
        let part = get(path, "root", "bytes=0-5").await;
        assert_eq!(part, (206, Some(format!("bytes 0-5/{size}")), whole[..6].to_vec().into()));
        let last = get(path, "root", "bytes=-7").await;
        assert_eq!(
            last,
            (206, Some(format!("bytes {}-{}/{size}", size - 7, size - 1)), whole[size - 7..].to_vec().into())
        );
        for ignored in ["bytes=0-0,5-5", "bytes=5-2", "lines=1-"] {
            assert_eq!(get(path, "ana", ignored).await, (200, None, whole.clone().into()), "{ignored}");
        }
        let (status, range, rest) = get(path, "ana", "bytes=9999-").await;
        assert_eq!((status, range), (206, Some(format!("bytes 9999-{}/{size}", size - 1))));
        assert_eq!(rest, whole[9_999..]);
        let beyond = get(path, "ana", &format!("bytes={size}-")).await;
        assert_eq!((beyond.0, beyond.1), (416, Some(format!("bytes */{size}"))));
        assert_eq!(get(path, "bob", "").await.0, 404);
        assert_eq!(get(path, "nobody", "").await.0, 401);
    }
    let head = http.head(server.url(&content)).bearer_auth("ana").send().await.unwrap();
    assert_eq!(head.headers()["content-length"], size.to_string());
    // What was begun with another version is not gone on with.
    let version = head.headers()["etag"].to_str().unwrap().to_owned();
    for (wanted, status) in [(version.as_str(), 206), ("\"another\"", 200)] {
        let request =
            http.get(server.url(&content)).bearer_auth("ana").header("range", "bytes=1-").header("if-range", wanted);
        assert_eq!(request.send().await.unwrap().status().as_u16(), status, "{wanted}");
    }
    let (status, _, errors) = get(&format!("/v1/batches/{}/errors", batch.id), "ana", "").await;
    assert_eq!((status, memchr::memchr_iter(b'\n', &errors).count()), (200, 100));
    for nonsense in ["/v1/files/../content", "/v1/batches/batch_x/results", "/v1/files/file-x/content"] {
        assert_eq!(get(nonsense, "ana", "").await.0, 404, "{nonsense}");
    }
}

#[tokio::test]
async fn health_is_told_by_service() {
    let server = Server::start().await;
    let mut client = HealthClient::new(server.channel().await);
    for service in ["", "tidemill.v1.BatchService", "tidemill.v1.WorkerAdmin", "tidemill.v1.WebhookAdmin"] {
        let answer = client.check(HealthCheckRequest { service: service.into() }).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
    let status = client.check(HealthCheckRequest { service: "x".into() }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

#[tokio::test]
async fn reflection_tells_of_every_service() {
    let server = Server::start().await;
    let expected =
        ["grpc.health.v1.Health", "tidemill.v1.BatchService", "tidemill.v1.WebhookAdmin", "tidemill.v1.WorkerAdmin"];
    macro_rules! services {
        ($version:ident) => {{
            use tonic_reflection::pb::$version::{
                ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
                server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
            };
            let ask = |message: MessageRequest| {
                let request = ServerReflectionRequest { host: String::new(), message_request: Some(message) };
                tokio_stream::iter([request])
            };
            let mut client = ServerReflectionClient::new(server.channel().await);
            let list = ask(MessageRequest::ListServices(String::new()));
            let mut answers = client.server_reflection_info(list).await.unwrap().into_inner();
            let answer = answers.next().await.unwrap().unwrap().message_response.unwrap();
            let MessageResponse::ListServicesResponse(list) = answer else { panic!("{answer:?}") };
            let symbol = ask(MessageRequest::FileContainingSymbol("tidemill.v1.BatchService".into()));
            let mut answers = client.server_reflection_info(symbol).await.unwrap().into_inner();
            let answer = answers.next().await.unwrap().unwrap().message_response.unwrap();
            assert!(matches!(answer, MessageResponse::FileDescriptorResponse(_)), "{answer:?}");
            list.service.into_iter().map(|service| service.name).collect::<Vec<_>>()
        }};
    }
    for mut listed in [services!(v1), services!(v1alpha)] {
        listed.retain(|name| !name.starts_with("grpc.reflection."));
        listed.sort();
        assert_eq!(listed, expected);
    }
}

/// A grpc-web call over HTTP/1.1, as a browser makes it: the code, and the messages.
async fn web(server: &Server, method: &str, request: &impl Message) -> (i32, Vec<Vec<u8>>) {
    let mut body = vec![0];
    let bytes = request.encode_to_vec();
    body.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
    body.extend(bytes);
    let answer = reqwest::Client::new()
        .post(server.url(method))
        .header("content-type", "application/grpc-web+proto")
        .body(body)
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 200);
    let in_headers = answer.headers().get("grpc-status").map(|value| value.to_str().unwrap().parse().unwrap());
    let bytes = answer.bytes().await.unwrap();
    let (mut rest, mut messages, mut code) = (&bytes[..], Vec::new(), in_headers);
    while let Some((head, tail)) = rest.split_at_checked(5) {
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
        let (frame, tail) = tail.split_at(length);
        rest = tail;
        if head[0] & 0x80 == 0 {
            messages.push(frame.to_vec());
        } else {
            let trailers = String::from_utf8(frame.to_vec()).unwrap();
            let status = trailers.lines().find_map(|line| line.strip_prefix("grpc-status:")).unwrap();
            code = Some(status.trim().parse().unwrap());
        }
    }
    (code.unwrap(), messages)
}

#[tokio::test]
async fn a_browser_speaks_grpc_web() {
    let server = Server::start().await;
    let (code, messages) = web(&server, "/tidemill.v1.BatchService/CreateBatch", &inline(2)).await;
    assert_eq!((code, messages.len()), (0, 1));
    let batch = pb::Batch::decode(&messages[0][..]).unwrap();
    assert_eq!(batch.request_counts.unwrap().total, 2);
    let request = pb::StreamResultsRequest { batch_id: batch.id.clone(), ..Default::default() };
    server.run_batch(&batch.id, 1).await;
    let (code, messages) = web(&server, "/tidemill.v1.BatchService/StreamResults", &request).await;
    assert_eq!((code, messages.len()), (0, 2));
    let missing = pb::GetBatchRequest { batch_id: "batch_x".into() };
    assert_eq!(web(&server, "/tidemill.v1.BatchService/GetBatch", &missing).await.0, Code::NotFound as i32);
    let guarded = Server::guarded().await;
    let refused = web(&guarded, "/tidemill.v1.BatchService/GetBatch", &missing).await;
    assert_eq!(refused.0, Code::Unauthenticated as i32);
}

/// What a request with these headers is answered: the status, and the text.
async fn answered(server: &Server, method: &str, path: &str, headers: &[(&str, &str)]) -> (u16, String) {
    let request = reqwest::Client::new().request(method.parse().unwrap(), server.url(path)).body("{}");
    let answer =
        headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test]
async fn whoever_expects_another_server_is_told_what_this_one_is() {
    let server = Server::start().await;
    let json = [("content-type", "application/json")];
    for (method, path, status) in [
        ("GET", "/", 404),
        ("POST", "/healthz", 405),
        ("GET", "/tidemill.v1.BatchService/ListFiles", 405),
        ("POST", "/tidemill.v1.BatchService/ListFiles", 415),
    ] {
        let (told, text) = answered(&server, method, path, &json).await;
        assert_eq!(told, status, "{method} {path}: {text}");
        assert!(text.contains("tidemill") && text.contains("gRPC"), "{method} {path}: {text}");
    }
}

#[tokio::test]
async fn a_name_of_a_strangers_choice_opens_nothing() {
    let server = Server::start().await;
    let evil = [("host", "attacker.example:4080")];
    for path in ["/healthz", "/metrics", "/v1/files/file-x/content", "/"] {
        let (status, text) = answered(&server, "GET", path, &evil).await;
        assert_eq!(status, 421, "{path}");
        assert!(text.contains("--public-host attacker.example"), "{text}");
    }
    for kind in ["application/grpc-web+proto", "application/grpc-web-text", "application/grpc"] {
        let request = reqwest::Client::new().post(server.url("/tidemill.v1.WorkerAdmin/RegisterWorker"));
        let request = request.header("host", "attacker.example").header("content-type", kind).body(vec![0; 5]);
        let answer = request.send().await.unwrap();
        assert_eq!(answer.headers()["grpc-status"], (Code::PermissionDenied as i32).to_string(), "{kind}");
        assert_eq!(answer.headers()["content-type"], kind);
        assert!(answer.headers()["grpc-message"].to_str().unwrap().contains("--public-host"));
    }
    // gRPC proper names the server in :authority.
    let stranger = Endpoint::from_shared(server.url("")).unwrap().origin("http://attacker.example".parse().unwrap());
    let mut client = WorkerAdminClient::new(stranger.connect().await.unwrap());
    expect(client.list_workers(pb::ListWorkersRequest {}).await, Code::PermissionDenied, "HOST_NOT_ALLOWED");
    for name in ["localhost:4080", "127.0.0.1", "[::1]:1", "tidemill:4080", "tidemill.batch.svc.cluster.local"] {
        assert_eq!(answered(&server, "GET", "/healthz", &[("host", name)]).await.0, 200, "{name}");
    }
    let named = ServerOptions { public_hosts: vec!["batch.example".into()], ..ServerOptions::default() };
    let named = Server::with(named).await;
    assert_eq!(answered(&named, "GET", "/metrics", &[("host", "batch.example")]).await.0, 200);
    assert_eq!(answered(&named, "GET", "/metrics", &[("host", "attacker.example")]).await.0, 421);
    assert_eq!(answered(&Server::guarded().await, "GET", "/healthz", &evil).await.0, 200, "tokens protect it");
}

#[tokio::test]
async fn pages_of_other_sites_change_nothing_and_read_nothing() {
    let server =
        Server::with(ServerOptions { public_hosts: vec!["app.example".into()], ..ServerOptions::default() }).await;
    let path = "/tidemill.v1.WorkerAdmin/ListWorkers";
    let call = async |origin: &str| {
        let request =
            reqwest::Client::new().post(server.url(path)).header("content-type", "application/grpc-web+proto");
        let answer = request.header("origin", origin).body(vec![0; 5]).send().await.unwrap();
        let allowed = answer.headers()["access-control-allow-origin"].to_str().unwrap_or("").to_owned();
        (answer.headers().get("grpc-status").cloned(), allowed, answer.bytes().await.unwrap())
    };
    let own = server.url("");
    for page in [own.as_str(), "https://app.example", "http://app.example:3000"] {
        let (status, allowed, body) = call(page).await;
        assert!(status.is_none() && allowed == page && !body.is_empty(), "{page}: {status:?} {allowed}");
    }
    for page in ["https://attacker.example", "http://localhost:3000", "null"] {
        let request =
            reqwest::Client::new().post(server.url(path)).header("content-type", "application/grpc-web+proto");
        let answer = request.header("origin", page).body(vec![0; 5]).send().await.unwrap();
        assert_eq!(answer.headers()["grpc-status"], (Code::PermissionDenied as i32).to_string(), "{page}");
        assert!(answer.headers().get("access-control-allow-origin").is_none(), "{page}");
        let asks = [("origin", page), ("access-control-request-method", "POST")];
        assert_eq!(answered(&server, "OPTIONS", path, &asks).await.0, 403, "{page}");
    }
    let asks = [("origin", "https://app.example"), ("access-control-request-method", "POST")];
    assert_eq!(answered(&server, "OPTIONS", path, &asks).await.0, 204);
}

#[tokio::test]
async fn a_message_that_trickles_in_does_not_keep_its_call_open() {
    let server = Server::start().await;
    let mut tcp = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let head = "POST /tidemill.v1.BatchService/GetBatch HTTP/1.1\r\nhost: localhost\r\ncontent-type: \
                application/grpc-web+proto\r\ncontent-length: 100\r\n\r\nabc";
    tcp.write_all(head.as_bytes()).await.unwrap();
    let mut said = vec![0; 4_096];
    let read = ends("it is given up", tcp.read(&mut said)).await.unwrap();
    let said = String::from_utf8_lossy(&said[..read]).into_owned();
    assert!(said.contains(&format!("grpc-status: {}", Code::DeadlineExceeded as i32)), "{said}");
}

#[tokio::test]
async fn unknown_methods_are_told_in_grpcs_way() {
    let server = Server::start().await;
    let mut grpc = tonic::client::Grpc::new(server.channel().await);
    for path in ["/tidemill.v2.BatchService/GetBatch", "/tidemill.v1.BatchService/Unheard"] {
        grpc.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<pb::GetBatchRequest, pb::Batch>::default();
        let request = tonic::Request::new(pb::GetBatchRequest::default());
        let answer = grpc.unary(request, path.parse().unwrap(), codec).await;
        expect(answer, Code::Unimplemented, "METHOD_UNKNOWN");
    }
}

#[tokio::test]
async fn a_message_that_cannot_be_read_is_the_clients_mistake() {
    let server = Server::start().await;
    let mut grpc = tonic::client::Grpc::new(server.channel().await);
    grpc.ready().await.unwrap();
    // Its first field is a number, that of GetBatchRequest a string.
    let codec = tonic_prost::ProstCodec::<pb::ListFilesRequest, pb::Batch>::default();
    let request = tonic::Request::new(pb::ListFilesRequest { page_size: 7, ..Default::default() });
    let answer = grpc.unary(request, "/tidemill.v1.BatchService/GetBatch".parse().unwrap(), codec).await;
    expect(answer, Code::InvalidArgument, "MESSAGE_UNREADABLE");
}
