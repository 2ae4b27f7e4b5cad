//! Retries a batch's failed requests: a new batch of a new input file with the lines that ended in its error file.

use bytes::{BufMut, BytesMut};

use super::{
    Code, Service, ServiceError, Span,
    batches::{Shown, asked},
    error::{self, Violations, damaged, line_name},
    rules,
};
use crate::{
    access::{Account, Caller, Work},
    blobs::{BlobError, Blobs},
    domain::{Batch, File, LineSet, NewBatch, Owner, Scope, SegmentIndex, SegmentRef, request_line},
    ingest::{Begun, Ingest, IngestError, NewUpload},
    results::name_of,
    store::{SegmentRecord, Store, StoreError},
};

/// Prefix of the idempotency keys of files of failed lines. Clients' keys contain no control characters.
const RETRY_KEY: &str = "\u{1}retry:";
/// Segments read per query.
const SEGMENT_PAGE: u64 = 256;

/// Why a file of failed lines was not created.
#[derive(Debug, thiserror::Error)]
enum RetryError {
    /// The batch is still running: more lines may fail.
    #[error("the batch has not ended; wait for it or cancel it")]
    NotEnded,
    /// No line failed.
    #[error("no request of the batch failed: there is nothing to retry")]
    NothingFailed,
    /// The input file has been deleted.
    #[error("the batch's input file is gone; upload the requests again")]
    InputGone,
    /// The result files have been deleted, and with them what failed.
    #[error("the batch's results have been deleted, so it is no longer known which requests failed")]
    ResultsDeleted,
    /// The input object is not what its rows say.
    #[error("{0}")]
    Corrupt(String),
    /// The new file could not be made.
    #[error(transparent)]
    Ingest(#[from] IngestError),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The blob store failed.
    #[error(transparent)]
    Blob(#[from] BlobError),
}

impl From<RetryError> for ServiceError {
    fn from(error: RetryError) -> Self {
        let refused = |reason| Self::new(Code::FailedPrecondition, reason, error.to_string());
        match error {
            RetryError::NotEnded => refused("BATCH_NOT_ENDED"),
            RetryError::NothingFailed => refused("NO_FAILED_REQUESTS"),
            RetryError::InputGone => refused("INPUT_FILE_GONE"),
            RetryError::ResultsDeleted => refused("RESULTS_DELETED"),
            RetryError::Corrupt(what) => damaged(&what),
            RetryError::Ingest(error) => error::ingest(error, line_name),
            RetryError::Store(error) => error.into(),
            RetryError::Blob(error) => error.into(),
        }
    }
}

impl Service {
    /// Creates a batch of the failed requests of an ended batch. A repeated request id returns the batch that it
    /// created.
    ///
    /// # Errors
    /// [`ServiceError`].
    pub async fn retry_failed(
        &self,
        caller: &Caller,
        account: &Account,
        id: &str,
        completion_window: Option<Span>,
        request_id: String,
    ) -> Result<Shown, ServiceError> {
        let id = rules::batch_id(id)?;
        let mut wrong = Violations::default();
        let window = rules::window(completion_window, &mut wrong);
        let request_id = rules::request_id(request_id, &mut wrong, "request_id");
        wrong.finish()?;
        let hash = asked::hash(&["retry", id.as_str(), &window.as_secs().to_string()]);
        if let Some(existing) = self.by_request_id(caller, request_id.as_deref(), &hash).await? {
            return self.show(caller, existing).await;
        }
        let batch = self.find_batch(caller, &id).await?;
        let _admitted = self.admit(caller, account, batch.counts.failed, self.copied(&batch).await?).await?;
        let key = request_id.as_ref().map(|id| format!("{RETRY_KEY}{id}"));
        let parts = &self.parts;
        let file =
            failed_lines_file(&parts.ingest, &parts.store, &parts.blobs, &batch, &caller.owner, key.as_deref()).await?;
        let new = NewBatch {
            owner: caller.owner.clone(),
            input_file_id: file.id,
            endpoint: batch.endpoint,
            completion_window: window,
            priority: batch.priority,
            metadata: batch.metadata,
            request_id,
            request_hash: Some(hash),
            // Whoever waits for the lines waits for these too.
            webhook: batch.webhook,
            webhook_endpoint_id: batch.webhook_endpoint_id,
            output_expires_after: batch.output_expires_after,
        };
        self.insert(caller, new, true).await
    }

    /// The work of copying a batch's failed lines. Its bytes are estimated as if all lines had the same length.
    async fn copied(&self, batch: &Batch) -> Result<Work, ServiceError> {
        let input = self.parts.store.file(&batch.input_file_id, &Scope::All).await?;
        let bytes = input.map_or(0, |file| u128::try_from(file.bytes).unwrap_or(0));
        let share = |lines: i64| u128::try_from(lines).unwrap_or(0);
        let bytes = bytes * share(batch.counts.failed) / share(batch.counts.total).max(1);
        Ok(Work::Lines(u64::try_from(bytes).unwrap_or(u64::MAX)))
    }
}

/// Creates an input file of exactly the failed lines, byte for byte and in input order, with one segment in memory at a
/// time. It belongs to `owner`. A repeated `request_id` for the same batch returns the same file.
///
/// # Errors
/// [`RetryError`]: then there is no new file.
async fn failed_lines_file(
    ingest: &Ingest,
    store: &Store,
    blobs: &Blobs,
    batch: &Batch,
    owner: &Owner,
    request_id: Option<&str>,
) -> Result<File, RetryError> {
    if !batch.status.is_terminal() {
        return Err(RetryError::NotEnded);
    }
    if batch.counts.failed == 0 {
        return Err(RetryError::NothingFailed);
    }
    let input = store.file(&batch.input_file_id, &Scope::All).await?.ok_or(RetryError::InputGone)?;
    if store.segments(&batch.id, SegmentIndex(0), 1).await?.is_empty() {
        return Err(RetryError::ResultsDeleted);
    }
    let object_key = input.object_key.ok_or(RetryError::InputGone)?;
    let spec = NewUpload {
        owner: owner.clone(),
        filename: format!("failed-of-{}.jsonl", batch.id),
        // A client's request ids for uploads are its own.
        request_id: request_id.map(|id| format!("retry/{}/{id}", batch.id)),
        ..NewUpload::default()
    };
    let mut upload = match ingest.begin(spec).await? {
        Begun::Upload(upload) => upload,
        Begun::Existing(file) => return Ok(*file),
    };
    let mut from = SegmentIndex(0);
    loop {
        let page = store.segments(&batch.id, from, SEGMENT_PAGE).await?;
        let Some(last) = page.last() else { break };
        from = SegmentIndex(last.span.index.0 + 1);
        for segment in page {
            let of = SegmentRef { batch: batch.id.clone(), index: segment.span.index };
            let mut failed = LineSet::default();
            for part in store.parts_of(&of).await? {
                failed.union(&part.content.failed);
            }
            if !failed.is_empty() {
                upload.write(pick(blobs, &object_key, &of, &segment, &failed).await?.freeze()).await?;
            }
        }
    }
    Ok(upload.finish().await?)
}

/// The lines of a segment that are in `wanted`, each with its line feed.
async fn pick(
    blobs: &Blobs,
    object_key: &str,
    of: &SegmentRef,
    segment: &SegmentRecord,
    wanted: &LineSet,
) -> Result<BytesMut, RetryError> {
    let corrupt = || {
        RetryError::Corrupt(format!("{}: its input differs from what was uploaded", name_of(&of.batch, &segment.span)))
    };
    let start = u64::try_from(segment.span.offset).map_err(|_| corrupt())?;
    let end = start + u64::try_from(segment.span.length).map_err(|_| corrupt())?;
    let bytes = match blobs.get_range(object_key, start..end).await {
        Ok(bytes) => bytes,
        Err(BlobError::Missing(_)) => return Err(RetryError::InputGone),
        Err(error) => return Err(error.into()),
    };
    if bytes.len() as u64 != end - start || segment.span.crc32c.is_some_and(|crc| crc != crc32c::crc32c(&bytes)) {
        return Err(corrupt());
    }
    let mut lines = BytesMut::new();
    let mut picked = 0;
    for (_, line) in request_line::lines(&bytes).filter(|(at, _)| wanted.contains(*at)) {
        lines.put_slice(line);
        lines.put_u8(b'\n');
        picked += 1;
    }
    if picked == wanted.len() { Ok(lines) } else { Err(corrupt()) }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, time::Duration};

    use super::*;
    use crate::{
        domain::{Endpoint, FileId, NewBatch, NodeId, Priority, TokenUsage},
        ingest::Limits,
        results::{PartBuilder, finished, object_key},
        store::{Commit, CreatedBatch, DeletedFile, FinalObject, NewPart},
    };

    struct Place {
        _folder: tempfile::TempDir,
        store: Store,
        blobs: Blobs,
        ingest: Ingest,
    }

    impl Place {
        async fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = |name: &str| Path::new(folder.path()).join(name);
            let store = Store::sqlite(&path("db")).await.unwrap();
            let blobs = Blobs::directory(&path("blobs")).unwrap();
            let ingest = Ingest::new(store.clone(), blobs.clone(), Limits::default(), folder.path().to_owned());
            Self { _folder: folder, store, blobs, ingest }
        }

        async fn upload(&self, text: String) -> File {
            let Begun::Upload(mut upload) = self.ingest.begin(NewUpload::default()).await.unwrap() else { panic!() };
            upload.write(text.into()).await.unwrap();
            upload.finish().await.unwrap()
        }

        async fn batch(&self, input: &FileId) -> Batch {
            let new = NewBatch {
                owner: Owner::nobody(),
                input_file_id: input.clone(),
                endpoint: Endpoint::Score,
                completion_window: Duration::from_secs(3_600),
                priority: Priority::default(),
                metadata: [].into(),
                request_id: None,
                request_hash: None,
                webhook: None,
                webhook_endpoint_id: None,
                output_expires_after: None,
            };
            match self.store.create_batch(new).await.unwrap() {
                CreatedBatch::New(batch) => *batch,
                other => panic!("{other:?}"),
            }
        }

        /// Runs every segment: a line fails if `fails` says so of its number. Each segment ends in two parts.
        async fn run(&self, batch: &Batch, fails: impl Fn(i64) -> bool) -> Batch {
            let node = NodeId::generate();
            while let Some(claimed) =
                self.store.claim_segment(&node, &batch.id, -1, Duration::from_secs(60)).await.unwrap()
            {
                let (of, epoch, span) = (&claimed.segment, claimed.epoch, claimed.span);
                let bytes = self.blobs.get(&claimed.object_key).await.unwrap();
                let bytes = &bytes[span.offset as usize..(span.offset + span.length) as usize];
                let (mut first, mut second) = (PartBuilder::default(), PartBuilder::default());
                for (at, _) in request_line::lines(bytes) {
                    let part = if at % 3 == 0 { &mut first } else { &mut second };
                    if fails(span.first_line + i64::from(at)) {
                        part.fail(at, b"{}\n".to_vec());
                    } else {
                        part.complete(at, b"{}\n".to_vec(), TokenUsage::default());
                    }
                }
                let (_, first) = first.build(object_key(of, epoch, 0));
                let (_, second) = second.build(object_key(of, epoch, 1));
                assert_eq!(self.store.commit_part(of, epoch, &first).await.unwrap(), Commit::Done);
                let lines = |count: fn(&NewPart) -> usize| (count(&first) + count(&second)) as u64;
                let object = FinalObject {
                    output_lines: lines(|part| part.completed.len()),
                    error_lines: lines(|part| part.failed.len()),
                    ..finished(&second)
                };
                let end = self.store.finish_segment(of, epoch, Some(&second), &object, &[]).await.unwrap();
                assert_eq!(end, Commit::Done);
            }
            self.store.batch(&batch.id, &Scope::All).await.unwrap().unwrap()
        }

        async fn retry(&self, batch: &Batch, request_id: Option<&str>) -> Result<File, RetryError> {
            failed_lines_file(&self.ingest, &self.store, &self.blobs, batch, &"me".into(), request_id).await
        }
    }

