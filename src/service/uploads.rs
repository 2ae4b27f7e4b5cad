//! Uploads in parts: announce, send parts, complete or give up.

use bytes::Bytes;
use futures::StreamExt;
use md5::{Digest, Md5};

use super::{
    Code, Service, ServiceError, Span, Violation,
    batches::asked,
    error::{self, Violations, line_name},
    files::{FILENAME, gave_way},
    rules, short,
};
use crate::{
    access::{Account, Caller, Place, Received},
    domain::{
        Completion, File, PartedUpload, Scope, UploadId, UploadPart, UploadState,
        text::is_plain,
        upload::{MOST_PARTS, PART_BYTES},
    },
    ingest::{Begun, IncomingPart, IngestError, NewUpload},
    store::{CancelledUpload, InsertedPart, NewPartedUpload},
};

/// An upload in parts, as a client announces it.
#[derive(Clone, Debug, Default)]
pub struct AnnouncedUpload {
    /// A name for people.
    pub filename: String,
    /// `batch`.
    pub purpose: String,
    /// The size of the file.
    pub bytes: i64,
    /// How long the file stays after it is complete. `None`: until it is deleted.
    pub file_expires_after: Option<Span>,
}

/// The end of an upload in parts.
#[derive(Clone, Debug, Default)]
pub struct CompleteUpload {
    /// The parts that make the file, in its order.
    pub part_ids: Vec<String>,
    /// The MD5 of the file, in hexadecimal digits.
    pub md5: Option<String>,
    /// A file with bad lines is kept, and a batch of it fails: OpenAI's way.
    pub keeps_bad: bool,
}

/// A part that comes. If it is dropped before [`PartUpload::finish`], it leaves nothing behind.
pub struct PartUpload {
    service: Service,
    caller: Caller,
    upload: PartedUpload,
    place: Place,
    part: IncomingPart,
}

