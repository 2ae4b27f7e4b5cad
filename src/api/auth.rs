//! Who calls, and what they may do: bearer tokens from a file, or client certificates, or nobody asks.
//!
//! A line of the tokens file is `name role sha256:<hex>`; the file holds no secret. `submit` sees and changes its own files and
//! batches, `admin` everything. Without tokens every caller is an admin: the server is then reachable from this machine
//! only, by client certificate, or was told to trust everybody.

use std::{fmt::Write, sync::Arc};

use http::{HeaderMap, header::AUTHORIZATION};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Its own files and batches.
    Submit,
    /// Everything.
    Admin,
}

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The token's name; empty without tokens. Files and batches belong to it.
    pub owner: Arc<str>,
    /// What it may do.
    pub role: Role,
}

impl Caller {
    /// Everybody, where no tokens are configured.
    #[must_use]
    pub fn anyone() -> Self {
        Self { owner: "".into(), role: Role::Admin }
    }

    /// Whose files and batches it sees; none: everybody's.
    #[must_use]
    pub fn sees(&self) -> Option<&str> {
        match self.role {
            Role::Admin => None,
            Role::Submit => Some(&self.owner),
        }
    }

    /// Whether it may see what belongs to `owner`.
    #[must_use]
    pub fn may_see(&self, owner: &str) -> bool {
        self.sees().is_none_or(|mine| mine == owner)
    }

    /// Whether it is an admin.
    #[must_use]
    pub fn is_admin(&self) -> bool {
        self.role == Role::Admin
    }
}

/// A tokens file that is not in order.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}; expected \"name role sha256:<64 hex digits>\" as tidemill token new prints it")]
pub struct TokensError {
    /// From 1.
    pub line: usize,
    /// What is wrong.
    pub problem: String,
}

/// Why a call is turned away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No token came.
    #[error("this server asks for an access token: send \"authorization: Bearer <token>\"")]
    Missing,
    /// The token is none of the server's.
    #[error("the access token is not known to this server")]
    Unknown,
}

/// The tokens of a server. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Tokens {
    known: Arc<[Token]>,
}

#[derive(Debug)]
struct Token {
    caller: Caller,
    hash: [u8; 32],
}

impl Tokens {
    /// Reads a tokens file.
    ///
    /// # Errors
    /// [`TokensError`] with the line.
    pub fn parse(text: &str) -> Result<Self, TokensError> {
        let mut known: Vec<Token> = Vec::new();
        for (line, text) in (1..).zip(text.lines()) {
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let token = Token::parse(text).map_err(|problem| TokensError { line, problem })?;
            if known.iter().any(|other| other.hash == token.hash) {
                return Err(TokensError { line, problem: "the same token twice".into() });
            }
            known.push(token);
        }
        if known.is_empty() {
            return Err(TokensError { line: 1, problem: "there is no token in the file".into() });
        }
        Ok(Self { known: known.into() })
    }

    /// Who a call's headers say that it is.
    ///
    /// # Errors
    /// [`Denied`].
    pub fn caller(&self, headers: &HeaderMap) -> Result<Caller, Denied> {
        let value = headers.get(AUTHORIZATION).ok_or(Denied::Missing)?;
        let (scheme, token) = value.to_str().ok().and_then(|value| value.split_once(' ')).ok_or(Denied::Missing)?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(Denied::Missing);
        }
        let hash: [u8; 32] = Sha256::digest(token.trim()).into();
        // All are compared, each in constant time: how long it takes says nothing about any of them.
        let mut found = None;
        for known in self.known.iter() {
            if bool::from(known.hash.ct_eq(&hash)) {
                found = Some(known.caller.clone());
            }
        }
        found.ok_or(Denied::Unknown)
    }
}

impl Token {
    fn parse(text: &str) -> Result<Self, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let [name, role, hash] = words.as_slice() else { return Err(format!("{} words instead of 3", words.len())) };
        let role = match *role {
            "submit" => Role::Submit,
            "admin" => Role::Admin,
            other => return Err(format!("the role {other:?} is neither submit nor admin")),
        };
        let hex = hash.strip_prefix("sha256:").ok_or("the hash does not begin with sha256:")?;
        let mut hash = [0; 32];
        hex::decode_to_slice(hex, &mut hash).map_err(|_| "the hash is not 64 hex digits")?;
        Ok(Self { caller: Caller { owner: (*name).into(), role }, hash })
    }
}

/// A token's hash as the tokens file holds it.
#[must_use]
pub fn hash_token(token: &str) -> String {
    Sha256::digest(token).iter().fold("sha256:".to_owned(), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        headers
    }

    #[test]
    fn a_known_token_is_a_caller_and_nothing_else_is() {
        let file = format!("# ours\n\nalice submit {}\nops admin {}\n", hash_token("a"), hash_token("b"));
        let tokens = Tokens::parse(&file).unwrap();
        let alice = tokens.caller(&headers("Bearer a")).unwrap();
        assert_eq!(alice, Caller { owner: "alice".into(), role: Role::Submit });
        assert!(alice.may_see("alice") && !alice.may_see("ops") && !alice.is_admin());
        let ops = tokens.caller(&headers("bearer b")).unwrap();
        assert!(ops.may_see("alice") && ops.is_admin());
        assert_eq!(tokens.caller(&headers("Bearer c")), Err(Denied::Unknown));
        assert_eq!(tokens.caller(&headers("Bearer ")), Err(Denied::Unknown));
        assert_eq!(tokens.caller(&headers("Basic a")), Err(Denied::Missing));
        assert_eq!(tokens.caller(&headers("a")), Err(Denied::Missing));
        assert_eq!(tokens.caller(&HeaderMap::new()), Err(Denied::Missing));
    }

    #[test]
    fn a_bad_file_names_its_line() {
        let good = format!("a admin {}", hash_token("x"));
        for (bad, line) in [
            ("", 1),
            ("# only a comment", 1),
            ("a admin", 1),
            ("a root sha256:00", 1),
            ("a admin sha256:00", 1),
            ("a admin md5:00", 1),
            (&format!("{good}\nb submit plain"), 2),
            (&format!("{good}\n\n{good}"), 3),
        ] {
            assert_eq!(Tokens::parse(bad).map(|_| ()).unwrap_err().line, line, "{bad}");
        }
    }
}
