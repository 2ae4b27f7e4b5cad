//! Rules for text from outside that is stored, the same for every way in.

use url::{ParseError, Url};

/// Whether both databases can hold it: PostgreSQL has no NUL in texts.
#[must_use]
pub fn is_storable(text: &str) -> bool {
    !text.contains('\0')
}

/// Whether it is a name on one line, safe for logs and terminals: it has no control character, and so is storable.
#[must_use]
pub fn is_plain(text: &str) -> bool {
    !text.contains(char::is_control)
}

/// Why a text is not the URL of a server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUrl {
    #[error("a URL is needed, such as https://example.com/path")]
    Empty,
    /// It has a character that a browser would drop or change, and so call another URL than the one written.
    #[error("a URL can't have the character {}: write it percent-encoded, or leave it out", .0.escape_debug())]
    Character(char),
    /// It has another scheme than http and https, or none, or not two slashes after it.
    #[error("a URL begins with http:// or https://, and the host comes next")]
    Scheme,
    /// It has a user name or a password.
    #[error("a URL can't have a user name or password")]
    Credentials,
    /// Its port is not valid.
    #[error("the port of a URL is a number from 1 to 65535")]
    Port,
    /// Its host is not valid.
    #[error("the host of this URL is neither a name nor an address")]
    Host,
}

/// Parses the URL of an HTTP server into the one form in which such a URL is stored and shown. A URL that a browser
/// would silently repair is refused, because another reader would not repair it, and the two would call different
/// servers.
///
/// # Errors
/// [`BadUrl`].
pub fn http_url(text: &str) -> Result<Url, BadUrl> {
    if text.is_empty() {
        return Err(BadUrl::Empty);
    }
    if let Some(bad) = text.chars().find(|char| char.is_control() || char.is_whitespace() || *char == '\\') {
        return Err(BadUrl::Character(bad));
    }
    let rest = ["http://", "https://"]
        .into_iter()
        .find_map(|scheme| text.get(..scheme.len()).filter(|start| start.eq_ignore_ascii_case(scheme)))
        .map(|scheme| &text[scheme.len()..]);
    match rest {
        None => return Err(BadUrl::Scheme),
        Some(rest) if rest.starts_with(['/', '?', '#']) || rest.is_empty() => return Err(BadUrl::Host),
        Some(_) => {}
    }
    let url = Url::parse(text).map_err(|error| match error {
        ParseError::InvalidPort => BadUrl::Port,
        _ => BadUrl::Host,
    })?;
    if !url.username().is_empty() || url.password().is_some() || has_user_info(text) {
        return Err(BadUrl::Credentials);
    }
    if url.port() == Some(0) {
        return Err(BadUrl::Port);
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err(BadUrl::Host);
    }
    Ok(url)
}

/// An empty user name is dropped by the parser: `http://@host/`.
fn has_user_info(text: &str) -> bool {
    let authority = text.split_once("://").map_or(text, |(_, rest)| rest);
    authority.split(['/', '?', '#']).next().unwrap_or_default().contains('@')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_url_has_one_form() {
        for (text, form) in [
            ("http://example.com", "http://example.com/"),
            ("HTTPS://Example.COM:443/a/../b?c=d#e", "https://example.com/b?c=d#e"),
            ("http://bücher.example/ü", "http://xn--bcher-kva.example/%C3%BC"),
            ("http://127.1/", "http://127.0.0.1/"),
            ("http://[::0001]:8080/", "http://[::1]:8080/"),
            ("http://example.com?a", "http://example.com/?a"),
        ] {
            match http_url(text) {
                Ok(url) => assert_eq!(url.as_str(), form),
                // A URL without a slash before its query is read by all in the same way.
                Err(error) => panic!("{text}: {error}"),
            }
        }
    }

    #[test]
    fn what_a_browser_would_repair_is_refused() {
        for (text, why) in [
            ("", BadUrl::Empty),
            ("http:example.com", BadUrl::Scheme),
            ("http:/example.com", BadUrl::Scheme),
            ("http:\\\\example.com", BadUrl::Character('\\')),
            ("http:///example.com/", BadUrl::Host),
            ("http://", BadUrl::Host),
            ("http://?", BadUrl::Host),
            ("http://example.com\\@evil.example/", BadUrl::Character('\\')),
            ("http://exa\tmple.com/", BadUrl::Character('\t')),
            ("http://example.com/a\nb", BadUrl::Character('\n')),
            ("http://example.com/\r", BadUrl::Character('\r')),
            (" http://example.com/", BadUrl::Character(' ')),
            ("http://example.com/\u{a0}", BadUrl::Character('\u{a0}')),
            ("http://example.com/\0", BadUrl::Character('\0')),
            ("\u{1}http://example.com/", BadUrl::Character('\u{1}')),
            ("http://example.com/\u{7f}", BadUrl::Character('\u{7f}')),
            ("ftp://example.com/", BadUrl::Scheme),
            ("javascript:alert(1)", BadUrl::Scheme),
            ("example.com/hook", BadUrl::Scheme),
            ("http://user@example.com/", BadUrl::Credentials),
            ("http://u:p@example.com/", BadUrl::Credentials),
            ("http://@example.com/", BadUrl::Credentials),
            ("http://example.com:0/", BadUrl::Port),
            ("http://example.com:70000/", BadUrl::Port),
            ("http://example.com:x/", BadUrl::Port),
            ("http://exa%mple.com/", BadUrl::Host),
            ("http://[::1/", BadUrl::Host),
            ("http://1.2.3.4.5.6.0x/", BadUrl::Host),
        ] {
            assert_eq!(http_url(text), Err(why), "{text:?}");
        }
    }

    proptest! {
        /// The kept form is read back as itself, and holds nothing that a database or a header can't.
        #[test]
        fn the_form_is_stable(text in "(http|https|HTTP)(://|:|:/)[a-z.@:\\\\0-9]{0,12}\\PC{0,12}[\\x00-\\x20]{0,1}") {
            if let Ok(url) = http_url(&text) {
                prop_assert!(url.as_str().is_ascii() && is_plain(url.as_str()));
                let again = http_url(url.as_str());
                prop_assert_eq!(again.as_ref().map(Url::as_str), Ok(url.as_str()));
            }
        }
    }
}
