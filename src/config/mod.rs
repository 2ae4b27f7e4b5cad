//! The server's one typed configuration. Every setting comes from, lowest to highest: its default, a TOML file
//! (`--config`), the environment (`TIDEMILL_…`), its flag. What [`ServeConfig::validate`] has passed is not checked again.

mod check;
mod file;
mod secret;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{
    Args, Command, FromArgMatches, ValueEnum,
    builder::{BoolishValueParser, RangedU64ValueParser},
};
use ipnet::IpNet;
use object_store::ObjectStoreScheme;
use url::Url;

pub use file::ConfigFile;
pub use secret::{SecretParser, SecretSetting, parse_database_url, parse_key, parse_webhook_secret};

use crate::{
    domain::{HealthPath, WorkerPriority, webhook::Secret as WebhookSecret},
    words,
};

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("config file {file}: {}", words::file(.error))]
    Unreadable {
        /// Its path.
        file: String,
        /// The error of the operating system.
        error: std::io::Error,
    },
    /// The file is not TOML.
    #[error("config file {file} is not valid TOML: {message}")]
    NotToml {
        /// Its path.
        file: String,
        /// What and where.
        message: String,
    },
    /// The file has a key that is no setting.
    #[error("config file {file}: unknown setting {key:?}; {hint}")]
    UnknownKey {
        /// Its path.
        file: String,
        /// The key.
        key: String,
        /// A setting with a similar name, or where the settings are listed.
        hint: String,
    },
    /// A setting's value in the file is wrong.
    #[error("config file {file}: {key}: {message}")]
    BadValue {
        /// Its path.
        file: String,
        /// The setting.
        key: String,
        /// What is wrong.
        message: String,
    },
    /// Settings that do not go together, or a value out of range.
    #[error("{setting}: {message}")]
    Refused {
        /// The flag.
        setting: &'static str,
        /// What is wrong and what to do.
        message: String,
    },
}

/// The format of log lines: text, for people, or json, one object per line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// What becomes of a file with bad lines that comes over OpenAI's API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum BadFiles {
    /// The upload is refused, and names the lines.
    #[default]
    Refuse,
    /// OpenAI's way: the upload succeeds, and a batch of the file fails and names the lines.
    FailBatch,
}

/// A part of the work that a node can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum NodeRole {
    /// Answers clients.
    Api,
    /// Runs batches: claims segments, closes windows, deletes garbage.
    Scheduler,
    /// Delivers webhooks.
    Delivery,
}

impl NodeRole {
    /// The role's name in the setting.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Scheduler => "scheduler",
            Self::Delivery => "delivery",
        }
    }
}

/// The database of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Database {
    /// A SQLite file: one node.
    Sqlite(PathBuf),
    /// A PostgreSQL URL: any number of nodes.
    Postgres(SecretSetting),
}

/// Where objects are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlobStore {
    /// A local directory: one node.
    Directory(PathBuf),
    /// An object store's URL: any number of nodes.
    Url(String),
}

impl std::fmt::Display for BlobStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "{}", path.display()),
            Self::Url(url) => f.write_str(url),
        }
    }
}

/// The directory of data unless another one is named.
const DATA_DIR: &str = "./data";

/// All settings of a server.
#[derive(Clone, Debug, Args)]
pub struct ServeConfig {
    /// TOML file with settings: the flags' names with "_" instead of "-". The environment and flags take precedence.
    #[arg(long, env = "TIDEMILL_CONFIG", value_name = "FILE", help_heading = "General")]
    pub config: Option<PathBuf>,

