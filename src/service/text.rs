//! Quotes clients' texts in messages.

/// A client's text, fit for a message.
#[must_use]
pub fn short(text: &str) -> String {
    if text.chars().count() <= 80 {
        text.to_owned()
    } else {
        format!("{}…", text.chars().take(79).collect::<String>())
    }
}
