//! The service's errors in HTTP's words.

use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};

use crate::service::{Code, ServiceError};

/// The response that says why not.
pub(super) fn tell(error: &ServiceError) -> Response {
    let code = match error.code {
        Code::InvalidArgument | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        // The server's fault, which only its operator can mend.
        Code::FailedPrecondition if error.reason == "BLOB_STORE_REFUSED" => StatusCode::SERVICE_UNAVAILABLE,
        // What is asked for was there, and is not any more.
        Code::FailedPrecondition => StatusCode::GONE,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Cancelled | Code::Internal | Code::DataLoss => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let mut response = (code, format!("{}\n", error.message)).into_response();
    if code == StatusCode::UNAUTHORIZED {
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if let Some(wait) = error.retry_after {
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_is_told_in_https_words() {
        let told = |error: &ServiceError| tell(error).status().as_u16();
        let of = |code| ServiceError::new(code, "X", "x");
        assert_eq!(told(&of(Code::FailedPrecondition)), 410);
        assert_eq!(told(&ServiceError::new(Code::FailedPrecondition, "BLOB_STORE_REFUSED", "x")), 503);
        assert_eq!(told(&of(Code::DataLoss)), 500);
        assert_eq!(told(&of(Code::DeadlineExceeded)), 504);
        assert_eq!((told(&ServiceError::shutting_down()), told(&of(Code::NotFound))), (503, 404));
        let wait = std::time::Duration::from_millis(1_200);
        let slow = ServiceError::retry(Code::ResourceExhausted, "X", "x", wait);
        assert_eq!(tell(&slow).headers()[header::RETRY_AFTER], "2");
    }
}
