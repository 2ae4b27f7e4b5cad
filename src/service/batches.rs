//! Creates, shows, lists and cancels batches.

pub(super) mod asked;

use std::{collections::BTreeMap, time::Duration};

use futures::future::BoxFuture;

use super::{
    Code, Found, Page, Service, ServiceError, Span,
    error::{self, Violations, no_batch, no_file},
    filters, rules,
    webhooks::NewWebhook,
};
use crate::{
    access::{Account, Caller, LimitReached, Role, Work},
    domain::{Batch, BatchId, BatchStatus, Endpoint, File, FileId, FileKind, NewBatch, Priority},
    ingest::{INLINE_MAX_BYTES, INLINE_MAX_REQUESTS, InlineRequest, NewUpload},
    progress::Progress,
    store::{BatchFilter, CancelledBatch, CreatedBatch, DeletedBatch, PageOrder},
};

/// Prefix of the idempotency keys of files that the server creates. Clients' keys contain no control characters.
const INLINE_KEY: &str = "\u{1}inline:";
/// The name of the file of inline requests.
const INLINE_NAME: &str = "inline.jsonl";

/// A batch with its progress, as the caller may see it.
#[derive(Clone, Debug)]
pub struct Shown {
    /// The batch.
    pub batch: Batch,
    /// The progress.
    pub progress: Progress,
}

/// A batch to create, as a client describes it.
#[derive(Default)]
pub struct CreateBatch {
    /// The source of its requests.
    pub input: Option<BatchInput>,
    /// The `url` of its requests. Empty: the file's.
    pub endpoint: String,
    /// The time after which it expires.
    pub completion_window: Option<Span>,
    /// Its priority over the caller's other batches.
    pub priority: i32,
    /// The client's metadata.
    pub metadata: BTreeMap<String, String>,
    /// The client's idempotency key. Empty: none.
    pub request_id: String,
    /// The receiver of its events.
    pub webhook: Option<NewWebhook>,
    /// A registered endpoint as the receiver instead. Empty: none.
    pub webhook_endpoint_id: String,
    /// How long its result files stay after its end. `None`: until they are deleted.
    pub output_expires_after: Option<Span>,
}

/// The source of a new batch's requests.
#[derive(Debug)]
pub enum BatchInput {
    /// An uploaded file, by its id.
    File(String),
    /// The requests themselves.
    Inline(Vec<InlineRequest>),
}

/// A client's request for a list of batches.
#[derive(Clone, Debug, Default)]
pub struct ListBatches {
    /// Only batches in one of these states. Empty: in any. `None`: a state that does not exist.
    pub statuses: Vec<Option<BatchStatus>>,
    /// Only batches that use this model. Empty: any.
    pub model: String,
    /// Only batches whose metadata has all of these pairs.
    pub metadata: BTreeMap<String, String>,
    /// The page size. 0: the server's default.
    pub page_size: i32,
    /// The token of the previous page. Empty: the first page.
    pub page_token: String,
}

/// A valid [`CreateBatch`], without its webhook.
struct Wanted {
    input: BatchInput,
    /// `None`: the file's.
    endpoint: Option<Endpoint>,
    window: Duration,
    priority: Priority,
    metadata: BTreeMap<String, String>,
    request_id: Option<String>,
    output_expires_after: Option<Duration>,
}

