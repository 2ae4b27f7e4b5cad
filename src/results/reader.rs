//! Reads results back: whole files in input order, or lines as they become durable.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    ops::Range,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt, stream::BoxStream};
use tokio::sync::broadcast::error::RecvError;

use super::{
    ReadError,
    checked::{self, Block, name_of},
};
use crate::{
    blobs::{BlobError, Blobs},
    domain::{BatchId, File, FileId, FileKind, LineSet, Scope, SegmentIndex, SegmentRef, SegmentSpan},
    store::{Part, SegmentRecord, Store},
};

/// Segments queried at a time when a file is read.
const SEGMENT_PAGE: u64 = 256;
/// Parts queried at a time when results are followed.
const PART_PAGE: u64 = 32;
/// Parts queried at a time when only their lines are counted.
const COUNTED_PAGE: u64 = 1_000;
/// Bytes of final objects that a stream of results keeps for further parts of their segments: those read last, and at
/// least one object.
const KEPT_BYTES: usize = 16 * 1024 * 1024;
/// The time that a follower waits for a notification before it polls.
const POLL: Duration = Duration::from_secs(1);

/// A position in a batch's stream of results, after a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Identifies the batch: with another batch's cursor, results would silently be missing.
    batch: u32,
    /// The number of the part.
    seq: i64,
    /// The number of the part's lines that have been delivered.
    lines: u32,
}

/// Not a valid cursor of the batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a cursor of this batch's results: {0:?}")]
pub struct BadCursor(String);

impl Cursor {
    /// The position before the first line.
    fn start(batch: &BatchId) -> Self {
        Self { batch: crc32c::crc32c(batch.as_str().as_bytes()), seq: 0, lines: 0 }
    }

    /// Parses a cursor of a batch.
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

#[derive(Clone, Debug)]
pub struct ResultLine {
    /// The request's custom_id, as in the input.
    pub custom_id: String,
    /// The position after this line.
    pub cursor: Cursor,
    /// The request's line in the input, from 1.
    pub line_number: i64,
    /// Whether it is a line of the output file; otherwise it is one of the error file.
    pub succeeded: bool,
    /// The JSON line without its line feed.
    pub line: Bytes,
}

/// Reads results and files.
#[derive(Clone)]
pub struct Reader {
    store: Store,
    pub(super) blobs: Blobs,
}

impl Reader {
    /// A reader over this node's database and blobs.
    #[must_use]
    pub fn new(store: Store, blobs: Blobs) -> Self {
        Self { store, blobs }
    }

    /// A file's bytes from `offset`, in pieces of at most 1 MiB. Every segment is verified by its checksum: a stream
    /// that ends without an error contains only what was written.
    ///
    /// # Errors
    /// [`ReadError`].
    // Async and fallible, so that a missing file could be reported before the stream begins.
    pub async fn download(
        &self,
        file: &File,
        offset: u64,
    ) -> Result<impl Stream<Item = Result<Bytes, ReadError>> + Send + 'static + use<>, ReadError> {
        let size = u64::try_from(file.bytes).unwrap_or(0);
        let stream: BoxStream<'static, _> = match (&file.kind, &file.object_key) {
            (FileKind::Input, Some(key)) => {
                let offset = offset.min(size);
                let pieces = self.input(file.id.clone(), key.clone(), size, offset);
                // Lines between segments are blank, and part of the file.
                let whole = file.crc32c.filter(|_| offset == 0);
                checked::sealed(pieces, size - offset, whole, 0..size - offset, format!("the file {}", file.id)).boxed()
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

    /// An input from `offset`, segment by segment.
    fn input(
        &self,
        id: FileId,
        key: String,
        size: u64,
        offset: u64,
    ) -> impl Stream<Item = Result<Bytes, ReadError>> + Send + 'static + use<> {
        let (store, blobs) = (self.store.clone(), self.blobs.clone());
        async_stream::try_stream! {
            let (mut at, mut from) = (offset, Some(SegmentIndex(0)));
            while at < size {
                let page = match from {
                    Some(from) => store.file_segments_from(&id, from, SEGMENT_PAGE).await?,
                    None => Vec::new(),
                };
                // After the last segment there may be blank lines.
                from = page.last().map(|last| SegmentIndex(last.index.0 + 1));
                let mut blocks = Vec::with_capacity(2 * page.len() + 1);
                let plain = |range: Range<u64>| Block {
                    object_key: key.clone(),
                    wanted: range.clone(),
                    range,
                    crc32c: None,
                    name: format!("the file {id}"),
                };
                for span in &page {
                    let range = bytes_of(span);
                    if range.end <= at {
                        continue;
                    }
                    if range.start > at {
                        blocks.push(plain(at..range.start));
                    }
                    let wanted = range.start.max(at)..range.end;
                    at = range.end;
                    blocks.push(Block {
                        object_key: key.clone(),
                        range,
                        wanted,
                        crc32c: span.crc32c,
                        name: name_of(&id, span),
                    });
                }
                if from.is_none() {
                    blocks.push(plain(at..size));
                    at = size;
                }
                for block in blocks {
                    let mut pieces = checked::read(&blobs, block).boxed();
                    while let Some(piece) = pieces.next().await {
                        yield piece?;
                    }
                }
            }
        }
    }

