//! Tells gRPC's requests from others on the same port.

use axum::extract::Request;

const GRPC: &[u8] = b"application/grpc";

/// Whether a request is gRPC's, in any of its forms.
pub(in crate::api) fn is_grpc(request: &Request) -> bool {
    let kind = request.headers().get(::http::header::CONTENT_TYPE).and_then(|kind| kind.as_bytes().get(..GRPC.len()));
    // Case does not matter in a media type (RFC 9110, 8.3.1).
    kind.is_some_and(|kind| kind.eq_ignore_ascii_case(GRPC))
}
