//! Encrypts signing secrets at rest: AES-256-GCM under the server's master key.
//!
//! A sealed secret is a version byte, then for version 1 the key's id, a nonce and the ciphertext, for version 0 (a server
//! without a master key) the secret itself. The id tells which key opens it, so a second key can be accepted while the
//! first one is being replaced. The context (what the secret belongs to) is authenticated with it: a sealed secret copied
//! to another place in the database does not open there.

use aes_gcm::{
    Aes256Gcm,
    aead::{Aead, KeyInit, Payload},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, Zeroizing};

use crate::domain::webhook::{SealedSecret, Secret};

/// Bytes of a master key.
const KEY_BYTES: usize = 32;
const KEY_ID_BYTES: usize = 8;
const NONCE_BYTES: usize = 12;
const OPEN: u8 = 0;
const SEALED: u8 = 1;

/// The key that encrypts secrets.
pub struct MasterKey {
    id: [u8; KEY_ID_BYTES],
    cipher: Aes256Gcm,
}

/// Why a text is not a master key. Contains nothing of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadMasterKey {
    #[error("a master key is base64, such as `openssl rand -base64 32` prints")]
    NotBase64,
    /// It is too short or too long.
    #[error("a master key has 32 bytes; this one has {0}")]
    Length(usize),
}

/// Why a secret could not be decrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// It was encrypted with a key that the server does not have.
    #[error("the secret was encrypted with a master key that this server does not have")]
    UnknownKey,
    /// It was altered, or moved to a row for which it was not encrypted.
    #[error("the encrypted secret is damaged")]
    Damaged,
}

impl MasterKey {
    /// From 32 bytes in base64; white space around it is ignored, so a file's content can be given as it is.
    ///
    /// # Errors
    /// [`BadMasterKey`].
    pub fn from_base64(text: &str) -> Result<Self, BadMasterKey> {
        let bytes = Zeroizing::new(STANDARD.decode(text.trim()).map_err(|_| BadMasterKey::NotBase64)?);
        if bytes.len() != KEY_BYTES {
            return Err(BadMasterKey::Length(bytes.len()));
        }
        let mut id = [0; KEY_ID_BYTES];
        let digest = Sha256::new_with_prefix(b"tidemill master key id\0").chain_update(bytes.as_slice()).finalize();
        id.copy_from_slice(&digest[..KEY_ID_BYTES]);
        let cipher = Aes256Gcm::new_from_slice(&bytes).map_err(|_| BadMasterKey::Length(bytes.len()))?;
        Ok(Self { id, cipher })
    }

    /// An id of the key, which reveals nothing about it.
    #[must_use]
    pub fn id(&self) -> String {
        hex::encode(self.id)
    }
}

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MasterKey").field("id", &self.id()).finish_non_exhaustive()
    }
}

/// Encrypts and decrypts secrets.
#[derive(Debug, Default)]
pub struct Vault {
    current: Option<MasterKey>,
    /// The previous key, for secrets that it encrypted.
    previous: Option<MasterKey>,
}

impl Vault {
    /// Encrypts with `current`; decrypts secrets of either key. Without a key, secrets are stored unencrypted.
    #[must_use]
    pub fn new(current: Option<MasterKey>, previous: Option<MasterKey>) -> Self {
        Self { current, previous }
    }

    /// Whether there is a key. A server without one warns at its start.
    #[must_use]
    pub fn is_sealing(&self) -> bool {
        self.current.is_some()
    }

    /// The prefix of everything encrypted with the current key.
    fn mark(&self) -> Option<Vec<u8>> {
        self.current.as_ref().map(|key| [&[SEALED], key.id.as_slice()].concat())
    }

    /// Encrypts a secret for storage. `context` is what it belongs to; it can be decrypted only with the same.
    #[must_use]
    pub fn seal(&self, secret: &Secret, context: &str) -> SealedSecret {
        let Some(key) = &self.current else {
            return SealedSecret::from_bytes([&[OPEN], secret.expose().as_bytes()].concat());
        };
        let nonce = rand::random::<[u8; NONCE_BYTES]>();
        let payload = Payload { msg: secret.expose().as_bytes(), aad: context.as_bytes() };
        let ciphertext = key
            .cipher
            .encrypt(&nonce.into(), payload)
            .expect("AES-GCM fails only beyond 64 GiB, and a secret has at most 128 bytes");
        SealedSecret::from_bytes([&[SEALED], key.id.as_slice(), &nonce, &ciphertext].concat())
    }

