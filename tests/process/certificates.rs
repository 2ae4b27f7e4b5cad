//! Certificates that are not trusted, and ports that speak otherwise, told in words: to the command line, of a worker and of a
//! webhook's receiver.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpListener, TcpStream},
    sync::Arc,
    thread,
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::{
    ServerConfig, ServerConnection, Stream,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
};
use serde_json::Value;

use crate::{
    commands::{run, said},
    receiver::SECRET,
    server::Server,
    support::patience::{HANG, until},
};

/// Waits until the other side has gone: what is left unread would reset the connection before the answer is read.
fn read_to_end(socket: &mut TcpStream) {
    let _ = socket.set_read_timeout(Some(HANG));
    while let Ok(1..) = socket.read(&mut [0; 4_096]) {}
}

/// Serves one certificate to everybody; returns its port.
fn tls_port(certificate: CertificateDer<'static>, key: &KeyPair) -> u16 {
    tidemill::telemetry::install_tls_provider();
    let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
    let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key).unwrap();
    let (config, listener) = (Arc::new(config), TcpListener::bind("127.0.0.1:0").unwrap());
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            let config = config.clone();
            thread::spawn(move || {
                let mut tls = ServerConnection::new(config).unwrap();
                let _ = Stream::new(&mut tls, &mut socket).read(&mut [0; 1_024]);
                read_to_end(&mut socket);
            });
        }
    });
    port
}

/// Answers every connection with the same bytes; returns its port.
fn plain_port(answer: &'static [u8]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut socket in listener.incoming().flatten() {
            thread::spawn(move || {
                let _ = socket.read(&mut [0; 4_096]);
                let _ = socket.write_all(answer);
                let _ = socket.shutdown(Shutdown::Write);
                read_to_end(&mut socket);
            });
        }
    });
    port
}

/// Ports that nobody takes for a good server, with what is said of each: to the side that trusts only `ca.pem`.
struct Ports {
    folder: tempfile::TempDir,
    bad: Vec<(String, &'static str)>,
}

impl Ports {
    fn open() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params.clone(), KeyPair::generate().unwrap()).unwrap();
        // By the same name, with another key.
        let anew = CertifiedIssuer::self_signed(params.clone(), KeyPair::generate().unwrap()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "another authority");
        let stranger = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(folder.path().join("ca.pem"), authority.pem()).unwrap();
        let key = KeyPair::generate().unwrap();
        let of = |name: &str| {
            let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
            params.distinguished_name.push(DnType::CommonName, name);
            params
        };
        let alone = of("127.0.0.1").self_signed(&key).unwrap();
        let private = of("127.0.0.1").signed_by(&key, &stranger).unwrap();
        let outdated = of("127.0.0.1").signed_by(&key, &anew).unwrap();
        let named = of("gpu-1.example").signed_by(&key, &authority).unwrap();
        let mut expired = of("127.0.0.1");
        expired.not_before = rcgen::date_time_ymd(2001, 1, 1);
        expired.not_after = rcgen::date_time_ymd(2002, 1, 1);
        let expired = expired.signed_by(&key, &authority).unwrap();
        let good = of("127.0.0.1").signed_by(&key, &authority).unwrap();
        let https = |certificate: &rcgen::Certificate| {
            format!("https://127.0.0.1:{}", tls_port(certificate.der().clone(), &key))
        };
        let untrusted = "its certificate is self-signed or signed by an authority that is not trusted here: ";
        let bad = vec![
            (https(&alone), untrusted),
            (https(&private), untrusted),
            (
                https(&outdated),
                "another authority than the trusted one of the same name; was the authority made anew? Then",
            ),
            (
                https(&named),
                "its certificate is for gpu-1.example, not for 127.0.0.1: use a name that it has, or give it",
            ),
            (https(&expired), "its certificate has expired: renew it, and check this machine's clock"),
            (
                format!("https://127.0.0.1:{}", plain_port(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")),
                "it does not speak TLS on that port: is it http:// instead of https://?",
            ),
            (format!("http://127.0.0.1:{}", tls_port(good.der().clone(), &key)), "https://"),
            (format!("http://127.0.0.1:{}", plain_port(b"SSH-2.0-OpenSSH_9.2\r\n")), "not"),
        ];
        Self { folder, bad }
    }

    fn authority(&self) -> String {
        self.folder.path().join("ca.pem").to_str().unwrap().to_owned()
    }
}

/// What no message shows: the words of libraries.
fn assert_ours(text: &str) {
    for words in
        ["tls handshake", "invalid peer", "hyper", "h2 ", "http2 error", "rustls", "Custom", "Os {", "os error"]
    {
        assert!(!text.contains(words), "{words}: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_says_what_is_wrong_with_a_servers_certificate_or_port() {
    let ports = Ports::open();
    for (url, words) in &ports.bad {
        let refused = run(url, &["batch", "list", "--tls-ca", &ports.authority()]).await;
        let text = said(&refused);
        assert_eq!(refused.status.code(), Some(1), "{url}: {text}");
        // The client speaks HTTP/2 only, and its words of a port without it are its own.
        assert!(text.contains(words) || (url.starts_with("http:") && text.contains("https://")), "{url}: {text}");
        assert!(
            text.contains("tidemill server") || text.contains("--tls-ca FILE") || text.contains("http://…"),
            "{text}"
        );
        assert_ours(&text);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_says_what_is_wrong_with_the_certificate_or_port_of_a_worker_and_of_a_receiver() {
    let ports = Ports::open();
    let environment = vec![("SSL_CERT_FILE".to_owned(), ports.authority())];
    let mut flags = vec!["--webhook-allow-cidr", "127.0.0.0/8", "--webhook-secret", SECRET];
    flags.extend(ports.bad.iter().flat_map(|(url, _)| ["--worker", url]));
    let server = Server::in_environment(&flags, environment, None).await;
    let at = format!("http://{}", server.address());
    for (url, words) in &ports.bad {
        let mut text = String::new();
        until("it is probed", async || {
            let listed = run(&at, &["workers", "list", "--json"]).await;
            let listed = String::from_utf8(listed.stdout).unwrap();
            let mut workers = listed.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
            let worker = workers.find(|one| one["url"].as_str().unwrap().starts_with(url)).unwrap();
            text = worker["last_error"].as_str().unwrap_or_default().to_owned();
            !text.is_empty()
        })
        .await;
        assert!(text.contains(words), "{url}: {text}");
        assert_ours(&text);

        let made = run(&at, &["webhooks", "endpoints", "create", url, "--events", "completed"]).await;
        let made: Value = serde_json::from_slice(&made.stdout).unwrap_or_else(|_| panic!("{}", said(&made)));
        let id = made["endpoint"]["id"].as_str().unwrap();
        let tried = run(&at, &["webhooks", "endpoints", "test", id]).await;
        assert_eq!(tried.status.code(), Some(1));
        let came: Value = serde_json::from_slice(&tried.stdout).unwrap();
        let text = came["error_message"].as_str().unwrap();
        assert!(text.contains(words), "{url}: {text}");
        assert!(!words.starts_with("its certificate is self") || text.contains("public authority"), "{text}");
        assert_ours(text);
    }
}
