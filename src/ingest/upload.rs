//! One upload: its object is written while its lines are checked.

use std::{path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::{IngestError, Limits, LineReport, Validated, Validator, report::Fault as LineFault};
use crate::{
    blobs::{Blobs, ObjectWriter},
    domain::{BatchError, Completion, File, FileId, FileKind, Owner, Timestamp, request_line::Problem},
    fault::{self, Fault},
    store::{InsertedFile, Origin, Store},
};

/// Bytes checked at a time: enough that handing them to another thread costs little, and few enough to need little
/// memory.
const CHECK_BYTES: usize = 256 * 1024;
/// The most bytes that wait for validation. Beyond that, nothing more is read from the client.
const AHEAD_BYTES: usize = 2 * 1024 * 1024;

/// Accepts uploads. Cheap to clone.
#[derive(Clone)]
pub struct Ingest {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) store: Store,
    pub(super) blobs: Blobs,
    pub(super) limits: Limits,
    scratch: PathBuf,
}

/// Describes a new upload.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewUpload {
    /// The owner of the file.
    pub owner: Owner,
    /// A name for people.
    pub filename: String,
    /// The size in bytes, if it is announced. An upload of another size is refused.
    pub total_bytes: Option<u64>,
    /// The client's idempotency key.
    pub request_id: Option<String>,
    /// How long the file stays after it is complete. `None`: until it is deleted.
    pub expires_after: Option<Duration>,
    /// A file with bad lines is kept, and a batch of it fails. Not if its first line is no JSON: that is no JSONL.
    pub keeps_bad: bool,
    /// The upload in parts that becomes this file.
    pub completes: Option<Completion>,
}

/// The result of beginning an upload.
pub enum Begun {
    /// A new upload, which takes the bytes.
    Upload(Box<Upload>),
    /// The file that an earlier upload with this request id made: there is nothing to upload.
    Existing(Box<File>),
}

impl Ingest {
    /// `scratch` is a folder for temporary files without names: up to about 30 bytes and the `custom_id` for each
    /// request of the running uploads.
    #[must_use]
    pub fn new(store: Store, blobs: Blobs, limits: Limits, scratch: PathBuf) -> Self {
        Self { inner: Arc::new(Inner { store, blobs, limits, scratch }) }
    }

    /// The limits of a file.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.inner.limits
    }

    /// Begins an upload.
    ///
    /// # Errors
    /// [`IngestError::TooManyBytes`] if the announced size is too large; the store's and the blob store's.
    pub async fn begin(&self, spec: NewUpload) -> Result<Begun, IngestError> {
        let Inner { store, blobs, limits, scratch } = &*self.inner;
        if let Some(request_id) = &spec.request_id
            && let Some(file) = store.file_by_request_id(&spec.owner, request_id).await?
        {
            return Ok(Begun::Existing(Box::new(file)));
        }
        if spec.total_bytes.is_some_and(|bytes| bytes > limits.max_bytes) {
            return Err(IngestError::TooManyBytes { max: limits.max_bytes });
        }
        let id = FileId::generate();
        let object_key = format!("inputs/{id}");
        // From here on, an object that a killed process leaves is recorded as garbage.
        store.begin_upload(&object_key).await?;
        // Made before the object is begun, so that everything after it is cleaned up.
        let mut upload = Upload {
            inner: self.inner.clone(),
            spec,
            id,
            object_key,
            object: None,
            check: Checking::Idle(Box::new(Validator::new(*limits, scratch.clone()))),
            pending: Vec::new(),
            pending_bytes: 0,
            received: 0,
            garbage: true,
        };
        upload.object = Some(blobs.writer(&upload.object_key).await?);
        Ok(Begun::Upload(Box::new(upload)))
    }
}

/// A running upload. If it is dropped before [`Upload::finish`] has returned a file, it leaves nothing behind.
pub struct Upload {
    inner: Arc<Inner>,
    spec: NewUpload,
    id: FileId,
    object_key: String,
    /// `None` after the upload has failed because of a bad line, or is complete.
    object: Option<ObjectWriter>,
    check: Checking,
    /// Chunks that are written but not yet checked.
    pending: Vec<Bytes>,
    /// Their size in bytes.
    pending_bytes: usize,
    received: u64,
    /// Whether the object is garbage: no row names it, and none will.
    garbage: bool,
}