    /// Address for gRPC and HTTP, which share one port. Port 0: any free port. An address other than loopback needs
    /// --tokens, --tls-client-ca or --insecure-allow-anonymous.
    #[arg(
        long,
        env = "TIDEMILL_LISTEN",
        value_name = "ADDR",
        default_value = "127.0.0.1:4080",
        help_heading = "General",
        value_parser = parse_address
    )]
    pub listen: SocketAddr,

    /// What this node does, comma-separated: api (answers clients), scheduler (runs batches), delivery (sends
    /// webhooks). The nodes of a PostgreSQL database together must do all of it. Every node serves health and metrics.
    #[arg(
        long,
        env = "TIDEMILL_ROLES",
        value_name = "ROLES",
        value_delimiter = ',',
        help_heading = "General",
        default_value = "api,scheduler,delivery"
    )]
    pub roles: Vec<NodeRole>,

    /// Base URL of a worker: a vLLM server or any server with OpenAI's HTTP API. Repeatable; comma-separated in the
    /// environment. While the server runs, add workers with tidemill workers register.
    #[arg(long, env = "TIDEMILL_WORKER", value_name = "URL", value_delimiter = ',', help_heading = "Workers",
        value_parser = parse_worker)]
    pub worker: Vec<Url>,

    /// Fixed limit of the requests that this node has in flight at one worker, 1 to 65536. Default: found for each
    /// worker by measuring, so that the worker is full and few requests wait in it.
    #[arg(long, env = "TIDEMILL_WORKER_MAX_IN_FLIGHT", value_name = "N", help_heading = "Workers",
        value_parser = RangedU64ValueParser::<u32>::new().range(1..=65_536))]
    pub worker_max_in_flight: Option<u32>,

    /// Upper bound of the limit that is found by measuring, 1 to 65536. Has no effect with --worker-max-in-flight.
    #[arg(long, env = "TIDEMILL_WORKER_MAX_IN_FLIGHT_CAP", value_name = "N", default_value = "1024",
        help_heading = "Workers", value_parser = RangedU64ValueParser::<u32>::new().range(1..=65_536))]
    pub worker_max_in_flight_cap: u32,

    /// How batch requests let other requests go first in a vLLM with --scheduling-policy priority, where a lower number
    /// goes first and requests without one, such as Infer calls, have 0. "auto": the header x-vllm-priority: 10, which
    /// other workers ignore. A number: as "priority" in the body, for vLLM before 0.32 and for embeddings, scores and
    /// reranks. "off": not at all. A request with its own priority keeps it.
    #[arg(
        long,
        env = "TIDEMILL_WORKER_PRIORITY",
        value_name = "auto|off|N",
        default_value = "auto",
        allow_hyphen_values = true,
        help_heading = "Workers"
    )]
    pub worker_priority: WorkerPriority,

    /// Sent to every worker as a bearer token: the key given to vllm serve --api-key. Set it by its variable or in the
    /// file, because others on the machine can see flags.
    #[arg(long, env = "TIDEMILL_WORKER_API_KEY", value_name = "KEY", hide_env_values = true, help_heading = "Workers",
        value_parser = SecretParser(parse_key), allow_hyphen_values = true)]
    pub worker_api_key: Option<SecretSetting>,

    /// Path of the workers' health check, below their base URL, or "none" to check only their list of models. A worker
    /// may be registered with a path of its own. A check that answers too slowly, or that runs requests on models as a
    /// LiteLLM gateway's does, is skipped automatically.
    #[arg(
        long,
        env = "TIDEMILL_WORKER_HEALTH_PATH",
        value_name = "PATH|none",
        default_value = "/health",
        help_heading = "Workers"
    )]
    pub worker_health_path: HealthPath,

    /// Time between two health checks of a worker, unless it was registered with an interval of its own: 100 ms to 1 h.
    #[arg(long, env = "TIDEMILL_WORKER_HEALTH_INTERVAL", value_name = "SPAN", default_value = "1s",
        help_heading = "Workers", value_parser = parse_span)]
    pub worker_health_interval: Duration,

    /// Time limit of one request to a worker, 1s to 7d.
    #[arg(long, env = "TIDEMILL_REQUEST_TIMEOUT", value_name = "SPAN", default_value = "600s", help_heading = "Workers",
        value_parser = parse_span)]
    pub request_timeout: Duration,

    /// Memory for the workers' answers at this server, from their first byte until their result is durable, such as
    /// 512MiB; at least 16MiB. At the limit nothing more is sent or read until memory is free. One answer, at most 128
    /// MiB, may come on top.
    #[arg(long, env = "TIDEMILL_WORKER_ANSWER_MEMORY", value_name = "SIZE", default_value = "512MiB",
        help_heading = "Workers", value_parser = parse_bytes)]
    pub worker_answer_memory: u64,

    /// Tries of a request in all before it ends in the error file, 1 to 100.
    #[arg(long, env = "TIDEMILL_MAX_TRIES", value_name = "N", default_value = "5", help_heading = "Workers",
        value_parser = RangedU64ValueParser::<u32>::new().range(1..=100))]
    pub max_tries: u32,

    /// Directory of the SQLite database and the objects. Only one server at a time may use it.
    #[arg(long, env = "TIDEMILL_DATA_DIR", value_name = "DIR", default_value = DATA_DIR, help_heading = "Storage")]
    pub data_dir: PathBuf,

    /// PostgreSQL: postgres://user:password@host/database. Any number of servers may share it if they also share
    /// --blobs. Default: SQLite in --data-dir.
    #[arg(long, env = "TIDEMILL_DATABASE_URL", value_name = "URL", hide_env_values = true, help_heading = "Storage",
        value_parser = SecretParser(parse_database_url), allow_hyphen_values = true)]
    pub database_url: Option<SecretSetting>,

    /// Connections to PostgreSQL, 2 to 1000.
    #[arg(long, env = "TIDEMILL_DATABASE_CONNECTIONS", value_name = "N", default_value = "10", help_heading = "Storage",
        value_parser = RangedU64ValueParser::<u32>::new().range(2..=1_000))]
    pub database_connections: u32,

    /// Where objects are stored: s3://bucket/prefix, gs://…, az://… (with the same credentials as the cloud's own
    /// tools), or file:///path. Default: a directory in --data-dir; with PostgreSQL --data-dir must then be set.
    #[arg(long, env = "TIDEMILL_BLOBS", value_name = "URL", help_heading = "Storage", value_parser = parse_blobs)]
    pub blobs: Option<String>,

    /// The most requests in one file, 1 to 1000000000.
    #[arg(long, env = "TIDEMILL_MAX_FILE_LINES", value_name = "N", default_value = "1000000", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u64>::new().range(1..=1_000_000_000))]
    pub max_file_lines: u64,

    /// The most bytes in one file, such as 10GB or 4GiB.
    #[arg(long, env = "TIDEMILL_MAX_FILE_BYTES", value_name = "SIZE", default_value = "10GB", help_heading = "Limits",
        value_parser = parse_bytes)]
    pub max_file_bytes: u64,

    /// What becomes of a file with bad lines that comes over OpenAI's HTTP API. refuse: the upload fails and names the
    /// lines. fail-batch, as at OpenAI: the upload succeeds, and a batch of the file fails and names the lines.
    #[arg(
        long,
        env = "TIDEMILL_OPENAI_BAD_FILES",
        value_enum,
        value_name = "WHAT",
        default_value = "refuse",
        help_heading = "Limits"
    )]
    pub openai_bad_files: BadFiles,

    /// The most calls per second of one access token at this server; up to twice as many may arrive at once. 0: no
    /// limit.
    #[arg(long, env = "TIDEMILL_LIMIT_REQUESTS_PER_SECOND", value_name = "N", default_value = "0", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u32>::new().range(0..=1_000_000))]
    pub limit_requests_per_second: u32,

    /// The most bytes that one access token may upload to this server in a day, such as 100GB. 0: no limit.
    #[arg(long, env = "TIDEMILL_LIMIT_BYTES_PER_DAY", value_name = "SIZE", default_value = "0", help_heading = "Limits",
        value_parser = parse_bytes)]
    pub limit_bytes_per_day: u64,

    /// The most requests without a result in all batches of one access token, over all servers. 0: no limit.
    #[arg(long, env = "TIDEMILL_LIMIT_QUEUED_LINES", value_name = "N", default_value = "0", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u64>::new())]
    pub limit_queued_lines: u64,

    /// The most uploads at a time, of all clients together, 1 to 10000. Further ones wait for up to 30 s; tokens with
    /// fewer uploads running go first. Each may use 12 MB of memory.
    #[arg(long, env = "TIDEMILL_LIMIT_CONCURRENT_UPLOADS", value_name = "N", default_value = "64", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u32>::new().range(1..=10_000))]
    pub limit_concurrent_uploads: u32,

    /// The most Infer calls of one access token at a time at this server; further ones are refused. Without tokens: of
    /// one client address. 0: no limit.
    #[arg(long, env = "TIDEMILL_LIMIT_INFER_CALLS", value_name = "N", default_value = "1000", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u32>::new())]
    pub limit_infer_calls: u32,

    /// The most streams with which one access token watches batches at this server; further ones are refused. Each uses
    /// about 10 KiB of memory. Without tokens: of one client address. 0: no limit.
    #[arg(long, env = "TIDEMILL_LIMIT_WATCHES", value_name = "N", default_value = "10000", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u32>::new())]
    pub limit_watches: u32,

    /// The most downloads and result streams, over gRPC and HTTP, of one access token at a time at this server; further
    /// ones are refused. Without tokens: of one client address. 0: no limit.
    #[arg(long, env = "TIDEMILL_LIMIT_DOWNLOADS", value_name = "N", default_value = "200", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u32>::new())]
    pub limit_downloads: u32,

    /// Time after which other servers take over the work of a server that has stopped answering, 3s to 1d.
    #[arg(long, env = "TIDEMILL_LEASE", value_name = "SPAN", default_value = "30s", help_heading = "Durability",
        value_parser = parse_span)]
    pub lease: Duration,

    /// Longest time until a finished request is durable and counted, 10ms to half of --lease. After a crash, requests
    /// that finished within it run again.
    #[arg(long, env = "TIDEMILL_FLUSH_INTERVAL", value_name = "SPAN", default_value = "2s", help_heading = "Durability",
        value_parser = parse_span)]
    pub flush_interval: Duration,

    /// PEM certificate chain; the server then serves TLS. Needs --tls-key.
    #[arg(long, env = "TIDEMILL_TLS_CERT", value_name = "FILE", help_heading = "Security")]
    pub tls_cert: Option<PathBuf>,

    /// PEM private key of --tls-cert.
    #[arg(long, env = "TIDEMILL_TLS_KEY", value_name = "FILE", help_heading = "Security")]
    pub tls_key: Option<PathBuf>,

    /// PEM certificates of the authorities whose client certificates are admitted; clients without one are refused.
    /// Needs --tls-cert.
    #[arg(long, env = "TIDEMILL_TLS_CLIENT_CA", value_name = "FILE", help_heading = "Security")]
    pub tls_client_ca: Option<PathBuf>,

    /// File of access tokens, one per line, as tidemill token new prints them; callers without a token are refused.
    #[arg(long, env = "TIDEMILL_TOKENS", value_name = "FILE", help_heading = "Security")]
    pub tokens: Option<PathBuf>,

    /// Lets everybody who can reach a non-loopback --listen address do everything.
    #[arg(long, env = "TIDEMILL_INSECURE_ALLOW_ANONYMOUS", help_heading = "Security",
        value_parser = BoolishValueParser::new())]
    pub insecure_allow_anonymous: bool,

    /// Further host name that a server without access tokens and TLS answers to, such as batch.example.com, and whose
    /// web pages may use this server. Addresses, localhost and names without a dot are always accepted; "*" accepts all
    /// names. Repeatable; comma-separated in the environment. Default: none.
    #[arg(long, env = "TIDEMILL_PUBLIC_HOST", value_name = "NAME", value_delimiter = ',', help_heading = "Security",
        value_parser = parse_host)]
    pub public_host: Vec<String>,

    /// Private network that webhooks may go to, such as 10.0.0.0/8. Repeatable; comma-separated in the environment.
    /// Default: none, so that webhooks go to public addresses only.
    #[arg(
        long,
        env = "TIDEMILL_WEBHOOK_ALLOW_CIDR",
        value_name = "CIDR",
        value_delimiter = ',',
        help_heading = "Security"
    )]
    pub webhook_allow_cidr: Vec<IpNet>,

    /// Sends webhooks over https only and refuses other URLs.
    #[arg(long, env = "TIDEMILL_WEBHOOK_HTTPS_ONLY", help_heading = "Security", value_parser = BoolishValueParser::new())]
    pub webhook_https_only: bool,

    /// Signs the webhooks of batches that have no secret of their own. Set it in the environment, because others can
    /// see command lines. Default: such webhooks are not signed.
    #[arg(long, env = "TIDEMILL_WEBHOOK_SECRET", value_name = "SECRET", help_heading = "Security", hide_env_values = true,
        value_parser = SecretParser(parse_webhook_secret), allow_hyphen_values = true)]
    pub webhook_secret: Option<WebhookSecret>,

    /// The most webhooks in flight at this server, 8 to 10000. One access token gets at most half of the places that
    /// are free, receivers that have not answered lately at most a fifth.
    #[arg(long, env = "TIDEMILL_WEBHOOK_MAX_IN_FLIGHT", value_name = "N", default_value = "256", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<usize>::new().range(8..=10_000))]
    pub webhook_max_in_flight: usize,

    /// The waits between the attempts of a webhook, such as 5s,30s,2m: each 1ms to 7days, and up to a fifth longer or
    /// shorter at random. If there are more attempts, the last wait is repeated.
    #[arg(long, env = "TIDEMILL_WEBHOOK_RETRY_SCHEDULE", value_name = "SPANS", value_delimiter = ',',
        default_value = "5s,30s,2m,10m,30m,1h,2h,4h,8h", help_heading = "Durability", value_parser = parse_span)]
    pub webhook_retry_schedule: Vec<Duration>,

    /// Encrypts webhook secrets in the database: 32 bytes in base64, as `openssl rand -base64 32` prints. Set it in the
    /// environment or in a file. Default: secrets are stored unencrypted.
    #[arg(long, env = "TIDEMILL_MASTER_KEY", value_name = "BASE64", help_heading = "Security", hide_env_values = true,
        value_parser = SecretParser(parse_webhook_secret), allow_hyphen_values = true, conflicts_with = "master_key_file")]
    pub master_key: Option<WebhookSecret>,

    /// File with the master key, instead of --master-key.
    #[arg(long, env = "TIDEMILL_MASTER_KEY_FILE", value_name = "FILE", help_heading = "Security")]
    pub master_key_file: Option<PathBuf>,

    /// The previous master key: decrypts the secrets that it encrypted, while the key is being replaced.
    #[arg(long, env = "TIDEMILL_PREVIOUS_MASTER_KEY", value_name = "BASE64", help_heading = "Security",
        hide_env_values = true, value_parser = SecretParser(parse_webhook_secret), allow_hyphen_values = true)]
    pub previous_master_key: Option<WebhookSecret>,

    /// Age at which a client's connection is asked to reconnect, so that load balancers can rebalance, 1s to 365d.
    #[arg(long, env = "TIDEMILL_MAX_CONNECTION_AGE", value_name = "SPAN", default_value = "30m", help_heading = "Connections",
        value_parser = parse_span)]
    pub max_connection_age: Duration,

    /// The most client connections at a time, 1 to 1000000. At the limit a new connection replaces the longest idle
    /// one. Default: half of the files that the process may have open, at most 10000. A value above that half has no
    /// effect.
    #[arg(long, env = "TIDEMILL_MAX_CONNECTIONS", value_name = "N", help_heading = "Connections",
        value_parser = RangedU64ValueParser::<u32>::new().range(1..=1_000_000))]
    pub max_connections: Option<u32>,

    /// Time for calls, requests and webhooks in flight to finish after SIGTERM, 0s to 1d. The process ends at most 5 s
    /// later.
    #[arg(long, env = "TIDEMILL_DRAIN_TIMEOUT", value_name = "SPAN", default_value = "10s", help_heading = "Connections",
        value_parser = parse_span)]
    pub drain_timeout: Duration,

    /// The format of log lines: text, for people, or json, one object per line.
    #[arg(long, env = "TIDEMILL_LOG_FORMAT", value_name = "FORMAT", default_value = "text", help_heading = "Logs")]
    pub log_format: LogFormat,

    /// What to log: a level, or levels by module, such as warn,tidemill=debug.
    #[arg(long, env = "TIDEMILL_LOG", value_name = "FILTER", default_value = "info", help_heading = "Logs")]
    pub log: String,
}