    /// One section of each of a batch's final objects, in order: `bytes` in all, from `skip`. A checksum covers both
    /// sections, so if a segment has both, both are read.
    fn sections(
        &self,
        batch: BatchId,
        bytes: u64,
        mut skip: u64,
        section: fn(&SegmentRecord) -> Range<u64>,
    ) -> impl Stream<Item = Result<Bytes, ReadError>> + Send + 'static + use<> {
        let (store, blobs) = (self.store.clone(), self.blobs.clone());
        async_stream::try_stream! {
            let mut from = SegmentIndex(0);
            let mut left = bytes.saturating_sub(skip);
            while left > 0 {
                let page = store.segments(&batch, from, SEGMENT_PAGE).await?;
                // Without an error this would look like the end of the file.
                let Some(last) = page.last() else { Err(ReadError::Deleted(batch.clone()))? };
                from = SegmentIndex(last.span.index.0 + 1);
                for segment in page {
                    let range = section(&segment);
                    let length = range.end - range.start;
                    if skip >= length {
                        skip -= length;
                        continue;
                    }
                    let name = name_of(&batch, &segment.span);
                    let object_key =
                        segment.object_key.ok_or_else(|| ReadError::Corrupt(format!("{name} has no object")))?;
                    let wanted = range.start + skip..range.end;
                    let whole = 0..segment.output_bytes + segment.error_bytes;
                    let block = Block { object_key, range: whole, wanted, crc32c: segment.crc32c, name };
                    let mut pieces = checked::read(&blobs, block).boxed();
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

    /// The position after so many lines of a batch's results, or after the last one if there are fewer; and how many there
    /// are in all. Reads rows only.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn after_lines(&self, batch: &BatchId, lines: u64) -> Result<(Cursor, u64), ReadError> {
        let (mut place, mut from, mut all) = (Cursor::start(batch), 0, 0);
        loop {
            let parts = self.store.parts_from(batch, from, COUNTED_PAGE).await?;
            for part in &parts {
                let count = (part.content.completed.len() + part.content.failed.len()) as u64;
                if all < lines {
                    let taken = u32::try_from((lines - all).min(count)).unwrap_or(u32::MAX);
                    place = Cursor { seq: part.seq, lines: taken, ..place };
                }
                all += count;
                from = part.seq + 1;
            }
            if (parts.len() as u64) < COUNTED_PAGE {
                return Ok((place, all));
            }
        }
    }

    /// A batch's results in the order in which they became durable, after `cursor`. With `follow` the stream continues
    /// until the batch has ended.
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
            let (mut segments, mut finals) = (HashMap::new(), Finals::default());
            loop {
                // Read before the parts, because a batch that has ended gets no more of them.
                let ended = reader.store.batch(&batch, &Scope::All).await?.is_none_or(|batch| batch.status.is_terminal());
                loop {
                    let parts = reader.store.parts_from(&batch, place.seq, PART_PAGE).await?;
                    let full = parts.len() as u64 == PART_PAGE;
                    for part in parts {
                        let skip = if part.seq == place.seq { place.lines } else { 0 };
                        let span = reader.span(&batch, part.segment, &mut segments).await?;
                        let count = u32::try_from(part.content.completed.len() + part.content.failed.len()).unwrap_or(u32::MAX);
                        if skip < count {
                            let object = reader.part_lines(&batch, &part, &span, &mut finals).await?;
                            for (at, (line, succeeded, text)) in (1..).zip(object).skip(skip as usize) {
                                place = Cursor { seq: part.seq, lines: at, ..place };
                                yield ResultLine {
                                    custom_id: custom_id(&text)?,
                                    cursor: place,
                                    line_number: span.first_line + i64::from(line),
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
                    // The next page starts after the last part.
                    place = Cursor { seq: place.seq + 1, lines: 0, ..place };
                }
                // An empty stream would look like a batch without results.
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

    /// A part's lines: its output lines, then its error lines. After its segment has been merged they are taken from
    /// the final object.
    async fn part_lines(
        &self,
        batch: &BatchId,
        part: &Part,
        span: &SegmentSpan,
        finals: &mut Finals,
    ) -> Result<Vec<NumberedLine>, ReadError> {
        let content = &part.content;
        if finals.get(part.segment).is_none() {
            match self.blobs.get(&content.object_key).await {
                Ok(object) => {
                    let length = content.output_bytes + content.error_bytes;
                    checked::check(&object, length, Some(content.crc32c), || name_of(batch, span))?;
                    return Ok(numbered(&content.completed, &content.failed, &object));
                }
                Err(BlobError::Missing(_)) => {}
                Err(error) => return Err(error.into()),
            }
            let lines = self.final_lines(batch, part, span).await?;
            finals.keep(part.segment, lines);
        }
        let lines = finals.get(part.segment).unwrap_or_default();
        let is_of_part = |line: &&NumberedLine| {
            let (line, succeeded, _) = line;
            if *succeeded { content.completed.contains(*line) } else { content.failed.contains(*line) }
        };
        Ok(lines.iter().filter(is_of_part).cloned().collect())
    }

    /// All lines of a segment that has ended.
    async fn final_lines(
        &self,
        batch: &BatchId,
        part: &Part,
        span: &SegmentSpan,
    ) -> Result<Vec<NumberedLine>, ReadError> {
        let of = SegmentRef { batch: batch.clone(), index: part.segment };
        let missing = || ReadError::Damaged(format!("{}: its object is missing", name_of(batch, span)));
        let segment = self.store.segment(&of).await?.ok_or_else(missing)?;
        let key = segment.object_key.ok_or_else(missing)?;
        let object = self.blobs.get(&key).await?;
        let length = segment.output_bytes + segment.error_bytes;
        checked::check(&object, length, segment.crc32c, || name_of(batch, span))?;
        // All parts of the segment together tell which line of the object is which.
        let (mut completed, mut failed) = (LineSet::default(), LineSet::default());
        for part in self.store.parts_of(&of).await? {
            completed.union(&part.content.completed);
            failed.union(&part.content.failed);
        }
        Ok(numbered(&completed, &failed, &object))
    }

    async fn span(
        &self,
        batch: &BatchId,
        index: SegmentIndex,
        known: &mut HashMap<SegmentIndex, SegmentSpan>,
    ) -> Result<SegmentSpan, ReadError> {
        if let Some(span) = known.get(&index) {
            return Ok(*span);
        }
        let of = SegmentRef { batch: batch.clone(), index };
        let segment = self.store.segment(&of).await?;
        let span = segment.ok_or_else(|| ReadError::Corrupt(format!("segment {of} is missing")))?.span;
        // A batch has thousands of segments; a stream needs a few at a time.
        if known.len() >= 1_000 {
            known.clear();
        }
        known.insert(index, span);
        Ok(span)
    }
}

/// The index of a line in its segment, whether it is an output line, and its text.
type NumberedLine = (u32, bool, Bytes);

/// The lines of an object: output lines, then error lines.
fn numbered(completed: &LineSet, failed: &LineSet, object: &Bytes) -> Vec<NumberedLine> {
    let lines = completed.iter().map(|line| (line, true)).chain(failed.iter().map(|line| (line, false)));
    lines.zip(split(object)).map(|((line, succeeded), text)| (line, succeeded, text)).collect()
}

/// The lines of the final objects read last. A slow segment has hundreds of parts, each of which would read its object
/// again.
#[derive(Default)]
struct Finals {
    /// The newest last.
    kept: VecDeque<(SegmentIndex, Arc<[NumberedLine]>)>,
    bytes: usize,
}

impl Finals {
    fn get(&self, segment: SegmentIndex) -> Option<Arc<[NumberedLine]>> {
        self.kept.iter().find(|(index, _)| *index == segment).map(|(_, lines)| lines.clone())
    }

    fn keep(&mut self, segment: SegmentIndex, lines: Vec<NumberedLine>) {
        self.bytes += size_of_lines(&lines);
        self.kept.push_back((segment, lines.into()));
        while self.bytes > KEPT_BYTES && self.kept.len() > 1 {
            if let Some((_, oldest)) = self.kept.pop_front() {
                self.bytes -= size_of_lines(&oldest);
            }
        }
    }
}

fn size_of_lines(lines: &[NumberedLine]) -> usize {
    lines.iter().map(|(_, _, text)| text.len() + size_of::<NumberedLine>()).sum()
}

/// The byte range of a segment in its input.
pub(super) fn bytes_of(span: &SegmentSpan) -> Range<u64> {
    let number = |value: i64| u64::try_from(value).unwrap_or(0);
    number(span.offset)..number(span.offset.saturating_add(span.length))
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
                // The store lives as long as the reader, so this can't happen; polling would cover it.
                Err(RecvError::Closed) => return std::future::pending().await,
            }
        }
    };
    // Polling guarantees progress; the notification only reduces latency.
    let _ = tokio::time::timeout(POLL, changed).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn final_objects_are_kept_up_to_a_bound_and_one_in_any_case() {
        let lines = |bytes: usize| vec![(0, true, Bytes::from(vec![b'x'; bytes]))];
        let kept = |finals: &Finals| finals.kept.iter().map(|(index, _)| index.0).collect::<Vec<_>>();
        let mut finals = Finals::default();
        for index in 0..5 {
            finals.keep(SegmentIndex(index), lines(KEPT_BYTES / 4));
        }
        assert_eq!(kept(&finals), [2, 3, 4], "the newest, within the bound");
        assert!(finals.get(SegmentIndex(3)).is_some() && finals.get(SegmentIndex(1)).is_none());
        finals.keep(SegmentIndex(5), lines(3 * KEPT_BYTES));
        assert_eq!(kept(&finals), [5], "one that is larger is kept alone: its parts come next");
        finals.keep(SegmentIndex(6), lines(1));
        assert_eq!(kept(&finals), [6]);
    }

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
