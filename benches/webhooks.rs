//! Claim "webhooks": of 100 receivers one hangs, and the other 99 do not notice. And: deliveries/s, each claimed, signed, sent
//! and written down durably (SQLite, synchronous=FULL), over a bare loop of the same HTTP client with the same settings and as
//! many requests in flight, which signs nothing, keeps nothing and sends one header instead of nine.
//!
//!     cargo bench --bench webhooks [-- DELIVERIES [ROUNDS]]
//!
//! All deliveries are due at once, spread evenly over the receivers. A delivery's time is from the start of the deliverer
//! to its arrival. The three variants take turns; medians of the rounds are compared. The receivers are one server with an
//! address of 127.0.0.0/8 for each, on a thread of its own; the hanging one reads its requests and never answers. Loop and
//! deliverer run on the same one thread; the deliverer has SQLite's threads besides. On Linux it says too how much CPU time a
//! delivery takes on which threads: that hardly depends on what else the machine does. Writes `target/bench/webhooks.json`.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../tests/support/direct.rs"]
mod direct;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    routing::post,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use futures::{StreamExt, stream::FuturesUnordered};
use sea_orm::{ConnectionTrait, DatabaseConnection, Statement};
use tidemill::{
    delivery::{
        Deliverer, Options, Webhooks,
        egress::{Guard, Policy},
        fairness::IN_FLIGHT,
        secrets::{MasterKey, Vault},
    },
    domain::webhook::WebhookConfig,
    store::Store,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

const RECEIVERS: usize = 100;
/// The receiver that hangs, where one does.
const DEAD: usize = 50;
/// About as long as a batch's.
const BODY: &str = r#"{"completed_at": 1699568400, "created_at": 1699564800, "endpoint": "/v1/chat/completions", "error_file_id": null, "error_file_url": null, "id": "batch_01a21033cf5e762b9c46b3202461ba0e", "metadata": {"name": "bench"}, "object": "batch", "output_file_id": "file-01a21033cf52773c9064c8b83e6fbbeb", "output_file_url": "/v1/batches/batch_01a21033cf5e762b9c46b3202461ba0e/results", "request_counts": {"completed": 98, "failed": 2, "total": 100}, "sequence": 7, "status": "completed", "type": "batch.completed"}"#;

/// What the receivers saw.
#[derive(Default)]
struct Arrivals {
    /// The hanging receiver hangs.
    dead: bool,
    wanted: usize,
    times: Vec<Instant>,
}

#[derive(Clone, Default)]
struct Receivers {
    arrivals: Arc<Mutex<Arrivals>>,
    all: Arc<Notify>,
}

impl Receivers {
    fn expect(&self, wanted: usize, dead: bool) {
        *self.arrivals.lock().unwrap() = Arrivals { dead, wanted, times: Vec::new() };
    }
}

/// What a round of a variant came to.
#[derive(Clone, Copy)]
struct Round {
    per_second: f64,
    p50: Duration,
    p99: Duration,
    cpu: Cpu,
}

/// CPU time, in microseconds: of the threads that send, of SQLite's, of the receivers'. Zero where the system does not say.
type Cpu = [f64; 3];

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let (deliveries, rounds) = (numbers.first().copied().unwrap_or(10_000), numbers.get(1).copied().unwrap_or(5));
    tidemill::telemetry::install_tls_provider();
    let receivers = Receivers::default();
    let address = serve(receivers.clone());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (mut healthy, mut with_dead, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        bare.push(run(&runtime, bare_loop(address, receivers.clone(), deliveries)));
        healthy.push(run(&runtime, deliver(address, receivers.clone(), deliveries, false)));
        with_dead.push(run(&runtime, deliver(address, receivers.clone(), deliveries, true)));
        let [bare, healthy] = [&bare, &healthy].map(|rounds| rounds.last().unwrap().per_second);
        eprintln!("round: {healthy:.0}/s delivered, bare loop {bare:.0}/s");
    }
    let (bare, healthy, with_dead) = (median(&bare), median(&healthy), median(&with_dead));
    let machine = machine();
    println!(
        "webhooks: {deliveries} deliveries of {} bytes to {RECEIVERS} receivers, {rounds} rounds, on {machine}",
        BODY.len()
    );
    println!("| | all answer | one hangs | ratio |\n| --- | --- | --- | --- |");
    for (name, of) in [("p50", (|round: &Round| round.p50) as fn(&Round) -> Duration), ("p99", |round| round.p99)] {
        let (without, with) = (of(&healthy), of(&with_dead));
        let ratio = with.as_secs_f64() / without.as_secs_f64();
        println!("| {name} of the other {} | {without:.2?} | {with:.2?} | {ratio:.2} |", RECEIVERS - 1);
    }
    println!("\n| delivered | bare loop | ratio |\n| --- | --- | --- |");
    let ratio = healthy.per_second / bare.per_second;
    println!("| {:.0}/s | {:.0}/s | {ratio:.2} |", healthy.per_second, bare.per_second);
    println!("\n| CPU µs a delivery | sender | SQLite | receivers | all |\n| --- | --- | --- | --- | --- |");
    for (name, of) in [("delivered", healthy), ("bare loop", bare)] {
        let [sender, sqlite, receivers] = of.cpu;
        println!("| {name} | {sender:.1} | {sqlite:.1} | {receivers:.1} | {:.1} |", of.cpu.iter().sum::<f64>());
    }
    std::fs::create_dir_all("target/bench").unwrap();
    let seconds = |round: Round| serde_json::json!({"p50": round.p50.as_secs_f64(), "p99": round.p99.as_secs_f64()});
    let report = serde_json::json!({
        "claim": "webhooks", "machine": machine, "deliveries": deliveries, "body_bytes": BODY.len(), "receivers": RECEIVERS, "rounds": rounds, "in_flight": IN_FLIGHT,
        "all_answer_seconds": seconds(healthy), "one_hangs_seconds": seconds(with_dead),
        "delivered_per_second": healthy.per_second, "bare_per_second": bare.per_second, "ratio": ratio,
        "delivered_cpu_microseconds": healthy.cpu, "bare_cpu_microseconds": bare.cpu,
    });
    std::fs::write("target/bench/webhooks.json", report.to_string()).unwrap();
}

