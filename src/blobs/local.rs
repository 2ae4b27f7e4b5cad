//! Writes an object in a directory. Writing to disk starts at once, so that the fsync at the end has little left to
//! wait for; for a large upload that wait would be half of the time.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use bytes::{Bytes, BytesMut};
use tokio::task::{JoinHandle, spawn_blocking};

use super::{STAGED, make_folder, sync_folder};

/// Bytes per write.
const WRITE: usize = 1024 * 1024;
/// Bytes that may wait while others are written; beyond that the caller waits.
const WAITING: usize = 4 * WRITE;
/// Smaller pieces are copied together: a separate write costs more than the copy, and the piece keeps its whole source
/// in memory.
const SMALL: usize = 16 * 1024;
/// Size of the buffer for small pieces.
const BLOCK: usize = 64 * 1024;

/// An object being written.
#[derive(Debug)]
pub(super) struct LocalWriter {
    object: PathBuf,
    file: Staging,
    waiting: Pieces,
}

/// The file's owner at the moment: this value, or the blocking thread that writes to it.
#[derive(Debug)]
enum Staging {
    Here(Staged),
    Busy(JoinHandle<io::Result<Staged>>),
    /// A write has failed or was interrupted.
    Failed,
}

impl LocalWriter {
    /// Creates the file, so that a folder that can't be written is reported at once.
    pub(super) async fn create(object: PathBuf) -> io::Result<Self> {
        let (object, staged) = spawn_blocking(move || Staged::create(&object).map(|staged| (object, staged))).await??;
        Ok(Self { object, file: Staging::Here(staged), waiting: Pieces::default() })
    }

    /// Adds bytes. Returns when there is room for more.
    pub(super) async fn write(&mut self, bytes: Bytes) -> io::Result<()> {
        self.waiting.push(bytes);
        let busy = matches!(&self.file, Staging::Busy(writing) if !writing.is_finished());
        if self.waiting.bytes < if busy { WAITING } else { WRITE } {
            return Ok(());
        }
        let mut staged = self.staged().await?;
        let pieces = self.waiting.take();
        self.file = Staging::Busy(spawn_blocking(move || {
            staged.write(&pieces)?;
            staged.start_writeback();
            Ok(staged)
        }));
        Ok(())
    }

    /// Completes the object. When this returns, it is durable and has its name.
    pub(super) async fn finish(mut self) -> io::Result<()> {
        let mut staged = self.staged().await?;
        let (object, pieces) = (std::mem::take(&mut self.object), self.waiting.take());
        let publish = spawn_blocking(move || {
            staged.write(&pieces)?;
            staged.publish(&object)
        });
        publish.await?
    }

    /// Aborts. When this returns, nothing is left.
    pub(super) async fn abort(mut self) -> io::Result<()> {
        // A failed write has removed its file.
        if let Ok(staged) = self.staged().await {
            spawn_blocking(move || staged.remove()).await??;
        }
        Ok(())
    }

    /// Returns the file when the pending write has ended.
    async fn staged(&mut self) -> io::Result<Staged> {
        // Stays in place while it is awaited, because this future may be dropped and another one created.
        if let Staging::Busy(writing) = &mut self.file {
            let written = writing.await;
            self.file = Staging::Failed;
            return written?;
        }
        match std::mem::replace(&mut self.file, Staging::Failed) {
            Staging::Here(staged) => Ok(staged),
            Staging::Busy(_) | Staging::Failed => Err(io::Error::other("an earlier write has failed")),
        }
    }
}

/// A file that does not have its name yet. If it is dropped before, it is removed.
#[derive(Debug)]
struct Staged {
    file: File,
    /// `None`: it has been renamed or removed.
    path: Option<PathBuf>,
    written: u64,
    /// The number of bytes whose writeback has been started.
    started: u64,
}

impl Staged {
    fn create(object: &Path) -> io::Result<Self> {
        let mut name = object.file_name().unwrap_or_default().to_owned();
        // Another process may write the same object: the last one wins, and both have the same bytes.
        name.push(format!("{STAGED}{}", uuid::Uuid::new_v4().simple()));
        let path = object.with_file_name(name);
        let create = || OpenOptions::new().write(true).create_new(true).open(&path);
        let file = match (create(), object.parent()) {
            (Err(error), Some(folder)) if error.kind() == io::ErrorKind::NotFound => {
                make_folder(folder)?;
                create()?
            }
            (created, _) => created?,
        };
        Ok(Self { file, path: Some(path), written: 0, started: 0 })
    }