impl ServeConfig {
    /// The settings as a separate command.
    fn command() -> Command {
        Self::augment_args(Command::new("serve").no_binary_name(true))
    }

    /// Reads flags and, if given, a file, but not the environment. Does not validate.
    ///
    /// # Errors
    /// What clap has to say.
    pub fn from_flags<'a>(
        flags: impl IntoIterator<Item = &'a str>,
        file: Option<&ConfigFile>,
    ) -> Result<Self, clap::Error> {
        let command = Self::command().mut_args(|arg| arg.env(None::<&'static str>));
        let command = match file {
            Some(file) => file.as_defaults(command),
            None => command,
        };
        Self::from_arg_matches(&command.try_get_matches_from(flags)?)
    }

    /// Whether this node does it.
    #[must_use]
    pub fn has_role(&self, role: NodeRole) -> bool {
        self.roles.contains(&role)
    }

    /// The node's roles, each once, as its row in the database names them.
    #[must_use]
    pub fn role_names(&self) -> String {
        let mut roles = self.roles.clone();
        roles.sort_unstable();
        roles.dedup();
        roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(",")
    }

    /// The database of a server.
    #[must_use]
    pub fn database(&self) -> Database {
        Database::of(self.database_url.as_ref(), &self.data_dir)
    }

    /// Where objects are kept.
    #[must_use]
    pub fn blob_store(&self) -> BlobStore {
        match &self.blobs {
            Some(url) => BlobStore::Url(url.clone()),
            None => BlobStore::Directory(self.data_dir.join("blobs")),
        }
    }
}

impl Database {
    /// The one of these settings.
    #[must_use]
    pub fn of(url: Option<&SecretSetting>, data_dir: &std::path::Path) -> Self {
        match url {
            Some(url) => Self::Postgres(url.clone()),
            None => Self::Sqlite(data_dir.join("tidemill.db")),
        }
    }
}

impl Default for ServeConfig {
    fn default() -> Self {
        Self::from_flags([], None).expect("the defaults are valid: a test reads them all")
    }
}

fn parse_blobs(text: &str) -> Result<String, String> {
    const EXPECTED: &str = "expected s3://…, gs://…, az://… or file:///path";
    let url = Url::parse(text).map_err(|error| format!("{}; {EXPECTED}", words::url(error)))?;
    match ObjectStoreScheme::parse(&url) {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err(format!("{}:// is not a supported object store; {EXPECTED}", url.scheme())),
    }
}

/// An address to listen on.
///
/// # Errors
/// It is none, in words for people.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let expected = "expected an address and a port from 0 to 65535, such as 127.0.0.1:4080, 0.0.0.0:4080 or [::1]:4080";
    text.parse().map_err(|_| match text.strip_prefix("localhost:") {
        Some(port) => format!("{expected}; host names are not supported: write 127.0.0.1:{port}"),
        None => expected.to_owned(),
    })
}

