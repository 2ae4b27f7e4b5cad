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
pub use secret::{Secret, SecretParser, parse_database_url, parse_key, parse_webhook_secret};

use crate::{
    domain::{WorkerPriority, webhook::Secret as WebhookSecret},
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
        /// Why.
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
        /// What it may have been meant to be.
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

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// What a node does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Role {
    /// Answers clients.
    Api,
    /// Runs batches: claims segments, closes windows, deletes garbage.
    Scheduler,
    /// Delivers webhooks.
    Delivery,
}

impl Role {
    /// Its name, as in the setting.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Scheduler => "scheduler",
            Self::Delivery => "delivery",
        }
    }
}

/// What workers are asked for to see whether they are well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthPath(Option<String>);

impl HealthPath {
    /// The path; none: only their list of models.
    #[must_use]
    pub fn path(&self) -> Option<&str> {
        self.0.as_deref()
    }
}

impl std::str::FromStr for HealthPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'?' | b'#' | b'\\');
        match text {
            "none" => Ok(Self(None)),
            path if path.starts_with('/') && path.len() <= 1_024 && path.bytes().all(plain) => {
                Ok(Self(Some(path.into())))
            }
            _ => Err("expected a path that begins with \"/\", such as /health/liveliness, or none".into()),
        }
    }
}

/// Which database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Database {
    /// A SQLite file: one node.
    Sqlite(PathBuf),
    /// A PostgreSQL URL: any number of nodes.
    Postgres(Secret),
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

/// Everything that can be set on a server.
#[derive(Clone, Debug, Args)]
pub struct ServeConfig {
    /// TOML file of settings: the flags' names with "_" for "-". The environment and flags win over it.
    #[arg(long, env = "TIDEMILL_CONFIG", value_name = "FILE", help_heading = "General")]
    pub config: Option<PathBuf>,

