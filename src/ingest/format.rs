//! Recognises files of other formats by their first bytes: people upload compressed files and files from Windows tools.

/// The number of bytes needed.
pub(super) const HEAD: usize = 6;

/// The format that a file's first bytes (all of a shorter file) belong to, with what to do. `None`: it may be JSONL.
pub(super) fn other_than_jsonl(head: &[u8]) -> Option<&'static str> {
    let begins = |magic: &[u8]| head.starts_with(magic);
    if begins(b"\xff\xfe\0\0") || begins(b"\0\0\xfe\xff") {
        return Some("it is UTF-32; convert it to UTF-8, such as by iconv -f UTF-32 -t UTF-8");
    }
    // Without a byte order mark: every other byte of an ASCII text is zero.
    let zero = |at: usize| head.get(at) == Some(&0);
    let unmarked = head.len() >= 4 && ((zero(1) && zero(3) && !zero(0)) || (zero(0) && zero(2) && !zero(1)));
    if begins(b"\xff\xfe") || begins(b"\xfe\xff") || unmarked {
        return Some(
            "it is UTF-16, as PowerShell's > writes it; convert it to UTF-8, such as by iconv -f UTF-16 -t UTF-8, or write it by \
             Out-File -Encoding utf8",
        );
    }
    if begins(b"\x1f\x8b") {
        return Some("it is compressed with gzip; decompress it first, such as by gunzip");
    }
    if begins(b"PK\x03\x04") || begins(b"PK\x05\x06") {
        return Some(
            "it is a zip archive, or an Office file such as .xlsx, which is one; upload the JSONL file in it, or write the rows \
             of the table as JSON, one object a line",
        );
    }
    if begins(b"\x28\xb5\x2f\xfd") {
        return Some("it is compressed with zstd; decompress it first, such as by unzstd");
    }
    if begins(b"BZh") {
        return Some("it is compressed with bzip2; decompress it first, such as by bunzip2");
    }
    if begins(b"\xfd7zXZ\0") {
        return Some("it is compressed with xz; decompress it first, such as by unxz");
    }
    if begins(b"7z\xbc\xaf\x27\x1c") {
        return Some("it is a 7-Zip archive; upload the JSONL file in it");
    }
    if begins(b"PAR1") {
        return Some("it is a Parquet file; write its rows as JSON, one object a line");
    }
    if begins(b"%PDF") {
        return Some("it is a PDF");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_jsonl_is_known_by_its_first_bytes() {
        for (head, word) in [
            (&b"\xff\xfe{\0\"\0"[..], "UTF-16"),
            (b"\xfe\xff\0{\0\"", "UTF-16"),
            (b"{\0\"\0c\0", "UTF-16"),
            (b"\0{\0\"\0c", "UTF-16"),
            (b"\xff\xfe", "UTF-16"),
            (b"\xff\xfe\0\0{\0", "UTF-32"),
            (b"\x1f\x8b\x08\0\0\0", "gzip"),
            (b"PK\x03\x04\x14\0", "zip"),
            (b"\x28\xb5\x2f\xfd\x04\0", "zstd"),
            (b"BZh91A", "bzip2"),
            (b"\xfd7zXZ\0", "xz"),
        ] {
            assert!(other_than_jsonl(head).is_some_and(|told| told.contains(word)), "{word}");
        }
        for head in [&b"{\"cust"[..], b"", b"\n", b"\xef\xbb\xbf{\"c", b"[{", b"custom", b"\0\0\0\0\0\0", b" \t\r\n{\""]
        {
            assert_eq!(other_than_jsonl(head), None, "{head:?}");
        }
    }
}
