//! Reading results back: whole files in input order, or lines as they become durable.

use std::{collections::HashMap, fmt, str::FromStr, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream::BoxStream};
use tokio::sync::broadcast::error::RecvError;

use crate::{
    blobs::{BlobError, Blobs},
    domain::{BatchId, File, FileKind, SegmentIndex, SegmentRef},
    store::{Part, SegmentRecord, Store, StoreError},
};

/// Segments asked for at a time when a file is read.
const SEGMENT_PAGE: u64 = 256;
/// Parts asked for at a time when results are followed.
const PART_PAGE: u64 = 32;
/// How long a follower waits for word of a change before it looks for itself.
const POLL: Duration = Duration::from_secs(1);

/// Why results can't be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The blob store failed.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// An object is not what its row says.
    #[error("{0}")]
    Corrupt(String),
    /// The results have been deleted.
    #[error("the results of {0} have been deleted")]
    Deleted(BatchId),
}

/// A place in a batch's stream of results: after a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Tells batches apart: after another batch's cursor, results would be missing and nobody would know.
    batch: u32,
    /// The part.
    seq: i64,
    /// Lines of it that have been delivered.
    lines: u32,
}

/// A text that is no cursor of the batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a cursor of this batch's results: {0:?}")]
pub struct BadCursor(String);

impl Cursor {
    /// Before the first line.
    fn start(batch: &BatchId) -> Self {
        Self { batch: crc32c::crc32c(batch.as_str().as_bytes()), seq: 0, lines: 0 }
    }

    /// Reads a cursor of a batch.
    ///
    /// # Errors
    /// [`BadCursor`], also for another batch's.
    pub fn parse(text: &str, batch: &BatchId) -> Result<Self, BadCursor> {
        let cursor: Self = text.parse()?;
        if cursor.batch == Self::start(batch).batch { Ok(cursor) } else { Err(BadCursor::of(text)) }
    }
}

impl BadCursor {
    fn of(text: &str) -> Self {
        Self(text.chars().take(80).collect())
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r1.{:08x}.{}.{}", self.batch, self.seq, self.lines)
    }
}

impl FromStr for Cursor {
    type Err = BadCursor;

    fn from_str(text: &str) -> Result<Self, BadCursor> {
        let bad = || BadCursor::of(text);
        let (batch, rest) = text.strip_prefix("r1.").and_then(|rest| rest.split_once('.')).ok_or_else(bad)?;
        let (seq, lines) = rest.split_once('.').ok_or_else(bad)?;
        let seq = seq.parse().ok().filter(|seq| *seq >= 0).ok_or_else(bad)?;
        let batch = u32::from_str_radix(batch, 16).map_err(|_| bad())?;
        Ok(Self { batch, seq, lines: lines.parse().map_err(|_| bad())? })
    }
}

/// One result.
#[derive(Clone, Debug)]
pub struct ResultLine {
    /// The request's.
    pub custom_id: String,
    /// Resumes after this line.
    pub cursor: Cursor,
    /// The request's line in the input, from 1.
    pub line_number: i64,
    /// A line of the output file, not of the error file.
    pub succeeded: bool,
    /// Without its line feed.
    pub line: Bytes,
}

/// Reads results and files.
#[derive(Clone)]
pub struct Reader {
    store: Store,
    blobs: Blobs,
}

impl Reader {
    /// Over this node's database and blobs.
    #[must_use]
    pub fn new(store: Store, blobs: Blobs) -> Self {
        Self { store, blobs }
    }

