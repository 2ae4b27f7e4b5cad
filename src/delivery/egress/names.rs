//! Looks up names' addresses by the system's settings without blocking a thread. The C library's resolver has no
//! timeout and blocks one of a few hundred threads for as long as a name server is silent.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use hickory_resolver::{
    Resolver, TokioResolver,
    config::{ConnectionConfig, LookupIpStrategy, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::{NetError, runtime::TokioRuntimeProvider},
    system_conf::read_system_conf,
};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};
use tracing::warn;

/// Time limit of a lookup, whatever the system's settings say.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Time between two checks whether the system's settings have changed.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// The files with the system's settings.
const FILES: [&str; 2] = ["/etc/resolv.conf", "/etc/hosts"];

/// A name service. Cheap to clone.
#[derive(Clone)]
pub struct Names {
    inner: Arc<Inner>,
}

struct Inner {
    /// The name servers to use. `None`: the system's.
    servers: Option<Vec<SocketAddr>>,
    timeout: Duration,
    current: Mutex<Option<Current>>,
}

struct Current {
    resolver: TokioResolver,
    looked_at: Instant,
    /// When each of the files was last changed.
    files: [Option<SystemTime>; 2],
}

impl Names {
    /// The system's: `/etc/hosts`, then the name servers of `/etc/resolv.conf`. If that lists none, the one on this
    /// machine is used, as the C library does. Both files are read again when they change.
    #[must_use]
    pub fn system() -> Self {
        Self::new(None, TIMEOUT)
    }

    /// Only these name servers, with this time limit of a lookup.
    #[must_use]
    pub fn of(servers: Vec<SocketAddr>, timeout: Duration) -> Self {
        Self::new(Some(servers), timeout)
    }

    fn new(servers: Option<Vec<SocketAddr>>, timeout: Duration) -> Self {
        Self { inner: Arc::new(Inner { servers, timeout, current: Mutex::new(None) }) }
    }

    /// All IPv4 and IPv6 addresses of a name.
    ///
    /// # Errors
    /// There are none, or nobody says so in time.
    pub async fn lookup(&self, name: &str) -> io::Result<Vec<IpAddr>> {
        let resolver = self.resolver()?;
        let limit = self.inner.timeout;
        match timeout(limit, resolver.lookup_ip(name)).await {
            Ok(Ok(found)) => Ok(found.iter().collect()),
            Ok(Err(error)) => Err(io::Error::other(in_words(&error))),
            Err(_) => {
                let message = format!("the name server did not answer within {} s", limit.as_secs_f64());
                Err(io::Error::new(io::ErrorKind::TimedOut, message))
            }
        }
    }

    fn resolver(&self) -> io::Result<TokioResolver> {
        let mut current = self.inner.current.lock();
        let now = Instant::now();
        if let Some(known) = &mut *current {
            if self.inner.servers.is_some() || now < known.looked_at + LOOK_EVERY {
                return Ok(known.resolver.clone());
            }
            known.looked_at = now;
            if known.files == changed_at() {
                return Ok(known.resolver.clone());
            }
        }
        let files = changed_at();
        let resolver =
            self.build().map_err(|error| io::Error::other(format!("the DNS resolver can't be configured: {error}")))?;
        *current = Some(Current { resolver: resolver.clone(), looked_at: now, files });
        Ok(resolver)
    }

    fn build(&self) -> Result<TokioResolver, NetError> {
        let (config, options) = match &self.inner.servers {
            Some(servers) => {
                let servers = servers.iter().map(|server| at(*server)).collect();
                (ResolverConfig::from_name_servers(servers), ResolverOpts::default())
            }
            None => read_system_conf().unwrap_or_else(|error| {
                warn!(%error, "/etc/resolv.conf names no name server; webhook hosts are looked up at 127.0.0.1");
                let local = vec![NameServerConfig::udp_and_tcp(IpAddr::from([127, 0, 0, 1]))];
                (ResolverConfig::from_name_servers(local), ResolverOpts::default())
            }),
        };
        let mut builder = Resolver::builder_with_config(config, TokioRuntimeProvider::default()).with_options(options);
        // Both kinds, so that the guard sees all addresses.
        builder.options_mut().ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
        if self.inner.servers.is_some() {
            builder.options_mut().use_hosts_file = ResolveHosts::Never;
        }
        builder.build()
    }
}

fn at(server: SocketAddr) -> NameServerConfig {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(|mut connection| {
        connection.port = server.port();
        connection
    });
    NameServerConfig::new(server.ip(), true, connections.into())
}

fn changed_at() -> [Option<SystemTime>; 2] {
    FILES.map(|file| Path::new(file).metadata().and_then(|about| about.modified()).ok())
}

fn in_words(error: &NetError) -> String {
    match error {
        error if error.is_nx_domain() => "there is no such name".into(),
        error if error.is_no_records_found() => "it has no address".into(),
        NetError::Timeout => "the name server does not answer".into(),
        NetError::NoConnections => "no name server can be reached".into(),
        other => other.to_string(),
    }
}
