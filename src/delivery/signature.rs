//! The signatures of an attempt, and how a receiver verifies them.
//!
//! Every attempt has two kinds of signature. `webhook-signature` follows Standard Webhooks 1.0 and covers id, timestamp
//! and body; prefer it. `X-Webhook-Signature` covers only the body, as older receivers expect, so a captured request
//! can be replayed under a new timestamp.

use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use subtle::ConstantTimeEq;

use crate::domain::webhook::Secret;

/// The oldest timestamp that a receiver accepts, in seconds.
pub const MAX_AGE_SECONDS: i64 = 300;
/// How far in the future a receiver accepts a timestamp, in seconds, because clocks differ.
pub const MAX_SKEW_SECONDS: i64 = 60;

/// The header with `sha256=` and the hex signature of the body.
pub const BODY_SIGNATURE: &str = "x-webhook-signature";
/// The header with one `v1,<base64>` per secret, separated by spaces.
pub const STANDARD_SIGNATURE: &str = "webhook-signature";
/// The header with the delivery's id, the same on every attempt.
pub const STANDARD_ID: &str = "webhook-id";
/// The header with the Unix seconds of this attempt.
pub const STANDARD_TIMESTAMP: &str = "webhook-timestamp";
/// The header with the same timestamp, under the name that goes with [`BODY_SIGNATURE`].
pub const TIMESTAMP: &str = "x-webhook-timestamp";

const BODY_PREFIX: &str = "sha256=";
const STANDARD_VERSION: &str = "v1,";

/// Why a request can't be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// There is nothing to verify.
    #[error("the request has no signature header")]
    NoSignature,
    /// A header that the signature needs is missing or not text.
    #[error("the header {0} is missing or not ASCII")]
    MissingHeader(&'static str),
    /// The timestamp is not a decimal number of seconds.
    #[error("the timestamp is not a number of seconds since 1970")]
    BadTimestamp,
    /// The timestamp is more than 300 s old: the request may be a replay.
    #[error("the timestamp is {0} s old; at most {MAX_AGE_SECONDS} s is accepted")]
    TooOld(i64),
    /// The timestamp is more than 60 s ahead: one of the clocks is wrong.
    #[error("the timestamp is {0} s in the future; at most {MAX_SKEW_SECONDS} s is accepted")]
    TooNew(i64),
    /// No signature matches: the secret differs, or the body was changed.
    #[error("no signature matches: the secret is a different one, or the body is not byte for byte what was sent")]
    Mismatch,
}

/// The signature that matched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verified {
    /// `webhook-signature`: id, timestamp and body are authentic.
    Standard,
    /// `X-Webhook-Signature`: the body is authentic, the timestamp is not covered.
    BodyOnly,
}

/// The value of `X-Webhook-Signature`.
#[must_use]
pub fn sign_body(secret: &Secret, body: &[u8]) -> String {
    let digest = digest(secret.body_key(), &[body]);
    format!("{BODY_PREFIX}{}", hex::encode(digest))
}

/// The value of `webhook-signature`: an entry per secret, the newest first.
#[must_use]
pub fn sign_standard(secrets: &[Secret], id: &str, timestamp: i64, body: &[u8]) -> String {
    let timestamp = timestamp.to_string();
    let entries: Vec<String> = secrets
        .iter()
        .map(|secret| {
            let digest = standard_digest(secret, id, &timestamp, body);
            format!("{STANDARD_VERSION}{}", STANDARD.encode(digest))
        })
        .collect();
    entries.join(" ")
}

/// Verifies `X-Webhook-Signature` with any of the secrets, in constant time.
///
/// # Errors
/// [`VerifyError::Mismatch`].
pub fn verify_body(secrets: &[Secret], signature: &str, body: &[u8]) -> Result<(), VerifyError> {
    let given = signature.strip_prefix(BODY_PREFIX).and_then(|text| hex::decode(text).ok()).unwrap_or_default();
    let mut found = subtle::Choice::from(0);
    for secret in secrets {
        found |= digest(secret.body_key(), &[body]).as_slice().ct_eq(&given);
    }
    if found.into() { Ok(()) } else { Err(VerifyError::Mismatch) }
}

