//! Deletes many objects together: S3 takes a thousand in one request.

use std::collections::HashSet;

use futures::StreamExt;
use object_store::{ObjectStoreExt, path::Path};

use super::{BlobError, Blobs};

/// Files of a directory that are deleted at a time.
const AT_ONCE: usize = 16;

/// The outcome of deleting many objects.
#[derive(Debug, Default)]
pub struct Deleted {
    /// The keys of objects that no longer exist.
    pub gone: Vec<String>,
    /// Why the others may still exist: one reason of possibly several.
    pub error: Option<BlobError>,
}

impl Blobs {
    /// Deletes objects; missing ones are no error. If the object store has a request for many, it is used; for a
    /// service with S3's API but without that request, set `AWS_DISABLE_BULK_DELETE`.
    pub async fn delete_all(&self, keys: Vec<String>) -> Deleted {
        if let Err(error) = self.is_still_ours().await {
            return Deleted { gone: Vec::new(), error: Some(error) };
        }
        let mut deleted = Deleted::default();
        if self.directory.is_none() {
            let asked: HashSet<String> = keys.iter().cloned().collect();
            let paths: Vec<_> = keys.into_iter().map(|key| Ok(Path::from(key))).collect();
            let mut answers = self.store.delete_stream(futures::stream::iter(paths).boxed());
            while let Some(answer) = answers.next().await {
                match answer {
                    Ok(path) => deleted.gone.push(path.to_string()),
                    // S3 answers OK for an object that is not there, GCS and Azure do not.
                    Err(object_store::Error::NotFound { path, .. }) if asked.contains(&path) => deleted.gone.push(path),
                    Err(error) => deleted.error = Some(error.into()),
                }
            }
            return deleted;
        }
        let deletes = keys.into_iter().map(|key| async move { (self.delete_unchecked(&key).await, key) });
        let mut deletes = futures::stream::iter(deletes).buffer_unordered(AT_ONCE);
        while let Some((result, key)) = deletes.next().await {
            match result {
                Ok(()) => deleted.gone.push(key),
                Err(error) => deleted.error = Some(error),
            }
        }
        deleted
    }

    pub(super) async fn delete_unchecked(&self, key: &str) -> Result<(), BlobError> {
        match self.store.delete(&Path::from(key)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[tokio::test]
    async fn all_are_gone_also_those_that_were_not_there() {
        let folder = tempfile::tempdir().unwrap();
        for blobs in [Blobs::directory(folder.path()).unwrap(), Blobs::shared_directory(folder.path()).unwrap()] {
            let keys: Vec<String> = (0..40).map(|number| format!("a/{number:02}")).collect();
            for key in keys.iter().filter(|key| !key.ends_with('7')) {
                blobs.put(key, Bytes::from_static(b"x")).await.unwrap();
            }
            blobs.put("b", Bytes::from_static(b"x")).await.unwrap();
            let mut deleted = blobs.delete_all(keys.clone()).await;
            deleted.gone.sort();
            assert!(deleted.error.is_none() && deleted.gone == keys, "{deleted:?}");
            assert!(blobs.list("a").await.unwrap().is_empty());
            assert_eq!(blobs.list("").await.unwrap(), ["b"]);
        }
    }

    #[cfg(unix)]
    #[tokio::test]
    async fn one_that_cannot_be_deleted_keeps_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::directory(folder.path()).unwrap();
        blobs.put("a/x", Bytes::from_static(b"x")).await.unwrap();
        // A folder where an object is expected can't be deleted as one, whoever asks.
        std::fs::create_dir_all(folder.path().join("b/0/full")).unwrap();
        let deleted = blobs.delete_all(vec!["b/0".into(), "a/x".into()]).await;
        assert_eq!(deleted.gone, ["a/x"]);
        assert!(deleted.error.is_some());
    }
}
