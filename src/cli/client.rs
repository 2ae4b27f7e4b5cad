//! The connection to a server, shared by every command that is a client.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, ClientTlsConfig, Endpoint, Identity},
};

use super::{
    error,
    greeting::{FIRST_ANSWER, Greeted},
    meter,
};
use crate::{
    api::LONGEST_MESSAGE,
    config::{SecretParser, SecretSetting, parse_key},
    pb::{
        batch_service_client::BatchServiceClient, webhook_admin_client::WebhookAdminClient,
        worker_admin_client::WorkerAdminClient,
    },
    words::{self, Peer},
};

/// Room for a status with 100 bad lines in its trailers; the transport's own default is 16 KiB.
const MAX_HEADERS: u32 = 1024 * 1024;
/// Room for a fast download; the transport's own default is 64 KiB.
const WINDOW: u32 = 2 * 1024 * 1024;
/// Attempts in all before a server that can't be reached is an error.
const TRIES: u32 = 4;
/// Time until a command says that it is still waiting for an answer, and between repetitions of that.
const SAY_AFTER: Duration = Duration::from_secs(5);
const SAY_EVERY: Duration = Duration::from_secs(30);

/// The server to call, and the caller's credentials.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Client options")]
pub struct ClientArgs {
    /// URL of the server.
    #[arg(long, global = true, env = "TIDEMILL_SERVER", value_name = "URL", default_value = "http://127.0.0.1:4080")]
    pub server: String,
    /// Access token. Set it in the environment or in a file, because others can see command lines.
    #[arg(long, global = true, env = "TIDEMILL_TOKEN", value_name = "TOKEN", hide_env_values = true,
        allow_hyphen_values = true, value_parser = SecretParser(parse_key))]
    pub token: Option<SecretSetting>,
    /// File with the access token. Takes precedence over --token.
    #[arg(long, global = true, env = "TIDEMILL_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// PEM certificates of the authorities that sign the server's certificate. Default: the system's.
    #[arg(long, global = true, env = "TIDEMILL_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// PEM certificate chain of this client, for a server with --tls-client-ca. Needs --tls-client-key.
    #[arg(long, global = true, env = "TIDEMILL_TLS_CLIENT_CERT", value_name = "FILE", requires = "tls_client_key")]
    pub tls_client_cert: Option<PathBuf>,
    /// PEM private key of --tls-client-cert.
    #[arg(long, global = true, env = "TIDEMILL_TLS_CLIENT_KEY", value_name = "FILE", requires = "tls_client_cert")]
    pub tls_client_key: Option<PathBuf>,
    /// Print JSON: one object per line for lists and events.
    #[arg(long, global = true)]
    pub json: bool,
}

/// The channel of all calls.
pub type Connection = InterceptedService<Greeted, Bearer>;

/// A connection that is made at the first call, and again when it is lost.
#[derive(Clone)]
pub struct Client {
    channel: Connection,
    /// Whether to print JSON.
    pub json: bool,
}

/// Adds the access token to every call.
#[derive(Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request.metadata_mut().insert("authorization", value.clone());
        }
        Ok(request)
    }
}

impl ClientArgs {
    /// Options for a server in this process, such as the demo's.
    #[must_use]
    pub fn of(server: String) -> Self {
        Self {
            server,
            token: None,
            token_file: None,
            tls_ca: None,
            tls_client_cert: None,
            tls_client_key: None,
            json: false,
        }
    }

