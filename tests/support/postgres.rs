//! A PostgreSQL cluster for this test process: made at first use, gone when the process ends, however it ends.
//!
//! A shell makes and starts it and holds the other end of a pipe to this process. When the pipe closes (exit, panic,
//! `kill -9`), it stops the server and removes the folder. Nothing is left to `Drop`, which a killed process never runs.

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{ChildStdin, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
};

use super::direct;
use sea_orm::ConnectionTrait;

/// Set to 1: a machine without PostgreSQL fails the tests instead of skipping them.
const REQUIRE: &str = "TIDEMILL_TEST_REQUIRE_POSTGRES";
/// What the folder in memory must have free: some 8 MiB a test.
const ROOM_KIB: u64 = 2 * 1024 * 1024;
/// Safe to lose: the cluster does not outlive the process.
const SETTINGS: &str = "-c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off -c full_page_writes=off \
                        -c wal_level=minimal -c max_wal_senders=0 -c max_connections=300 -c shared_buffers=64MB \
                        -c dynamic_shared_memory_type=mmap";
/// Arguments: the folder of PostgreSQL's programs, the cluster's folder, the server's options.
const WATCHDOG: &str = r#"
trap '' INT TERM HUP
"$1/initdb" -D "$2/data" -U postgres --auth=trust --encoding=UTF8 --locale=C --wal-segsize=1 --no-sync >"$2/log" 2>&1 &&
  "$1/pg_ctl" -D "$2/data" -l "$2/log" -o "$3" -w -t 60 start >/dev/null && echo ready
cat >/dev/null
"$1/pg_ctl" -D "$2/data" -m immediate stop >/dev/null 2>&1
rm -rf "$2"
"#;

struct Cluster {
    port: u16,
    programs: PathBuf,
    folder: PathBuf,
    user: Option<String>,
    /// Never written to: its closing tells the watchdog.
    _alive: ChildStdin,
}

fn cluster() -> Option<&'static Cluster> {
    static CLUSTER: OnceLock<Option<Cluster>> = OnceLock::new();
    CLUSTER.get_or_init(start).as_ref()
}

/// The server is down; dropped, it comes up again, even if the test has failed.
#[allow(dead_code)] // few binaries do
pub struct Away(());

/// Stops the server as a crash would: no connection is told, nothing is written down but what is in the log. Every other
/// test of the process suffers too.
#[allow(dead_code)] // few binaries do
pub fn crash() -> Away {
    control(cluster().expect("it ran"), &["-m", "immediate", "stop"]);
    Away(())
}

/// A cluster of its own: what is done to it concerns no other test.
#[allow(dead_code)] // few binaries do
pub struct Own(Cluster);

/// A cluster of its own and the URL of a database there. None, with a line that says so, without PostgreSQL.
#[allow(dead_code)] // few binaries do
pub fn own() -> Option<(Own, String)> {
    let own = Own(start()?);
    let url = format!("postgres://postgres@127.0.0.1:{}/postgres?sslmode=disable", own.0.port);
    Some((own, url))
}

#[allow(dead_code)] // few binaries do
impl Own {
    /// Stops it as a crash would.
    pub fn stop(&self) {
        control(&self.0, &["-m", "immediate", "stop"]);
    }

    /// Starts it again.
    pub fn start(&self) {
        bring_up(&self.0);
    }

    /// SIGSTOP to all its processes: connections stay open, new ones are taken by the system, and nobody answers.
    pub fn freeze(&self) {
        self.signal("-STOP");
    }

    /// The end of it.
    pub fn thaw(&self) {
        self.signal("-CONT");
    }

    fn signal(&self, signal: &str) {
        let Ok(text) = std::fs::read_to_string(self.0.folder.join("data/postmaster.pid")) else { return };
        let main = text.lines().next().unwrap_or_default().to_owned();
        // The one that makes the others first.
        let mut all = vec![main.clone()];
        for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
            let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).map(str::trim);
            if parent == Some(main.as_str()) {
                all.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        // One that has just ended is no matter.
        let _ = Command::new("kill").arg(signal).args(all).stderr(Stdio::null()).status();
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // A frozen server can't be stopped.
        self.thaw();
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        bring_up(cluster().expect("it ran"));
    }
}

#[allow(dead_code)] // few binaries do
fn bring_up(cluster: &Cluster) {
    let (log, options) = (cluster.folder.join("log"), format!("-p {} {SETTINGS}", cluster.port));
    control(cluster, &["-l", &log.display().to_string(), "-o", &options, "-w", "-t", "60", "start"]);
}

#[allow(dead_code)] // few binaries do
fn control(cluster: &Cluster, arguments: &[&str]) {
    let mut command = as_user(cluster.user.as_deref(), cluster.programs.join("pg_ctl"));
    command.arg("-D").arg(cluster.folder.join("data")).args(arguments);
    // The server outlives the command: it must not hold on to this process's pipes, nor hear its signals.
    command.process_group(0).current_dir(&cluster.folder).stdin(Stdio::null());
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("pg_ctl");
    assert!(status.success(), "pg_ctl {arguments:?}: {status}");
}

