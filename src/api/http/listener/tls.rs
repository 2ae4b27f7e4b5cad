//! TLS from PEM files.

use std::{path::Path, sync::Arc};

use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    api::server::{ServeError, TlsFiles},
    words::{self, Peer},
};

/// Reads the files. Offers HTTP/2 first, then HTTP/1.1.
///
/// # Errors
/// [`ServeError`]: a file can't be read, or is not what it should be.
pub(in crate::api) async fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, ServeError> {
    let chain = certificates(&files.cert).await?;
    let key = PrivateKeyDer::from_pem_slice(&read(&files.key).await?)
        .map_err(|_| bad(&files.key, "holds no private key in PEM form (PKCS #8, PKCS #1 or SEC 1, not encrypted)"))?;
    let builder = ServerConfig::builder();
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(path).await? {
                roots.add(certificate).map_err(|error| {
                    bad(path, format!("contains an unusable certificate: {}", words::cause(Peer::Server, &error)))
                })?;
            }
            let verifier = WebPkiClientVerifier::builder(Arc::new(roots)).build();
            builder.with_client_cert_verifier(
                verifier.map_err(|error| bad(path, format!("contains no certificate authority ({error})")))?,
            )
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(|error| {
        let key = files.key.display();
        match error {
            rustls::Error::InconsistentKeys(_) => {
                bad(&files.cert, format!("is not the certificate of the key in {key}"))
            }
            error => {
                let why = words::cause(Peer::Server, &error);
                bad(&files.cert, format!("can't be used with the key in {key}: {why}"))
            }
        }
    })?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ServeError> {
    let pem = read(path).await?;
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        Ok(_) | Err(_) => Err(bad(path, "holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)")),
    }
}

async fn read(path: &Path) -> Result<Vec<u8>, ServeError> {
    tokio::fs::read(path).await.map_err(|source| ServeError::TlsFile { path: path.to_owned(), source })
}

fn bad(path: &Path, problem: impl Into<String>) -> ServeError {
    ServeError::Tls { path: path.to_owned(), problem: problem.into() }
}