impl Service {
    /// Creates a batch. A repeated call with the same request id returns the batch that it created; a call for something
    /// else is refused.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn create_batch(
        &self,
        caller: &Caller,
        account: &Account,
        mut of: CreateBatch,
    ) -> Result<Shown, ServiceError> {
        let hash = asked::for_batch(&of);
        let (webhook, endpoint_id) = (of.webhook.take(), std::mem::take(&mut of.webhook_endpoint_id));
        let new = wanted(of)?;
        // First of all: the same call again answers the same, whatever has become of its file since.
        if let Some(existing) = self.by_request_id(caller, new.request_id.as_deref(), &hash).await? {
            return self.show(caller, existing).await;
        }
        let (webhook, webhook_endpoint_id) = self.webhook_of_batch(caller, webhook, endpoint_id, &new.metadata).await?;
        let (file, endpoint, inline, _admitted) = match new.input {
            BatchInput::File(id) => {
                let file = self.input_file(caller, &FileId::from_text(id)).await?;
                let endpoint = endpoint_of(&file, new.endpoint)?;
                let admitted = self.admit(caller, account, file.line_count, Work::Batch).await?;
                (file, endpoint, false, admitted)
            }
            BatchInput::Inline(requests) => {
                let endpoint = new.endpoint.ok_or_else(|| ServiceError::field("endpoint", "must be given"))?;
                let lines = i64::try_from(requests.len()).unwrap_or(i64::MAX);
                let bytes = requests.iter().map(|request| request.body.len() as u64).sum();
                let admitted = self.admit(caller, account, lines, Work::Lines(bytes)).await?;
                let key = new.request_id.as_ref().map(|id| format!("{INLINE_KEY}{id}/{hash}"));
                let spec = NewUpload {
                    owner: caller.owner.clone(),
                    filename: INLINE_NAME.to_owned(),
                    request_id: key,
                    ..NewUpload::default()
                };
                let made = self.parts.ingest.inline(spec, endpoint, &requests).await;
                (made.map_err(|error| error::ingest(error, inline_name))?, endpoint, true, admitted)
            }
        };
        let new = NewBatch {
            owner: caller.owner.clone(),
            input_file_id: file.id,
            endpoint,
            completion_window: new.window,
            priority: new.priority,
            metadata: new.metadata,
            request_id: new.request_id,
            request_hash: Some(hash),
            webhook,
            webhook_endpoint_id,
            output_expires_after: new.output_expires_after,
        };
        self.insert(caller, new, inline).await
    }

    /// Creates the batch. `made`: the file was written for it, and is deleted if it is not needed.
    pub(super) async fn insert(&self, caller: &Caller, new: NewBatch, made: bool) -> Result<Shown, ServiceError> {
        let file = new.input_file_id.clone();
        let (store, scope) = (&self.parts.store, caller.scope());
        let most = self.limits.most_lines();
        match store.create_batch_within(new, &scope, most).await? {
            CreatedBatch::New(batch) => self.show(caller, *batch).await,
            CreatedBatch::Existing(batch) => {
                if made && batch.input_file_id != file {
                    // Best effort: nobody knows its id.
                    let _ = store.delete_file(&file, &scope).await;
                }
                self.show(caller, *batch).await
            }
            CreatedBatch::Reused(batch) => {
                if made {
                    let _ = store.delete_file(&file, &scope).await;
                }
                Err(asked_otherwise(&batch))
            }
            CreatedBatch::TooManyLines { queued, added } => {
                if made {
                    let _ = store.delete_file(&file, &scope).await;
                }
                Err(LimitReached::QueuedLines { queued, added, most: most.unwrap_or(i64::MAX) }.counted().into())
            }
            CreatedBatch::FileNotFound => Err(no_file(&file)),
            CreatedBatch::WrongPurpose => Err(not_an_input()),
        }
    }

    pub(super) async fn by_request_id(
        &self,
        caller: &Caller,
        request_id: Option<&str>,
        hash: &str,
    ) -> Result<Option<Batch>, ServiceError> {
        let Some(id) = request_id else { return Ok(None) };
        match self.parts.store.batch_by_request_id(&caller.owner, id, Some(hash)).await? {
            Some(CreatedBatch::Existing(batch)) => Ok(Some(*batch)),
            Some(CreatedBatch::Reused(batch)) => Err(asked_otherwise(&batch)),
            Some(_) | None => Ok(None),
        }
    }

    /// A file that a batch can read.
    async fn input_file(&self, caller: &Caller, id: &FileId) -> Result<File, ServiceError> {
        let file = self.find_file(caller, id).await?;
        match file.kind {
            FileKind::Input => Ok(file),
            FileKind::Output(_) | FileKind::Error(_) => Err(not_an_input()),
        }
    }

    /// A batch that the caller may see.
    pub(super) async fn find_batch(&self, caller: &Caller, id: &BatchId) -> Result<Batch, ServiceError> {
        self.parts.store.batch(id, &caller.scope()).await?.ok_or_else(|| no_batch(id))
    }

    /// A batch with its progress.
    pub(super) async fn show(&self, caller: &Caller, batch: Batch) -> Result<Shown, ServiceError> {
        let progress = shown(caller, self.parts.hub.progress(&batch).await?);
        Ok(Shown { batch, progress })
    }

    /// One batch.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn batch(&self, caller: &Caller, id: &str) -> Result<Shown, ServiceError> {
        self.show(caller, self.find_batch(caller, &rules::batch_id(id)?).await?).await
    }

    /// The caller's batches, newest first.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn batches(&self, caller: &Caller, of: ListBatches) -> Result<Found<Shown>, ServiceError> {
        let statuses = statuses(&of)?;
        let filter = BatchFilter {
            scope: caller.scope(),
            statuses,
            endpoint: None,
            model: (!of.model.is_empty()).then_some(of.model),
            metadata: of.metadata,
        };
        let page = Page::parse(of.page_size, &of.page_token, &[&filters::of_batches(&filter)])?;
        let after = page.after.clone().map(BatchId::from_text);
        let found = self.parts.store.batches(&filter, after.as_ref(), page.size + 1).await?;
        let progress = self.parts.hub.progresses(&found).await?;
        let items = found.into_iter().zip(progress);
        let items = items.map(|(batch, progress)| Shown { batch, progress: shown(caller, progress) }).collect();
        Ok(Found { items, page })
    }

    /// Batches that follow one in the order from the newest, at most so many, and whether there are more.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn batches_after(
        &self,
        caller: &Caller,
        after: Option<String>,
        limit: u64,
    ) -> Result<(Vec<Shown>, bool), ServiceError> {
        let (filter, after) = (BatchFilter::within(caller.scope()), after.map(BatchId::from_text));
        self.page_of(caller, &filter, PageOrder::Newest, after.as_ref(), limit).await
    }

    /// At most so many batches that follow one, and whether there are more.
    pub(super) fn page_of<'a>(
        &'a self,
        caller: &'a Caller,
        filter: &'a BatchFilter,
        order: PageOrder,
        after: Option<&'a BatchId>,
        limit: u64,
    ) -> BoxFuture<'a, Result<(Vec<Shown>, bool), ServiceError>> {
        Box::pin(async move {
            let mut found = self.parts.store.batches_in(filter, order, after, limit + 1).await?;
            let has_more = found.len() as u64 > limit;
            found.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
            let progress = self.parts.hub.progresses(&found).await?;
            let items = found.into_iter().zip(progress);
            let items = items.map(|(batch, progress)| Shown { batch, progress: shown(caller, progress) }).collect();
            Ok((items, has_more))
        })
    }

    /// Begins to cancel a batch.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn cancel_batch(&self, caller: &Caller, id: &str) -> Result<Shown, ServiceError> {
        let id = rules::batch_id(id)?;
        match self.parts.store.cancel_batch(&id, &caller.scope()).await? {
            CancelledBatch::Batch(batch) => self.show(caller, *batch).await,
            CancelledBatch::NotFound => Err(no_batch(&id)),
            CancelledBatch::Ended(batch) => {
                let message = format!("the batch is {} and can't be cancelled any more", batch.status.as_str());
                let facts = Box::new([("status", batch.status.as_str().to_owned())]);
                Err(ServiceError { facts, ..ServiceError::new(Code::FailedPrecondition, "BATCH_TERMINAL", message) })
            }
        }
    }
}

