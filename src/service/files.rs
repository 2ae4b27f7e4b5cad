//! Uploads, shows, lists, deletes and reads files.

use std::pin::Pin;

use bytes::Bytes;
use futures::{Stream, StreamExt, future::BoxFuture, stream::BoxStream};
use tokio::time::Instant;

use super::{
    Code, Found, Page, Service, ServiceError, Span,
    error::{self, Violations, line_name, no_file},
    filters, rules,
};
use crate::{
    access::{Account, Caller, IDLE, LOOK, LimitReached, Pace, Place, Received},
    blobs::BlobError,
    domain::{File, FileId, Scope, text::is_plain},
    ingest::{Begun, IngestError, NewUpload, Upload},
    results::ReadError,
    store::{DeletedFile, FileFilter},
};

pub use crate::store::PageOrder as FileOrder;

/// The most bytes of a file name.
pub(super) const FILENAME: usize = 255;
/// How many bytes of a repeated upload are compared with the file of its request id.
const COMPARED: usize = 4 * 1024 * 1024;

/// A file to upload, as a client describes it.
#[derive(Clone, Debug, Default)]
pub struct NewFile {
    /// A name for people. Empty: the server chooses one.
    pub filename: String,
    /// `batch`, or empty.
    pub purpose: String,
    /// Its size. 0: not known in advance.
    pub total_bytes: i64,
    /// The client's idempotency key. Empty: none.
    pub request_id: String,
    /// How long it stays after it is complete. `None`: until it is deleted.
    pub expires_after: Option<Span>,
    /// A file with bad lines is kept, and a batch of it fails: OpenAI's way.
    pub keeps_bad: bool,
}

/// A client's request for a list of files.
#[derive(Clone, Debug, Default)]
pub struct ListFiles {
    /// `batch`, `batch_output`, or empty for any.
    pub purpose: String,
    /// The page size. 0: the server's default.
    pub page_size: i32,
    /// The token of the previous page. Empty: the first page.
    pub page_token: String,
}

/// An upload in progress. If it is dropped before [`FileUpload::finish`], it leaves nothing behind.
pub struct FileUpload {
    service: Service,
    caller: Caller,
    place: Place,
    state: State,
    /// Gives a line's field in the violations its name.
    name: fn(u64) -> String,
}

enum State {
    /// The bytes become a new file.
    New(Box<Upload>),
    /// The request id has created this file: the bytes are compared with it.
    Known(Box<Compared>),
    /// The request id has created this file, and enough was compared.
    Settled(Box<File>),
}

/// Compares a repeated upload with the file of its request id. A client that lost the answer to a large upload need not
/// send all of it again: only the announced size and [`COMPARED`] bytes are compared.
struct Compared {
    file: File,
    stored: Pin<Box<dyn Stream<Item = Result<Bytes, ReadError>> + Send>>,
    /// Bytes of the file that are not compared yet.
    left: Bytes,
    bytes: usize,
}

