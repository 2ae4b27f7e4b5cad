//! Claim "start": from the start of the process to gRPC health SERVING on an empty SQLite directory in under 300 ms.
//!
//!     cargo bench --bench start [-- ROUNDS]
//!
//! Three starts take turns: on an empty directory (the database is made and migrated), on that one after a SIGTERM, and
//! after a SIGKILL. What `tidemill --version` takes is beside it: the part that is the machine's. Writes
//! `target/bench/start.json`.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use common::{Process, machine, percentile, report};

const GOAL_MS: f64 = 300.0;

fn main() {
    let rounds = common::arguments().0.first().copied().unwrap_or(30);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (mut empty, mut stopped, mut killed, mut bare) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let folder = tempfile::tempdir_in("target").unwrap();
        let start = |times: &mut Vec<f64>| runtime.block_on(started(folder.path(), times));
        start(&mut empty).stop();
        drop(start(&mut stopped));
        drop(start(&mut killed));
        let began = Instant::now();
        let mut version = Command::new(env!("CARGO_BIN_EXE_tidemill"));
        assert!(version.arg("--version").stdout(Stdio::null()).status().unwrap().success());
        bare.push(began.elapsed().as_secs_f64() * 1_000.0);
    }
    println!("start: {rounds} rounds, {}", machine());
    println!("| ms to SERVING | median | p90 | worst |\n| --- | --- | --- | --- |");
    let mut figures = serde_json::json!({ "rounds": rounds, "goal_ms": GOAL_MS });
    for (name, times) in [
        ("empty directory", &mut empty),
        ("after SIGTERM", &mut stopped),
        ("after SIGKILL", &mut killed),
        ("(tidemill --version)", &mut bare),
    ] {
        let [median, p90, worst] = [0.5, 0.9, 1.0].map(|share| percentile(times, share));
        println!("| {name} | {median:.1} | {p90:.1} | {worst:.1} |");
        figures[name] = serde_json::json!({ "median_ms": median, "p90_ms": p90, "worst_ms": worst });
    }
    println!("goal: under {GOAL_MS} ms on an empty directory, {:.2} of it", percentile(&mut empty, 0.5) / GOAL_MS);
    report("start", figures);
}

async fn started(folder: &Path, times: &mut Vec<f64>) -> Process {
    let began = Instant::now();
    let server = Process::serve(folder, &[]);
    server.serving().await;
    times.push(began.elapsed().as_secs_f64() * 1_000.0);
    server
}
