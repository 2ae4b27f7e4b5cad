//! Owners of batches share the workers by their weights.

use serde_json::Value;
use std::time::Duration;
use tidemill::sim::SimConfig;
use tokio::process::Command;

use crate::{server::Server, support::patience::until, worker};

const LINES: usize = 1_500;

fn tidemill() -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_tidemill"));
    program.env_remove("TIDEMILL_TOKEN").kill_on_drop(true);
    program
}

/// A new token: itself, and its line in the server's file.
async fn token(arguments: &[&str]) -> (String, String) {
    let output = tidemill().args(["--json", "token", "new"]).args(arguments).output().await.unwrap();
    let made: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |field: &str| made[field].as_str().unwrap().to_owned();
    (text("token"), text("line"))
}

/// Submits a batch of requests that all name their owner.
async fn submit(server: &Server, owner: &str, token: &str) {
    let line = |number: usize| {
        format!(
            r#"{{"custom_id":"r{number}","method":"POST","url":"/v1/chat/completions","body":{{"model":"sim","messages":[{{"role":"user","content":"{owner} {number}"}}],"max_tokens":3}}}}"#
        ) + "\n"
    };
    let file = server.folder().join(format!("{owner}.jsonl"));
    std::fs::write(&file, (0..LINES).map(line).collect::<String>()).unwrap();
    let url = format!("http://{}", server.address());
    let submitted =
        tidemill().args(["--server", &url, "batch", "submit"]).arg(&file).env("TIDEMILL_TOKEN", token).output();
    let submitted = submitted.await.unwrap();
    assert!(submitted.status.success(), "{}", String::from_utf8_lossy(&submitted.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn three_times_the_weight_is_three_times_the_places() {
    let (sim, url) =
        worker(SimConfig { latency: Duration::from_millis(100), max_num_seqs: 32, ..SimConfig::default() }).await;
    sim.faults().record(true);
    let ((light, first), (heavy, second)) =
        (token(&["--name", "light"]).await, token(&["--name", "heavy", "--weight", "3"]).await);
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    std::fs::write(&tokens, format!("{first}\n{second}\n")).unwrap();
    let flags = ["--worker", &url, "--worker-max-in-flight", "32", "--tokens", tokens.to_str().unwrap()];
    let mut server = Server::start(&flags).await;
    // The light one is there first, and its window closes first. It gets nowhere before the other is there.
    sim.faults().set_slow_down(100.0);
    submit(&server, "light", &light).await;
    submit(&server, "heavy", &heavy).await;
    sim.faults().set_slow_down(1.0);
    let received = |owner: &str| sim.faults().times_received(&format!("\"{owner} "));
    until("the heavy batch is sent", async || received("heavy") == LINES).await;
    let is_heavy: Vec<bool> =
        sim.faults().recorded().iter().map(|one| memchr::memmem::find(&one.body, b"\"heavy ").is_some()).collect();
    let begin = is_heavy.iter().position(|heavy| *heavy).unwrap();
    let end = is_heavy.iter().rposition(|heavy| *heavy).unwrap();
    // Both have work all the time; at the edges slots change hands.
    let both = &is_heavy[begin + 100..end - 100];
    let share = both.iter().filter(|heavy| **heavy).count() as f64 / both.len() as f64;
    assert!((0.72..0.78).contains(&share), "{share} of {} requests", both.len());
    assert!(received("light") < LINES, "the light one had work all the time");
    server.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_weight_that_is_none_is_refused_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let tokens = folder.path().join("tokens");
    let (_, line) = token(&["--name", "ana"]).await;
    std::fs::write(&tokens, format!("# our tokens\n{line} weight=5000\n")).unwrap();
    let refused = Server::new(&["--tokens", tokens.to_str().unwrap()]).second().await;
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(said.contains("line 2 of the token file: weight=5000: expected a weight from 1 to 1000"), "{said}");
}
