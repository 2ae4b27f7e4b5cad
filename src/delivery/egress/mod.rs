//! Guards where webhooks may go. A URL comes from a client, and the server can reach addresses that the client can't.
//! So nothing is sent to an address that is not public, unless the operator has allowed it.
//!
//! One guard serves create, update, test and send. It checks the address of the connection: [`Guard`] resolves names
//! inside the HTTP client, so a name that resolves to another address the second time gains nothing. The client skips
//! its resolver if the host is an address, so those are checked from the URL, after the URL parser has turned `0x7f.1`
//! and `2130706433` into the addresses that they mean.

mod names;
mod ranges;

use std::{
    error::Error,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures::future::BoxFuture;
use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::{sync::Semaphore, time::timeout};
use url::{Host, Url};

pub use names::Names;

/// Names looked up at a time for [`Guard::check`]; beyond that a check passes without a lookup.
const CHECKS: usize = 64;
/// Time that a check waits for a name's addresses.
const CHECK_TIMEOUT: Duration = Duration::from_secs(3);

/// Where webhooks may be sent.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Ranges that are allowed although they are not public.
    pub allow: Vec<IpNet>,
    /// Whether to refuse `http://`.
    pub https_only: bool,
}

/// Why nothing may be sent to a URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Forbidden {
    /// Not a URL that webhooks can be sent to.
    #[error("webhooks can't be sent to this URL")]
    Url,
    /// Plain HTTP, which the operator does not allow.
    #[error("this server sends webhooks over https only")]
    Insecure,
    /// An address that is not public. The message does not name it, because a name's addresses are not the client's
    /// business.
    #[error(
        "the host is, or resolves to, an address to which this server sends no webhooks; its operator can allow it with --webhook-allow-cidr"
    )]
    Address,
}

type Lookup = Arc<dyn Fn(String) -> BoxFuture<'static, std::io::Result<Vec<IpAddr>>> + Send + Sync>;

/// Checks where webhooks go. Cheap to clone.
#[derive(Clone)]
pub struct Guard {
    policy: Arc<Policy>,
    lookup: Lookup,
    checks: Arc<Semaphore>,
}

impl Guard {
    /// A guard that resolves names by the system's settings.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self::with_names(policy, Names::system())
    }

    /// A guard that resolves names with this name service.
    #[must_use]
    pub fn with_names(policy: Policy, names: Names) -> Self {
        Self::with_lookup(
            policy,
            Arc::new(move |name| {
                let names = names.clone();
                Box::pin(async move { names.lookup(&name).await })
            }),
        )
    }

    /// A guard with its own lookup.
    #[must_use]
    pub fn with_lookup(policy: Policy, lookup: Lookup) -> Self {
        Self { policy: Arc::new(policy), lookup, checks: Arc::new(Semaphore::new(CHECKS)) }
    }

    /// Checks everything about a URL that needs no lookup.
    ///
    /// # Errors
    /// [`Forbidden`].
    pub fn check_url(&self, url: &str) -> Result<Url, Forbidden> {
        let url = Url::parse(url).map_err(|_| Forbidden::Url)?;
        match url.scheme() {
            "http" if self.policy.https_only => return Err(Forbidden::Insecure),
            "http" | "https" => {}
            _ => return Err(Forbidden::Url),
        }
        if !url.username().is_empty() || url.password().is_some() || url.port() == Some(0) {
            return Err(Forbidden::Url);
        }
        match url.host() {
            Some(Host::Ipv4(address)) => self.check_address(address.into())?,
            Some(Host::Ipv6(address)) => self.check_address(address.into())?,
            Some(Host::Domain(name)) if !name.is_empty() => {}
            Some(Host::Domain(_)) | None => return Err(Forbidden::Url),
        }
        Ok(url)
    }

    /// Checks a URL and, if its host is a name, the name's present addresses. A name that does not resolve now or in
    /// time passes, because it may do so later, and so does any name while very many are being checked. The addresses
    /// are checked in any case when the webhook is sent.
    ///
    /// # Errors
    /// [`Forbidden`].
    pub async fn check(&self, url: &str) -> Result<(), Forbidden> {
        let url = self.check_url(url)?;
        match url.host() {
            Some(Host::Domain(name)) => {
                // No check waits for others' name servers.
                let Ok(_turn) = self.checks.try_acquire() else { return Ok(()) };
                match timeout(CHECK_TIMEOUT, self.addresses(name.to_owned())).await {
                    Ok(Ok(_) | Err(ResolveError::Lookup(_))) | Err(_) => Ok(()),
                    Ok(Err(ResolveError::Forbidden(forbidden))) => Err(forbidden),
                }
            }
            Some(Host::Ipv4(_) | Host::Ipv6(_)) | None => Ok(()),
        }
    }

    fn check_address(&self, address: IpAddr) -> Result<(), Forbidden> {
        if ranges::is_allowed(address, &self.policy.allow) { Ok(()) } else { Err(Forbidden::Address) }
    }

    /// Returns a name's addresses. If any is forbidden the whole name is, because otherwise chance would decide which
    /// one is used. For `localhost`, those of this machine's addresses that are allowed are returned.
    async fn addresses(&self, name: String) -> Result<Vec<IpAddr>, ResolveError> {
        let is_local = is_localhost(&name);
        let mut addresses = (self.lookup)(name).await?;
        if is_local && addresses.iter().all(IpAddr::is_loopback) {
            addresses.retain(|address| self.check_address(*address).is_ok());
            return if addresses.is_empty() { Err(Forbidden::Address.into()) } else { Ok(addresses) };
        }
        for address in &addresses {
            self.check_address(*address)?;
        }
        Ok(addresses)
    }
}