/// An empty database of its own on this process's cluster: its URL. None, with a line that says so, if there is no
/// PostgreSQL on this machine.
pub async fn database() -> Option<String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let Some(cluster) = cluster() else {
        assert!(std::env::var(REQUIRE).as_deref() != Ok("1"), "{REQUIRE}=1, but there is no PostgreSQL: see above");
        return None;
    };
    let url = |name: &str| format!("postgres://postgres@127.0.0.1:{}/{name}?sslmode=disable", cluster.port);
    let name = format!("test_{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let server = direct::connect(url("postgres")).await;
    // PostgreSQL 15's default, through the log, takes four times as long; 14 and older know only the copy, not its name.
    let create = format!("CREATE DATABASE {name}");
    if server.execute_unprepared(&format!("{create} STRATEGY file_copy")).await.is_err() {
        server.execute_unprepared(&create).await.expect("a database for this test");
    }
    server.close().await.expect("closed");
    Some(url(&name))
}

/// Past the test harness, which shows nothing that a passing test prints.
fn skip(why: &str) -> Option<Cluster> {
    let _ = writeln!(std::io::stderr(), "skipped on PostgreSQL: {why}");
    None
}

#[allow(clippy::zombie_processes)] // it ends after this process, by design
fn start() -> Option<Cluster> {
    let Some(programs) = programs() else {
        return skip("it is not installed (pg_config --bindir names no folder with initdb)");
    };
    let user = match unprivileged_user() {
        Ok(user) => user,
        Err(why) => return skip(&why),
    };
    // The port may be taken between its choice and the server's start.
    for _ in 0..5 {
        let folder = new_folder();
        if let Some(user) = &user {
            run(Command::new("chown").arg(user).arg(&folder));
        }
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
        let mut watchdog = as_user(user.as_deref(), "sh");
        watchdog.args(["-c", WATCHDOG, "sh"]).arg(&programs).arg(&folder).arg(format!("-p {port} {SETTINGS}"));
        // Out of the reach of signals to this process's group.
        watchdog.process_group(0).current_dir(&folder).stdin(Stdio::piped()).stdout(Stdio::piped());
        // It outlives this process by a moment: whoever waits for the end of this process's output must not wait for it.
        watchdog.stderr(Stdio::null());
        let mut watchdog = watchdog.spawn().expect("sh");
        let alive = watchdog.stdin.take().expect("piped");
        let mut said = String::new();
        let log = folder.join("log");
        let ready = BufReader::new(watchdog.stdout.take().expect("piped")).read_line(&mut said);
        if ready.is_ok() && said.trim() == "ready" {
            return Some(Cluster { port, programs, folder, user, _alive: alive });
        }
        println!("PostgreSQL did not start: {}", std::fs::read_to_string(log).unwrap_or_default());
    }
    panic!("PostgreSQL is installed, but does not start: see above");
}

/// The folder with `initdb` and `pg_ctl`, which Debian keeps out of the path.
fn programs() -> Option<PathBuf> {
    let told = Command::new("pg_config").arg("--bindir").output().ok()?;
    let folder = PathBuf::from(String::from_utf8(told.stdout).ok()?.trim());
    (folder.join("initdb").exists() && folder.join("pg_ctl").exists()).then_some(folder)
}

/// PostgreSQL refuses to run as root: whom to run it as instead, if need be.
fn unprivileged_user() -> Result<Option<String>, String> {
    let id = |arguments: &[&str]| {
        let output = Command::new("id").args(arguments).output().ok().filter(|output| output.status.success());
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    if id(&["-u"]).as_deref() != Some("0") {
        return Ok(None);
    }
    let user = ["postgres", "nobody"].into_iter().find(|user| id(&["-u", user]).is_some());
    user.map(|user| Some(user.to_owned())).ok_or_else(|| "root may not run it, and there is no other user".to_owned())
}

fn as_user(user: Option<&str>, program: impl AsRef<Path>) -> Command {
    let Some(user) = user else { return Command::new(program.as_ref()) };
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={user}"), &format!("--regid={}", group_of(user)), "--clear-groups"]);
    command.arg(program.as_ref());
    command
}

fn group_of(user: &str) -> String {
    let output = Command::new("id").args(["-g", user]).output().expect("id");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A folder in memory if there is room: `initdb` and new databases are several times as fast there.
fn new_folder() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let df = Command::new("df").arg("-Pk").arg(memory).output().map(|output| output.stdout).unwrap_or_default();
    let free =
        String::from_utf8_lossy(&df).lines().nth(1).and_then(|line| line.split_whitespace().nth(3)?.parse().ok());
    let free_kib: u64 = free.unwrap_or(0);
    let parent = if free_kib > ROOM_KIB { memory.to_owned() } else { std::env::temp_dir() };
    tempfile::Builder::new().prefix("tidemill-postgres-").tempdir_in(parent).expect("a folder").keep()
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
