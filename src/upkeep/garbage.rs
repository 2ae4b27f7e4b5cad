//! Deletes objects that no row names any more.

use std::time::Duration;

use futures::{FutureExt, future::BoxFuture};

use super::{Sweep, SweepError, Swept};
use crate::{blobs::Blobs, store::Store};

const EVERY: Duration = Duration::from_secs(10);
/// The most objects per tick.
const SOME: u64 = 500;

pub(super) struct Garbage {
    store: Store,
    blobs: Blobs,
}

impl Garbage {
    pub(super) fn new(store: &Store, blobs: &Blobs) -> Self {
        Self { store: store.clone(), blobs: blobs.clone() }
    }

    /// Deletes some objects. Those that can't be deleted are due again later, each time after a longer wait.
    async fn collect(&self) -> Result<Swept, SweepError> {
        let taken = self.store.take_garbage(SOME).await?;
        let count = taken.len() as u64;
        if taken.is_empty() {
            return Ok(Swept::default());
        }
        let deleted = self.blobs.delete_all(taken).await;
        let done = deleted.gone.len() as u64;
        if done > 0 {
            self.store.forget_garbage(&deleted.gone).await?;
        }
        let failed = count.saturating_sub(done);
        match deleted.error {
            Some(error) if done == 0 => return Err(SweepError::Here(format!("{count} objects: {error}"))),
            Some(error) => {
                tracing::warn!(objects = failed, %error, "objects could not be deleted; they are tried again later");
            }
            None => {}
        }
        Ok(Swept { done, failed, more: count == SOME })
    }
}

impl Sweep for Garbage {
    fn name(&self) -> &'static str {
        "garbage"
    }

    fn every(&self) -> Duration {
        EVERY
    }

    fn tick(&mut self) -> BoxFuture<'_, Result<Swept, SweepError>> {
        self.collect().boxed()
    }
}

#[cfg(all(test, unix))]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[tokio::test]
    async fn one_object_that_can_not_be_deleted_keeps_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::sqlite(&folder.path().join("db")).await.unwrap();
        let blobs = Blobs::directory(&folder.path().join("blobs")).unwrap();
        // A folder where an object is expected can't be deleted as one.
        std::fs::create_dir_all(folder.path().join("blobs/inputs/stays/full")).unwrap();
        store.abandon_upload("inputs/stays").await.unwrap();
        let mut sweep = Garbage::new(&store, &blobs);
        assert!(matches!(sweep.tick().await, Err(SweepError::Here(_))), "another node may be able to");
        for number in 0..3 {
            let key = format!("inputs/{number}");
            blobs.put(&key, Bytes::from_static(b"x")).await.unwrap();
            store.abandon_upload(&key).await.unwrap();
        }
        // Due again, together with the others.
        store.abandon_upload("inputs/stays").await.unwrap();
        assert_eq!(sweep.tick().await.unwrap(), Swept { done: 3, failed: 1, more: false });
        assert!(blobs.list("inputs").await.unwrap().iter().all(|key| key.contains("stays")));
        assert_eq!(sweep.tick().await.unwrap(), Swept::default(), "it rests");
    }
}
