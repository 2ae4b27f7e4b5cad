//! Makes text from others safe for a terminal. A name, a message or a model's answer may contain terminal commands:
//! clear the screen, set the title, overwrite the line before.

use std::{
    borrow::Cow,
    fmt::Write as _,
    io::{self, Write},
};

use unicode_width::UnicodeWidthChar as _;

/// Replaces control characters with JSON escapes (`\u001b`), so that JSON stays the same JSON. Line ends and tabs stay.
#[must_use]
pub fn escaped(text: &str) -> Cow<'_, str> {
    let commands = |char: char| is_command(char) && char != '\n' && char != '\t';
    if !text.chars().any(commands) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for char in text.chars() {
        if commands(char) {
            let _ = write!(safe, "\\u{:04x}", u32::from(char));
        } else {
            safe.push(char);
        }
    }
    Cow::Owned(safe)
}

/// The text on one line, with a space for each control character.
#[must_use]
pub fn one_line(text: String) -> String {
    if text.chars().any(is_command) {
        text.chars().map(|char| if is_command(char) { ' ' } else { char }).collect()
    } else {
        text
    }
}

/// The number of terminal columns of a text: an ideograph takes two, a combining accent none.
#[must_use]
pub fn width(text: &str) -> usize {
    text.chars().map(|char| char.width().unwrap_or(0)).sum()
}

/// Whether this is a control character, a line separator, or changes the direction of the text.
fn is_command(char: char) -> bool {
    char.is_control() || matches!(char, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Writes bytes to a terminal and escapes control characters, however the bytes are divided into writes. Other than
/// [`escaped`] it lets characters pass that only change the direction of text.
pub struct Escaping<W> {
    to: W,
    /// The last byte may begin a control character of two bytes.
    begun: bool,
}

/// Begins the UTF-8 form of U+0080 to U+00BF; up to U+009F they are control characters.
const LEAD: u8 = 0xc2;

impl<W: Write> Escaping<W> {
    /// A writer to `to`.
    pub fn new(to: W) -> Self {
        Self { to, begun: false }
    }
}

impl<W: Write> Write for Escaping<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut safe = Vec::with_capacity(bytes.len() + 16);
        for &byte in bytes {
            let begun = std::mem::take(&mut self.begun);
            if begun && !(0x80..=0x9f).contains(&byte) {
                safe.push(LEAD);
            }
            match byte {
                LEAD => self.begun = true,
                b'\n' | b'\t' => safe.push(byte),
                0x00..=0x1f | 0x7f => write!(safe, "\\u{byte:04x}")?,
                0x80..=0x9f if begun => write!(safe, "\\u{byte:04x}")?,
                _ => safe.push(byte),
            }
        }
        self.to.write_all(&safe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any text: of commands for terminals, of wide characters, of what is no character at all, and very long.
    pub fn text() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            4 => any::<String>(),
            1 => Just("\u{1b}[2J\u{1b}]0;title\u{7}\r\u{9b}31m\0\u{8}".to_owned()),
            1 => Just("\u{202e}海の潮\u{2028}👩‍👩‍👧 e\u{301}\t\n".to_owned()),
            1 => "[\\x00-\\x9f]{0,40}",
        ];
        prop_oneof![
            20 => prop::collection::vec(piece, 0..4).prop_map(|pieces| pieces.concat()),
            1 => any::<char>().prop_map(|char| std::iter::repeat_n(char, 100_000).collect()),
        ]
    }

    fn has_commands(text: &str) -> bool {
        text.chars().any(|char| is_command(char) && char != '\n' && char != '\t')
    }

    proptest! {
        #[test]
        fn no_text_commands_a_terminal(text in text()) {
            let safe = escaped(&text);
            prop_assert!(!has_commands(&safe));
            prop_assert!(has_commands(&text) || safe == text);
            let line = one_line(text.clone());
            prop_assert!(!line.chars().any(is_command));
            prop_assert_eq!(line.chars().count(), text.chars().count());
            prop_assert!(width(&text) <= 2 * text.chars().count());
        }

        #[test]
        fn json_stays_the_same_json(text in text()) {
            let json = serde_json::json!({ &text: text });
            let shown = json.to_string();
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&escaped(&shown)).unwrap(), json);
        }

        #[test]
        fn bytes_are_escaped_in_whatever_pieces_they_come(text in text(), size in 1..7_usize) {
            let mut to = Escaping::new(Vec::new());
            for piece in text.as_bytes().chunks(size) {
                to.write_all(piece).unwrap();
            }
            let shown = String::from_utf8(to.to).unwrap();
            prop_assert!(!shown.chars().any(|char| char.is_control() && char != '\n' && char != '\t'));
            prop_assert!(text.chars().any(char::is_control) || shown == text);
        }

        #[test]
        fn bytes_that_are_no_text_pass(bytes in prop::collection::vec(0xa0..=0xff_u8, 0..100)) {
            let mut to = Escaping::new(Vec::new());
            to.write_all(&bytes).unwrap();
            to.write_all(b"\n").unwrap();
            prop_assert_eq!(&to.to[..bytes.len()], &bytes);
        }
    }

    #[test]
    fn wide_characters_take_two_columns() {
        assert_eq!((width("tide"), width("潮"), width("e\u{301}")), (4, 2, 1));
        assert_eq!(escaped("a\u{1b}[2Jb\u{9b}\n"), "a\\u001b[2Jb\\u009b\n");
    }
}
