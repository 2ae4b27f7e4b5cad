//! What an earlier release has written opens in this one: its finished batches are read, its unfinished ones go on, its
//! webhooks are sent.
//!
//! `tests/fixtures/data-<version>` holds what the release of that version wrote, on SQLite and on PostgreSQL. Each release
//! adds its own: [`write_the_data_of_this_version`] makes it.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use sea_orm::{ConnectionTrait, DatabaseConnection, Statement};
use serde::{Deserialize, Serialize};
use tidemill::{
    blobs::Blobs,
    delivery::secrets::{MasterKey, Vault},
    domain::{
        NodeId, Timestamp,
        webhook::{SealedSecret, target_of},
    },
    objects,
    pb::{
        CreateBatchRequest, CreateEndpointRequest, DeliveryState, GetBatchRequest, GetEndpointRequest,
        ListDeadLettersRequest, ListDeliveriesRequest, WebhookConfig, create_batch_request::Input,
    },
    sim::SimConfig,
    store::Store,
};
use tokio::process::Command;

use crate::support::direct;
use crate::{
    assert_complete, input,
    receiver::{Receiver, SECRET},
    server::{Client, Server},
    support::postgres,
    upload, worker,
};

/// Seals the secrets in the data. "fixtures-master-key-of-32-bytes!"
const MASTER_KEY: &str = "Zml4dHVyZXMtbWFzdGVyLWtleS1vZi0zMi1ieXRlcyE=";
const DELIVERED: usize = 40;
const SMALL: usize = 3;
const RUNNING: usize = 300;
const QUEUED: usize = 20;

