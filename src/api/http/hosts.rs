//! By which names the server may be called, and from which web pages.
//!
//! A server without access tokens trusts whoever reaches it. A browser on the same machine reaches it too, and runs the
//! pages of strangers: a page of `attacker.example` whose name is re-pointed at 127.0.0.1 (DNS rebinding) talks to the
//! server as to its own origin. Such a request carries the stranger's name in `Host` or `:authority`, so a server without
//! tokens and without TLS answers only to names that no stranger can have. With tokens the page lacks the token; with TLS
//! the certificate does not fit the name.
//!
//! A page can also send requests to another origin without reading the answers. Those name the page in `Origin`: without
//! tokens the server takes them from its own origin and from `--public-host` only.

use std::{net::IpAddr, sync::Arc, time::Duration};

use crate::{
    api::{
        grpc,
        v1::{
            self,
            problem::{Dialect, Problem},
        },
    },
    service::{Code, ServiceError, short},
    telemetry::Seldom,
};
use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};

/// What a page may send and read. gRPC-Web needs these.
const ALLOWED_HEADERS: &str = "authorization, content-type, grpc-timeout, traceparent, x-grpc-web, x-user-agent, \
                               idempotency-key, last-event-id, x-request-id, x-api-key, anthropic-version";
const EXPOSED_HEADERS: &str = "grpc-status, grpc-message, grpc-status-details-bin, content-range, x-request-id, \
                               retry-after, x-should-retry";
/// How long a browser may remember the answer to a preflight, in seconds.
const REMEMBERED: &str = "600";
/// Between two log lines about refused requests.
const QUIET: Duration = Duration::from_secs(60);

/// A host name or address in lower case, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Authority {
    host: String,
    port: Option<u16>,
}

impl Authority {
    /// Parses `host`, `host:port` or `[v6]:port`.
    fn parse(text: &str) -> Option<Self> {
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (address, port) = rest.split_once(']')?;
                address.parse::<std::net::Ipv6Addr>().ok()?;
                (address, port)
            }
            None => text.split_at(text.find(':').unwrap_or(text.len())),
        };
        let port = match port.strip_prefix(':') {
            Some(digits) => Some(digits.parse().ok()?),
            None if port.is_empty() => None,
            None => return None,
        };
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:%".contains(&byte);
        (!host.is_empty() && host.bytes().all(good)).then_some(Self { host, port })
    }
}

/// The host names and origins that are accepted.
#[derive(Clone, Debug)]
pub(in crate::api) struct Hosts {
    /// `--public-host`, in lower case.
    public: Vec<String>,
    /// This machine's own name.
    machine: Option<String>,
    /// Only known names are answered to.
    checks_host: bool,
    /// Only known origins may change anything.
    checks_origin: bool,
    scheme: &'static str,
    /// When refusals were logged: strangers cause them.
    refusals: Arc<Seldom>,
}

impl Hosts {
    pub(in crate::api) fn new(public: &[String], tokens: bool, tls: bool) -> Self {
        let public: Vec<String> = public.iter().map(|name| name.to_ascii_lowercase()).collect();
        let anybody = public.iter().any(|name| name == "*");
        Self {
            machine: std::fs::read_to_string("/proc/sys/kernel/hostname")
                .ok()
                .map(|name| name.trim().to_ascii_lowercase()),
            checks_host: !tokens && !tls && !anybody,
            checks_origin: !tokens && !anybody,
            scheme: if tls { "https" } else { "http" },
            refusals: Arc::new(Seldom::every(QUIET)),
            public,
        }
    }

    /// Whether no stranger can have this name: an address, a name of this machine or of its private network, or one that
    /// the operator has named.
    fn is_ours(&self, host: &str) -> bool {
        // What has no dot is in nobody's domain: "localhost", a service of Docker Compose or Kubernetes.
        let local = !host.contains('.')
            || [".localhost", ".internal", ".svc", ".svc.cluster.local"].iter().any(|end| host.ends_with(end));
        local
            || host.parse::<IpAddr>().is_ok()
            || self.machine.as_deref() == Some(host)
            || self.public.iter().any(|name| name == host)
    }

    /// Refuses a request whose name is a stranger's.
    fn check_host(&self, request: &Request) -> Result<(), ServiceError> {
        if !self.checks_host {
            return Ok(());
        }
        let in_headers = request.headers().get_all(header::HOST).iter().map(HeaderValue::as_bytes);
        let in_uri = request.uri().authority().map(|authority| authority.as_str().as_bytes());
        for name in in_headers.chain(in_uri).filter(|name| !name.is_empty()) {
            let name = String::from_utf8_lossy(name);
            if !Authority::parse(&name).is_some_and(|authority| self.is_ours(&authority.host)) {
                let host = Authority::parse(&name).map_or_else(|| name.to_string(), |authority| authority.host);
                let host = short(&host);
                let message = format!(
                    "this server has no access tokens, so it does not accept the host name {host:?}: a web page could use it through a name of its own. Call it by its address or as localhost, or start it with --public-host {host}"
                );
                return Err(ServiceError::new(Code::PermissionDenied, "HOST_NOT_ALLOWED", message));
            }
        }
        Ok(())
    }

