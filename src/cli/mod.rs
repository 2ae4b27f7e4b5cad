//! The command line. Every command, except those that run a server, is a client of the public gRPC API.

mod batch;
mod client;
mod demo;
mod descriptors;
mod environment;
mod error;
#[cfg(test)]
mod fake;
mod files;
mod greeting;
mod infer;
mod interrupt;
mod json;
mod meter;
mod models;
mod out;
mod printable;
mod results;
mod serve;
mod signals;
mod submit;
mod token;
mod top;
mod upload;
mod watch;
mod webhooks;
mod workers;

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use clap_complete::Shell;

pub use client::{Client, ClientArgs};
pub use error::report;

use crate::{
    config::{ConfigError, ConfigFile, LogFormat, ServeConfig},
    telemetry,
};

/// The log filter of client commands unless TIDEMILL_LOG is set: quiet, because their output is for the user.
const CLIENT_LOG: &str = "warn";

/// The error message about a log filter; the library's message says less.
const LEVELS: &str =
    "expected a level (error, warn, info, debug, trace), or levels by part such as warn,tidemill=debug";

/// Self-hosted batch inference: OpenAI Batch JSONL in, vLLM workers kept full, exactly one answer per request out.
#[derive(Debug, Parser)]
#[command(name = "tidemill", version, max_term_width = 120, after_help = HELP)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    client: ClientArgs,
}

const HELP: &str = "\
Examples:
  tidemill demo                                      see a batch run, with nothing set up
  tidemill serve --worker http://127.0.0.1:8000      serve batches onto a vLLM server
  tidemill batch submit requests.jsonl --watch       run a batch and follow it
  tidemill batch results batch_… --output out.jsonl  fetch its results

Exit codes: 0 success; 1 error; 2 wrong usage. Commands that follow a batch also use 3 (completed, but some lines failed) \
and 4 (failed, expired or cancelled).";

/// All commands.
#[derive(Debug, Subcommand)]
enum Command {
    /// Run a server. Without any setting: on 127.0.0.1:4080, data in ./data.
    #[command(after_help = SERVE_HELP)]
    Serve(Box<ServeConfig>),
    /// Try it out: a server, a simulated worker and a batch, in one process on a temporary directory.
    Demo(demo::DemoArgs),
    /// Submit, follow and manage batches.
    #[command(subcommand)]
    Batch(batch::BatchCommand),
    /// Upload, download and manage files.
    #[command(subcommand)]
    Files(files::FilesCommand),
    /// Send one request at once, ahead of all batches.
    #[command(after_help = INFER_HELP)]
    Infer(infer::InferArgs),
    /// Show and manage workers.
    #[command(subcommand)]
    Workers(workers::WorkersCommand),
    /// Watch workers and unfinished batches live.
    #[command(after_help = top::HELP)]
    Top(top::TopArgs),
    /// Manage webhooks: dead letters, deliveries, endpoints; verify and receive webhooks.
    #[command(subcommand)]
    Webhooks(webhooks::WebhooksCommand),
    /// Check a file of models that tidemill may load itself.
    #[command(subcommand)]
    Models(models::ModelsCommand),
    /// Make access tokens.
    #[command(subcommand)]
    Token(token::TokenCommand),
    /// Migrate the database, which serve does too, and show its migrations.
    Migrate(serve::MigrateArgs),
    /// Run a simulated vLLM worker, for trials and tests without a GPU.
    #[command(after_help = SIM_HELP)]
    Sim(serve::SimArgs),
    /// Print a completion script for a shell.
    #[command(
        after_help = "Example:\n  tidemill completions bash > ~/.local/share/bash-completion/completions/tidemill"
    )]
    Completions {
        /// The shell to complete for.
        shell: Shell,
    },
}

