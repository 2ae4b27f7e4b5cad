//! Explains libraries' errors. The libraries name their own parts ("builder error", "relative URL without a base"), but
//! a person wants to know what happened and what to do. Every message about a failed connection, URL or file comes from
//! here. No message contains a URL, a key or a password.

use std::{error::Error, io};

use rustls::{AlertDescription, CertificateError, Error as TlsError};

#[cfg(test)]
mod tests;

/// The other end of a connection. What a user can do about its certificate depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// A worker, as the server sees it.
    Worker,
    /// A receiver of webhooks, as the server sees it.
    Receiver,
    /// A tidemill server, as the command line sees it.
    Server,
    /// PostgreSQL.
    Database,
    /// S3 or another object store.
    ObjectStore,
}

impl Peer {
    /// How to trust the authority that signed the peer's certificate.
    fn trust(self) -> &'static str {
        match self {
            Self::Worker | Self::ObjectStore => {
                "add that authority to the system's certificates, or to the file that SSL_CERT_FILE names, and restart the \
                 tidemill server"
            }
            Self::Receiver => {
                "give the receiver a certificate of a public authority, or have the operator of this server add the authority \
                 to the system's certificates or to the file that SSL_CERT_FILE names"
            }
            Self::Server => "name a file that holds that authority's certificate: --tls-ca FILE",
            Self::Database => {
                "name a file that holds that authority's certificate in the database URL: ?sslmode=verify-full&sslrootcert=FILE"
            }
        }
    }
}

