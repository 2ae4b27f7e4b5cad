//! The gate that every RPC passes: it finds the caller, and gives the call a span, a count and a time.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use hyper::body::Frame;
use prost::Message;
use tonic::{Code, Status};
use tracing::{Instrument, Span};

use super::{
    status::{error, unreadable},
    timely::Timely,
};
use crate::{
    access::{Account, Caller, Denied, Held, Peer, Received},
    api::{
        gate::{Gate, TraceId, trace_id},
        http::observed::{Observer, observed},
    },
    pb,
    service::ServiceError,
    telemetry::seldom,
};

/// Counts RPCs that have ended, by `method` and `code`.
const REQUESTS: &str = "tidemill_grpc_requests_total";
/// Seconds that RPCs took, streams to their end, by `method` and `code`.
const SECONDS: &str = "tidemill_grpc_request_seconds";
/// Prefixes of the paths that need no token.
const OPEN: [&str; 2] = ["/grpc.health.", REFLECTION];
const REFLECTION: &str = "/grpc.reflection.";
/// The streaming methods that read objects.
const READS: [&str; 2] = ["StreamResults", "DownloadFile"];

/// gRPC's gate: that of every protocol, and the methods that exist.
pub(super) struct Methods {
    gate: Arc<Gate>,
    /// The methods by path. Others get no label of their own: clients must not be able to create labels.
    known: HashMap<String, Method>,
}

/// A method that exists.
#[derive(Clone, Debug)]
struct Method {
    name: Arc<str>,
    class: Class,
}

/// What a call of a method keeps busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// Little, for a short time.
    Call,
    /// A place for uploads, once it has begun.
    Upload,
    /// A long stream that costs little.
    Watch,
    /// A stream that reads objects.
    Download,
}

impl Methods {
    pub(super) fn new(gate: Arc<Gate>) -> Self {
        metrics::describe_counter!(REQUESTS, "RPCs that have ended, by method and code");
        metrics::describe_histogram!(SECONDS, metrics::Unit::Seconds, "how long RPCs took, streams to their end");
        Self { gate, known: methods() }
    }

    fn caller(&self, path: &str, known: bool, headers: &HeaderMap) -> Result<Caller, Status> {
        if !known {
            return Err(no_such_method());
        }
        // Whoever asks whether the server lives is never told to slow down.
        let open = OPEN.iter().any(|open| path.starts_with(open));
        if open { Ok(Caller::anonymous()) } else { Ok(self.gate.caller(headers)?) }
    }

    /// Counts the call's stream for the caller, until the result is dropped.
    fn hold(&self, class: Class, account: &Account) -> Result<Option<Held>, ServiceError> {
        Ok(match class {
            Class::Call | Class::Upload => None,
            Class::Watch => Some(self.gate.watch(account)?),
            Class::Download => Some(self.gate.download(account)?),
        })
    }
}

/// The caller of a request, which the gate has let in.
///
/// # Errors
/// `UNAUTHENTICATED` if it did not, which can't happen.
pub(super) fn caller_of<T>(request: &tonic::Request<T>) -> Result<Caller, Status> {
    request.extensions().get::<Caller>().cloned().ok_or_else(|| ServiceError::from(Denied::TokenMissing).into())
}

/// The account that pays for the request. Every request that passes the gate has one.
///
/// # Errors
/// Those of [`caller_of`].
pub(super) fn account_of<T>(request: &tonic::Request<T>) -> Result<Account, Status> {
    let account = request.extensions().get::<Account>().cloned();
    account.map_or_else(|| Ok(Account::of(&caller_of(request)?, None)), Ok)
}

/// The response to a call of a method that does not exist.
pub(in crate::api) fn unknown_method() -> Response {
    no_such_method().into_http()
}

fn no_such_method() -> Status {
    let message = "this server has no such method; server reflection lists its methods";
    error(Code::Unimplemented, "METHOD_UNKNOWN", message)
}

