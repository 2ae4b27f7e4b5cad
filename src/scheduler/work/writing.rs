//! Writes what is finished of a segment: parts while lines are still open, and one object at the end.

use futures::{FutureExt, future::BoxFuture};

use super::{
    super::{checkpoint::Stop, run::Ended, stages::Stage},
    Work,
};
use crate::{
    blobs::BlobError,
    fault::{self, Fault},
    results::{self, ReadError},
    store::NewPart,
};

impl Work<'_> {
    /// Starts to write finished lines as a part.
    pub(super) fn flush(&mut self) -> BoxFuture<'static, Result<NewPart, Stop>> {
        let oldest = self.oldest.take();
        *self.number += 1;
        let (builder, held) = (std::mem::take(&mut self.builder), std::mem::take(&mut self.held));
        let written = self.checkpoint.clone().part(builder, *self.number);
        // A task of its own: it goes on while the segment waits for something else.
        let task = tokio::spawn(async move {
            let part = written.await;
            drop(held);
            part
        });
        let stages = self.run.stages.clone();
        async move {
            let part = task.await.unwrap_or(Err(Stop::Broken("write a part")));
            if let (Some(oldest), Ok(_)) = (oldest, &part) {
                stages.took(Stage::Persist, oldest.elapsed());
            }
            part
        }
        .boxed()
    }

    pub(super) async fn wait_for(
        &mut self,
        flushing: Option<BoxFuture<'static, Result<NewPart, Stop>>>,
    ) -> Result<(), Stop> {
        if let Some(flush) = flushing {
            self.parts.push(flush.await?);
        }
        Ok(())
    }

    /// Writes the segment's final object, when all lines have a result.
    pub(in crate::scheduler) async fn finish(&mut self) -> Result<Ended, Stop> {
        let oldest = self.oldest.take();
        let ended = self.write_end().await?;
        if let Some(oldest) = oldest {
            self.run.stages.took(Stage::Persist, oldest.elapsed());
        }
        Ok(ended)
    }

    async fn write_end(&mut self) -> Result<Ended, Stop> {
        let (builder, held) = (std::mem::take(&mut self.builder), std::mem::take(&mut self.held));
        let last = if builder.lines() > 0 {
            *self.number += 1;
            Some(self.checkpoint.object(builder, *self.number).await?)
        } else {
            None
        };
        drop(held);
        let all: Vec<&NewPart> = self.parts.iter().chain(&last).collect();
        if let [only] = all.as_slice() {
            self.checkpoint.finish(last.as_ref(), &results::finished(only), &[]).await?;
            return Ok(Ended::Finished);
        }
        let superseded: Vec<String> = all.iter().map(|part| part.object_key.clone()).collect();
        let merge = || {
            *self.number += 1;
            let key = self.checkpoint.object_key(*self.number);
            let (blobs, all) = (&self.run.blobs, &all);
            async move {
                match results::merge(blobs, all, key).await {
                    // Not for another try: the parts themselves are not what they were.
                    Err(ReadError::Corrupt(message) | ReadError::Damaged(message)) => Ok(Err(message)),
                    Err(ReadError::Blob(BlobError::Missing(key))) => Ok(Err(format!("{key} is missing"))),
                    Err(ReadError::Blob(error)) => Err(error),
                    Err(error @ ReadError::Deleted(_)) => Ok(Err(error.to_string())),
                    Err(ReadError::Store(error)) => Ok(Err(error.to_string())),
                    Ok(object) => Ok(Ok(object)),
                }
            }
        };
        match self.checkpoint.patiently("merge a segment's parts", merge).await? {
            Ok(object) => {
                fault::point(Fault::MergedObject);
                self.checkpoint.finish(last.as_ref(), &object, &superseded).await?;
                Ok(Ended::Finished)
            }
            Err(message) => {
                tracing::error!(segment = %self.run.claimed.segment, message, "a part is torn");
                Err(Stop::Torn)
            }
        }
    }

    /// Releases the segment with what is finished.
    pub(in crate::scheduler) async fn release(&mut self) -> Result<Ended, Stop> {
        if self.builder.lines() > 0 {
            let flush = self.flush();
            self.parts.push(flush.await?);
        }
        let (segment, epoch, mask) = (&self.run.claimed.segment, self.run.claimed.epoch, self.list.open_models());
        let release = || self.run.store.release_segment(segment, epoch, mask);
        self.checkpoint.patiently("give a segment back", release).await?;
        Ok(Ended::Released)
    }
}
