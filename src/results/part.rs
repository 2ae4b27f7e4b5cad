//! Collects finished lines until they are worth an object.

use bytes::Bytes;

use super::Line;
use crate::{
    domain::{LineSet, TokenUsage},
    store::{FinalObject, NewPart},
};

/// Lines with a result that are not durable yet.
#[derive(Debug, Default)]
pub struct PartBuilder {
    completed: Vec<(u32, Line)>,
    failed: Vec<(u32, Line)>,
    /// How many of those were not run.
    not_run: u32,
    bytes: usize,
    usage: TokenUsage,
}

impl PartBuilder {
    /// Adds a line of the output file. `line` is its index in the segment; `text` ends with a line feed.
    pub fn complete(&mut self, line: u32, text: impl Into<Line>, usage: TokenUsage) {
        let text = text.into();
        self.bytes += text.len();
        self.usage += usage;
        self.completed.push((line, text));
    }

    /// Adds a line of the error file.
    pub fn fail(&mut self, line: u32, text: impl Into<Line>) {
        let text = text.into();
        self.bytes += text.len();
        self.failed.push((line, text));
    }

    /// Adds a line of the error file whose request was not run, because its batch ended first.
    pub fn end(&mut self, line: u32, text: impl Into<Line>) {
        self.not_run += 1;
        self.fail(line, text);
    }

    #[must_use]
    pub fn lines(&self) -> usize {
        self.completed.len() + self.failed.len()
    }

    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The object and its description: output lines, then error lines, each in input order.
    #[must_use]
    pub fn build(mut self, object_key: String) -> (Bytes, NewPart) {
        self.completed.sort_unstable_by_key(|(line, _)| *line);
        self.failed.sort_unstable_by_key(|(line, _)| *line);
        let lines = |of: &[(u32, Line)]| of.iter().map(|(line, _)| *line).collect::<LineSet>();
        let (completed, failed) = (lines(&self.completed), lines(&self.failed));
        let mut object = Vec::with_capacity(self.bytes);
        // Each line is freed when it is copied, so that large ones are not in memory twice.
        for (_, text) in self.completed {
            text.write_to(&mut object);
        }
        let output_bytes = object.len() as u64;
        for (_, text) in self.failed {
            text.write_to(&mut object);
        }
        let part = NewPart {
            object_key,
            output_bytes,
            error_bytes: object.len() as u64 - output_bytes,
            crc32c: crc32c::crc32c(&object),
            completed,
            failed,
            not_run: self.not_run,
            usage: self.usage,
        };
        (object.into(), part)
    }
}

/// The final object of a segment with a single part: the part's own object, without a copy.
#[must_use]
pub fn finished(part: &NewPart) -> FinalObject {
    FinalObject {
        object_key: part.object_key.clone(),
        output_bytes: part.output_bytes,
        error_bytes: part.error_bytes,
        output_lines: part.completed.len() as u64,
        error_lines: part.failed.len() as u64,
        crc32c: part.crc32c,
    }
}
