//! Uploads a file in chunks, and repeats the upload after a lost connection.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use futures::Stream;
use indicatif::ProgressBar;
use tokio::io::AsyncWriteExt;
use uuid::Uuid;

use super::{
    client::{Client, patiently, retry_and_say},
    meter,
};
use crate::pb::{self, upload_file_request::Payload};

/// Large enough to be cheap, small enough for a bar that moves.
const CHUNK: usize = 512 * 1024;

/// A file on its way to the server.
pub struct Upload {
    /// The file, or for a pipe an unlinked temporary file, which vanishes with the process.
    file: Arc<File>,
    filename: String,
    bytes: u64,
    expires_after: Option<Duration>,
}

impl Upload {
    /// Opens a file; "-" is stdin. Data from a pipe is first written to a temporary file, so that the upload can be
    /// repeated.
    ///
    /// # Errors
    /// The file can't be read.
    pub async fn open(path: &Path) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            meter::note_terminal();
            return Self::spool(tokio::io::stdin(), "stdin.jsonl".to_owned()).await;
        }
        let what = || path.display().to_string();
        let file = tokio::fs::File::open(path).await.with_context(what)?;
        let metadata = file.metadata().await.with_context(what)?;
        let filename = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if metadata.is_dir() {
            anyhow::bail!("{}: is a directory", what());
        }
        if !metadata.is_file() {
            return Self::spool(file, filename).await;
        }
        Ok(Self { file: Arc::new(file.into_std().await), filename, bytes: metadata.len(), expires_after: None })
    }

    async fn spool(mut from: impl tokio::io::AsyncRead + Unpin, filename: String) -> anyhow::Result<Self> {
        let spooled = tempfile::tempfile().context("temporary file")?;
        let mut to = tokio::fs::File::from_std(spooled.try_clone().context("temporary file")?);
        let copying = patiently(tokio::io::copy(&mut from, &mut to), |waited| {
            meter::note(&format!(
                "still reading {filename}, {} s: it is uploaded when it has been read to its end",
                waited.as_secs()
            ));
        });
        let bytes = copying.await.with_context(|| format!("reading {filename}"))?;
        to.flush().await.context("temporary file")?;
        Ok(Self { file: Arc::new(spooled), filename, bytes, expires_after: None })
    }

    /// Sets the file's name on the server.
    #[must_use]
    pub fn named(self, filename: Option<String>) -> Self {
        Self { filename: filename.unwrap_or(self.filename), ..self }
    }

    /// Sets how long the server keeps the file.
    #[must_use]
    pub fn expiring(self, expires_after: Option<Duration>) -> Self {
        Self { expires_after, ..self }
    }

    /// Sends the file. The same `request_id` again returns the file of the first upload.
    ///
    /// # Errors
    /// The file can't be read, or the server refuses it.
    pub async fn send(&self, client: &Client, request_id: Option<String>) -> anyhow::Result<pb::File> {
        let spec = pb::FileSpec {
            filename: self.filename.clone(),
            purpose: String::new(),
            total_bytes: i64::try_from(self.bytes).context("the file is too large")?,
            request_id: request_id.unwrap_or_else(|| Uuid::new_v4().to_string()),
            expires_after: self
                .expires_after
                .map(prost_types::Duration::try_from)
                .transpose()
                .context("the time span is too long")?,
        };
        let bar = meter::bytes("uploading", self.bytes, client.json);
        let read_error = Arc::new(Mutex::new(None));
        let upload = || async {
            bar.set_position(0);
            let chunks = chunks(self.file.clone(), spec.clone(), bar.clone(), read_error.clone());
            client.batches().upload_file(chunks).await
        };
        let sent = retry_and_say(upload, |_| {
            // A visible bar says all of this.
            if bar.is_hidden() {
                meter::note(&format!("uploading {}: {} of {} bytes sent", self.filename, bar.position(), self.bytes));
            }
        })
        .await;
        bar.finish_and_clear();
        // If the file can't be read to its end, the server sees an upload that breaks off.
        if let Some(error) = read_error.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error).with_context(|| format!("reading {}", self.filename));
        }
        sent.with_context(|| format!("upload of {}", self.filename))
    }
}