/// On the runtime's one worker, not on the thread that waits for it.
fn run(runtime: &tokio::runtime::Runtime, variant: impl Future<Output = Round> + Send + 'static) -> Round {
    runtime.block_on(runtime.spawn(variant)).unwrap()
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let about = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        about.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map(|(_, model)| model);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    format!("{cores} cores of {}, load {load}", model.unwrap_or("an unknown CPU"))
}

/// All receivers, on every address of 127.0.0.0/8.
fn serve(receivers: Receivers) -> SocketAddr {
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name("receivers".into());
    let serving = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
            sender.send(listener.local_addr().unwrap()).unwrap();
            let app = Router::new().route("/hook", post(receive)).with_state(receivers);
            axum::serve(listener, app).await.unwrap();
        });
    };
    thread.spawn(serving).unwrap();
    receiver.recv().unwrap()
}

async fn receive(State(receivers): State<Receivers>, headers: HeaderMap, body: bytes::Bytes) -> StatusCode {
    assert_eq!(body.len(), BODY.len());
    let hangs = headers[header::HOST].to_str().unwrap().starts_with(&format!("{}:", ip(DEAD)));
    let done = {
        let mut arrivals = receivers.arrivals.lock().unwrap();
        if hangs && arrivals.dead {
            None
        } else {
            // The hanging one's are not counted where it answers, so that the variants count the same.
            if !hangs {
                arrivals.times.push(Instant::now());
            }
            Some(arrivals.times.len() == arrivals.wanted)
        }
    };
    match done {
        None => std::future::pending::<()>().await,
        Some(true) => receivers.all.notify_one(),
        Some(false) => {}
    }
    StatusCode::NO_CONTENT
}

fn ip(receiver: usize) -> String {
    format!("127.0.1.{}", receiver + 1)
}

fn url(address: SocketAddr, receiver: usize) -> String {
    format!("http://{}:{}/hook", ip(receiver), address.port())
}