impl Service {
    /// Deletes an ended batch with its result files, and with its input if that came with it.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn delete_batch(&self, caller: &Caller, id: &str) -> Result<(), ServiceError> {
        let id = rules::batch_id(id)?;
        match self.parts.store.delete_batch(&id, &caller.scope()).await? {
            DeletedBatch::Deleted => Ok(()),
            DeletedBatch::NotFound => Err(no_batch(&id)),
            DeletedBatch::NotEnded => Err(ServiceError::not_ended()),
        }
    }
}

/// A batch's progress as the caller may see it.
pub(super) fn shown(caller: &Caller, progress: Progress) -> Progress {
    match caller.role {
        Role::Admin => progress,
        Role::Submit => progress.public(),
    }
}

fn wanted(of: CreateBatch) -> Result<Wanted, ServiceError> {
    let mut wrong = Violations::default();
    let inline = matches!(of.input, Some(BatchInput::Inline(_)));
    let endpoint = match of.endpoint.as_str() {
        "" if !inline => None,
        text => rules::endpoint(text, &mut wrong),
    };
    let window = rules::window(of.completion_window, &mut wrong);
    let priority = Priority::new(of.priority);
    wrong.check(priority.is_some(), "priority", "must be -1, 0 or 1");
    rules::metadata(&of.metadata, &mut wrong);
    let request_id = rules::request_id(of.request_id, &mut wrong, "request_id");
    let output_expires_after = rules::expiry(of.output_expires_after, &mut wrong, "output_expires_after");
    match &of.input {
        Some(BatchInput::File(id)) => {
            let good = !id.is_empty() && rules::storable(id, rules::NAME);
            wrong.check(good, "input_file_id", "must be a file that UploadFile returned");
        }
        Some(BatchInput::Inline(requests)) => inline_requests(requests, &mut wrong),
        None => wrong.add("input", "must be input_file_id or inline_requests"),
    }
    wrong.finish()?;
    let input = of.input.ok_or_else(|| ServiceError::field("input", "must be input_file_id or inline_requests"))?;
    let (priority, metadata) = (priority.unwrap_or_default(), of.metadata);
    Ok(Wanted { input, endpoint, window, priority, metadata, request_id, output_expires_after })
}

