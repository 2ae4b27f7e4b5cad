//! The nodes of a test: real processes on one PostgreSQL database and one directory of objects.

use std::{net::SocketAddr, path::PathBuf, process::Stdio, time::Duration};

use tidemill::{
    pb::batch_service_client::BatchServiceClient,
    sim::{Sim, SimConfig},
};
use tokio::{
    net::TcpListener,
    process::{Child, Command},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use crate::support::{patience::ends, ports};

/// The generated client.
pub type Client = BatchServiceClient<Channel>;

/// How long a node keeps its work after its last sign of life.
pub const LEASE: Duration = Duration::from_secs(3);
/// A node that can't start yet (its database is away) is started again for this long.
const PATIENCE: Duration = crate::support::patience::HANG;

/// The program under test: what cargo has built for it, or another build of it, such as `target/release/tidemill`.
pub fn program() -> PathBuf {
    std::env::var_os("TIDEMILL_BIN").map_or_else(|| env!("CARGO_BIN_EXE_tidemill").into(), PathBuf::from)
}

/// A simulated worker in this process.
pub async fn worker(config: SimConfig) -> (Sim, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let sim = Sim::new(config).unwrap();
    tokio::spawn(sim.clone().serve(listener, CancellationToken::new()));
    (sim, url)
}

/// A simulated worker that is a process of its own.
pub struct WorkerProcess {
    pub address: SocketAddr,
    _reserved: ports::Address,
    flags: Vec<String>,
    child: Option<Child>,
}

impl WorkerProcess {
    /// Starts one that serves the model `sim`, with these flags besides.
    pub async fn start(flags: &[&str]) -> Self {
        let flags = ["--models", "sim"].iter().chain(flags).map(|flag| (*flag).to_owned()).collect();
        let reserved = ports::reserve();
        let mut worker = Self { address: reserved.address, _reserved: reserved, flags, child: None };
        worker.restart().await;
        worker
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// SIGKILL.
    pub async fn kill(&mut self) {
        self.child.take().unwrap().kill().await.unwrap();
    }

    /// Starts the process and waits until it takes connections.
    pub async fn restart(&mut self) {
        let mut command = Command::new(program());
        command.args(["sim", "--listen", &self.address.to_string()]).args(&self.flags);
        command.kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().unwrap());
        let until = Instant::now() + PATIENCE;
        while tokio::net::TcpStream::connect(self.address).await.is_err() {
            assert!(Instant::now() < until, "the worker does not start");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Nodes that share a database and the objects, each with a data directory and an address of its own.
pub struct Cluster {
    folder: tempfile::TempDir,
    database: String,
    flags: Vec<String>,
    pub nodes: Vec<Node>,
}

/// One node: a process that comes and goes, and an address that stays.
pub struct Node {
    pub address: SocketAddr,
    _reserved: ports::Address,
    data_dir: PathBuf,
    database: String,
    flags: Vec<String>,
    child: Option<Child>,
}

impl Cluster {
    /// Starts so many nodes, each with these flags besides what they share.
    pub async fn start(database: &str, count: usize, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let lease = humantime::format_duration(LEASE).to_string();
        let blobs = format!("file://{}", folder.path().join("blobs").display());
        std::fs::create_dir(folder.path().join("blobs")).unwrap();
        let mut shared = vec!["--blobs", &blobs, "--flush-interval", "200ms"];
        if !flags.contains(&"--lease") {
            shared.extend(["--lease", &lease]);
        }
        let flags = shared.iter().chain(flags).map(|flag| (*flag).to_owned()).collect();
        let mut cluster = Self { folder, database: database.to_owned(), flags, nodes: Vec::new() };
        for _ in 0..count {
            cluster.add(&[]).await;
        }
        cluster
    }

    /// Starts one more, with flags of its own.
    pub async fn add(&mut self, flags: &[&str]) {
        self.add_behind(&self.database.clone(), flags).await;
    }

    /// Starts one more that knows the database under this URL.
    pub async fn add_behind(&mut self, database: &str, flags: &[&str]) {
        let (reserved, database) = (ports::reserve(), database.to_owned());
        let data_dir = self.folder.path().join(format!("node-{}", self.nodes.len()));
        let flags = self.flags.iter().cloned().chain(flags.iter().map(|flag| (*flag).to_owned())).collect();
        let address = reserved.address;
        let mut node = Node { address, _reserved: reserved, data_dir, database, flags, child: None };
        node.restart().await;
        self.nodes.push(node);
    }

    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.nodes.iter().map(|node| node.address).collect()
    }

    /// What all nodes have logged, for a test that has failed.
    pub fn print_logs(&self) {
        for node in &self.nodes {
            let log = node.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            eprintln!("--- {}\n{}", node.address, tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
    }

    pub fn assert_no_panics(&self) {
        for node in &self.nodes {
            assert_eq!(node.logged("panicked"), 0, "{}", node.log());
        }
    }
}

impl Node {
    /// Starts the process and waits until it answers.
    pub async fn restart(&mut self) {
        std::fs::create_dir_all(&self.data_dir).unwrap();
        let file = self.data_dir.join("node.log");
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            let log = std::fs::File::options().create(true).append(true).open(&file).unwrap();
            let mut command = Command::new(program());
            command
                .env("TIDEMILL_DATABASE_URL", &self.database)
                .arg("serve")
                .args(["--listen", &self.address.to_string()])
                .arg("--data-dir")
                .arg(&self.data_dir);
            command.args(&self.flags).env("NO_COLOR", "1").kill_on_drop(true).stdin(Stdio::null()).stderr(log);
            let mut child = command.spawn().unwrap();
            while Instant::now() < until {
                if child.try_wait().unwrap().is_some() {
                    break;
                }
                if self.is_ready().await {
                    self.child = Some(child);
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        panic!("the node does not start:\n{}", std::fs::read_to_string(file).unwrap());
    }

    pub async fn is_ready(&self) -> bool {
        tidemill::telemetry::install_tls_provider();
        let client = reqwest::Client::builder().timeout(Duration::from_secs(10)).build().unwrap();
        let answer = client.get(format!("http://{}/readyz", self.address)).send().await;
        answer.is_ok_and(|answer| answer.status().is_success())
    }

    /// Whether the process that was started last still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.data_dir.join("node.log")).unwrap_or_default()
    }

    /// Lines of its log that hold this text.
    pub fn logged(&self, text: &str) -> usize {
        self.log().lines().filter(|line| line.contains(text)).count()
    }

    /// SIGKILL.
    pub async fn kill(&mut self) {
        self.child.take().unwrap().kill().await.unwrap();
    }

    /// SIGTERM, and the end.
    pub async fn terminate(&mut self) {
        self.signal("TERM").await;
        let mut child = self.child.take().unwrap();
        assert!(ends("the node stops", child.wait()).await.unwrap().success());
    }

    /// SIGSTOP: no instruction of it runs, its connections stay open.
    pub async fn freeze(&mut self) {
        self.signal("STOP").await;
    }

    /// SIGCONT.
    pub async fn thaw(&mut self) {
        self.signal("CONT").await;
    }

    async fn signal(&mut self, name: &str) {
        let id = self.child.as_ref().unwrap().id().unwrap().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &id]).status().await.unwrap().success());
    }

    pub async fn client(&self) -> Client {
        client(self.address).await.unwrap()
    }
}

/// A client of the node at this address. Calls that it leaves without an answer end after a while: frozen nodes never say no.
pub async fn client(address: SocketAddr) -> Result<Client, tonic::transport::Error> {
    Ok(BatchServiceClient::new(channel(address).await?).max_decoding_message_size(4 * 1024 * 1024))
}

/// A connection to the node at this address.
pub async fn channel(address: SocketAddr) -> Result<Channel, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    endpoint
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(Duration::from_secs(2))
        .keep_alive_timeout(Duration::from_secs(5))
        .keep_alive_while_idle(true)
        .connect()
        .await
}
