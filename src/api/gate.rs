//! The gate that every request passes, in every protocol: who the caller is, and how much of the server they may hold.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, header::AUTHORIZATION};

use crate::{
    access::{Account, Caller, Held, LimitReached, Limiter, Tokens},
    service::ServiceError,
};

/// The trace that a request belongs to (W3C Trace Context), 32 hex digits. An extension of every request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceId(pub Arc<str>);

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// What the protocols' gates share.
pub(super) struct Gate {
    /// `None`: every caller is admin.
    tokens: Option<Tokens>,
    limits: Arc<Limiter>,
}

impl Gate {
    pub(super) fn new(tokens: Option<Tokens>, limits: Arc<Limiter>) -> Self {
        Self { tokens, limits }
    }

    /// The caller, if they may call.
    ///
    /// # Errors
    /// The caller is unknown, or calls too often.
    pub(super) fn caller(&self, headers: &HeaderMap) -> Result<Caller, ServiceError> {
        self.caller_by(headers, false)
    }

    /// Like [`Self::caller`]. With `api_key`, a token in `x-api-key` is accepted too, as Anthropic's clients send it.
    ///
    /// # Errors
    /// As of [`Gate::caller`].
    pub(super) fn caller_by(&self, headers: &HeaderMap, api_key: bool) -> Result<Caller, ServiceError> {
        let caller = match &self.tokens {
            Some(tokens) => {
                let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default());
                match (text(AUTHORIZATION), text(API_KEY)) {
                    (None, Some(key)) if api_key => tokens.authenticate(Some(&format!("Bearer {key}")))?,
                    (header, _) => tokens.authenticate(header)?,
                }
            }
            // With client certificates only, TLS has already refused whoever has none.
            None => Caller::anonymous(),
        };
        self.limits.request(&caller.owner)?;
        Ok(caller)
    }

    /// Counts a stream that watches for the caller, until the result is dropped.
    pub(super) fn watch(&self, account: &Account) -> Result<Held, LimitReached> {
        self.limits.watches.take(account, 1)
    }

    /// Counts a download for the caller, until the result is dropped.
    pub(super) fn download(&self, account: &Account) -> Result<Held, LimitReached> {
        self.limits.downloads.take(account, 1)
    }
}

/// The trace id of a valid `traceparent`, or a new one.
pub(super) fn trace_id(headers: &HeaderMap) -> String {
    let hex = |text: &str, length: usize| {
        text.len() == length
            && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
            && text.bytes().any(|byte| byte != b'0')
    };
    let given = headers.get("traceparent").and_then(|value| value.to_str().ok()).and_then(|value| {
        let mut parts = value.split('-');
        let (version, trace, parent, _flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let known = version.len() == 2 && version != "ff" && (version != "00" || parts.next().is_none());
        (known && hex(trace, 32) && hex(parent, 16)).then(|| trace.to_owned())
    });
    given.unwrap_or_else(|| format!("{:032x}", rand::random::<u128>().max(1)))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn a_valid_traceparent_is_taken_over() {
        let of = |value: &str| {
            trace_id(&HeaderMap::from_iter([(
                http::HeaderName::from_static("traceparent"),
                HeaderValue::from_str(value).unwrap(),
            )]))
        };
        let id = "4bf92f3577b34da6a3ce929d0e0e4736";
        assert_eq!(of(&format!("00-{id}-00f067aa0ba902b7-01")), id);
        assert_eq!(of(&format!("01-{id}-00f067aa0ba902b7-01-later")), id);
        let zeros = "0".repeat(32);
        for bad in [
            format!("00-{id}-00f067aa0ba902b7-01-more"),
            format!("ff-{id}-00f067aa0ba902b7-01"),
            format!("00-{zeros}-00f067aa0ba902b7-01"),
            format!("00-{id}-0000000000000000-01"),
            format!("00-{}-00f067aa0ba902b7-01", id.to_uppercase()),
            "nonsense".into(),
        ] {
            let made = of(&bad);
            assert!(made.len() == 32 && made != id && made != zeros, "{bad} {made}");
        }
    }
}