/// Verifies `webhook-signature` with any of the secrets, in constant time, and the timestamp by the receiver's clock.
///
/// # Errors
/// [`VerifyError`].
pub fn verify_standard(
    secrets: &[Secret],
    id: &str,
    timestamp: &str,
    signatures: &str,
    body: &[u8],
    now: i64,
) -> Result<(), VerifyError> {
    verify_timestamp(timestamp, now)?;
    let mut found = subtle::Choice::from(0);
    for secret in secrets {
        let right = standard_digest(secret, id, timestamp, body);
        // Entries of another version are ignored.
        for entry in signatures.split(' ').filter_map(|entry| entry.strip_prefix(STANDARD_VERSION)) {
            found |= right.as_slice().ct_eq(&STANDARD.decode(entry).unwrap_or_default());
        }
    }
    if found.into() { Ok(()) } else { Err(VerifyError::Mismatch) }
}

/// Verifies a request: by `webhook-signature` if it has one, otherwise by `X-Webhook-Signature`. `now` is the
/// receiver's clock in Unix seconds.
///
/// # Errors
/// [`VerifyError`].
pub fn verify(secrets: &[Secret], headers: &http::HeaderMap, body: &[u8], now: i64) -> Result<Verified, VerifyError> {
    let text = |name: &'static str| {
        headers.get(name).and_then(|value| value.to_str().ok()).ok_or(VerifyError::MissingHeader(name))
    };
    if headers.contains_key(STANDARD_SIGNATURE) {
        let (id, timestamp) = (text(STANDARD_ID)?, text(STANDARD_TIMESTAMP)?);
        verify_standard(secrets, id, timestamp, text(STANDARD_SIGNATURE)?, body, now)?;
        return Ok(Verified::Standard);
    }
    if headers.contains_key(BODY_SIGNATURE) {
        verify_timestamp(text(TIMESTAMP)?, now)?;
        verify_body(secrets, text(BODY_SIGNATURE)?, body)?;
        return Ok(Verified::BodyOnly);
    }
    Err(VerifyError::NoSignature)
}

/// Whether a timestamp is at most 300 s old and at most 60 s ahead.
///
/// # Errors
/// [`VerifyError::BadTimestamp`], [`VerifyError::TooOld`], [`VerifyError::TooNew`].
pub fn verify_timestamp(timestamp: &str, now: i64) -> Result<(), VerifyError> {
    // Digits only: `parse` would take a sign too.
    if timestamp.is_empty() || !timestamp.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(VerifyError::BadTimestamp);
    }
    let at: i64 = timestamp.parse().map_err(|_| VerifyError::BadTimestamp)?;
    let age = now.saturating_sub(at);
    if age > MAX_AGE_SECONDS {
        return Err(VerifyError::TooOld(age));
    }
    if age < -MAX_SKEW_SECONDS {
        return Err(VerifyError::TooNew(-age));
    }
    Ok(())
}

fn standard_digest(secret: &Secret, id: &str, timestamp: &str, body: &[u8]) -> [u8; 32] {
    digest(&secret.standard_key(), &[id.as_bytes(), b".", timestamp.as_bytes(), b".", body])
}