fn parse_host(text: &str) -> Result<String, String> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    if text == "*" || (!text.is_empty() && text.bytes().all(good)) {
        return Ok(text.to_ascii_lowercase());
    }
    Err("expected a host name such as batch.example.com, without scheme, port and path".to_owned())
}

/// A time span such as 1h30m, of at most 100 years: what is longer would only overflow somewhere.
///
/// # Errors
/// It is none, in words for people.
pub fn parse_span(text: &str) -> Result<Duration, String> {
    use humantime::DurationError as E;
    const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    const EXPECTED: &str = "expected a time span such as 500ms, 30s, 5m or 1h30m";
    let unit = |unit: &str| match unit {
        "" => format!("a number needs its unit: {text}s, {text}m or {text}h"),
        other => format!("{other:?} is not a unit of time; {EXPECTED}"),
    };
    match humantime::parse_duration(text) {
        Ok(span) if span <= LONGEST => Ok(span),
        Ok(_) | Err(E::NumberOverflow) => Err("expected a time span of at most 36500d".to_owned()),
        Err(E::UnknownUnit { unit: name, .. }) => Err(unit(&name)),
        Err(_) => Err(EXPECTED.to_owned()),
    }
}

/// A number of bytes such as 10GB.
///
/// # Errors
/// It is none, in words for people.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let size: bytesize::ByteSize =
        text.parse().map_err(|_| "expected a number of bytes, such as 500000, 10GB or 4GiB".to_owned())?;
    Ok(size.as_u64())
}

/// Reads a worker's URL.
///
/// # Errors
/// What is wrong with it.
pub fn parse_worker(text: &str) -> Result<Url, String> {
    const EXPECTED: &str = "expected a worker's base URL, such as http://10.0.0.5:8000";
    let url = Url::parse(text.trim()).map_err(|error| format!("{}; {EXPECTED}", words::url(error)))?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        // Most often host:port, which reads as a scheme.
        return Err(format!("it does not begin with http:// or https://; {EXPECTED}"));
    }
    Ok(url)
}
