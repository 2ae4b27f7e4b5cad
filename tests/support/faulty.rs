//! An object store whose writes and reads a test can make fail.

use std::{
    fmt,
    io::ErrorKind,
    sync::{Arc, Mutex},
};

use futures::stream::BoxStream;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, local::LocalFileSystem, path::Path,
};

/// What fails, and how.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    writes: Arc<Mutex<Option<ErrorKind>>>,
    reads: Arc<Mutex<Option<ErrorKind>>>,
    garbled: Arc<Mutex<Option<String>>>,
    panics: Arc<Mutex<Option<String>>>,
}

impl Faults {
    pub fn writes(&self, fault: Option<ErrorKind>) {
        *self.writes.lock().unwrap() = fault;
    }

    pub fn reads(&self, fault: Option<ErrorKind>) {
        *self.reads.lock().unwrap() = fault;
    }
}

impl Faults {
    /// From now on every object written below this prefix has one byte changed.
    #[allow(dead_code)] // not all targets garble
    pub fn garble(&self, prefix: &str) {
        *self.garbled.lock().unwrap() = Some(prefix.to_owned());
    }

    /// From now on every read below this prefix panics: a bug in whatever reads it.
    #[allow(dead_code)] // not all targets crash
    pub fn panic_at(&self, prefix: &str) {
        *self.panics.lock().unwrap() = Some(prefix.to_owned());
    }

    fn panics(&self, location: &Path) -> bool {
        self.panics.lock().unwrap().as_ref().is_some_and(|prefix| location.as_ref().starts_with(prefix))
    }

    fn garbled(&self, location: &Path, payload: PutPayload) -> PutPayload {
        let garbled = self.garbled.lock().unwrap();
        if !garbled.as_ref().is_some_and(|prefix| location.as_ref().starts_with(prefix)) {
            return payload;
        }
        let mut bytes: Vec<u8> = payload.iter().flat_map(|piece| piece.to_vec()).collect();
        if let Some(byte) = bytes.first_mut() {
            *byte ^= 1;
        }
        bytes.into()
    }
}

fn check(fault: &Mutex<Option<ErrorKind>>) -> Result<()> {
    match *fault.lock().unwrap() {
        None => Ok(()),
        Some(kind) => {
            let source = Box::new(std::io::Error::new(kind, "injected at /secret/path"));
            Err(Error::Generic { store: "faulty", source })
        }
    }
}

/// The store.
#[derive(Debug)]
pub struct FaultyStore {
    inner: LocalFileSystem,
    faults: Faults,
}

impl FaultyStore {
    pub fn new(folder: &std::path::Path, faults: Faults) -> Arc<Self> {
        std::fs::create_dir_all(folder).unwrap();
        Arc::new(Self { inner: LocalFileSystem::new_with_prefix(folder).unwrap(), faults })
    }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

#[async_trait::async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        check(&self.faults.writes)?;
        let payload = self.faults.garbled(location, payload);
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(&self, at: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        check(&self.faults.writes)?;
        self.inner.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        check(&self.faults.reads)?;
        assert!(!self.faults.panics(location), "injected");
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        check(&self.faults.writes)?;
        self.inner.copy_opts(from, to, options).await
    }
}
