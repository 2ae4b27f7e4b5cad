//! Reads the results of a batch, one by one or as files.

use futures::{StreamExt, stream::BoxStream};

use super::{Code, Service, ServiceError, rules};
use crate::{
    access::Caller,
    domain::File,
    results::{Cursor, ResultLine},
};

/// The results of a batch so far.
pub struct SoFar {
    /// The lines that were asked for.
    pub lines: BoxStream<'static, Result<ResultLine, ServiceError>>,
    /// The number of the last of them, counted from the first of all.
    pub last_line: u64,
    /// Whether no more will come.
    pub ended: bool,
}

impl Service {
    /// The results of a batch after a cursor; an empty cursor starts at the first. `follow`: also the future ones.
    ///
    /// # Errors
    /// [`ServiceError`], at once or in the stream. The client resumes with the cursor of its last line.
    pub async fn results(
        &self,
        caller: &Caller,
        id: &str,
        cursor: &str,
        follow: bool,
    ) -> Result<BoxStream<'static, Result<ResultLine, ServiceError>>, ServiceError> {
        let id = rules::batch_id(id)?;
        let cursor = match cursor {
            "" => None,
            text => Some(Cursor::parse(text, &id)?),
        };
        self.find_batch(caller, &id).await?;
        if self.shutdown.is_cancelled() {
            return Err(ServiceError::shutting_down());
        }
        let lines = self.parts.reader.results(&id, cursor, follow).await?;
        let shutdown = self.shutdown.clone();
        let lines = async_stream::try_stream! {
            let mut lines = std::pin::pin!(lines);
            loop {
                let line = tokio::select! {
                    biased;
                    () = shutdown.cancelled() => Some(Err(ServiceError::shutting_down())),
                    line = lines.next() => line.map(|line| line.map_err(ServiceError::from)),
                };
                let Some(line) = line else { break };
                yield line?;
            }
        };
        Ok(lines.boxed())
    }

    /// The results of a batch that are there now, without the first `offset` of them, in the order in which they became
    /// durable. That order never changes, so a client goes on with the number of the last line that it has.
    ///
    /// # Errors
    /// [`ServiceError`], at once or in the stream.
    pub async fn results_so_far(&self, caller: &Caller, id: &str, offset: u64) -> Result<SoFar, ServiceError> {
        let id = rules::batch_id(id)?;
        // Read before the lines, because a batch that has ended gets no more of them.
        let ended = self.find_batch(caller, &id).await?.status.is_terminal();
        let (cursor, last_line) = self.parts.reader.after_lines(&id, offset).await?;
        let lines = self.results(caller, id.as_str(), &cursor.to_string(), false).await?;
        let left = usize::try_from(last_line.saturating_sub(offset)).unwrap_or(usize::MAX);
        Ok(SoFar { lines: lines.take(left).boxed(), last_line, ended })
    }

    /// The file of a batch's answers.
    ///
    /// # Errors
    /// [`ServiceError`]: there is no such batch, or no such file yet.
    pub async fn output_file(&self, caller: &Caller, batch: &str) -> Result<File, ServiceError> {
        let batch = self.find_batch(caller, &rules::batch_id(batch)?).await?;
        let id = batch.output_file_id.ok_or_else(|| no_file_yet("OUTPUT_FILE_NOT_FOUND", "output"))?;
        self.find_file(caller, &id).await
    }

    /// The file of a batch's errors.
    ///
    /// # Errors
    /// [`ServiceError`]: there is no such batch, or no such file yet.
    pub async fn error_file(&self, caller: &Caller, batch: &str) -> Result<File, ServiceError> {
        let batch = self.find_batch(caller, &rules::batch_id(batch)?).await?;
        let id = batch.error_file_id.ok_or_else(|| no_file_yet("ERROR_FILE_NOT_FOUND", "error"))?;
        self.find_file(caller, &id).await
    }
}

fn no_file_yet(reason: &'static str, which: &str) -> ServiceError {
    ServiceError::new(Code::NotFound, reason, format!("the batch has no {which} file (yet)"))
}
