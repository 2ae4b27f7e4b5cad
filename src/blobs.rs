//! Objects: uploaded inputs, parts, results. A local directory by default, S3, GCS or Azure by URL.
//!
//! A write that has returned is durable: in a directory, the file and its folder are fsynced before the object gets its
//! name. Names are never reused, so a readable object never changes.

mod deletes;
mod error;
mod identity;
mod local;

use std::{
    error::Error,
    io,
    ops::Range,
    path::Path as FsPath,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use object_store::{
    BackoffConfig, ObjectStore, ObjectStoreExt, ObjectStoreScheme, PutPayload, RetryConfig, WriteMultipart,
    aws::AmazonS3Builder, azure::MicrosoftAzureBuilder, gcp::GoogleCloudStorageBuilder, local::LocalFileSystem,
    memory::InMemory, path::Path, prefix::PrefixStore,
};
use url::Url;

pub use deletes::Deleted;
pub use error::BlobError;
pub use identity::ID_KEY;

use crate::words;
use identity::Identity;
use local::LocalWriter;

/// Size of the parts of a multipart write: S3's minimum is 5 MiB.
const WRITE_CHUNK: usize = 5 * 1024 * 1024;
/// Parts of one write that are sent at a time.
const WRITE_CONCURRENCY: usize = 2;
/// Marks the names of files that are being written; no object's name contains it.
const STAGED: char = '#';
/// A half-written file that has not grown for this long is abandoned.
const ABANDONED: Duration = Duration::from_secs(3_600);
/// Retries of the object store's client: some seconds, so that an upload survives a short "slow down". Longer failures
/// are reported and retried where the reason can be shown. The library's default would be three minutes of silence.
const RETRIES: usize = 6;
const RETRY_FOR: Duration = Duration::from_secs(10);
const RETRY_WAITS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

/// The blob store.
#[derive(Clone)]
pub struct Blobs {
    store: Arc<dyn ObjectStore>,
    /// The store, if it is a directory.
    directory: Option<Arc<LocalFileSystem>>,
    /// Whether the store belongs to this database.
    identity: Identity,
}

impl Blobs {
    /// A directory, which is created if it does not exist. Half-written files of a killed process are removed, because
    /// only one process may use the directory.
    ///
    /// # Errors
    /// [`BlobError::Open`] if it can't be made or read.
    pub fn directory(path: &FsPath) -> Result<Self, BlobError> {
        let blobs = Self::shared_directory(path)?;
        remove_staged(path, &|_| true).map_err(|error| cant_be(path, &error))?;
        Ok(blobs)
    }

    /// A directory that other processes use too, such as one on a network file system: their half-written files are
    /// left alone.
    ///
    /// # Errors
    /// [`BlobError::Open`] if it can't be made or read.
    pub fn shared_directory(path: &FsPath) -> Result<Self, BlobError> {
        make_folder(path).map_err(|error| cant_be(path, &error))?;
        let store = LocalFileSystem::new_with_prefix(path)
            .map_err(|error| BlobError::Open(format!("{}: {error}", path.display())))?
            .with_fsync(true)
            // Without this, a folder for each segment ever run would be searched at every start.
            .with_automatic_cleanup(true);
        let store = Arc::new(store);
        Ok(Self { directory: Some(store.clone()), store, identity: Identity::default() })
    }

    /// An object store: `s3://bucket/prefix`, `gs://…`, `az://…`, with credentials from the environment as the cloud's
    /// own tools read them (`AWS_*`, `GOOGLE_*`, `AZURE_*`); or `file:///path`.
    ///
    /// # Errors
    /// [`BlobError::Open`] if the URL is not understood.
    pub fn url(text: &str) -> Result<Self, BlobError> {
        // A variable that is not UTF-8 is not for us, and `std::env::vars` panics on it.
        let known =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self::url_with(text, known)
    }

    /// Like [`Blobs::url`], with a given environment.
    ///
    /// # Errors
    /// [`BlobError::Open`] if the URL is not understood.
    pub fn url_with(text: &str, environment: impl IntoIterator<Item = (String, String)>) -> Result<Self, BlobError> {
        let url = Url::parse(text).map_err(|error| BlobError::Open(format!("URL: {}", words::url(error))))?;
        if url.scheme() == "file" {
            let path = url.to_file_path().map_err(|()| BlobError::Open(format!("{text}: not a local path")))?;
            return Self::shared_directory(&path);
        }
        Self::cloud(&url, environment)
    }

    fn cloud(url: &Url, environment: impl IntoIterator<Item = (String, String)>) -> Result<Self, BlobError> {
        let environment: Vec<(String, String)> = environment.into_iter().collect();
        if environment.iter().any(|(name, value)| name == "AZURE_STORAGE_CONNECTION_STRING" && !value.is_empty())
            && matches!(ObjectStoreScheme::parse(url), Ok((ObjectStoreScheme::MicrosoftAzure, _)))
        {
            tracing::warn!(
                "AZURE_STORAGE_CONNECTION_STRING is not supported: set AZURE_STORAGE_ACCOUNT_NAME and \
                 AZURE_STORAGE_ACCOUNT_KEY, and AZURE_STORAGE_ENDPOINT for an endpoint of your own"
            );
        }
        let open = |error: &dyn Error| BlobError::Open(format!("{url}: {error}"));
        let options: Vec<(String, String)> = environment
            .into_iter()
            .filter(|(name, _)| ["AWS_", "GOOGLE_", "AZURE_"].iter().any(|prefix| name.starts_with(prefix)))
            .map(|(name, value)| (name.to_lowercase(), value))
            .collect();
        /// Sets every option that the builder knows; other variables are not for it.
        macro_rules! built {
            ($builder:ty) => {{
                let mut builder = <$builder>::new().with_url(url.as_str()).with_retry(retries());
                for (name, value) in options {
                    if let Ok(key) = name.parse() {
                        builder = builder.with_config(key, value);
                    }
                }
                Arc::new(builder.build().map_err(|error| open(&error))?) as Arc<dyn ObjectStore>
            }};
        }
        let (scheme, prefix) = ObjectStoreScheme::parse(url).map_err(|error| open(&error))?;
        let store = match scheme {
            ObjectStoreScheme::AmazonS3 => built!(AmazonS3Builder),
            ObjectStoreScheme::GoogleCloudStorage => built!(GoogleCloudStorageBuilder),
            ObjectStoreScheme::MicrosoftAzure => built!(MicrosoftAzureBuilder),
            _ => return Err(BlobError::Open(format!("{url}: not s3://, gs://, az:// or file://"))),
        };
        Ok(Self::over(Arc::new(PrefixStore::new(store, prefix))))
    }

    /// Objects in memory, for simulations.
    #[doc(hidden)]
    #[must_use]
    pub fn memory() -> Self {
        Self::over(Arc::new(InMemory::new()))
    }

    /// Any object store in which a write that has returned is durable, for tests that make it fail.
    #[must_use]
    pub fn over(store: Arc<dyn ObjectStore>) -> Self {
        Self { store, directory: None, identity: Identity::default() }
    }

    /// Writes a whole object. Durable when it returns.
    ///
    /// # Errors
    /// [`BlobError::Failed`]; then there is no such object.
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), BlobError> {
        self.is_still_ours().await?;
        let key = Path::from(key);
        self.store.put(&key, PutPayload::from_bytes(bytes)).await.map_err(BlobError::of_write)?;
        self.was_ours(&key).await
    }

    /// Begins an object of unknown size.
    ///
    /// # Errors
    /// [`BlobError::Failed`].
    pub async fn writer(&self, key: &str) -> Result<ObjectWriter, BlobError> {
        self.is_still_ours().await?;
        let key = Path::from(key);
        if let Some(directory) = &self.directory {
            let path = directory.path_to_filesystem(&key).map_err(BlobError::of_write)?;
            let file = LocalWriter::create(path).await.map_err(BlobError::of_file)?;
            return Ok(ObjectWriter(Writer::Local { file, key, blobs: self.clone() }));
        }
        let upload = self.store.put_multipart(&key).await.map_err(BlobError::of_write)?;
        Ok(ObjectWriter(Writer::Parts(WriteMultipart::new_with_chunk_size(upload, WRITE_CHUNK))))
    }

    /// Reads a whole object.
    ///
    /// # Errors
    /// [`BlobError::Missing`] or [`BlobError::Failed`].
    pub async fn get(&self, key: &str) -> Result<Bytes, BlobError> {
        self.is_ours()?;
        match self.get_unchecked(key).await {
            Ok(bytes) => Ok(bytes),
            Err(error) => Err(self.missing(error).await),
        }
    }

    /// Reads without checking that the store belongs to the database.
    async fn get_unchecked(&self, key: &str) -> Result<Bytes, BlobError> {
        Ok(self.store.get(&Path::from(key)).await?.bytes().await?)
    }

    /// Reads a range of an object, as far as the object has it. A torn object is short, not unreadable.
    ///
    /// # Errors
    /// [`BlobError::Missing`] or [`BlobError::Failed`].
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, BlobError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        self.is_ours()?;
        let path = Path::from(key);
        match self.store.get_range(&path, range.clone()).await {
            Ok(bytes) => Ok(bytes),
            Err(error @ object_store::Error::NotFound { .. }) => Err(self.missing(error.into()).await),
            // A range that begins past the end is an error whose kind the library does not tell.
            Err(error) => match self.store.head(&path).await {
                Ok(object) if object.size <= range.start => Ok(Bytes::new()),
                _ => Err(error.into()),
            },
        }
    }

    /// Reads a range of an object in pieces of at most 1 MiB.
    pub fn stream(
        &self,
        key: String,
        range: Range<u64>,
    ) -> impl Stream<Item = Result<Bytes, BlobError>> + Send + 'static + use<> {
        const PIECE: u64 = 1024 * 1024;
        let blobs = self.clone();
        futures::stream::iter((range.start..range.end).step_by(1024 * 1024)).then(move |start| {
            let (blobs, key, end) = (blobs.clone(), key.clone(), (start + PIECE).min(range.end));
            async move { blobs.get_range(&key, start..end).await }
        })
    }

    /// Deletes an object. A missing object is no error.
    ///
    /// # Errors
    /// [`BlobError::Failed`].
    pub async fn delete(&self, key: &str) -> Result<(), BlobError> {
        self.is_still_ours().await?;
        self.delete_unchecked(key).await
    }

    /// Removes files of a directory that have been half written and left: nobody has added to them for an hour. An
    /// upload is broken off after minutes without a byte, and everything else is written in one go. An hour by the
    /// directory's own clock: it may be another machine's. Returns how many; other stores keep none.
    ///
    /// # Errors
    /// [`BlobError::Failed`].
    pub async fn remove_half_written(&self) -> Result<u64, BlobError> {
        self.remove_half_written_after(ABANDONED).await
    }

    async fn remove_half_written_after(&self, age: Duration) -> Result<u64, BlobError> {
        let Some(directory) = &self.directory else { return Ok(0) };
        // The store tells only where objects lie.
        let of_object = directory.path_to_filesystem(&Path::from("any")).map_err(BlobError::of_write)?;
        let Some(root) = of_object.parent().map(FsPath::to_owned) else { return Ok(0) };
        let removed = tokio::task::spawn_blocking(move || {
            let now = tempfile::NamedTempFile::with_prefix_in("clock#", &root)?.as_file().metadata()?.modified()?;
            remove_staged(&root, &|written| now.duration_since(written).is_ok_and(|since| since >= age))
        });
        removed.await.map_err(std::io::Error::from).flatten().map_err(BlobError::of_file)
    }

    /// The keys below a prefix.
    ///
    /// # Errors
    /// [`BlobError::Failed`].
    pub async fn list(&self, prefix: &str) -> Result<Vec<String>, BlobError> {
        self.walk(prefix).try_collect().await
    }

    /// The keys below a prefix as a stream, because there may be more than fit into memory.
    pub fn walk(&self, prefix: &str) -> impl Stream<Item = Result<String, BlobError>> + Send + 'static + use<> {
        let objects = self.store.list(Some(&Path::from(prefix)));
        objects.map_ok(|meta| meta.location.to_string()).map_err(BlobError::from)
    }
}

