//! TLS, with and without client certificates.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tidemill::{
    api::{ServeError, ServerOptions, TlsFiles},
    pb::{self, worker_admin_client::WorkerAdminClient},
};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use crate::support::Server;

struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: tempfile::TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.pem"), issuer.pem()).unwrap();
        Self { issuer, folder }
    }

    /// A certificate and its key.
    fn sign(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let cert = CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        (cert.pem(), key.serialize_pem())
    }

    fn files(&self, clients: bool) -> TlsFiles {
        let (cert, key) = self.sign("localhost");
        let path = |name: &str| self.folder.path().join(name);
        std::fs::write(path("cert.pem"), cert).unwrap();
        std::fs::write(path("key.pem"), key).unwrap();
        TlsFiles { cert: path("cert.pem"), key: path("key.pem"), client_ca: clients.then(|| path("ca.pem")) }
    }

    fn client(&self) -> ClientTlsConfig {
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(self.issuer.pem())).domain_name("localhost")
    }
}

async fn list(server: &Server, tls: ClientTlsConfig) -> Result<usize, Box<dyn std::error::Error>> {
    let channel = Endpoint::from_shared(format!("https://{}", server.address))?.tls_config(tls)?.connect().await?;
    let mut client = WorkerAdminClient::new(channel);
    Ok(client.list_workers(pb::ListWorkersRequest {}).await?.into_inner().workers.len())
}

#[tokio::test]
async fn a_client_that_knows_the_authority_gets_in() {
    let authority = Authority::new();
    let options = ServerOptions { tls: Some(authority.files(false)), ..ServerOptions::default() };
    let server = Server::with(options).await;
    assert_eq!(list(&server, authority.client()).await.unwrap(), 0);
    assert!(list(&server, Authority::new().client()).await.is_err());
    assert!(reqwest::get(server.url("/healthz")).await.is_err(), "plain HTTP must not work");
}

#[tokio::test]
async fn clients_that_speak_only_http_1_get_in_as_well() {
    let authority = Authority::new();
    let options = ServerOptions { tls: Some(authority.files(false)), ..ServerOptions::default() };
    let server = Server::with(options).await;
    let url = format!("https://localhost:{}/healthz", server.address.port());
    let root = reqwest::Certificate::from_pem(authority.issuer.pem().as_bytes()).unwrap();
    // The first two choose by ALPN, the third does not know it.
    let offers: [&[&[u8]]; 3] = [&[b"http/1.1"], &[b"h2", b"http/1.1"], &[]];
    for (offer, version) in
        offers.into_iter().zip([reqwest::Version::HTTP_11, reqwest::Version::HTTP_2, reqwest::Version::HTTP_11])
    {
        let client = reqwest::Client::builder().tls_certs_only([root.clone()]);
        let client = match offer {
            [b"http/1.1"] => client.http1_only(),
            [] => client.tls_backend_preconfigured({
                let mut roots = rustls::RootCertStore::empty();
                roots.add(authority.issuer.der().clone()).unwrap();
                rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth()
            }),
            _ => client,
        };
        let answer = client.build().unwrap().get(&url).send().await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.version()), (200, version), "{offer:?}");
    }
}

#[tokio::test]
async fn with_an_authority_for_clients_they_need_its_certificate() {
    let authority = Authority::new();
    let options = ServerOptions { tls: Some(authority.files(true)), ..ServerOptions::default() };
    let server = Server::with(options).await;
    let (cert, key) = authority.sign("client");
    assert_eq!(list(&server, authority.client().identity(Identity::from_pem(cert, key))).await.unwrap(), 0);
    assert!(list(&server, authority.client()).await.is_err());
    let (cert, key) = Authority::new().sign("client");
    assert!(list(&server, authority.client().identity(Identity::from_pem(cert, key))).await.is_err());
}

#[tokio::test]
async fn files_that_are_not_there_or_not_pem_are_named() {
    let authority = Authority::new();
    let mut files = authority.files(false);
    files.key = "/nowhere/key.pem".into();
    let mut server = Server::with(ServerOptions { tls: Some(files.clone()), ..ServerOptions::default() }).await;
    let error = (&mut server.running).await.unwrap().unwrap_err();
    assert!(matches!(&error, ServeError::TlsFile { path, .. } if path.ends_with("key.pem")), "{error}");
    files.key = files.cert.clone();
    let mut server = Server::with(ServerOptions { tls: Some(files), ..ServerOptions::default() }).await;
    let error = (&mut server.running).await.unwrap().unwrap_err();
    assert!(matches!(&error, ServeError::Tls { path, .. } if path.ends_with("cert.pem")), "{error}");
}
