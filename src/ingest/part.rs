//! One part of an upload in parts: an object that nobody looks into before the upload is completed.

use std::sync::Arc;

use bytes::Bytes;

use super::{
    Ingest, IngestError,
    upload::{Inner, abandon},
};
use crate::{
    blobs::ObjectWriter,
    domain::{PartedUpload, Scope, Timestamp, UploadId, UploadPart, UploadPartId, upload::PART_BYTES},
    fault::{self, Fault},
    store::InsertedPart,
};

/// A part that comes. If it is dropped before [`IncomingPart::finish`] has added it, it leaves nothing behind.
pub struct IncomingPart {
    inner: Arc<Inner>,
    upload: UploadId,
    id: UploadPartId,
    object_key: String,
    object: Option<ObjectWriter>,
    bytes: u64,
    crc32c: u32,
    /// Whether the object is garbage: no row names it, and none will.
    garbage: bool,
}

impl Ingest {
    /// Begins a part of an upload.
    ///
    /// # Errors
    /// The store's and the blob store's.
    pub async fn begin_part(&self, of: &PartedUpload) -> Result<IncomingPart, IngestError> {
        let id = UploadPartId::generate();
        let object_key = format!("uploads/{}/{id}", of.id);
        // From here on, an object that a killed process leaves is recorded as garbage.
        self.inner.store.begin_upload(&object_key).await?;
        let mut part = IncomingPart {
            inner: self.inner.clone(),
            upload: of.id.clone(),
            id,
            object_key,
            object: None,
            bytes: 0,
            crc32c: 0,
            garbage: true,
        };
        part.object = Some(self.inner.blobs.writer(&part.object_key).await?);
        Ok(part)
    }
}

impl IncomingPart {
    /// Whether nothing has come of it yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Takes the next bytes. Returns when there is room for more.
    ///
    /// # Errors
    /// [`IngestError`]: then the part has ended.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), IngestError> {
        self.bytes += bytes.len() as u64;
        if self.bytes > PART_BYTES {
            return Err(IngestError::TooManyBytes { max: PART_BYTES });
        }
        self.crc32c = crc32c::crc32c_append(self.crc32c, &bytes);
        self.object.as_mut().ok_or(IngestError::Interrupted)?.write(bytes).await?;
        Ok(())
    }

    /// Adds the part to its upload. When this returns [`InsertedPart::New`], it is durable; otherwise nothing is left of
    /// it.
    ///
    /// # Errors
    /// [`IngestError`].
    pub async fn finish(mut self, scope: &Scope) -> Result<(UploadPart, InsertedPart), IngestError> {
        let part = UploadPart {
            id: self.id.clone(),
            bytes: i64::try_from(self.bytes).unwrap_or(i64::MAX),
            crc32c: self.crc32c,
            object_key: self.object_key.clone(),
            created_at: Timestamp::now(),
        };
        let object = self.object.take().ok_or(IngestError::Interrupted)?;
        // From here on the garbage row decides, as at an upload: a row may name the object although an answer was lost.
        self.garbage = false;
        object.finish().await?;
        fault::point(Fault::UploadedPart);
        let most = self.inner.limits.max_bytes;
        let inserted = self.inner.store.insert_upload_part(&self.upload, &part, scope, most).await?;
        if inserted != InsertedPart::New {
            abandon(&self.inner, None, &self.object_key).await;
        }
        Ok((part, inserted))
    }
}

impl Drop for IncomingPart {
    fn drop(&mut self) {
        // Without a runtime nothing can be cleaned up: the garbage row remains.
        if self.garbage
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let (inner, object, key) = (self.inner.clone(), self.object.take(), std::mem::take(&mut self.object_key));
            runtime.spawn(async move { abandon(&inner, object, &key).await });
        }
    }
}
