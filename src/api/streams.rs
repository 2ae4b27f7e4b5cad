//! Streams to the client: events, results, file bytes.

use futures::{StreamExt, stream::BoxStream};
use tonic::{Code, Status};

use super::{
    LONGEST_MESSAGE, MESSAGE_LIMIT, convert,
    service::Api,
    status::{self, error, shutting_down},
    validate,
};
use crate::{
    access::Caller,
    blobs::BlobError,
    domain::{Revision, Scope, Sequence},
    pb,
    results::{Cursor, ReadError},
};

type Events<T> = BoxStream<'static, Result<T, Status>>;

impl Api {
    pub(super) async fn watch_one(
        &self,
        caller: &Caller,
        request: &pb::WatchBatchRequest,
    ) -> Result<Events<pb::BatchEvent>, Status> {
        const FIELD: &str = "after_revision";
        let id = validate::batch_id(&request.batch_id)?;
        let after = Revision(validate::not_negative(request.after_revision, FIELD)?);
        let interval = validate::min_interval(request.min_interval)?;
        self.find(caller, &id).await?;
        let events = self.services.hub.watch(&id, after, interval).await;
        let events = events.map_err(|error| status::watch(error, FIELD))?;
        let (caller, webhooks) = (caller.clone(), self.services.webhooks.clone());
        let wire = move |event| convert::event(event, &caller, &webhooks);
        Ok(events.map(move |event| event.map(&wire).map_err(|error| status::watch(error, FIELD))).boxed())
    }

    pub(super) async fn watch_all(
        &self,
        caller: &Caller,
        request: &pb::WatchBatchesRequest,
    ) -> Result<Events<pb::BatchEvent>, Status> {
        const FIELD: &str = "after_sequence";
        let after = Sequence(validate::not_negative(request.after_sequence, FIELD)?);
        let interval = validate::min_interval(request.min_interval)?;
        let events = self.services.hub.watch_all(caller.scope(), after, interval).await;
        let events = events.map_err(|error| status::watch(error, FIELD))?;
        let (caller, webhooks) = (caller.clone(), self.services.webhooks.clone());
        let wire = move |event| convert::event(event, &caller, &webhooks);
        Ok(events.map(move |event| event.map(&wire).map_err(|error| status::watch(error, FIELD))).boxed())
    }

    pub(super) async fn results(
        &self,
        caller: &Caller,
        request: &pb::StreamResultsRequest,
    ) -> Result<Events<pb::BatchResult>, Status> {
        let id = validate::batch_id(&request.batch_id)?;
        let cursor = match request.cursor.as_str() {
            "" => None,
            text => Some(Cursor::parse(text, &id).map_err(|error| status::bad_cursor(&error))?),
        };
        self.find(caller, &id).await?;
        if self.shutdown.is_cancelled() {
            return Err(shutting_down());
        }
        let most = usize::try_from(request.max_message_bytes).unwrap_or(0).clamp(MESSAGE_LIMIT, LONGEST_MESSAGE);
        let lines = self.services.reader.results(&id, cursor, request.follow).await.map_err(status::read)?;
        let shutdown = self.shutdown.clone();
        let lines = async_stream::try_stream! {
            let mut lines = std::pin::pin!(lines);
            loop {
                let line = tokio::select! {
                    biased;
                    // The client resumes by the cursor of the last line that it got.
                    () = shutdown.cancelled() => Some(Err(shutting_down())),
                    line = lines.next() => line.map(|line| line.map_err(status::read).and_then(|line| convert::result(line, most))),
                };
                let Some(line) = line else { break };
                yield line?;
            }
        };
        Ok(lines.boxed())
    }

    pub(super) async fn download(
        &self,
        caller: &Caller,
        request: &pb::DownloadFileRequest,
    ) -> Result<Events<pb::FileChunk>, Status> {
        let id = validate::file_id(&request.file_id)?;
        let offset = validate::not_negative(request.offset, "offset")?;
        let file = self.find_file(caller, &id).await?;
        if offset > file.bytes {
            let message = format!("offset {offset} lies beyond the end: the file has {} bytes", file.bytes);
            return Err(error(Code::OutOfRange, "OFFSET_OUT_OF_RANGE", message));
        }
        let from = u64::try_from(offset).unwrap_or(0);
        let pieces = self.services.reader.download(&file, from).await.map_err(status::read)?;
        let (store, mut offset) = (self.services.store.clone(), offset);
        let pieces = async_stream::try_stream! {
            let mut pieces = std::pin::pin!(pieces);
            while let Some(piece) = pieces.next().await {
                let data = match piece {
                    Ok(data) => data,
                    // Deleted under the reader's hands: not the server's fault.
                    Err(ReadError::Blob(BlobError::Missing(_)))
                        if matches!(store.file(&id, &Scope::All).await, Ok(None)) => Err(status::no_file(&id))?,
                    Err(error) => Err(status::read(error))?,
                };
                let at = offset;
                offset += i64::try_from(data.len()).unwrap_or(0);
                yield pb::FileChunk { offset: at, data };
            }
        };
        Ok(pieces.boxed())
    }
}
