//! What the benchmarks share: the server as a process of its own, what it costs, percentiles, and the report.

#![allow(dead_code)] // no benchmark needs all of it

use std::{
    fmt::Write,
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use bytes::Bytes;
use tidemill::pb::{
    File, FileSpec, UploadFileRequest, batch_service_client::BatchServiceClient, upload_file_request::Payload,
};
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

/// Of `/proc/<pid>/stat`: Linux has 100 ticks a second on every platform that Rust has.
pub const TICKS_PER_SECOND: f64 = 100.0;

/// Of a message, as the command line sends them.
const CHUNK: usize = 512 * 1024;

/// A process that is killed when it is dropped.
pub struct Process {
    child: Child,
    pub address: SocketAddr,
}

impl Process {
    /// `tidemill serve` on this data directory, with these flags more. It does not answer yet.
    pub fn serve(data_dir: &Path, flags: &[&str]) -> Self {
        let data_dir = data_dir.to_str().expect("a path in UTF-8");
        Self::spawn(&[&["serve", "--data-dir", data_dir], flags].concat())
    }

    /// `tidemill sim`: a simulated worker.
    pub fn sim(flags: &[&str]) -> Self {
        Self::spawn(&[&["sim"], flags].concat())
    }

    fn spawn(arguments: &[&str]) -> Self {
        // Free at this moment.
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidemill"));
        command.args(arguments).args(["--listen", &address.to_string()]).stdin(Stdio::null());
        command.env("TIDEMILL_LOG", "error");
        Self { child: command.spawn().unwrap(), address }
    }

    /// A channel to it, once its health is SERVING.
    pub async fn serving(&self) -> Channel {
        loop {
            let channel = self.channel().await;
            let asked = HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await;
            if asked.is_ok_and(|answer| answer.into_inner().status() == ServingStatus::Serving) {
                return channel;
            }
        }
    }

    /// A connection of its own, once it listens.
    pub async fn channel(&self) -> Channel {
        while TcpStream::connect(self.address).is_err() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        let endpoint =
            endpoint.tcp_nodelay(true).initial_connection_window_size(16 << 20).initial_stream_window_size(4 << 20);
        endpoint.connect().await.unwrap()
    }

    /// Seconds of CPU that it has used so far.
    pub fn cpu_seconds(&self) -> f64 {
        cpu_seconds(&self.child.id().to_string())
    }

    /// The most memory that it has had (`VmHWM`).
    pub fn peak_mb(&self) -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
    }

    /// SIGTERM; returns when it has ended in order.
    pub fn stop(mut self) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Uploads a file of so many short requests, each with a `custom_id` and a prompt of its own, for the model `sim`.
pub async fn upload(client: &mut BatchServiceClient<Channel>, requests: usize) -> File {
    let spec = UploadFileRequest { payload: Some(Payload::Spec(FileSpec::default())) };
    let chunks = (0..requests).step_by(2_000).map(move |from| {
        let text: String = (from..(from + 2_000).min(requests)).map(line).collect();
        UploadFileRequest { payload: Some(Payload::Chunk(text.into())) }
    });
    let messages = tokio_stream::iter(std::iter::once(spec).chain(chunks));
    client.upload_file(messages).await.unwrap().into_inner()
}

fn line(number: usize) -> String {
    format!(
        "{{\"custom_id\":\"r{number}\",\"method\":\"POST\",\"url\":\"/v1/chat/completions\",\"body\":{{\"model\":\"sim\",\
         \"messages\":[{{\"role\":\"user\",\"content\":\"number {number}\"}}],\"max_tokens\":4}}}}\n"
    )
}

/// A file of so many bytes or lines, whichever is less, in messages.
pub fn chunks(content: usize, bytes: usize, lines: usize) -> impl Iterator<Item = Bytes> + Send + 'static {
    let words = r#"The quick brown fox jumps over the lazy dog, and says \"why not?\" before it goes on.\n"#;
    let content = words.chars().cycle().take(content).collect::<String>();
    // An escape that is cut off would be no JSON.
    let content = content.trim_end_matches('\\').to_owned();
    let (mut sent, mut line) = (0, 0);
    std::iter::from_fn(move || {
        let mut chunk = String::with_capacity(CHUNK + content.len() + 256);
        while chunk.len() < CHUNK && sent + chunk.len() < bytes && line < lines {
            writeln!(
                chunk,
                "{{\"custom_id\":\"request-{line}\",\"method\":\"POST\",\"url\":\"/v1/chat/completions\",\"body\":{{\"model\":\"sim\",\
                 \"messages\":[{{\"role\":\"user\",\"content\":\"{content}\"}}],\"max_tokens\":16}}}}"
            )
            .unwrap();
            line += 1;
        }
        sent += chunk.len();
        (!chunk.is_empty()).then(|| chunk.into())
    })
}

/// Seconds of CPU that a process has used so far; `self` is this one.
pub fn cpu_seconds(process: &str) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // The second field, the name in parentheses, may have spaces.
    let fields: Vec<&str> = text.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: f64 = fields[11..13].iter().map(|field| field.parse::<f64>().unwrap()).sum();
    ticks / TICKS_PER_SECOND
}

/// The numbers among the arguments, and the others.
pub fn arguments() -> (Vec<usize>, Vec<String>) {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let (numbers, words): (Vec<_>, Vec<_>) = words.into_iter().partition(|word| word.parse::<usize>().is_ok());
    (numbers.iter().filter_map(|word| word.parse().ok()).collect(), words)
}

/// The value below which `share` of all are.
pub fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len() - 1;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    values[(last as f64 * share).round() as usize]
}

pub fn median(values: &mut [f64]) -> f64 {
    percentile(values, 0.5)
}

/// Processor, cores, memory, kernel.
pub fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
        line.split_once(':').map_or(String::new(), |(_, value)| value.trim().to_owned())
    };
    let (cpu, memory) = (read("/proc/cpuinfo"), read("/proc/meminfo"));
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let kib: f64 = field(&memory, "MemTotal").split(' ').next().and_then(|kib| kib.parse().ok()).unwrap_or(0.0);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!("{}, {cores} cores, {:.0} GiB, Linux {}", field(&cpu, "model name"), kib / 1_048_576.0, kernel.trim())
}

/// Writes `target/bench/<claim>.json`, with the machine.
pub fn report(claim: &str, mut figures: serde_json::Value) {
    figures["claim"] = claim.into();
    figures["machine"] = machine().into();
    std::fs::create_dir_all("target/bench").unwrap();
    std::fs::write(format!("target/bench/{claim}.json"), figures.to_string()).unwrap();
}
