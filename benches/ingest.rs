//! Claim "ingest": MB/s of `UploadFile` with full validation over MB/s of a plain `serde_json` parse of each line into a
//! struct with a `RawValue` body, in one thread: at least 1. Memory does not grow with the file.
//!
//!     cargo bench --bench ingest [-- MEGABYTES [ROUNDS [LINES]]]
//!
//! The real `tidemill serve` (SQLite, local directory) takes the whole way: gRPC stream, UTF-8, JSON, the rules for a line,
//! unique ids, the object written and fsynced, its row. The two take turns on the same lines, of three sizes; the parse
//! begins with bytes, as the upload does (`from_slice`), and once more with text that is known to be UTF-8 (`from_str`).
//! Then files of 1 and 10 times MEGABYTES and one of LINES short lines go through a new server each, whose peak memory is
//! read (`VmHWM`). Writes `target/bench/ingest.json`.

#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::{hint::black_box, path::Path, time::Instant};

use bytes::Bytes;
use common::{Process, chunks, machine, median, report};
use serde::Deserialize;
use serde_json::value::RawValue;
use tidemill::pb::{
    self, DeleteFileRequest, FileSpec, UploadFileRequest, batch_service_client::BatchServiceClient,
    upload_file_request::Payload,
};
use tonic::transport::Channel;

const GOAL: f64 = 1.0;
/// Characters of a request's content, and how it is called.
const SIZES: [(&str, usize); 3] = [("short lines", 20), ("chat", 600), ("documents", 8_000)];

/// What the other side reads of a line.
#[derive(Deserialize)]
#[allow(dead_code)]
struct Line<'a> {
    custom_id: &'a str,
    method: &'a str,
    url: &'a str,
    #[serde(borrow)]
    body: &'a RawValue,
}

fn main() {
    let numbers = common::arguments().0;
    let number = |at: usize, default: usize| numbers.get(at).copied().unwrap_or(default);
    let (megabytes, rounds, lines) = (number(0, 200), number(1, 5), number(2, 10_000_000));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    println!("ingest: {megabytes} MB, {rounds} rounds, {}", machine());
    println!(
        "| lines | upload MB/s | from_slice MB/s | ratio | from_str MB/s | ratio | server ns/B | client ns/B |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    let mut figures = serde_json::json!({ "megabytes": megabytes, "rounds": rounds, "goal": GOAL });
    for (name, content) in SIZES {
        let file: Vec<Bytes> = chunks(content, megabytes * 1_000_000, usize::MAX).collect();
        let whole: Vec<u8> = file.concat();
        let per_second = |began: Instant| whole.len() as f64 / 1e6 / began.elapsed().as_secs_f64();
        let folder = tempfile::tempdir_in("target").unwrap();
        let server = serve(folder.path());
        let mut client = runtime.block_on(client(&server));
        let (mut uploads, mut slices, mut strs) = (Vec::new(), Vec::new(), Vec::new());
        let (mut client_cpu, before) = (0.0, server.cpu_seconds());
        for _ in 0..rounds {
            let began = Instant::now();
            for line in whole.split_inclusive(|byte| *byte == b'\n') {
                black_box(serde_json::from_slice::<Line<'_>>(line).unwrap());
            }
            slices.push(per_second(began));
            let text = std::str::from_utf8(&whole).unwrap();
            let began = Instant::now();
            for line in text.split_inclusive('\n') {
                black_box(serde_json::from_str::<Line<'_>>(line).unwrap());
            }
            strs.push(per_second(began));
            let (began, client_before) = (Instant::now(), common::cpu_seconds("self"));
            let sent = runtime.block_on(upload(&mut client, file.clone().into_iter()));
            uploads.push(per_second(began));
            client_cpu += common::cpu_seconds("self") - client_before;
            // So that the disk does not fill up.
            runtime.block_on(client.delete_file(DeleteFileRequest { file_id: sent.id })).unwrap();
        }
        let (upload, slice, str) = (median(&mut uploads), median(&mut slices), median(&mut strs));
        let (ratio, ratio_str) = (upload / slice, upload / str);
        // What two cores would have to do at once.
        let per_byte = |seconds: f64| seconds * 1e9 / (whole.len() * rounds) as f64;
        let (server_cpu, client_cpu) = (per_byte(server.cpu_seconds() - before), per_byte(client_cpu));
        println!(
            "| {name} | {upload:.0} | {slice:.0} | {ratio:.2} | {str:.0} | {ratio_str:.2} | {server_cpu:.2} | {client_cpu:.2} |"
        );
        figures[name] = serde_json::json!({
            "upload_mb_per_second": upload, "from_slice_mb_per_second": slice, "ratio": ratio,
            "from_str_mb_per_second": str, "ratio_from_str": ratio_str,
            "server_ns_per_byte": server_cpu, "client_ns_per_byte": client_cpu,
        });
    }
    println!("goal: at least {GOAL} of from_slice");
    println!("| memory | MB | lines | seconds | peak |\n| --- | --- | --- | --- | --- |");
    let files = [
        ("one file", 600, megabytes * 1_000_000, usize::MAX),
        ("ten times as large", 600, megabytes * 10_000_000, usize::MAX),
        ("many lines", 20, usize::MAX, lines),
    ];
    for (name, content, bytes, lines) in files {
        let folder = tempfile::tempdir_in("target").unwrap();
        let server = serve(folder.path());
        let mut client = runtime.block_on(client(&server));
        let began = Instant::now();
        let file = runtime.block_on(upload(&mut client, chunks(content, bytes, lines)));
        let (seconds, peak, megabytes) = (began.elapsed().as_secs_f64(), server.peak_mb(), file.bytes as f64 / 1e6);
        println!("| {name} | {megabytes:.0} | {} | {seconds:.1} | {peak:.0} MB |", file.line_count);
        figures[name] = serde_json::json!({
            "megabytes": megabytes, "lines": file.line_count, "seconds": seconds, "peak_mb": peak,
        });
    }
    report("ingest", figures);
}

fn serve(folder: &Path) -> Process {
    Process::serve(folder, &["--max-file-lines", "1000000000"])
}

async fn client(server: &Process) -> BatchServiceClient<Channel> {
    BatchServiceClient::new(server.serving().await)
}

async fn upload(
    client: &mut BatchServiceClient<Channel>,
    chunks: impl Iterator<Item = Bytes> + Send + 'static,
) -> pb::File {
    let spec = UploadFileRequest { payload: Some(Payload::Spec(FileSpec::default())) };
    let chunks = chunks.map(|chunk| UploadFileRequest { payload: Some(Payload::Chunk(chunk)) });
    client.upload_file(tokio_stream::iter(std::iter::once(spec).chain(chunks))).await.unwrap().into_inner()
}