    /// Prepares the connection without sending anything.
    ///
    /// # Errors
    /// The URL, the token or a file is unusable.
    pub fn client(&self) -> anyhow::Result<Client> {
        let wrong = || format!("--server {}: expected http://HOST:PORT or https://HOST:PORT", self.shown());
        let endpoint = Endpoint::from_shared(self.server.clone());
        // The library's own reason, such as "invalid format", says less.
        let mut endpoint = endpoint
            .map_err(|_| anyhow::anyhow!(wrong()))?
            .user_agent(concat!("tidemill-cli/", env!("CARGO_PKG_VERSION")))?
            // The greeting ends first, and says more.
            .connect_timeout(FIRST_ANSWER + Duration::from_secs(1))
            .http2_max_header_list_size(MAX_HEADERS)
            .initial_stream_window_size(WINDOW)
            .initial_connection_window_size(4 * WINDOW)
            // Detects a dead server behind a stream that may be silent for a while.
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(20));
        let scheme = endpoint.uri().scheme_str().map(str::to_owned);
        match scheme.as_deref() {
            Some("https") => {
                endpoint = endpoint.tls_config(self.tls()?).map_err(|error| {
                    anyhow::anyhow!(
                        "--tls-ca, --tls-client-cert or --tls-client-key: {}",
                        words::cause(Peer::Server, &error)
                    )
                })?;
            }
            Some("http") => self.warn_of_open_token(&endpoint),
            _ => bail!(wrong()),
        }
        let greeted = Greeted::new(endpoint.connect_lazy(), &self.shown());
        let channel = InterceptedService::new(greeted, Bearer(self.bearer()?));
        Ok(Client { channel, json: self.json })
    }

    /// The server's URL for messages: without user and password.
    fn shown(&self) -> String {
        match self.server.rsplit_once('@') {
            Some((_, host)) => format!("…@{host}"),
            None => self.server.clone(),
        }
    }

    fn tls(&self) -> anyhow::Result<ClientTlsConfig> {
        let read = |flag: &str, file: &PathBuf| fs::read(file).with_context(|| format!("{flag} {}", file.display()));
        let config = match &self.tls_ca {
            Some(file) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("--tls-ca", file)?)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        Ok(match (&self.tls_client_cert, &self.tls_client_key) {
            (Some(cert), Some(key)) => {
                config.identity(Identity::from_pem(read("--tls-client-cert", cert)?, read("--tls-client-key", key)?))
            }
            _ => config,
        })
    }

    fn bearer(&self) -> anyhow::Result<Option<MetadataValue<Ascii>>> {
        let token = match (&self.token_file, &self.token) {
            (Some(file), _) => fs::read_to_string(file).with_context(|| format!("--token-file {}", file.display()))?,
            (None, Some(token)) => token.expose().to_owned(),
            (None, None) => return Ok(None),
        };
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", token.trim())
            .parse()
            // The library's reason says nothing more.
            .map_err(|_| anyhow::anyhow!("the access token contains characters that tokens can't have"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    fn warn_of_open_token(&self, endpoint: &Endpoint) {
        let host = endpoint.uri().host().unwrap_or_default().trim_matches(['[', ']']);
        let local = host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
        if !local && (self.token.is_some() || self.token_file.is_some()) {
            tracing::warn!("the access token goes to {host} unencrypted: use https://");
        }
    }
}

impl Client {
    /// Files and batches.
    #[must_use]
    pub fn batches(&self) -> BatchServiceClient<Connection> {
        BatchServiceClient::new(self.channel.clone()).max_decoding_message_size(LONGEST_MESSAGE)
    }

    /// Webhooks.
    #[must_use]
    pub fn webhooks(&self) -> WebhookAdminClient<Connection> {
        WebhookAdminClient::new(self.channel.clone()).max_decoding_message_size(LONGEST_MESSAGE)
    }

    /// Workers.
    #[must_use]
    pub fn workers(&self) -> WorkerAdminClient<Connection> {
        WorkerAdminClient::new(self.channel.clone()).max_decoding_message_size(LONGEST_MESSAGE)
    }
}

/// Makes a call, repeats it a few times while the server can't be reached, and says so when the answer takes long. Only
/// for calls that may be made twice.
///
/// # Errors
/// The last attempt's status.
pub async fn retry<T, F>(call: impl FnMut() -> F) -> Result<T, Status>
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    retry_and_say(call, |waited| meter::note(&format!("still waiting for the server's answer, {} s", waited.as_secs())))
        .await
}

/// Like [`retry`], with another message about a long wait.
///
/// # Errors
/// The last attempt's status.
pub async fn retry_and_say<T, F>(mut call: impl FnMut() -> F, mut say: impl FnMut(Duration)) -> Result<T, Status>
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    let mut attempt = 1;
    loop {
        match patiently(call(), &mut say).await {
            Ok(response) => return Ok(response.into_inner()),
            Err(status) if attempt < TRIES && error::is_transient(&status) => {
                tokio::time::sleep(error::delay(&status, attempt, rand::random())).await;
                attempt += 1;
            }
            Err(status) => return Err(status),
        }
    }
}

/// Waits for a call, and calls `say` with the seconds waited if that takes long.
pub async fn patiently<T>(call: impl Future<Output = T>, mut say: impl FnMut(Duration)) -> T {
    let (began, mut next) = (tokio::time::Instant::now(), SAY_AFTER);
    let mut call = std::pin::pin!(call);
    loop {
        tokio::select! {
            biased;
            answer = &mut call => return answer,
            () = tokio::time::sleep_until(began + next) => {
                say(began.elapsed());
                next += SAY_EVERY;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_call_is_repeated_only_while_that_may_help() {
        let calls = Cell::new(0);
        let result = retry(|| async {
            calls.set(calls.get() + 1);
            if calls.get() < 3 { Err(Status::unavailable("soon")) } else { Ok(tonic::Response::new(calls.get())) }
        });
        assert_eq!(result.await.unwrap(), 3);
        for (status, expected) in [(Status::unavailable("never"), TRIES), (Status::not_found("no"), 1)] {
            let calls = Cell::new(0);
            let result = retry::<(), _>(|| async {
                calls.set(calls.get() + 1);
                Err(status.clone())
            });
            assert_eq!(result.await.unwrap_err().code(), status.code());
            assert_eq!(calls.get(), expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_wait_is_said() {
        let mut said = Vec::new();
        let answer = async {
            tokio::time::sleep(Duration::from_secs(70)).await;
            7
        };
        assert_eq!(patiently(answer, |waited| said.push(waited.as_secs())).await, 7);
        assert_eq!(said, [5, 35, 65]);
        patiently(tokio::time::sleep(Duration::from_secs(4)), |_| panic!("that was quick")).await;
    }

    #[tokio::test]
    async fn bad_options_are_refused_before_anything_is_sent() {
        let client = |server: &str, token: Option<&str>| {
            let args = ClientArgs { token: token.map(SecretSetting::new), ..ClientArgs::of(server.to_owned()) };
            args.client().map(|_| ()).map_err(|error| format!("{error:#}"))
        };
        assert_eq!(client("http://127.0.0.1:1", Some("abc\n")), Ok(()));
        assert!(client("127.0.0.1:1", None).unwrap_err().contains("expected http://HOST:PORT"));
        assert!(client("ftp://h", None).unwrap_err().contains("expected http://HOST:PORT"));
        assert!(client("http://h:1", Some("a\nb")).unwrap_err().contains("access token"));
        for odd in ["", "http://", "ht tp://h", "http://u:s3cret@h h", "s3cret@h"] {
            let text = client(odd, None).unwrap_err();
            assert!(
                text.ends_with(": expected http://HOST:PORT or https://HOST:PORT") && !text.contains("s3cret"),
                "{text}"
            );
        }
    }
}