fn digest(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn secret(text: &str) -> Secret {
        Secret::try_new(text).unwrap()
    }

    /// The vectors of the Standard Webhooks libraries (Go, JavaScript, Rust) and of OpenAI's Python SDK.
    #[test]
    fn standard_vectors() {
        for (key, id, timestamp, body, expected) in [
            (
                "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
                "msg_p5jXN8AQM9LWM0D4loKWxJek",
                1_614_265_330,
                r#"{"test": 2432232314}"#,
                "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
            ),
            (
                "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD",
                "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk",
                1_649_367_553,
                r#"{"email":"test@example.com","username":"test_user"}"#,
                "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=",
            ),
            (
                "whsec_RdvaYFYUXuIFuEbvZHwMfYFhUf7aMYjYcmM24+Aj40c=",
                "wh_685c059ae39c8190af8c71ed1022a24d",
                1_750_861_210,
                r#"{"id": "evt_685c059ae3a481909bdc86819b066fb6", "object": "event", "created_at": 1750861210, "type": "response.completed", "data": {"id": "resp_123"}}"#,
                "v1,gUAg4R2hWouRZqRQG4uJypNS8YK885G838+EHb4nKBY=",
            ),
        ] {
            let secrets = [secret(key)];
            assert_eq!(sign_standard(&secrets, id, timestamp, body.as_bytes()), expected);
            let at = timestamp.to_string();
            assert_eq!(verify_standard(&secrets, id, &at, expected, body.as_bytes(), timestamp), Ok(()));
        }
    }

    #[test]
    fn body_only_vectors() {
        // GitHub's documentation, "Validating webhook deliveries".
        let expected = "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17";
        assert_eq!(sign_body(&secret("It's a Secret to Everybody"), b"Hello, World!"), expected);
        let canonical = r#"{"completed_at": 1699568400, "created_at": 1699564800, "endpoint": "/v1/chat/completions", "error_file_url": null, "id": "batch_abc123", "metadata": {"name": "caf\u00e9 \u4f60 \ud83d\ude00 \"q\" \\ /", "z": "1"}, "object": "batch", "output_file_url": "/v1/batches/batch_abc123/results", "request_counts": {"completed": 98, "failed": 2, "total": 100}, "status": "completed"}"#;
        let expected = "sha256=52b0cc5559e34efea251ade33e65a391c24b0c10350540e409552d20c4f46d30";
        let key = secret("your_hmac_secret_key");
        assert_eq!(sign_body(&key, canonical.as_bytes()), expected);
        assert_eq!(verify_body(&[key], expected, canonical.as_bytes()), Ok(()));
    }

    /// The classic mistake with `whsec_`: which bytes are the key. Decoded for the standard header, the text for the other.
    #[test]
    fn the_two_keys_of_one_secret() {
        let both = secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        assert_eq!(both.standard_key().len(), 24);
        assert_eq!(both.body_key(), b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw");
        let content = br#"1614265330.{"test": 2432232314}"#;
        let hex = |key: &[u8]| hex::encode(digest(key, &[content]));
        assert_eq!(hex(&both.standard_key()), "e96203c6de850e7dc1fde7489ef6140b402d3a5a64fe250cd2eef9830fac1cef");
        assert_eq!(hex(both.body_key()), "2e37df5d4a028c51a7f3133d64ae1e300d2c2c900f1b1d49d4369ad2530f8964");
    }

    #[test]
    fn the_window_is_300_seconds_back_and_60_ahead() {
        let now = 1_700_000_000;
        for (offset, expected) in [
            (0, Ok(())),
            (-300, Ok(())),
            (-301, Err(VerifyError::TooOld(301))),
            (60, Ok(())),
            (61, Err(VerifyError::TooNew(61))),
        ] {
            assert_eq!(verify_timestamp(&(now + offset).to_string(), now), expected, "{offset}");
        }
        for bad in ["", "abc", "1.7e9", "-1", "+1700000000", " 1700000000", "0x65", "99999999999999999999", "١"] {
            assert_eq!(verify_timestamp(bad, now), Err(VerifyError::BadTimestamp), "{bad}");
        }
    }

    #[test]
    fn what_does_not_verify() {
        let secrets = [secret("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")];
        let (id, at, body) = ("msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", br#"{"test": 2432232314}"#);
        let check = |signatures: &str| verify_standard(&secrets, id, at, signatures, body, 1_614_265_330);
        let right = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
        for wrong in [
            "",
            "v1,",
            "v1",
            "g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
            "v1,Ceo5qEr07ixe2NLpvHk3FH9bwy/WavXrAFQ/9tdO6mc=",
            "v2,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
            "v1,g0hM9SsE",
        ] {
            assert_eq!(check(wrong), Err(VerifyError::Mismatch), "{wrong}");
            assert_eq!(check(&format!("{wrong} v2,Ceo5 {right}")), Ok(()));
        }
        assert_eq!(verify_standard(&[], id, at, right, body, 1_614_265_330), Err(VerifyError::Mismatch));
        assert_eq!(verify_body(&secrets, "sha256=", body), Err(VerifyError::Mismatch));
        assert_eq!(verify_body(&[], "sha256=00", body), Err(VerifyError::Mismatch));
    }

    #[test]
    fn a_whole_request() {
        let (key, now, body) = (secret("abc"), 1_700_000_000, b"{}".as_slice());
        let mut headers = http::HeaderMap::new();
        let check = |headers: &http::HeaderMap| verify(&[secret("abc")], headers, body, now);
        assert_eq!(check(&headers), Err(VerifyError::NoSignature));
        headers.insert(BODY_SIGNATURE, sign_body(&key, body).parse().unwrap());
        assert_eq!(check(&headers), Err(VerifyError::MissingHeader(TIMESTAMP)));
        headers.insert(TIMESTAMP, now.to_string().parse().unwrap());
        assert_eq!(check(&headers), Ok(Verified::BodyOnly));
        headers.insert(TIMESTAMP, (now - 301).to_string().parse().unwrap());
        assert_eq!(check(&headers), Err(VerifyError::TooOld(301)));
        headers.insert(STANDARD_SIGNATURE, sign_standard(&[key], "msg_1", now, body).parse().unwrap());
        assert_eq!(check(&headers), Err(VerifyError::MissingHeader(STANDARD_ID)));
        headers.insert(STANDARD_ID, "msg_1".parse().unwrap());
        headers.insert(STANDARD_TIMESTAMP, now.to_string().parse().unwrap());
        assert_eq!(check(&headers), Ok(Verified::Standard));
        headers.insert(STANDARD_ID, "msg_2".parse().unwrap());
        assert_eq!(check(&headers), Err(VerifyError::Mismatch));
    }

    proptest! {
        #[test]
        fn what_is_signed_verifies_and_nothing_else(
            keys in proptest::collection::vec("[ -~]{1,40}", 1..4),
            body in proptest::collection::vec(any::<u8>(), 0..200),
            flip in any::<proptest::sample::Index>(),
            now in 0i64..4_000_000_000,
        ) {
            let Ok(secrets) = keys.iter().map(|key| Secret::try_new(key.as_str())).collect::<Result<Vec<_>, _>>() else { return Ok(()) };
            let (standard, at) = (sign_standard(&secrets, "msg_1", now, &body), now.to_string());
            prop_assert_eq!(standard.split(' ').count(), secrets.len());
            // During a rotation either secret will do.
            for one in &secrets {
                prop_assert_eq!(verify_standard(std::slice::from_ref(one), "msg_1", &at, &standard, &body, now), Ok(()));
                prop_assert_eq!(verify_body(std::slice::from_ref(one), &sign_body(one, &body), &body), Ok(()));
            }
            if !body.is_empty() {
                let mut other = body.clone();
                other[flip.index(body.len())] ^= 1;
                prop_assert_eq!(verify_standard(&secrets, "msg_1", &at, &standard, &other, now), Err(VerifyError::Mismatch));
                prop_assert_eq!(verify_body(&secrets, &sign_body(&secrets[0], &body), &other), Err(VerifyError::Mismatch));
            }
            let later = (now + 1).to_string();
            prop_assert_eq!(verify_standard(&secrets, "msg_1", &later, &standard, &body, now), Err(VerifyError::Mismatch));
        }
    }
}