impl Service {
    /// Announces an upload in parts.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn announce_upload(&self, caller: &Caller, of: AnnouncedUpload) -> Result<PartedUpload, ServiceError> {
        let mut wrong = Violations::default();
        let good = (1..=FILENAME).contains(&of.filename.len()) && is_plain(&of.filename);
        wrong.check(good, "filename", format!("must be 1 to {FILENAME} bytes without control characters"));
        wrong.check(of.purpose == "batch", "purpose", "must be \"batch\"");
        wrong.check(of.bytes > 0, "bytes", "must be the size of the file, at least 1");
        let file_expires_after = rules::expiry(of.file_expires_after, &mut wrong, "expires_after.seconds");
        wrong.finish()?;
        self.check_upload_size(u64::try_from(of.bytes).unwrap_or(0))?;
        let new =
            NewPartedUpload { owner: caller.owner.clone(), filename: of.filename, bytes: of.bytes, file_expires_after };
        Ok(self.parts.store.begin_parted_upload(&new).await?)
    }

    /// Begins a part when it has a place. `received` counts its bytes, so that a slow one can give way.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn begin_part(
        &self,
        caller: &Caller,
        account: &Account,
        upload: &str,
        received: Received,
    ) -> Result<PartUpload, ServiceError> {
        let upload = self.find_upload(caller, upload).await?;
        if upload.state != UploadState::Pending {
            return Err(ended(&upload, "it takes no more parts"));
        }
        let place = self.limits.upload(account, Some(received)).await?;
        let part = self.parts.ingest.begin_part(&upload).await.map_err(of_part)?;
        Ok(PartUpload { service: self.clone(), caller: caller.clone(), upload, place, part })
    }

    /// Makes the file of the parts. The same call again answers the same.
    ///
    /// # Errors
    /// [`ServiceError`]; unless the upload has ended, it still is as it was.
    pub async fn complete_upload(
        &self,
        caller: &Caller,
        account: &Account,
        id: &str,
        of: CompleteUpload,
    ) -> Result<(PartedUpload, Option<File>), ServiceError> {
        let upload = self.find_upload(caller, id).await?;
        let made_of = asked::hash(&of.part_ids);
        if upload.state != UploadState::Pending {
            return self.completed(caller, upload, &made_of).await;
        }
        match self.in_time(self.make_file(caller, account, &upload, &of, made_of.clone())).await {
            Ok(file) => {
                let state = UploadState::Completed { file: file.id.clone(), parts: made_of };
                Ok((PartedUpload { state, ..upload }, Some(file)))
            }
            // Another call has ended the upload meanwhile, and its parts may be gone under the hands of this one.
            Err(error) => match self.find_upload(caller, id).await {
                Ok(upload) if upload.state != UploadState::Pending => self.completed(caller, upload, &made_of).await,
                Ok(_) | Err(_) => Err(error),
            },
        }
    }

    /// Gives an upload up. Its parts go.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn cancel_upload(&self, caller: &Caller, id: &str) -> Result<PartedUpload, ServiceError> {
        let id = upload_id(id)?;
        match self.parts.store.cancel_parted_upload(&id, &caller.scope()).await? {
            CancelledUpload::Cancelled(upload) => Ok(*upload),
            CancelledUpload::NotFound => Err(no_upload(&id)),
            CancelledUpload::Ended(upload) => Err(ended(&upload, "it can't be cancelled any more")),
        }
    }

    async fn find_upload(&self, caller: &Caller, id: &str) -> Result<PartedUpload, ServiceError> {
        let id = upload_id(id)?;
        self.parts.store.parted_upload(&id, &caller.scope()).await?.ok_or_else(|| no_upload(&id))
    }

    /// What a call to complete an upload is answered that has ended: the file, if these parts were made to it.
    async fn completed(
        &self,
        caller: &Caller,
        upload: PartedUpload,
        made_of: &str,
    ) -> Result<(PartedUpload, Option<File>), ServiceError> {
        match &upload.state {
            UploadState::Completed { file, parts } if parts == made_of => {
                let file = self.parts.store.file(file, &caller.scope()).await?;
                Ok((upload, file))
            }
            UploadState::Completed { .. } => Err(ended(&upload, "it was completed with other parts")),
            UploadState::Pending | UploadState::Cancelled | UploadState::Expired => {
                Err(ended(&upload, "it can't be completed any more"))
            }
        }
    }

    async fn make_file(
        &self,
        caller: &Caller,
        account: &Account,
        upload: &PartedUpload,
        of: &CompleteUpload,
        made_of: String,
    ) -> Result<File, ServiceError> {
        let md5 = of.md5.as_deref().map(md5_of).transpose()?;
        let parts = self.chosen(upload, &of.part_ids).await?;
        let received = Received::default();
        let place = self.limits.upload(account, Some(received.clone())).await?;
        let spec = NewUpload {
            owner: caller.owner.clone(),
            filename: upload.filename.clone(),
            total_bytes: u64::try_from(upload.bytes).ok(),
            expires_after: upload.file_expires_after,
            keeps_bad: of.keeps_bad,
            completes: Some(Completion { upload: upload.id.clone(), parts: made_of }),
            ..NewUpload::default()
        };
        let refused = |error| error::ingest(error, line_name);
        let mut file = match self.parts.ingest.begin(spec).await.map_err(refused)? {
            Begun::Upload(file) => file,
            // Only a request id has an earlier file, and there is none.
            Begun::Existing(file) => return Ok(*file),
        };
        let mut pieces = std::pin::pin!(self.parts.reader.joined(parts));
        let mut sum = md5.is_some().then(Md5::new);
        loop {
            let piece = tokio::select! {
                biased;
                () = place.gives_way() => return Err(gave_way()),
                piece = pieces.next() => piece,
            };
            let Some(piece) = piece.transpose()? else { break };
            received.add(piece.len() as u64);
            if let Some(sum) = &mut sum {
                sum.update(&piece);
            }
            file.write(piece).await.map_err(refused)?;
        }
        if let (Some(expected), Some(sum)) = (md5, sum)
            && sum.finalize().as_slice() != expected
        {
            let message = "the file that these parts make has another MD5: a part was changed on its way, or they are in \
                           another order";
            return Err(mismatch("md5", message));
        }
        file.finish().await.map_err(refused)
    }

    /// The parts that the client names, in its order, if they are as many bytes as it announced.
    async fn chosen(&self, upload: &PartedUpload, ids: &[String]) -> Result<Vec<UploadPart>, ServiceError> {
        if !(1..=MOST_PARTS).contains(&(ids.len() as u64)) {
            return Err(ServiceError::field("part_ids", format!("must be 1 to {MOST_PARTS} parts")));
        }
        let known = self.parts.store.upload_parts(&upload.id).await?;
        let mut known: std::collections::HashMap<&str, &UploadPart> =
            known.iter().map(|part| (part.id.as_str(), part)).collect();
        let (mut parts, mut bytes) = (Vec::with_capacity(ids.len()), 0_i64);
        for (at, id) in ids.iter().enumerate() {
            let Some(part) = known.remove(id.as_str()) else {
                let again = ids[..at].contains(id);
                let why = if again { "is there twice" } else { "is no part of this upload" };
                return Err(ServiceError::field("part_ids", format!("{:?} {why}", short(id))));
            };
            bytes = bytes.saturating_add(part.bytes);
            parts.push(part.clone());
        }
        if bytes != upload.bytes {
            let message = format!(
                "the parts have {bytes} bytes together, and the upload was announced with {}: a part is missing or there \
                 is one too many",
                upload.bytes
            );
            return Err(mismatch("part_ids", &message));
        }
        Ok(parts)
    }
}

