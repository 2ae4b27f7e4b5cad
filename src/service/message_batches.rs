//! Batches of Anthropic's clients: batches of the endpoint `/v1/messages` whose requests come with the call, however many.
//! The requests become an input file while they come, so that they are checked, stored and read as every other file.
//!
//! The large calls return boxed futures: the compiler then proves once that each is `Send`, and not again at each caller.

use futures::{StreamExt, future::BoxFuture, stream::BoxStream};

use super::{
    Code, Service, ServiceError,
    batches::{BatchInput, CreateBatch, Shown},
    error::{Violations, no_batch},
    files::FileUpload,
    rules,
};
use crate::{
    access::{Account, Caller, Received},
    domain::{BatchId, Endpoint, FileId, batch::EXPIRY_RANGE},
    ingest::NewUpload,
    results::ResultLine,
    store::{BatchFilter, COMES_WITH_BATCH, PageOrder},
};

/// The name of a file of requests.
const REQUESTS_NAME: &str = "message_batch.jsonl";

/// Where a page of a list lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Beside {
    /// At its beginning.
    Newest,
    /// After this batch: older ones.
    After(String),
    /// Before this batch: newer ones, those next to it.
    Before(String),
}

impl Service {
    /// Begins to take the requests of a new batch, as lines. `received` counts the bytes of the call.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub fn begin_requests<'a>(
        &'a self,
        caller: &'a Caller,
        account: &'a Account,
        request_id: String,
        received: Received,
    ) -> BoxFuture<'a, Result<FileUpload, ServiceError>> {
        Box::pin(async move {
            let mut wrong = Violations::default();
            let request_id = rules::request_id(request_id, &mut wrong, "request_id");
            wrong.finish()?;
            // No client's key begins as this one does.
            let key = request_id.unwrap_or_else(|| format!("\u{1}{}", FileId::generate()));
            let new = NewUpload {
                owner: caller.owner.clone(),
                filename: REQUESTS_NAME.to_owned(),
                request_id: Some(format!("{COMES_WITH_BATCH}{key}")),
                // So that a process that is killed before the batch is made leaves nothing for ever.
                expires_after: Some(EXPIRY_RANGE.1),
                ..NewUpload::default()
            };
            self.begin(caller, account, new, received, request_name).await
        })
    }

    /// Creates a batch of the requests that have come. If that fails, nothing is left of them.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub fn batch_of_requests<'a>(
        &'a self,
        caller: &'a Caller,
        account: &'a Account,
        upload: FileUpload,
        request_id: String,
    ) -> BoxFuture<'a, Result<Shown, ServiceError>> {
        Box::pin(async move {
            let file = upload.finish().await?;
            let of = CreateBatch {
                input: Some(BatchInput::File(file.id.as_str().to_owned())),
                endpoint: Endpoint::Messages.path().to_owned(),
                request_id,
                ..CreateBatch::default()
            };
            let made = self.create_batch(caller, account, of).await;
            if made.as_ref().is_ok_and(|made| made.batch.input_file_id == file.id) {
                return made;
            }
            // Best effort: nobody knows its id. One that a batch reads stays.
            let _ = self.parts.store.delete_file(&file.id, &caller.scope()).await;
            let made = made?;
            if made.batch.endpoint != Endpoint::Messages {
                let message = format!("the request_id has made the batch {} before; use a new one", made.batch.id);
                return Err(ServiceError::new(Code::AlreadyExists, "REQUEST_ID_REUSED", message));
            }
            Ok(made)
        })
    }

    /// The most bytes of one request with its line.
    #[must_use]
    pub fn longest_line(&self) -> usize {
        self.parts.ingest.limits().max_line_bytes
    }

    /// One batch. Batches of other endpoints are unknown in this dialect.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn message_batch(&self, caller: &Caller, id: &str) -> Result<Shown, ServiceError> {
        let id = rules::batch_id(id)?;
        let batch = self.find_batch(caller, &id).await?;
        if batch.endpoint != Endpoint::Messages {
            return Err(no_batch(&id));
        }
        self.show(caller, batch).await
    }

    /// The caller's batches, newest first, at most so many, and whether there are more in that direction.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn message_batches(
        &self,
        caller: &Caller,
        beside: Beside,
        limit: u64,
    ) -> Result<(Vec<Shown>, bool), ServiceError> {
        let filter = BatchFilter { endpoint: Some(Endpoint::Messages), ..BatchFilter::within(caller.scope()) };
        let (order, from) = match beside {
            Beside::Newest => (PageOrder::Newest, None),
            Beside::After(id) => (PageOrder::Newest, Some(BatchId::from_text(id))),
            Beside::Before(id) => (PageOrder::Oldest, Some(BatchId::from_text(id))),
        };
        let (mut found, has_more) = self.page_of(caller, &filter, order, from.as_ref(), limit).await?;
        if order == PageOrder::Oldest {
            found.reverse();
        }
        Ok((found, has_more))
    }

    /// Begins to cancel a batch.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn cancel_message_batch(&self, caller: &Caller, id: &str) -> Result<Shown, ServiceError> {
        self.message_batch(caller, id).await?;
        self.cancel_batch(caller, id).await
    }

    /// Deletes an ended batch with its results.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn delete_message_batch(&self, caller: &Caller, id: &str) -> Result<(), ServiceError> {
        self.message_batch(caller, id).await?;
        self.delete_batch(caller, id).await
    }

    /// The results of an ended batch, in the order in which they came.
    ///
    /// # Errors
    /// [`ServiceError`], at once or in the stream.
    pub async fn message_results(
        &self,
        caller: &Caller,
        id: &str,
    ) -> Result<BoxStream<'static, Result<ResultLine, ServiceError>>, ServiceError> {
        let batch = self.message_batch(caller, id).await?.batch;
        if !batch.status.is_terminal() {
            return Err(ServiceError::not_ended());
        }
        let mut lines = self.results(caller, id, "", false).await?;
        // What can't be read at all is said before the answer begins.
        let first = lines.next().await.transpose()?;
        Ok(futures::stream::iter(first.map(Ok)).chain(lines).boxed())
    }
}

/// Names a request in the violations.
fn request_name(line: u64) -> String {
    format!("requests[{}]", line.saturating_sub(1))
}