impl Service {
    /// Begins an upload when it has a place. `received` counts its bytes, so that a slow upload can give way.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn begin_upload(
        &self,
        caller: &Caller,
        account: &Account,
        file: NewFile,
        received: Received,
    ) -> Result<FileUpload, ServiceError> {
        self.begin(caller, account, new_upload(caller, file)?, received, line_name).await
    }

    /// The same, of an upload that the server may have described itself; `name` names its lines in errors.
    pub(super) async fn begin(
        &self,
        caller: &Caller,
        account: &Account,
        new: NewUpload,
        received: Received,
        name: fn(u64) -> String,
    ) -> Result<FileUpload, ServiceError> {
        let total = new.total_bytes;
        let place = self.limits.upload(account, Some(received)).await?;
        let begun = self.parts.ingest.begin(new).await.map_err(|error| error::ingest(error, name))?;
        let state = match begun {
            Begun::Upload(upload) => State::New(upload),
            Begun::Existing(file) if total.is_some_and(|total| i64::try_from(total) != Ok(file.bytes)) => {
                return Err(other_contents(&file.id));
            }
            Begun::Existing(file) => match self.parts.reader.download(&file, 0).await {
                Ok(stored) => {
                    let stored = Box::pin(stored);
                    State::Known(Box::new(Compared { file: *file, stored, left: Bytes::new(), bytes: 0 }))
                }
                // Whether it can still be read is for its reader to find out.
                Err(_) => State::Settled(file),
            },
        };
        Ok(FileUpload { service: self.clone(), caller: caller.clone(), place, state, name })
    }

    /// Runs a whole upload, within the longest time for one.
    ///
    /// # Errors
    /// Those of `taking`, or that it took too long.
    pub async fn in_time<T, E: From<ServiceError>>(&self, taking: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let longest = self.limits.longest_upload();
        tokio::time::timeout(longest, taking).await.unwrap_or_else(|_| {
            let message = format!("an upload may take {} h; split the file", longest.as_secs().div_ceil(3_600));
            Err(ServiceError::new(Code::DeadlineExceeded, "UPLOAD_TOO_LONG", message).into())
        })
    }

    /// Whether uploads wait for a place.
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.limits.is_crowded()
    }

    /// A file that the caller may see.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn file(&self, caller: &Caller, id: &str) -> Result<File, ServiceError> {
        self.find_file(caller, &rules::file_id(id)?).await
    }

    pub(super) async fn find_file(&self, caller: &Caller, id: &FileId) -> Result<File, ServiceError> {
        self.parts.store.file(id, &caller.scope()).await?.ok_or_else(|| no_file(id))
    }

    /// The caller's files, newest first.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn files(&self, caller: &Caller, of: ListFiles) -> Result<Found<File>, ServiceError> {
        let purpose = match of.purpose.as_str() {
            "" => None,
            "batch" | "batch_output" => Some(of.purpose),
            _ => return Err(ServiceError::field("purpose", "must be \"batch\", \"batch_output\" or empty")),
        };
        let filter = FileFilter { scope: caller.scope(), purpose };
        let page = Page::parse(of.page_size, &of.page_token, &[&filters::of_files(&filter)])?;
        let after = page.after.clone().map(FileId::from_text);
        let items = self.parts.store.files(&filter, after.as_ref(), page.size + 1).await?;
        Ok(Found { items, page })
    }

    /// Files that follow one in their order, at most so many, and whether there are more.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn files_after(
        &self,
        caller: &Caller,
        purpose: Option<String>,
        order: FileOrder,
        after: Option<String>,
        limit: u64,
    ) -> Result<(Vec<File>, bool), ServiceError> {
        let filter = FileFilter { scope: caller.scope(), purpose };
        let after = after.map(FileId::from_text);
        let mut files = self.parts.store.files_in(&filter, order, after.as_ref(), limit + 1).await?;
        let has_more = files.len() as u64 > limit;
        files.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        Ok((files, has_more))
    }

    /// Refuses an upload whose announced size is too large.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub fn check_upload_size(&self, bytes: u64) -> Result<(), ServiceError> {
        let max = self.parts.ingest.limits().max_bytes;
        if bytes <= max {
            return Ok(());
        }
        Err(error::ingest(IngestError::TooManyBytes { max }, line_name))
    }

    /// Deletes a file that no unfinished batch reads.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn delete_file(&self, caller: &Caller, id: &str) -> Result<(), ServiceError> {
        let id = rules::file_id(id)?;
        match self.parts.store.delete_file(&id, &caller.scope()).await? {
            DeletedFile::Deleted => Ok(()),
            DeletedFile::NotFound => Err(no_file(&id)),
            DeletedFile::InUse(batch) => {
                let message = format!("the unfinished batch {batch} reads this file: wait for it, or cancel it");
                Err(ServiceError::new(Code::FailedPrecondition, "FILE_IN_USE", message))
            }
        }
    }

    /// Deletes a file. While an unfinished batch reads it, nobody finds it any more, and it goes when the batch has ended.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn hide_file(&self, caller: &Caller, id: &str) -> Result<(), ServiceError> {
        let id = rules::file_id(id)?;
        match self.parts.store.hide_file(&id, &caller.scope()).await? {
            DeletedFile::Deleted | DeletedFile::InUse(_) => Ok(()),
            DeletedFile::NotFound => Err(no_file(&id)),
        }
    }

    /// A file that the caller may see, for reading from `offset`.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn file_from(&self, caller: &Caller, id: &str, offset: i64) -> Result<File, ServiceError> {
        let id = rules::file_id(id)?;
        rules::not_negative(offset, "offset")?;
        self.find_file(caller, &id).await
    }

    /// The bytes of a file from `offset`. The caller must be allowed to see it.
    ///
    /// # Errors
    /// [`ServiceError`], at once or in the stream.
    pub async fn read_file(
        &self,
        file: &File,
        offset: i64,
    ) -> Result<BoxStream<'static, Result<Bytes, ServiceError>>, ServiceError> {
        let offset = rules::not_negative(offset, "offset")?;
        if offset > file.bytes {
            let message = format!("offset {offset} lies beyond the end: the file has {} bytes", file.bytes);
            return Err(ServiceError::new(Code::OutOfRange, "OFFSET_OUT_OF_RANGE", message));
        }
        let pieces = self.parts.reader.download(file, u64::try_from(offset).unwrap_or(0)).await?;
        let (store, id) = (self.parts.store.clone(), file.id.clone());
        let pieces = async_stream::try_stream! {
            let mut pieces = std::pin::pin!(pieces);
            while let Some(piece) = pieces.next().await {
                let data = match piece {
                    Ok(data) => data,
                    // Deleted under the reader's hands: not the server's fault.
                    Err(ReadError::Blob(BlobError::Missing(_)))
                        if matches!(store.file(&id, &Scope::All).await, Ok(None)) => Err(no_file(&id))?,
                    Err(error) => Err(ServiceError::from(error))?,
                };
                yield data;
            }
        };
        Ok(pieces.boxed())
    }
}

