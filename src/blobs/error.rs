//! Why objects can't be used: whether a retry may help or somebody must act, with messages for people.

use std::{error::Error, io};

use object_store::client::{HttpError, HttpErrorKind};

use crate::words::{self, Peer};

/// The error codes for a missing bucket. A missing object is another matter: the bucket may be fine.
const NO_BUCKET: [&str; 2] = ["NoSuchBucket", "ContainerNotFound"];

/// Why an object could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The store's URL or directory is unusable.
    #[error("blob store {0}")]
    Open(String),
    /// There is no such object.
    #[error("object {0} is missing")]
    Missing(String),
    /// The store failed; a retry may help.
    #[error("blob store failed: {}", failure(.0))]
    Failed(#[source] object_store::Error),
    /// The store refuses until somebody acts: a wrong key, a missing bucket, a directory that can't be written.
    #[error("blob store refuses: {0}")]
    Refused(#[source] object_store::Error),
    /// The objects here are not those of the database.
    #[error(
        "the blob store does not belong to this database: {0}. Check that the volume is mounted and --blobs is right"
    )]
    Foreign(String),
}

impl From<object_store::Error> for BlobError {
    fn from(error: object_store::Error) -> Self {
        match error {
            object_store::Error::NotFound { path, source } if !is_without_bucket(&*source) => Self::Missing(path),
            other => Self::of_write(other),
        }
    }
}

impl BlobError {
    /// The error of a write, where anything missing may come back, except the bucket.
    pub(super) fn of_write(error: object_store::Error) -> Self {
        if is_refusal(&error) { Self::Refused(error) } else { Self::Failed(error) }
    }

    pub(super) fn of_file(error: std::io::Error) -> Self {
        Self::of_write(object_store::Error::Generic { store: "directory", source: Box::new(error) })
    }

    /// Why the store failed, safe to show to clients: no address, no key, no secret. `None`: there are no such words.
    #[must_use]
    pub fn in_words(&self) -> Option<String> {
        use object_store::Error as E;
        let error = match self {
            Self::Failed(error) | Self::Refused(error) => error,
            Self::Foreign(_) => return Some("the objects are missing; check that the volume is mounted".into()),
            Self::Open(_) | Self::Missing(_) => return None,
        };
        match error {
            E::PermissionDenied { .. } => return Some("permission denied".into()),
            E::Unauthenticated { .. } => return Some("the credentials are refused".into()),
            E::NotFound { .. } => return Some("there is no such bucket".into()),
            _ if words::is_tls(error) => {
                return Some(
                    "its certificate is not trusted, or it does not use TLS; the server's log has the details".into(),
                );
            }
            _ => {}
        }
        let mut at = error.source();
        let mut kind = None;
        while let Some(error) = at {
            if let Some(status) = status_of(error) {
                return Some(format!("it answers {status}"));
            }
            if let Some(io) = error.downcast_ref::<std::io::Error>() {
                // Text from libraries may contain anything.
                let other = io.kind() == std::io::ErrorKind::Other;
                return Some(if other { io.kind().to_string() } else { words::file(io) });
            }
            kind = kind.or_else(|| error.downcast_ref::<HttpError>().map(HttpError::kind));
            at = error.source();
        }
        let words = match kind? {
            HttpErrorKind::Timeout => "timed out",
            HttpErrorKind::Connect => "no connection",
            HttpErrorKind::Interrupted | HttpErrorKind::Request => "the connection broke",
            _ => return None,
        };
        Some(words.to_owned())
    }
}

/// Whether a retry is useless until somebody acts.
fn is_refusal(error: &object_store::Error) -> bool {
    use object_store::Error as E;
    match error {
        E::PermissionDenied { .. } | E::Unauthenticated { .. } => return true,
        E::NotFound { source, .. } => return is_without_bucket(&**source),
        _ => {}
    }
    let mut at = error.source();
    while let Some(error) = at {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return matches!(
                io.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::NotADirectory
            );
        }
        at = error.source();
    }
    false
}

/// The library's message, which contains the store's answer; for a certificate or a full disk, ours.
fn failure(error: &object_store::Error) -> String {
    if words::is_tls(error) {
        return words::cause(Peer::ObjectStore, error);
    }
    match words::full_disk(error) {
        Some(words) => format!("{words} ({error})"),
        None => error.to_string(),
    }
}

fn is_without_bucket(error: &(dyn Error + 'static)) -> bool {
    let text = error.to_string();
    NO_BUCKET.iter().any(|code| text.contains(code))
}

/// The HTTP status of the store's answer. The library hides the type that has it, so it is read from the text; it is
/// only shown to people.
fn status_of(error: &(dyn Error + 'static)) -> Option<String> {
    let text = error.to_string();
    let (status, _) = text.strip_prefix("Server returned non-2xx status code: ")?.split_once(':')?;
    Some(status.to_owned())
}
