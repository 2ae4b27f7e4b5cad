//! Validates a whole file: chunks in, the segment index or the bad lines out. Blocks, because it may write scratch
//! files.

use std::path::PathBuf;

use super::{
    IngestError, Limits, format,
    report::{Fault, Reports},
    segments::{RequestAt, Segments},
    splitter::{Line, Splitter},
    unique::UniqueIds,
};
use crate::domain::{Endpoint, SegmentSpan, request_line, segment::MAX_MODELS_PER_FILE};

/// The byte order mark that some editors put at a file's start.
const BOM: &[u8] = b"\xef\xbb\xbf";

const TOO_LONG: Fault = Fault { code: "invalid_request", param: None };
const TWICE: Fault = Fault::in_field("duplicate_custom_id", "custom_id");

/// Characters of a model's name that a message repeats.
const SHOWN_MODEL: usize = 60;

/// The result of validating a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Validated {
    /// The size in bytes.
    pub bytes: u64,
    pub requests: u64,
    /// The url of all its requests.
    pub endpoint: Endpoint,
    /// The models, in the order of their first use.
    pub models: Vec<String>,
    /// The segments: every line with a request is in exactly one.
    pub segments: Vec<SegmentSpan>,
    /// The CRC-32C of the whole file.
    pub crc32c: u32,
}

/// Validates a file while it arrives.
#[derive(Debug)]
pub struct Validator {
    splitter: Splitter,
    check: Check,
    max_bytes: u64,
    crc: u32,
    /// The first bytes, at most [`format::HEAD`].
    head: Vec<u8>,
}

impl Validator {
    /// Scratch files, which a file with many requests needs, are made in `scratch`; they have no names and vanish with
    /// the process.
    #[must_use]
    pub fn new(limits: Limits, scratch: PathBuf) -> Self {
        Self {
            splitter: Splitter::new(limits.max_line_bytes),
            check: Check {
                max_lines: limits.max_lines,
                max_line_bytes: limits.max_line_bytes,
                lines: 0,
                requests: 0,
                endpoint: None,
                models: Vec::new(),
                segments: Segments::default(),
                ids: UniqueIds::new(scratch),
                reports: Reports::default(),
            },
            max_bytes: limits.max_bytes,
            crc: 0,
            head: Vec::new(),
        }
    }

    /// Takes the next bytes. Bad lines are reported at the end.
    ///
    /// # Errors
    /// [`IngestError::NotJsonl`], [`IngestError::TooManyBytes`], [`IngestError::TooManyLines`] and [`IngestError::Scratch`]
    /// end the upload at once.
    pub fn push(&mut self, chunk: &[u8]) -> Result<(), IngestError> {
        let missing = format::HEAD - self.head.len();
        if missing > 0 {
            self.head.extend_from_slice(&chunk[..missing.min(chunk.len())]);
            if self.head.len() == format::HEAD {
                self.check_head()?;
            }
        }
        if self.splitter.position() + chunk.len() as u64 > self.max_bytes {
            return Err(IngestError::TooManyBytes { max: self.max_bytes });
        }
        self.crc = crc32c::crc32c_append(self.crc, chunk);
        self.splitter.push(chunk, |line| self.check.line(line))
    }

    /// Ends the file and returns the result.
    ///
    /// # Errors
    /// [`IngestError::Invalid`] with the bad lines, [`IngestError::Empty`], or as [`Validator::push`].
    pub fn finish(mut self) -> Result<Validated, IngestError> {
        self.check_head()?;
        let bytes = self.splitter.position();
        self.splitter.finish(|line| self.check.line(line))?;
        self.check.finish(bytes, self.crc)
    }

    /// A file of another format would have hundreds of bad lines, none of which would say what it is.
    fn check_head(&self) -> Result<(), IngestError> {
        format::other_than_jsonl(&self.head).map_or(Ok(()), |what| Err(IngestError::NotJsonl(what)))
    }

    /// The number of bytes received.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.splitter.position()
    }

    /// The checksum of the bytes received.
    #[must_use]
    pub fn crc32c(&self) -> u32 {
        self.crc
    }

    /// Whether a bad line has been seen, so that there will be no file.
    #[must_use]
    pub fn is_doomed(&self) -> bool {
        self.check.reports.total() > 0
    }

    /// Reports a line that the caller has found to be bad and has left blank.
    pub(super) fn report(&mut self, line: u64, custom_id: Option<String>, fault: Fault, message: String) {
        self.check.reports.add(line, custom_id, fault, || message);
    }
}

