use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    sync::Arc,
    thread,
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    ServerConfig, ServerConnection, Stream,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
};

use super::*;

/// Serves one certificate to everybody; returns its port.
fn tls_server(certificate: CertificateDer<'static>, key: &KeyPair) -> u16 {
    crate::telemetry::install_tls_provider();
    let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    let (config, listener) = (Arc::new(config), TcpListener::bind("127.0.0.1:0").unwrap());
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            let mut tls = ServerConnection::new(config.clone()).unwrap();
            let _ = Stream::new(&mut tls, &mut socket).read(&mut [0; 1_024]);
        }
    });
    port
}

/// Answers every connection with the same bytes; returns its port.
fn plain_server(answer: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            let _ = socket.read(&mut [0; 1_024]);
            let _ = socket.write_all(answer);
        }
    });
    port
}

fn client() -> reqwest::ClientBuilder {
    crate::telemetry::install_tls_provider();
    reqwest::Client::builder().no_proxy()
}

async fn told(client: reqwest::ClientBuilder, url: &str, peer: Peer) -> String {
    let client = client.build().unwrap();
    let answer = async { client.get(url).send().await?.bytes().await };
    cause(peer, &answer.await.unwrap_err())
}

#[tokio::test]
async fn a_self_signed_certificate_is_told_with_what_to_do() {
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    let url = format!("https://localhost:{}", tls_server(certificate.der().clone(), &key));
    for (peer, todo) in [
        (Peer::Worker, "SSL_CERT_FILE"),
        (Peer::Receiver, "public authority"),
        (Peer::Server, "--tls-ca FILE"),
        (Peer::Database, "sslrootcert=FILE"),
        (Peer::ObjectStore, "SSL_CERT_FILE"),
    ] {
        let text = told(client(), &url, peer).await;
        assert!(
            text.starts_with("its certificate is self-signed or signed by an authority that is not trusted"),
            "{text}"
        );
        assert!(text.contains(todo), "{text}");
    }
}

#[tokio::test]
async fn an_authoritys_own_certificate_is_told_apart() {
    // As `openssl req -x509` makes it.
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = params.self_signed(&key).unwrap();
    let url = format!("https://localhost:{}", tls_server(certificate.der().clone(), &key));
    let root = reqwest::Certificate::from_der(certificate.der()).unwrap();
    let text = told(client().tls_certs_only([root]), &url, Peer::Worker).await;
    assert!(text.contains("CA:TRUE") && text.contains("basicConstraints=CA:FALSE"), "{text}");
}

#[tokio::test]
async fn a_private_authority_and_a_wrong_name_are_told_apart() {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["gpu-1.example".to_owned(), "gpu-2.example".to_owned()]).unwrap();
    let certificate = params.signed_by(&key, &authority).unwrap();
    let url = format!("https://localhost:{}", tls_server(certificate.der().clone(), &key));
    assert!(told(client(), &url, Peer::Worker).await.contains("an authority that is not trusted here"));
    let root = reqwest::Certificate::from_der(authority.der()).unwrap();
    let text = told(client().tls_certs_only([root]), &url, Peer::Worker).await;
    assert!(
        text.starts_with("its certificate is for gpu-1.example, gpu-2.example, not for localhost: use a name"),
        "{text}"
    );
}

#[tokio::test]
async fn an_expired_certificate_is_told() {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    params.not_before = rcgen::date_time_ymd(2001, 1, 1);
    params.not_after = rcgen::date_time_ymd(2002, 1, 1);
    let certificate = params.self_signed(&key).unwrap();
    let url = format!("https://localhost:{}", tls_server(certificate.der().clone(), &key));
    let root = reqwest::Certificate::from_der(certificate.der()).unwrap();
    let text = told(client().tls_certs_only([root]), &url, Peer::Receiver).await;
    assert!(text.starts_with("its certificate has expired"), "{text}");
}

