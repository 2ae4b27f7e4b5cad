//! Reads `multipart/form-data` (RFC 7578) piece by piece: bytes in, parts out, however the bytes are cut. Pure.
//!
//! A part's data passes through without being copied. What precedes the first part, the heads of parts and the number of
//! parts are bounded, so nothing that a client sends is kept in memory but a head and the beginning of a delimiter.
//!
//! multer 3.1 has no bound for preambles and heads, copies all data and reads no `%22`: wrapped, it saves no code.

use bytes::{Bytes, BytesMut};
use memchr::memmem::Finder;

/// The most bytes before the first delimiter.
const PREAMBLE: usize = 64 * 1024;
/// The most bytes of a part's head.
const HEAD: usize = 16 * 1024;
/// The most bytes between a delimiter and its line end, which RFC 2046 allows to be blanks.
const PADDING: usize = 1024;
/// The most parts.
const PARTS: usize = 32;
/// The most bytes of a boundary (RFC 2046, 5.1.1).
const BOUNDARY: usize = 70;
/// The most bytes of a file's name.
const FILENAME: usize = 255;

/// Why a body is not multipart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// More than `PREAMBLE` bytes came without a delimiter.
    #[error("no part begins within the first 64 KiB: is the boundary of the content-type header the one in the body?")]
    NoPart,
    /// A part's head is longer than `HEAD`.
    #[error("the headers of a part are longer than 16 KiB")]
    LongHead,
    /// There are more than `PARTS` parts.
    #[error("the form has more than 32 fields")]
    ManyParts,
    /// A delimiter is followed by something else than a line end.
    #[error("a boundary is not followed by a line end")]
    Delimiter,
    /// A part has no name.
    #[error("a part has no content-disposition header with a name")]
    NoName,
    /// The body ended before the closing delimiter.
    #[error("the body ends before its closing boundary: it was cut off on the way")]
    Torn,
}

/// What a body consists of, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// A part begins.
    Begin(Head),
    /// Data of the part, never empty.
    Data(Bytes),
    /// The part ends.
    End,
}

/// The head of a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The form field's name.
    pub name: String,
    /// The file's name without its folders, if it has one.
    pub filename: Option<String>,
}

/// Where in the body the reader is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Before the first delimiter.
    Preamble,
    /// After a delimiter, before its line end.
    Delimiter,
    /// In the head of a part.
    Head,
    /// In the data of a part.
    Data,
    /// After the closing delimiter.
    Epilogue,
}

/// Reads one body.
pub struct Multipart {
    /// A line end and the boundary with its dashes.
    delimiter: Finder<'static>,
    at: At,
    /// What has come and is not read yet.
    rest: Bytes,
    preamble: usize,
    parts: usize,
}

/// The boundary that a `content-type` names. `None`: it is not `multipart/form-data`, or has no usable boundary.
pub fn boundary(content_type: &str) -> Option<String> {
    let (kind, parameters) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let boundary = parameter(parameters.as_bytes(), "boundary")?;
    (1..=BOUNDARY).contains(&boundary.len()).then(|| String::from_utf8(boundary).ok()).flatten()
}

impl Multipart {
    /// A reader of the body whose boundary this is.
    pub fn new(boundary: &str) -> Self {
        let delimiter = Finder::new(&format!("\r\n--{boundary}")).into_owned();
        // The first delimiter may begin the body, without a line end before it.
        Self { delimiter, at: At::Preamble, rest: Bytes::from_static(b"\r\n"), preamble: 0, parts: 0 }
    }

    /// Takes the next bytes and adds what they complete to `pieces`.
    ///
    /// # Errors
    /// [`Malformed`]: nothing more of this body can be read.
    pub fn push(&mut self, bytes: Bytes, pieces: &mut Vec<Piece>) -> Result<(), Malformed> {
        if self.at == At::Epilogue {
            return Ok(());
        }
        if self.rest.is_empty() {
            self.rest = bytes;
        } else {
            let mut both = BytesMut::with_capacity(self.rest.len() + bytes.len());
            both.extend_from_slice(&self.rest);
            both.extend_from_slice(&bytes);
            self.rest = both.freeze();
        }
        while self.step(pieces)? {}
        Ok(())
    }