    /// Whether pages of this origin may call.
    fn allows_origin(&self, origin: &str, request: &Request) -> bool {
        let Some((scheme, authority)) = origin.split_once("://") else { return false };
        let default = match scheme {
            "http" => 80,
            "https" => 443,
            _ => return false,
        };
        let Some(authority) = Authority::parse(authority) else { return false };
        if self.public.contains(&authority.host) || self.public.iter().any(|name| name == "*") {
            return true;
        }
        let port = authority.port.unwrap_or(default);
        called(request).is_some_and(|own| {
            // Behind a proxy that ends TLS the scheme is not known: no port is either's default.
            own.host == authority.host && own.port.map_or(matches!(port, 80 | 443), |own| own == port)
        })
    }

    /// Refuses a request of another site's page that is more than reading.
    fn check_origin(&self, request: &Request) -> Result<(), ServiceError> {
        let reads = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
        let Some(origin) = request.headers().get(header::ORIGIN) else { return Ok(()) };
        let allowed = origin.to_str().is_ok_and(|origin| self.allows_origin(origin, request));
        if !self.checks_origin || reads || allowed {
            return Ok(());
        }
        let origin = short(&String::from_utf8_lossy(origin.as_bytes()));
        let message = format!(
            "pages from {origin:?} may not use this server, because it has no access tokens; if the page is yours, start tidemill with --public-host and the page's host name"
        );
        Err(ServiceError::new(Code::PermissionDenied, "ORIGIN_NOT_ALLOWED", message))
    }

    /// The origin that may read the answer: the page's if it is let in, else this server's own.
    fn readable_by(&self, request: &Request) -> Option<HeaderValue> {
        let origin = request.headers().get(header::ORIGIN);
        let allowed = |origin: &&HeaderValue| origin.to_str().is_ok_and(|text| self.allows_origin(text, request));
        if let Some(origin) = origin.filter(allowed) {
            return Some(origin.clone());
        }
        let name = request.headers().get(header::HOST).and_then(|name| name.to_str().ok());
        let name = name.or_else(|| request.uri().authority().map(http::uri::Authority::as_str))?;
        format!("{}://{name}", self.scheme).parse().ok()
    }

    /// A gRPC client reads the status in gRPC's way, everybody else the sentence.
    fn refuse(&self, request: &Request, error: ServiceError, code: StatusCode) -> Response {
        const KIND: HeaderName = header::CONTENT_TYPE;
        if let Some(unlogged) = self.refusals.may() {
            tracing::warn!(reason = error.message, unlogged, "a request was refused because of its Host or Origin");
        }
        let kind = request.headers().get(KIND).filter(|_| grpc::is_grpc(request));
        match kind.cloned() {
            Some(kind) => {
                let mut response = grpc::response(error);
                response.headers_mut().insert(KIND, kind);
                response
            }
            None if v1::is_below(request.uri().path()) => {
                let response = Problem::from(error).respond(Dialect::of(request.uri().path()));
                (code, response).into_response()
            }
            None => (code, format!("{}\n", error.message)).into_response(),
        }
    }
}

/// By which name and port the server was called.
fn called(request: &Request) -> Option<Authority> {
    let in_uri = request.uri().authority().map(http::uri::Authority::as_str);
    let name = in_uri.or_else(|| request.headers().get(header::HOST)?.to_str().ok());
    Authority::parse(name?)
}

/// The check, as a layer around everything on the port.
pub(in crate::api) async fn pass(State(hosts): State<Arc<Hosts>>, request: Request, next: Next) -> Response {
    if let Err(error) = hosts.check_host(&request) {
        return hosts.refuse(&request, error, StatusCode::MISDIRECTED_REQUEST);
    }
    if is_preflight(&request) {
        return preflight(&hosts, &request);
    }
    if let Err(error) = hosts.check_origin(&request) {
        return hosts.refuse(&request, error, StatusCode::FORBIDDEN);
    }
    let readable_by = hosts.readable_by(&request);
    let mut response = next.run(request).await;
    if let Some(origin) = readable_by {
        share(response.headers_mut(), origin);
    }
    response
}

