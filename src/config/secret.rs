//! Settings that are or may contain a password: how they are read, and that nothing prints them.

use std::{ffi::OsStr, fmt};

use clap::{Arg, Command, builder::TypedValueParser, error::ErrorKind};
use url::Url;
use zeroize::Zeroizing;

use crate::{domain::webhook::Secret as WebhookSecret, words};

/// Schemes that an error message may name; any other text before the colon may be a part of a password.
const KNOWN_SCHEMES: [&str; 12] = [
    "cockroachdb",
    "file",
    "http",
    "https",
    "jdbc",
    "mariadb",
    "mongodb",
    "mssql",
    "mysql",
    "redis",
    "sqlite",
    "sqlserver",
];

/// A setting that is or may contain a password. Wiped from memory when dropped, and never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretSetting(Zeroizing<String>);

impl SecretSetting {
    /// Takes a text unchanged.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(Zeroizing::new(text.into()))
    }

    /// The text itself.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// Reads a secret from a flag, a variable or the file. clap's own parsers repeat a value that they refuse; this one
/// only says why it is refused. The line feed that `echo` and many secret stores append is removed.
#[derive(Clone)]
pub struct SecretParser<T: 'static>(pub fn(&str) -> Result<T, String>);

impl<T: Clone + Send + Sync + 'static> TypedValueParser for SecretParser<T> {
    type Value = T;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<T, clap::Error> {
        let read = match value.to_str() {
            Some(text) => (self.0)(without_line_end(text)),
            None => Err("it is not UTF-8 text".to_owned()),
        };
        read.map_err(|why| {
            let name = arg.map_or_else(|| "a secret".to_owned(), label);
            clap::Error::raw(ErrorKind::ValueValidation, format!("{name}: {why}\n")).with_cmd(command)
        })
    }
}

/// The name of a secret's setting in error messages.
fn label(arg: &Arg) -> String {
    match arg.get_env() {
        Some(variable) => format!("{arg} (or {})", variable.to_string_lossy()),
        None => arg.to_string(),
    }
}

/// A text without the one line end that it may have.
fn without_line_end(text: &str) -> &str {
    let text = text.strip_suffix('\n').unwrap_or(text);
    text.strip_suffix('\r').unwrap_or(text)
}

/// Reads a key or a token, which goes into an HTTP header.
///
/// # Errors
/// What is expected. Says nothing of the text.
pub fn parse_key(text: &str) -> Result<SecretSetting, String> {
    if text.is_empty() {
        return Err("it is empty: give it a value, or leave it out".to_owned());
    }
    let printable = text.bytes().all(|byte| byte.is_ascii_graphic());
    printable
        .then(|| SecretSetting::new(text))
        .ok_or_else(|| "expected printable ASCII without spaces or line ends".to_owned())
}

/// Reads a signing secret or a master key.
///
/// # Errors
/// What is expected. Says nothing of the text.
pub fn parse_webhook_secret(text: &str) -> Result<WebhookSecret, String> {
    WebhookSecret::try_new(text).map_err(|error| error.to_string())
}

/// Reads `--database-url`.
///
/// # Errors
/// What is wrong with it. Says nothing of user, password, host or database.
pub fn parse_database_url(text: &str) -> Result<SecretSetting, String> {
    const EXPECTED: &str = "expected postgres://user:password@host/database, or leave it out for SQLite in --data-dir";
    const ENCODE: &str = "its user name or password seems to contain a character that has another meaning in a URL: write \
                          % as %25, @ as %40, : as %3A, / as %2F, ? as %3F, # as %23, [ as %5B and ] as %5D";
    // The text stays out of every message: it may hold a password.
    let Some((scheme, rest)) = text.split_once(':') else {
        return Err(format!("it is not a URL: it does not begin with a scheme; {EXPECTED}"));
    };
    if !matches!(scheme, "postgres" | "postgresql") {
        let known = KNOWN_SCHEMES.iter().find(|known| scheme.eq_ignore_ascii_case(known));
        let what = known.map_or_else(
            || "it does not begin with postgres://".to_owned(),
            |known| format!("{known}: is not supported"),
        );
        return Err(format!("{what}; {EXPECTED}"));
    }
    let Some(rest) = rest.strip_prefix("//") else {
        return Err(format!("it does not begin with {scheme}://; {EXPECTED}"));
    };
    if holds_a_raw_password(rest) {
        return Err(ENCODE.to_owned());
    }
    let named = with_a_host(scheme, rest);
    let text = named.as_ref().map_or(text, |named| named.as_str());
    match Url::parse(text) {
        Err(error) if rest.contains('@') => Err(format!("{}; or {ENCODE}", words::url(error))),
        Err(error) => Err(format!("{}; {EXPECTED}", words::url(error))),
        Ok(_) => match text.parse::<sqlx::postgres::PgConnectOptions>() {
            Ok(_) => Ok(SecretSetting::new(text)),
            Err(error) => Err(refused(&error.to_string(), rest.contains('%'))),
        },
    }
}

