//! The commands of the real program, as somebody at a terminal meets them.

use std::{
    io::Read as _,
    path::Path,
    process::{Output, Stdio},
};

use axum::http::StatusCode;
use serde_json::Value;
use tidemill::{
    pb::{BatchStatus, GetBatchRequest},
    sim::{Fault, Sim, SimConfig},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

use crate::{
    create, input,
    server::Server,
    support::patience::{ends, until},
    upload, watch, worker,
};

/// The program as a client of that server.
pub fn tidemill(server: &str, arguments: &[&str]) -> Command {
    let mut program = Command::new(env!("CARGO_BIN_EXE_tidemill"));
    program.args(arguments).args(["--server", server]).kill_on_drop(true).stdin(Stdio::null());
    program.env_remove("TIDEMILL_TOKEN").env_remove("TIDEMILL_SERVER");
    program
}

/// Runs a command to its end.
pub async fn run(server: &str, arguments: &[&str]) -> Output {
    ends(format!("{arguments:?} ends"), tidemill(server, arguments).output()).await.unwrap()
}

/// What it said on stderr.
pub fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn url(server: &Server) -> String {
    format!("http://{}", server.address())
}

/// A batch of which every line has failed.
async fn failed_batch(server: &Server, sim: &Sim) -> String {
    sim.faults().always(Some(Fault::Fail { status: StatusCode::BAD_REQUEST, retry_after: None }));
    let mut client = server.client().await;
    let file = upload(&mut client, input(3)).await;
    let batch = create(&mut client, &file, "").await;
    watch(server.clone(), batch.clone()).await;
    batch
}

async fn interrupt(child: &mut Child) -> Option<i32> {
    let id = child.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-INT", &id]).status().await.unwrap().success());
    ends("Ctrl-C ends it", child.wait()).await.unwrap().code()
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_the_command_and_not_the_batch_and_says_so() {
    let (sim, at) = worker(SimConfig::default()).await;
    let server = Server::start(&["--worker", &at]).await;
    let failed = failed_batch(&server, &sim).await;
    sim.faults().always(Some(Fault::Hang));
    let mut client = server.client().await;
    let file = upload(&mut client, input(3)).await;
    let running = create(&mut client, &file, "").await;
    let path = server.folder().join("in.jsonl");
    std::fs::write(&path, input(3)).unwrap();
    let (path, out) = (path.to_str().unwrap(), server.folder().join("out.jsonl"));
    for (arguments, known) in [
        (&["batch", "watch", &running][..], Some(&running)),
        (&["batch", "watch", &running, "--json"], Some(&running)),
        (&["batch", "submit", path, "--watch"], None),
        (&["batch", "retry-failed", &failed, "--watch"], None),
        (&["batch", "results", &running, "--follow", "--output", out.to_str().unwrap()], Some(&running)),
    ] {
        let mut child = tidemill(&url(&server), arguments);
        let mut child = child.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut events = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut text = String::new();
        let follows = async {
            if arguments.contains(&"--follow") {
                until("it writes", async || Path::new(&format!("{}.part", out.display())).exists()).await;
            } else if arguments.contains(&"--json") {
                events.next_line().await.unwrap().unwrap();
            } else {
                while !text.contains("in progress") {
                    text.push_str(&(lines.next_line().await.unwrap().expect("it follows the batch") + "\n"));
                }
            }
        };
        ends("it follows the batch", follows).await;
        assert_eq!(interrupt(&mut child).await, Some(130), "{arguments:?}");
        while let Some(line) = lines.next_line().await.unwrap() {
            text.push_str(&(line + "\n"));
        }
        assert!(text.contains("the batch continues without this command"), "{arguments:?}: {text}");
        let told = text.lines().find_map(|line| line.split_once("tidemill batch watch ")).expect("how to come back").1;
        assert!(text.contains(&format!("tidemill batch cancel {told}")), "{text}");
        assert!(known.is_none_or(|known| known == told), "{told}");
        let get = GetBatchRequest { batch_id: told.to_owned() };
        let batch = client.get_batch(get).await.unwrap().into_inner();
        assert_eq!(batch.status(), BatchStatus::InProgress, "{arguments:?}");
    }
    let left: Vec<_> = std::fs::read_dir(server.folder()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains("out.jsonl")), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_ends_the_demo() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tidemill"));
    let mut child = child.args(["demo", "--keep"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.next_line().await.unwrap().expect("it starts");
    let mut words = BufReader::new(child.stderr.take().unwrap()).lines();
    assert_eq!(interrupt(&mut child).await, Some(130));
    let mut text = String::new();
    while let Some(line) = words.next_line().await.unwrap() {
        text.push_str(&line);
    }
    assert!(text.contains("the demo was interrupted: its server, its batch and its files are gone"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn follow_passes_lines_that_are_longer_than_a_message_usually_is() {
    const BYTES: usize = 9 * 1024 * 1024;
    let (sim, at) = worker(SimConfig::default()).await;
    let server = Server::start(&["--worker", &at]).await;
    sim.faults().next(1, Fault::Big { bytes: BYTES, sized: true });
    let path = server.folder().join("in.jsonl");
    std::fs::write(&path, input(2)).unwrap();
    let made = run(&url(&server), &["batch", "submit", path.to_str().unwrap()]).await;
    let batch = String::from_utf8(made.stdout).unwrap();
    let followed = run(&url(&server), &["batch", "results", batch.trim(), "--follow"]).await;
    assert_eq!(followed.status.code(), Some(0), "{}", said(&followed));
    let lines: Vec<&[u8]> = followed.stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
    assert_eq!(lines.len(), 2);
    assert!(lines.iter().any(|line| line.len() > BYTES), "one of them is long");
    for line in lines {
        let line: Value = serde_json::from_slice(line).unwrap();
        assert_eq!(line["response"]["status_code"], 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_file_for_results_and_errors_is_refused_before_anything_is_asked_or_written() {
    let folder = tempfile::tempdir().unwrap();
    let there = folder.path().join("there");
    std::fs::write(&there, "kept").unwrap();
    std::os::unix::fs::symlink("there", folder.path().join("link")).unwrap();
    std::fs::hard_link(&there, folder.path().join("hard")).unwrap();
    let whole = there.to_str().unwrap();
    for (output, errors) in [
        ("there", "there"),
        ("there", "./there"),
        ("link", "there"),
        ("there", whole),
        ("hard", "there"),
        ("new", "./new"),
    ] {
        for follow in [&[][..], &["--follow"]] {
            // Nobody listens there: it is not asked.
            let arguments = ["batch", "results", "batch_1", "--output", output, "--errors", errors];
            let mut program = tidemill("http://127.0.0.1:9", &[&arguments[..], follow].concat());
            let refused = program.current_dir(folder.path()).output().await.unwrap();
            let text = said(&refused);
            assert!(
                refused.status.code() == Some(1) && text.contains("--output and --errors name the same file"),
                "{text}"
            );
        }
    }
    assert_eq!(std::fs::read_to_string(&there).unwrap(), "kept");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3, "nothing was made");
}

/// What comes from a pipe is spooled: it may be large, and may never end.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_from_a_pipe_that_is_broken_off_leaves_no_temporary_file() {
    use tokio::io::AsyncWriteExt as _;
    let folder = tempfile::tempdir().unwrap();
    let mut program = tidemill("http://127.0.0.1:9", &["batch", "submit", "-"]);
    let mut child = program.stdin(Stdio::piped()).env("TMPDIR", folder.path()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // More than a pipe holds: some of it is spooled by now.
    stdin.write_all(&vec![b' '; 4_000_000]).await.unwrap();
    // Not by Ctrl-C, which whatever was started in the background may ignore, and what it starts.
    child.kill().await.unwrap();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn help_that_can_not_be_written_is_an_error() {
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let ended = tidemill("http://127.0.0.1:9", &["--help"]).stdout(full).status().await.unwrap();
    assert_eq!(ended.code(), Some(1));
}

/// A terminal: what a program writes to it, and its end for the program.
fn terminal() -> (std::fs::File, std::fs::File) {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&near).unwrap();
    unlockpt(&near).unwrap();
    let name = ptsname(&near, Vec::new()).unwrap().into_string().unwrap();
    (near.into(), std::fs::File::options().read(true).write(true).open(name).unwrap())
}

/// What a command shows on a terminal.
async fn shown(server: &str, arguments: &[&str]) -> String {
    let (mut near, far) = terminal();
    let mut program = tidemill(server, arguments);
    let child = program.stdout(far).stderr(Stdio::null()).spawn().unwrap();
    // Holds the terminal's far end.
    drop(program);
    let reading = tokio::task::spawn_blocking(move || {
        let (mut bytes, mut buffer) = (Vec::new(), [0; 4_096]);
        // The end of a terminal is an error.
        while let Ok(count @ 1..) = near.read(&mut buffer) {
            bytes.extend_from_slice(&buffer[..count]);
        }
        bytes
    });
    let bytes = ends("it ends", reading).await.unwrap();
    drop(child);
    String::from_utf8(bytes).unwrap().replace("\r\n", "\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_models_answer_does_not_command_a_terminal_and_a_pipe_gets_every_byte() {
    let (sim, at) = worker(SimConfig::default()).await;
    let server = Server::start(&["--worker", &at]).await;
    // The escape clears the screen, as JSON writes it; U+009B, which begins commands too, JSON need not escape.
    let answer = "{\"object\":\"chat.completion\",\"choices\":[{\"index\":0,\"finish_reason\":\"stop\",\"message\":{\"role\":\
                  \"assistant\",\"content\":\"a\\u001b[2J\u{9b}31mb\\r潮\"}}],\"usage\":{\"prompt_tokens\":1,\
                  \"completion_tokens\":1,\"total_tokens\":2}}";
    sim.faults().always(Some(Fault::Body("application/json", answer.as_bytes())));
    let mut client = server.client().await;
    let file = upload(&mut client, input(1)).await;
    let batch = create(&mut client, &file, "").await;
    watch(server.clone(), batch.clone()).await;
    let ask = ["infer", "sim", "hi"];
    assert_eq!(run(&url(&server), &ask).await.stdout, "a\u{1b}[2J\u{9b}31mb\r潮\n".as_bytes());
    assert_eq!(shown(&url(&server), &ask).await, "a\\u001b[2J\\u009b31mb\\u000d潮\n");
    let results = ["batch", "results", &batch];
    let piped = String::from_utf8(run(&url(&server), &results).await.stdout).unwrap();
    assert!(piped.contains('\u{9b}'), "{piped}");
    let seen = shown(&url(&server), &results).await;
    assert_eq!(seen, piped.replace('\u{9b}', "\\u009b"));
}