#[tokio::test]
async fn other_connections_fail_in_words() {
    let port = plain_server(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf");
    let text = told(client(), &format!("http://127.0.0.1:{port}"), Peer::Worker).await;
    assert_eq!(text, "the connection was closed before the whole answer came");
    let text = told(client(), &format!("https://127.0.0.1:{port}"), Peer::Worker).await;
    assert_eq!(text, "it does not speak TLS on that port: is it http:// instead of https://?");
    let text =
        told(client(), &format!("http://127.0.0.1:{}", plain_server(b"SSH-2.0-OpenSSH_9.2\r\n")), Peer::Worker).await;
    assert_eq!(text, "what it answers is not HTTP: does it speak https:// on that port, or another protocol?");
    let text = told(client(), &format!("http://127.0.0.1:{}", plain_server(b"")), Peer::Worker).await;
    assert!(text.starts_with("the connection was "), "{text}");
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_eq!(
        told(client(), &format!("http://{closed}"), Peer::Worker).await,
        "connection refused: nothing listens there"
    );
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let impatient = client().timeout(std::time::Duration::from_millis(20));
    let text = told(impatient, &format!("http://{}", silent.local_addr().unwrap()), Peer::Worker).await;
    assert_eq!(text, "timed out");
    let text = told(client(), "http://no-such-host.invalid/", Peer::Receiver).await;
    assert!(text.starts_with("the host name does not resolve"), "{text}");
}

/// An answer with 300 headers.
fn many_headers() -> &'static [u8] {
    let headers: String = (0..300).map(|at| format!("x-{at}: y\r\n")).collect();
    Box::leak(format!("HTTP/1.1 200 OK\r\n{headers}\r\n").into_boxed_str()).as_bytes()
}

#[tokio::test]
async fn an_answer_of_http_that_can_not_be_read_is_told_from_another_protocol() {
    let get = async |answer| {
        let client = crate::https::client(reqwest::ClientBuilder::no_proxy).unwrap();
        let sent = client.get(format!("http://127.0.0.1:{}", plain_server(answer))).send().await;
        match sent {
            Ok(response) => response.bytes().await.err(),
            Err(error) => Some(error),
        }
    };
    crate::telemetry::install_tls_provider();
    for (answer, words) in [
        (many_headers(), "too many headers"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n{}", "a header that is not valid"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}", "a header that is not valid"),
        (b"HTTP/1.1 abc OK\r\n\r\n{}", "its status is not one"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", "not in valid chunks"),
    ] {
        let error = get(answer).await.unwrap();
        let told = unreadable_answer(&error).unwrap_or_else(|| panic!("{words}: {error:?}"));
        assert!(told.starts_with("its answer is HTTP, but ") && told.contains(words), "{told}");
        assert_eq!(cause(Peer::Worker, &error), told);
    }
    for answer in [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"ICY 200 OK\r\n\r\n", b"\x15\x03\x01\x00\x02\x02\x50", b""] {
        assert_eq!(unreadable_answer(&get(answer).await.unwrap()), None);
    }
    for answer in [
        &b"HTTP/1.1 200 OK\r\nx-n\xe4me: \xe4\xff\r\ncontent-length: 2\r\n\r\n{}"[..],
        b"HTTP/1.1 200 OK\r\nx-name: a\r\n b\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nx-name : a\r\ncontent-length : 2\r\n\r\n{}",
    ] {
        assert!(get(answer).await.is_none(), "other clients read that");
    }
}

#[tokio::test]
async fn no_word_of_ours_names_a_library() {
    let client = client().build().unwrap();
    let builder = client.get("nothing").send().await.unwrap_err();
    assert_eq!(cause(Peer::Worker, &builder), "it does not begin with a scheme such as http://");
    let builder = client.get("http://h/").header("a", "\n").send().await.unwrap_err();
    let text = cause(Peer::Worker, &builder);
    assert!(!text.contains("builder") && !text.contains("http::"), "{text}");
}

#[test]
fn what_is_no_url_is_told_in_words() {
    for (text, words) in [
        ("gpu-1", "it does not begin with a scheme such as http://"),
        ("", "it does not begin with a scheme such as http://"),
        ("http://", "it names no host"),
        ("http://h:99999", "its port is not a number from 0 to 65535"),
        ("http://1.2.3.999", "its host looks like an IPv4 address but is not one"),
        ("http://[::zz]", "its host in brackets is not an IPv6 address"),
        ("http://a b", "its host name holds characters that no host name has"),
    ] {
        assert_eq!(url(url::Url::parse(text).unwrap_err()), words, "{text:?}");
    }
}

#[test]
fn what_the_system_refuses_is_told_in_words() {
    for (number, words) in [
        (28, "no space is left on the disk"),
        (24, "this process has as many files and connections open as it may: raise its limit (ulimit -n)"),
        (13, "permission denied"),
        (30, "the file system is read-only"),
        (122, "the disk quota is used up"),
        (113, "no route to that address"),
        (98, "another program listens there already: stop it, or choose another port"),
        (21, "Is a directory"),
    ] {
        assert_eq!(file(&io::Error::from_raw_os_error(number)), words);
    }
    let full = io::Error::from_raw_os_error(28);
    assert!(full_disk(&io::Error::other(full)).is_some(), "also beneath another");
    assert_eq!(full_disk(&io::Error::from_raw_os_error(13)), None);
}
