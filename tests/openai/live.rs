//! Calls that a worker answers at once.

use std::time::Duration;

use axum::http::StatusCode;
use serde_json::{Value, json};
use tidemill::sim::{Fault, Sim, SimConfig};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    client::{Said, get, post, register},
    support::Server,
};

/// A simulated worker that a server knows.
struct Worker {
    sim: Sim,
    url: String,
    stop: CancellationToken,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Worker {
    async fn start(server: &Server, config: SimConfig) -> Self {
        let sim = Sim::new(config).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (url, stop) = (format!("http://{}", listener.local_addr().unwrap()), CancellationToken::new());
        tokio::spawn(sim.clone().serve(listener, stop.clone()));
        register(server, &url).await;
        Self { sim, url, stop }
    }

    /// The same call without a server between.
    async fn directly(&self, path: &str, body: &str) -> String {
        let request =
            reqwest::Client::new().post(format!("{}{path}", self.url)).header("content-type", "application/json");
        request.header("x-request-id", "same").body(body.to_owned()).send().await.unwrap().text().await.unwrap()
    }
}

/// What streams are compared by: without the time in them.
fn without_time(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("\"created") {
        let digits = after.find(|letter: char| letter.is_ascii_digit()).unwrap_or(0);
        let end = after[digits..].find(|letter: char| !letter.is_ascii_digit()).map_or(after.len(), |end| digits + end);
        out.push_str(before);
        rest = &after[end..];
    }
    out + rest
}

async fn text(server: &Server, path: &str, body: &str) -> (u16, reqwest::header::HeaderMap, String) {
    let request = reqwest::Client::new().post(server.url(path)).header("x-request-id", "same");
    let answer = request.body(body.to_owned()).send().await.unwrap();
    (answer.status().as_u16(), answer.headers().clone(), answer.text().await.unwrap())
}

const CHAT: &str = "/v1/chat/completions";

/// Nothing in it may change on its way: order of keys, spaces, numbers, escapes.
const ODD: &str = "{ \"max_tokens\": 4,  \"messages\":[{\"role\":\"user\",\"content\":\"h\\u00e9llo\"}],\n\t\"x\":1.0e5,\"model\":\"sim\" }";

#[tokio::test(flavor = "multi_thread")]
async fn bodies_and_answers_pass_untouched_on_every_path() {
    let server = Server::start().await;
    let worker = Worker::start(&server, SimConfig::default()).await;
    worker.sim.faults().record(true);
    let (status, headers, said) = text(&server, CHAT, ODD).await;
    assert_eq!(
        (status, &headers["content-type"], &headers["x-request-id"]),
        (200, &"application/json".parse().unwrap(), &"same".parse().unwrap())
    );
    assert_eq!(without_time(&said), without_time(&worker.directly(CHAT, ODD).await));
    let recorded = worker.sim.faults().recorded();
    assert_eq!((&recorded[0].body[..], recorded[0].path), (ODD.as_bytes(), CHAT));
    let chat = r#"[{"role":"user","content":"hello"}]"#;
    for (path, body) in [
        ("/v1/completions", r#"{"model":"sim","prompt":"a"}"#.to_owned()),
        ("/v1/embeddings", r#"{"model":"sim","input":["a","b"]}"#.to_owned()),
        ("/v1/responses", r#"{"model":"sim","input":"a"}"#.to_owned()),
        ("/v1/score", r#"{"model":"sim","text_1":"a","text_2":"b"}"#.to_owned()),
        ("/v1/rerank", r#"{"model":"sim","query":"a","documents":["b"]}"#.to_owned()),
        ("/v1/messages", format!(r#"{{"model":"sim","max_tokens":4,"messages":{chat}}}"#)),
        ("/v1/messages/count_tokens", format!(r#"{{"model":"sim","messages":{chat}}}"#)),
    ] {
        let (status, _, said) = text(&server, path, &body).await;
        assert_eq!(status, 200, "{path} {said}");
        assert_eq!(without_time(&said), without_time(&worker.directly(path, &body).await), "{path}");
    }
    // A refusal of the worker's passes, too.
    let body = r#"{"model":"sim","messages":[]}"#;
    let (status, _, said) = text(&server, CHAT, body).await;
    assert_eq!((status, said), (400, worker.directly(CHAT, body).await));
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_pass_as_they_come() {
    let server = Server::start().await;
    let worker = Worker::start(&server, SimConfig::default()).await;
    for (path, body, last) in [
        (CHAT, r#"{"model":"sim","stream":true,"messages":[{"role":"user","content":"a b c"}]}"#, "data: [DONE]\n\n"),
        ("/v1/completions", r#"{"model":"sim","stream":true,"prompt":"a b"}"#, "data: [DONE]\n\n"),
        ("/v1/responses", r#"{"model":"sim","stream":true,"input":"a b"}"#, "\n\n"),
        (
            "/v1/messages",
            r#"{"model":"sim","stream":true,"max_tokens":4,"messages":[{"role":"user","content":"a b"}]}"#,
            "\n\n",
        ),
    ] {
        let (status, headers, said) = text(&server, path, body).await;
        assert_eq!(status, 200, "{said}");
        assert_eq!(headers["content-type"], "text/event-stream; charset=utf-8");
        assert_eq!(
            (&headers["cache-control"], &headers["x-accel-buffering"]),
            (&"no-cache".parse().unwrap(), &"no".parse().unwrap())
        );
        assert!(said.ends_with(last) && !said.contains("worker_lost"), "{path} {said}");
        assert_eq!(without_time(&said), without_time(&worker.directly(path, body).await), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_in_mid_stream_is_told_in_the_stream() {
    let server = Server::start().await;
    let worker = Worker::start(&server, SimConfig::default()).await;
    for (path, body, event) in [
        (CHAT, r#"{"model":"sim","stream":true,"messages":[{"role":"user","content":"a b c"}]}"#, "data: {\"error\":{"),
        (
            "/v1/responses",
            r#"{"model":"sim","stream":true,"input":"a b c"}"#,
            "event: error\ndata: {\"code\":\"worker_lost\"",
        ),
        (
            "/v1/messages",
            r#"{"model":"sim","stream":true,"max_tokens":4,"messages":[{"role":"user","content":"a b"}]}"#,
            "event: error\ndata: {\"error\":{",
        ),
    ] {
        worker.sim.faults().next(1, Fault::Truncate);
        // The worker is suspected after each until its next probe.
        let (status, _, said) = until_served(&server, path, body).await;
        assert_eq!(status, 200, "{said}");
        let last = said.trim_end().rsplit("\n\n").next().unwrap();
        assert!(last.starts_with(event), "{path}: {said}");
        assert!(said.ends_with("\n\n") && !said.contains("[DONE]") && !said.contains("message_stop"), "{said}");
    }
}

/// Asks again while the worker is only suspected to be down.
async fn until_served(server: &Server, path: &str, body: &str) -> (u16, reqwest::header::HeaderMap, String) {
    for _ in 0..300 {
        let answer = text(server, path, body).await;
        if answer.0 != 503 {
            return answer;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("no worker came back");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_worker_takes_what_one_refuses_before_its_first_byte() {
    let server = Server::start().await;
    let one = Worker::start(&server, SimConfig::default()).await;
    let two = Worker::start(&server, SimConfig { seed: 7, ..SimConfig::default() }).await;
    for body in [
        r#"{"model":"sim","stream":true,"messages":[{"role":"user","content":"a"}]}"#,
        r#"{"model":"sim","messages":[{"role":"user","content":"a"}]}"#,
    ] {
        for fault in [
            Fault::Fail { status: StatusCode::SERVICE_UNAVAILABLE, retry_after: None },
            Fault::Fail { status: StatusCode::TOO_MANY_REQUESTS, retry_after: None },
            Fault::Fail { status: StatusCode::BAD_GATEWAY, retry_after: None },
            Fault::Reset,
        ] {
            // Whichever is asked first refuses; the other has nothing planned.
            one.sim.faults().always(Some(fault));
            for _ in 0..2 {
                let (status, _, said) = text(&server, CHAT, body).await;
                assert_eq!(status, 200, "{fault:?} {said}");
            }
            one.sim.faults().clear();
        }
    }
    // Where all refuse, the last refusal is the answer.
    for worker in [&one, &two] {
        let fault = Fault::Fail { status: StatusCode::TOO_MANY_REQUESTS, retry_after: Some(Duration::from_secs(7)) };
        worker.sim.faults().always(Some(fault));
    }
    let body = r#"{"model":"sim","stream":true,"messages":[{"role":"user","content":"a"}]}"#;
    let (status, headers, said) = until_served(&server, CHAT, body).await;
    assert_eq!((status, &headers["retry-after"]), (429, &"7".parse().unwrap()), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_takes_its_request_with_it() {
    let server = Server::start().await;
    let slow = SimConfig { latency: Duration::from_secs(600), ..SimConfig::default() };
    let worker = Worker::start(&server, slow).await;
    for body in [
        r#"{"model":"sim","stream":true,"messages":[{"role":"user","content":"a"}]}"#,
        r#"{"model":"sim","messages":[{"role":"user","content":"a"}]}"#,
    ] {
        let url = server.url(CHAT);
        let call = tokio::spawn(async move { reqwest::Client::new().post(url).body(body).send().await?.text().await });
        let busy = async |wanted: usize| {
            let until = async {
                while worker.sim.faults().in_flight() != wanted {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(30), until).await.unwrap_or_else(|_| panic!("{wanted} in flight"));
        };
        busy(1).await;
        call.abort();
        busy(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_worker_serves_is_told_from_what_none_serves_now() {
    let server = Server::start().await;
    let body = json!({"model": "sim", "messages": [{"role": "user", "content": "a"}]});
    let early = post(&server, CHAT, &body).await;
    assert_eq!(early.error(), (503, Some("no_worker"), None));
    assert!(early.headers.contains_key("retry-after"));
    let worker = Worker::start(
        &server,
        SimConfig { models: vec!["org/some model".into(), "sim".into()], ..SimConfig::default() },
    )
    .await;
    assert_eq!(post(&server, CHAT, &body).await.status, 200);
    let unknown = post(&server, CHAT, &json!({"model": "unheard-of", "messages": []})).await;
    assert_eq!(unknown.error(), (404, Some("model_not_found"), Some("model")));
    let none = post(&server, CHAT, &json!({"messages": []})).await;
    assert_eq!(none.error(), (400, Some("missing_required_parameter"), Some("model")));
    let request = reqwest::Client::new().post(server.url(CHAT)).body("{");
    assert_eq!(Said::of(request.send().await.unwrap()).await.error(), (400, Some("invalid_json"), None));

    let models = get(&server, "/v1/models").await;
    assert_eq!(
        (models.ids(), &models.json["object"]),
        (vec!["org/some model".to_owned(), "sim".to_owned()], &json!("list"))
    );
    for path in ["/v1/models/org%2Fsome%20model", "/v1/models/org/some%20model"] {
        let model = get(&server, path).await;
        assert_eq!(
            (model.status, &model.json["id"], &model.json["object"]),
            (200, &json!("org/some model"), &json!("model"))
        );
        assert!(model.json["created"].is_i64() && model.json["owned_by"].is_string());
    }
    assert_eq!(get(&server, "/v1/models/nothing").await.error(), (404, Some("model_not_found"), Some("model")));
    // A key that the worker refuses is not the client's.
    worker.sim.faults().next(3, Fault::Fail { status: StatusCode::UNAUTHORIZED, retry_after: None });
    assert_eq!(post(&server, CHAT, &body).await.error(), (502, Some("worker_refused"), None));
}

#[tokio::test(flavor = "multi_thread")]
async fn anthropics_clients_are_known_by_their_key_and_told_in_their_shape() {
    let server = Server::guarded().await;
    let _worker = Worker::start(&server, SimConfig::default()).await;
    let call = async |header: &str, value: &str, body: Value| {
        let request = reqwest::Client::new().post(server.url("/v1/messages")).header(header, value);
        let answer = request.header("anthropic-version", "2023-06-01").body(body.to_string()).send().await.unwrap();
        assert!(answer.headers().contains_key("request-id"), "{answer:?}");
        let status = answer.status().as_u16();
        (status, serde_json::from_slice::<Value>(&answer.bytes().await.unwrap()).unwrap())
    };
    let good = || json!({"model": "sim", "max_tokens": 4, "messages": [{"role": "user", "content": "a"}]});
    for (header, value) in [("x-api-key", "ana"), ("authorization", "Bearer ana")] {
        let (status, said) = call(header, value, good()).await;
        assert_eq!(
            (status, &said["type"], &said["content"][0]["type"]),
            (200, &json!("message"), &json!("text")),
            "{said}"
        );
    }
    let (status, said) = call("x-api-key", "nobody", good()).await;
    assert_eq!((status, &said["type"], &said["error"]["type"]), (401, &json!("error"), &json!("authentication_error")));
    let (status, said) = call("x-api-key", "ana", json!({})).await;
    assert_eq!((status, &said["error"]["type"]), (400, &json!("invalid_request_error")));
    let (status, said) = call("x-api-key", "ana", json!({"model": "unheard-of"})).await;
    assert_eq!((status, &said["error"]["type"]), (404, &json!("not_found_error")), "{said}");
}