#[derive(Debug)]
struct Check {
    max_lines: u64,
    max_line_bytes: usize,
    /// Lines so far, counting blank ones.
    lines: u64,
    /// Lines so far that are not blank.
    requests: u64,
    /// The url and the number of the first valid line.
    endpoint: Option<(Endpoint, u64)>,
    models: Vec<String>,
    segments: Segments,
    ids: UniqueIds,
    reports: Reports,
}

impl Check {
    fn line(&mut self, line: Line<'_>) -> Result<(), IngestError> {
        self.lines += 1;
        let Line { text, mut start, end } = line;
        let mut text = text;
        if start == 0
            && let Some(rest) = text.and_then(|text| text.strip_prefix(BOM))
        {
            text = Some(rest);
            start += BOM.len() as u64;
        }
        if let Some(blank) = text.filter(|text| request_line::is_blank(text)) {
            self.segments.blank(blank, end - start);
            return Ok(());
        }
        if self.requests == self.max_lines {
            return Err(IngestError::TooManyLines { max: self.max_lines });
        }
        self.requests += 1;
        let Some(text) = text else {
            let max = self.max_line_bytes;
            self.reports
                .add(self.lines, None, TOO_LONG, || format!("the line is longer than the limit of {max} bytes"));
            return Ok(());
        };
        match request_line::parse(text) {
            Ok(request) => self.request(&request, text, start, end),
            Err(error) => {
                let fault = Fault::from(&error.problem);
                self.reports.add(self.lines, error.custom_id, fault, || error.problem.to_string());
                Ok(())
            }
        }
    }

    fn request(
        &mut self,
        request: &request_line::RequestLine<'_>,
        text: &[u8],
        start: u64,
        end: u64,
    ) -> Result<(), IngestError> {
        let line = self.lines;
        let (endpoint, first) = *self.endpoint.get_or_insert((request.endpoint, line));
        let known = || Some(request.custom_id.clone().into_owned());
        if request.endpoint != endpoint {
            self.reports.add(line, known(), Fault::in_field("invalid_url", "url"), || {
                format!("url is {}; expected {endpoint} as in line {first}: one file, one url", request.endpoint)
            });
            return Ok(());
        }
        let Some(model) = self.model(&request.model) else {
            self.reports.add(line, known(), Fault::in_field("mismatched_model", "body.model"), || {
                let name: String = request.model.chars().take(SHOWN_MODEL).collect();
                format!("one model too many: {name:?}; a file may name at most {MAX_MODELS_PER_FILE}")
            });
            return Ok(());
        };
        self.segments.push(RequestAt { line, start, end, model, text });
        self.ids.insert(&request.custom_id, line).map_err(IngestError::Scratch)
    }

    /// The model's index in the file's list. `None`: there are too many.
    fn model(&mut self, name: &str) -> Option<usize> {
        if let Some(at) = self.models.iter().position(|known| known == name) {
            return Some(at);
        }
        if self.models.len() == MAX_MODELS_PER_FILE {
            return None;
        }
        self.models.push(name.to_owned());
        Some(self.models.len() - 1)
    }

    fn finish(mut self, bytes: u64, crc32c: u32) -> Result<Validated, IngestError> {
        self.ids
            .finish(|duplicate| {
                self.reports.add(duplicate.line, Some(duplicate.custom_id), TWICE, || {
                    format!(
                        "custom_id is already in line {}; expected it to be unique in the file",
                        duplicate.first_line
                    )
                });
            })
            .map_err(IngestError::Scratch)?;
        let (errors, total) = self.reports.into_sorted();
        if total > 0 {
            return Err(IngestError::Invalid { errors, total });
        }
        let Some((endpoint, _)) = self.endpoint else { return Err(IngestError::Empty) };
        Ok(Validated {
            bytes,
            requests: self.requests,
            endpoint,
            models: self.models,
            segments: self.segments.finish(),
            crc32c,
        })
    }
}

#[cfg(test)]
mod tests;
