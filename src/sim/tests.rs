//! Through real sockets, as a client sees it.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::*;

struct Served {
    sim: Sim,
    faults: Faults,
    url: String,
    address: SocketAddr,
    client: reqwest::Client,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<io::Result<()>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn serve(config: SimConfig) -> Served {
    // One of several tests is first; the others find it done.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let sim = Sim::new(config).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let task = tokio::spawn(sim.clone().serve(listener, stop.clone()));
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    Served { faults: sim.faults(), sim, url: format!("http://{address}"), address, client, stop, task }
}

impl Served {
    fn post(&self, path: &str, body: &Value) -> reqwest::RequestBuilder {
        let url = format!("{}{path}", self.url);
        self.client.post(url).header("content-type", "application/json").body(body.to_string())
    }

    async fn ask(&self, path: &str, body: Value) -> (u16, Value) {
        let answer = self.post(path, &body).send().await.unwrap();
        (answer.status().as_u16(), serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap())
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let answer = self.client.get(format!("{}{path}", self.url)).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    async fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").await.1;
        let line = text.lines().find(|line| line.starts_with(&format!("vllm:{name}{{"))).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits for the worker to see what a client did. Bounded by the test runner, not by a guess at how fast it is.
    async fn until(&self, reached: impl Fn(&Self) -> bool) {
        while !reached(self) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn chat(said: &str) -> Value {
    json!({"model": "sim", "messages": [{"role": "user", "content": said}], "max_tokens": 3})
}

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn it_presents_itself_like_vllm() {
    let sim = serve(SimConfig { models: vec!["a".into(), "b/c".into()], ..SimConfig::default() }).await;
    assert_eq!(sim.get("/health").await, (200, String::new()));
    let models: Value = serde_json::from_str(&sim.get("/v1/models").await.1).unwrap();
    assert_eq!(models["object"], "list");
    assert_eq!(models["data"][1]["id"], "b/c");
    assert_eq!(models["data"][0]["max_model_len"], 32_768);
    assert!(sim.get("/version").await.1.contains("0.32"));
    assert_eq!(sim.get("/load").await.1, r#"{"server_load":0}"#);
    assert_eq!(sim.get("/v1/nothing").await, (404, r#"{"detail":"Not Found"}"#.into()));
    assert_eq!(sim.get(CHAT).await.0, 405);
}

#[tokio::test]
async fn every_endpoint_answers_in_its_shape_with_usage() {
    let sim = serve(SimConfig::default()).await;
    let (status, answer) = sim.ask(CHAT, chat("how are you")).await;
    assert_eq!((status, &answer["object"]), (200, &json!("chat.completion")));
    let content = answer["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(content.ends_with(" how are you"), "{content}");
    assert_eq!(answer["usage"]["prompt_tokens"], 3);
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    assert_eq!(answer["usage"]["total_tokens"], 6);
    assert_eq!(sim.ask(CHAT, chat("how are you")).await.1["choices"], answer["choices"]);
    let mut formed = chat("{\"a\": 1}");
    formed["response_format"] = json!({"type": "json_object"});
    assert_eq!(sim.ask(CHAT, formed).await.1["choices"][0]["message"]["content"], "{\"a\": 1}");

    let (_, answer) = sim.ask("/v1/completions", json!({"model": "sim", "prompt": ["a b", "c\n\"d\""]})).await;
    assert!(answer["choices"][1]["text"].as_str().unwrap().ends_with(" c\n\"d\""));
    assert_eq!(answer["usage"]["completion_tokens"], 32, "16 each");

    let (_, answer) = sim.ask("/v1/embeddings", json!({"model": "sim", "input": ["a", "b", "a"]})).await;
    let vectors: Vec<&Value> = answer["data"].as_array().unwrap().iter().map(|one| &one["embedding"]).collect();
    assert_eq!(vectors[0].as_array().unwrap().len(), 8);
    assert!(vectors[0] == vectors[2] && vectors[0] != vectors[1]);
    assert_eq!(answer["usage"]["total_tokens"], 3);
    let (_, coded) = sim.ask("/v1/embeddings", json!({"input": "a", "encoding_format": "base64"})).await;
    assert_eq!(coded["data"][0]["embedding"].as_str().unwrap().len(), 44);

    let (_, answer) =
        sim.ask("/v1/responses", json!({"model": "sim", "input": "say it", "max_output_tokens": 5})).await;
    assert!(answer["output"][0]["content"][0]["text"].as_str().unwrap().ends_with(" say it"));
    assert_eq!(answer["usage"]["output_tokens"], 5);
    assert_eq!(answer["usage"]["output_tokens_details"]["reasoning_tokens"], 0);

    let (_, answer) = sim.ask("/v1/score", json!({"model": "sim", "text_1": "q", "text_2": ["a", "b"]})).await;
    assert_eq!(answer["data"].as_array().unwrap().len(), 2);
    assert_eq!(answer["usage"]["prompt_tokens"], 3);

    let documents = json!({"model": "sim", "query": "q", "documents": ["a", "b", "c"], "top_n": 2});
    let (_, answer) = sim.ask("/v1/rerank", documents).await;
    let results = answer["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    assert!(results[0]["relevance_score"].as_f64() >= results[1]["relevance_score"].as_f64());
}

#[tokio::test]
async fn errors_look_like_vllms() {
    let sim = serve(SimConfig::default()).await;
    let (status, answer) = sim.ask(CHAT, json!({"model": "nope", "messages": []})).await;
    assert_eq!(status, 404);
    let message = "The model `nope` does not exist. Valid aliases: sim.";
    let expected = json!({"message": message, "type": "NotFoundError", "param": "model", "code": 404});
    assert_eq!(answer, json!({"error": expected}));
    let broken =
        sim.client.post(format!("{}{CHAT}", sim.url)).header("content-type", "application/json").body("{\"a\":");
    let broken = broken.send().await.unwrap();
    assert_eq!(broken.status(), 400);
    let answer: Value = serde_json::from_slice(&broken.bytes().await.unwrap()).unwrap();
    assert_eq!((&answer["error"]["type"], &answer["error"]["code"]), (&json!("Bad Request"), &json!(400)));
    let untyped = sim.client.post(format!("{}{CHAT}", sim.url)).body(chat("x").to_string()).send().await.unwrap();
    assert_eq!(untyped.status(), 400);
}

#[tokio::test]
async fn a_request_id_comes_back() {
    let sim = serve(SimConfig::default()).await;
    let answer = sim.post(CHAT, &chat("x")).header("x-request-id", "batch_1/7").send().await.unwrap();
    assert_eq!(answer.headers()["x-request-id"], "batch_1/7");
    assert!(answer.text().await.unwrap().starts_with(r#"{"id":"chatcmpl-batch_1/7","#));
    let answer = sim.post(CHAT, &chat("x")).header("x-request-id", "a\"b").send().await.unwrap();
    let answer: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"), "still JSON");
}

#[tokio::test]
async fn metrics_follow_the_work_and_a_client_that_goes_away_frees_its_place() {
    let sim = serve(SimConfig { latency: Duration::from_secs(3_600), max_num_seqs: 2, ..SimConfig::default() }).await;
    let requests: Vec<_> = (0..5).map(|_| tokio::spawn(sim.post(CHAT, &chat("one two")).send())).collect();
    sim.until(|sim| sim.sim.load() == (2, 3)).await;
    assert_eq!(sim.metric("num_requests_running").await, 2.0);
    assert_eq!(sim.metric("num_requests_waiting").await, 3.0);
    assert_eq!(sim.metric("kv_cache_usage_perc").await, 1.0);
    assert_eq!(sim.metric("prompt_tokens_total").await, 4.0);
    assert_eq!(sim.metric("generation_tokens_total").await, 0.0);
    assert_eq!(sim.metric("prefix_cache_hits_total").await, 2.0, "the second shares the first one's prompt");
    assert_eq!(sim.get("/load").await.1, r#"{"server_load":5}"#);
    for request in requests {
        request.abort();
    }
    sim.until(|sim| sim.sim.load() == (0, 0) && sim.faults.in_flight() == 0).await;
    assert_eq!((sim.faults.received(), sim.faults.max_in_flight()), (5, 5));
    sim.faults.preempt(3);
    assert_eq!(sim.metric("num_preemptions_total").await, 3.0);
}

#[tokio::test]
async fn the_next_requests_fail_as_told_and_then_no_more() {
    let sim = serve(SimConfig::default()).await;
    sim.faults.fail_next(2, StatusCode::TOO_MANY_REQUESTS, Some(Duration::from_secs(7)));
    sim.faults.fail_next(1, StatusCode::SERVICE_UNAVAILABLE, None);
    let answer = sim.post(CHAT, &chat("x")).send().await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.headers()["retry-after"].to_str().unwrap()), (429, "7"));
    assert_eq!(sim.ask(CHAT, chat("x")).await.0, 429);
    let (status, answer) = sim.ask(CHAT, chat("x")).await;
    assert_eq!((status, &answer["error"]["code"]), (503, &json!(503)));
    assert_eq!(sim.ask(CHAT, chat("x")).await.0, 200);
    sim.faults.set_unhealthy(true);
    assert_eq!(sim.get("/health").await.0, 503);
    sim.faults.set_unhealthy(false);
    assert_eq!(sim.get("/health").await.0, 200);
}

#[tokio::test]
async fn an_error_rate_is_met() {
    let sim = serve(SimConfig { error_rate: 0.25, seed: 9, ..SimConfig::default() }).await;
    let mut failed = 0;
    for _ in 0..400 {
        let (status, answer) = sim.ask(CHAT, chat("x")).await;
        if status == 500 {
            assert_eq!(answer["error"]["type"], "InternalServerError");
            failed += 1;
        }
    }
    assert!((70..130).contains(&failed), "{failed} of 400");
    assert_eq!(sim.metric("generation_tokens_total").await, f64::from((400 - failed) * 3));
}

#[tokio::test]
async fn connections_break_as_told() {
    let sim = serve(SimConfig::default()).await;
    sim.faults.next(1, Fault::Reset);
    // By hand: a client may send a request again whose connection closes before the answer's first byte.
    let raw = async || {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(sim.address).await.unwrap();
        let body = chat("x").to_string();
        let head = format!(
            "POST {CHAT} HTTP/1.1\r\nhost: sim\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        // However it is closed, what came before counts.
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    };
    assert_eq!(raw().await, "", "closed without an answer");
    sim.faults.next(2, Fault::Truncate);
    let answer = raw().await;
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("{\"id\":\"chatcmpl-\r\n"), "{answer:?}");
    let answer = sim.post(CHAT, &chat("x")).send().await;
    assert!(answer.unwrap().bytes().await.is_err(), "no end, so no answer");
    assert_eq!(sim.ask(CHAT, chat("x")).await.0, 200);
}

#[tokio::test]
async fn it_hangs_until_the_client_gives_up() {
    let sim = serve(SimConfig::default()).await;
    sim.faults.always(Some(Fault::Hang));
    let request = tokio::spawn(sim.post(CHAT, &chat("x")).send());
    sim.until(|sim| sim.faults.in_flight() == 1).await;
    assert_eq!(sim.get("/health").await.0, 200, "a hung engine may look healthy");
    sim.faults.clear();
    assert_eq!(sim.ask(CHAT, chat("x")).await.0, 200);
    assert_eq!(sim.faults.in_flight(), 1);
    request.abort();
    sim.until(|sim| sim.faults.in_flight() == 0).await;
}

#[tokio::test]
async fn what_was_received_can_be_counted() {
    let sim = serve(SimConfig::default()).await;
    sim.ask(CHAT, chat("before")).await;
    sim.faults.record(true);
    sim.faults.fail_next(1, StatusCode::BAD_GATEWAY, None);
    sim.ask(CHAT, chat("line-1")).await;
    sim.ask(CHAT, chat("line-1")).await;
    sim.ask("/v1/embeddings", json!({"input": "line-2"})).await;
    assert_eq!(["before", "line-1", "line-2"].map(|marker| sim.faults.times_received(marker)), [0, 2, 1]);
    assert_eq!(sim.faults.recorded()[2].path, "/v1/embeddings");
    assert_eq!(sim.faults.recorded()[0].body, chat("line-1").to_string());
}

#[tokio::test]
async fn slowed_down_it_takes_longer() {
    let sim = serve(SimConfig { latency: Duration::from_millis(5), ..SimConfig::default() }).await;
    sim.faults.set_slow_down(10.0);
    let started = std::time::Instant::now();
    assert_eq!(sim.ask(CHAT, chat("x")).await.0, 200);
    assert!(started.elapsed() >= Duration::from_millis(50));
}

#[tokio::test]
async fn shut_down_it_closes_what_hangs() {
    let mut sim = serve(SimConfig::default()).await;
    sim.faults.always(Some(Fault::Hang));
    let request = tokio::spawn(sim.post(CHAT, &chat("x")).send());
    sim.until(|sim| sim.faults.in_flight() == 1).await;
    sim.stop.cancel();
    (&mut sim.task).await.unwrap().unwrap();
    assert!(request.await.unwrap().is_err());
    assert!(tokio::net::TcpStream::connect(sim.address).await.is_err());
}

#[test]
fn nonsense_is_refused() {
    let base = SimConfig::default();
    assert_eq!(base.validate(), Ok(()));
    let bad = [
        (SimConfig { models: vec![], ..base.clone() }, SimConfigError::NoModel),
        (SimConfig { models: vec!["a".into(), String::new()], ..base.clone() }, SimConfigError::NoModel),
        (SimConfig { models: vec!["a".into(), "a".into()], ..base.clone() }, SimConfigError::ModelTwice("a".into())),
        (SimConfig { tokens_per_second: -1.0, ..base.clone() }, SimConfigError::TokensPerSecond(-1.0)),
        (SimConfig { error_rate: 1.5, ..base.clone() }, SimConfigError::ErrorRate(1.5)),
        (SimConfig { max_num_seqs: 0, ..base.clone() }, SimConfigError::MaxNumSeqs(0)),
    ];
    for (config, error) in bad {
        assert_eq!(Sim::new(config).err(), Some(error));
    }
    assert!(Sim::new(SimConfig { error_rate: f64::NAN, ..base }).is_err());
}
