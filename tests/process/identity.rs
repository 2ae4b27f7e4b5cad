//! A server that sees other objects than the database names harms nobody: it does not start, or it waits. A blob store
//! that can't be used is found at the start and said in words.

use std::{process::Output, time::Duration};

use sea_orm::{ConnectionTrait, DatabaseBackend, Statement};
use serde_json::Value;
use tidemill::{
    pb::{BatchStatus, GetBatchRequest},
    sim::SimConfig,
};
use tokio::process::Command;
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::direct;
use crate::{
    assert_complete, completed, create, input,
    s3::{BUCKET, Fault, On, S3},
    server::Server,
    support::{patience::until, postgres},
    try_upload, upload, worker,
};

fn said(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

async fn completes(server: &Server, batch: &str, lines: usize) {
    let mut client = server.client().await;
    completed(&mut client, batch).await;
    assert_complete(&mut client, batch, lines).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_server_with_objects_of_its_own_does_not_start_and_fails_no_batch() {
    let Some(database) = postgres::database().await else { return };
    let (_sim, url) = worker(SimConfig { latency: Duration::from_millis(50), ..SimConfig::default() }).await;
    let flags = ["--database-url", &database, "--worker", &url, "--worker-max-in-flight", "4", "--lease", "3s"];
    let mut one = Server::start(&[&flags[..], &["--flush-interval", "50ms"]].concat()).await;
    let file = upload(&mut one.client().await, input(100)).await;
    let batch = create(&mut one.client().await, &file, "").await;
    let refusal = said(&Server::new(&[&flags[..], &["--flush-interval", "50ms"]].concat()).second().await);
    assert!(refusal.contains("does not belong to this database") && refusal.contains("--blobs"), "{refusal}");
    completes(&one, &batch, 100).await;
    one.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_nobody_has_used_takes_other_objects_and_a_used_one_does_not() {
    let Some(database) = postgres::database().await else { return };
    let flags = ["--database-url", database.as_str()];
    let mut first = Server::start(&flags).await;
    let beside = said(&Server::new(&flags).second().await);
    assert!(beside.contains("does not belong to this database"), "another node is there: {beside}");
    first.terminate().await;
    let mut second = Server::start(&flags).await;
    upload(&mut second.client().await, input(1)).await;
    second.terminate().await;
    let refusal = said(&Server::new(&flags).second().await);
    assert!(refusal.contains("does not belong to this database"), "it has a file: {refusal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_start_together_on_a_new_database_agree_on_one_id() {
    let Some(database) = postgres::database().await else { return };
    let objects = tempfile::tempdir().unwrap();
    let blobs = format!("file://{}", objects.path().display());
    let flags = ["--database-url", &database, "--blobs", &blobs, "--database-connections", "3"];
    let mut servers: Vec<_> = (0..5).map(|_| Server::new(&flags)).collect();
    servers.iter_mut().for_each(Server::spawn_unready);
    for server in &mut servers {
        server.ready().await;
    }
    let connection = direct::connect(&database).await;
    let sql = Statement::from_string(DatabaseBackend::Postgres, "SELECT store_id FROM blob_store");
    let rows = connection.query_all_raw(sql).await.unwrap();
    let ids: Vec<String> = rows.iter().map(|row| row.try_get_by_index(0).unwrap()).collect();
    let id = std::fs::read_to_string(objects.path().join("store-id")).unwrap();
    assert_eq!(ids, [id.trim()]);
    for server in &mut servers {
        server.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_unmounted_fails_nothing_and_all_goes_on_when_it_is_back() {
    let (sim, url) = worker(SimConfig { latency: Duration::from_millis(50), ..SimConfig::default() }).await;
    let volumes = tempfile::tempdir().unwrap();
    let (mounted, away) = (volumes.path().join("mounted"), volumes.path().join("away"));
    let blobs = format!("file://{}", mounted.display());
    let flags = ["--blobs", &blobs, "--worker", &url, "--worker-max-in-flight", "8", "--flush-interval", "50ms"];
    let mut server = Server::start(&flags).await;
    let mut client = server.client().await;
    let file = upload(&mut client, input(200)).await;
    let running = create(&mut client, &file, "").await;
    until("the batch runs", async || sim.faults().received() >= 20).await;
    // It can't complete before the volume is gone.
    sim.faults().sleep();
    std::fs::rename(&mounted, &away).unwrap();
    std::fs::create_dir(&mounted).unwrap();
    sim.faults().wake_up();
    // One that begins without its input is the worst: it would be failed for good.
    let begun = create(&mut client, &file, "another").await;
    let ready = async || reqwest::get(format!("http://{}/readyz", server.address())).await.unwrap();
    until("the server notices", async || !ready().await.status().is_success()).await;
    assert!(ready().await.text().await.unwrap().contains("does not belong to this database"));
    let refusal = try_upload(&mut client, input(3), "").await.unwrap_err();
    assert_eq!(refusal.code(), Code::FailedPrecondition, "{refusal:?}");
    assert_eq!(refusal.get_details_error_info().unwrap().reason, "BLOB_STORE_REFUSED");
    assert!(refusal.message().contains("the volume is mounted"), "{refusal:?}");
    for batch in [&running, &begun] {
        let request = GetBatchRequest { batch_id: batch.clone() };
        let found = client.get_batch(request).await.unwrap().into_inner();
        assert_eq!(found.status(), BatchStatus::InProgress, "{found:?}");
    }
    assert_eq!(std::fs::read_dir(&mounted).unwrap().count(), 0, "nothing was written below the mount point");
    std::fs::remove_dir(&mounted).unwrap();
    std::fs::rename(&away, &mounted).unwrap();
    completes(&server, &running, 200).await;
    completes(&server, &begun, 200).await;
    assert!(ready().await.status().is_success());
    server.kill().await;
    // And one that starts without it does not take the empty folder for its own.
    std::fs::rename(&mounted, &away).unwrap();
    let refusal = said(&server.second().await);
    assert!(refusal.contains("does not belong to this database"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_store_that_cannot_be_used_is_found_at_the_start_and_said_in_words() {
    let s3 = S3::start().await;
    let refused = async |blobs: String, change: Option<(&'static str, &'static str)>| {
        let mut environment = s3.environment();
        if let Some((name, value)) = change {
            environment.retain(|(other, _)| other != name);
            environment.push((name.to_owned(), value.to_owned()));
        }
        let mut server = Server::new(&["--blobs", &blobs]);
        server.environment = environment;
        let refusal = said(&server.second().await);
        assert!(refusal.contains("can't be used") && refusal.contains("--blobs"), "{refusal}");
        assert!(!server.folder().join("tidemill.db").exists(), "nothing was touched before");
        refusal
    };
    let here = || format!("s3://{BUCKET}/x");
    let refusal = refused("s3://no-such-bucket/x".into(), None).await;
    assert!(refusal.contains("there is no such bucket"), "{refusal}");
    let refusal = refused(here(), Some(("AWS_ACCESS_KEY_ID", "wrong"))).await;
    assert!(refusal.contains("permission denied"), "{refusal}");
    let refusal = refused(here(), Some(("AWS_ENDPOINT_URL", "http://127.0.0.1:1"))).await;
    assert!(refusal.contains("connection refused"), "{refusal}");
    // It may be read, but not written.
    s3.break_it(On::Writes, Fault::Status(403, "AccessDenied"));
    let refusal = refused(here(), None).await;
    assert!(refusal.contains("permission denied"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread")]
async fn azures_connection_string_is_said_not_to_be_read() {
    let environment = vec![
        ("AZURE_STORAGE_CONNECTION_STRING".to_owned(), "AccountName=a".to_owned()),
        ("AZURE_STORAGE_ACCOUNT_NAME".to_owned(), "a".to_owned()),
        ("AZURE_STORAGE_ACCOUNT_KEY".to_owned(), "a2V5".to_owned()),
        ("AZURE_STORAGE_ENDPOINT".to_owned(), "http://127.0.0.1:1/a".to_owned()),
        ("AZURE_ALLOW_HTTP".to_owned(), "true".to_owned()),
    ];
    let mut server = Server::new(&["--blobs", "az://container/x"]);
    server.environment = environment;
    let refusal = said(&server.second().await);
    assert!(refusal.contains("AZURE_STORAGE_CONNECTION_STRING is not supported"), "{refusal}");
}

/// What a log shipper must not lose: why it does not start.
#[tokio::test(flavor = "multi_thread")]
async fn fatal_errors_at_the_start_are_lines_of_json_if_the_log_is() {
    let s3 = S3::start().await;
    for (flags, word, code) in [
        (&["--tokens", "/no/such/file"][..], "tokens file", 1),
        (&["--roles", "api"], "with SQLite there is only one server", 1),
        (&["--wroker", "x"], "--wroker", 2),
        (&["--master-key-file", "/no/such/file"], "master key file", 1),
        (&["--blobs", "s3://no-such-bucket/x"], "can't be used", 1),
    ] {
        let mut flags = flags.to_vec();
        flags.extend(["--log-format", "json"]);
        let mut server = Server::new(&flags);
        server.environment = s3.environment();
        let output = server.second().await;
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
        let last = lines.last().unwrap();
        assert!(last["message"].as_str().unwrap().contains(word) && last["level"] == "ERROR", "{last}");
        assert!(!server.folder().join("tidemill.db").exists(), "{word}: the database was touched before");
    }
}

#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread")]
async fn the_limit_of_open_files_is_raised() {
    let folder = tempfile::tempdir().unwrap();
    let command = r#"ulimit -Sn 256; exec "$0" serve --listen 127.0.0.1:0 --data-dir "$1""#;
    let mut program = Command::new("sh");
    program.args(["-c", command, env!("CARGO_BIN_EXE_tidemill")]).arg(folder.path()).kill_on_drop(true);
    let mut child = program.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut log = tokio::io::BufReader::new(child.stderr.take().unwrap());
    let mut text = String::new();
    while !text.contains("limit of open files") {
        assert!(tokio::io::AsyncBufReadExt::read_line(&mut log, &mut text).await.unwrap() > 0, "{text}");
    }
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id().unwrap())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let [.., soft, hard, _] = line.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{line}") };
    assert!(soft == hard && text.contains("256"), "{line}\n{text}");
    child.kill().await.unwrap();
}