const SERVE_HELP: &str = "\
Precedence: a flag, then its variable, then the --config file, then the default. A repeatable setting is replaced as a \
whole. Example of a --config file:

  listen = \"0.0.0.0:4080\"
  worker = [\"http://10.0.0.5:8000\", \"http://10.0.0.6:8000\"]
  tokens = \"/etc/tidemill/tokens\"

Examples:
  tidemill serve --worker http://127.0.0.1:8000
  tidemill serve --listen 0.0.0.0:4080 --tokens tokens.txt --tls-cert cert.pem --tls-key key.pem
  TIDEMILL_DATABASE_URL=postgres://… TIDEMILL_BLOBS=s3://bucket/tidemill tidemill serve";

const INFER_HELP: &str = "\
Examples:
  tidemill infer sim-7b 'Why is the sea salt?'
  tidemill infer --endpoint /v1/embeddings --body '{\"model\": \"embedder\", \"input\": \"tide\"}'";

const SIM_HELP: &str = "\
Example:
  tidemill sim --listen 127.0.0.1:8000 --latency-ms 200 --error-rate 0.01 &
  tidemill serve --worker http://127.0.0.1:8000";

/// Why a command line can't be run.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// It is invalid, or asks for help.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// Its configuration file is invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// The commands that are not clients.
const SERVERS: [&str; 7] = ["serve", "demo", "models", "token", "migrate", "sim", "completions"];

/// The command line's grammar. Client options are accepted everywhere but shown only where they have an effect.
#[must_use]
pub fn command() -> clap::Command {
    let command = Cli::command();
    let hidden: Vec<_> =
        command.get_arguments().filter(|arg| arg.is_global_set()).map(|arg| arg.clone().hide(true)).collect();
    let command =
        SERVERS.iter().fold(command, |command, name| command.mut_subcommand(name, |sub| sub.args(hidden.clone())));
    environment::without_empty(command)
}

/// Reads a command line and, for the commands that take one, the configuration file that it or the environment names.
///
/// # Errors
/// [`UsageError`].
pub fn parse(args: impl IntoIterator<Item = impl Into<OsString> + Clone> + Clone) -> Result<Cli, UsageError> {
    let matches = command().try_get_matches_from(args.clone())?;
    let cli = Cli::from_arg_matches(&matches)?;
    let Some((path, name)) = cli.config_file() else { return Ok(cli) };
    let file = ConfigFile::read(&path)?;
    let command = command().mut_subcommand(name, |command| file.as_defaults(command));
    Ok(Cli::from_arg_matches(&command.try_get_matches_from(args)?)?)
}

impl Cli {
    /// Whether a fatal error is to be printed as JSON, because the log is.
    #[must_use]
    pub fn fails_in_json(&self) -> bool {
        matches!(&self.command, Command::Serve(config) if config.log_format == LogFormat::Json)
    }

    /// The configuration file and the command that takes it.
    fn config_file(&self) -> Option<(PathBuf, &'static str)> {
        match &self.command {
            Command::Serve(config) => Some((config.config.clone()?, "serve")),
            Command::Migrate(args) => Some((args.config.clone()?, "migrate")),
            _ => None,
        }
    }

    /// Starts logs and metrics as the command needs them.
    fn start_telemetry(&self) -> anyhow::Result<()> {
        match &self.command {
            Command::Serve(config) => {
                telemetry::init(config.log_format, &config.log)
                    .map_err(|_| anyhow::anyhow!("--log {}: {LEVELS}", config.log))?;
            }
            _ => {
                let filter = std::env::var("TIDEMILL_LOG").unwrap_or_else(|_| CLIENT_LOG.to_owned());
                telemetry::init(LogFormat::Text, &filter)
                    .map_err(|_| anyhow::anyhow!("TIDEMILL_LOG={filter}: {LEVELS}"))?;
            }
        }
        Ok(())
    }
}

/// Whether a command line that can't be parsed asks for a JSON log, as far as can be seen.
#[must_use]
pub fn asks_for_json(args: &[OsString]) -> bool {
    let words: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
    if !words.iter().any(|word| word == "serve") {
        return false;
    }
    let flag = words.windows(2).find(|pair| pair[0] == "--log-format").map(|pair| pair[1].to_string());
    let flag = flag.or_else(|| words.iter().find_map(|word| word.strip_prefix("--log-format=").map(str::to_owned)));
    flag.or_else(|| std::env::var("TIDEMILL_LOG_FORMAT").ok()).is_some_and(|format| format == "json")
}

/// A fatal error as a line of the JSON log.
#[must_use]
pub fn json_line(message: &str) -> String {
    let timestamp = humantime::format_rfc3339_micros(std::time::SystemTime::now()).to_string();
    let line = serde_json::json!({"timestamp": timestamp, "level": "ERROR", "message": message, "target": "tidemill"});
    line.to_string()
}

/// Runs a command.
///
/// # Errors
/// What went wrong, for [`report`].
pub async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    cli.start_telemetry()?;
    for warning in environment::warnings(&command(), std::env::vars_os().map(|(name, _)| name)) {
        tracing::warn!("{warning}");
    }
    let code = match cli.command {
        Command::Serve(config) => done(serve::serve(*config).await),
        Command::Demo(args) => demo::run(args).await,
        Command::Batch(command) => batch::run(command, &cli.client.client()?).await,
        Command::Files(command) => done(files::run(command, &cli.client.client()?).await),
        Command::Infer(args) => infer::run(args, &cli.client.client()?).await,
        Command::Webhooks(command) => done(webhooks::run(command, &cli.client.client()?).await),
        Command::Workers(command) => done(workers::run(command, &cli.client.client()?).await),
        Command::Top(args) => done(top::run(args, &cli.client.client()?, &cli.client.server).await),
        Command::Models(command) => models::run(command, cli.client.json).await,
        Command::Token(command) => done(token::run(command, cli.client.json)),
        Command::Migrate(args) => done(serve::migrate(args, cli.client.json).await),
        Command::Sim(args) => done(serve::sim(args).await),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut command(), "tidemill", &mut script);
            done(out::data(&String::from_utf8_lossy(&script)).map_err(Into::into))
        }
    };
    code.map(ExitCode::from)
}

