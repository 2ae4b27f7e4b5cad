//! Checks that every `custom_id` of a file is unique: exactly, in memory that does not grow with the file.
//!
//! Each id becomes a keyed 64-bit hash with the position of its text in a log. Hashes are sorted in runs of bounded
//! size, which are written to a file when full and merged at the end. Equal ids have equal hashes, and for equal hashes
//! the texts are compared. Both files are temporary and have no name, so nothing is left behind.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fs::File,
    hash::BuildHasher,
    io::{self, Read, Seek, SeekFrom, Write},
    path::PathBuf,
};

use foldhash::quality::RandomState;

/// Entries of a run: 2 MiB. Ten million ids are 77 runs.
const RUN: usize = 128 * 1024;
/// Bytes of texts kept in memory before they are written to the file.
const TEXTS: usize = 1024 * 1024;
/// Memory for reading all runs during the merge; each run gets at least 4 KiB.
const MERGE: usize = 4 * 1024 * 1024;
/// Bytes of an entry in a run file.
const ENTRY_BYTES: usize = 16;
/// Bytes of a record in the log before its text: line number and length.
const RECORD_HEAD: usize = 10;

/// An id that an earlier line already has.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Duplicate {
    pub(super) line: u64,
    pub(super) first_line: u64,
    pub(super) custom_id: String,
}

/// The ids seen so far.
#[derive(Debug)]
pub(super) struct UniqueIds {
    scratch: PathBuf,
    hasher: RandomState,
    run_len: usize,
    entries: Vec<Entry>,
    runs: Option<Runs>,
    texts: Texts,
}

/// Ordered by hash, then by position in the log, which is the order of lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    hash: u64,
    position: u64,
}

impl UniqueIds {
    /// Starts without ids. Temporary files are made in `scratch` when they are needed.
    pub(super) fn new(scratch: PathBuf) -> Self {
        Self::with_sizes(scratch, RUN, TEXTS)
    }

    fn with_sizes(scratch: PathBuf, run_len: usize, texts: usize) -> Self {
        Self {
            texts: Texts { scratch: scratch.clone(), limit: texts, memory: Vec::new(), file: None, in_file: 0 },
            scratch,
            hasher: RandomState::default(),
            run_len,
            entries: Vec::new(),
            runs: None,
        }
    }

    /// Adds the id of a line, at most 65,535 bytes. Lines come in order.
    pub(super) fn insert(&mut self, custom_id: &str, line: u64) -> io::Result<()> {
        self.insert_hashed(self.hasher.hash_one(custom_id), custom_id, line)
    }

    fn insert_hashed(&mut self, hash: u64, custom_id: &str, line: u64) -> io::Result<()> {
        if self.entries.len() == self.run_len {
            self.spill()?;
        }
        let position = self.texts.append(custom_id, line)?;
        self.entries.push(Entry { hash, position });
        Ok(())
    }

    fn spill(&mut self) -> io::Result<()> {
        let runs = match &mut self.runs {
            Some(runs) => runs,
            None => self.runs.insert(Runs { file: tempfile::tempfile_in(&self.scratch)?, lengths: Vec::new() }),
        };
        self.entries.sort_unstable();
        runs.write(&self.entries)?;
        self.entries.clear();
        Ok(())
    }

    /// Passes on each line whose id an earlier line has, in no particular order.
    pub(super) fn finish(mut self, mut duplicate: impl FnMut(Duplicate)) -> io::Result<()> {
        if self.runs.is_some() && !self.entries.is_empty() {
            self.spill()?;
        }
        let mut same = SameHash::new(self.texts);
        match self.runs {
            None => {
                self.entries.sort_unstable();
                self.entries.into_iter().try_for_each(|entry| same.next(entry, &mut duplicate))
            }
            Some(runs) => {
                self.entries = Vec::new();
                runs.merge(|entry| same.next(entry, &mut duplicate))
            }
        }
    }
}

/// Takes entries in order and compares the texts of those with the same hash.
struct SameHash {
    texts: Texts,
    first: Option<Entry>,
    /// The different texts of this hash with their first lines. Almost always one; empty until there is a second entry.
    distinct: Vec<(String, u64)>,
}

