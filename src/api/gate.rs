//! What every RPC passes: who calls, a span, a count and a time.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use axum::{
    body::{Body, HttpBody},
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use bytes::Bytes;
use http::HeaderMap;
use hyper::body::{Frame, SizeHint};
use prost::Message;
use tonic::{Code, Status};
use tracing::{Instrument, Span};

use super::{
    auth::{Caller, Tokens},
    limits::Limiter,
    pace::Received,
    status::{error, unreadable},
};
use crate::pb;

/// Counts RPCs that have ended, by `method` and `code`.
const REQUESTS: &str = "tidemill_grpc_requests_total";
/// Seconds that RPCs took, streams to their end, by `method` and `code`.
const SECONDS: &str = "tidemill_grpc_request_seconds";
/// Where the packages of calls that need no token begin.
const OPEN: [&str; 2] = ["/grpc.health.", "/grpc.reflection."];

/// The trace that a request belongs to (W3C Trace Context), 32 hex digits. An extension of every request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceId(pub Arc<str>);

/// What the gate needs to know.
pub(super) struct Gate {
    tokens: Option<Tokens>,
    limits: Arc<Limiter>,
    /// The paths that exist: a client must not be able to make up new label values.
    methods: HashMap<String, Arc<str>>,
}

impl Gate {
    pub(super) fn new(tokens: Option<Tokens>, limits: Arc<Limiter>) -> Self {
        metrics::describe_counter!(REQUESTS, "RPCs that have ended, by method and code");
        metrics::describe_histogram!(SECONDS, metrics::Unit::Seconds, "how long RPCs took, streams to their end");
        Self { tokens, limits, methods: methods() }
    }

    /// The method's name, and whether there is one.
    fn method(&self, path: &str) -> (Arc<str>, bool) {
        self.methods.get(path).map_or_else(|| ("unknown".into(), false), |name| (name.clone(), true))
    }

    fn caller(&self, path: &str, known: bool, headers: &HeaderMap) -> Result<Caller, Status> {
        if !known {
            return Err(unknown_method());
        }
        // Whoever asks whether the server lives is never told to slow down.
        if OPEN.iter().any(|open| path.starts_with(open)) {
            return Ok(Caller::anonymous());
        }
        let caller = match &self.tokens {
            Some(tokens) => tokens.authenticate(headers)?,
            // With client certificates only, TLS has already refused whoever has none.
            None => Caller::anonymous(),
        };
        self.limits.request(&caller.owner)?;
        Ok(caller)
    }
}

/// There is no such method.
pub(super) fn unknown_method() -> Status {
    let message = "this server has no such method; its reflection lists those that it has";
    error(Code::Unimplemented, "METHOD_UNKNOWN", message)
}

/// The gate, as a layer around the gRPC services.
pub(super) async fn pass(State(gate): State<Arc<Gate>>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let (method, known) = gate.method(path);
    let caller = gate.caller(path, known, request.headers());
    let trace: Arc<str> = trace_id(request.headers()).into();
    let span = tracing::info_span!(
        "rpc",
        method = &*method,
        caller = caller.as_ref().map_or("", |caller| caller.owner.as_str()),
        trace_id = &*trace
    );
    let record = Record { span: span.clone(), method, began: Instant::now(), code: None };
    let response = match caller {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            request.extensions_mut().insert(TraceId(trace));
            let received = Received::default();
            request.extensions_mut().insert(received.clone());
            let request = request.map(|body| received.count(body));
            let response = next.run(request).instrument(span).await;
            // An error before the first message has everything in the headers.
            match Status::from_header_map(response.headers()) {
                Some(status) if status.details().is_empty() => unreadable(status).into_http(),
                _ => response,
            }
        }
        Err(status) => status.into_http(),
    };
    let (parts, body) = response.into_parts();
    let mut record = record;
    // An error before the first message has its code in the headers; otherwise it comes in the trailers.
    record.code = code(&parts.headers);
    Response::from_parts(parts, Body::new(Recorded { body, record }))
}

/// The trace id of a valid `traceparent`, or a new one.
fn trace_id(headers: &HeaderMap) -> String {
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

fn code(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()))
}

/// Reports an RPC when it is dropped, however it ended.
struct Record {
    span: Span,
    method: Arc<str>,
    began: Instant,
    /// None: it has not ended. If it never does, the client went away.
    code: Option<Code>,
}

impl Drop for Record {
    fn drop(&mut self) {
        let code = self.code.unwrap_or(Code::Cancelled);
        let elapsed = self.began.elapsed();
        let labels = [("method", self.method.to_string()), ("code", format!("{code:?}"))];
        metrics::counter!(REQUESTS, &labels).increment(1);
        metrics::histogram!(SECONDS, &labels).record(elapsed.as_secs_f64());
        let _entered = self.span.enter();
        match code {
            Code::Internal | Code::Unknown | Code::DataLoss => tracing::error!(?code, ?elapsed, "rpc failed"),
            _ => tracing::debug!(?code, ?elapsed, "rpc ended"),
        }
    }
}

/// A response body that is looked at for its end.
struct Recorded {
    body: Body,
    record: Record,
}

impl HttpBody for Recorded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        let _entered = this.record.span.enter();
        let polled = Pin::new(&mut this.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && let Some(trailers) = frame.trailers_ref()
        {
            this.record.code = code(trailers);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The path of every method of every service.
fn methods() -> HashMap<String, Arc<str>> {
    let sets = [pb::FILE_DESCRIPTOR_SET, tonic_health::pb::FILE_DESCRIPTOR_SET];
    let files = sets.iter().flat_map(|set| {
        prost_types::FileDescriptorSet::decode(*set).expect("a descriptor set that the build made").file
    });
    let mut all = HashMap::new();
    for file in files {
        for service in &file.service {
            for method in &service.method {
                let name = format!("{}.{}/{}", file.package(), service.name(), method.name());
                all.insert(format!("/{name}"), name.into());
            }
        }
    }
    for version in ["v1", "v1alpha"] {
        let name = format!("grpc.reflection.{version}.ServerReflection/ServerReflectionInfo");
        all.insert(format!("/{name}"), name.into());
    }
    all
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;
    use crate::api::CallerLimits;

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

    #[test]
    fn only_known_methods_become_labels() {
        let gate = Gate::new(None, Arc::new(Limiter::new(CallerLimits::default())));
        let method = |path: &str| gate.method(path).0.to_string();
        assert_eq!(method("/tidemill.v1.BatchService/GetBatch"), "tidemill.v1.BatchService/GetBatch");
        assert_eq!(method("/grpc.health.v1.Health/Watch"), "grpc.health.v1.Health/Watch");
        assert_eq!(method("/tidemill.v1.BatchService/Made-up"), "unknown");
    }

    #[test]
    fn every_end_is_counted() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        metrics::with_local_recorder(&recorder, || {
            let gate = Gate::new(None, Arc::new(Limiter::new(CallerLimits::default())));
            for code in [Some(Code::Ok), Some(Code::NotFound), Some(Code::NotFound), None] {
                let (method, _) = gate.method("/tidemill.v1.BatchService/GetBatch");
                drop(Record { span: Span::none(), method, began: Instant::now(), code });
            }
        });
        let text = recorder.handle().render();
        for (code, count) in [("Ok", 1), ("NotFound", 2), ("Cancelled", 1)] {
            let line = format!(r#"{REQUESTS}{{method="tidemill.v1.BatchService/GetBatch",code="{code}"}} {count}"#);
            assert!(text.contains(&line), "{line} in {text}");
        }
        assert!(text.contains(SECONDS));
    }
}
