//! Checks that the objects belong to the database. An object and a row of the database hold the same store id. A server
//! that sees other objects than the other servers (another bucket, its own directory, a volume that is not mounted)
//! must not take objects for lost, must not write any there, and must not fail batches because of it.

use std::sync::Arc;

use bytes::Bytes;
use object_store::{ObjectStoreExt, path::Path};
use parking_lot::Mutex;

use super::{BlobError, Blobs};

/// The object that holds the id.
pub const ID_KEY: &str = "store-id";
/// An object that is written and deleted to test access.
const PROBE_KEY: &str = "store-probe";
/// The longest id; anything longer is not one.
const LONGEST: usize = 100;

/// What this process knows about the store's id.
#[derive(Debug, Default)]
pub(super) struct Identity {
    state: Arc<Mutex<State>>,
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self { state: self.state.clone() }
    }
}

#[derive(Debug, Default)]
struct State {
    /// The id in the database. `None`: it has not been read, as in tests.
    expected: Option<String>,
    /// Why the store is not the database's. `None`: no reason is known.
    foreign: Option<String>,
}

impl Blobs {
    /// Tests that objects can be written, read and deleted, and returns the store's id, if it has one.
    ///
    /// # Errors
    /// [`BlobError`].
    pub async fn probe(&self) -> Result<Option<String>, BlobError> {
        let found = self.id().await?;
        self.put(PROBE_KEY, Bytes::from_static(b"whether objects can be written here\n")).await?;
        self.delete(PROBE_KEY).await?;
        Ok(found)
    }

    /// Writes the store's id.
    ///
    /// # Errors
    /// [`BlobError`].
    pub async fn give_id(&self, id: &str) -> Result<(), BlobError> {
        self.put(ID_KEY, Bytes::from(format!("{id}\n"))).await
    }

    /// From now on, reads, writes and reports of missing objects fail unless the store has this id.
    ///
    /// # Errors
    /// [`BlobError`] if it has not.
    pub async fn expect_id(&self, id: String) -> Result<(), BlobError> {
        self.identity.state.lock().expected = Some(id);
        self.verify().await
    }

    #[must_use]
    pub fn expected_id(&self) -> Option<String> {
        self.identity.state.lock().expected.clone()
    }

    /// Checks that the store is the expected one. If it does not answer, that says nothing.
    ///
    /// # Errors
    /// [`BlobError::Foreign`] if it is another one.
    pub async fn verify(&self) -> Result<(), BlobError> {
        let Some(expected) = self.identity.state.lock().expected.clone() else { return Ok(()) };
        let found = self.id().await?;
        let foreign = match found {
            Some(found) if found == expected => None,
            Some(found) => Some(format!("it has the id {found}, and the database expects {expected}")),
            None => Some(format!("the object {ID_KEY} with the database's id {expected} is not there")),
        };
        self.identity.state.lock().foreign.clone_from(&foreign);
        foreign.map_or(Ok(()), |why| Err(BlobError::Foreign(why)))
    }

    /// Why the store is not the database's, as far as this process has seen.
    #[must_use]
    pub fn foreign(&self) -> Option<String> {
        self.identity.state.lock().foreign.clone()
    }

    /// Called before an object is read.
    pub(super) fn is_ours(&self) -> Result<(), BlobError> {
        self.foreign().map_or(Ok(()), |why| Err(BlobError::Foreign(why)))
    }

    /// Called before an object is written. A volume can be unmounted without notice, and a write to the folder below it
    /// would be hidden when it is back. So in a directory, where it costs almost nothing, the id is checked each time.
    pub(super) async fn is_still_ours(&self) -> Result<(), BlobError> {
        if self.directory.is_some() { self.verify().await } else { self.is_ours() }
    }

    /// Called after an object was written. If the volume was unmounted since the check before the write, the object
    /// lies in the folder below it: it is removed, and the write has failed.
    pub(super) async fn was_ours(&self, key: &Path) -> Result<(), BlobError> {
        if self.directory.is_none() {
            return Ok(());
        }
        let verified = self.verify().await;
        if matches!(verified, Err(BlobError::Foreign(_))) {
            let _ = self.store.delete(key).await;
        }
        verified
    }

    /// A missing object counts as missing only if the store is the right one.
    pub(super) async fn missing(&self, error: BlobError) -> BlobError {
        match error {
            BlobError::Missing(_) => self.verify().await.err().unwrap_or(error),
            other => other,
        }
    }

    /// The store's id, if it has one.
    async fn id(&self) -> Result<Option<String>, BlobError> {
        match self.get_unchecked(ID_KEY).await {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes[..bytes.len().min(LONGEST)]);
                Ok(Some(text.trim().to_owned()))
            }
            Err(BlobError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn objects_of_another_store_are_neither_missing_nor_written() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::directory(&folder.path().join("blobs")).unwrap();
        assert_eq!(blobs.probe().await.unwrap(), None);
        assert!(matches!(blobs.get("a").await, Err(BlobError::Missing(_))), "nobody has said what to expect");
        assert!(matches!(blobs.expect_id("one".into()).await, Err(BlobError::Foreign(_))));
        // Only a check can end this state.
        blobs.identity.state.lock().expected = None;
        blobs.identity.state.lock().foreign = None;
        blobs.give_id("one").await.unwrap();
        blobs.expect_id("one".into()).await.unwrap();
        blobs.put("a", Bytes::from_static(b"x")).await.unwrap();
        assert!(matches!(blobs.get("b").await, Err(BlobError::Missing(_))));
        let mut listed = blobs.list("").await.unwrap();
        listed.sort();
        assert_eq!(listed, ["a", ID_KEY]);

        // The volume is gone: an empty folder is there instead.
        std::fs::rename(folder.path().join("blobs"), folder.path().join("away")).unwrap();
        std::fs::create_dir(folder.path().join("blobs")).unwrap();
        assert!(matches!(blobs.get("a").await, Err(BlobError::Foreign(_))), "not missing");
        assert!(matches!(blobs.put("c", Bytes::new()).await, Err(BlobError::Foreign(_))));
        assert!(matches!(blobs.writer("c").await, Err(BlobError::Foreign(_))));
        assert!(matches!(blobs.delete("a").await, Err(BlobError::Foreign(_))));
        // A write that was checked just before.
        let late = Path::from("results/b/1");
        blobs.store.put(&late, "x".into()).await.unwrap();
        assert!(matches!(blobs.was_ours(&late).await, Err(BlobError::Foreign(_))), "it would be hidden and lost");
        assert_eq!(std::fs::read_dir(folder.path().join("blobs")).unwrap().count(), 0, "nothing is left of it");
        assert!(blobs.foreign().unwrap().contains("is not there"));
        std::fs::write(folder.path().join("blobs").join(ID_KEY), "two\n").unwrap();
        assert!(matches!(blobs.verify().await, Err(BlobError::Foreign(_))));
        assert!(blobs.foreign().unwrap().contains("it has the id two"), "{:?}", blobs.foreign());

        // It is back.
        std::fs::remove_dir_all(folder.path().join("blobs")).unwrap();
        std::fs::rename(folder.path().join("away"), folder.path().join("blobs")).unwrap();
        blobs.verify().await.unwrap();
        assert_eq!(blobs.get("a").await.unwrap(), "x");
        assert_eq!(blobs.foreign(), None);
    }
}