    /// Whether nothing more is to be read.
    pub fn is_done(&self) -> bool {
        self.at == At::Epilogue
    }

    /// Whether the body has come to its closing delimiter.
    ///
    /// # Errors
    /// `Malformed::Torn`.
    pub fn finish(&self) -> Result<(), Malformed> {
        if self.is_done() { Ok(()) } else { Err(Malformed::Torn) }
    }

    /// Reads on as far as the next change of place. Whether there was one.
    fn step(&mut self, pieces: &mut Vec<Piece>) -> Result<bool, Malformed> {
        match self.at {
            At::Preamble => {
                let found = self.delimiter.find(&self.rest);
                self.preamble += found.unwrap_or_else(|| self.safe());
                if self.preamble > PREAMBLE {
                    return Err(Malformed::NoPart);
                }
                self.after_delimiter(found);
                Ok(found.is_some())
            }
            At::Data => {
                let found = self.delimiter.find(&self.rest);
                let data = self.rest.slice(..found.unwrap_or_else(|| self.safe()));
                if !data.is_empty() {
                    pieces.push(Piece::Data(data));
                }
                if found.is_some() {
                    pieces.push(Piece::End);
                }
                self.after_delimiter(found);
                Ok(found.is_some())
            }
            At::Delimiter => self.line_end(),
            At::Head => self.head(pieces),
            At::Epilogue => {
                self.rest = Bytes::new();
                Ok(false)
            }
        }
    }

    /// Skips the delimiter that was found, or what can't be the beginning of one.
    fn after_delimiter(&mut self, found: Option<usize>) {
        match found {
            Some(start) => {
                let _ = self.rest.split_to(start + self.delimiter.needle().len());
                self.at = At::Delimiter;
            }
            None => {
                let safe = self.safe();
                let _ = self.rest.split_to(safe);
            }
        }
    }

    /// The bytes at the front that no delimiter can begin in.
    fn safe(&self) -> usize {
        let needle = self.delimiter.needle();
        let from = self.rest.len().saturating_sub(needle.len() - 1);
        let begins = |at: &usize| needle.starts_with(&self.rest[*at..]);
        (from..self.rest.len()).find(begins).unwrap_or(self.rest.len())
    }

    fn line_end(&mut self) -> Result<bool, Malformed> {
        if self.rest.starts_with(b"--") {
            self.at = At::Epilogue;
            return Ok(true);
        }
        let blanks = self.rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
        match &self.rest[blanks..] {
            _ if blanks > PADDING => Err(Malformed::Delimiter),
            [b'\r', b'\n', ..] => {
                let _ = self.rest.split_to(blanks + 2);
                self.at = At::Head;
                Ok(true)
            }
            [] | [b'\r'] => Ok(false),
            [b'-'] if blanks == 0 => Ok(false),
            _ => Err(Malformed::Delimiter),
        }
    }

    fn head(&mut self, pieces: &mut Vec<Piece>) -> Result<bool, Malformed> {
        let end = if self.rest.starts_with(b"\r\n") {
            Some((0, 2))
        } else {
            memchr::memmem::find(&self.rest, b"\r\n\r\n").map(|at| (at, at + 4))
        };
        let Some((length, end)) = end else {
            // The longest head may have come but for the last byte of its blank line.
            return if self.rest.len() > HEAD + 3 { Err(Malformed::LongHead) } else { Ok(false) };
        };
        if length > HEAD {
            return Err(Malformed::LongHead);
        }
        if self.parts == PARTS {
            return Err(Malformed::ManyParts);
        }
        self.parts += 1;
        let head = head(&self.rest[..length]).ok_or(Malformed::NoName)?;
        let _ = self.rest.split_to(end);
        pieces.push(Piece::Begin(head));
        self.at = At::Data;
        Ok(true)
    }
}

