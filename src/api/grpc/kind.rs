//! Tells gRPC's requests from others on the same port.

use axum::extract::Request;

/// Whether a request is gRPC's, in any of its forms.
pub(in crate::api) fn is_grpc(request: &Request) -> bool {
    let kind = request.headers().get(::http::header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}