/// The URL of a socket with a user, as libpq takes it: `postgres://user@/database?host=/a/directory`. A URL's reader wants a
/// host behind the `@`; the option replaces it.
fn with_a_host(scheme: &str, rest: &str) -> Option<Zeroizing<String>> {
    let authority = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, behind) = rest.split_at(authority);
    let (_, query) = behind.split_once('?')?;
    let host = query.split('&').any(|option| option.starts_with("host=") || option.starts_with("hostaddr="));
    let (user, port) = authority.rsplit_once('@')?;
    (host && (port.is_empty() || port.starts_with(':')))
        .then(|| Zeroizing::new(format!("{scheme}://{user}@localhost{port}{behind}")))
}

/// Whether an `@` stands behind what a URL's reader takes for the end of user and password: they hold a raw `/`, `?` or `#`.
/// An option's value, such as `?application_name=a@b`, may have one.
fn holds_a_raw_password(rest: &str) -> bool {
    let authority = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, behind) = rest.split_at(authority);
    let (behind, fragment) = behind.split_once('#').unwrap_or((behind, ""));
    let (path, query) = behind.split_once('?').unwrap_or((behind, ""));
    let in_name = |option: &str| option.split_once('=').map_or(option, |(name, _)| name).contains('@');
    path.contains('@')
        || fragment.contains('@')
        || query.split('&').any(in_name)
        || (!authority.contains('@') && query.contains('@') && !query.contains('='))
}

/// Explains the driver's error by its topic; the error's own text may repeat a part of the URL.
fn refused(text: &str, encoded: bool) -> String {
    let about = text.to_lowercase();
    if about.contains("ssl_mode") || about.contains("sslmode") {
        return "its sslmode is not one of disable, allow, prefer, require, verify-ca or verify-full".to_owned();
    }
    if encoded && about.contains("utf") {
        return "its percent-encoded part is not UTF-8".to_owned();
    }
    "the PostgreSQL driver does not know one of its options (after the ?)".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_end_is_forgiven() {
        for (text, read) in
            [("k\n", "k"), ("k\r\n", "k"), ("k\r", "k"), ("k", "k"), ("k\n\n", "k\n"), ("\nk", "\nk"), ("", "")]
        {
            assert_eq!(without_line_end(text), read, "{text:?}");
        }
    }

    #[test]
    fn a_socket_with_a_user_is_a_database_url() {
        for url in [
            "postgres://us3r@/d4ta?host=/run/postgresql&port=5433",
            "postgresql://us3r:p4ss@/d4ta?port=5433&host=%2Frun%2Fpostgresql",
            "postgres://us3r@:5433/d4ta?host=/run/postgresql",
        ] {
            let read = parse_database_url(url).unwrap();
            let options: sqlx::postgres::PgConnectOptions = read.expose().parse().unwrap();
            assert_eq!(options.get_socket().unwrap().to_str(), Some("/run/postgresql"), "{url}");
            let parts = (options.get_username(), options.get_database(), options.get_port());
            assert_eq!(parts, ("us3r", Some("d4ta"), 5433), "{url}");
        }
        let refusal = parse_database_url("postgres://us3r@/d4ta").unwrap_err();
        assert!(refusal.contains("it names no host") && !refusal.contains("us3r"), "{refusal}");
    }

    #[test]
    fn database_urls_are_refused_in_words_that_hold_nothing_of_them() {
        let encode = "a character that has another meaning in a URL";
        for (url, why) in [
            ("postgres://us3r:pa#ss@h0st/d4ta", encode),
            ("postgres://us3r:pa/ss@h0st/d4ta", encode),
            ("postgres://us3r:pa?ss@h0st/d4ta", encode),
            ("postgres://us3r:x@y#pa@h0st/d4ta", encode),
            ("postgres://us3r:1234/pa@h0st/d4ta", encode),
            ("postgres://us3r:1234?pa@h0st/d4ta", encode),
            ("postgres://us3r:p4ss@h0st:port/d4ta", "its port is not a number"),
            ("postgres://us3r:p4ss@h0st/d4ta?sslmode=n0nsense", "its sslmode is not one of"),
            ("postgres:us3r@h0st", "it does not begin with postgres://"),
            ("us3r:p4ss@h0st/d4ta", "it does not begin with postgres://"),
            ("mysql://us3r:p4ss@h0st/d4ta", "mysql: is not supported; expected postgres://"),
            ("jdbc:postgresql://h0st/d4ta", "jdbc: is not supported"),
            ("h0st/d4ta", "it does not begin with a scheme"),
            ("\"postgres://us3r:p4ss@h0st/d4ta\"", "it does not begin with postgres://"),
        ] {
            let refusal = parse_database_url(url).unwrap_err();
            assert!(refusal.contains(why), "{url}: {refusal}");
            for part in ["us3r", "pa#", "p4ss", "h0st", "d4ta", "n0nsense", "1234"] {
                assert!(!refusal.contains(part), "{url}: {refusal}");
            }
        }
        for url in [
            "postgres://u:p@h/d",
            "postgresql://u:p%23s%2Fs%40@h:5432/d?sslmode=require",
            "postgres://u:p@h/d?application_name=me@here",
            "postgres://h/d?application_name=me@here",
            "postgres:///d?host=/run/postgresql&user=me",
            "postgres://u:p@x@h/d",
            "postgres://u:p[x@h/d",
        ] {
            assert_eq!(parse_database_url(url).map(|read| read.expose().to_owned()), Ok(url.to_owned()), "{url}");
        }
    }
}