/// Why a connection or a request failed: the most telling cause.
#[must_use]
pub fn cause(peer: Peer, error: &(dyn Error + 'static)) -> String {
    let find = |told: &dyn Fn(&(dyn Error + 'static)) -> Option<String>| chain(error).find_map(told);
    find(&|cause| cause.downcast_ref().map(|error| tls(peer, error)))
        .or_else(|| find(&|cause| cause.downcast_ref().map(|error| url(*error).to_owned())))
        .or_else(|| find(&|cause| cause.downcast_ref::<reqwest::Error>().and_then(request)))
        .or_else(|| find(&|cause| cause.downcast_ref().and_then(http2)))
        .or_else(|| find(&|cause| cause.downcast_ref().and_then(http1)))
        .or_else(|| find(&|cause| cause.downcast_ref().map(file)))
        .unwrap_or_else(|| plain(&chain(error).last().unwrap_or(error).to_string()))
}

/// Whether the connection failed because of the other end's certificate, or ours.
#[must_use]
pub fn is_tls(error: &(dyn Error + 'static)) -> bool {
    chain(error).any(<dyn Error + 'static>::is::<TlsError>)
}

/// The message for a full disk, if that is the cause.
#[must_use]
pub fn full_disk(error: &(dyn Error + 'static)) -> Option<String> {
    use io::ErrorKind as K;
    let full = |error: &&io::Error| matches!(error.kind(), K::StorageFull | K::QuotaExceeded);
    chain(error).filter_map(|cause| cause.downcast_ref::<io::Error>()).find(full).map(file)
}

/// Whether the other end does not speak HTTP/2, and so can't be a gRPC server.
#[must_use]
pub fn is_no_grpc(error: &(dyn Error + 'static)) -> bool {
    chain(error).filter_map(|cause| cause.downcast_ref::<h2::Error>()).any(is_no_http2)
}

/// An error and its causes, outermost first. What an [`io::Error`] wraps is one of them, although its `source` skips
/// it.
fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| beneath(*error))
}

fn beneath<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a (dyn Error + 'static)> {
    match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
        Some(inner) => Some(inner),
        None => error.source(),
    }
}

/// Why a file, a socket or a name service failed.
#[must_use]
pub fn file(error: &io::Error) -> String {
    use io::ErrorKind as K;
    // The system's numbers for these have no stable kind.
    const TOO_MANY_FILES: [i32; 2] = [23, 24];
    if error.raw_os_error().is_some_and(|number| TOO_MANY_FILES.contains(&number)) {
        return "this process has as many files and connections open as it may: raise its limit (ulimit -n)".to_owned();
    }
    let text = error.to_string();
    if let Some((_, why)) = text.split_once("failed to lookup address information: ") {
        return format!("the host name does not resolve ({why})");
    }
    let words = match error.kind() {
        K::ConnectionRefused => "connection refused: nothing listens there",
        K::ConnectionReset => "the connection was reset by the other end",
        K::ConnectionAborted | K::BrokenPipe => "the connection was closed by the other end",
        K::UnexpectedEof => "the connection was closed before the whole answer came",
        K::TimedOut => "timed out",
        K::HostUnreachable | K::NetworkUnreachable => "no route to that address",
        K::StorageFull => "no space is left on the disk",
        K::QuotaExceeded => "the disk quota is used up",
        K::ReadOnlyFilesystem => "the file system is read-only",
        K::PermissionDenied => "permission denied",
        K::NotFound => "No such file or directory",
        K::NotADirectory => "it is not a directory",
        K::AddrInUse => "another program listens there already: stop it, or choose another port",
        K::AddrNotAvailable => "this machine has no such address",
        K::InvalidData if text.contains("valid UTF-8") => "it is not UTF-8 text",
        // The system's number says nothing to people.
        _ => return plain(text.split(" (os error").next().unwrap_or(&text)),
    };
    words.to_owned()
}

/// Why a text is not a URL, and what is missing.
#[must_use]
pub fn url(error: url::ParseError) -> &'static str {
    use url::ParseError as E;
    match error {
        E::RelativeUrlWithoutBase | E::RelativeUrlWithCannotBeABaseBase | E::SetHostOnCannotBeABaseUrl => {
            "it does not begin with a scheme such as http://"
        }
        E::EmptyHost => "it names no host",
        E::InvalidPort => "its port is not a number from 0 to 65535",
        E::InvalidIpv4Address => "its host looks like an IPv4 address but is not one",
        E::InvalidIpv6Address => "its host in brackets is not an IPv6 address",
        E::IdnaError | E::InvalidDomainCharacter => "its host name holds characters that no host name has",
        E::Overflow => "it is too long",
        _ => "it is not a URL",
    }
}

/// What a proxy's HTTP status means where a gRPC answer was expected.
#[must_use]
pub fn proxy(status: u16) -> Option<String> {
    let what = match status {
        400 => "something between here and the server takes the request for a bad one; does it pass gRPC (HTTP/2) on?",
        401 | 403 | 407 => "something between here and the server refuses the call, or asks for a login of its own",
        404 | 405 => {
            "no gRPC server answers there: is the URL that of a tidemill server, and does a proxy pass gRPC on?"
        }
        408 | 504 => {
            "a proxy between here and the server gave up waiting for it: raise its time-out for gRPC (docs/operations.md names \
             the settings)"
        }
        411 | 413 => {
            "something between here and the server refuses bodies of this size: raise its limit (in nginx client_max_body_size)"
        }
        415 | 426 | 464 | 505 => "something between here and the server does not speak gRPC (HTTP/2)",
        429 => "something between here and the server refuses so many requests; try again later",
        431 => "something between here and the server refuses headers of this size",
        502 | 503 => "a proxy between here and the server can't reach it: is the server running?",
        300..=399 => "something between here and the server redirects to another URL: give that one",
        500..=599 => "something between here and the server failed",
        _ => return None,
    };
    Some(format!("{what} (HTTP {status})"))
}

/// Why a TLS connection failed, and what to do.
fn tls(peer: Peer, error: &TlsError) -> String {
    match error {
        TlsError::InvalidCertificate(bad) => certificate(peer, bad),
        TlsError::AlertReceived(alert) => alert_received(*alert),
        TlsError::InvalidMessage(_) => {
            "it does not speak TLS on that port: is it http:// instead of https://?".to_owned()
        }
        TlsError::PeerIncompatible(_) => {
            "it speaks no version or cipher of TLS that is still safe (1.2 or later)".to_owned()
        }
        TlsError::PeerMisbehaved(_) => "it breaks the rules of TLS".to_owned(),
        TlsError::NoApplicationProtocol => "it does not speak HTTP/2 over TLS".to_owned(),
        other => format!("TLS failed: {}", plain(&other.to_string())),
    }
}

fn certificate(peer: Peer, bad: &CertificateError) -> String {
    match bad {
        CertificateError::UnknownIssuer | CertificateError::UnknownRevocationStatus => format!(
            "its certificate is self-signed or signed by an authority that is not trusted here: {}",
            peer.trust()
        ),
        // Another key than that of the authority which is trusted by this name: most often somebody has made it anew.
        CertificateError::BadSignature => format!(
            "its certificate is signed by another authority than the trusted one of the same name; was the authority made \
             anew? Then {}",
            peer.trust()
        ),
        // Some servers present the authority's own certificate, as `openssl req -x509` makes it.
        CertificateError::Other(other) if other.to_string().contains("CaUsedAsEndEntity") => format!(
            "its certificate is self-signed and marked as an authority's (CA:TRUE), which is never taken for a server's: make \
             one with basicConstraints=CA:FALSE and its name in subjectAltName, and {}",
            peer.trust()
        ),
        CertificateError::NotValidForNameContext { expected, presented } => {
            let names = if presented.is_empty() { "no name".to_owned() } else { names(presented) };
            format!(
                "its certificate is for {names}, not for {}: use a name that it has, or give it a certificate for this one",
                expected.to_str()
            )
        }
        CertificateError::NotValidForName => {
            "its certificate is for another name: use a name that it has, or give it a certificate for this one"
                .to_owned()
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "its certificate has expired: renew it, and check this machine's clock".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "its certificate is not valid yet: check this machine's clock".to_owned()
        }
        CertificateError::Revoked => "its certificate has been revoked: renew it".to_owned(),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "its certificate is not made for servers (extendedKeyUsage lacks serverAuth)".to_owned()
        }
        // Its Debug form is all that rustls shows of what another library says.
        CertificateError::Other(other) => format!("its certificate is not valid ({other})"),
        other => format!("its certificate is not valid ({other})"),
    }
}

/// A certificate's names without rustls' notation, `DnsName("a")`.
fn names(presented: &[String]) -> String {
    const SHOWN: usize = 3;
    let bare = |name: &String| name.split('"').nth(1).unwrap_or(name).to_owned();
    let mut names: Vec<_> = presented.iter().take(SHOWN).map(bare).collect();
    if presented.len() > SHOWN {
        names.push(format!("{} more", presented.len() - SHOWN));
    }
    names.join(", ")
}

fn alert_received(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::CertificateRequired
        | AlertDescription::BadCertificate
        | AlertDescription::UnknownCA
        | AlertDescription::CertificateUnknown
        | AlertDescription::CertificateExpired
        | AlertDescription::AccessDenied => {
            "it wants a client certificate that it knows the authority of, and refused ours or the lack of one"
                .to_owned()
        }
        AlertDescription::HandshakeFailure
        | AlertDescription::ProtocolVersion
        | AlertDescription::InsufficientSecurity => {
            "it and tidemill have no version or cipher of TLS in common".to_owned()
        }
        AlertDescription::NoApplicationProtocol => "it does not speak HTTP/2 over TLS".to_owned(),
        AlertDescription::UnrecognisedName => "it has no certificate for that host name".to_owned(),
        other => format!("it ended the TLS handshake ({other:?})"),
    }
}

fn request(error: &reqwest::Error) -> Option<String> {
    if error.is_timeout() {
        return Some("timed out".to_owned());
    }
    if error.is_redirect() {
        return Some("it redirects elsewhere, which is not followed".to_owned());
    }
    // A header with a control character, or a URL without a host: nothing was sent.
    let innermost = chain(error).count() == 1;
    (innermost && error.is_builder()).then(|| "the request can't be made of this URL and these headers".to_owned())
}

fn http1(error: &hyper::Error) -> Option<String> {
    let words = if error.is_incomplete_message() {
        "the connection was closed before the whole answer came"
    } else if let Some(words) = unreadable(error) {
        words
    } else if error.is_parse() {
        "what it answers is not HTTP: does it speak https:// on that port, or another protocol?"
    } else if error.is_timeout() {
        "timed out"
    } else if error.is_canceled() || error.is_closed() {
        "the connection was closed"
    } else {
        return None;
    };
    Some(words.to_owned())
}

/// Why an answer that is HTTP can't be read, if that is so: there is a server, and it has answered.
#[must_use]
pub fn unreadable_answer(error: &(dyn Error + 'static)) -> Option<&'static str> {
    chain(error).filter_map(|cause| cause.downcast_ref::<hyper::Error>()).find_map(unreadable)
}

fn unreadable(error: &hyper::Error) -> Option<&'static str> {
    if error.is_parse_too_large() {
        return Some("its answer is HTTP, but has too many headers, or too long ones");
    }
    if error.is_parse_status() {
        return Some("its answer is HTTP, but its status is not one");
    }
    if error.is_parse() {
        // The error has no question for this, and its text is all that tells it from what is not HTTP at all.
        let text = error.to_string();
        let of_header = ["header", "content-length", "transfer-encoding"].iter().any(|what| text.contains(what));
        return of_header.then_some("its answer is HTTP, but has a header that is not valid");
    }
    // Of the pieces in which a body comes.
    let bad_piece =
        |cause: &io::Error| matches!(cause.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData);
    let is_bad = error.source().and_then(|cause| cause.downcast_ref::<io::Error>()).is_some_and(bad_piece);
    // TLS says so too.
    (is_bad && !is_tls(error)).then_some("its answer is HTTP, but its body is not in valid chunks")
}

fn is_no_http2(error: &h2::Error) -> bool {
    let broken = matches!(error.reason(), Some(h2::Reason::FRAME_SIZE_ERROR | h2::Reason::PROTOCOL_ERROR));
    broken && !error.is_remote()
}

fn http2(error: &h2::Error) -> Option<String> {
    if let Some(io) = error.get_io() {
        return Some(file(io));
    }
    if is_no_http2(error) {
        return Some("what answers there does not speak HTTP/2, as a gRPC server does".to_owned());
    }
    let who = if error.is_remote() { "the other end, or a proxy before it," } else { "this end" };
    let did = if error.is_go_away() { "closed the connection" } else { "broke the stream off" };
    error.reason().map(|reason| format!("{who} {did} ({})", reason.description()))
}

/// A library's own text, for errors that have no message here, without the parts that only its authors understand.
fn plain(text: &str) -> String {
    let words = match text {
        "deadline has elapsed" | "operation timed out" => "timed out",
        "channel closed" | "connection closed" => "the connection was closed",
        "invalid format" | "empty string" => "it is not a URL",
        _ => return text.trim_end_matches(|c: char| c.is_whitespace()).to_owned(),
    };
    words.to_owned()
}
