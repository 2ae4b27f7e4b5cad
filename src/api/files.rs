//! Files: upload, show, list, delete.

use std::error::Error;

use bytes::Bytes;
use futures::StreamExt;
use tokio::time::Instant;
use tonic::{Code, Status, Streaming};

use super::{
    convert,
    page::Page,
    service::Api,
    status::{self, error, invalid_field, line_name},
    validate,
};
use crate::{
    access::{Account, Caller, IDLE, LOOK, LimitReached, Pace, Received},
    domain::{File, FileId},
    ingest::{Begun, NewUpload},
    pb::{self, upload_file_request::Payload},
    store::{DeletedFile, FileFilter},
};

/// How much of an upload under a known request id is compared with the file that it has made.
const COMPARED: usize = 4 * 1024 * 1024;

/// The messages of an upload, and how fast they come.
pub(super) struct Incoming {
    messages: Streaming<pb::UploadFileRequest>,
    received: Received,
    pace: Pace,
}

impl Api {
    /// Takes a file. If the client breaks off, the upload is dropped here, and nothing is left of it.
    pub(super) async fn upload(
        &self,
        caller: &Caller,
        account: &Account,
        incoming: Incoming,
    ) -> Result<pb::File, Status> {
        let longest = self.limits.longest_upload();
        match tokio::time::timeout(longest, self.take_file(caller, account, incoming)).await {
            Ok(taken) => taken,
            Err(_) => {
                let longest = humantime::format_duration(longest);
                let message = format!("an upload may take {longest}; split the file");
                Err(error(Code::DeadlineExceeded, "UPLOAD_TOO_LONG", message))
            }
        }
    }

    async fn take_file(&self, caller: &Caller, account: &Account, mut incoming: Incoming) -> Result<pb::File, Status> {
        let first = incoming.next(|| false).await?;
        let Some(Payload::Spec(spec)) = first.and_then(|first| first.payload) else {
            return Err(invalid_field("spec", "must be in the first message"));
        };
        let spec = validate::spec(spec)?;
        let new = NewUpload {
            owner: caller.owner.clone(),
            filename: spec.filename,
            total_bytes: spec.total_bytes,
            request_id: spec.request_id,
        };
        let refused = |error| status::ingest(error, line_name);
        let place = self.limits.upload(account, Some(incoming.received.clone())).await.map_err(status::limit)?;
        let mut upload = match self.services.ingest.begin(new).await.map_err(refused)? {
            Begun::Existing(file) => {
                self.compare(&file, spec.total_bytes, &mut incoming).await?;
                return Ok(convert::file(*file));
            }
            Begun::Upload(upload) => upload,
        };
        loop {
            let message = tokio::select! {
                biased;
                () = place.gives_way() => return Err(status::limit(LimitReached::GaveWay.counted())),
                message = incoming.next(|| self.limits.is_crowded()) => message?,
            };
            let Some(message) = message else { break };
            let bytes = validate::chunk(message)?;
            self.limits.bytes(&caller.owner, bytes.len() as u64).map_err(status::limit)?;
            upload.write(bytes).await.map_err(refused)?;
        }
        upload.finish().await.map(convert::file).map_err(refused)
    }

    /// Refuses an upload under a request id that has made a file of other contents before. As far as the size is announced
    /// and [`COMPARED`] bytes go: whoever sends a large file again because the answer was lost need not send all of it.
    async fn compare(&self, file: &File, total: Option<u64>, incoming: &mut Incoming) -> Result<(), Status> {
        let other = || {
            let message =
                format!("the request_id has made the file {} of other contents before; use a new one", file.id);
            error(Code::AlreadyExists, "REQUEST_ID_REUSED", message)
        };
        if total.is_some_and(|total| i64::try_from(total) != Ok(file.bytes)) {
            return Err(other());
        }
        let mut stored = match self.services.reader.download(file, 0).await {
            Ok(stored) => std::pin::pin!(stored),
            // Whether it can still be read is for its reader to find out.
            Err(_) => return Ok(()),
        };
        let (mut left, mut compared) = (Bytes::new(), 0);
        while compared < COMPARED {
            let Some(message) = incoming.next(|| self.limits.is_crowded()).await? else {
                // Who sends no bytes asks whether the file is there.
                let whole = compared == 0 || i64::try_from(compared) == Ok(file.bytes);
                return if whole { Ok(()) } else { Err(other()) };
            };
            let mut came = validate::chunk(message)?;
            compared += came.len();
            while !came.is_empty() {
                if left.is_empty() {
                    left = match stored.next().await {
                        Some(Ok(piece)) => piece,
                        Some(Err(_)) => return Ok(()),
                        None => return Err(other()),
                    };
                }
                let both = left.len().min(came.len());
                if left.split_to(both) != came.split_to(both) {
                    return Err(other());
                }
            }
        }
        Ok(())
    }

