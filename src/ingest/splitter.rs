//! Splits chunks that end anywhere into lines.

/// A line of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line<'a> {
    /// Its text without the line feed. `None`: longer than allowed.
    pub(super) text: Option<&'a [u8]>,
    /// The offset of its first byte in the file.
    pub(super) start: u64,
    /// The offset after its line feed.
    pub(super) end: u64,
}

/// Splits a file into lines. A line within one chunk is not copied; one that is too long is dropped.
#[derive(Debug)]
pub(super) struct Splitter {
    max_line: usize,
    /// The beginning of a line whose end has not arrived yet.
    carry: Vec<u8>,
    /// Whether that line is already too long, so that the rest of it is dropped.
    dropping: bool,
    /// The offset of that line.
    start: u64,
    /// The offset of the next chunk.
    position: u64,
}

/// The most capacity that the buffer keeps for the next line.
const KEPT_CAPACITY: usize = 256 * 1024;

impl Splitter {
    pub(super) fn new(max_line: usize) -> Self {
        Self { max_line, carry: Vec::new(), dropping: false, start: 0, position: 0 }
    }

    /// The number of bytes received.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Takes the next chunk and passes on the lines that end in it.
    pub(super) fn push<E>(&mut self, chunk: &[u8], mut line: impl FnMut(Line<'_>) -> Result<(), E>) -> Result<(), E> {
        let chunk_start = self.position;
        self.position += chunk.len() as u64;
        let mut from = 0;
        for at in memchr::memchr_iter(b'\n', chunk) {
            let end = chunk_start + at as u64 + 1;
            let piece = &chunk[from..at];
            if self.carry.is_empty() && !self.dropping {
                let text = (piece.len() <= self.max_line).then_some(piece);
                line(Line { text, start: self.start, end })?;
            } else {
                self.keep(piece);
                line(Line { text: (!self.dropping).then_some(&self.carry), start: self.start, end })?;
                self.clear();
            }
            from = at + 1;
            self.start = end;
        }
        self.keep(&chunk[from..]);
        Ok(())
    }

    /// Passes on the last line if the file does not end with a line feed.
    pub(super) fn finish<E>(mut self, mut line: impl FnMut(Line<'_>) -> Result<(), E>) -> Result<(), E> {
        if self.start == self.position {
            return Ok(());
        }
        let text = std::mem::take(&mut self.carry);
        line(Line { text: (!self.dropping).then_some(&text), start: self.start, end: self.position })
    }

    fn keep(&mut self, piece: &[u8]) {
        if self.dropping || self.carry.len() + piece.len() > self.max_line {
            self.dropping = true;
            self.carry = Vec::new();
        } else {
            self.carry.extend_from_slice(piece);
        }
    }

    fn clear(&mut self) {
        self.dropping = false;
        self.carry.clear();
        self.carry.shrink_to(KEPT_CAPACITY);
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::*;

    type Found = (Option<Vec<u8>>, u64, u64);

    fn split<'a>(chunks: impl Iterator<Item = &'a [u8]>, max_line: usize) -> Vec<Found> {
        let mut found = Vec::new();
        let mut take = |line: Line<'_>| -> Result<(), Infallible> {
            found.push((line.text.map(<[u8]>::to_vec), line.start, line.end));
            Ok(())
        };
        let mut splitter = Splitter::new(max_line);
        for chunk in chunks {
            splitter.push(chunk, &mut take).unwrap();
            assert!(splitter.carry.len() <= max_line);
        }
        splitter.finish(&mut take).unwrap();
        found
    }

    #[test]
    fn lines_have_their_places() {
        let found = split([&b"ab\n\nlong"[..], b"er\n", b"x"].into_iter(), 5);
        assert_eq!(
            found,
            [(Some(b"ab".to_vec()), 0, 3), (Some(vec![]), 3, 4), (None, 4, 11), (Some(b"x".to_vec()), 11, 12)]
        );
        assert_eq!(split([&b""[..]].into_iter(), 5), []);
        assert_eq!(
            split([&b"12345\n"[..], b"123456\n", b"123456"].into_iter(), 5)[1..],
            [(None, 6, 13), (None, 13, 19)]
        );
    }

    proptest! {
        #[test]
        fn chunks_do_not_matter(
            file in proptest::collection::vec(prop_oneof![Just(b'\n'), Just(b'\r'), Just(b'a')], 0..200),
            sizes in proptest::collection::vec(0usize..9, 1..200),
            max_line in 0usize..12,
        ) {
            let mut chunks = Vec::new();
            let mut rest = &file[..];
            for size in sizes {
                let (chunk, more) = rest.split_at(size.min(rest.len()));
                chunks.push(chunk);
                rest = more;
            }
            chunks.push(rest);
            let whole = split(std::iter::once(&file[..]), max_line);
            prop_assert_eq!(&split(chunks.into_iter(), max_line), &whole);
            // Together they are the file, and only too long ones are left out.
            let mut position = 0;
            for (text, start, end) in whole {
                prop_assert_eq!(start, position);
                let bytes = &file[start as usize..end as usize];
                let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
                prop_assert_eq!(text, (bytes.len() <= max_line).then(|| bytes.to_vec()));
                position = end;
            }
            prop_assert_eq!(position, file.len() as u64);
        }
    }
}