    /// A file's bytes from `offset` on, in pieces of at most 1 MiB.
    ///
    /// # Errors
    /// [`ReadError`].
    // Async and fallible so that a missing file could be told before the stream begins.
    pub async fn download(
        &self,
        file: &File,
        offset: u64,
    ) -> Result<impl Stream<Item = Result<Bytes, ReadError>> + Send + 'static + use<>, ReadError> {
        let size = u64::try_from(file.bytes).unwrap_or(0);
        let stream: BoxStream<'static, _> = match (&file.kind, &file.object_key) {
            (FileKind::Input, Some(key)) => {
                self.blobs.stream(key.clone(), offset.min(size)..size).map_err(ReadError::from).boxed()
            }
            (FileKind::Input, None) => return Err(ReadError::Corrupt("an input file without an object".into())),
            (FileKind::Output(batch), _) => {
                self.sections(batch.clone(), size, offset, |segment| 0..segment.output_bytes).boxed()
            }
            (FileKind::Error(batch), _) => self
                .sections(batch.clone(), size, offset, |segment| {
                    segment.output_bytes..segment.output_bytes + segment.error_bytes
                })
                .boxed(),
        };
        Ok(stream)
    }

    /// One section of each of a batch's final objects, in order: `bytes` in all, from `skip` on.
    fn sections(
        &self,
        batch: BatchId,
        bytes: u64,
        mut skip: u64,
        section: fn(&SegmentRecord) -> std::ops::Range<u64>,
    ) -> impl Stream<Item = Result<Bytes, ReadError>> + Send + 'static + use<> {
        let (store, blobs) = (self.store.clone(), self.blobs.clone());
        async_stream::try_stream! {
            let mut from = SegmentIndex(0);
            let mut left = bytes.saturating_sub(skip);
            while left > 0 {
                let page = store.segments(&batch, from, SEGMENT_PAGE).await?;
                // The end would look like the end of the file.
                let Some(last) = page.last() else { Err(ReadError::Deleted(batch.clone()))? };
                from = SegmentIndex(last.span.index.0 + 1);
                for segment in page {
                    let range = section(&segment);
                    let length = range.end - range.start;
                    if skip >= length {
                        skip -= length;
                        continue;
                    }
                    let key =
                        segment.object_key.ok_or_else(|| ReadError::Corrupt("a segment without its object".into()))?;
                    let mut pieces = blobs.stream(key, range.start + skip..range.end).boxed();
                    skip = 0;
                    while let Some(piece) = pieces.next().await {
                        let piece = piece?;
                        left = left.saturating_sub(piece.len() as u64);
                        yield piece;
                    }
                }
            }
        }
    }

    /// A batch's results in the order in which they became durable, after `cursor`. With `follow` the stream goes on until
    /// the batch has ended.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn results(
        &self,
        batch: &BatchId,
        cursor: Option<Cursor>,
        follow: bool,
    ) -> Result<impl Stream<Item = Result<ResultLine, ReadError>> + Send + 'static + use<>, ReadError> {
        let (reader, batch) = (self.clone(), batch.clone());
        let mut place = cursor.unwrap_or_else(|| Cursor::start(&batch));
        let mut changes = self.store.changes();
        Ok(async_stream::try_stream! {
            let mut segments = HashMap::new();
            loop {
                // Read before the parts: a batch that has ended gets no more of them.
                let ended = reader.store.batch(&batch).await?.is_none_or(|batch| batch.status.is_terminal());
                loop {
                    let parts = reader.store.parts_from(&batch, place.seq, PART_PAGE).await?;
                    let full = parts.len() as u64 == PART_PAGE;
                    for part in parts {
                        let skip = if part.seq == place.seq { place.lines } else { 0 };
                        let first_line = reader.first_line(&batch, part.segment, &mut segments).await?;
                        let count = u32::try_from(part.content.completed.len() + part.content.failed.len()).unwrap_or(u32::MAX);
                        if skip < count {
                            let object = reader.part_lines(&batch, &part).await?;
                            for (at, (line, succeeded, text)) in (1..).zip(object).skip(skip as usize) {
                                place = Cursor { seq: part.seq, lines: at, ..place };
                                yield ResultLine {
                                    custom_id: custom_id(&text)?,
                                    cursor: place,
                                    line_number: first_line + i64::from(line),
                                    succeeded,
                                    line: text,
                                };
                            }
                        }
                        place = Cursor { seq: part.seq, lines: count, ..place };
                    }
                    if !full {
                        break;
                    }
                    // The next page starts behind the last part.
                    place = Cursor { seq: place.seq + 1, lines: 0, ..place };
                }
                // Silence would look like a batch without results.
                if ended && reader.store.segments(&batch, SegmentIndex(0), 1).await?.is_empty() {
                    Err(ReadError::Deleted(batch.clone()))?;
                }
                if ended || !follow {
                    break;
                }
                wait_for(&batch, &mut changes).await;
            }
        })
    }

    /// A part's lines: its output lines, then its error lines. Once its segment is merged they are picked out of the final
    /// object.
    async fn part_lines(&self, batch: &BatchId, part: &Part) -> Result<Vec<(u32, bool, Bytes)>, ReadError> {
        let content = &part.content;
        match self.blobs.get(&content.object_key).await {
            Ok(object) => {
                let lines = content
                    .completed
                    .iter()
                    .map(|line| (line, true))
                    .chain(content.failed.iter().map(|line| (line, false)));
                let texts = split(&object);
                return Ok(lines.zip(texts).map(|((line, succeeded), text)| (line, succeeded, text)).collect());
            }
            Err(BlobError::Missing(_)) => {}
            Err(error) => return Err(error.into()),
        }
        let of = SegmentRef { batch: batch.clone(), index: part.segment };
        let segment = self.store.segment(&of).await?;
        let key = segment.and_then(|segment| segment.object_key);
        let key = key.ok_or_else(|| ReadError::Corrupt(format!("{} is missing", content.object_key)))?;
        let object = self.blobs.get(&key).await?;
        // All parts of the segment together say which line of the object is which.
        let (mut completed, mut failed) = (content.completed.clone(), content.failed.clone());
        for other in self.store.parts_of(&of).await? {
            completed.union(&other.content.completed);
            failed.union(&other.content.failed);
        }
        let lines = completed.iter().map(|line| (line, true)).chain(failed.iter().map(|line| (line, false)));
        Ok(lines
            .zip(split(&object))
            .filter(
                |((line, succeeded), _)| {
                    if *succeeded { content.completed.contains(*line) } else { content.failed.contains(*line) }
                },
            )
            .map(|((line, succeeded), text)| (line, succeeded, text))
            .collect())
    }

    async fn first_line(
        &self,
        batch: &BatchId,
        index: SegmentIndex,
        known: &mut HashMap<SegmentIndex, i64>,
    ) -> Result<i64, ReadError> {
        if let Some(line) = known.get(&index) {
            return Ok(*line);
        }
        let of = SegmentRef { batch: batch.clone(), index };
        let segment = self.store.segment(&of).await?;
        let line = segment.ok_or_else(|| ReadError::Corrupt(format!("segment {of} is missing")))?.span.first_line;
        // A batch has thousands of segments, a stream looks at a few at a time.
        if known.len() >= 1_000 {
            known.clear();
        }
        known.insert(index, line);
        Ok(line)
    }
}