/// An object being written. If it is dropped before [`ObjectWriter::finish`], the object never exists.
pub struct ObjectWriter(Writer);

enum Writer {
    Local { file: LocalWriter, key: Path, blobs: Blobs },
    Parts(WriteMultipart),
}

impl ObjectWriter {
    /// Adds bytes; waits while too many are still being written.
    ///
    /// # Errors
    /// [`BlobError::Failed`].
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), BlobError> {
        match &mut self.0 {
            Writer::Local { file, .. } => file.write(bytes).await.map_err(BlobError::of_file),
            Writer::Parts(upload) => {
                upload.wait_for_capacity(WRITE_CONCURRENCY).await.map_err(BlobError::of_write)?;
                upload.write(&bytes);
                Ok(())
            }
        }
    }

    /// Makes the object durable and visible.
    ///
    /// # Errors
    /// [`BlobError::Failed`]; then there is no such object.
    pub async fn finish(self) -> Result<(), BlobError> {
        match self.0 {
            Writer::Local { file, key, blobs } => {
                file.finish().await.map_err(BlobError::of_file)?;
                blobs.was_ours(&key).await
            }
            Writer::Parts(upload) => upload.finish().await.map(|_| ()).map_err(BlobError::of_write),
        }
    }

    /// Aborts the write and leaves nothing behind.
    ///
    /// # Errors
    /// [`BlobError::Failed`].
    pub async fn abort(self) -> Result<(), BlobError> {
        match self.0 {
            Writer::Local { file, .. } => file.abort().await.map_err(BlobError::of_file),
            Writer::Parts(upload) => upload.abort().await.map_err(BlobError::of_write),
        }
    }
}

