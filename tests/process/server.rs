//! The `tidemill serve` process of a test.

use std::{
    net::SocketAddr,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{ExitStatus, Output, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use tidemill::{
    fault::Fault,
    pb::{batch_service_client::BatchServiceClient, webhook_admin_client::WebhookAdminClient},
};
use tokio::process::{Child, Command};
use tonic::transport::{Channel, Endpoint};

use crate::support::{
    patience::{HANG, ends, until},
    ports,
};

/// The generated client.
pub type Client = BatchServiceClient<Channel>;

/// A server on a data directory of its own. Clones share the directory and the address, not the process.
pub struct Server {
    shared: Arc<Shared>,
    /// What its process gets besides the test's.
    pub environment: Vec<(String, String)>,
    /// Where its data is, below its folder.
    pub data: &'static str,
    /// How many files its process may have open; none: as many as the test's.
    files: Option<u32>,
    child: Option<Child>,
}

struct Shared {
    folder: tempfile::TempDir,
    address: ports::Address,
    flags: Vec<String>,
}

impl Clone for Server {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            environment: self.environment.clone(),
            data: self.data,
            files: self.files,
            child: None,
        }
    }
}

impl Server {
    pub async fn start(flags: &[&str]) -> Self {
        let mut server = Self::new(flags);
        server.restart().await;
        server
    }

    /// A server that may have only so many files open.
    pub async fn start_with_files(flags: &[&str], files: u32) -> Self {
        let mut server = Self { files: Some(files), ..Self::new(flags) };
        server.restart().await;
        server
    }

    /// A server with an environment of its own, on a copy of a data directory if one is given.
    pub async fn in_environment(flags: &[&str], environment: Vec<(String, String)>, data: Option<&Path>) -> Self {
        let mut server = Self { environment, ..Self::new(flags) };
        if let Some(data) = data {
            let copied = Command::new("cp").arg("-r").arg(data.join(".")).arg(server.folder()).status().await.unwrap();
            assert!(copied.success());
        }
        server.restart().await;
        server
    }

    /// A server that dies at the `visit`th visit of that point.
    pub async fn armed(flags: &[&str], fault: Fault, visit: u32) -> Self {
        let mut server = Self::new(flags);
        server.run(Some(format!("{}:{visit}", fault.name()))).await;
        server
    }

    /// One that does not run yet.
    pub fn new(flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // The server has to come back to the same one.
        let address = ports::reserve();
        let flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        Self {
            shared: Arc::new(Shared { folder, address, flags }),
            environment: Vec::new(),
            data: "",
            files: None,
            child: None,
        }
    }

    fn command(&self, address: &str) -> Command {
        let program = env!("CARGO_BIN_EXE_tidemill");
        let mut command = match self.files {
            None => Command::new(program),
            Some(files) => {
                let mut shell = Command::new("sh");
                shell.args(["-c", &format!("ulimit -n {files} && exec \"$0\" \"$@\""), program]);
                shell
            }
        };
        command.arg("serve").args(["--listen", address]).arg("--data-dir").arg(self.folder().join(self.data));
        command.args(&self.shared.flags).kill_on_drop(true).stdin(Stdio::null());
        command.env_remove("TIDEMILL_FAULT").envs(self.environment.iter().cloned());
        command
    }

    /// Starts the process and waits until it answers.
    pub async fn restart(&mut self) {
        self.run(None).await;
    }

    /// Starts the process with that in `TIDEMILL_FAULT` and waits for no answer.
    pub fn spawn_with_fault(&mut self, fault: &str) {
        self.child = Some(self.spawn(Some(fault)));
    }

    /// Starts the process and waits for no answer.
    pub fn spawn_unready(&mut self) {
        self.child = Some(self.spawn(None));
    }

