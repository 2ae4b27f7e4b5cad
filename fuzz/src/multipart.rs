use bytes::Bytes;
use tidemill::api::multipart::{Malformed, Multipart, Piece};

const BOUNDARY: &str = "-b";

/// A part's names and its bytes.
type Part = (String, Option<String>, Vec<u8>);

/// However a form is cut into chunks, the same parts come out, or the same error. A body of any bytes has the parts that a
/// reader finds that has all of it at once; and a form that is written as one client or another writes it, with its fields
/// in any order, has the fields that were written. The first byte says which of both, the next four where it is cut.
pub fn multipart(data: &[u8]) {
    let Some((head, rest)) = data.split_first_chunk::<5>() else { return };
    let (body, wanted) = if head[0] % 2 == 0 {
        // Any bytes hardly ever hold a boundary.
        let body = rest.split(|byte| *byte == b'^').collect::<Vec<_>>().join(&b"\r\n---b"[..]);
        (body, None)
    } else {
        let (body, parts) = write(rest);
        (body, Some(parts))
    };
    let whole = read(&mut std::iter::once(&body[..]));
    let mut left = &body[..];
    let cut = read(&mut std::iter::from_fn(|| {
        let wanted = usize::from(head[1 + left.len() % 4]) % 41;
        let (chunk, after) = left.split_at_checked(wanted.clamp(1, left.len().max(1)))?;
        left = after;
        Some(chunk)
    }));
    assert_eq!(whole, cut, "chunks matter");
    match wanted {
        Some(wanted) => assert_eq!(whole, (wanted, Ok(()))),
        None => {
            let (parts, outcome) = whole;
            let data: Vec<Vec<u8>> = parts.into_iter().map(|(_, _, data)| data).collect();
            if let Some(expected) = at_once(&body).filter(|_| outcome.is_ok()) {
                assert_eq!(data, expected);
            } else {
                assert!(outcome.is_err(), "a body that is not closed passes for a whole one");
            }
        }
    }
}

/// The parts of a body that comes in these chunks, the last perhaps torn, and how it ends.
fn read(chunks: &mut dyn Iterator<Item = &[u8]>) -> (Vec<Part>, Result<(), Malformed>) {
    let mut multipart = Multipart::new(BOUNDARY);
    let (mut pieces, mut parts) = (Vec::new(), Vec::<Part>::new());
    let mut outcome = Ok(());
    for chunk in chunks {
        outcome = outcome.and_then(|()| multipart.push(Bytes::copy_from_slice(chunk), &mut pieces));
    }
    let mut is_open = false;
    for piece in pieces {
        match piece {
            Piece::Begin(head) => {
                assert!(!std::mem::replace(&mut is_open, true), "a part begins in another");
                parts.push((head.name, head.filename, Vec::new()));
            }
            Piece::Data(data) => {
                assert!(is_open && !data.is_empty());
                parts.last_mut().unwrap().2.extend_from_slice(&data);
            }
            Piece::End => assert!(std::mem::replace(&mut is_open, false), "a part ends that has not begun"),
        }
    }
    (parts, outcome.and_then(|()| multipart.finish()))
}

/// The data of the parts of a whole body. `None`: it has no end, or an end of a head or a line is missing.
fn at_once(body: &[u8]) -> Option<Vec<Vec<u8>>> {
    let text = [b"\r\n", body].concat();
    let find = |from: usize, what: &str| {
        text[from..].windows(what.len()).position(|window| window == what.as_bytes()).map(|at| from + at)
    };
    let delimiter = format!("\r\n--{BOUNDARY}");
    let mut parts = Vec::new();
    let mut at = find(0, &delimiter)? + delimiter.len();
    while !text[at..].starts_with(b"--") {
        at += text[at..].iter().take_while(|byte| b" \t".contains(byte)).count();
        if !text[at..].starts_with(b"\r\n") {
            return None;
        }
        // A head without lines ends with the line end that follows the delimiter's.
        let data = if text[at + 2..].starts_with(b"\r\n") { at + 4 } else { find(at + 2, "\r\n\r\n")? + 4 };
        let end = find(data, &delimiter)?;
        parts.push(text[data..end].to_vec());
        at = end + delimiter.len();
    }
    Some(parts)
}

/// A form whose fields are the lines of a text, and what is to be read of it. A line's first byte says how its name is
/// written; a file's name is what precedes the line's first `|`.
fn write(text: &[u8]) -> (Vec<u8>, Vec<Part>) {
    let (mut body, mut parts) = (Vec::new(), Vec::new());
    for line in text.split(|byte| *byte == b'^').take(32) {
        let (style, line) = line.split_first().unwrap_or((&0, line));
        let bar = line.iter().position(|byte| *byte == b'|');
        let (name, data) = bar.map_or((None, line), |bar| (Some(&line[..bar]), &line[bar + 1..]));
        // What is no part of a plain name has tests of its own.
        let plain = |letter: &char| !letter.is_control() && !"\\/%;".contains(*letter);
        let filename =
            name.map(|name| String::from_utf8_lossy(name).chars().filter(plain).take(60).collect::<String>());
        let written = filename.as_ref().map(|name| match style % 4 {
            0 => format!("; filename=\"{}\"", name.replace('"', "%22")),
            1 => format!("; filename=\"{}\"; filename*=utf-8''x", name.replace('"', "\\\"")),
            // The backslash before an empty name would be its closing quote's.
            2 if !name.is_empty() => {
                format!(";filename=\"C:\\dir\\{}\"\r\nContent-Type: text/plain", name.replace('"', "%22"))
            }
            _ => format!("; FileName = \"/tmp/{}\"", name.replace('"', "\\\"")),
        });
        let disposition = ["Content-Disposition", "content-disposition"][usize::from(style / 4 % 2)];
        let field = format!("f{}", parts.len());
        body.extend(format!("---b\r\n{disposition}: form-data; name=\"{field}\"").bytes());
        body.extend(written.unwrap_or_default().bytes());
        body.extend([b"\r\n\r\n", data, b"\r\n"].concat());
        parts.push((field, filename, data.to_vec()));
    }
    body.extend(b"---b--\r\n");
    // A line that holds the boundary has to be written with another one.
    if parts.iter().any(|(.., data)| data.windows(6).any(|window| window == b"\r\n---b") || data.starts_with(b"---b")) {
        return write(b"");
    }
    (body, parts)
}