/// What is in the data.
#[derive(Debug, Serialize, Deserialize)]
struct Contents {
    /// When the server was killed, in microseconds since 1970.
    written_at: i64,
    /// Completed, its webhook delivered.
    delivered: String,
    /// Completed, its webhook to the endpoint a dead letter.
    dead: String,
    endpoint: String,
    /// Completed, its webhook to be tried again.
    pending: String,
    /// Half done.
    running: String,
    /// How many of its lines are done.
    running_done: i64,
    /// Nobody serves its model.
    queued: String,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn lines_for(model: &str, count: usize) -> String {
    input(count).replace(r#""model":"sim""#, &format!(r#""model":"{model}""#))
}

fn hook(to: &Receiver, max_retries: i32) -> Option<WebhookConfig> {
    Some(WebhookConfig { url: to.url.clone(), secret: SECRET.into(), max_retries, ..WebhookConfig::default() })
}

async fn create(client: &mut Client, text: String, request: CreateBatchRequest) -> String {
    let file = upload(client, text).await;
    let request = CreateBatchRequest { input: Some(Input::InputFileId(file)), ..request };
    client.create_batch(request).await.unwrap().into_inner().id
}

async fn completed(client: &mut Client, id: &str) {
    crate::completed(client, id).await;
}

/// The states of a batch's webhooks, once `until` holds of them.
async fn deliveries(server: &Server, batch: &str, until: impl Fn(&[DeliveryState]) -> bool) -> Vec<DeliveryState> {
    let mut webhooks = server.webhooks().await;
    let request = ListDeliveriesRequest { batch_id: batch.to_owned(), ..ListDeliveriesRequest::default() };
    let mut states = Vec::new();
    crate::support::patience::until("the webhooks get there", async || {
        let found = webhooks.list_deliveries(request.clone()).await.unwrap().into_inner().deliveries;
        states = found.iter().map(tidemill::pb::Delivery::state).collect();
        until(&states)
    })
    .await;
    states
}

fn flags<'a>(worker: &'a str, database: Option<&'a str>) -> Vec<&'a str> {
    let mut flags = vec!["--worker", worker, "--worker-max-in-flight", "4", "--flush-interval", "50ms"];
    flags.extend([
        "--webhook-allow-cidr",
        "127.0.0.0/8",
        "--webhook-retry-schedule",
        "1s,2s,4s",
        "--master-key",
        MASTER_KEY,
        "--lease",
        "3s",
    ]);
    flags.extend(database.iter().flat_map(|url| ["--database-url", *url]));
    flags
}

/// `cargo test --test process -- --ignored write_the_data_of_this_version` once per release, before its tag; then commit the
/// new folder. Data of a release are never written again.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "writes tests/fixtures/data-<version>: once per release"]
async fn write_the_data_of_this_version() {
    let folder = fixtures().join(concat!("data-", env!("CARGO_PKG_VERSION")));
    write(&folder.join("sqlite"), None).await;
    let url = postgres::database().await.expect("a release's data are written on both databases");
    write(&folder.join("postgres"), Some(&url)).await;
}

async fn write(folder: &Path, database: Option<&str>) {
    let config = SimConfig { latency: Duration::from_millis(30), ..SimConfig::default() };
    let (_sim, worker) = worker(config).await;
    let (good, bad) = (Receiver::start(200).await, Receiver::start(500).await);
    let mut server = Server::start(&flags(&worker, database)).await;
    let mut client = server.client().await;
    let endpoint = CreateEndpointRequest {
        url: bad.url.clone(),
        secret: SECRET.into(),
        max_retries: 1,
        ..CreateEndpointRequest::default()
    };
    let endpoint = server.webhooks().await.create_endpoint(endpoint).await.unwrap().into_inner().endpoint.unwrap().id;
    let request = CreateBatchRequest { webhook: hook(&good, 1), ..CreateBatchRequest::default() };
    let delivered = create(&mut client, input(DELIVERED), request).await;
    let request = CreateBatchRequest { webhook_endpoint_id: endpoint.clone(), ..CreateBatchRequest::default() };
    let dead = create(&mut client, input(SMALL), request).await;
    let request = CreateBatchRequest { webhook: hook(&bad, 10), ..CreateBatchRequest::default() };
    let pending = create(&mut client, input(SMALL), request).await;
    for batch in [&delivered, &dead, &pending] {
        completed(&mut client, batch).await;
    }
    deliveries(&server, &delivered, |states| states == [DeliveryState::Delivered]).await;
    deliveries(&server, &dead, |states| states == [DeliveryState::Dead]).await;
    bad.wait(2).await;
    let queued = create(&mut client, lines_for("later", QUEUED), CreateBatchRequest::default()).await;
    let running = create(&mut client, input(RUNNING), CreateBatchRequest::default()).await;
    loop {
        let request = GetBatchRequest { batch_id: running.clone() };
        let counts = client.get_batch(request).await.unwrap().into_inner().request_counts.unwrap();
        if counts.completed >= 60 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    server.kill().await;
    let written_at = Timestamp::now().0;

    tokio::fs::create_dir_all(folder).await.unwrap();
    copy(&server.folder().join("blobs"), &folder.join("blobs")).await;
    let file = server.folder().join("tidemill.db");
    let connection = connect(database, &file).await;
    let sql = format!("SELECT completed FROM batches WHERE id = '{running}'");
    let done = connection.query_one_raw(Statement::from_string(connection.get_database_backend(), sql)).await.unwrap();
    let running_done = done.unwrap().try_get_by_index(0).unwrap();
    match database {
        None => {
            connection.execute_unprepared("PRAGMA wal_checkpoint(TRUNCATE)").await.unwrap();
            tokio::fs::copy(&file, folder.join("tidemill.db")).await.unwrap();
        }
        Some(url) => {
            let programs = Command::new("pg_config").arg("--bindir").output().await.unwrap().stdout;
            let program = Path::new(String::from_utf8(programs).unwrap().trim()).join("pg_dump");
            let dump = Command::new(program).args(["--inserts", "--no-owner", "--dbname", url]).output().await.unwrap();
            assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
            // Lines for psql only.
            let dump = String::from_utf8(dump.stdout).unwrap();
            let sql: Vec<&str> = dump.lines().filter(|line| !line.starts_with(['\\', '-'])).collect();
            tokio::fs::write(folder.join("dump.sql"), sql.join("\n")).await.unwrap();
        }
    }
    connection.close().await.unwrap();
    let contents = Contents { written_at, delivered, dead, endpoint, pending, running, running_done, queued };
    tokio::fs::write(folder.join("contents.json"), serde_json::to_string_pretty(&contents).unwrap() + "\n")
        .await
        .unwrap();
}

async fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-r").arg(from).arg(to).stdin(Stdio::null()).status().await.unwrap();
    assert!(copied.success());
}

async fn connect(database: Option<&str>, file: &Path) -> DatabaseConnection {
    let url = database.map_or_else(|| format!("sqlite://{}", file.display()), str::to_owned);
    direct::connect(url).await
}

/// As if the upgrade came right after the data were written: else windows would have closed long since.
async fn move_the_clock(connection: &DatabaseConnection, written_at: i64, receiver: &Receiver) {
    let sqlite = connection.get_database_backend() == sea_orm::DatabaseBackend::Sqlite;
    let columns = if sqlite {
        "SELECT m.name, p.name FROM sqlite_master m JOIN pragma_table_info(m.name) p WHERE m.type = 'table'"
    } else {
        "SELECT table_name::text, column_name::text FROM information_schema.columns WHERE table_schema = 'public'"
    };
    let passed = Timestamp::now().0 - written_at;
    let columns = Statement::from_string(connection.get_database_backend(), columns);
    let mut moved = 0;
    for row in connection.query_all_raw(columns).await.unwrap() {
        let (table, column): (String, String) = (row.try_get_by_index(0).unwrap(), row.try_get_by_index(1).unwrap());
        let is_time = column.ends_with("_at") || ["previous_secret_until", "delete_after"].contains(&column.as_str());
        if is_time && table != "seaql_migrations" {
            let sql = format!("UPDATE {table} SET {column} = {column} + {passed} WHERE {column} > 0");
            connection.execute_unprepared(&sql).await.unwrap();
            moved += 1;
        }
    }
    assert!(moved > 20, "{moved} columns");
    // The receiver that failed then has another address and answers now, and the next attempt is due. A secret is sealed for
    // its address: it moves too.
    let sql = "SELECT url, secret FROM webhook_deliveries WHERE state = 'pending'";
    let backend = connection.get_database_backend();
    let row = connection.query_one_raw(Statement::from_string(backend, sql)).await.unwrap().expect("one waits");
    let (url, sealed): (String, Vec<u8>) = (row.try_get_by_index(0).unwrap(), row.try_get_by_index(1).unwrap());
    let vault = Vault::new(Some(MasterKey::from_base64(MASTER_KEY).unwrap()), None);
    let context = |url: &str| format!("batch webhook {url}");
    let secret = vault.open(&SealedSecret::from_bytes(sealed), &context(&url)).unwrap();
    let sealed = vault.seal(&secret, &context(&receiver.url));
    let sql =
        "UPDATE webhook_deliveries SET url = $1, target = $2, secret = $3, next_attempt_at = 1 WHERE state = 'pending'";
    let values: [sea_orm::Value; 3] =
        [receiver.url.clone().into(), target_of(&receiver.url).into(), sealed.as_bytes().to_vec().into()];
    let moved = connection.execute_raw(Statement::from_sql_and_values(backend, sql, values)).await.unwrap();
    assert_eq!(moved.rows_affected(), 1);
}

/// Starts this version on a copy of such data and looks at all of it.
async fn opens(folder: &Path, database: Option<String>) {
    let contents = tokio::fs::read(folder.join("contents.json")).await.unwrap();
    let contents: Contents = serde_json::from_slice(&contents).unwrap();
    let receiver = Receiver::start(200).await;
    let (sim, worker) = worker(SimConfig { models: vec!["sim".into(), "later".into()], ..SimConfig::default() }).await;
    let copied = tempfile::tempdir().unwrap();
    copy(&folder.join("."), copied.path()).await;
    let file = copied.path().join("tidemill.db");
    if database.is_some() {
        let dump = tokio::fs::read_to_string(folder.join("dump.sql")).await.unwrap();
        // Not used any further: the dump sets its search path.
        let connection = connect(database.as_deref(), &file).await;
        connection.execute_unprepared(&dump).await.unwrap();
        connection.close().await.unwrap();
    }
    let connection = connect(database.as_deref(), &file).await;
    move_the_clock(&connection, contents.written_at, &receiver).await;
    connection.close().await.unwrap();

    let flags = flags(&worker, database.as_deref());
    let mut server = Server::in_environment(&flags, Vec::new(), Some(copied.path())).await;
    let mut client = server.client().await;
    // What was finished is there.
    assert_complete(&mut client, &contents.delivered, DELIVERED).await;
    for batch in [&contents.dead, &contents.pending] {
        assert_complete(&mut client, batch, SMALL).await;
    }
    deliveries(&server, &contents.delivered, |states| states == [DeliveryState::Delivered]).await;
    deliveries(&server, &contents.dead, |states| states == [DeliveryState::Dead]).await;
    let mut webhooks = server.webhooks().await;
    let request = GetEndpointRequest { endpoint_id: contents.endpoint.clone() };
    assert_eq!(webhooks.get_endpoint(request).await.unwrap().into_inner().id, contents.endpoint);
    let request = ListDeadLettersRequest { batch_id: contents.dead.clone(), ..ListDeadLettersRequest::default() };
    let dead = webhooks.list_dead_letters(request).await.unwrap().into_inner().dead_letters;
    assert_eq!((dead.len(), dead[0].attempts), (1, 1), "{dead:?}");
    // What was not goes on: the rest of the half-done batch, the batch that nobody could run, the webhook.
    completed(&mut client, &contents.running).await;
    assert_complete(&mut client, &contents.running, RUNNING).await;
    completed(&mut client, &contents.queued).await;
    assert_complete(&mut client, &contents.queued, QUEUED).await;
    let left = (RUNNING + QUEUED) as i64 - contents.running_done;
    assert_eq!(sim.faults().received() as i64, left, "the lines of the earlier version's parts don't run again");
    deliveries(&server, &contents.pending, |states| states == [DeliveryState::Delivered]).await;
    // Its secret was sealed by the earlier version, and the receiver has checked the signature.
    assert_eq!(receiver.received().len(), 1);
    assert_eq!(receiver.received()[0].body["id"], contents.pending.as_str());
    server.kill().await;
}

/// The data of all versions there are.
fn versions(database: &str) -> Vec<PathBuf> {
    let folders = std::fs::read_dir(fixtures()).unwrap().map(|entry| entry.unwrap());
    let named = folders.filter(|entry| entry.file_name().to_string_lossy().starts_with("data-"));
    let found: Vec<PathBuf> = named.map(|entry| entry.path().join(database)).collect();
    assert!(!found.is_empty());
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn data_of_earlier_versions_open_on_sqlite() {
    for folder in versions("sqlite") {
        opens(&folder, None).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn data_of_earlier_versions_open_on_postgres() {
    for folder in versions("postgres") {
        if let Some(url) = postgres::database().await {
            opens(&folder, Some(url)).await;
        }
    }
}

/// Data of a release that knew no store id, and several servers of this one that start on it together.
#[tokio::test(flavor = "multi_thread")]
async fn servers_that_start_together_on_data_of_earlier_versions_agree_on_one_id() {
    for folder in versions("postgres") {
        let Some(url) = postgres::database().await else { return };
        let dump = tokio::fs::read_to_string(folder.join("dump.sql")).await.unwrap();
        let connection = connect(Some(&url), Path::new("")).await;
        connection.execute_unprepared(&dump).await.unwrap();
        connection.close().await.unwrap();
        let objects = tempfile::tempdir().unwrap();
        copy_all(&folder.join("blobs"), objects.path()).await;
        let blobs = format!("file://{}", objects.path().display());
        let flags = ["--database-url", &url, "--blobs", &blobs, "--master-key", MASTER_KEY];
        let mut servers: Vec<_> = (0..5).map(|_| Server::new(&flags)).collect();
        servers.iter_mut().for_each(Server::spawn_unready);
        for server in &mut servers {
            server.ready().await;
        }
        let connection = connect(Some(&url), Path::new("")).await;
        let sql = Statement::from_string(sea_orm::DatabaseBackend::Postgres, "SELECT store_id FROM blob_store");
        let rows = connection.query_all_raw(sql).await.unwrap();
        let ids: Vec<String> = rows.iter().map(|row| row.try_get_by_index(0).unwrap()).collect();
        let id = std::fs::read_to_string(objects.path().join("store-id")).unwrap();
        assert_eq!(ids, [id.trim()]);
        for server in &mut servers {
            server.kill().await;
        }
    }
}

/// The same on SQLite, which has one server: there it is starts of it that overlap.
#[tokio::test(flavor = "multi_thread")]
async fn starts_that_overlap_on_data_of_earlier_versions_agree_on_one_id() {
    for folder in versions("sqlite") {
        let copied = tempfile::tempdir().unwrap();
        copy_all(&folder, copied.path()).await;
        let starts = (0..6).map(|_| {
            let folder = copied.path().to_owned();
            tokio::spawn(async move {
                let store = Store::sqlite(&folder.join("tidemill.db")).await.unwrap();
                let blobs = Blobs::shared_directory(&folder.join("blobs")).unwrap();
                let node = NodeId::generate();
                store.heartbeat(&node, "0", "").await.unwrap();
                let found = objects::probe(&blobs, "here").await.unwrap();
                objects::establish(&store, &blobs, "here", &node, found).await.unwrap();
                blobs.expected_id().unwrap()
            })
        });
        let starts: Vec<_> = starts.collect();
        let mut ids = std::collections::BTreeSet::new();
        for start in starts {
            ids.insert(start.await.unwrap());
        }
        let id = std::fs::read_to_string(copied.path().join("blobs/store-id")).unwrap();
        assert_eq!(ids.into_iter().collect::<Vec<_>>(), [id.trim()]);
    }
}

async fn copy_all(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-r").arg(from.join(".")).arg(to).status().await.unwrap();
    assert!(copied.success());
}

/// Data of a release that knew no store id, and a server that does not have its objects: it does not make itself their owner.
#[tokio::test(flavor = "multi_thread")]
async fn data_of_earlier_versions_are_not_opened_without_their_objects() {
    for folder in versions("postgres") {
        let Some(url) = postgres::database().await else { return };
        let dump = tokio::fs::read_to_string(folder.join("dump.sql")).await.unwrap();
        let connection = connect(Some(&url), Path::new("")).await;
        connection.execute_unprepared(&dump).await.unwrap();
        connection.close().await.unwrap();
        let refused = Server::new(&["--database-url", &url, "--master-key", MASTER_KEY]).second().await;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains("does not belong to this database"), "{said}");
        let connection = connect(Some(&url), Path::new("")).await;
        let sql = "SELECT count(*) FROM blob_store";
        let row = connection.query_one_raw(Statement::from_string(sea_orm::DatabaseBackend::Postgres, sql)).await;
        assert_eq!(row.unwrap().unwrap().try_get_by_index::<i64>(0).unwrap(), 0);
    }
}
