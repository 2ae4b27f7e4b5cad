//! A handler that panics answers INTERNAL, and everything else goes on: without this its panic would end the
//! connection, and with it every other call that a client or a load balancer has on it. What one caller sends must not
//! end the server.

use std::panic::AssertUnwindSafe;

use crate::{
    api::{
        grpc::{crashed, is_grpc},
        v1::{
            self,
            problem::{Dialect, Problem},
        },
    },
    supervise::message,
    telemetry::seldom,
};
use axum::{
    extract::Request,
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures::FutureExt;
use http::StatusCode;

const MESSAGE: &str = "the server failed because of a bug; its log has the details";

/// Answers for a handler that panics.
pub(in crate::api) async fn caught(request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let is_grpc = is_grpc(&request);
    match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(panic) => {
            metrics::counter!("tidemill_calls_crashed_total").increment(1);
            seldom!(error, path, panic = message(&*panic), "a call has crashed, which is a bug");
            if is_grpc {
                crashed(MESSAGE)
            } else if v1::is_below(&path) {
                Problem::internal(MESSAGE).respond(Dialect::of(&path))
            } else {
                (StatusCode::INTERNAL_SERVER_ERROR, format!("{MESSAGE}\n")).into_response()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::{Router, body::Body, middleware, routing::get};
    use http::header;
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn a_call_that_panics_is_internal_and_others_go_on() {
        let app = Router::new()
            .route("/bad", get(async || -> &'static str { panic!("oh no") }))
            .route("/good", get(async || "good"))
            .layer(middleware::from_fn(caught));
        let call = async |path: &str, kind: &str| {
            let request = Request::builder().uri(path).header(header::CONTENT_TYPE, kind).body(Body::empty()).unwrap();
            app.clone().oneshot(request).await.unwrap()
        };
        let grpc = call("/bad", "application/grpc+proto").await;
        assert_eq!((grpc.status(), &grpc.headers()["grpc-status"]), (StatusCode::OK, &"13".parse().unwrap()));
        assert_eq!(call("/bad", "text/plain").await.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(call("/good", "text/plain").await.status(), StatusCode::OK);
    }
}