    /// Decrypts a stored secret.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(&self, sealed: &SealedSecret, context: &str) -> Result<Secret, OpenError> {
        let (version, rest) = sealed.as_bytes().split_first().ok_or(OpenError::Damaged)?;
        let text = match *version {
            OPEN => rest.to_vec(),
            SEALED => {
                let (id, rest) = rest.split_at_checked(KEY_ID_BYTES).ok_or(OpenError::Damaged)?;
                let (nonce, ciphertext) = rest.split_first_chunk::<NONCE_BYTES>().ok_or(OpenError::Damaged)?;
                let key = [&self.current, &self.previous]
                    .into_iter()
                    .flatten()
                    .find(|key| key.id == id)
                    .ok_or(OpenError::UnknownKey)?;
                let payload = Payload { msg: ciphertext, aad: context.as_bytes() };
                key.cipher.decrypt(nonce.into(), payload).map_err(|_| OpenError::Damaged)?
            }
            _ => return Err(OpenError::Damaged),
        };
        let text = String::from_utf8(text).map_err(|error| {
            error.into_bytes().zeroize();
            OpenError::Damaged
        })?;
        if text.is_empty() {
            return Err(OpenError::Damaged);
        }
        Ok(Secret::accepted(text))
    }

    /// Encrypts a stored secret with the current key. `None` if it already is, or if there is no key.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn reseal(&self, sealed: &SealedSecret, context: &str) -> Result<Option<SealedSecret>, OpenError> {
        let Some(mark) = self.mark() else { return Ok(None) };
        if sealed.as_bytes().starts_with(&mark) {
            return Ok(None);
        }
        self.open(sealed, context).map(|secret| Some(self.seal(&secret, context)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(byte: u8) -> MasterKey {
        MasterKey::from_base64(&STANDARD.encode([byte; 32])).unwrap()
    }

    fn secret(text: &str) -> Secret {
        Secret::try_new(text).unwrap()
    }

    #[test]
    fn what_is_sealed_opens_in_its_place_only() {
        let vault = Vault::new(Some(key(1)), None);
        let sealed = vault.seal(&secret("canary"), "we_1");
        assert!(!sealed.as_bytes().windows(6).any(|window| window == b"canary"));
        assert_eq!(vault.open(&sealed, "we_1"), Ok(secret("canary")));
        assert_eq!(vault.open(&sealed, "we_2"), Err(OpenError::Damaged));
        assert_ne!(vault.seal(&secret("canary"), "we_1"), sealed, "a new nonce each time");
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let vault = Vault::new(Some(key(1)), None);
        let sealed = vault.seal(&secret("canary"), "we_1");
        for at in 0..sealed.as_bytes().len() {
            let mut bytes = sealed.as_bytes().to_vec();
            bytes[at] ^= 2;
            assert!(vault.open(&SealedSecret::from_bytes(bytes), "we_1").is_err(), "byte {at}");
        }
        for length in 0..sealed.as_bytes().len() {
            let short = SealedSecret::from_bytes(sealed.as_bytes()[..length].to_vec());
            assert!(vault.open(&short, "we_1").is_err(), "length {length}");
        }
    }

    #[test]
    fn a_master_key_is_replaced_with_the_help_of_the_old_one() {
        let old = Vault::new(Some(key(1)), None);
        let sealed = old.seal(&secret("abc"), "x");
        assert_eq!(Vault::new(Some(key(2)), None).open(&sealed, "x"), Err(OpenError::UnknownKey));
        let both = Vault::new(Some(key(2)), Some(key(1)));
        assert_eq!(both.open(&sealed, "x"), Ok(secret("abc")));
        let anew = both.reseal(&sealed, "x").unwrap().unwrap();
        assert_eq!(both.reseal(&anew, "x"), Ok(None));
        assert_eq!(Vault::new(Some(key(2)), None).open(&anew, "x"), Ok(secret("abc")));
    }

    #[test]
    fn without_a_key_secrets_are_as_they_are_and_are_sealed_once_there_is_one() {
        let open = Vault::default();
        assert!(!open.is_sealing());
        let stored = open.seal(&secret("abc"), "x");
        assert_eq!(open.open(&stored, "x"), Ok(secret("abc")));
        assert_eq!(open.reseal(&stored, "x"), Ok(None));
        let sealing = Vault::new(Some(key(1)), None);
        assert_eq!(sealing.open(&stored, "x"), Ok(secret("abc")));
        let sealed = sealing.reseal(&stored, "x").unwrap().unwrap();
        assert_eq!(open.open(&sealed, "x"), Err(OpenError::UnknownKey));
    }

    #[test]
    fn what_is_a_master_key() {
        assert!(MasterKey::from_base64(&format!(" {}\n", STANDARD.encode([7; 32]))).is_ok());
        assert!(matches!(MasterKey::from_base64("%"), Err(BadMasterKey::NotBase64)));
        assert!(matches!(MasterKey::from_base64("AAAA"), Err(BadMasterKey::Length(3))));
        assert!(!format!("{:?}", key(65)).contains("AAAA"));
    }

    proptest! {
        #[test]
        fn any_bytes_open_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let vault = Vault::new(Some(key(1)), Some(key(2)));
            let _ = vault.open(&SealedSecret::from_bytes(bytes), "x");
        }
    }
}
