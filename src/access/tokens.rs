//! Access tokens: they come from a file, one a line: `name role sha256:<hex of the token>`, and if wanted `weight=<1 to
//! 1000>`. Only hashes are kept: a token has enough randomness of its own (see `tidemill token`) that a fast hash
//! protects it.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::{Caller, Denied, Role};
use crate::domain::{Weight, Weights};

/// A line of the token file that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "line {line} of the token file: {problem}; expected \"name role sha256:<64 hex digits>\" with role submit or admin, \
     and after it, if wanted, \"weight=<1 to 1000>\""
)]
pub struct TokensError {
    /// The line's number, from 1.
    pub line: usize,
    /// What is wrong.
    pub problem: String,
}

/// The access tokens.
#[derive(Clone, Debug)]
pub struct Tokens {
    known: Vec<([u8; 32], Caller)>,
    weights: Weights,
}

impl Tokens {
    /// Reads a token file. `#` begins a comment line. A name may have several tokens, for a change of token without a
    /// gap, if their role and weight are the same. Without a weight it is 1.
    ///
    /// # Errors
    /// [`TokensError`]: the first bad line.
    pub fn parse(text: &str) -> Result<Self, TokensError> {
        let mut known: Vec<([u8; 32], Caller)> = Vec::new();
        let mut names: BTreeMap<&str, (Role, Weight)> = BTreeMap::new();
        for (line, text) in (1..).zip(text.lines()) {
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let bad = |problem: &str| TokensError { line, problem: problem.to_owned() };
            let mut words = text.split_whitespace();
            let (Some(name), Some(role), Some(hash), weight, None) =
                (words.next(), words.next(), words.next(), words.next(), words.next())
            else {
                return Err(bad("does not have three or four words"));
            };
            let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            if name.len() > 64 || !name.bytes().all(good) {
                return Err(bad("the name is not 1 to 64 letters, digits, \".\", \"_\" or \"-\""));
            }
            let role = match role {
                "submit" => Role::Submit,
                "admin" => Role::Admin,
                _ => return Err(bad("the role is unknown")),
            };
            let hash = hash.strip_prefix("sha256:").and_then(|hex| hex::decode(hex).ok());
            let hash: [u8; 32] =
                hash.and_then(|hash| hash.try_into().ok()).ok_or_else(|| bad("the hash is not one"))?;
            let weight = match weight.map(|word| word.strip_prefix("weight=").ok_or(word)) {
                None => Weight::default(),
                Some(Ok(weight)) => weight.parse().map_err(|error| bad(&format!("weight={weight}: {error}")))?,
                // Not repeated: it may be the token itself, written down beside its hash.
                Some(Err(_)) => return Err(bad("the fourth word is not a weight")),
            };
            let before = *names.entry(name).or_insert((role, weight));
            if before.0 != role {
                return Err(bad("an earlier line gives this name another role"));
            }
            if before.1 != weight {
                return Err(bad("an earlier line gives this name another weight (1 if it names none)"));
            }
            if known.iter().any(|(other, _)| *other == hash) {
                return Err(bad("an earlier line has the same token"));
            }
            known.push((hash, Caller { owner: name.into(), role }));
        }
        let weights = names.into_iter().map(|(name, (_, weight))| (name.into(), weight)).collect();
        Ok(Self { known, weights })
    }

    /// The owners' weights: how large their shares of the workers are.
    #[must_use]
    pub fn weights(&self) -> Weights {
        self.weights.clone()
    }

    /// Whether there are no tokens, so that every call is refused.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// The caller with this token. A wrong token takes as long as a right one.
    #[must_use]
    pub fn find(&self, token: &str) -> Option<&Caller> {
        let hash = digest(token);
        let mut found = None;
        for (known, caller) in &self.known {
            if bool::from(known.ct_eq(&hash)) {
                found = Some(caller);
            }
        }
        found
    }

    /// The caller with this `authorization` header, if there is one.
    ///
    /// # Errors
    /// [`Denied`].
    pub fn authenticate(&self, authorization: Option<&str>) -> Result<Caller, Denied> {
        let token = authorization.ok_or(Denied::TokenMissing)?.split_once(' ');
        let token = token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token.trim());
        token.and_then(|token| self.find(token)).cloned().ok_or(Denied::TokenUnknown)
    }
}

fn digest(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

/// The third word of a token's line in the token file.
#[must_use]
pub fn hash_token(token: &str) -> String {
    format!("sha256:{}", hex::encode(digest(token)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Scope;

    #[test]
    fn tokens_are_found_by_their_hash() {
        let text = format!(
            "# people\n\nana admin {}\n  bob submit {}\nbob submit {}\n",
            hash_token("a"),
            hash_token("b"),
            hash_token("b2")
        );
        let tokens = Tokens::parse(&text).unwrap();
        assert_eq!(tokens.authenticate(Some("Bearer a")).unwrap().role, Role::Admin);
        let bob = Caller { owner: "bob".into(), role: Role::Submit };
        assert_eq!(tokens.authenticate(Some("bearer b")).unwrap(), bob);
        assert_eq!(tokens.authenticate(Some("Bearer b2")).unwrap(), bob);
        for bad in ["Bearer c", "Bearer ", "Basic a", "a", "Bearer a b"] {
            assert_eq!(tokens.authenticate(Some(bad)), Err(Denied::TokenUnknown), "{bad}");
        }
        assert_eq!(tokens.authenticate(None), Err(Denied::TokenMissing));
        assert_eq!((bob.scope(), Caller::anonymous().scope()), (Scope::Of("bob".into()), Scope::All));
    }

    #[test]
    fn a_weight_is_the_fourth_word_and_else_one() {
        let [a, b, c] = ["a", "b", "c"].map(hash_token);
        let tokens =
            Tokens::parse(&format!("ana submit {a} weight=3\nana submit {b}   weight=3\nbob admin {c}")).unwrap();
        let weight = |name: &str| tokens.weights().of(&name.into()).get();
        assert_eq!((weight("ana"), weight("bob"), weight("eve")), (3, 1, 1));
        let no_gap = format!("ana submit {a} weight=1\nana submit {b}");
        assert_eq!(Tokens::parse(&no_gap).unwrap().weights().of(&"ana".into()).get(), 1);
        let error = Tokens::parse(&format!("ana submit {a} weight=1001")).unwrap_err().to_string();
        assert!(
            error.starts_with("line 1 of the token file: weight=1001: expected a weight from 1 to 1000; "),
            "{error}"
        );
    }

    #[test]
    fn bad_lines_are_named() {
        let hash = hash_token("t");
        let cases = [
            ("ana admin".to_owned(), 1, "three or four words"),
            (format!("# ok\nana root {hash}"), 2, "role"),
            (format!("an/a admin {hash}"), 1, "name"),
            ("\n\nana admin sha256:12".to_owned(), 3, "hash"),
            (format!("ana admin {}", &hash[7..]), 1, "hash"),
            (format!("ana admin {hash}\nbob submit {hash}"), 2, "same token"),
            (format!("ana admin {hash}\nana submit {}", hash_token("u")), 2, "another role"),
            (format!("ana admin {hash} weight=2\nana admin {}", hash_token("u")), 2, "another weight"),
            (format!("ana admin {hash} weight=0"), 1, "from 1 to 1000"),
            (format!("ana admin {hash} 3"), 1, "not a weight"),
            (format!("ana admin {hash} weight=3 more"), 1, "three or four words"),
        ];
        for (text, line, problem) in cases {
            let error = Tokens::parse(&text).unwrap_err();
            assert!(error.line == line && error.problem.contains(problem), "{text}: {error}");
        }
    }
}