fn cant_be(directory: &FsPath, error: &io::Error) -> BlobError {
    BlobError::Open(format!("{}: {}", directory.display(), words::file(error)))
}

fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig { init_backoff: RETRY_WAITS.0, max_backoff: RETRY_WAITS.1, base: 3.0 },
        max_retries: RETRIES,
        retry_timeout: RETRY_FOR,
    }
}

/// Creates a folder and its missing parents, and makes their names durable: a file synced in a folder that a power cut
/// removes is lost with it.
///
/// # Errors
/// If it can't be made. That the folder above it may not be opened matters only if it was made now.
pub fn make_folder(path: &FsPath) -> std::io::Result<()> {
    let path = std::path::absolute(path)?;
    let existing = path.ancestors().find(|folder| folder.exists());
    if existing.is_some_and(|existing| !existing.is_dir()) {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    std::fs::create_dir_all(&path)?;
    let made = path.ancestors().take_while(|folder| Some(*folder) != existing);
    for folder in made.filter_map(FsPath::parent) {
        sync_folder(folder)?;
    }
    // The process that created it may have died before the sync.
    if let (Some(folder), true) = (path.parent(), existing == Some(&*path)) {
        let _ = sync_folder(folder);
    }
    Ok(())
}

#[cfg(unix)]
fn sync_folder(folder: &FsPath) -> std::io::Result<()> {
    std::fs::File::open(folder)?.sync_all()
}

/// Other systems offer no fsync of a folder.
#[cfg(not(unix))]
fn sync_folder(_: &FsPath) -> std::io::Result<()> {
    Ok(())
}

/// Removes half-written files, as old as is wanted, and returns how many. The local store, too, writes `name#N` and
/// renames it when it is whole. What goes away meanwhile is fine: others may be at work.
fn remove_staged(folder: &FsPath, wanted: &dyn Fn(SystemTime) -> bool) -> std::io::Result<u64> {
    let gone = |error: &std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
    let entries = match std::fs::read_dir(folder) {
        Err(error) if gone(&error) => return Ok(0),
        entries => entries?,
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry?;
        let of_entry = || -> std::io::Result<u64> {
            if entry.file_type()?.is_dir() {
                return remove_staged(&entry.path(), wanted);
            }
            let staged = entry.file_name().to_string_lossy().contains(STAGED);
            if !staged || !wanted(entry.metadata()?.modified()?) {
                return Ok(0);
            }
            std::fs::remove_file(entry.path())?;
            Ok(1)
        };
        match of_entry() {
            Err(error) if gone(&error) => {}
            count => removed += count?,
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_unfinished_object_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::directory(folder.path()).unwrap();
        let mut writer = blobs.writer("a/b").await.unwrap();
        writer.write(vec![7; 6 * 1024 * 1024].into()).await.unwrap();
        writer.abort().await.unwrap();
        assert!(matches!(blobs.get("a/b").await, Err(BlobError::Missing(_))));
        std::fs::write(folder.path().join("a/c#1"), "half").unwrap();
        let blobs = Blobs::directory(folder.path()).unwrap();
        assert!(blobs.list("a").await.unwrap().is_empty());
        assert!(!folder.path().join("a/c#1").exists());
    }

    #[tokio::test]
    async fn what_a_killed_process_left_is_removed_once_nobody_adds_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::shared_directory(folder.path()).unwrap();
        std::fs::create_dir_all(folder.path().join("a")).unwrap();
        let file = std::fs::File::create(folder.path().join("a/old#1")).unwrap();
        file.set_modified(SystemTime::now() - 2 * ABANDONED).unwrap();
        blobs.put("a/object", Bytes::from_static(b"x")).await.unwrap();
        let object = std::fs::File::options().write(true).open(folder.path().join("a/object")).unwrap();
        object.set_modified(SystemTime::now() - 2 * ABANDONED).unwrap();
        let mut writer = blobs.writer("a/new").await.unwrap();
        writer.write(Bytes::from_static(b"y")).await.unwrap();
        assert_eq!(blobs.remove_half_written().await.unwrap(), 1);
        assert!(!folder.path().join("a/old#1").exists());
        writer.finish().await.unwrap();
        assert_eq!(blobs.get("a/new").await.unwrap(), "y", "what is being written is left alone");
        assert_eq!(blobs.get("a/object").await.unwrap(), "x", "objects stay, however old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "and nothing else is left");
    }

    #[tokio::test]
    async fn the_last_object_takes_its_folders_along() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::directory(folder.path()).unwrap();
        for key in ["results/b/000000/1-1", "results/b/000001/1-1"] {
            blobs.put(key, Bytes::from_static(b"x")).await.unwrap();
        }
        blobs.delete("results/b/000000/1-1").await.unwrap();
        assert!(!folder.path().join("results/b/000000").exists());
        assert_eq!(blobs.get("results/b/000001/1-1").await.unwrap(), "x");
        blobs.delete("results/b/000001/1-1").await.unwrap();
        assert!(!folder.path().join("results").exists() && folder.path().exists());
        blobs.put("results/b/000000/2-1", Bytes::from_static(b"y")).await.unwrap();
        assert_eq!(blobs.get("results/b/000000/2-1").await.unwrap(), "y", "a folder comes back when it is needed");
    }

    #[tokio::test]
    async fn past_its_end_an_object_has_no_bytes() {
        let folder = tempfile::tempdir().unwrap();
        for blobs in [Blobs::directory(folder.path()).unwrap(), Blobs::memory()] {
            blobs.put("x", Bytes::from_static(b"12345")).await.unwrap();
            assert_eq!(blobs.get_range("x", 1..3).await.unwrap(), "23");
            assert_eq!(blobs.get_range("x", 3..9).await.unwrap(), "45");
            assert_eq!(blobs.get_range("x", 5..9).await.unwrap(), "");
            assert_eq!(blobs.get_range("x", 7..9).await.unwrap(), "");
            assert!(matches!(blobs.get_range("y", 7..9).await, Err(BlobError::Missing(_))));
        }
    }

    #[tokio::test]
    async fn what_was_written_is_read_back_in_pieces() {
        let folder = tempfile::tempdir().unwrap();
        let blobs = Blobs::directory(folder.path()).unwrap();
        let bytes: Vec<u8> = (0..12_000_000u32).map(|i| (i % 251) as u8).collect();
        let mut writer = blobs.writer("x").await.unwrap();
        for chunk in bytes.chunks(700_001) {
            writer.write(Bytes::copy_from_slice(chunk)).await.unwrap();
        }
        writer.finish().await.unwrap();
        let read: Vec<Bytes> = blobs.stream("x".into(), 5..11_999_990).try_collect().await.unwrap();
        assert_eq!(read.concat(), bytes[5..11_999_990]);
        assert!(blobs.get_range("x", 3..3).await.unwrap().is_empty());
    }
}