impl PartUpload {
    /// Completes when this part must give way to another upload.
    pub fn gives_way(&self) -> impl Future<Output = ServiceError> + Send + use<> {
        let gives_way = self.place.gives_way();
        async move {
            gives_way.await;
            gave_way()
        }
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), ServiceError> {
        self.service.limits.bytes(&self.caller.owner, bytes.len() as u64)?;
        self.part.write(bytes).await.map_err(of_part)
    }

    /// Ends the part, which then belongs to its upload.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn finish(self) -> Result<(UploadId, UploadPart), ServiceError> {
        let Self { service, caller, upload, place: _place, part } = self;
        if part.is_empty() {
            return Err(ServiceError::field("data", "is empty"));
        }
        let scope: Scope = caller.scope();
        let (part, inserted) = part.finish(&scope).await.map_err(of_part)?;
        match inserted {
            InsertedPart::New => Ok((upload.id, part)),
            InsertedPart::NotFound => Err(no_upload(&upload.id)),
            InsertedPart::Ended(upload) => Err(ended(&upload, "it takes no more parts")),
            InsertedPart::TooMany => {
                Err(ServiceError::field("data", format!("is one part too many: an upload has at most {MOST_PARTS}")))
            }
            InsertedPart::TooLarge => {
                let max = service.parts.ingest.limits().max_bytes;
                Err(error::ingest(IngestError::TooManyBytes { max }, line_name))
            }
        }
    }
}

fn upload_id(text: &str) -> Result<UploadId, ServiceError> {
    let id = UploadId::from_text(text);
    if !text.is_empty() && rules::storable(text, rules::NAME) { Ok(id) } else { Err(no_upload(&id)) }
}

/// There is no such upload, or it is not the caller's.
fn no_upload(id: &UploadId) -> ServiceError {
    ServiceError::new(Code::NotFound, "UPLOAD_NOT_FOUND", format!("no upload {:?}", short(id.as_str())))
}

fn ended(upload: &PartedUpload, so: &str) -> ServiceError {
    let message = format!("the upload is {}: {so}", upload.state.as_str());
    ServiceError::new(Code::FailedPrecondition, "UPLOAD_ENDED", message)
}

fn mismatch(field: &str, message: &str) -> ServiceError {
    let violation = Violation { field: field.to_owned(), description: message.to_owned() };
    ServiceError::invalid("FILE_SIZE_MISMATCH", message, vec![violation])
}

fn of_part(error: IngestError) -> ServiceError {
    match error {
        IngestError::TooManyBytes { .. } => {
            let message = format!("a part may have {} MiB: send the file in smaller ones", PART_BYTES / (1024 * 1024));
            ServiceError::new(Code::ResourceExhausted, "PART_TOO_LARGE", message)
        }
        other => error::ingest(other, line_name),
    }
}

fn md5_of(text: &str) -> Result<[u8; 16], ServiceError> {
    let mut sum = [0; 16];
    match hex::decode_to_slice(text, &mut sum) {
        Ok(()) => Ok(sum),
        Err(_) => Err(ServiceError::field("md5", "must be 32 hexadecimal digits")),
    }
}
