//! Webhooks among nodes that die: a receiver that outlives them all and is not reliable either, and what must be true of
//! the outbox when all is over.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sea_orm::{ConnectionTrait, DatabaseBackend, DatabaseConnection, Statement};
use tidemill::{
    domain::Timestamp,
    pb::{
        BatchStatus, CreateBatchRequest, CreateEndpointRequest, RetryDeadLetterRequest, WebhookConfig,
        webhook_admin_client::WebhookAdminClient,
    },
};
use tokio::time::Instant;
use tonic::transport::Channel;

use crate::support::direct;
use crate::{
    cluster::channel,
    receiver::{Receiver, Reply, Request},
};

/// What `serve` needs to send webhooks to this machine, with waits that a test can sit out.
pub const FLAGS: [&str; 4] =
    ["--webhook-allow-cidr", "127.0.0.0/8", "--webhook-retry-schedule", "1s,2s,4s,8s,16s,32s,64s,128s,256s"];
const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const ENDPOINT_SECRET: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
/// For one attempt: the shortest there is.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Where a batch's webhook goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Via {
    /// Nowhere.
    None,
    /// A URL of its own.
    Inline,
    /// A URL of its own, of progress too.
    Progress,
    /// The registered endpoint.
    Endpoint,
    /// A URL that refuses everything until [`Hooks::calm`].
    Dead,
}

impl Via {
    fn path(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Inline => "/inline",
            Self::Progress => "/progress",
            Self::Endpoint => "/endpoint",
            Self::Dead => "/dead",
        }
    }
}

/// A request that came, and the status it was answered with; none if it was reset or left hanging.
#[derive(Clone, Debug)]
struct Arrival {
    at: Timestamp,
    request: Request,
    status: Option<u16>,
    verified: bool,
}

/// The receiver, and the endpoint that is registered for it.
pub struct Hooks {
    receiver: Receiver,
    arrivals: Arc<Mutex<Vec<Arrival>>>,
    calm: Arc<AtomicBool>,
    endpoint_id: String,
}

/// A row of the outbox.
struct Delivery {
    id: String,
    batch: String,
    event: String,
    state: String,
    body: Vec<u8>,
    dead_letter: Option<String>,
}

impl Hooks {
    /// Begins to receive, as unreliably as `seed` says, and registers an endpoint at one of the nodes.
    pub async fn start(node: SocketAddr, seed: u64) -> Self {
        let (arrivals, calm) = (Arc::<Mutex<Vec<Arrival>>>::default(), Arc::new(AtomicBool::new(false)));
        let (seen, settled) = (arrivals.clone(), calm.clone());
        let receiver = Receiver::start(move |_, request| {
            let reply = if settled.load(Ordering::Acquire) { Reply::Status(200) } else { mood(seed, request) };
            let status = match &reply {
                Reply::Status(status) | Reply::Slow(status, _) => Some(*status),
                _ => None,
            };
            let secret = if request.path == Via::Endpoint.path() { ENDPOINT_SECRET } else { SECRET };
            let verified = request.verify(secret).is_ok();
            seen.lock().unwrap().push(Arrival { at: Timestamp::now(), request: request.clone(), status, verified });
            reply
        })
        .await;
        let create = CreateEndpointRequest {
            url: receiver.url(Via::Endpoint.path()),
            secret: ENDPOINT_SECRET.into(),
            max_retries: 10,
            timeout: prost_types::Duration::try_from(TIMEOUT).ok(),
            ..CreateEndpointRequest::default()
        };
        let created = admin(node).await.create_endpoint(create).await.unwrap().into_inner();
        Self { receiver, arrivals, calm, endpoint_id: created.endpoint.unwrap().id }
    }

    /// The request that creates a batch with such a webhook.
    pub fn on(&self, via: Via, request: CreateBatchRequest) -> CreateBatchRequest {
        let mut config = WebhookConfig {
            url: self.receiver.url(via.path()),
            secret: SECRET.into(),
            max_retries: if via == Via::Dead { 2 } else { 10 },
            timeout: prost_types::Duration::try_from(TIMEOUT).ok(),
            ..WebhookConfig::default()
        };
        if via == Via::Progress {
            config.events = ["completed", "cancelled", "failed", "expired", "progress"].map(Into::into).into();
        }
        match via {
            Via::None => request,
            Via::Endpoint => CreateBatchRequest { webhook_endpoint_id: self.endpoint_id.clone(), ..request },
            Via::Inline | Via::Progress | Via::Dead => CreateBatchRequest { webhook: Some(config), ..request },
        }
    }