/// Reads a part's head. `None`: it has no name.
fn head(lines: &[u8]) -> Option<Head> {
    let disposition = lines.split(|byte| *byte == b'\n').find_map(|line| {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let (name, value) = line.split_at(colon);
        name.trim_ascii().eq_ignore_ascii_case(b"content-disposition").then(|| value[1..].trim_ascii())
    })?;
    let parameters = &disposition[disposition.iter().position(|byte| *byte == b';')?..];
    let name = parameter(parameters, "name")?;
    let filename = parameter(parameters, "filename").map(|name| filename(&name));
    Some(Head { name: String::from_utf8_lossy(&name).into_owned(), filename })
}

/// The value of a parameter, quoted or not, with the escapes that browsers and HTTP libraries write.
fn parameter(of: &[u8], wanted: &str) -> Option<Vec<u8>> {
    let mut rest = of;
    loop {
        let start = rest.iter().position(|byte| !matches!(byte, b';' | b' ' | b'\t' | b'\r' | b'\n'))?;
        rest = &rest[start..];
        let equals = rest.iter().position(|byte| matches!(byte, b'=' | b';'))?;
        let name = rest[..equals].trim_ascii();
        let is_wanted = name.eq_ignore_ascii_case(wanted.as_bytes());
        if rest[equals] == b';' {
            rest = &rest[equals..];
            continue;
        }
        rest = rest[equals + 1..].trim_ascii_start();
        let value;
        (value, rest) = if let Some(quoted) = rest.strip_prefix(b"\"") {
            quoted_value(quoted)
        } else {
            let end = rest.iter().position(|byte| *byte == b';').unwrap_or(rest.len());
            (rest[..end].trim_ascii().to_vec(), &rest[end..])
        };
        if is_wanted {
            return Some(value);
        }
    }
}

/// A quoted value from behind its first quote, and what follows it.
fn quoted_value(text: &[u8]) -> (Vec<u8>, &[u8]) {
    let (mut value, mut at) = (Vec::new(), 0);
    while let Some(byte) = text.get(at) {
        match (byte, text.get(at + 1)) {
            (b'"', _) => return (value, &text[at + 1..]),
            // Other backslashes are a Windows path's.
            (b'\\', Some(next @ (b'"' | b'\\'))) => {
                value.push(*next);
                at += 1;
            }
            _ => value.push(*byte),
        }
        at += 1;
    }
    (value, &[])
}