impl FileUpload {
    /// Whether no more bytes are needed, because the file exists.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        matches!(self.state, State::Settled(_))
    }

    /// Completes when this upload must give way to another.
    pub fn gives_way(&self) -> BoxFuture<'static, ServiceError> {
        let is_new = matches!(self.state, State::New(_));
        let gives_way = self.place.gives_way();
        Box::pin(async move {
            if !is_new {
                std::future::pending::<()>().await;
            }
            gives_way.await;
            gave_way()
        })
    }

    /// Sets when the file expires, where that becomes known only after its bytes.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub fn expires_after(&mut self, span: Option<Span>) -> Result<(), ServiceError> {
        let mut wrong = Violations::default();
        let span = rules::expiry(span, &mut wrong, "expires_after.seconds");
        wrong.finish()?;
        if let State::New(upload) = &mut self.state {
            upload.set_expiry(span);
        }
        Ok(())
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), ServiceError> {
        let settled = match &mut self.state {
            State::New(upload) => {
                self.service.limits.bytes(&self.caller.owner, bytes.len() as u64)?;
                return upload.write(bytes).await.map_err(|error| error::ingest(error, self.name));
            }
            State::Known(known) => known.compare(bytes).await?.then(|| known.file.clone()),
            State::Settled(_) => None,
        };
        if let Some(file) = settled {
            self.state = State::Settled(Box::new(file));
        }
        Ok(())
    }

    /// Ends the upload and returns the file.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn finish(self) -> Result<File, ServiceError> {
        match self.state {
            State::New(upload) => upload.finish().await.map_err(|error| error::ingest(error, self.name)),
            // A client that sends no bytes asks whether the file is there.
            State::Known(known) if known.bytes == 0 || i64::try_from(known.bytes) == Ok(known.file.bytes) => {
                Ok(known.file)
            }
            State::Known(known) => Err(other_contents(&known.file.id)),
            State::Settled(file) => Ok(*file),
        }
    }
}

impl Compared {
    /// Compares the next bytes with the file. Returns whether enough was compared.
    async fn compare(&mut self, mut came: Bytes) -> Result<bool, ServiceError> {
        self.bytes += came.len();
        while !came.is_empty() {
            if self.left.is_empty() {
                self.left = match self.stored.next().await {
                    Some(Ok(piece)) => piece,
                    Some(Err(_)) => return Ok(true),
                    None => return Err(other_contents(&self.file.id)),
                };
            }
            let both = self.left.len().min(came.len());
            if self.left.split_to(both) != came.split_to(both) {
                return Err(other_contents(&self.file.id));
            }
        }
        Ok(self.bytes >= COMPARED)
    }
}