/// Checks the number and the size of inline requests. [`crate::ingest`] checks their content.
fn inline_requests(of: &[InlineRequest], wrong: &mut Violations) {
    let (most, bytes) = (INLINE_MAX_REQUESTS, INLINE_MAX_BYTES);
    let count = of.len();
    wrong.check((1..=most).contains(&count), "inline_requests.requests", format!("must be 1 to {most}, are {count}"));
    let size: usize = of.iter().map(|request| request.custom_id.len() + request.body.len()).sum();
    wrong.check(size <= bytes, "inline_requests", "must be 3 MiB together: upload a file instead");
}

/// Names an inline request in the violations.
fn inline_name(line: u64) -> String {
    format!("inline_requests.requests[{}]", line.saturating_sub(1))
}

fn statuses(of: &ListBatches) -> Result<Vec<BatchStatus>, ServiceError> {
    let mut wrong = Violations::default();
    let mut statuses = Vec::new();
    for (at, status) in of.statuses.iter().enumerate() {
        match status {
            Some(status) if statuses.contains(status) => {}
            Some(status) => statuses.push(*status),
            None => wrong.add(format!("statuses[{at}]"), "must be a known status other than BATCH_STATUS_UNSPECIFIED"),
        }
    }
    let good = rules::storable(&of.model, rules::NAME);
    wrong.check(good, "model", format!("must be at most {} bytes without NUL", rules::NAME));
    rules::metadata(&of.metadata, &mut wrong);
    wrong.finish()?;
    Ok(statuses)
}

fn asked_otherwise(batch: &BatchId) -> ServiceError {
    let message = format!("the request_id has made the batch {batch} with other parameters before; use a new one");
    ServiceError::new(Code::AlreadyExists, "REQUEST_ID_REUSED", message)
}

fn not_an_input() -> ServiceError {
    ServiceError::field("input_file_id", "is a batch's result: only an uploaded file can be run")
}

/// The endpoint of a batch: that of its file, which the client may repeat.
fn endpoint_of(file: &File, given: Option<Endpoint>) -> Result<Endpoint, ServiceError> {
    match (file.endpoint, given) {
        (Some(of_file), None) => Ok(of_file),
        (Some(of_file), Some(given)) if of_file == given => Ok(given),
        (Some(of_file), Some(_)) => {
            Err(ServiceError::field("endpoint", format!("must be {of_file}, as in the file's lines, or left empty")))
        }
        // No input file is without, but what is given is then all there is.
        (None, given) => given.ok_or_else(|| ServiceError::field("endpoint", "must be given")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(error: ServiceError) -> Vec<String> {
        error.violations.into_iter().map(|one| one.field).collect()
    }

    #[test]
    fn everything_wrong_is_named_at_once() {
        let of = CreateBatch {
            endpoint: "/v1/nothing".into(),
            completion_window: Some(Ok(Duration::from_secs(60))),
            priority: 7,
            metadata: [(String::new(), "x".repeat(513))].into(),
            request_id: "x".repeat(129),
            ..CreateBatch::default()
        };
        let expected =
            ["endpoint", "completion_window", "priority", "metadata[\"\"]", "metadata[\"\"]", "request_id", "input"];
        assert_eq!(fields(wanted(of).map(drop).unwrap_err()), expected);
    }

    #[test]
    fn unknown_states_are_named_and_double_ones_count_once() {
        let validating = Some(BatchStatus::Validating);
        let of = ListBatches {
            model: "\0".into(),
            statuses: vec![None, None, validating, validating],
            ..ListBatches::default()
        };
        assert_eq!(fields(statuses(&of).unwrap_err()), ["statuses[0]", "statuses[1]", "model"]);
        let of = ListBatches { statuses: vec![validating, validating], ..ListBatches::default() };
        assert_eq!(statuses(&of).unwrap(), [BatchStatus::Validating]);
    }
}