    /// Address for gRPC and HTTP, which share one port. Port 0: any free one. Anything but loopback needs --tokens,
    /// --tls-client-ca or --insecure-allow-anonymous.
    #[arg(
        long,
        env = "TIDEMILL_LISTEN",
        value_name = "ADDR",
        default_value = "127.0.0.1:4080",
        help_heading = "General",
        value_parser = parse_address
    )]
    pub listen: SocketAddr,

    /// What this node does, comma-separated: api (answers clients), scheduler (runs batches), delivery (sends webhooks).
    /// Together the nodes of a PostgreSQL database must do all of it. Health and metrics are served by every node.
    #[arg(
        long,
        env = "TIDEMILL_ROLES",
        value_name = "ROLES",
        value_delimiter = ',',
        help_heading = "General",
        default_value = "api,scheduler,delivery"
    )]
    pub roles: Vec<Role>,

    /// Base URL of a worker: a vLLM server or any server with OpenAI's HTTP API. Repeatable; comma-separated in the
    /// environment. More can be added while the server runs: tidemill workers register.
    #[arg(long, env = "TIDEMILL_WORKER", value_name = "URL", value_delimiter = ',', help_heading = "Workers",
        value_parser = parse_worker)]
    pub worker: Vec<Url>,

    /// Most requests that this node has in flight at one worker, fixed, 1 to 65536. Default: found for each worker by
    /// watching it, so that it is full and few requests wait in it.
    #[arg(long, env = "TIDEMILL_WORKER_MAX_IN_FLIGHT", value_name = "N", help_heading = "Workers",
        value_parser = RangedU64ValueParser::<u32>::new().range(1..=65_536))]
    pub worker_max_in_flight: Option<u32>,

    /// The highest limit that is found by watching, 1 to 65536; --worker-max-in-flight sets it aside.
    #[arg(long, env = "TIDEMILL_WORKER_MAX_IN_FLIGHT_CAP", value_name = "N", default_value = "1024",
        help_heading = "Workers", value_parser = RangedU64ValueParser::<u32>::new().range(1..=65_536))]
    pub worker_max_in_flight_cap: u32,

    /// How batch requests tell a vLLM with --scheduling-policy priority that others go first: lower goes first, and what
    /// carries none, such as Infer calls, has 0. "auto": the header x-vllm-priority: 10, which every other worker ignores.
    /// A number: as "priority" in the body, for vLLM before 0.32 and for embeddings and the like. "off": not at all. A
    /// request with a priority of its own keeps it.
    #[arg(
        long,
        env = "TIDEMILL_WORKER_PRIORITY",
        value_name = "auto|off|N",
        default_value = "auto",
        allow_hyphen_values = true,
        help_heading = "Workers"
    )]
    pub worker_priority: WorkerPriority,

    /// Sent to every worker as a bearer token: what vllm serve --api-key was given. Better set by its variable or in the
    /// file: a flag is seen by everybody on the machine.
    #[arg(long, env = "TIDEMILL_WORKER_API_KEY", value_name = "KEY", hide_env_values = true, help_heading = "Workers",
        value_parser = SecretParser(parse_key), allow_hyphen_values = true)]
    pub worker_api_key: Option<Secret>,

    /// What each worker is asked for to see whether it is well: a path below its base URL, or "none": then its list of
    /// models has to do. A check that is answered too slowly, or that runs requests on models as a LiteLLM gateway's does,
    /// is done without by itself.
    #[arg(
        long,
        env = "TIDEMILL_WORKER_HEALTH_PATH",
        value_name = "PATH|none",
        default_value = "/health",
        help_heading = "Workers"
    )]
    pub worker_health_path: HealthPath,

    /// Time between two health checks of a worker, 100 ms to 1 h.
    #[arg(long, env = "TIDEMILL_WORKER_HEALTH_INTERVAL", value_name = "SPAN", default_value = "1s",
        help_heading = "Workers", value_parser = parse_span)]
    pub worker_health_interval: Duration,

    /// How long one request to a worker may take, 1s to 7d.
    #[arg(long, env = "TIDEMILL_REQUEST_TIMEOUT", value_name = "SPAN", default_value = "600s", help_heading = "Workers",
        value_parser = parse_span)]
    pub request_timeout: Duration,

    /// Most bytes that answers of workers hold at this server, from their first byte until their result is durable, such
    /// as 512MiB; 16 MiB or more. At the limit nothing more is sent or read for a while. One answer, 128 MiB at most, may
    /// come on top.
    #[arg(long, env = "TIDEMILL_WORKER_ANSWER_MEMORY", value_name = "SIZE", default_value = "512MiB",
        help_heading = "Workers", value_parser = parse_bytes)]
    pub worker_answer_memory: u64,

    /// How often a request is tried in all before it ends in the error file, 1 to 100.
    #[arg(long, env = "TIDEMILL_MAX_TRIES", value_name = "N", default_value = "5", help_heading = "Workers",
        value_parser = RangedU64ValueParser::<u32>::new().range(1..=100))]
    pub max_tries: u32,

    /// Directory of the SQLite database and of the objects. One server at a time may use it.
    #[arg(long, env = "TIDEMILL_DATA_DIR", value_name = "DIR", default_value = DATA_DIR, help_heading = "Storage")]
    pub data_dir: PathBuf,

    /// PostgreSQL: postgres://user:password@host/database. Any number of servers may share it if they share --blobs
    /// too. Default: SQLite in --data-dir.
    #[arg(long, env = "TIDEMILL_DATABASE_URL", value_name = "URL", hide_env_values = true, help_heading = "Storage",
        value_parser = SecretParser(parse_database_url), allow_hyphen_values = true)]
    pub database_url: Option<Secret>,

    /// Connections to PostgreSQL, 2 to 1000.
    #[arg(long, env = "TIDEMILL_DATABASE_CONNECTIONS", value_name = "N", default_value = "10", help_heading = "Storage",
        value_parser = RangedU64ValueParser::<u32>::new().range(2..=1_000))]
    pub database_connections: u32,

    /// Where objects are kept: s3://bucket/prefix, gs://…, az://… (credentials as the cloud's own tools take them), or
    /// file:///path. Default: a directory in --data-dir, which with PostgreSQL must be named.
    #[arg(long, env = "TIDEMILL_BLOBS", value_name = "URL", help_heading = "Storage", value_parser = parse_blobs)]
    pub blobs: Option<String>,

    /// Most requests in one file.
    #[arg(long, env = "TIDEMILL_MAX_FILE_LINES", value_name = "N", default_value = "1000000", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u64>::new().range(1..=1_000_000_000))]
    pub max_file_lines: u64,

    /// Most bytes in one file, such as 10GB or 4GiB.
    #[arg(long, env = "TIDEMILL_MAX_FILE_BYTES", value_name = "SIZE", default_value = "10GB", help_heading = "Limits",
        value_parser = parse_bytes)]
    pub max_file_bytes: u64,

    /// Most calls a second of one access token at this server; twice as many may come at once. 0: no limit.
    #[arg(long, env = "TIDEMILL_LIMIT_REQUESTS_PER_SECOND", value_name = "N", default_value = "0", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u32>::new().range(0..=1_000_000))]
    pub limit_requests_per_second: u32,

    /// Most bytes that one access token may upload to this server in a day, such as 100GB. 0: no limit.
    #[arg(long, env = "TIDEMILL_LIMIT_BYTES_PER_DAY", value_name = "SIZE", default_value = "0", help_heading = "Limits",
        value_parser = parse_bytes)]
    pub limit_bytes_per_day: u64,

    /// Most requests without a result in all batches of one access token, over all servers. 0: no limit.
    #[arg(long, env = "TIDEMILL_LIMIT_QUEUED_LINES", value_name = "N", default_value = "0", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u64>::new())]
    pub limit_queued_lines: u64,

    /// Most uploads at a time, of all clients together, 1 to 10000; the next ones wait for up to 30 s, those of tokens with
    /// few uploads under way first. Each may hold 12 MB.
    #[arg(long, env = "TIDEMILL_LIMIT_CONCURRENT_UPLOADS", value_name = "N", default_value = "64", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u32>::new().range(1..=10_000))]
    pub limit_concurrent_uploads: u32,

    /// Most Infer calls that one access token has under way at this server; the next ones are refused. Without tokens: of
    /// one client address. 0: no limit.
    #[arg(long, env = "TIDEMILL_LIMIT_INFER_CALLS", value_name = "N", default_value = "1000", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u32>::new())]
    pub limit_infer_calls: u32,

    /// Most streams that one access token watches batches with at this server; the next ones are refused. Each costs some
    /// 10 KiB. Without tokens: of one client address. 0: no limit.
    #[arg(long, env = "TIDEMILL_LIMIT_WATCHES", value_name = "N", default_value = "10000", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u32>::new())]
    pub limit_watches: u32,

    /// Most downloads and result streams, over gRPC and HTTP, that one access token has under way at this server; the next
    /// ones are refused. Without tokens: of one client address. 0: no limit.
    #[arg(long, env = "TIDEMILL_LIMIT_DOWNLOADS", value_name = "N", default_value = "200", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<u32>::new())]
    pub limit_downloads: u32,

    /// How long a server that has stopped answering keeps its work before another takes it over, 3s to 1d.
    #[arg(long, env = "TIDEMILL_LEASE", value_name = "SPAN", default_value = "30s", help_heading = "Durability",
        value_parser = parse_span)]
    pub lease: Duration,

    /// Longest time until a finished request is durable and counted: what a crash costs at most. 10ms to half of --lease.
    #[arg(long, env = "TIDEMILL_FLUSH_INTERVAL", value_name = "SPAN", default_value = "2s", help_heading = "Durability",
        value_parser = parse_span)]
    pub flush_interval: Duration,

    /// PEM certificate chain: serves TLS. With --tls-key.
    #[arg(long, env = "TIDEMILL_TLS_CERT", value_name = "FILE", help_heading = "Security")]
    pub tls_cert: Option<PathBuf>,

    /// PEM private key of --tls-cert.
    #[arg(long, env = "TIDEMILL_TLS_KEY", value_name = "FILE", help_heading = "Security")]
    pub tls_key: Option<PathBuf>,

    /// PEM certificates of the authorities whose client certificates are let in; nobody else is. With --tls-cert.
    #[arg(long, env = "TIDEMILL_TLS_CLIENT_CA", value_name = "FILE", help_heading = "Security")]
    pub tls_client_ca: Option<PathBuf>,

    /// File of access tokens, one line each, as tidemill token new prints them: nobody without one is let in.
    #[arg(long, env = "TIDEMILL_TOKENS", value_name = "FILE", help_heading = "Security")]
    pub tokens: Option<PathBuf>,

    /// Lets anybody who reaches a non-loopback --listen address do everything.
    #[arg(long, env = "TIDEMILL_INSECURE_ALLOW_ANONYMOUS", help_heading = "Security",
        value_parser = BoolishValueParser::new())]
    pub insecure_allow_anonymous: bool,

    /// Host name by which clients may call a server without access tokens and TLS, such as batch.example.com, and whose web
    /// pages may use this server. Addresses, localhost and names without a dot are always taken; "*" takes all. Repeatable;
    /// comma-separated in the environment. Default: none.
    #[arg(long, env = "TIDEMILL_PUBLIC_HOST", value_name = "NAME", value_delimiter = ',', help_heading = "Security",
        value_parser = parse_host)]
    pub public_host: Vec<String>,

    /// Network whose addresses webhooks may go to although they are private, such as 10.0.0.0/8. Repeatable;
    /// comma-separated in the environment. Default: none.
    #[arg(
        long,
        env = "TIDEMILL_WEBHOOK_ALLOW_CIDR",
        value_name = "CIDR",
        value_delimiter = ',',
        help_heading = "Security"
    )]
    pub webhook_allow_cidr: Vec<IpNet>,

    /// Sends webhooks over https only, and refuses other URLs.
    #[arg(long, env = "TIDEMILL_WEBHOOK_HTTPS_ONLY", help_heading = "Security", value_parser = BoolishValueParser::new())]
    pub webhook_https_only: bool,

    /// Signs the webhooks of batches that have no secret of their own. Better in the environment: others can see command
    /// lines. Default: those go unsigned.
    #[arg(long, env = "TIDEMILL_WEBHOOK_SECRET", value_name = "SECRET", help_heading = "Security", hide_env_values = true,
        value_parser = SecretParser(parse_webhook_secret), allow_hyphen_values = true)]
    pub webhook_secret: Option<WebhookSecret>,

    /// Webhooks in flight at this server at a time, 8 to 10000. One access token gets at most half of those that are free,
    /// and receivers that have not answered lately at most a fifth.
    #[arg(long, env = "TIDEMILL_WEBHOOK_MAX_IN_FLIGHT", value_name = "N", default_value = "256", help_heading = "Limits",
        value_parser = RangedU64ValueParser::<usize>::new().range(8..=10_000))]
    pub webhook_max_in_flight: usize,

    /// The waits between the attempts of a webhook, such as 5s,30s,2m: each 1ms to 7days, a fifth more or less by chance. With
    /// more attempts than that the last wait is repeated.
    #[arg(long, env = "TIDEMILL_WEBHOOK_RETRY_SCHEDULE", value_name = "SPANS", value_delimiter = ',',
        default_value = "5s,30s,2m,10m,30m,1h,2h,4h,8h", help_heading = "Durability", value_parser = parse_span)]
    pub webhook_retry_schedule: Vec<Duration>,

    /// Seals webhook secrets in the database: 32 bytes in base64, as `openssl rand -base64 32` prints. Better in the
    /// environment or a file. Default: they are stored as they are.
    #[arg(long, env = "TIDEMILL_MASTER_KEY", value_name = "BASE64", help_heading = "Security", hide_env_values = true,
        value_parser = SecretParser(parse_webhook_secret), allow_hyphen_values = true, conflicts_with = "master_key_file")]
    pub master_key: Option<WebhookSecret>,

    /// File that holds the master key.
    #[arg(long, env = "TIDEMILL_MASTER_KEY_FILE", value_name = "FILE", help_heading = "Security")]
    pub master_key_file: Option<PathBuf>,

    /// The master key before this one: opens what it sealed, while the key is being replaced.
    #[arg(long, env = "TIDEMILL_PREVIOUS_MASTER_KEY", value_name = "BASE64", help_heading = "Security",
        hide_env_values = true, value_parser = SecretParser(parse_webhook_secret), allow_hyphen_values = true)]
    pub previous_master_key: Option<WebhookSecret>,

    /// How long a client's connection may last before it is asked to reconnect, so that load balancers can rebalance. 1s to
    /// 365d.
    #[arg(long, env = "TIDEMILL_MAX_CONNECTION_AGE", value_name = "SPAN", default_value = "30m", help_heading = "Connections",
        value_parser = parse_span)]
    pub max_connection_age: Duration,

    /// Most client connections at a time, 1 to 1000000; beyond it the longest idle one is closed for a new one. Default:
    /// half of the files that the process may have open, at most 10000; never more than that half.
    #[arg(long, env = "TIDEMILL_MAX_CONNECTIONS", value_name = "N", help_heading = "Connections",
        value_parser = RangedU64ValueParser::<u32>::new().range(1..=1_000_000))]
    pub max_connections: Option<u32>,

    /// How long calls, requests and webhooks in flight may take to finish after SIGTERM, 0s to 1d. At most 5 s later the
    /// process ends.
    #[arg(long, env = "TIDEMILL_DRAIN_TIMEOUT", value_name = "SPAN", default_value = "10s", help_heading = "Connections",
        value_parser = parse_span)]
    pub drain_timeout: Duration,

    /// How log lines look.
    #[arg(long, env = "TIDEMILL_LOG_FORMAT", value_name = "FORMAT", default_value = "text", help_heading = "Logs")]
    pub log_format: LogFormat,

    /// What is logged: a level, or levels by module, such as warn,tidemill=debug.
    #[arg(long, env = "TIDEMILL_LOG", value_name = "FILTER", default_value = "info", help_heading = "Logs")]
    pub log: String,
}