/// The gate, as a layer around the gRPC services.
pub(super) async fn pass(State(methods): State<Arc<Methods>>, mut request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let known = methods.known.get(path).cloned();
    let caller = methods.caller(path, known.is_some(), request.headers());
    let (method, class) = known.map_or_else(|| ("unknown".into(), Class::Call), |known| (known.name, known.class));
    let trace: Arc<str> = trace_id(request.headers()).into();
    let span = tracing::info_span!(
        "rpc",
        method = &*method,
        caller = caller.as_ref().map_or("", |caller| caller.owner.as_str()),
        trace_id = &*trace
    );
    let mut record = Record { span: span.clone(), method, began: Instant::now(), code: None };
    let peer = request.extensions().get::<Peer>().copied();
    let entered = caller.and_then(|caller| {
        let account = Account::of(&caller, peer.as_ref());
        let held = methods.hold(class, &account)?;
        Ok((caller, account, held))
    });
    let (response, held) = match entered {
        Ok((caller, account, held)) => {
            let extensions = request.extensions_mut();
            extensions.insert(caller);
            extensions.insert(account);
            extensions.insert(TraceId(trace));
            let request = match class {
                Class::Upload => {
                    let received = Received::default();
                    request.extensions_mut().insert(received.clone());
                    request.map(|body| observed(body, received))
                }
                // Whoever uses reflection may send the next question much later.
                Class::Watch if request.uri().path().starts_with(REFLECTION) => request,
                Class::Call | Class::Watch | Class::Download => request.map(Timely::wrap),
            };
            (in_time(request, next).instrument(span).await, held)
        }
        Err(status) => (status.into_http(), None),
    };
    let (parts, body) = response.into_parts();
    // An error before the first message has its code in the headers; otherwise it comes in the trailers.
    record.code = code(&parts.headers);
    Response::from_parts(parts, observed(body, Recorded { record, _held: held }))
}

/// The response, if it begins within the client's deadline.
async fn in_time(request: Request, next: Next) -> Response {
    let deadline = request.headers().get("grpc-timeout").and_then(|value| timeout(value.to_str().ok()?));
    let response = match deadline {
        Some(deadline) => match tokio::time::timeout(deadline, next.run(request)).await {
            Ok(response) => response,
            Err(_) => {
                let message = format!("there was no answer within the call's deadline of {deadline:?}");
                error(Code::DeadlineExceeded, "DEADLINE_EXCEEDED", message).into_http()
            }
        },
        None => next.run(request).await,
    };
    // An error before the first message has everything in the headers.
    match Status::from_header_map(response.headers()) {
        Some(status) if status.details().is_empty() => unreadable(status).into_http(),
        _ => response,
    }
}

/// A deadline as gRPC over HTTP/2 writes it in `grpc-timeout`.
pub(super) fn timeout(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if number.len() > 8 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number: u64 = number.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3_600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// Refuses requests to a method's path that are not gRPC: from a browser, curl, or a form on another site's page.
pub(super) async fn only_grpc(request: Request, next: Next) -> Response {
    if super::is_grpc(&request) {
        return next.run(request).await;
    }
    let code = if request.method() == http::Method::POST {
        StatusCode::UNSUPPORTED_MEDIA_TYPE
    } else {
        StatusCode::METHOD_NOT_ALLOWED
    };
    let text =
        "this is a method of tidemill's gRPC API: call it with a gRPC or gRPC-Web client, or use the tidemill CLI\n";
    (code, [(http::header::ALLOW, "POST")], text).into_response()
}

fn code(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()))
}

/// Reports an RPC when it is dropped, however it ended.
struct Record {
    span: Span,
    method: Arc<str>,
    began: Instant,
    /// `None`: it has not ended yet. If it is dropped like this, the client has gone away.
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
            Code::Internal | Code::Unknown | Code::DataLoss => seldom!(error, ?code, ?elapsed, "rpc failed"),
            _ => tracing::debug!(?code, ?elapsed, "rpc ended"),
        }
    }
}

