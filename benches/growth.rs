//! Claim "growth": a million requests take at most 10.5 times as long as a hundred thousand, and no more memory.
//!
//!     cargo bench --bench growth [-- SMALL LARGE]
//!
//! The real `tidemill serve` (SQLite, local directory, defaults) and the real `tidemill sim`, each a process of its own; the
//! upload, the run and the download of the results are all in the time, and the server's peak resident set (`VmHWM`) is
//! read at the end. Writes `target/bench/growth.json`.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::time::{Duration, Instant};

use common::{Process, machine, report, upload};
use tidemill::pb::{
    BatchStatus, CreateBatchRequest, DownloadFileRequest, GetBatchRequest, batch_service_client::BatchServiceClient,
    create_batch_request::Input,
};

fn main() {
    let numbers = common::arguments().0;
    let (small, large) = (numbers.first().copied().unwrap_or(100_000), numbers.get(1).copied().unwrap_or(1_000_000));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut rows = Vec::new();
    println!("growth: {}", machine());
    println!("| requests | upload | run | download | peak memory |\n| --- | --- | --- | --- | --- |");
    for requests in [small, large] {
        let run = runtime.block_on(measure(requests));
        println!(
            "| {requests} | {:.2} s | {:.2} s | {:.2} s | {:.0} MB |",
            run.upload.as_secs_f64(),
            run.run.as_secs_f64(),
            run.download.as_secs_f64(),
            run.peak_mb
        );
        rows.push(run);
    }
    let total = |run: &Run| (run.upload + run.run + run.download).as_secs_f64();
    let (time, memory) = (total(&rows[1]) / total(&rows[0]), rows[1].peak_mb / rows[0].peak_mb);
    println!("growth {small} to {large}: time x{time:.2}, memory x{memory:.2}");
    let figures = serde_json::json!({
        "small": small, "large": large, "time_ratio": time, "memory_ratio": memory,
        "peak_mb": rows[1].peak_mb, "seconds": total(&rows[1]),
    });
    report("growth", figures);
}

struct Run {
    upload: Duration,
    run: Duration,
    download: Duration,
    peak_mb: f64,
}

async fn measure(requests: usize) -> Run {
    let folder = tempfile::tempdir_in("target").unwrap();
    let sim = Process::sim(&["--models", "sim", "--latency-ms", "0", "--tokens-per-second", "0"]);
    let worker = format!("http://{}", sim.address);
    // The default stops at a million.
    let lines = requests.max(1_000_000).to_string();
    let server = Process::serve(folder.path(), &["--worker", &worker, "--max-file-lines", &lines]);
    let mut client = BatchServiceClient::new(server.serving().await);

    let started = Instant::now();
    let file = upload(&mut client, requests).await;
    let upload = started.elapsed();

    let started = Instant::now();
    let request = CreateBatchRequest { input: Some(Input::InputFileId(file.id)), ..CreateBatchRequest::default() };
    let batch = client.create_batch(request).await.unwrap().into_inner().id;
    let ended = loop {
        let now = client.get_batch(GetBatchRequest { batch_id: batch.clone() }).await.unwrap().into_inner();
        if now.status() == BatchStatus::Completed {
            break now;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let run = started.elapsed();
    assert_eq!(ended.request_counts.unwrap().completed, requests as i64);

    let started = Instant::now();
    let request = DownloadFileRequest { file_id: ended.output_file_id, offset: 0 };
    let mut stream = client.download_file(request).await.unwrap().into_inner();
    let mut lines = 0;
    while let Some(chunk) = stream.message().await.unwrap() {
        lines += memchr::memchr_iter(b'\n', &chunk.data).count();
    }
    assert_eq!(lines, requests);
    let download = started.elapsed();
    Run { upload, run, download, peak_mb: server.peak_mb() }
}
