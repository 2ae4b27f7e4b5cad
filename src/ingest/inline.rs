//! Inline requests of a call: they are written to an input file too.

use bytes::Bytes;

use super::{Begun, Ingest, IngestError, NewUpload};
use crate::domain::{Endpoint, File, request_line};

/// The most inline requests of a batch.
pub const INLINE_MAX_REQUESTS: usize = 1_000;
/// The most bytes of their ids and bodies together, so that the call stays below gRPC's 4 MiB per message.
pub const INLINE_MAX_BYTES: usize = 3 * 1024 * 1024;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InlineRequest {
    /// The custom_id, with the rules of a line's.
    pub custom_id: String,
    /// The JSON object. It reaches the worker byte for byte, except that line ends between its tokens become spaces.
    pub body: Bytes,
}

impl Ingest {
    /// Makes an input file of inline requests. Errors name requests by number, from 1.
    ///
    /// # Errors
    /// As of an upload; [`IngestError::TooManyLines`] and [`IngestError::TooManyBytes`] by the limits of this way.
    pub async fn inline(
        &self,
        spec: NewUpload,
        endpoint: Endpoint,
        requests: &[InlineRequest],
    ) -> Result<File, IngestError> {
        if requests.len() > INLINE_MAX_REQUESTS {
            return Err(IngestError::TooManyLines { max: INLINE_MAX_REQUESTS as u64 });
        }
        let bytes: usize = requests.iter().map(|request| request.custom_id.len() + request.body.len()).sum();
        if bytes > INLINE_MAX_BYTES {
            return Err(IngestError::TooManyBytes { max: INLINE_MAX_BYTES as u64 });
        }
        let mut upload = match self.begin(spec).await? {
            Begun::Upload(upload) => upload,
            Begun::Existing(file) => return Ok(*file),
        };
        let mut lines = Vec::with_capacity(bytes + requests.len() * 128);
        let mut bad = Vec::new();
        for (number, request) in (1..).zip(requests) {
            // The body is checked alone, before it becomes part of a line, so that it can't smuggle in fields of the
            // line.
            match request_line::model_of(&request.body) {
                Ok(_) => write_line(&mut lines, endpoint, request),
                Err(problem) => bad.push((number, request.custom_id.clone(), problem)),
            }
            lines.push(b'\n');
        }
        upload.report(bad);
        upload.write(lines.into()).await?;
        upload.finish().await
    }
}

fn write_line(lines: &mut Vec<u8>, endpoint: Endpoint, request: &InlineRequest) {
    let custom_id = serde_json::Value::from(request.custom_id.as_str()).to_string();
    let head = format!("{{\"custom_id\":{custom_id},\"method\":\"POST\",\"url\":\"{endpoint}\",\"body\":");
    lines.extend_from_slice(head.as_bytes());
    // In valid JSON a line feed occurs only between tokens, where a space means the same.
    lines.extend(request.body.trim_ascii().iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }));
    lines.push(b'}');
}
