use std::collections::HashSet;

use tidemill::{
    domain::request_line,
    ingest::{IngestError, Limits, Validated, Validator},
};

/// However an upload is cut into chunks, it is judged as if it came in one; and a valid one's segments hold each line that
/// is not blank once. The first bytes say where it is cut, and how long a line may be.
pub fn upload(data: &[u8]) {
    let Some((head, file)) = data.split_first_chunk::<5>() else { return };
    let limits = Limits { max_lines: 40, max_bytes: 1 << 20, max_line_bytes: 64 + usize::from(head[0]) * 4 };
    let whole = judge(limits, std::iter::once(file));
    let mut rest = file;
    let chunks = std::iter::from_fn(|| {
        if rest.is_empty() {
            return None;
        }
        let wanted = usize::from(head[1 + rest.len() % 4]) % 67;
        let (chunk, after) = rest.split_at(wanted.clamp(1, rest.len()));
        rest = after;
        Some(chunk)
    });
    let cut = judge(limits, chunks);
    assert_eq!(format!("{whole:?}"), format!("{cut:?}"), "chunks matter");
    if let Ok(valid) = whole {
        check(file, &valid);
    }
}

fn judge<'a>(limits: Limits, chunks: impl Iterator<Item = &'a [u8]>) -> Result<Validated, IngestError> {
    let mut validator = Validator::new(limits, std::env::temp_dir());
    for chunk in chunks {
        validator.push(chunk)?;
    }
    validator.finish()
}

fn check(file: &[u8], valid: &Validated) {
    assert_eq!(valid.bytes, file.len() as u64);
    let without_bom = file.strip_prefix(b"\xef\xbb\xbf").unwrap_or(file);
    let lines: Vec<(i64, &[u8])> = (1..)
        .zip(without_bom.split(|byte| *byte == b'\n'))
        .filter(|(_, line)| !line.iter().all(|byte| b" \t\r".contains(byte)))
        .collect();
    let mut ids = HashSet::new();
    for (number, line) in &lines {
        let request = request_line::parse(line).unwrap_or_else(|error| panic!("line {number}: {error}"));
        assert!(ids.insert(request.custom_id.into_owned()), "line {number} has a custom_id again");
        assert!(valid.models.contains(&request.model.into_owned()));
        assert_eq!(request.endpoint, valid.endpoint);
    }
    assert_eq!(valid.requests, lines.len() as u64);
    let mut found: Vec<(i64, &[u8])> = Vec::new();
    for segment in &valid.segments {
        let bytes = &file[segment.offset as usize..(segment.offset + segment.length) as usize];
        let here: Vec<_> =
            request_line::lines(bytes).map(|(at, line)| (segment.first_line + i64::from(at), line)).collect();
        assert_eq!(here.len(), segment.requests as usize);
        found.extend(here);
    }
    assert_eq!(found, lines);
}