fn done(result: anyhow::Result<()>) -> anyhow::Result<u8> {
    result.map(|()| 0)
}

#[cfg(test)]
mod secrets;

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(line: &str) -> Result<Cli, UsageError> {
        parse(line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn a_server_that_logs_json_fails_in_json() {
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert!(asks_for_json(&words("tidemill serve --wroker x --log-format json")));
        assert!(asks_for_json(&words("tidemill serve --log-format=json --lease x")));
        assert!(!asks_for_json(&words("tidemill serve --log-format text")));
        assert!(!asks_for_json(&words("tidemill batch list --log-format json")));
        assert!(parse_words("tidemill serve --log-format json").unwrap().fails_in_json());
        assert!(!parse_words("tidemill serve").unwrap().fails_in_json());
        let line: serde_json::Value = serde_json::from_str(&json_line("a\nb")).unwrap();
        assert_eq!((&line["level"], &line["message"]), (&"ERROR".into(), &"a\nb".into()));
    }

    #[test]
    fn the_commands_are_sound() {
        command().debug_assert();
    }

    #[test]
    fn every_command_and_argument_has_help() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for arg in command.get_arguments().filter(|arg| !arg.is_global_set()) {
                assert!(arg.get_help().is_some(), "{} {}", command.get_name(), arg.get_id());
            }
            command.get_subcommands().for_each(check);
        }
        check(&command());
    }

    #[test]
    fn what_the_help_teaches_is_understood() {
        for line in [
            "tidemill demo --worker http://127.0.0.1:8000 --requests 5 --keep",
            "tidemill serve --worker http://127.0.0.1:8000",
            "tidemill --server http://h:1 --json batch list --status in_progress,completed --metadata a=b",
            "tidemill batch list --server http://h:1 --json",
            "tidemill batch submit requests.jsonl --watch --window 24h --priority -1 --metadata k=v --metadata l=w",
            "tidemill batch submit - --webhook-url http://h --webhook-secret s --webhook-events completed,failed",
            "tidemill batch watch batch_1",
            "tidemill batch results batch_1 --output o --errors e --follow",
            "tidemill batch retry-failed batch_1 --watch",
            "tidemill files upload f --filename g --request-id r",
            "tidemill files download file-1 -o out",
            "tidemill infer sim-7b hello --max-tokens 5",
            "tidemill infer --endpoint /v1/embeddings --body {}",
            "tidemill workers register http://127.0.0.1:8000",
            "tidemill workers drain worker_1",
            "tidemill top --interval 5s",
            "tidemill top --once --json",
            "tidemill webhooks dead-letters list --batch batch_1 --host h --json",
            "tidemill webhooks dead-letters retry dl_1 --force",
            "tidemill webhooks dead-letters retry-all --event failed --dry-run",
            "tidemill webhooks dead-letters purge --older-than 30d",
            "tidemill webhooks endpoints create http://h/ --events completed,failed",
            "tidemill webhooks endpoints rotate-secret we_1 --overlap 0s",
            "tidemill webhooks verify --headers h --secret whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "tidemill webhooks listen --secret s",
            "tidemill token new --name n --role admin",
            "tidemill token new --name n --weight 1000",
            "tidemill models check models.toml --json",
            "tidemill models check --model qwen=Qwen/Qwen3-8B --model b=c",
            "tidemill token hash",
            "tidemill migrate --data-dir /d --status",
            "tidemill sim --listen 127.0.0.1:0 --models a,b --latency-ms 5 --tokens-per-second 9.5 --error-rate 0.1 --seed 7",
            "tidemill completions bash",
        ] {
            assert!(parse_words(line).is_ok(), "{line}: {}", parse_words(line).unwrap_err());
        }
    }

    #[test]
    fn client_options_are_the_same_before_and_after_the_command() {
        for line in ["tidemill --server http://h:1 batch list --json", "tidemill --json batch --server http://h:1 list"]
        {
            let cli = parse_words(line).unwrap();
            assert_eq!((cli.client.server.as_str(), cli.client.json), ("http://h:1", true), "{line}");
        }
        let help = command().find_subcommand_mut("serve").unwrap().render_long_help().to_string();
        assert!(help.contains("--listen") && !help.contains("--token-file"), "{help}");
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            "tidemill",
            "tidemill batch submit",
            "tidemill batch submit f --priority 2",
            "tidemill batch submit f --metadata novalue",
            "tidemill batch list --limit 0",
            "tidemill batch list --status done",
            "tidemill infer model-only",
            "tidemill models check",
            "tidemill sim --error-rate 1.5",
            "tidemill token new --name a/b",
            "tidemill token new --name n --weight 0",
            "tidemill token new --name n --weight 1001",
            "tidemill serve --max-tries 0",
            "tidemill top --interval 1ms",
        ] {
            assert!(matches!(parse_words(line), Err(UsageError::Usage(_))), "{line}");
        }
    }

    #[test]
    fn the_file_counts_for_serve_and_migrate() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "data_dir = \"/from/file\"\nmax_tries = 7").unwrap();
        let path = file.path().to_str().unwrap();
        let cli = parse(["tidemill", "serve", "--config", path, "--max-tries", "8"]).unwrap();
        let Command::Serve(config) = cli.command else { panic!("{:?}", cli.command) };
        assert_eq!((config.data_dir.to_str(), config.max_tries), (Some("/from/file"), 8));
        assert!(parse(["tidemill", "migrate", "--config", path]).is_ok());
        std::fs::write(file.path(), "data_dirs = 1").unwrap();
        let error = parse(["tidemill", "serve", "--config", path]).unwrap_err();
        assert!(error.to_string().contains("did you mean data_dir"), "{error}");
    }
}