    /// A file that the caller may see.
    pub(super) async fn find_file(&self, caller: &Caller, id: &FileId) -> Result<File, Status> {
        let file = self.services.store.file(id, &caller.scope()).await.map_err(status::store)?;
        file.ok_or_else(|| status::no_file(id))
    }

    pub(super) async fn file(&self, caller: &Caller, request: &pb::GetFileRequest) -> Result<pb::File, Status> {
        let id = validate::file_id(&request.file_id)?;
        self.find_file(caller, &id).await.map(convert::file)
    }

    pub(super) async fn files(
        &self,
        caller: &Caller,
        request: pb::ListFilesRequest,
    ) -> Result<pb::ListFilesResponse, Status> {
        let filter = FileFilter { scope: caller.scope(), purpose: validate::purpose(request.purpose)? };
        let page = Page::parse(request.page_size, &request.page_token, &["files", &format!("{filter:?}")])?;
        let after = page.after.clone().map(FileId::from_text);
        let found = self.services.store.files(&filter, after.as_ref(), page.size + 1).await.map_err(status::store)?;
        let (files, next_page_token) = page.finish(found.into_iter().map(convert::file).collect(), |file| &file.id);
        Ok(pb::ListFilesResponse { files, next_page_token })
    }

    pub(super) async fn remove_file(&self, caller: &Caller, request: &pb::DeleteFileRequest) -> Result<(), Status> {
        let id = validate::file_id(&request.file_id)?;
        match self.services.store.delete_file(&id, &caller.scope()).await.map_err(status::store)? {
            DeletedFile::Deleted => Ok(()),
            DeletedFile::NotFound => Err(status::no_file(&id)),
            DeletedFile::InUse(batch) => {
                let message = format!("the unfinished batch {batch} reads this file: wait for it, or cancel it");
                Err(error(Code::FailedPrecondition, "FILE_IN_USE", message))
            }
        }
    }
}

impl Incoming {
    pub(super) fn new(messages: Streaming<pb::UploadFileRequest>, received: Received) -> Self {
        Self { messages, received, pace: Pace::default() }
    }

    /// The next message, if it comes soon enough: sooner while `crowded`.
    async fn next(&mut self, crowded: impl Fn() -> bool) -> Result<Option<pb::UploadFileRequest>, Status> {
        loop {
            let (since, before) = (Instant::now(), self.received.bytes());
            let message = tokio::time::timeout(LOOK, self.messages.message()).await;
            self.pace.came(since.elapsed(), self.received.bytes() - before);
            match message {
                // Whatever the end took to come, there is nothing more to wait for.
                Ok(Ok(None)) => return Ok(None),
                Ok(Err(error)) => return Err(broken_off(error)),
                _ if self.pace.is_over(crowded()) => return Err(idle(crowded())),
                Ok(Ok(message)) => return Ok(message),
                Err(_) => {}
            }
        }
    }
}

fn idle(crowded: bool) -> Status {
    let message = if crowded {
        "hardly anything has come for a while, and other uploads wait; send it again when it comes faster".to_owned()
    } else {
        format!("hardly anything has come for {} s; send it again when it comes faster", IDLE.as_secs())
    };
    error(Code::DeadlineExceeded, "UPLOAD_IDLE", message)
}

fn broken_off(status: Status) -> Status {
    if status.source().is_some() {
        // The stream broke: nobody is there to read this, but it is no failure of the server.
        error(Code::Cancelled, "UPLOAD_BROKEN_OFF", "the upload broke off before its end")
    } else {
        status::unreadable(status)
    }
}