impl SameHash {
    fn new(texts: Texts) -> Self {
        Self { texts, first: None, distinct: Vec::new() }
    }

    fn next(&mut self, entry: Entry, duplicate: &mut impl FnMut(Duplicate)) -> io::Result<()> {
        let first = match self.first {
            Some(first) if first.hash == entry.hash => first,
            _ => {
                self.first = Some(entry);
                self.distinct.clear();
                return Ok(());
            }
        };
        if self.distinct.is_empty() {
            self.distinct.push(self.texts.read(first.position)?);
        }
        let (text, line) = self.texts.read(entry.position)?;
        match self.distinct.iter().find(|(known, _)| *known == text) {
            Some((_, first_line)) => duplicate(Duplicate { line, first_line: *first_line, custom_id: text }),
            None => self.distinct.push((text, line)),
        }
        Ok(())
    }
}

/// The log of ids with their lines: the end in memory, the rest in a file once there is much.
#[derive(Debug)]
struct Texts {
    scratch: PathBuf,
    limit: usize,
    memory: Vec<u8>,
    file: Option<File>,
    /// The number of bytes in the file.
    in_file: u64,
}

impl Texts {
    fn append(&mut self, text: &str, line: u64) -> io::Result<u64> {
        let length =
            u16::try_from(text.len()).map_err(|_| io::Error::other("a custom_id of more than 65,535 bytes"))?;
        if self.memory.len() + RECORD_HEAD + text.len() > self.limit && !self.memory.is_empty() {
            self.spill()?;
        }
        let position = self.in_file + self.memory.len() as u64;
        self.memory.extend_from_slice(&line.to_le_bytes());
        self.memory.extend_from_slice(&length.to_le_bytes());
        self.memory.extend_from_slice(text.as_bytes());
        Ok(position)
    }

    fn spill(&mut self) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(tempfile::tempfile_in(&self.scratch)?),
        };
        file.write_all(&self.memory)?;
        self.in_file += self.memory.len() as u64;
        self.memory.clear();
        Ok(())
    }

    /// Reads a text and its line. After the first call nothing is appended any more.
    fn read(&mut self, position: u64) -> io::Result<(String, u64)> {
        let mut head = [0; RECORD_HEAD];
        self.read_at(position, &mut head)?;
        let (line, length) = head.split_at(8);
        let line = u64::from_le_bytes(line.try_into().map_err(io::Error::other)?);
        let length = u16::from_le_bytes(length.try_into().map_err(io::Error::other)?);
        let mut text = vec![0; length.into()];
        self.read_at(position + RECORD_HEAD as u64, &mut text)?;
        Ok((String::from_utf8(text).map_err(io::Error::other)?, line))
    }

    fn read_at(&mut self, position: u64, into: &mut [u8]) -> io::Result<()> {
        let torn = || io::Error::from(io::ErrorKind::UnexpectedEof);
        // A record is written at once, so it is never split between memory and file.
        if let Some(at) = position.checked_sub(self.in_file) {
            let at = usize::try_from(at).map_err(|_| torn())?;
            into.copy_from_slice(self.memory.get(at..at + into.len()).ok_or_else(torn)?);
            return Ok(());
        }
        let file = self.file.as_mut().ok_or_else(torn)?;
        file.seek(SeekFrom::Start(position))?;
        file.read_exact(into)
    }
}

/// Sorted runs, one after another in a file.
#[derive(Debug)]
struct Runs {
    file: File,
    /// The lengths of the runs in entries.
    lengths: Vec<usize>,
}

impl Runs {
    fn write(&mut self, sorted: &[Entry]) -> io::Result<()> {
        let mut writer = io::BufWriter::with_capacity(256 * 1024, &mut self.file);
        for entry in sorted {
            writer.write_all(&entry.hash.to_le_bytes())?;
            writer.write_all(&entry.position.to_le_bytes())?;
        }
        writer.flush()?;
        self.lengths.push(sorted.len());
        Ok(())
    }

