//! Finds the end of a JSON value, fast. It returns the end only of values that are certainly valid. Anything else is left
//! to `serde_json`, which also describes what is wrong.
//!
//! Nearly all bytes of a file are in long strings. `serde_json` searches a string eight bytes at a time for three kinds of
//! bytes. Here the whole line is searched for control characters first, so that a string's end can be searched for 32
//! bytes at a time.

/// Nesting above this is left to `serde_json`.
const DEPTH: u32 = 64;
/// The first bytes of a string that are searched eight at a time.
const SHORT: usize = 16;

/// Whether this module may be asked about a text: there is no control character in it, but for a line end's at its end.
pub(super) fn may(text: &str) -> bool {
    let text = text.as_bytes();
    let text = text.strip_suffix(b"\r").unwrap_or(text);
    // Without a way out in the middle, for the compiler to take many bytes at a time.
    !text.iter().fold(false, |found, byte| found | (*byte < 0x20))
}

/// The end of the value that begins at `at`, if that is surely a valid one.
pub(super) fn value(text: &[u8], mut at: usize) -> Option<usize> {
    let mut depth = 0;
    // A bit for each container that is open, the innermost the lowest: it is an object.
    let mut objects = 0_u64;
    loop {
        at = blank(text, at);
        match *text.get(at)? {
            b'"' => at = string(text, at)?,
            open @ (b'{' | b'[') => {
                at = blank(text, at + 1);
                // In ASCII both closing brackets come two after the opening ones.
                if *text.get(at)? == open + 2 {
                    at += 1;
                } else if depth == DEPTH {
                    return None;
                } else {
                    depth += 1;
                    objects <<= 1;
                    if open == b'{' {
                        objects |= 1;
                        at = key(text, at)?;
                    }
                    continue;
                }
            }
            b't' => at = word(text, at, b"true")?,
            b'f' => at = word(text, at, b"false")?,
            b'n' => at = word(text, at, b"null")?,
            _ => at = number(text, at)?,
        }
        loop {
            if depth == 0 {
                return Some(at);
            }
            at = blank(text, at);
            match (*text.get(at)?, objects & 1) {
                (b',', 0) => at += 1,
                (b',', _) => at = key(text, blank(text, at + 1))?,
                (b']', 0) | (b'}', 1) => {
                    at += 1;
                    depth -= 1;
                    objects >>= 1;
                    continue;
                }
                _ => return None,
            }
            break;
        }
    }
}

/// The length of the string after a quote, if it has no escapes.
pub(super) fn plain(after_quote: &[u8]) -> Option<usize> {
    quote_or_backslash(after_quote).filter(|length| after_quote[*length] == b'"')
}

/// The first quote or backslash. Keys and names are short, and for those a call of `memchr` is the larger part.
#[inline]
fn quote_or_backslash(text: &[u8]) -> Option<usize> {
    let (words, _) = text.as_chunks::<8>();
    for (word, at) in words.iter().take(SHORT / 8).zip((0..).step_by(8)) {
        let word = u64::from_le_bytes(*word);
        let found = zero_byte(word ^ repeated(b'"')) | zero_byte(word ^ repeated(b'\\'));
        if found != 0 {
            return Some(at + (found.trailing_zeros() / 8) as usize);
        }
    }
    let from = text.len().min(SHORT) / 8 * 8;
    Some(from + memchr::memchr2(b'"', b'\\', &text[from..])?)
}

/// A bit in the lowest byte that is zero; in higher ones there may be more.
const fn zero_byte(word: u64) -> u64 {
    word.wrapping_sub(repeated(1)) & !word & repeated(0x80)
}

const fn repeated(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

fn blank(text: &[u8], mut at: usize) -> usize {
    while text.get(at) == Some(&b' ') {
        at += 1;
    }
    at
}

/// From a key's quote to after its colon.
fn key(text: &[u8], at: usize) -> Option<usize> {
    if *text.get(at)? != b'"' {
        return None;
    }
    let at = blank(text, string(text, at)?);
    (*text.get(at)? == b':').then_some(at + 1)
}

fn string(text: &[u8], at: usize) -> Option<usize> {
    let mut at = at + 1;
    loop {
        at += quote_or_backslash(text.get(at..)?)?;
        if text[at] == b'"' {
            return Some(at + 1);
        }
        match text.get(at + 1)? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => at += 2,
            b'u' if text.get(at + 2..at + 6)?.iter().all(u8::is_ascii_hexdigit) => at += 6,
            _ => return None,
        }
    }
}