/// The lines of an object, without their line feeds, sharing its memory.
fn split(object: &Bytes) -> impl Iterator<Item = Bytes> + '_ {
    let mut start = 0;
    memchr::memchr_iter(b'\n', object).map(move |end| {
        let line = object.slice(start..end);
        start = end + 1;
        line
    })
}

fn custom_id(line: &[u8]) -> Result<String, ReadError> {
    #[derive(serde::Deserialize)]
    struct Line {
        custom_id: String,
    }
    let line: Line =
        serde_json::from_slice(line).map_err(|error| ReadError::Corrupt(format!("a result line: {error}")))?;
    Ok(line.custom_id)
}

/// Waits until this batch may have changed.
async fn wait_for(batch: &BatchId, changes: &mut tokio::sync::broadcast::Receiver<BatchId>) {
    let changed = async {
        loop {
            match changes.recv().await {
                Ok(other) if other != *batch => {}
                Ok(_) | Err(RecvError::Lagged(_)) => return,
                // The store lives as long as the reader: this can't happen, and polling covers it.
                Err(RecvError::Closed) => return std::future::pending().await,
            }
        }
    };
    // Polling is the guarantee, the word of a change only makes it quick.
    let _ = tokio::time::timeout(POLL, changed).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursors_are_read_back_and_nonsense_is_not() {
        let (batch, other) = (BatchId::generate(), BatchId::generate());
        let cursor = Cursor { seq: 17, lines: 3, ..Cursor::start(&batch) };
        assert_eq!(Cursor::parse(&cursor.to_string(), &batch), Ok(cursor));
        assert!(Cursor::parse(&cursor.to_string(), &other).is_err());
        for bad in [
            "",
            "r1.",
            "r1.1",
            "r1.1.2",
            "r1.a.-1.2",
            "r1.a.1.2.3",
            "r2.a.1.2",
            "r1.g.1.2",
            "r1.a.99999999999999999999.1",
            "é",
        ] {
            assert!(bad.parse::<Cursor>().is_err(), "{bad}");
        }
    }
}
