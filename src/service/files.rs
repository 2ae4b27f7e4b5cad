//! Files: upload, show, list, delete, read.

use std::pin::Pin;

use bytes::Bytes;
use futures::{Stream, StreamExt, stream::BoxStream};
use tokio::time::Instant;

use super::{
    Code, Found, Page, Service, ServiceError,
    error::{self, Violations, line_name, no_file},
    rules,
};
use crate::{
    access::{Account, Caller, IDLE, LOOK, LimitReached, Pace, Place, Received},
    blobs::BlobError,
    domain::{File, FileId, Scope, text::is_plain},
    ingest::{Begun, NewUpload, Upload},
    results::ReadError,
    store::{DeletedFile, FileFilter},
};

/// The most bytes of a file name.
const FILENAME: usize = 255;
/// How much of an upload under a known request id is compared with the file that it has made.
const COMPARED: usize = 4 * 1024 * 1024;

/// A file to upload, as a client describes it.
#[derive(Clone, Debug, Default)]
pub struct NewFile {
    /// A name for people; empty: the server gives one.
    pub filename: String,
    /// `batch`, or empty.
    pub purpose: String,
    /// Its size, if it is known beforehand; 0: it is not.
    pub total_bytes: i64,
    /// The client's idempotency key; empty: none.
    pub request_id: String,
}

/// Which files to list, as a client asks for them.
#[derive(Clone, Debug, Default)]
pub struct ListFiles {
    /// `batch`, `batch_output`, or empty for any.
    pub purpose: String,
    /// How many; 0: as many as the server thinks right.
    pub page_size: i32,
    /// Where the page before ended; empty: the first page.
    pub page_token: String,
}

/// An upload under way. Dropped before [`FileUpload::finish`], it leaves nothing behind.
pub struct FileUpload {
    service: Service,
    caller: Caller,
    place: Place,
    state: State,
}

enum State {
    /// The bytes make a new file.
    New(Box<Upload>),
    /// The request id has made this file before: the bytes are compared with it.
    Known(Box<Compared>),
    /// It has, and nothing more is compared.
    Settled(Box<File>),
}

/// A file under a known request id, as far as it has been compared with what comes. Whoever sends a large file again because
/// the answer was lost need not send all of it: the announced size and [`COMPARED`] bytes are looked at.
struct Compared {
    file: File,
    stored: Pin<Box<dyn Stream<Item = Result<Bytes, ReadError>> + Send>>,
    /// Read from the file and not compared yet.
    left: Bytes,
    bytes: usize,
}

impl Service {
    /// Begins an upload, once it is its turn. `received` counts what comes of it, so that a slow one can give way.
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
        let new = new_upload(caller, file)?;
        let total = new.total_bytes;
        let place = self.limits.upload(account, Some(received)).await?;
        let begun = self.parts.ingest.begin(new).await.map_err(|error| error::ingest(error, line_name))?;
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
        Ok(FileUpload { service: self.clone(), caller: caller.clone(), place, state })
    }

    /// An upload as a whole, in the time that it may take.
    ///
    /// # Errors
    /// What `taking` says, or that it took too long.
    pub async fn in_time<T, E: From<ServiceError>>(&self, taking: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let longest = self.limits.longest_upload();
        tokio::time::timeout(longest, taking).await.unwrap_or_else(|_| {
            let message = format!("an upload may take {} h; split the file", longest.as_secs().div_ceil(3_600));
            Err(ServiceError::new(Code::DeadlineExceeded, "UPLOAD_TOO_LONG", message).into())
        })
    }

    /// Whether uploads wait for their turn.
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
        let page = Page::parse(of.page_size, &of.page_token, &["files", &format!("{filter:?}")])?;
        let after = page.after.clone().map(FileId::from_text);
        let items = self.parts.store.files(&filter, after.as_ref(), page.size + 1).await?;
        Ok(Found { items, page })
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

    /// A file that the caller may see, to be read from `offset` on.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn file_from(&self, caller: &Caller, id: &str, offset: i64) -> Result<File, ServiceError> {
        let id = rules::file_id(id)?;
        rules::not_negative(offset, "offset")?;
        self.find_file(caller, &id).await
    }

    /// The bytes of a file that the caller has found, from `offset` on.
    ///
    /// # Errors
    /// [`ServiceError`], at once or on the way.
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
    /// Whether nothing more need come: the file is there.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        matches!(self.state, State::Settled(_))
    }

    /// Waits until this upload has to make place for somebody else's.
    pub fn gives_way(&self) -> impl Future<Output = ServiceError> + Send + use<> {
        let is_new = matches!(self.state, State::New(_));
        let gives_way = self.place.gives_way();
        async move {
            if !is_new {
                std::future::pending::<()>().await;
            }
            gives_way.await;
            LimitReached::GaveWay.counted().into()
        }
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), ServiceError> {
        let settled = match &mut self.state {
            State::New(upload) => {
                self.service.limits.bytes(&self.caller.owner, bytes.len() as u64)?;
                return upload.write(bytes).await.map_err(|error| error::ingest(error, line_name));
            }
            State::Known(known) => known.compare(bytes).await?.then(|| known.file.clone()),
            State::Settled(_) => None,
        };
        if let Some(file) = settled {
            self.state = State::Settled(Box::new(file));
        }
        Ok(())
    }

    /// Nothing more comes: the file.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn finish(self) -> Result<File, ServiceError> {
        match self.state {
            State::New(upload) => upload.finish().await.map_err(|error| error::ingest(error, line_name)),
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
    /// Compares the next bytes with the file. Whether that was enough.
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
    wrong.finish()?;
    Ok(NewUpload {
        owner: caller.owner.clone(),
        filename: if of.filename.is_empty() { "upload.jsonl".to_owned() } else { of.filename },
        total_bytes: u64::try_from(of.total_bytes).ok().filter(|bytes| *bytes > 0),
        request_id,
    })
}

fn other_contents(file: &FileId) -> ServiceError {
    let message = format!("the request_id has made the file {file} of other contents before; use a new one");
    ServiceError::new(Code::AlreadyExists, "REQUEST_ID_REUSED", message)
}

/// How patiently a door waits for the pieces of an upload.
pub struct Patience {
    received: Received,
    pace: Pace,
}

impl Patience {
    /// `received` counts what comes of the upload.
    #[must_use]
    pub fn new(received: Received) -> Self {
        Self { received, pace: Pace::default() }
    }

    /// The next piece, if it comes soon enough: sooner while `crowded`. None is the end.
    ///
    /// # Errors
    /// Those of the pieces; [`ServiceError`] if hardly anything comes.
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
        "hardly anything has come for a while, and other uploads wait; send it again when it comes faster".to_owned()
    } else {
        format!("hardly anything has come for {} s; send it again when it comes faster", IDLE.as_secs())
    };
    ServiceError::new(Code::DeadlineExceeded, "UPLOAD_IDLE", message)
}
