//! Batches: create, show, list, cancel, retry; and one request at once.

use std::time::Duration;

use tonic::{Code, Status, metadata::MetadataMap};

use super::{
    MESSAGE_LIMIT, Services, convert, gate,
    page::Page,
    service::Api,
    status::{self, error, invalid_field},
    validate::{self, BatchInput, inline_name},
    webhooks::webhook_of_batch,
};
use crate::{
    access::{Account, Admitted, Caller, LimitReached, Role, Work},
    domain::{Batch, BatchId, Endpoint, File, FileId, FileKind, NewBatch, Scope},
    fleet::Tenant,
    ingest::NewUpload,
    pb,
    progress::Progress,
    results::retry::failed_lines_file,
    store::{BatchFilter, CancelledBatch, CreatedBatch},
};

/// How long a request may run where the client sets no deadline.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(600);
/// Keys of files that the server makes itself. Clients' keys have no control characters.
const INLINE_KEY: &str = "\u{1}inline:";
/// The name of the file of inline requests.
const INLINE_NAME: &str = "inline.jsonl";
const RETRY_KEY: &str = "\u{1}retry:";

impl Api {
    pub(super) async fn create(
        &self,
        caller: &Caller,
        account: &Account,
        mut request: pb::CreateBatchRequest,
    ) -> Result<pb::Batch, Status> {
        let (webhook, webhook_endpoint_id) = (request.webhook.take(), std::mem::take(&mut request.webhook_endpoint_id));
        let new = validate::create_batch(request)?;
        // First of all: the same call again answers the same, whatever has become of its file since.
        if let Some(existing) = self.by_request_id(caller, new.request_id.as_deref()).await? {
            return self.show(caller, existing).await;
        }
        let (webhook, webhook_endpoint_id) =
            webhook_of_batch(&self.services.webhooks, caller, webhook, webhook_endpoint_id, &new.metadata).await?;
        let (file, endpoint, inline, _admitted) = match new.input {
            BatchInput::File(id) => {
                let file = self.input_file(caller, &id).await?;
                let endpoint = endpoint_of(&file, new.endpoint)?;
                let admitted = self.admit(caller, account, file.line_count, Work::Batch).await?;
                (file, endpoint, false, admitted)
            }
            BatchInput::Inline(requests) => {
                let endpoint = new.endpoint.ok_or_else(|| invalid_field("endpoint", "must be given"))?;
                let lines = i64::try_from(requests.len()).unwrap_or(i64::MAX);
                let bytes = requests.iter().map(|request| request.body.len() as u64).sum();
                let admitted = self.admit(caller, account, lines, Work::Lines(bytes)).await?;
                let key = new.request_id.as_ref().map(|id| format!("{INLINE_KEY}{id}"));
                let spec = NewUpload {
                    owner: caller.owner.clone(),
                    filename: INLINE_NAME.to_owned(),
                    total_bytes: None,
                    request_id: key,
                };
                let made = self.services.ingest.inline(spec, endpoint, &requests).await;
                (made.map_err(|error| status::ingest(error, inline_name))?, endpoint, true, admitted)
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
            webhook,
            webhook_endpoint_id,
        };
        self.insert(caller, new, inline).await
    }

    /// Lets a call make work, which every way to make some passes: its lines, bytes and turn count as those of an upload and
    /// a batch. What is not allowed is refused before anything is written; [`Self::insert`] counts the lines once more, with
    /// the batch, so that batches created at the same moment can't pass the limit together.
    async fn admit(&self, caller: &Caller, account: &Account, lines: i64, work: Work) -> Result<Admitted, Status> {
        if lines > 0 && self.limits.most_lines().is_some() {
            let queued = self.services.store.queued_lines(&caller.owner).await.map_err(status::store)?;
            self.limits.lines(queued, lines).map_err(status::limit)?;
        }
        self.limits.admit(&caller.owner, account, work).await.map_err(status::limit)
    }

    /// Creates the batch. `made`: its file was made for it, and goes if it is not needed.
    async fn insert(&self, caller: &Caller, new: NewBatch, made: bool) -> Result<pb::Batch, Status> {
        let file = new.input_file_id.clone();
        let most = self.limits.most_lines();
        match self.services.store.create_batch_within(new, &caller.scope(), most).await.map_err(status::store)? {
            CreatedBatch::New(batch) => self.show(caller, *batch).await,
            CreatedBatch::Existing(batch) => {
                if made && batch.input_file_id != file {
                    // Best effort: nobody knows its id.
                    let _ = self.services.store.delete_file(&file, &caller.scope()).await;
                }
                self.show(caller, *batch).await
            }
            CreatedBatch::TooManyLines { queued, added } => {
                if made {
                    let _ = self.services.store.delete_file(&file, &caller.scope()).await;
                }
                let most = most.unwrap_or(i64::MAX);
                Err(status::limit(LimitReached::QueuedLines { queued, added, most }.counted()))
            }
            CreatedBatch::FileNotFound => Err(status::no_file(&file)),
            CreatedBatch::WrongPurpose => Err(not_an_input()),
        }
    }

    async fn by_request_id(&self, caller: &Caller, request_id: Option<&str>) -> Result<Option<Batch>, Status> {
        match request_id {
            Some(id) => self.services.store.batch_by_request_id(&caller.owner, id).await.map_err(status::store),
            None => Ok(None),
        }
    }

    /// A file that a batch can read.
    async fn input_file(&self, caller: &Caller, id: &FileId) -> Result<File, Status> {
        let file = self.services.store.file(id, &caller.scope()).await.map_err(status::store)?;
        let file = file.ok_or_else(|| status::no_file(id))?;
        match file.kind {
            FileKind::Input => Ok(file),
            FileKind::Output(_) | FileKind::Error(_) => Err(not_an_input()),
        }
    }

    /// A batch that the caller may see.
    pub(super) async fn find(&self, caller: &Caller, id: &BatchId) -> Result<Batch, Status> {
        let batch = self.services.store.batch(id, &caller.scope()).await.map_err(status::store)?;
        batch.ok_or_else(|| status::no_batch(id))
    }

    /// A batch with its progress.
    async fn show(&self, caller: &Caller, batch: Batch) -> Result<pb::Batch, Status> {
        let progress = shown(caller, self.services.hub.progress(&batch).await.map_err(status::store)?);
        Ok(convert::batch(batch, Some(progress), &self.services.webhooks))
    }

    pub(super) async fn batch(&self, caller: &Caller, request: &pb::GetBatchRequest) -> Result<pb::Batch, Status> {
        let id = validate::batch_id(&request.batch_id)?;
        self.show(caller, self.find(caller, &id).await?).await
    }

    pub(super) async fn batches(
        &self,
        caller: &Caller,
        request: pb::ListBatchesRequest,
    ) -> Result<pb::ListBatchesResponse, Status> {
        let statuses = validate::batch_filter(&request)?;
        let filter = BatchFilter {
            scope: caller.scope(),
            statuses,
            model: (!request.model.is_empty()).then_some(request.model),
            metadata: request.metadata,
        };
        let page = Page::parse(request.page_size, &request.page_token, &["batches", &format!("{filter:?}")])?;
        let after = page.after.clone().map(BatchId::from_text);
        let found = self.services.store.batches(&filter, after.as_ref(), page.size + 1).await.map_err(status::store)?;
        let progress = self.services.hub.progresses(&found).await.map_err(status::store)?;
        let webhooks = &self.services.webhooks;
        let found = found.into_iter().zip(progress);
        let found = found.map(|(batch, progress)| convert::batch(batch, Some(shown(caller, progress)), webhooks));
        let (batches, next_page_token) = page.finish(found.collect(), |batch| &batch.id);
        Ok(pb::ListBatchesResponse { batches, next_page_token })
    }

    pub(super) async fn cancel(&self, caller: &Caller, request: &pb::CancelBatchRequest) -> Result<pb::Batch, Status> {
        let id = validate::batch_id(&request.batch_id)?;
        match self.services.store.cancel_batch(&id, &caller.scope()).await.map_err(status::store)? {
            CancelledBatch::Batch(batch) => self.show(caller, *batch).await,
            CancelledBatch::NotFound => Err(status::no_batch(&id)),
            CancelledBatch::Ended(batch) => {
                let message = format!("the batch is {} and can't be cancelled any more", batch.status.as_str());
                Err(error(Code::FailedPrecondition, "BATCH_TERMINAL", message))
            }
        }
    }

    pub(super) async fn retry_failed(
        &self,
        caller: &Caller,
        account: &Account,
        request: pb::RetryFailedRequestsRequest,
    ) -> Result<pb::Batch, Status> {
        let id = validate::batch_id(&request.batch_id)?;
        let (window, request_id) = validate::retry(request.completion_window, request.request_id)?;
        if let Some(existing) = self.by_request_id(caller, request_id.as_deref()).await? {
            return self.show(caller, existing).await;
        }
        let batch = self.find(caller, &id).await?;
        let _admitted = self.admit(caller, account, batch.counts.failed, self.copied(&batch).await?).await?;
        let key = request_id.as_ref().map(|id| format!("{RETRY_KEY}{id}"));
        let Services { ingest, store, blobs, .. } = &self.services;
        let made = failed_lines_file(ingest, store, blobs, &batch, &caller.owner, key.as_deref()).await;
        let file = made.map_err(status::retry_failed)?;
        let new = NewBatch {
            owner: caller.owner.clone(),
            input_file_id: file.id,
            endpoint: batch.endpoint,
            completion_window: window,
            priority: batch.priority,
            metadata: batch.metadata,
            request_id,
            // Whoever waits for the lines waits for these too.
            webhook: batch.webhook,
            webhook_endpoint_id: batch.webhook_endpoint_id,
        };
        self.insert(caller, new, true).await
    }

    /// The work of writing a batch's failed lines again: about so many bytes, as if all its lines were equally long.
    async fn copied(&self, batch: &Batch) -> Result<Work, Status> {
        let input = self.services.store.file(&batch.input_file_id, &Scope::All).await.map_err(status::store)?;
        let bytes = input.map_or(0, |file| u128::try_from(file.bytes).unwrap_or(0));
        let share = |lines: i64| u128::try_from(lines).unwrap_or(0);
        let bytes = bytes * share(batch.counts.failed) / share(batch.counts.total).max(1);
        Ok(Work::Lines(u64::try_from(bytes).unwrap_or(u64::MAX)))
    }

    pub(super) async fn run_now(
        &self,
        caller: &Caller,
        account: &Account,
        request: pb::InferRequest,
        deadline: Option<Duration>,
    ) -> Result<pb::InferResponse, Status> {
        let (endpoint, model, body) = validate::infer(request)?;
        let timeout = deadline.unwrap_or(DEFAULT_DEADLINE);
        // It runs at once or not at all: it is not queued.
        let _admitted = self.admit(caller, account, 0, Work::Now(body.len() as u64)).await?;
        let tenant = Tenant::named(account.as_str()).weighing(self.weights.of(&caller.owner));
        let answer = self.services.fleet.infer(tenant, endpoint, &model, body, timeout).await.map_err(status::infer)?;
        if answer.body.len() > MESSAGE_LIMIT - 4_096 {
            let message = format!("the answer is {} bytes long, more than a message can carry", answer.body.len());
            return Err(error(Code::ResourceExhausted, "ANSWER_TOO_LARGE", message));
        }
        Ok(pb::InferResponse {
            status_code: answer.status.into(),
            body: answer.body,
            worker_id: answer.worker.into_string(),
        })
    }
}

/// A batch's progress as the caller may see it.
pub(super) fn shown(caller: &Caller, progress: Progress) -> Progress {
    match caller.role {
        Role::Admin => progress,
        Role::Submit => progress.public(),
    }
}

fn not_an_input() -> Status {
    invalid_field("input_file_id", "is the result of a batch: only a file that UploadFile made can be run")
}

/// The endpoint of a batch: its file's, which the client may repeat.
fn endpoint_of(file: &File, given: Option<Endpoint>) -> Result<Endpoint, Status> {
    match (file.endpoint, given) {
        (Some(of_file), None) => Ok(of_file),
        (Some(of_file), Some(given)) if of_file == given => Ok(given),
        (Some(of_file), Some(_)) => {
            Err(invalid_field("endpoint", format!("must be {of_file}, as in the file's lines, or left empty")))
        }
        // No input file is without, but what is given is then all there is.
        (None, given) => given.ok_or_else(|| invalid_field("endpoint", "must be given")),
    }
}

/// The client's deadline, a little earlier, so that our answer says what it was.
pub(super) fn deadline(metadata: &MetadataMap) -> Option<Duration> {
    let timeout = gate::timeout(metadata.get("grpc-timeout")?.to_str().ok()?)?;
    Some(timeout.saturating_sub((timeout / 20).min(Duration::from_millis(50))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_is_a_little_earlier_than_the_clients() {
        let of = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            deadline(&metadata)
        };
        assert_eq!(of("10S"), Some(Duration::from_millis(9_950)));
        assert_eq!(of("1000m"), Some(Duration::from_millis(950)));
        assert_eq!(of("0n"), Some(Duration::ZERO));
        assert_eq!(of("10s"), None);
        assert_eq!(deadline(&MetadataMap::new()), None);
    }
}