    /// Passes on all entries in order.
    fn merge(mut self, mut take: impl FnMut(Entry) -> io::Result<()>) -> io::Result<()> {
        let buffer = (MERGE / self.lengths.len().max(1) / ENTRY_BYTES).max(256);
        let mut start = 0;
        let mut sources = Vec::with_capacity(self.lengths.len());
        for length in &self.lengths {
            let end = start + (length * ENTRY_BYTES) as u64;
            sources.push(Source { next: start, end, buffer: Vec::new() });
            start = end;
        }
        let mut heap = BinaryHeap::with_capacity(sources.len());
        for (at, source) in sources.iter_mut().enumerate() {
            heap.extend(source.pop(&mut self.file, buffer)?.map(|entry| Reverse((entry, at))));
        }
        while let Some(mut top) = heap.peek_mut() {
            let Reverse((entry, at)) = *top;
            match sources[at].pop(&mut self.file, buffer)? {
                Some(next) => {
                    *top = Reverse((next, at));
                    drop(top);
                }
                None => {
                    std::collections::binary_heap::PeekMut::pop(top);
                }
            }
            take(entry)?;
        }
        Ok(())
    }
}

/// A run being read.
struct Source {
    /// The offset of the next read.
    next: u64,
    end: u64,
    /// The entries read, the next one last.
    buffer: Vec<Entry>,
}

impl Source {
    fn pop(&mut self, file: &mut File, entries: usize) -> io::Result<Option<Entry>> {
        if self.buffer.is_empty() && self.next < self.end {
            let size = (self.end - self.next).min((entries * ENTRY_BYTES) as u64);
            let mut bytes = vec![0; usize::try_from(size).map_err(io::Error::other)?];
            file.seek(SeekFrom::Start(self.next))?;
            file.read_exact(&mut bytes)?;
            self.next += size;
            let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte));
            self.buffer.extend(
                bytes
                    .chunks_exact(ENTRY_BYTES)
                    .rev()
                    .map(|entry| Entry { hash: number(&entry[..8]), position: number(&entry[8..]) }),
            );
        }
        Ok(self.buffer.pop())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn found(ids: UniqueIds) -> Vec<(u64, u64, String)> {
        let mut found = Vec::new();
        ids.finish(|one| found.push((one.line, one.first_line, one.custom_id))).unwrap();
        found.sort();
        found
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn duplicates_are_found_across_runs_and_spilled_texts(
            ids in proptest::collection::vec("[a-c]{1,2}|[a-zé]{1,30}", 0..300),
            run_len in 1usize..40,
            texts in 1usize..600,
            // One hash for all: what then tells ids apart is their text.
            hash_bits in prop_oneof![Just(0u32), Just(2), Just(64)],
        ) {
            let folder = tempfile::tempdir().unwrap();
            let mut unique = UniqueIds::with_sizes(folder.path().to_owned(), run_len, texts);
            let (mut first, mut expected) = (HashMap::new(), Vec::new());
            for (id, line) in ids.iter().zip((1..).step_by(2)) {
                let hash = unique.hasher.hash_one(id).checked_shr(64 - hash_bits).unwrap_or(0);
                unique.insert_hashed(hash, id, line).unwrap();
                match first.get(id) {
                    None => {
                        first.insert(id, line);
                    }
                    Some(first) => expected.push((line, *first, id.clone())),
                }
            }
            prop_assert_eq!(found(unique), expected);
            prop_assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_small_file_needs_no_disk() {
        let mut unique = UniqueIds::new("/nowhere/at/all".into());
        for line in 1..=10_000 {
            unique.insert(&format!("id-{line}"), line).unwrap();
        }
        unique.insert("id-7", 10_001).unwrap();
        assert_eq!(found(unique), [(10_001, 7, "id-7".to_owned())]);
    }

    /// What a full disk does.
    #[test]
    fn a_scratch_folder_that_fails_is_told() {
        let mut unique = UniqueIds::with_sizes("/nowhere/at/all".into(), 2, 1_000);
        unique.insert("a", 1).unwrap();
        unique.insert("b", 2).unwrap();
        assert!(unique.insert("c", 3).is_err());
    }
}