    /// Starts the process with a log that nobody reads, and waits until no more goes into it. The reader is to be kept.
    pub fn spawn_with_full_log(&mut self) -> std::io::PipeReader {
        let (reader, mut writer) = std::io::pipe().unwrap();
        // All that a pipe takes, less what a start logs at least.
        std::io::Write::write_all(&mut writer, &[b' '; 65_000]).unwrap();
        let mut command = self.command(&self.address().to_string());
        self.child = Some(command.stderr(writer).spawn().unwrap());
        let id = self.child.as_ref().unwrap().id().unwrap();
        let waits = || {
            let tasks = std::fs::read_dir(format!("/proc/{id}/task")).unwrap();
            let waits =
                |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("wchan")).unwrap_or_default();
            tasks.flatten().map(waits).any(|wait| wait.contains("pipe_write"))
        };
        let began = Instant::now();
        while !waits() {
            assert!(began.elapsed() < HANG, "its log is never full");
            std::thread::sleep(Duration::from_millis(10));
        }
        reader
    }

    fn spawn(&self, fault: Option<&str>) -> Child {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.shared.folder.path().join("server.log"))
            .unwrap();
        let mut command = self.command(&self.address().to_string());
        if let Some(fault) = fault {
            command.env("TIDEMILL_FAULT", fault);
        }
        command.stderr(log).spawn().unwrap()
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder().join("server.log")).unwrap_or_default()
    }

    async fn run(&mut self, fault: Option<String>) {
        self.child = Some(self.spawn(fault.as_deref()));
        self.ready().await;
    }

    /// Waits until the process answers and takes calls.
    pub async fn ready(&mut self) {
        until("the server is ready", async || {
            if let Some(status) = self.child.as_mut().unwrap().try_wait().unwrap() {
                panic!("the server ended with {status}:\n{}", self.log());
            }
            reqwest_ready(self.address()).await
        })
        .await;
    }

    /// SIGKILL.
    pub async fn kill(&mut self) {
        self.child.take().unwrap().kill().await.unwrap();
    }

    /// Waits until the process has died where it was told to.
    pub async fn died(&mut self) {
        let mut child = self.child.take().unwrap();
        let status = ends("it comes to the point where it has to die", child.wait()).await.unwrap();
        assert_eq!(status.signal(), Some(6), "{status}");
    }

    /// SIGTERM, and how the process ended.
    pub async fn terminate(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        let id = child.id().unwrap().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
        ends("it stops", child.wait()).await.unwrap()
    }

    /// Sends a signal: `TERM`, `HUP`.
    pub async fn signal(&self, name: &str) {
        let id = self.child.as_ref().unwrap().id().expect("it runs").to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &id]).status().await.unwrap().success());
    }

    /// How the process ended.
    pub async fn ended(&mut self) -> ExitStatus {
        let mut child = self.child.take().unwrap();
        let ended = tokio::time::timeout(HANG, child.wait()).await;
        ended.unwrap_or_else(|_| panic!("it has not ended:\n{}", self.log())).unwrap()
    }

    /// Whether the process runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.as_mut().unwrap().try_wait().unwrap().is_none()
    }

    /// A second process on the same data, on another port.
    pub async fn second(&self) -> Output {
        let mut command = self.command("127.0.0.1:0");
        ends("it refuses to start", command.output()).await.unwrap()
    }

    pub fn folder(&self) -> &Path {
        self.shared.folder.path()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.shared.address.address
    }

    /// Waits until SIGTERM no longer simply kills it.
    pub async fn handles_signals(&self) {
        let sigterm = 1 << (15 - 1);
        until("it handles SIGTERM", async || u64::from_str_radix(&self.status("SigCgt"), 16).unwrap() & sigterm != 0)
            .await;
    }

    /// A line of `/proc/<pid>/status` in bytes: `VmRSS`, what is resident now, or `VmHWM`, the most that ever was.
    pub fn memory(&self, line: &str) -> usize {
        self.status(line).trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
    }

    /// A line of `/proc/<pid>/status`.
    fn status(&self, line: &str) -> String {
        let id = self.child.as_ref().unwrap().id().unwrap();
        let text = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let value = text.lines().find_map(|text| text.strip_prefix(line)?.strip_prefix(':')).unwrap();
        value.trim().to_owned()
    }

    /// What its process has used of processors until now.
    pub fn processor_time(&self) -> Duration {
        let id = self.child.as_ref().unwrap().id().unwrap();
        let text = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
        // Behind the program's name, which may have spaces: the 12th and 13th field, in hundredths of a second.
        let fields: Vec<&str> = text.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let hundredths: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum();
        Duration::from_millis(hundredths * 10)
    }

    /// One line of its metrics, by its beginning.
    pub async fn metric(&self, begin: &str) -> Option<String> {
        let text = reqwest::get(format!("http://{}/metrics", self.address())).await.unwrap().text().await.unwrap();
        text.lines().find_map(|line| line.strip_prefix(begin)).map(|value| value.trim().to_owned())
    }

    /// All lines of a metric together.
    pub async fn metric_sum(&self, name: &str) -> u64 {
        let text = reqwest::get(format!("http://{}/metrics", self.address())).await.unwrap().text().await.unwrap();
        let lines = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
    }

    /// A client, once the server can be reached.
    pub async fn client(&self) -> Client {
        BatchServiceClient::new(self.channel().await).max_decoding_message_size(4 * 1024 * 1024)
    }

    /// The same for webhooks.
    pub async fn webhooks(&self) -> WebhookAdminClient<Channel> {
        WebhookAdminClient::new(self.channel().await)
    }

    async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address())).unwrap();
        loop {
            if let Ok(channel) = endpoint.connect().await {
                return channel;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

async fn reqwest_ready(address: SocketAddr) -> bool {
    tidemill::telemetry::install_tls_provider();
    reqwest::get(format!("http://{address}/readyz")).await.is_ok_and(|answer| answer.status().is_success())
}