fn word(text: &[u8], at: usize, word: &[u8]) -> Option<usize> {
    let end = at + word.len();
    (text.get(at..end)? == word).then_some(end).filter(|end| is_end(text, *end))
}

fn number(text: &[u8], at: usize) -> Option<usize> {
    let digits = |at: usize| at + text[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let first = if text.get(at) == Some(&b'-') { at + 1 } else { at };
    let mut end = match text.get(first)? {
        b'0' => first + 1,
        b'1'..=b'9' => digits(first),
        _ => return None,
    };
    if text.get(end) == Some(&b'.') {
        let fraction = end + 1;
        end = digits(fraction);
        if end == fraction {
            return None;
        }
    }
    if matches!(text.get(end), Some(b'e' | b'E')) {
        let signed = matches!(text.get(end + 1), Some(b'+' | b'-'));
        let exponent = end + 1 + usize::from(signed);
        end = digits(exponent);
        if end == exponent {
            return None;
        }
    }
    is_end(text, end).then_some(end)
}

/// A number or a word may not run into what comes after it.
fn is_end(text: &[u8], at: usize) -> bool {
    text.get(at).is_none_or(|byte| matches!(byte, b' ' | b',' | b'}' | b']'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::de::IgnoredAny;

    use super::*;

    /// What `serde_json` says.
    fn theirs(text: &str) -> Option<usize> {
        let mut values = serde_json::Deserializer::from_str(text).into_iter::<IgnoredAny>();
        values.next()?.ok()?;
        Some(values.byte_offset())
    }

    #[test]
    fn plain_values_are_skipped_here_and_all_others_are_left() {
        let long =
            format!(r#"{{"a": [ {{"b":"{}\n\"\u00e9\\"}} , [], {{}}, -0.5e+7, null,true ,false]}}"#, "x".repeat(99));
        for text in [&long, "\"\"", "0", "-1", "1.25", "1e5", "[]", "[[1]]", "{ }", "null", r#"{"a":1,"b":{"c":[2]}}"#]
        {
            assert_eq!((value(text.as_bytes(), 0), theirs(text)), (Some(text.len()), Some(text.len())), "{text}");
            let inside = format!("  {text} , more");
            assert_eq!(value(inside.as_bytes(), 1), Some(2 + text.len()), "{inside}");
        }
        for text in [
            "",
            " ",
            "01",
            "-",
            "1.",
            ".5",
            "1e",
            "1e+",
            "+1",
            "1x",
            "truex",
            "tru",
            "nul",
            "\"",
            "\"\\",
            "\"\\x\"",
            "[1,]",
            "\"\\u12g4\"",
            "\"\\u123",
            "[",
            "[1",
            "[1 2]",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{a:1}",
            "{\"a\":1]",
            "[}",
            "{]",
        ] {
            assert_eq!(value(text.as_bytes(), 0), None, "{text}");
        }
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert_eq!(value(nested(65).as_bytes(), 0), Some(130));
        assert_eq!(value(nested(66).as_bytes(), 0), None);
        assert!(may("é \u{7f}\r") && !may("a\tb") && !may("a\r\r") && !may("\u{1f}"));
    }

    #[test]
    fn the_first_quote_or_backslash_is_found() {
        for length in 0..40 {
            for at in 0..=length {
                for (first, second) in [(b'"', b'\\'), (b'\\', b'"')] {
                    let mut text = vec![b'!'; length];
                    text.extend_from_slice(&[second; 3]);
                    text[at] = first;
                    assert_eq!(quote_or_backslash(&text), Some(at), "{length} {at}");
                }
            }
            // Next to them in value, and those with the highest bit.
            assert_eq!(quote_or_backslash(&[b"!#[]\xa2\xdc".as_slice(); 7].concat()[..length]), None);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4_000))]
        #[test]
        fn what_is_skipped_here_is_what_serde_json_skips(
            text in proptest::collection::vec(
                prop_oneof![
                    3 => proptest::sample::select(vec![
                        "{", "}", "[", "]", ",", ":", "\"a\"", "1", "-2.5e3", "true", "null", " ", "\"", "\\", "\\u00e9", "e", ".",
                    ]).prop_map(str::to_owned),
                    1 => "[ -~é]{0,40}",
                ],
                0..12,
            ),
        ) {
            let text = text.concat();
            if let Some(end) = value(text.as_bytes(), 0) {
                prop_assert_eq!(Some(end), theirs(&text), "{}", text);
            }
        }
    }
}
