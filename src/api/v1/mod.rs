//! What lies below `/v1`, whichever dialect: OpenAI's and Anthropic's clients call the same server.
//!
//! - `problem`: errors, in both dialects. `body`: request bodies. `request`: who calls, ids, keys. `query`: lists' queries.
//!   `own`: what neither dialect knows.

pub(in crate::api) mod body;
pub(in crate::api) mod own;
pub(in crate::api) mod problem;
pub(in crate::api) mod query;
pub(in crate::api) mod request;

use axum::response::Response;
use http::Method;

use self::problem::{Dialect, Problem};

/// Whether a path is one of this API.
pub(in crate::api) fn is_below(path: &str) -> bool {
    path == "/v1" || path.starts_with("/v1/")
}

/// What a path of this API answers where there is nothing.
pub(in crate::api) fn nothing(method: &Method, path: &str) -> Response {
    Problem::unknown_url(method, path).respond(Dialect::of(path))
}
