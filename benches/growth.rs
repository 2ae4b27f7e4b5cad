//! Claim "growth": a million requests take at most 10.5 times as long as a hundred thousand, and no more memory.
//!
//!     cargo bench --bench growth [-- SMALL LARGE]
//!
//! The real `tidemill serve` (SQLite, local directory, defaults) and the real `tidemill sim`, each a process of its own; the
//! upload, the run and the download of the results are all in the time, and the server's peak resident set (`VmHWM`) is
//! read at the end. Writes `target/bench/growth.json`.

#![allow(clippy::unwrap_used, missing_docs)]

use std::{
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tidemill::pb::{
    BatchStatus, CreateBatchRequest, DownloadFileRequest, FileSpec, GetBatchRequest, UploadFileRequest,
    batch_service_client::BatchServiceClient, create_batch_request::Input, upload_file_request::Payload,
};
use tonic::transport::{Channel, Endpoint};

struct Kill(Child);

impl Drop for Kill {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let (small, large) = (numbers.first().copied().unwrap_or(100_000), numbers.get(1).copied().unwrap_or(1_000_000));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let mut rows = Vec::new();
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
    std::fs::create_dir_all("target/bench").unwrap();
    let report = serde_json::json!({
        "claim": "growth", "small": small, "large": large, "time_ratio": time, "memory_ratio": memory,
        "peak_mb": rows[1].peak_mb, "seconds": total(&rows[1]),
    });
    std::fs::write("target/bench/growth.json", report.to_string()).unwrap();
}

struct Run {
    upload: Duration,
    run: Duration,
    download: Duration,
    peak_mb: f64,
}

async fn measure(requests: usize) -> Run {
    let folder = tempfile::tempdir_in("target").unwrap();
    let (worker, address) = (free(), free());
    let tidemill = env!("CARGO_BIN_EXE_tidemill");
    let _sim = Kill(
        Command::new(tidemill)
            .args(["sim", "--models", "sim", "--latency-ms", "0", "--tokens-per-second", "0", "--listen", &worker])
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let server = Kill(
        Command::new(tidemill)
            .args(["serve", "--listen", &address, "--worker", &format!("http://{worker}")])
            // The default stops at a million.
            .args(["--max-file-lines", &requests.max(1_000_000).to_string(), "--data-dir"])
            .arg(folder.path())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let mut client = connect(&address).await;

    let started = Instant::now();
    let spec = UploadFileRequest { payload: Some(Payload::Spec(FileSpec::default())) };
    let chunks = (0..requests).step_by(2_000).map(move |from| {
        let text: String = (from..(from + 2_000).min(requests)).map(line).collect();
        UploadFileRequest { payload: Some(Payload::Chunk(text.into())) }
    });
    let messages = tokio_stream::iter(std::iter::once(spec).chain(chunks));
    let file = client.upload_file(messages).await.unwrap().into_inner();
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
    Run { upload, run, download, peak_mb: peak_mb(Path::new(&format!("/proc/{}/status", server.0.id()))) }
}

fn line(number: usize) -> String {
    format!(
        "{{\"custom_id\":\"r{number}\",\"method\":\"POST\",\"url\":\"/v1/chat/completions\",\"body\":{{\"model\":\"sim\",\
         \"messages\":[{{\"role\":\"user\",\"content\":\"number {number}\"}}],\"max_tokens\":4}}}}\n"
    )
}

fn free() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

async fn connect(address: &str) -> BatchServiceClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    loop {
        if let Ok(channel) = endpoint.connect().await {
            return BatchServiceClient::new(channel);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn peak_mb(status: &Path) -> f64 {
    let text = std::fs::read_to_string(status).unwrap();
    let line = text.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
}