fn new_upload(caller: &Caller, of: NewFile) -> Result<NewUpload, ServiceError> {
    let mut wrong = Violations::default();
    let good = of.filename.len() <= FILENAME && is_plain(&of.filename);
    wrong.check(good, "spec.filename", format!("must be at most {FILENAME} bytes without control characters"));
    wrong.check(matches!(of.purpose.as_str(), "" | "batch"), "spec.purpose", "must be \"batch\" or empty");
    wrong.check(of.total_bytes >= 0, "spec.total_bytes", "must not be negative");
    let request_id = rules::request_id(of.request_id, &mut wrong, "spec.request_id");
    let expires_after = rules::expiry(of.expires_after, &mut wrong, "spec.expires_after");
    wrong.finish()?;
    Ok(NewUpload {
        owner: caller.owner.clone(),
        filename: if of.filename.is_empty() { "upload.jsonl".to_owned() } else { of.filename },
        total_bytes: u64::try_from(of.total_bytes).ok().filter(|bytes| *bytes > 0),
        request_id,
        expires_after,
        keeps_bad: of.keeps_bad,
        completes: None,
    })
}

/// The upload has given its place to another.
pub(super) fn gave_way() -> ServiceError {
    LimitReached::GaveWay.counted().into()
}

fn other_contents(file: &FileId) -> ServiceError {
    let message = format!("this request_id already made the file {file} with other contents; use a new one");
    ServiceError::new(Code::AlreadyExists, "REQUEST_ID_REUSED", message)
}

/// Waits for the pieces of an upload, as long as their pace allows.
pub struct Patience {
    received: Received,
    pace: Pace,
}

impl Patience {
    /// `received` counts the upload's bytes.
    #[must_use]
    pub fn new(received: Received) -> Self {
        Self { received, pace: Pace::default() }
    }

    /// The next piece of an upload, if it comes in time and the upload need not give way to another: `gives_way` is its
    /// [`FileUpload::gives_way`], none as long as it has not begun. `None` is the end.
    ///
    /// # Errors
    /// As of [`Patience::next`].
    pub async fn next_of<T, E: From<ServiceError>>(
        &mut self,
        service: &Service,
        gives_way: Option<impl Future<Output = ServiceError> + Unpin>,
        pieces: &mut (impl Stream<Item = Result<T, E>> + Unpin),
    ) -> Result<Option<T>, E> {
        let Some(gives_way) = gives_way else { return self.next(|| false, pieces).await };
        tokio::select! {
            biased;
            gives_way = gives_way => Err(gives_way.into()),
            next = self.next(|| service.is_crowded(), pieces) => next,
        }
    }

    /// The next piece, if it comes in time; there is less time while `crowded`. `None` is the end.
    ///
    /// # Errors
    /// Those of the pieces; [`ServiceError`] if the upload is too slow.
    pub async fn next<T, E: From<ServiceError>>(
        &mut self,
        crowded: impl Fn() -> bool,
        pieces: &mut (impl Stream<Item = Result<T, E>> + Unpin),
    ) -> Result<Option<T>, E> {
        loop {
            let (since, before) = (Instant::now(), self.received.bytes());
            let piece = tokio::time::timeout(LOOK, pieces.next()).await;
            self.pace.came(since.elapsed(), self.received.bytes() - before);
            match piece {
                // Whatever the end took to come, there is nothing more to wait for.
                Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(error),
                _ if self.pace.is_over(crowded()) => return Err(idle(crowded()).into()),
                Ok(Some(Ok(piece))) => return Ok(Some(piece)),
                Err(_) => {}
            }
        }
    }
}

fn idle(crowded: bool) -> ServiceError {
    let message = if crowded {
        "the upload is too slow, and others wait; send it again over a faster connection".to_owned()
    } else {
        format!(
            "the upload has been slower than 1 KiB/s for {} s; send it again over a faster connection",
            IDLE.as_secs()
        )
    };
    ServiceError::new(Code::DeadlineExceeded, "UPLOAD_IDLE", message)
}
