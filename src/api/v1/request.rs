//! What every request brings: who calls, the id in its path, its own id, and its idempotency key.

use std::{sync::Arc, time::Duration};

use axum::{
    RequestPartsExt,
    extract::{FromRequestParts, Path, State},
    response::{IntoResponse, Response},
};
use http::{HeaderMap, HeaderName, HeaderValue, request::Parts};

use super::problem::{self, Dialect, Problem};
use crate::{
    access::{Caller, Denied},
    domain::text::is_plain,
    service::{Service, ServiceError},
};

/// The id of a request, by which client and server talk about it.
pub(in crate::api) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The same on Anthropic's paths.
const ANTHROPICS_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
/// How long the answer took, in milliseconds.
const PROCESSING: HeaderName = HeaderName::from_static("openai-processing-ms");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// The longest id that a client may give its request.
const LONGEST_ID: usize = 128;

/// The service, as handlers get it.
pub(in crate::api) type Of = State<Arc<Service>>;

/// A problem in the dialect of its path.
pub(in crate::api) struct Refused(Problem, Dialect);

impl Refused {
    fn of(parts: &Parts, problem: Problem) -> Self {
        Self(problem, Dialect::of(parts.uri.path()))
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        self.0.respond(self.1)
    }
}

/// Who calls.
pub(in crate::api) struct By(pub(in crate::api) Caller);

impl<S: Send + Sync> FromRequestParts<S> for By {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refused> {
        let caller = parts.extensions.get::<Caller>().cloned();
        caller.map(Self).ok_or_else(|| Refused::of(parts, ServiceError::from(Denied::TokenMissing).into()))
    }
}

/// The id in a path, decoded.
pub(in crate::api) struct Id(pub(in crate::api) String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Refused> {
        // What is no UTF-8 names nothing.
        let Ok(Path(id)) = parts.extract::<Path<String>>().await else {
            return Err(Refused::of(parts, Problem::unknown_url(&parts.method, parts.uri.path())));
        };
        Ok(Self(id))
    }
}

/// The id of a request: the client's own if it has one, else a new one.
#[derive(Clone, Debug)]
pub(in crate::api) struct RequestId(pub(in crate::api) HeaderValue);

impl RequestId {
    pub(in crate::api) fn of(headers: &HeaderMap) -> Self {
        let given = headers.get(REQUEST_ID).filter(|id| {
            (1..=LONGEST_ID).contains(&id.len()) && id.as_bytes().iter().all(|byte| matches!(byte, b'!'..=b'~'))
        });
        let made = || HeaderValue::try_from(format!("req_{:032x}", rand::random::<u128>()));
        // Hex digits are good in a header.
        Self(given.cloned().unwrap_or_else(|| made().unwrap_or_else(|_| HeaderValue::from_static("req_0"))))
    }

    /// Puts the id and the time that the answer took into its headers.
    pub(in crate::api) fn mark(&self, response: &mut Response, dialect: Dialect, took: Duration) {
        let headers = response.headers_mut();
        headers.insert(REQUEST_ID, self.0.clone());
        match dialect {
            Dialect::OpenAi => {
                headers.insert(PROCESSING, u64::try_from(took.as_millis()).unwrap_or(u64::MAX).into());
            }
            Dialect::Anthropic => {
                headers.insert(ANTHROPICS_REQUEST_ID, self.0.clone());
                problem::sign(response, &self.0);
            }
        }
    }
}

/// The client's idempotency key; empty: none.
pub(in crate::api) fn idempotency_key(headers: &HeaderMap) -> Result<String, Problem> {
    let Some(key) = headers.get(IDEMPOTENCY_KEY) else { return Ok(String::new()) };
    match key.to_str() {
        Ok(key) if is_plain(key) => Ok(key.to_owned()),
        _ => Err(Problem::invalid("invalid_value", "Idempotency-Key", "the Idempotency-Key is not plain ASCII")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_own_id_is_kept_if_it_is_plain() {
        let of =
            |id: &[u8]| RequestId::of(&HeaderMap::from_iter([(REQUEST_ID, HeaderValue::from_bytes(id).unwrap())])).0;
        assert_eq!(of(b"my-id"), "my-id");
        for bad in [&b""[..], b"a b", "ü".as_bytes(), &[b'x'; 129]] {
            assert!(of(bad).to_str().unwrap().starts_with("req_"), "{bad:?}");
        }
    }
}