impl ServeConfig {
    /// The settings as a command of their own.
    fn command() -> Command {
        Self::augment_args(Command::new("serve").no_binary_name(true))
    }

    /// From flags and, if given, a file; the environment is left aside. Not validated.
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
    pub fn has_role(&self, role: Role) -> bool {
        self.roles.contains(&role)
    }

    /// Its roles, each once, as other nodes are told of them.
    #[must_use]
    pub fn role_names(&self) -> String {
        let mut roles = self.roles.clone();
        roles.sort_unstable();
        roles.dedup();
        roles.iter().map(|role| role.as_str()).collect::<Vec<_>>().join(",")
    }

    /// Which database.
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
    pub fn of(url: Option<&Secret>, data_dir: &std::path::Path) -> Self {
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
        Err(_) => Err(format!("no object store is meant by {}://; {EXPECTED}", url.scheme())),
    }
}

/// An address to listen on.
///
/// # Errors
/// It is none, in words for people.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let expected = "expected an address and a port from 0 to 65535, such as 127.0.0.1:4080, 0.0.0.0:4080 or [::1]:4080";
    text.parse().map_err(|_| match text.strip_prefix("localhost:") {
        Some(port) => format!("{expected}; a name is not taken: write 127.0.0.1:{port}"),
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
        other => format!("{other:?} is no unit of time; {EXPECTED}"),
    };
    match humantime::parse_duration(text) {
        Ok(span) if span <= LONGEST => Ok(span),
        Ok(_) | Err(E::NumberOverflow) => Err("expected a time span of at most 36500d".to_owned()),
        Err(E::UnknownUnit { unit: name, .. }) => Err(unit(&name)),
        Err(_) => Err(EXPECTED.to_owned()),
    }
}

fn parse_bytes(text: &str) -> Result<u64, String> {
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
