//! Whose objects these are. An object holds the store's id, and a row of the database the same: a server that sees
//! other objects than the other servers (another bucket, a directory of its own, a volume that is not mounted) must not
//! take them for lost, must not write any there, and must not fail anybody's batch for it.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{BlobError, Blobs};

/// The object that holds the id.
pub const ID_KEY: &str = "store-id";
/// An object that is written and deleted to see whether that is possible.
const PROBE_KEY: &str = "store-probe";
/// An id is short: something longer is no id.
const LONGEST: usize = 100;

/// What is known of the store's id.
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
    /// What the database says. None: nobody has asked it, as in tests.
    expected: Option<String>,
    /// Why the store is not the database's, as far as this process has seen.
    foreign: Option<String>,
}

impl Blobs {
    /// Whether objects can be written, deleted and read here, and the id of the store, if it has one.
    ///
    /// # Errors
    /// [`BlobError`].
    pub async fn probe(&self) -> Result<Option<String>, BlobError> {
        let found = self.id().await?;
        self.put(PROBE_KEY, Bytes::from_static(b"whether objects can be written here\n")).await?;
        self.delete(PROBE_KEY).await?;
        Ok(found)
    }

    /// Gives the store its id.
    ///
    /// # Errors
    /// [`BlobError`].
    pub async fn give_id(&self, id: &str) -> Result<(), BlobError> {
        self.put(ID_KEY, Bytes::from(format!("{id}\n"))).await
    }

    /// From now on objects are only written and read, and only taken for missing, while the store has this id.
    ///
    /// # Errors
    /// [`BlobError`] if it has not.
    pub async fn expect_id(&self, id: String) -> Result<(), BlobError> {
        self.identity.state.lock().expected = Some(id);
        self.verify().await
    }

    /// The id that it must have.
    #[must_use]
    pub fn expected_id(&self) -> Option<String> {
        self.identity.state.lock().expected.clone()
    }

    /// Looks whether the store is the one that is expected. That it does not answer says nothing about that.
    ///
    /// # Errors
    /// [`BlobError::Foreign`] if it is another one.
    pub async fn verify(&self) -> Result<(), BlobError> {
        let Some(expected) = self.identity.state.lock().expected.clone() else { return Ok(()) };
        let found = self.id().await?;
        let foreign = match found {
            Some(found) if found == expected => None,
            Some(found) => Some(format!("they have the id {found}, and those of the database {expected}")),
            None => Some(format!("the object {ID_KEY} with the database's id {expected} is not there")),
        };
        self.identity.state.lock().foreign.clone_from(&foreign);
        foreign.map_or(Ok(()), |why| Err(BlobError::Foreign(why)))
    }

    /// Why the store is not the one of the database, as far as this process has seen.
    #[must_use]
    pub fn foreign(&self) -> Option<String> {
        self.identity.state.lock().foreign.clone()
    }

    /// Before an object is read.
    pub(super) fn is_ours(&self) -> Result<(), BlobError> {
        self.foreign().map_or(Ok(()), |why| Err(BlobError::Foreign(why)))
    }

    /// Before an object is written. A volume is unmounted without a word, and a write to the folder below it would be
    /// lost as soon as it is back; so in a directory, where that costs next to nothing, the id is looked at each time.
    pub(super) async fn is_still_ours(&self) -> Result<(), BlobError> {
        if self.directory.is_some() { self.verify().await } else { self.is_ours() }
    }

    /// An object that is not there is missing only if the store is the right one.
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
        // Only a look can bring it back.
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
        assert!(blobs.foreign().unwrap().contains("is not there"));
        std::fs::write(folder.path().join("blobs").join(ID_KEY), "two\n").unwrap();
        assert!(matches!(blobs.verify().await, Err(BlobError::Foreign(_))));
        assert!(blobs.foreign().unwrap().contains("they have the id two"), "{:?}", blobs.foreign());

        // It is back.
        std::fs::remove_dir_all(folder.path().join("blobs")).unwrap();
        std::fs::rename(folder.path().join("away"), folder.path().join("blobs")).unwrap();
        blobs.verify().await.unwrap();
        assert_eq!(blobs.get("a").await.unwrap(), "x");
        assert_eq!(blobs.foreign(), None);
    }
}