fn is_preflight(request: &Request) -> bool {
    *request.method() == Method::OPTIONS
        && request.headers().contains_key(header::ORIGIN)
        && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// A browser asks whether a page may call.
fn preflight(hosts: &Hosts, request: &Request) -> Response {
    let origin = request.headers()[header::ORIGIN].clone();
    if !origin.to_str().is_ok_and(|text| hosts.allows_origin(text, request)) {
        let text = "this server accepts calls from pages of its own origin and of the hosts that --public-host names\n";
        return (StatusCode::FORBIDDEN, [(header::VARY, "origin")], text).into_response();
    }
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    share(headers, origin);
    for (name, value) in [
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, HEAD, POST"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, ALLOWED_HEADERS),
        (header::ACCESS_CONTROL_MAX_AGE, REMEMBERED),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Says whose pages may read an answer.
fn share(headers: &mut HeaderMap, origin: HeaderValue) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(EXPOSED_HEADERS));
    headers.append(header::VARY, HeaderValue::from_static("origin"));
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn request(method: &str, uri: &str, headers: &[(&str, &str)]) -> Request {
        let builder = Request::builder().method(method).uri(uri);
        headers
            .iter()
            .fold(builder, |builder, (name, value)| builder.header(*name, *value))
            .body(Body::empty())
            .unwrap()
    }

    fn answers_to(hosts: &Hosts, name: &str) -> bool {
        let by_header = hosts.check_host(&request("POST", "/x", &[("host", name)])).is_ok();
        if let Ok(uri) = format!("http://{name}/x").parse::<http::Uri>() {
            let by_authority = hosts.check_host(&request("POST", &uri.to_string(), &[])).is_ok();
            assert_eq!(by_header, by_authority, "{name}");
        }
        by_header
    }

    #[test]
    fn names_that_no_stranger_can_have_are_answered_to() {
        let hosts = Hosts {
            machine: Some("gpu1.corp.example".into()),
            ..Hosts::new(&["Batch.Example.com".into()], false, false)
        };
        for name in [
            "127.0.0.1:4080",
            "[::1]:4080",
            "[::1]",
            "10.1.2.3",
            "localhost",
            "LOCALHOST:80",
            "localhost.:4080",
            "app.localhost:1",
            "tidemill",
            "tidemill_1:4080",
            "tidemill.batch.svc.cluster.local",
            "tidemill.batch.svc",
            "host.docker.internal:4080",
            "batch.example.com",
            "batch.example.com.:443",
            "gpu1.corp.example",
        ] {
            assert!(answers_to(&hosts, name), "{name}");
        }
        for name in [
            "evil.example",
            "evil.example:4080",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evil.localhost.example",
            "x.batch.example.com",
            "127.0.0.1@evil.example",
            "evil.example#localhost",
            "[::1].evil.example",
            "a b",
            "[::1",
            "localhost:99999",
            "localhost:4080:1",
        ] {
            assert!(!answers_to(&hosts, name), "{name}");
        }
        assert!(hosts.check_host(&request("GET", "/healthz", &[])).is_ok(), "HTTP/1.0 need not name it");
        let two = request("GET", "http://localhost/x", &[("host", "evil.example")]);
        assert!(hosts.check_host(&two).is_err(), "one of two names is a stranger's");
    }

    #[test]
    fn tokens_and_certificates_protect_by_themselves() {
        let by = |tokens, tls| answers_to(&Hosts::new(&[], tokens, tls), "evil.example");
        assert_eq!([by(false, false), by(true, false), by(false, true)], [false, true, true]);
        assert!(answers_to(&Hosts::new(&["*".into()], false, false), "evil.example"));
    }

    #[test]
    fn a_strangers_page_changes_nothing() {
        let hosts = Hosts::new(&["app.example".into()], false, false);
        let from = |origin: &str, method: &str, host: &str| {
            hosts.check_origin(&request(method, "/x", &[("origin", origin), ("host", host)])).is_ok()
        };
        for (origin, host) in [
            ("http://localhost:4080", "localhost:4080"),
            ("http://[::1]:4080", "[::1]:4080"),
            ("https://batch.example", "batch.example"),
            ("https://app.example", "localhost:4080"),
            ("http://app.example:3000", "localhost:4080"),
        ] {
            assert!(from(origin, "POST", host), "{origin} {host}");
        }
        for origin in
            ["http://localhost:3000", "http://localhost", "https://evil.example", "null", "file://", "localhost:4080"]
        {
            assert!(!from(origin, "POST", "localhost:4080"), "{origin}");
            assert!(from(origin, "GET", "localhost:4080"), "{origin}: reading is left to the browser");
        }
        assert!(hosts.check_origin(&request("POST", "/x", &[("host", "localhost")])).is_ok(), "no browser");
        let guarded = Hosts::new(&[], true, false);
        let post = request("POST", "/x", &[("origin", "https://evil.example"), ("host", "batch.example")]);
        assert!(guarded.check_origin(&post).is_ok(), "it needs a token");
    }

    #[test]
    fn only_known_pages_may_read() {
        let hosts = Hosts::new(&["app.example".into()], true, false);
        let readable = |headers: &[(&str, &str)]| {
            hosts.readable_by(&request("POST", "/x", headers)).map(|value| value.to_str().unwrap().to_owned())
        };
        let host = ("host", "b.example:4080");
        assert_eq!(readable(&[host, ("origin", "https://app.example")]).unwrap(), "https://app.example");
        assert_eq!(readable(&[host, ("origin", "https://evil.example")]).unwrap(), "http://b.example:4080");
        assert_eq!(readable(&[host]).unwrap(), "http://b.example:4080");
        assert_eq!(readable(&[]), None);
        let ask = |origin: &str| {
            let asks = [host, ("origin", origin), ("access-control-request-method", "POST")];
            preflight(&hosts, &request("OPTIONS", "/x", &asks)).status()
        };
        assert_eq!(
            (ask("https://app.example"), ask("https://evil.example")),
            (StatusCode::NO_CONTENT, StatusCode::FORBIDDEN)
        );
    }
}