/// A file's name as it is stored: without folders and control characters, cut if it is long.
fn filename(given: &[u8]) -> String {
    let text = String::from_utf8_lossy(given).replace("%22", "\"").replace("%0D", " ").replace("%0A", " ");
    let base = text.rsplit(['/', '\\']).next().unwrap_or_default();
    let plain: String = base.chars().map(|letter| if letter.is_control() { '_' } else { letter }).collect();
    plain[..plain.floor_char_boundary(FILENAME)].to_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The fields of a body that comes in pieces of these sizes, in a cycle.
    fn read(body: &[u8], sizes: &[usize]) -> Result<Vec<(Head, Vec<u8>)>, Malformed> {
        let mut multipart = Multipart::new("bound");
        let (mut pieces, mut rest, mut sizes) = (Vec::new(), body, sizes.iter().cycle());
        while !rest.is_empty() {
            let (chunk, more) = rest.split_at((*sizes.next().unwrap()).clamp(1, rest.len()));
            multipart.push(Bytes::copy_from_slice(chunk), &mut pieces)?;
            assert!(multipart.rest.len() <= HEAD + 3 + chunk.len(), "nothing is kept");
            rest = more;
        }
        multipart.finish()?;
        let mut fields: Vec<(Head, Vec<u8>)> = Vec::new();
        let mut open = false;
        for piece in pieces {
            match piece {
                Piece::Begin(head) => {
                    assert!(!std::mem::replace(&mut open, true));
                    fields.push((head, Vec::new()));
                }
                Piece::Data(data) => {
                    assert!(open && !data.is_empty());
                    fields.last_mut().unwrap().1.extend_from_slice(&data);
                }
                Piece::End => assert!(std::mem::replace(&mut open, false)),
            }
        }
        assert!(!open);
        Ok(fields)
    }

    fn form(fields: &[(&str, Option<&str>, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (name, filename, data) in fields {
            body.extend(format!("--bound\r\nContent-Disposition: form-data; name=\"{name}\"").bytes());
            if let Some(filename) = filename {
                body.extend(format!("; filename=\"{filename}\"\r\nContent-Type: application/octet-stream").bytes());
            }
            body.extend(b"\r\n\r\n");
            body.extend(*data);
            body.extend(b"\r\n");
        }
        body.extend(b"--bound--\r\n");
        body
    }

    #[test]
    fn fields_come_out_as_they_went_in() {
        let body = form(&[("purpose", None, b"batch"), ("file", Some("a.jsonl"), b"{}\n\r\n--boun"), ("x", None, b"")]);
        for size in 1..body.len() {
            let fields = read(&body, &[size]).unwrap();
            let names: Vec<_> = fields.iter().map(|(head, _)| head.name.as_str()).collect();
            assert_eq!(names, ["purpose", "file", "x"], "{size}");
            assert_eq!(fields[1].0.filename.as_deref(), Some("a.jsonl"));
            assert_eq!(
                (&fields[0].1[..], &fields[1].1[..], fields[2].1.len()),
                (&b"batch"[..], &b"{}\n\r\n--boun"[..], 0)
            );
        }
    }

    #[test]
    fn a_torn_body_is_told_from_a_whole_one_at_every_cut() {
        let body = form(&[("purpose", None, b"batch"), ("file", Some("a"), b"{}\n")]);
        // What follows the closing dashes is not needed.
        for cut in 0..body.len() - 2 {
            assert_eq!(read(&body[..cut], &[7]).unwrap_err(), Malformed::Torn, "{cut}");
        }
        assert!(read(&body[..body.len() - 2], &[7]).is_ok());
    }

    #[test]
    fn what_could_fill_the_memory_is_refused() {
        let preamble = vec![b'x'; PREAMBLE + 100];
        assert_eq!(read(&preamble, &[4_096]).unwrap_err(), Malformed::NoPart);
        let long = [b"--bound\r\nA: ".to_vec(), vec![b'x'; HEAD + 100]].concat();
        assert_eq!(read(&long, &[4_096]).unwrap_err(), Malformed::LongHead);
        let many: Vec<(&str, Option<&str>, &[u8])> = vec![("a", None, b"b"); PARTS + 1];
        assert_eq!(read(&form(&many), &[4_096]).unwrap_err(), Malformed::ManyParts);
        assert_eq!(read(b"--bound\r\nA: b\r\n\r\n", &[9]).unwrap_err(), Malformed::NoName);
        assert_eq!(read(b"--boundary\r\n", &[9]).unwrap_err(), Malformed::Delimiter);
        assert!(
            read(b"hello\r\n--bound \t\r\nContent-Disposition: form-data; name=a\r\n\r\nb\r\n--bound--", &[3]).is_ok()
        );
    }

    #[test]
    fn limits_are_the_same_however_the_body_is_cut() {
        let padded = |blanks| [b"--bound", &vec![b' '; blanks][..], b"\r\nContent-Disposition: a; name=b"].concat();
        let head = |length| [&padded(0)[..], b"\r\nA: ", &vec![b'x'; length][..]].concat();
        let rest = b"\r\n\r\nc\r\n--bound--";
        let fixed = head(0).len() - b"--bound\r\n".len();
        let preamble = |length| [&vec![b'x'; length][..], b"\r\n", &padded(0)[..]].concat();
        for (longest, longer, error) in [
            (padded(PADDING), padded(PADDING + 1), Malformed::Delimiter),
            (head(HEAD - fixed), head(HEAD - fixed + 1), Malformed::LongHead),
            (preamble(PREAMBLE - 2), preamble(PREAMBLE - 1), Malformed::NoPart),
        ] {
            for sizes in [&[usize::MAX][..], &[1], &[4_099], &[1_000, 1]] {
                assert_eq!(read(&[&longest, &rest[..]].concat(), sizes).unwrap()[0].1, b"c", "{error} {sizes:?}");
                assert_eq!(read(&[&longer, &rest[..]].concat(), sizes).unwrap_err(), error, "{sizes:?}");
            }
        }
    }

    #[test]
    fn names_are_read_as_every_client_writes_them() {
        let of = |value: &str| head(format!("content-disposition: form-data; {value}").as_bytes());
        let file = |value: &str| of(value).unwrap().filename;
        assert_eq!(file(r#"name="file"; filename="in.jsonl""#).as_deref(), Some("in.jsonl"));
        assert_eq!(file("name=file; filename=x; filename*=utf-8''y").as_deref(), Some("x"));
        assert_eq!(file(r#"filename="a\"b.jsonl"; name="file""#).as_deref(), Some("a\"b.jsonl"));
        assert_eq!(file(r#"name="file"; filename="a%22b%0D%0A.jsonl""#).as_deref(), Some("a\"b  .jsonl"));
        assert_eq!(file(r#"name="file"; filename="C:\dir\in.jsonl""#).as_deref(), Some("in.jsonl"));
        assert_eq!(file(r#"name="file"; filename="../../etc/passwd""#).as_deref(), Some("passwd"));
        assert_eq!(file("name=\"file\"; filename=\"ü.jsonl\"").as_deref(), Some("ü.jsonl"));
        assert_eq!(file(&format!("name=f; filename=\"{}\"", "ü".repeat(300))).unwrap().len(), 254);
        assert_eq!(file(r#"name="file""#), None);
        assert_eq!(of(r#"name="expires_after[anchor]""#).unwrap().name, "expires_after[anchor]");
        assert_eq!(of(r#"filename="x""#), None);
        for bad in ["", ";", ";;=", "name", "name;", "=x", "\"", "name=\"x"] {
            let _ = of(bad);
        }
    }

    #[test]
    fn a_boundary_is_found_in_every_spelling() {
        let of = |text| boundary(text);
        assert_eq!(of("multipart/form-data; boundary=abc").as_deref(), Some("abc"));
        assert_eq!(of("Multipart/Form-Data;charset=utf-8; Boundary=\"a b\"").as_deref(), Some("a b"));
        for bad in
            ["multipart/form-data", "multipart/mixed; boundary=a", "application/json", "multipart/form-data; boundary="]
        {
            assert_eq!(of(bad), None, "{bad}");
        }
        assert_eq!(of(&format!("multipart/form-data; boundary={}", "x".repeat(71))), None);
    }

    proptest! {
        #[test]
        fn any_order_and_any_chunking_is_the_same_form(
            data in proptest::collection::vec(proptest::collection::vec(
                prop_oneof![Just(b'\r'), Just(b'\n'), Just(b'-'), Just(b'b'), any::<u8>()], 0..60), 1..6),
            sizes in proptest::collection::vec(1usize..40, 1..20),
        ) {
            let names: Vec<String> = (0..data.len()).map(|at| format!("f{at}")).collect();
            let fields: Vec<_> = names.iter().zip(&data).map(|(name, data)| (name.as_str(), None, &data[..])).collect();
            prop_assume!(data.iter().all(|data| memchr::memmem::find(data, b"--bound").is_none()));
            let read = read(&form(&fields), &sizes).unwrap();
            prop_assert_eq!(read.len(), data.len());
            for ((head, read), (name, data)) in read.iter().zip(names.iter().zip(&data)) {
                prop_assert_eq!(&head.name, name);
                prop_assert_eq!(read, data);
            }
        }

        #[test]
        fn nonsense_never_panics(body in proptest::collection::vec(any::<u8>(), 0..300), size in 1usize..50) {
            let _ = read(&body, &[size]);
            let _ = read(&[b"--bound\r\n", &body[..]].concat(), &[size]);
        }
    }
}