/// The spec, then the file's bytes. A read error ends the stream short of `total_bytes`, which the server refuses.
fn chunks(
    file: Arc<File>,
    spec: pb::FileSpec,
    bar: ProgressBar,
    read_error: Arc<Mutex<Option<io::Error>>>,
) -> impl Stream<Item = pb::UploadFileRequest> + Send + 'static {
    async_stream::stream! {
        yield pb::UploadFileRequest { payload: Some(Payload::Spec(spec)) };
        let mut at = 0;
        loop {
            let from = file.clone();
            let read = tokio::task::spawn_blocking(move || chunk(&from, at)).await;
            match read.map_err(io::Error::from).flatten() {
                Ok(chunk) if chunk.is_empty() => return,
                Ok(chunk) => {
                    at += chunk.len() as u64;
                    bar.inc(chunk.len() as u64);
                    yield pb::UploadFileRequest { payload: Some(Payload::Chunk(chunk)) };
                }
                Err(error) => {
                    *read_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return;
                }
            }
        }
    }
}

/// The chunk at byte `at`, full unless it is the last. Two tries of an upload may read at the same time, so the file's
/// own position is not used.
fn chunk(file: &File, at: u64) -> io::Result<Bytes> {
    let mut chunk = vec![0; CHUNK];
    let mut filled = 0;
    while filled < CHUNK {
        match file.read_at(&mut chunk[filled..], at + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    chunk.truncate(filled);
    Ok(chunk.into())
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    async fn sent(upload: &Upload) -> (Vec<usize>, Vec<u8>) {
        let stream = chunks(upload.file.clone(), pb::FileSpec::default(), ProgressBar::hidden(), Arc::default());
        let all: Vec<_> = stream.collect().await;
        assert!(matches!(all[0].payload, Some(Payload::Spec(_))));
        let data = all[1..].iter().map(|message| match &message.payload {
            Some(Payload::Chunk(data)) => data.clone(),
            other => panic!("{other:?}"),
        });
        let data: Vec<_> = data.collect();
        (data.iter().map(bytes::Bytes::len).collect(), data.concat())
    }

    #[tokio::test]
    async fn a_file_goes_out_whole_in_full_chunks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in.jsonl");
        for size in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7] {
            let bytes: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
            std::fs::write(&path, &bytes).unwrap();
            let upload = Upload::open(&path).await.unwrap();
            assert_eq!((upload.bytes, upload.filename.as_str()), (size as u64, "in.jsonl"));
            let (sizes, data) = sent(&upload).await;
            assert_eq!(data, bytes);
            assert!(sizes.iter().rev().skip(1).all(|size| *size == CHUNK), "{sizes:?}");
        }
    }

    #[tokio::test]
    async fn a_second_try_is_the_same_upload() {
        let (fake, url) = super::super::fake::Fake::start("").await;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![b'x'; CHUNK + 1]).unwrap();
        let upload = Upload::open(file.path()).await.unwrap();
        let sent = upload.send(&super::super::fake::client(&url), None).await.unwrap();
        assert_eq!(sent.bytes, CHUNK as i64 + 1);
        let log = fake.log();
        assert_eq!(log.uploads.len(), 2);
        assert_eq!(log.uploads[0], log.uploads[1], "the same id and all bytes again");
        assert!(!log.uploads[0].0.is_empty());
    }

    #[tokio::test]
    async fn a_pipe_is_spooled_and_left_nowhere() {
        let upload = Upload::spool(&b"line\n"[..], "stdin.jsonl".into()).await.unwrap();
        assert_eq!(upload.bytes, 5);
        assert_eq!(sent(&upload).await.1, b"line\n");
        assert_eq!(std::os::unix::fs::MetadataExt::nlink(&upload.file.metadata().unwrap()), 0, "it has no name");
    }

    #[tokio::test]
    async fn what_can_not_be_read_is_named() {
        let error = Upload::open(Path::new("/nowhere/in.jsonl")).await.err().unwrap();
        assert!(format!("{error:#}").starts_with("/nowhere/in.jsonl: "), "{error:#}");
        assert!(Upload::open(Path::new("/")).await.is_err());
    }
}