/// The validator, or the task that runs it. It runs on a blocking thread for a few hundred kilobytes at a time, so a
/// slow client blocks no thread.
enum Checking {
    Idle(Box<Validator>),
    Busy(JoinHandle<(Box<Validator>, Result<(), IngestError>)>),
    /// It has failed, and the upload with it.
    Gone,
}

impl Upload {
    /// Sets how long the file stays after it is complete.
    pub fn set_expiry(&mut self, after: Option<Duration>) {
        self.spec.expires_after = after;
    }

    /// Takes the next bytes. Returns when there is room for more.
    ///
    /// # Errors
    /// [`IngestError`]: then the upload has ended. Bad lines are told by [`Upload::finish`].
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), IngestError> {
        self.received += bytes.len() as u64;
        let announced = self.spec.total_bytes.unwrap_or(u64::MAX);
        if self.received > announced {
            return Err(IngestError::SizeMismatch { expected: announced, received: self.received });
        }
        // A message of a single byte takes more memory than that.
        self.pending_bytes += bytes.len() + size_of::<Bytes>();
        self.pending.push(bytes.clone());
        let busy = matches!(&self.check, Checking::Busy(running) if !running.is_finished());
        if self.pending_bytes >= if busy { AHEAD_BYTES } else { CHECK_BYTES } {
            self.check_pending().await?;
        }
        // The lines are checked meanwhile.
        if let Some(object) = &mut self.object {
            object.write(bytes).await?;
        }
        Ok(())
    }

    /// Completes the file. When this returns, its object is durable and its row exists. If another upload with the
    /// client's request id has made a file meanwhile, that one is returned.
    ///
    /// # Errors
    /// [`IngestError`]: then there is no file and nothing is left behind.
    pub async fn finish(mut self) -> Result<File, IngestError> {
        let file = self.complete().await;
        if self.garbage {
            self.garbage = false;
            abandon(&self.inner, self.object.take(), &self.object_key).await;
        }
        file
    }

    /// Reports lines that the caller has found to be bad and will write as blank ones. Only before the first write.
    pub(super) fn report(&mut self, bad: Vec<(u64, String, Problem)>) {
        if let Checking::Idle(validator) = &mut self.check {
            for (line, custom_id, problem) in bad {
                validator.report(line, Some(custom_id), LineFault::from(&problem), problem.to_string());
            }
        }
    }

    async fn complete(&mut self) -> Result<File, IngestError> {
        if let Some(expected) = self.spec.total_bytes.filter(|bytes| *bytes != self.received) {
            return Err(IngestError::SizeMismatch { expected, received: self.received });
        }
        self.check_pending().await?;
        let validator = self.validator().await?;
        let (bytes, crc32c) = (validator.bytes(), validator.crc32c());
        let validated = tokio::task::spawn_blocking(move || validator.finish());
        let (file, content) = match validated.await.map_err(|_| IngestError::Interrupted)? {
            Ok(validated) => {
                let (file, segments) = self.file(validated);
                (file, Ok(segments))
            }
            Err(IngestError::Invalid { errors, .. }) if self.spec.keeps_bad && !is_no_jsonl(&errors) => {
                let problems: Vec<BatchError> = errors.into_iter().map(LineReport::into_error).collect();
                (self.bad_file(bytes, crc32c), Err(problems))
            }
            Err(error) => return Err(error),
        };
        let object = self.object.take().ok_or(IngestError::Interrupted)?;
        // From here on it is not always known whether the object exists nor, if a commit's answer is lost, whether a
        // row names it. So the object is left alone: if its row exists it belongs to the file, otherwise the garbage
        // row of the upload still names it.
        self.garbage = false;
        object.finish().await?;
        fault::point(Fault::UploadObject);
        let store = &self.inner.store;
        let origin = Origin { request_id: self.spec.request_id.as_deref(), completes: self.spec.completes.as_ref() };
        let inserted = match &content {
            Ok(segments) => store.insert_file(&file, origin, segments).await?,
            Err(problems) => store.insert_bad_file(&file, origin, problems).await?,
        };
        match inserted {
            InsertedFile::New => Ok(file),
            InsertedFile::Existing(existing) => {
                self.garbage = true;
                Ok(*existing)
            }
            InsertedFile::UploadEnded => {
                self.garbage = true;
                Err(IngestError::UploadEnded)
            }
        }
    }

    /// A file of which nothing can be run.
    fn bad_file(&self, bytes: u64, crc32c: u32) -> File {
        let created_at = Timestamp::now();
        File {
            id: self.id.clone(),
            owner: self.spec.owner.clone(),
            kind: FileKind::Input,
            filename: self.spec.filename.clone(),
            bytes: i64::try_from(bytes).unwrap_or(i64::MAX),
            line_count: 0,
            models: Vec::new(),
            endpoint: None,
            created_at,
            expires_at: self.spec.expires_after.map(|span| created_at.plus(span)),
            object_key: Some(self.object_key.clone()),
            crc32c: Some(crc32c),
        }
    }

    fn file(&self, validated: Validated) -> (File, Vec<crate::domain::SegmentSpan>) {
        let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let created_at = Timestamp::now();
        let file = File {
            id: self.id.clone(),
            owner: self.spec.owner.clone(),
            kind: FileKind::Input,
            filename: self.spec.filename.clone(),
            bytes: number(validated.bytes),
            line_count: number(validated.requests),
            models: validated.models,
            endpoint: Some(validated.endpoint),
            created_at,
            expires_at: self.spec.expires_after.map(|span| created_at.plus(span)),
            object_key: Some(self.object_key.clone()),
            crc32c: Some(validated.crc32c),
        };
        (file, validated.segments)
    }

    /// Starts the check of the pending bytes without waiting for the result.
    async fn check_pending(&mut self) -> Result<(), IngestError> {
        let mut validator = self.validator().await?;
        let gone = validator.is_doomed() && !self.spec.keeps_bad;
        let object = if gone { self.object.take() } else { None };
        let chunks = std::mem::take(&mut self.pending);
        self.pending_bytes = 0;
        self.check = Checking::Busy(tokio::task::spawn_blocking(move || {
            let checked = chunks.iter().try_for_each(|chunk| validator.push(chunk));
            (validator, checked)
        }));
        // There will be no file: the rest is checked, to report all bad lines, but not kept.
        if let Some(object) = object {
            object.abort().await?;
        }
        Ok(())
    }

    /// Waits until the validator has checked what it was given.
    async fn validator(&mut self) -> Result<Box<Validator>, IngestError> {
        // Stays in place while it is awaited, because this future may be dropped and another one created.
        if let Checking::Busy(running) = &mut self.check {
            let (validator, checked) = running.await.map_err(|_| IngestError::Interrupted)?;
            self.check = Checking::Idle(validator);
            if let Err(error) = checked {
                self.check = Checking::Gone;
                return Err(error);
            }
        }
        match std::mem::replace(&mut self.check, Checking::Gone) {
            Checking::Idle(validator) => Ok(validator),
            Checking::Busy(_) | Checking::Gone => Err(IngestError::Interrupted),
        }
    }
}

/// Whether a file is of another format than JSONL: its first line is no JSON.
fn is_no_jsonl(errors: &[LineReport]) -> bool {
    errors.first().is_some_and(|first| first.line == 1 && first.fault.code == "invalid_json_line")
}

impl Drop for Upload {
    fn drop(&mut self) {
        // Without a runtime nothing can be cleaned up: the garbage row of the upload remains.
        if self.garbage
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let (inner, object, key) = (self.inner.clone(), self.object.take(), std::mem::take(&mut self.object_key));
            runtime.spawn(async move { abandon(&inner, object, &key).await });
        }
    }
}

/// Deletes an object that no row names. If that fails, the garbage row of the upload remains.
pub(super) async fn abandon(inner: &Inner, object: Option<ObjectWriter>, key: &str) {
    if let Some(object) = object
        && let Err(error) = object.abort().await
    {
        tracing::warn!(key, %error, "an upload could not be aborted");
    }
    if let Err(error) = inner.store.abandon_upload(key).await {
        tracing::warn!(key, %error, "an upload could not be abandoned");
    }
}

#[cfg(test)]
mod tests;