    fn line(n: usize) -> String {
        let body = r#"{ "n":1.0e2,"model":"m"}"#;
        format!(r#"{{"custom_id":"{n}", "method":"POST","url":"/v1/score","body":{body}}}"#)
    }

    #[tokio::test]
    async fn exactly_the_failed_lines_are_in_the_new_file() {
        let place = Place::new().await;
        let ends = ["\n", "\r\n", "\n\n", "\n \t\n"];
        let text: String = (0..2_300).map(|n| line(n) + ends[n % 4]).collect::<String>() + &line(2_300);
        let input = place.upload(format!("\u{feff}{text}")).await;
        let batch = place.batch(&input.id).await;
        assert!(matches!(place.retry(&batch, None).await, Err(RetryError::NotEnded)));
        // None of the second segment, and the last line of all, which has no line feed.
        let lines: Vec<&str> = text.split('\n').collect();
        let fails = |line: i64| line % 7 == 0 && !(1_400..3_100).contains(&line) || line == lines.len() as i64;
        let batch = place.run(&batch, fails).await;
        assert!(batch.status.is_terminal() && batch.segments > 2, "{batch:?}");
        let expected: String = (1..)
            .zip(&lines)
            .filter(|(number, line)| fails(*number) && !line.trim().is_empty())
            .map(|(_, line)| format!("{line}\n"))
            .collect();
        let file = place.retry(&batch, Some("r")).await.unwrap();
        assert_eq!(place.blobs.get(file.object_key.as_deref().unwrap()).await.unwrap(), expected);
        assert_eq!((file.line_count, file.owner.as_str()), (batch.counts.failed, "me"));
        assert_eq!(file.filename, format!("failed-of-{}.jsonl", batch.id));
        assert_eq!(place.retry(&batch, Some("r")).await.unwrap(), file);
        assert_ne!(place.retry(&batch, None).await.unwrap().id, file.id);
    }

    #[tokio::test]
    async fn nothing_failed_and_a_deleted_input_are_told() {
        let place = Place::new().await;
        let input = place.upload((0..3).map(|n| line(n) + "\n").collect()).await;
        let good = place.batch(&input.id).await;
        let good = place.run(&good, |_| false).await;
        assert!(matches!(place.retry(&good, None).await, Err(RetryError::NothingFailed)));
        let bad = place.batch(&input.id).await;
        let bad = place.run(&bad, |_| true).await;
        assert_eq!(place.retry(&bad, None).await.unwrap().line_count, 3);
        let files = place.store.count_files().await.unwrap();
        // The object alone, then the row as well.
        place.blobs.delete(input.object_key.as_deref().unwrap()).await.unwrap();
        assert!(matches!(place.retry(&bad, None).await, Err(RetryError::InputGone)));
        assert_eq!(place.store.delete_file(&input.id, &Scope::All).await.unwrap(), DeletedFile::Deleted);
        assert!(matches!(place.retry(&bad, None).await, Err(RetryError::InputGone)));
        assert_eq!(place.store.count_files().await.unwrap(), files - 1);
    }
}