async fn deliver(address: SocketAddr, receivers: Receivers, deliveries: usize, dead: bool) -> Round {
    let folder = tempfile::tempdir_in("target").unwrap();
    let file = folder.path().join("db");
    let store = Store::sqlite(&file).await.unwrap();
    let policy = Policy { allow: vec!["127.0.0.0/8".parse().unwrap()], https_only: false };
    let key = MasterKey::from_base64(&STANDARD.encode([7; 32])).unwrap();
    let options = Options {
        sole_node: true,
        drain: Duration::ZERO,
        ..Options::new(Guard::new(policy), Vault::new(Some(key), None))
    };
    let webhooks = Webhooks::new(store.clone(), options).unwrap();
    let raw = direct::connect(format!("sqlite://{}", file.display())).await;
    for receiver in 0..RECEIVERS {
        enqueue(&raw, &webhooks, &url(address, receiver), receiver, deliveries / RECEIVERS).await;
    }
    let counted = (RECEIVERS - 1) * (deliveries / RECEIVERS);
    receivers.expect(counted, dead);
    let shutdown = CancellationToken::new();
    let (began, cpu) = (Instant::now(), cpu());
    let running = tokio::spawn(Deliverer::new(webhooks, shutdown.clone()).run());
    let arrived = tokio::time::timeout(Duration::from_secs(120), receivers.all.notified()).await;
    arrived.expect("the healthy receivers get all of theirs");
    // Not before it is written down.
    let settled = "SELECT COUNT(*) AS n FROM webhook_deliveries WHERE settled_at IS NOT NULL";
    let delivered = "SELECT COUNT(*) AS n FROM webhook_deliveries WHERE state = 'delivered'";
    let wanted = i64::try_from(if dead { counted } else { counted + deliveries / RECEIVERS }).unwrap();
    while count(&raw, settled).await < wanted {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let round = round(&receivers, began, cpu, wanted);
    assert_eq!(count(&raw, delivered).await, wanted);
    shutdown.cancel();
    running.await.unwrap();
    raw.close().await.unwrap();
    store.close().await;
    round
}

async fn count(raw: &DatabaseConnection, sql: &str) -> i64 {
    let statement = Statement::from_string(raw.get_database_backend(), sql);
    raw.query_one_raw(statement).await.unwrap().unwrap().try_get("", "n").unwrap()
}

/// Deliveries as a batch's end writes them, many at once.
async fn enqueue(raw: &DatabaseConnection, webhooks: &Webhooks, url: &str, receiver: usize, count: usize) {
    let config = WebhookConfig::new(url).secret(Some("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".into()));
    let secret = webhooks.accept(config).await.unwrap().secret.unwrap();
    let sql = format!(
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count}) \
         INSERT INTO webhook_deliveries (id, owner, event, url, target, secret, body, max_attempts, timeout, state, \
         attempts, next_attempt_at, created_at) SELECT printf('msg_%032d', {receiver} * 1000000 + i), '', 'completed', \
         '{url}', '{url}', X'{}', CAST('{BODY}' AS BLOB), 3, 60000000, 'pending', 0, 1, 1 FROM n",
        hex::encode(secret.as_bytes())
    );
    raw.execute_unprepared(&sql).await.unwrap();
}

async fn bare_loop(address: SocketAddr, receivers: Receivers, deliveries: usize) -> Round {
    // As the deliverer's.
    let client = reqwest::Client::builder()
        .user_agent(concat!("tidemill/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .retry(reqwest::retry::never())
        .referer(false)
        .connect_timeout(Duration::from_secs(10))
        .pool_idle_timeout(Duration::from_secs(30))
        .build()
        .unwrap();
    let urls: Vec<reqwest::Url> = (0..RECEIVERS).map(|receiver| url(address, receiver).parse().unwrap()).collect();
    receivers.expect(usize::MAX, false);
    let (began, cpu) = (Instant::now(), cpu());
    let mut in_flight = FuturesUnordered::new();
    let (mut next, mut done) = (0, 0);
    while done < deliveries {
        while in_flight.len() < IN_FLIGHT && next < deliveries {
            let request =
                client.post(urls[next % RECEIVERS].clone()).header("content-type", "application/json").body(BODY);
            in_flight.push(async move { assert_eq!(request.send().await.unwrap().status(), StatusCode::NO_CONTENT) });
            next += 1;
        }
        in_flight.next().await.unwrap();
        done += 1;
    }
    round(&receivers, began, cpu, i64::try_from(deliveries).unwrap())
}

/// What this process's threads have used so far.
fn cpu() -> Cpu {
    let mut of = Cpu::default();
    for thread in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let read = |file| std::fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        // Nanoseconds on a CPU, those of waiting for one, and how often.
        let used: f64 = read("schedstat").split(' ').next().and_then(|used| used.parse().ok()).unwrap_or(0.0);
        let kind = match read("comm").trim_end() {
            "receivers" => 2,
            name if name.starts_with("sqlx-sqlite") => 1,
            _ => 0,
        };
        of[kind] += used / 1_000.0;
    }
    of
}

fn round(receivers: &Receivers, began: Instant, before: Cpu, done: i64) -> Round {
    let per_second = done as f64 / began.elapsed().as_secs_f64();
    let after = cpu();
    let cpu = std::array::from_fn(|kind| (after[kind] - before[kind]) / done as f64);
    let mut times: Vec<Duration> =
        receivers.arrivals.lock().unwrap().times.iter().map(|at| at.duration_since(began)).collect();
    times.sort_unstable();
    Round { per_second, p50: times[times.len() / 2], p99: times[times.len() * 99 / 100], cpu }
}

fn median(rounds: &[Round]) -> Round {
    let of = |key: fn(&Round) -> f64| {
        let mut values: Vec<f64> = rounds.iter().map(key).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    Round {
        per_second: of(|round| round.per_second),
        p50: Duration::from_secs_f64(of(|round| round.p50.as_secs_f64())),
        p99: Duration::from_secs_f64(of(|round| round.p99.as_secs_f64())),
        cpu: [of(|round| round.cpu[0]), of(|round| round.cpu[1]), of(|round| round.cpu[2])],
    }
}