/// Looks at a response's body for its end.
struct Recorded {
    record: Record,
    /// The caller's count of streams, while this one lasts.
    _held: Option<Held>,
}

impl Observer for Recorded {
    fn span(&self) -> Span {
        self.record.span.clone()
    }

    fn passed(&mut self, frame: &Frame<Bytes>) {
        if let Some(trailers) = frame.trailers_ref() {
            self.record.code = code(trailers);
        }
    }
}

/// Every method of every service, by its path.
fn methods() -> HashMap<String, Method> {
    let sets = [pb::FILE_DESCRIPTOR_SET, tonic_health::pb::FILE_DESCRIPTOR_SET];
    let files = sets.iter().flat_map(|set| {
        prost_types::FileDescriptorSet::decode(*set).expect("a descriptor set that the build made").file
    });
    let mut all = HashMap::new();
    for file in files {
        for service in &file.service {
            for method in &service.method {
                let name = format!("{}.{}/{}", file.package(), service.name(), method.name());
                let class = match (method.client_streaming(), method.server_streaming()) {
                    (true, _) => Class::Upload,
                    (false, false) => Class::Call,
                    (false, true) if READS.contains(&method.name()) => Class::Download,
                    (false, true) => Class::Watch,
                };
                all.insert(format!("/{name}"), Method { name: name.into(), class });
            }
        }
    }
    for version in ["v1", "v1alpha"] {
        let path = format!("{REFLECTION}{version}.ServerReflection/ServerReflectionInfo");
        all.insert(path.clone(), Method { name: path[1..].into(), class: Class::Watch });
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{CallerLimits, Limiter};

    #[test]
    fn only_known_methods_become_labels() {
        let limits = Arc::new(Limiter::new(CallerLimits::default()));
        let methods = Methods::new(Arc::new(Gate::new(None, limits)));
        let class = |path: &str| methods.known.get(path).map(|method| (method.name.to_string(), method.class));
        for (name, wanted) in [
            ("tidemill.v1.BatchService/GetBatch", Class::Call),
            ("tidemill.v1.BatchService/UploadFile", Class::Upload),
            ("tidemill.v1.BatchService/WatchBatch", Class::Watch),
            ("tidemill.v1.BatchService/WatchBatches", Class::Watch),
            ("tidemill.v1.BatchService/StreamResults", Class::Download),
            ("tidemill.v1.BatchService/DownloadFile", Class::Download),
            ("grpc.health.v1.Health/Watch", Class::Watch),
            ("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Class::Watch),
        ] {
            assert_eq!(class(&format!("/{name}")), Some((name.to_owned(), wanted)));
        }
        assert_eq!(class("/tidemill.v1.BatchService/Made-up"), None);
    }

    #[test]
    fn deadlines_are_read_as_grpc_writes_them() {
        assert_eq!(timeout("10S"), Some(Duration::from_secs(10)));
        assert_eq!(timeout("1000m"), Some(Duration::from_secs(1)));
        assert_eq!(timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3_600)));
        assert_eq!(timeout("0n"), Some(Duration::ZERO));
        for bad in ["", "S", "10", "10s", "-1S", "+1S", "999999999S", "1.5S", "1é"] {
            assert_eq!(timeout(bad), None, "{bad}");
        }
    }

    #[test]
    fn every_end_is_counted() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        metrics::with_local_recorder(&recorder, || {
            let limits = Arc::new(Limiter::new(CallerLimits::default()));
            let methods = Methods::new(Arc::new(Gate::new(None, limits)));
            for code in [Some(Code::Ok), Some(Code::NotFound), Some(Code::NotFound), None] {
                let method = methods.known["/tidemill.v1.BatchService/GetBatch"].name.clone();
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
