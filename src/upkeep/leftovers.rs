//! Deletes objects of ended batches that no row names: a killed or fenced server wrote them.

use std::time::Duration;

use futures::{FutureExt, StreamExt, future::BoxFuture};

use super::{Sweep, SweepError, Swept};
use crate::{blobs::Blobs, domain::BatchId, results, store::Store};

const EVERY: Duration = Duration::from_secs(10);
/// Ended batches per tick whose folders are searched.
const FOLDERS: u64 = 16;
/// The number of folders that are searched at the same time.
const AT_ONCE: usize = 4;
/// Objects of such a folder that are compared with the rows at a time.
const OBJECTS: usize = 500;

pub(super) struct Leftovers {
    store: Store,
    blobs: Blobs,
}

impl Leftovers {
    pub(super) fn new(store: &Store, blobs: &Blobs) -> Self {
        Self { store: store.clone(), blobs: blobs.clone() }
    }

    async fn look(&self) -> Result<Swept, SweepError> {
        let batches = self.store.take_leftovers(FOLDERS).await?;
        let taken = batches.len() as u64;
        let looks = batches.into_iter().map(|batch| async move {
            match self.look_through(&batch).await {
                Ok(objects) => {
                    if objects > 0 {
                        tracing::info!(%batch, objects, "objects that nothing names are deleted");
                    }
                    Ok(objects)
                }
                Err(error) => {
                    tracing::warn!(%batch, %error, "leftover objects could not be deleted; it is tried again later");
                    Err(error)
                }
            }
        });
        let looks: Vec<_> = futures::stream::iter(looks).buffer_unordered(AT_ONCE).collect().await;
        let (mut swept, mut error) = (Swept { more: taken == FOLDERS, ..Swept::default() }, None);
        for look in looks {
            match look {
                Ok(objects) => swept.done += objects,
                Err(failed) => {
                    swept.failed += 1;
                    error = Some(failed);
                }
            }
        }
        match error {
            Some(error) if swept.failed == taken => Err(error),
            _ => Ok(swept),
        }
    }

    /// Deletes the objects of an ended batch that no row names. Returns how many.
    async fn look_through(&self, batch: &BatchId) -> Result<u64, SweepError> {
        let mut found = self.blobs.walk(&results::prefix(batch)).chunks(OBJECTS);
        let (mut count, mut failed) = (0, None);
        while let Some(some) = found.next().await {
            let some: Vec<String> =
                some.into_iter().collect::<Result<_, _>>().map_err(|error| SweepError::Here(error.to_string()))?;
            let unnamed = self.store.unnamed_objects(batch, some).await?;
            if !unnamed.is_empty() {
                let deleted = self.blobs.delete_all(unnamed).await;
                count += deleted.gone.len() as u64;
                failed = failed.or(deleted.error);
            }
        }
        if let Some(error) = failed {
            return Err(SweepError::Here(error.to_string()));
        }
        self.store.forget_leftovers(batch).await?;
        Ok(count)
    }
}

impl Sweep for Leftovers {
    fn name(&self) -> &'static str {
        "leftovers"
    }

    fn every(&self) -> Duration {
        EVERY
    }

    fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>> {
        self.look().boxed()
    }
}