/// Whether a name means this machine, regardless of name servers (RFC 6761, section 6.3).
fn is_localhost(name: &str) -> bool {
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost")
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard").field("policy", &self.policy).finish_non_exhaustive()
    }
}

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.clone();
        Box::pin(async move {
            let addresses = guard.addresses(name.as_str().to_owned()).await?;
            // The client sets the URL's port.
            Ok(Box::new(addresses.into_iter().map(|address| SocketAddr::new(address, 0))) as Addrs)
        })
    }
}

/// Why a name has no addresses.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// At least one of its addresses is forbidden.
    #[error(transparent)]
    Forbidden(#[from] Forbidden),
    /// The lookup failed.
    #[error("the name does not resolve: {0}")]
    Lookup(#[from] std::io::Error),
}

impl ResolveError {
    /// Finds the guard's reason among the causes of a client's error.
    pub fn find<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(found) = error.downcast_ref() {
                return Some(found);
            }
            cause = error.source();
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(allow: &[&str], https_only: bool, names: &'static [(&str, &[&str])]) -> Guard {
        let allow = allow.iter().map(|range| range.parse().unwrap()).collect();
        let lookup = move |name: String| -> BoxFuture<'static, std::io::Result<Vec<IpAddr>>> {
            let found = names.iter().find(|(known, _)| *known == name);
            Box::pin(async move {
                let (_, addresses) = found.ok_or_else(|| std::io::Error::other("no such name"))?;
                Ok(addresses.iter().map(|address| address.parse().unwrap()).collect())
            })
        };
        Guard::with_lookup(Policy { allow, https_only }, Arc::new(lookup))
    }

    /// 127.0.0.1 and the metadata address in every spelling that some client or other understands.
    #[test]
    fn no_spelling_of_an_address_gets_through() {
        let guard = guard(&[], false, &[]);
        for host in [
            "127.0.0.1",
            "127.1",
            "127.0.1",
            "0x7f.1",
            "0x7f.0.0.1",
            "0x7f000001",
            "0X7F000001",
            "2130706433",
            "017700000001",
            "0177.0.0.1",
            "0177.1",
            "127.0.0.1.",
            "127.1.",
            "%31%32%37.0.0.1",
            "１２７.0.0.1",
            "①②⑦.0.0.1",
            "127。0。0。1",
            "[::1]",
            "[0:0:0:0:0:0:0:1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[0:0:0:0:0:ffff:7f00:1]",
            "[::127.0.0.1]",
            "[::]",
            "0",
            "0.0.0.0",
            "169.254.169.254",
            "0xa9fea9fe",
            "2852039166",
            "0xa9.0xfe.0xa9.0xfe",
            "[::ffff:a9fe:a9fe]",
            "[64:ff9b::7f00:1]",
            "[64:ff9b:1::7f00:1]",
            "[2002:7f00:1::]",
            "[2001:0:7f00:1::]",
            "[fe80::1]",
            "[fd00:ec2::254]",
            "[fec0::1]",
            "[ff02::1]",
            "10.1.2.3",
            "192.168.0.1",
            "172.16.0.1",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
        ] {
            let url = format!("http://{host}:8080/hook");
            assert_eq!(guard.check_url(&url).map(|_| ()), Err(Forbidden::Address), "{host}");
        }
    }

    #[test]
    fn what_is_no_url_to_send_to() {
        let guard = guard(&[], false, &[]);
        for url in [
            "",
            "example.com",
            "ftp://example.com/",
            "file:///etc/passwd",
            "gopher://example.com/",
            "http://",
            "http://a@example.com/",
            "http://a:b@example.com/",
            "http://example.com:0/",
            "http://1.2.3.4.5/",
            "http://256.1.1.1/",
            "http://[::1%25eth0]/",
            "http://exa mple.com/",
            "unix:/var/run/docker.sock",
        ] {
            assert_eq!(guard.check_url(url).map(|_| ()), Err(Forbidden::Url), "{url}");
        }
        for url in
            ["http://example.com/", "https://example.com:8443/a?b", "https://1.1.1.1/", "http://[2606:4700::1111]/"]
        {
            assert!(guard.check_url(url).is_ok(), "{url}");
        }
    }

    #[test]
    fn https_only() {
        let guard = guard(&["127.0.0.0/8"], true, &[]);
        assert_eq!(guard.check_url("http://127.0.0.1/").map(|_| ()), Err(Forbidden::Insecure));
        assert!(guard.check_url("https://127.0.0.1/").is_ok());
    }

    #[tokio::test]
    async fn a_name_with_one_forbidden_address_is_forbidden() {
        let guard = guard(
            &["10.1.0.0/16"],
            false,
            &[
                ("good.test", &["1.1.1.1", "2606:4700::1111"]),
                ("mixed.test", &["1.1.1.1", "127.0.0.1"]),
                ("local.test", &["::1"]),
                ("mapped.test", &["::ffff:169.254.169.254"]),
                ("opened.test", &["10.1.2.3"]),
                ("closed.test", &["10.2.2.3"]),
            ],
        );
        for (name, expected) in [
            ("good.test", Ok(())),
            ("opened.test", Ok(())),
            ("nowhere.test", Ok(())),
            ("mixed.test", Err(Forbidden::Address)),
            ("local.test", Err(Forbidden::Address)),
            ("mapped.test", Err(Forbidden::Address)),
            ("closed.test", Err(Forbidden::Address)),
        ] {
            assert_eq!(guard.check(&format!("https://{name}/")).await, expected, "{name}");
        }
    }

    #[tokio::test]
    async fn localhost_is_no_back_door() {
        assert_eq!(Guard::new(Policy::default()).check("http://localhost:4080/").await, Err(Forbidden::Address));
        let open =
            Policy { allow: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()], https_only: false };
        assert_eq!(Guard::new(open).check("http://localhost:4080/").await, Ok(()));
    }

    /// Where only one of its addresses is open, that one is used (what listens on 127.0.0.1 alone is there).
    #[tokio::test]
    async fn localhost_is_whichever_of_its_addresses_is_open() {
        let names: &'static [(&str, &[&str])] = &[
            ("localhost", &["::1", "127.0.0.1"]),
            ("app.localhost.", &["127.0.0.1", "::1"]),
            ("LocalHost.", &["10.0.0.1", "127.0.0.1"]),
            ("notlocalhost", &["::1", "127.0.0.1"]),
        ];
        let addresses = async |allow: &[&str], name: &str| {
            let found = guard(allow, false, names).addresses(name.to_owned()).await;
            found.ok().map(|found| found.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(addresses(&["127.0.0.0/8"], "localhost").await.as_deref(), Some("127.0.0.1"));
        assert_eq!(addresses(&["::1/128"], "app.localhost.").await.as_deref(), Some("::1"));
        assert_eq!(addresses(&["127.0.0.0/8", "::1/128"], "localhost").await.as_deref(), Some("::1 127.0.0.1"));
        assert_eq!(addresses(&["10.9.0.0/16"], "localhost").await, None);
        assert_eq!(
            addresses(&["127.0.0.0/8"], "LocalHost.").await,
            None,
            "whoever says so, 10.0.0.1 is not this machine"
        );
        assert_eq!(addresses(&["127.0.0.0/8"], "notlocalhost").await, None);
    }

    /// A name server that says nothing holds up nobody: the name passes, and is checked when it is sent to.
    #[tokio::test]
    async fn a_name_server_that_never_answers_is_waited_for_so_long_and_no_longer() {
        let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let names = Names::of(vec![silent.local_addr().unwrap()], Duration::from_millis(200));
        let guard = Guard::with_names(Policy::default(), names.clone());
        assert_eq!(guard.check("https://example.test/").await, Ok(()));
        let error = names.lookup("example.test").await.unwrap_err();
        assert!(error.to_string().contains("did not answer within 0.2 s"), "{error}");
        let mut question = [0; 512];
        assert!(silent.recv(&mut question).await.unwrap() > 12, "it was asked");
    }

    /// While very many checks wait for name servers, the next does not wait behind them.
    #[tokio::test]
    async fn a_check_does_not_wait_for_others() {
        let lookup =
            Arc::new(|_| -> BoxFuture<'static, std::io::Result<Vec<IpAddr>>> { Box::pin(std::future::pending()) });
        let guard = Guard::with_lookup(Policy::default(), lookup);
        let mut waiting: Vec<_> = (0..CHECKS).map(|_| Box::pin(guard.check("https://slow.test/"))).collect();
        for check in &mut waiting {
            assert!(futures::poll!(check).is_pending());
        }
        assert!(futures::poll!(Box::pin(guard.check("https://next.test/"))).is_ready());
    }
}
