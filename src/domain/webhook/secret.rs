//! Signing secrets, in clear text and encrypted.

use base64::{Engine, engine::general_purpose::STANDARD};
use zeroize::Zeroizing;

/// The prefix of a Standard Webhooks secret; the rest is the key in base64.
const STANDARD_PREFIX: &str = "whsec_";
/// Bytes of a new secret's key, within the 24 to 64 that Standard Webhooks allows.
const KEY_BYTES: usize = 32;

/// A signing secret. Wiped from memory when dropped, and never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

/// Why a text can't be a secret. Contains nothing of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadSecret {
    /// Empty or too long.
    #[error("a secret has 1 to 128 bytes; this one has {0}")]
    Length(usize),
    /// It has characters other than printable ASCII.
    #[error("a secret is printable ASCII")]
    NotPrintable,
    /// `whsec_` is not followed by base64. Receivers would use other bytes as the key than the server, so it is
    /// refused.
    #[error("after whsec_ a secret must be padded base64, as Standard Webhooks requires")]
    NotBase64,
    /// Something precedes `whsec_`, such as a pasted quote. The server's key would differ from the receiver's, and no
    /// signature would match.
    #[error("something stands before whsec_ (v1, a comma, a quote, a space): give the secret alone, from whsec_ on")]
    Pasted,
}

impl Secret {
    /// Validates a secret.
    ///
    /// # Errors
    /// [`BadSecret`].
    pub fn try_new(text: impl Into<String>) -> Result<Self, BadSecret> {
        let text = Zeroizing::new(text.into());
        if text.is_empty() || text.len() > 128 {
            return Err(BadSecret::Length(text.len()));
        }
        if !text.bytes().all(|byte| (0x20..=0x7e).contains(&byte)) {
            return Err(BadSecret::NotPrintable);
        }
        if is_pasted(&text) {
            return Err(BadSecret::Pasted);
        }
        if let Some(key) = text.strip_prefix(STANDARD_PREFIX)
            && !STANDARD.decode(key).is_ok_and(|key| !Zeroizing::new(key).is_empty())
        {
            return Err(BadSecret::NotBase64);
        }
        Ok(Self(text))
    }

    /// Takes a secret that was accepted earlier, without validating it by today's rules.
    #[must_use]
    pub fn accepted(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// The `whsec_…` secret of a new key.
    #[must_use]
    pub fn of_key(key: &Zeroizing<[u8; KEY_BYTES]>) -> Self {
        let mut text = Zeroizing::new(String::with_capacity(STANDARD_PREFIX.len() + 44));
        text.push_str(STANDARD_PREFIX);
        STANDARD.encode_string(key.as_slice(), &mut text);
        Self(text)
    }

    /// The secret text, for signing, encrypting, or showing it once to its owner.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The key of `X-Webhook-Signature`: the whole text.
    #[must_use]
    pub fn body_key(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The key of `webhook-signature`: what follows `whsec_`, decoded; without `whsec_`, the whole text.
    #[must_use]
    pub fn standard_key(&self) -> Zeroizing<Vec<u8>> {
        let decoded = self.0.strip_prefix(STANDARD_PREFIX).and_then(|key| STANDARD.decode(key).ok());
        Zeroizing::new(decoded.unwrap_or_else(|| self.0.as_bytes().to_vec()))
    }
}

/// Whether a `whsec_` secret has a signature's version, quotes or spaces before it.
fn is_pasted(text: &str) -> bool {
    let around = |c: char| matches!(c, '"' | '\'' | '`' | ' ' | ',' | '=' | ':');
    let bare = text.trim_start_matches(around);
    let bare = bare.strip_prefix("v1").map_or(bare, |rest| rest.trim_start_matches(around));
    bare.len() < text.len() && bare.starts_with(STANDARD_PREFIX)
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// An encrypted secret, as stored; only `delivery::secrets` can decrypt it.
#[derive(Clone, PartialEq, Eq)]
pub struct SealedSecret(Vec<u8>);

impl SealedSecret {
    /// Reads stored bytes.
    #[must_use]
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The bytes to store.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for SealedSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without a master key the secret is not encrypted.
        f.write_str("SealedSecret(..)")
    }
}

impl serde::Serialize for SealedSecret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> serde::Deserialize<'de> for SealedSecret {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text: String = serde::Deserialize::deserialize(deserializer)?;
        STANDARD.decode(text).map(Self).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_a_secret() {
        assert!(Secret::try_new("x").is_ok());
        assert!(Secret::try_new("It's a Secret to Everybody").is_ok());
        assert!(Secret::try_new("s".repeat(128)).is_ok());
        assert!(Secret::try_new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").is_ok());
        assert_eq!(Secret::try_new(""), Err(BadSecret::Length(0)));
        assert_eq!(Secret::try_new("s".repeat(129)), Err(BadSecret::Length(129)));
        for bad in ["caf\u{e9}", "a\nb", "a\0b", "\u{7f}"] {
            assert_eq!(Secret::try_new(bad), Err(BadSecret::NotPrintable));
        }
        for bad in ["whsec_", "whsec_!!!!", "whsec_abc"] {
            assert_eq!(Secret::try_new(bad), Err(BadSecret::NotBase64));
        }
        for bad in
            ["v1,whsec_MfKQ9r8G", "v1, whsec_MfKQ9r8G", "\"whsec_MfKQ9r8G\"", " whsec_MfKQ9r8G", "'v1,whsec_MfKQ9r8G'"]
        {
            assert_eq!(Secret::try_new(bad), Err(BadSecret::Pasted), "{bad}");
            assert_eq!(Secret::accepted(bad.to_owned()).expose(), bad, "it is still opened if it was stored before");
        }
        for text in ["v1,secret", "my whsec_ secret", "v1 of my secret", "\"quoted\""] {
            assert!(Secret::try_new(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn one_of_a_new_key_is_a_standard_one() {
        let secret = Secret::of_key(&Zeroizing::new([7; KEY_BYTES]));
        assert_eq!(secret.standard_key()[..], [7; KEY_BYTES]);
        assert_eq!(Secret::try_new(secret.expose()), Ok(secret));
    }

    #[test]
    fn it_is_never_printed() {
        let secret = Secret::try_new("canary-9f2b").unwrap();
        let sealed = SealedSecret::from_bytes(b"canary-9f2b".to_vec());
        assert!(!format!("{secret:?} {sealed:?} {:?}", Some((&secret, &sealed))).contains("canary"));
    }
}