    fn write(&mut self, pieces: &[Bytes]) -> io::Result<()> {
        for piece in pieces {
            self.file.write_all(piece)?;
            self.written += piece.len() as u64;
        }
        Ok(())
    }

    /// Only affects how long the fsync takes.
    fn start_writeback(&mut self) {
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{Advice, fadvise};
            // Linux begins to write such pages, and drops only those of them that are written already.
            let length = std::num::NonZeroU64::new(self.written - self.started);
            let _ = fadvise(&self.file, self.started, length, Advice::DontNeed);
        }
        self.started = self.written;
    }

    fn publish(mut self, object: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        if let Some(path) = &self.path {
            fs::rename(path, object)?;
            self.path = None;
        }
        object.parent().map_or(Ok(()), sync_folder)
    }

    fn remove(mut self) -> io::Result<()> {
        self.path.take().map_or(Ok(()), fs::remove_file)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            let _ = fs::remove_file(path);
        }
    }
}

/// Bytes to be written.
#[derive(Debug, Default)]
struct Pieces {
    pieces: Vec<Bytes>,
    /// Small ones after these, copied.
    block: BytesMut,
    bytes: usize,
}

impl Pieces {
    fn push(&mut self, piece: Bytes) {
        self.bytes += piece.len();
        if piece.len() < SMALL {
            if self.block.capacity() - self.block.len() < piece.len() {
                self.seal();
                self.block = BytesMut::with_capacity(BLOCK);
            }
            self.block.extend_from_slice(&piece);
        } else {
            self.seal();
            self.pieces.push(piece);
        }
    }

    fn take(&mut self) -> Vec<Bytes> {
        self.seal();
        self.bytes = 0;
        std::mem::take(&mut self.pieces)
    }

    fn seal(&mut self) {
        if !self.block.is_empty() {
            // What is left of the block is for the next ones.
            self.pieces.push(self.block.split().freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[tokio::test]
    async fn an_object_that_is_given_up_or_dropped_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        for size in [10, 3 * WRITE] {
            let mut writer = LocalWriter::create(folder.path().join("a/b")).await.unwrap();
            assert_eq!(names(&folder.path().join("a")).len(), 1);
            writer.write(vec![7; size].into()).await.unwrap();
            writer.abort().await.unwrap();
            assert!(names(&folder.path().join("a")).is_empty());
        }
        let mut writer = LocalWriter::create(folder.path().join("a/b")).await.unwrap();
        writer.write(vec![7; 2 * WRITE].into()).await.unwrap();
        writer.write(vec![7; 5 * WRITE].into()).await.unwrap();
        // Only once the write that is under way has ended.
        drop(writer);
        while !names(&folder.path().join("a")).is_empty() {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_folder_that_can_t_be_written_is_told_at_once() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "not a folder").unwrap();
        let refused = LocalWriter::create(folder.path().join("a/b")).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::NotADirectory);
    }

    #[tokio::test]
    async fn a_write_that_fails_is_told_and_so_is_all_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("b");
        fs::write(&path, "").unwrap();
        // A file that may only be read stands for a full disk.
        let staged = || Staged { file: File::open(&path).unwrap(), path: None, written: 0, started: 0 };
        let writer = || LocalWriter { object: path.clone(), file: Staging::Here(staged()), waiting: Pieces::default() };
        let mut failing = writer();
        failing.write(vec![7; WRITE].into()).await.unwrap();
        assert!(failing.write(vec![7; WAITING].into()).await.is_err());
        assert!(failing.write(vec![7; WRITE].into()).await.is_err());
        assert!(failing.finish().await.is_err());
        let mut failing = writer();
        failing.write(vec![7; 10].into()).await.unwrap();
        assert!(failing.finish().await.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_was_written_is_there(
            sizes in proptest::collection::vec(
                prop_oneof![0..100usize, SMALL - 2..SMALL + 2, BLOCK - 2..BLOCK + 2, WRITE - 2..WRITE + 2], 0..20),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a/b");
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let expected = runtime.block_on(async {
                let mut writer = LocalWriter::create(path.clone()).await.unwrap();
                let mut expected = Vec::new();
                for (size, fill) in sizes.into_iter().zip(0..) {
                    expected.extend(std::iter::repeat_n(fill, size));
                    writer.write(vec![fill; size].into()).await.unwrap();
                }
                assert!(!path.exists());
                writer.finish().await.unwrap();
                expected
            });
            prop_assert!(fs::read(&path).unwrap() == expected);
            prop_assert_eq!(names(&folder.path().join("a")), ["b"]);
        }
    }
}
