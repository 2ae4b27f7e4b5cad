//! HTTP clients that can be made on any machine.
//!
//! Without CA certificates (a minimal container image) reqwest makes no client at all, not even for plain HTTP. Here it gets
//! one, and only calls that need the certificates fail, with the reason.

use std::sync::Arc;

use reqwest::{Client, ClientBuilder};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, ServerName, UnixTime},
};

use crate::words::{self, Peer};

const NO_AUTHORITIES: &str = "this machine has no CA certificates to check others' certificates with: install them \
                              (ca-certificates), or name a file of them in SSL_CERT_FILE";

/// The most headers of an answer that are read; a gateway that adds tracing and debugging to each sends some dozens.
const MOST_HEADERS: usize = 256;

/// A client as `configure` wants it. It reads what other clients read, although HTTP forbids it: headers that go over
/// several lines, and headers with invalid names, which it skips.
///
/// # Errors
/// [`reqwest::Error`]: it can't be made, and not for want of CA certificates.
pub fn client(configure: impl Fn(ClientBuilder) -> ClientBuilder) -> Result<Client, reqwest::Error> {
    let lenient = || {
        Client::builder()
            .http1_max_headers(MOST_HEADERS)
            .http1_ignore_invalid_headers_in_responses(true)
            .http1_allow_spaces_after_header_name_in_responses(true)
            .http1_allow_obsolete_multiline_headers_in_responses(true)
    };
    configure(lenient()).build().or_else(|error| {
        let trusting_nobody = trusting_nobody(CryptoProvider::get_default().cloned());
        let client = configure(lenient()).tls_backend_preconfigured(trusting_nobody).build()?;
        tracing::warn!(cause = %words::cause(Peer::Worker, &error), "https:// can't be called: {NO_AUTHORITIES}");
        Ok(client)
    })
}

fn trusting_nobody(provider: Option<Arc<CryptoProvider>>) -> ClientConfig {
    let provider = provider.unwrap_or_else(|| Arc::new(ring::default_provider()));
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("ring has TLS 1.2 and 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Nobody(provider)))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config
}

/// Refuses every certificate, and says why.
#[derive(Debug)]
struct Nobody(Arc<CryptoProvider>);

impl ServerCertVerifier for Nobody {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Err(Error::General(NO_AUTHORITIES.to_owned()))
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General(NO_AUTHORITIES.to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General(NO_AUTHORITIES.to_owned()))
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