    /// From now on the receiver takes everything.
    pub fn calm(&self) {
        self.calm.store(true, Ordering::Release);
    }

    /// Waits until nothing of the outbox is pending or leased. Nothing may break any more. In a `hurry` the leases of senders
    /// that were killed are made to run out once every living one must have ended, not half a minute after that.
    pub async fn settle(&self, database: &str, within: Duration, hurry: bool) {
        let (connection, end) = (direct::connect(database).await, Instant::now() + within);
        let over = Timestamp::now();
        let run_out = format!(
            "UPDATE webhook_deliveries SET lease_expires_at = 0 WHERE state = 'leased' AND id IN \
             (SELECT delivery_id FROM webhook_attempts WHERE outcome = 'started' AND started_at < {})",
            over.0
        );
        let waiting = "SELECT count(*) AS n FROM webhook_deliveries WHERE state IN ('pending', 'leased')";
        let began = Instant::now();
        while crate::history::count(&connection, waiting).await > 0 {
            assert!(Instant::now() < end, "webhooks still wait after {within:?}: {}", waiting_ones(&connection).await);
            if hurry && began.elapsed() > TIMEOUT + Duration::from_secs(1) {
                connection.execute_unprepared(&run_out).await.unwrap();
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        connection.close().await.unwrap();
    }

    /// What must be true of these batches' webhooks once they have settled; every dead letter is then retried through the
    /// nodes in turn, and must arrive. Returns what there was, in words.
    pub async fn check(&self, database: &str, nodes: &[SocketAddr], ended: &[(String, BatchStatus, Via)]) -> String {
        let connection = direct::connect(database).await;
        let deliveries = deliveries(&connection).await;
        for (batch, status, via) in ended {
            let found: Vec<&Delivery> =
                deliveries.iter().filter(|one| one.batch == *batch && one.event != "progress").collect();
            let events: Vec<&str> = found.iter().map(|one| one.event.as_str()).collect();
            let wanted = if *via == Via::None { vec![] } else { vec![event_of(*status)] };
            assert_eq!(events, wanted, "{batch} ({via:?}): its last state, once, and nothing else is in the outbox");
            if let Some(one) = found.first() {
                let body: serde_json::Value = serde_json::from_slice(&one.body).unwrap();
                assert_eq!(
                    (body["id"].as_str(), body["type"].as_str()),
                    (Some(batch.as_str()), Some(&*format!("batch.{}", one.event)))
                );
            }
        }
        self.check_arrivals(&connection, &deliveries).await;
        let dead: Vec<&Delivery> = deliveries.iter().filter(|one| one.state == "dead").collect();
        for (turn, dead) in dead.iter().enumerate() {
            let id = dead.dead_letter.clone().expect("who is dead has a dead letter");
            self.retry(nodes[turn % nodes.len()], &id, dead).await;
        }
        connection.close().await.unwrap();
        format!(
            "{} webhooks in {} requests, {} of them dead letters that were delivered by hand",
            deliveries.len(),
            self.arrivals.lock().unwrap().len(),
            dead.len()
        )
    }

    async fn check_arrivals(&self, connection: &DatabaseConnection, deliveries: &[Delivery]) {
        let by_id: HashMap<&str, &Delivery> = deliveries.iter().map(|one| (one.id.as_str(), one)).collect();
        let arrivals = self.arrivals.lock().unwrap().clone();
        let attempts = attempts(connection).await;
        let (mut seen, mut accepted) = (HashSet::new(), HashSet::new());
        for Arrival { at, request, status, verified } in &arrivals {
            let (id, number) = (request.header("webhook-id").to_owned(), request.header("x-webhook-attempt"));
            assert!(verified, "{id}: its signature is right");
            let of = by_id.get(id.as_str()).unwrap_or_else(|| panic!("{id} is in the outbox"));
            assert_eq!(request.header("x-webhook-event"), of.event);
            assert_eq!(request.body, of.body, "{id}: the body is the same on every attempt, and the outbox's");
            let began = attempts.get(&(id.clone(), number.parse().unwrap()));
            let began = began.unwrap_or_else(|| panic!("{id}: attempt {number} was made and not written down"));
            assert!(began <= at, "{id}: attempt {number} was written down before it was made");
            assert!(seen.insert((id.clone(), number.to_owned())), "{id}: attempt {number} was made twice");
            if matches!(status, Some(200..=299)) {
                accepted.insert(id);
            }
        }
        for one in deliveries {
            match one.state.as_str() {
                "delivered" => assert!(accepted.contains(&one.id), "{} {}: was delivered", one.id, one.event),
                "dead" => assert!(one.dead_letter.is_some(), "{}: a dead letter says so", one.id),
                "cancelled" => assert_eq!(one.event, "progress", "{}: nobody may drop it", one.id),
                other => panic!("{} is {other}", one.id),
            }
        }
    }

    /// Retries a dead letter through this node.
    async fn retry(&self, node: SocketAddr, id: &str, dead: &Delivery) {
        let before = self.arrivals.lock().unwrap().len();
        let retry = RetryDeadLetterRequest { dead_letter_id: id.to_owned(), ..RetryDeadLetterRequest::default() };
        let retried = admin(node).await.retry_dead_letter(retry).await.unwrap().into_inner();
        assert!(retried.retry_success, "{retried:?}");
        let arrivals = self.arrivals.lock().unwrap()[before..].to_vec();
        let [Arrival { request, verified: true, .. }] = arrivals.as_slice() else { panic!("{arrivals:?}") };
        assert_eq!((request.header("webhook-id"), &request.body), (dead.id.as_str(), &dead.body));
    }
}

/// What the receiver does with a request, by chance, but the same to the same attempt.
fn mood(seed: u64, request: &Request) -> Reply {
    if request.path == Via::Dead.path() {
        return Reply::Status(500);
    }
    let mut hasher = DefaultHasher::new();
    (seed, request.header("webhook-id"), request.header("x-webhook-attempt")).hash(&mut hasher);
    match hasher.finish() % 20 {
        0..=1 => Reply::Status(500),
        2 => Reply::Status(503),
        3..=4 => Reply::Reset,
        5 => Reply::Silent,
        6..=8 => Reply::Slow(200, Duration::from_millis(300)),
        _ => Reply::Status(200),
    }
}

/// A client of this node's webhook calls.
pub async fn admin(node: SocketAddr) -> WebhookAdminClient<Channel> {
    WebhookAdminClient::new(channel(node).await.unwrap())
}

fn event_of(status: BatchStatus) -> &'static str {
    match status {
        BatchStatus::Completed => "completed",
        BatchStatus::Cancelled => "cancelled",
        other => panic!("{other:?} is not expected here"),
    }
}

async fn rows(connection: &DatabaseConnection, sql: &str) -> Vec<sea_orm::QueryResult> {
    connection.query_all_raw(Statement::from_string(DatabaseBackend::Postgres, sql)).await.unwrap()
}

async fn deliveries(connection: &DatabaseConnection) -> Vec<Delivery> {
    let sql = "SELECT d.id, d.batch_id, d.event, d.state, d.body, l.id AS dead_letter FROM webhook_deliveries d \
               LEFT JOIN webhook_dead_letters l ON l.delivery_id = d.id ORDER BY d.id";
    let delivery = |row: &sea_orm::QueryResult| Delivery {
        id: row.try_get("", "id").unwrap(),
        batch: row.try_get("", "batch_id").unwrap(),
        event: row.try_get("", "event").unwrap(),
        state: row.try_get("", "state").unwrap(),
        body: row.try_get("", "body").unwrap(),
        dead_letter: row.try_get("", "dead_letter").unwrap(),
    };
    rows(connection, sql).await.iter().map(delivery).collect()
}

/// When each automatic attempt was written down, by delivery and number.
async fn attempts(connection: &DatabaseConnection) -> BTreeMap<(String, i32), Timestamp> {
    let sql = "SELECT delivery_id, attempt, started_at FROM webhook_attempts WHERE generation = 0";
    let attempt = |row: &sea_orm::QueryResult| {
        let key = (row.try_get("", "delivery_id").unwrap(), row.try_get("", "attempt").unwrap());
        (key, Timestamp(row.try_get("", "started_at").unwrap()))
    };
    rows(connection, sql).await.iter().map(attempt).collect()
}

async fn waiting_ones(connection: &DatabaseConnection) -> String {
    let sql = "SELECT concat_ws(' ', id, url, event, state, attempts, error_message) AS line FROM webhook_deliveries \
               WHERE state IN ('pending', 'leased') LIMIT 10";
    let lines: Vec<String> = rows(connection, sql).await.iter().map(|row| row.try_get("", "line").unwrap()).collect();
    lines.join("\n")
}
