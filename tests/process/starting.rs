//! What the real program says when it can't start, or starts otherwise than somebody meant.

use std::process::Stdio;

use serde_json::Value;
use tokio::process::Command;

use crate::{commands::said, server::Server, support::patience::ends};

#[tokio::test(flavor = "multi_thread")]
async fn a_misspelt_variable_is_warned_about_and_its_value_is_not_shown() {
    let variables = [
        ("TIDEMILL_WORKERS", "http://s3cret-host:1"),
        ("TIDEMILL_MASTERKEY", "s3cret"),
        ("TIDEMILL_SERVICE_HOST", "10.0.0.1"),
        ("TIDEMILL_LOG", "info"),
    ];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let server = Server::in_environment(&[], variables, None).await;
    let log = server.log();
    for words in [
        "TIDEMILL_WORKERS is not a setting and has no effect: did you mean TIDEMILL_WORKER?",
        "TIDEMILL_MASTERKEY is not a setting and has no effect: did you mean TIDEMILL_MASTER_KEY?",
    ] {
        assert_eq!(log.matches(words).count(), 1, "{log}");
    }
    assert!(!log.contains("s3cret") && !log.contains("SERVICE_HOST is"), "{log}");
    // A client warns as well.
    let listed = Command::new(env!("CARGO_BIN_EXE_tidemill"))
        .args(["batch", "list", "--server", &format!("http://{}", server.address())])
        .env("TIDEMILL_TOKENFILE", "s3cret")
        .output()
        .await
        .unwrap();
    assert!(
        listed.status.success() && said(&listed).contains("did you mean TIDEMILL_TOKEN_FILE?"),
        "{}",
        said(&listed)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_keeps_a_server_from_starting_is_a_line_of_json_where_the_log_is() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("file"), "not what you think\n").unwrap();
    std::fs::write(at("bytes"), [0xff; 64]).unwrap();
    std::fs::create_dir(at("damaged")).unwrap();
    std::fs::write(folder.path().join("damaged/tidemill.db"), "no database".repeat(1_000)).unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for (arguments, words) in [
        (vec!["--lease".to_owned(), "soon".to_owned()], "--lease"),
        (vec!["--wroker".to_owned(), "http://h".to_owned()], "--worker"),
        (vec!["--config".to_owned(), at("nowhere.toml")], "nowhere.toml"),
        (vec!["--config".to_owned(), at("file")], "file"),
        (vec!["--data-dir".to_owned(), at("file")], "file: it is not a directory"),
        (vec!["--data-dir".to_owned(), at("damaged")], "is not a SQLite database, or it is damaged"),
        (vec!["--listen".to_owned(), "localhost:4080".to_owned()], "write 127.0.0.1:4080"),
        (vec!["--listen".to_owned(), "127.0.0.1:99999".to_owned()], "a port from 0 to 65535"),
        (vec!["--blobs".to_owned(), "ftp://h/x".to_owned()], "expected s3://"),
        (vec!["--drain-timeout".to_owned(), "1000000000000s".to_owned()], "at most"),
        (vec!["--tokens".to_owned(), at("bytes")], "it is not UTF-8 text"),
        (vec!["--tokens".to_owned(), at("nowhere")], "No such file or directory"),
        (vec!["--tokens".to_owned(), at("file")], "token"),
        (vec!["--tls-cert".to_owned(), at("file"), "--tls-key".to_owned(), at("file")], "file"),
        (vec!["--listen".to_owned(), taken.clone()], &taken),
        (vec!["--database-url".to_owned(), "postgres://u:s3cret@127.0.0.1:9/d".to_owned()], "database"),
        (vec!["--log".to_owned(), "tidemill=loud".to_owned()], "--log"),
        (vec!["--master-key".to_owned(), "s3cret".to_owned()], "the master key"),
        (vec!["--max-waiting-deliveries-of-nothing".to_owned()], "--max-waiting-deliveries-of-nothing"),
    ] {
        for variable in [false, true] {
            let mut program = Command::new(env!("CARGO_BIN_EXE_tidemill"));
            program.arg("serve").args(&arguments).stdin(Stdio::null()).current_dir(folder.path()).kill_on_drop(true);
            if !arguments.contains(&"--listen".to_owned()) {
                program.args(["--listen", "127.0.0.1:0"]);
            }
            if variable {
                program.env("TIDEMILL_LOG_FORMAT", "json");
            } else {
                program.args(["--log-format", "json"]);
            }
            let ended = ends(format!("{arguments:?} keeps it from starting"), program.output()).await.unwrap();
            let text = said(&ended);
            assert!(matches!(ended.status.code(), Some(1 | 2)), "{arguments:?}: {text}");
            let lines: Vec<Value> = text
                .lines()
                .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{arguments:?}: {text}")))
                .collect();
            let last = lines.last().unwrap_or_else(|| panic!("{arguments:?} says nothing"));
            assert_eq!(last["level"], "ERROR", "{text}");
            assert!(last["timestamp"].is_string(), "{text}");
            assert!(last["message"].as_str().unwrap().contains(words), "{arguments:?}: {text}");
            for never in ["s3cret", "panicked", "os error", "bug in tidemill", "invalid socket"] {
                assert!(!text.contains(never), "{never}: {text}");
            }
        }
    }
}
