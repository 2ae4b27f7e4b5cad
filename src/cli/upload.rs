//! Uploads a file in chunks, so that it may be tried again after a lost connection.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context;
use bytes::BytesMut;
use futures::Stream;
use indicatif::ProgressBar;
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncWriteExt},
};
use uuid::Uuid;

use super::{
    client::{Client, retry_and_say},
    meter,
};
use crate::pb::{self, upload_file_request::Payload};

/// Large enough to be cheap, small enough for a bar that moves.
const CHUNK: usize = 512 * 1024;

/// A file on its way to the server.
pub struct Upload {
    path: PathBuf,
    filename: String,
    bytes: u64,
    /// Holds what came from a pipe, until the upload is over.
    _spooled: Option<tempfile::TempPath>,
}

impl Upload {
    /// Opens a file; "-" is stdin. What comes from a pipe is spooled to a temporary file first, so that the upload can be
    /// tried again.
    ///
    /// # Errors
    /// The file can't be read.
    pub async fn open(path: &Path) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            return Self::spool(tokio::io::stdin(), "stdin.jsonl".to_owned()).await;
        }
        let what = || path.display().to_string();
        let file = File::open(path).await.with_context(what)?;
        let metadata = file.metadata().await.with_context(what)?;
        let filename = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if metadata.is_dir() {
            anyhow::bail!("{}: is a directory", what());
        }
        if !metadata.is_file() {
            return Self::spool(file, filename).await;
        }
        Ok(Self { path: path.to_owned(), filename, bytes: metadata.len(), _spooled: None })
    }

    async fn spool(mut from: impl tokio::io::AsyncRead + Unpin, filename: String) -> anyhow::Result<Self> {
        let path = tempfile::NamedTempFile::new().context("temporary file")?.into_temp_path();
        let mut to = File::create(&path).await.context("temporary file")?;
        let bytes = tokio::io::copy(&mut from, &mut to).await.with_context(|| format!("reading {filename}"))?;
        to.flush().await.context("temporary file")?;
        Ok(Self { path: path.to_path_buf(), filename, bytes, _spooled: Some(path) })
    }

    /// Gives the file another name on the server.
    #[must_use]
    pub fn named(self, filename: Option<String>) -> Self {
        Self { filename: filename.unwrap_or(self.filename), ..self }
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
        };
        let bar = meter::bytes("uploading", self.bytes, client.json);
        let read_error = Arc::new(Mutex::new(None));
        let upload = || async {
            bar.set_position(0);
            let chunks = chunks(self.path.clone(), spec.clone(), bar.clone(), read_error.clone());
            client.batches().upload_file(chunks).await
        };
        let sent = retry_and_say(upload, |_| {
            // Where there is a bar, it says all of it.
            if bar.is_hidden() {
                meter::note(&format!("uploading {}: {} of {} bytes sent", self.filename, bar.position(), self.bytes));
            }
        })
        .await;
        bar.finish_and_clear();
        // A file that could not be read to its end looks to the server like an upload that broke off.
        if let Some(error) = read_error.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error).with_context(|| format!("reading {}", self.path.display()));
        }
        sent.with_context(|| format!("upload of {}", self.filename))
    }
}

/// The spec, then the file's bytes. A read error ends the stream short of `total_bytes`, which the server refuses.
fn chunks(
    path: PathBuf,
    spec: pb::FileSpec,
    bar: ProgressBar,
    read_error: Arc<Mutex<Option<io::Error>>>,
) -> impl Stream<Item = pb::UploadFileRequest> + Send + 'static {
    async_stream::stream! {
        yield pb::UploadFileRequest { payload: Some(Payload::Spec(spec)) };
        let mut file = match File::open(&path).await {
            Ok(file) => file,
            Err(error) => {
                *read_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                return;
            }
        };
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(CHUNK);
            // A chunk is filled up: a pipe of small reads would otherwise make small messages.
            while buffer.len() < CHUNK {
                match file.read_buf(&mut buffer).await {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(error) => {
                        *read_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                        return;
                    }
                }
            }
            if buffer.is_empty() {
                return;
            }
            let size = buffer.len().min(CHUNK);
            let chunk = buffer.split_to(size).freeze();
            bar.inc(size as u64);
            yield pb::UploadFileRequest { payload: Some(Payload::Chunk(chunk)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;

    async fn sent(path: &Path) -> (Vec<usize>, Vec<u8>) {
        let stream = chunks(path.to_owned(), pb::FileSpec::default(), ProgressBar::hidden(), Arc::default());
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
            let (sizes, data) = sent(&path).await;
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
        let path = upload.path.clone();
        assert_eq!(std::fs::read(&path).unwrap(), b"line\n");
        drop(upload);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_can_not_be_read_is_named() {
        let error = Upload::open(Path::new("/nowhere/in.jsonl")).await.err().unwrap();
        assert!(format!("{error:#}").starts_with("/nowhere/in.jsonl: "), "{error:#}");
        assert!(Upload::open(Path::new("/")).await.is_err());
    }
}
