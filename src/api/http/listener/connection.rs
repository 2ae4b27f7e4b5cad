//! One connection, from its first byte to its end.

use std::{
    convert::Infallible,
    future::pending,
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::body::Body;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::{
    Guest, Listener, Place,
    activity::{Ending, HEAD},
    closed,
    crowd::Id,
    watched::{Watch, Watched},
};
use crate::{
    access::Peer,
    api::http::observed::{Observer, observed},
};

/// A silent HTTP/2 connection is asked whether it still lives this often, and cut if no answer comes in this time.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));
/// RPCs at a time on one connection.
const STREAMS: u32 = 1_024;
/// HTTP/2 windows: bytes that one upload may send ahead, and all uploads of one connection together. Fifteen stalled
/// uploads do not block a sixteenth.
const WINDOWS: (u32, u32) = (1024 * 1024, 16 * 1024 * 1024);
/// The largest frame that is accepted. With HTTP/2's minimum of 16 KiB, an upload would come in sixteen times as many
/// pieces.
const FRAME: u32 = 256 * 1024;
/// The most bytes of a request's headers.
const HEADERS: u32 = 16 * 1024;
/// How long an idle connection that was asked to end has to do so.
const FAREWELL: Duration = Duration::from_secs(5);

pub(super) type Http = auto::Builder<TokioExecutor>;

/// How HTTP is spoken.
pub(super) fn http() -> Http {
    let mut server = Http::new(TokioExecutor::new());
    server
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Some(KEEPALIVE.0))
        .keep_alive_timeout(KEEPALIVE.1)
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(WINDOWS.0)
        .initial_connection_window_size(WINDOWS.1)
        .max_frame_size(FRAME)
        .max_header_list_size(HEADERS);
    // hyper's own limit would also end connections that are idle between two requests: `activity` tells them apart.
    server.http1().timer(TokioTimer::new()).header_read_timeout(None);
    server
}

/// How a connection was let in.
pub(super) enum Arrival {
    /// It has a place until it ends or the token asks it to.
    Place(Place, CancellationToken),
    /// It is beyond the limit, and ends after [`HEAD`] unless it finds a place by then.
    Guest { _counted: Guest },
}

impl Arrival {
    async fn gives_way(&self) {
        match self {
            Self::Place(_, end) => end.cancelled().await,
            Self::Guest { .. } => pending().await,
        }
    }
}

/// Serves a connection until it ends.
pub(super) async fn serve(listener: Arc<Listener>, tcp: TcpStream, peer: Peer, arrival: Arrival) {
    let Some(tls) = listener.options.tls.clone() else {
        return speak(listener, tcp, peer, arrival).await;
    };
    let handshake = timeout(HEAD, tls.accept(tcp));
    let stream = tokio::select! {
        biased;
        () = listener.cut.cancelled() => return,
        () = listener.closing.cancelled() => return,
        () = arrival.gives_way() => return,
        stream = handshake => stream,
    };
    match stream {
        Ok(Ok(stream)) => speak(listener, stream, peer, arrival).await,
        Ok(Err(error)) => tracing::debug!(%peer, %error, "a TLS handshake failed"),
        Err(_) => closed("silent"),
    }
}

async fn speak<S>(listener: Arc<Listener>, stream: S, peer: Peer, mut arrival: Arrival)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let watch = Arc::new(Watch::new());
    let requests = Arc::new(Requests { watch: watch.clone(), listener: listener.clone(), id: OnceLock::new() });
    requests.have(&arrival);
    let service = hyper::service::service_fn({
        let (router, requests) = (listener.service.clone(), requests.clone());
        move |request: Request<Incoming>| {
            let (router, open) = (router.clone(), OpenRequest::new(requests.clone()));
            answer(router, request, peer, open)
        }
    });
    let io = TokioIo::new(Watched::new(stream, watch.clone()));
    let mut connection = std::pin::pin!(listener.server.serve_connection(io, service));
    let began = Instant::now();
    // Not all at once, for those that came together would all come again together.
    let age = listener.options.max_age.map(|age| began + age.mul_f64(rand::random_range(0.9..1.1)));
    let (mut aged, mut guest_until) = (false, matches!(arrival, Arrival::Guest { .. }).then(|| began + HEAD));
    let (mut asked, mut last) = (false, None::<Instant>);
    loop {
        let due = watch.due();
        tokio::select! {
            biased;
            () = listener.cut.cancelled() => break,
            () = arrival.gives_way() => break,
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(%peer, error = &*error, "a connection broke");
                }
                break;
            }
            () = listener.closing.cancelled(), if !asked => {
                asked = true;
                connection.as_mut().graceful_shutdown();
            }
            () = watch.sooner.notified() => {}
            () = at(age), if !aged => {
                aged = true;
                connection.as_mut().graceful_shutdown();
            }
            () = at(guest_until) => match listener.settle(peer) {
                Some(place) => {
                    requests.have(&place);
                    arrival = place;
                    guest_until = None;
                }
                None => {
                    closed("refused");
                    break;
                }
            },
            () = at(last) => {
                if watch.is_idle() {
                    break;
                }
                last = None;
            }
            // Looked at once more: it may have become later meanwhile.
            () = at(due.map(|(at, _)| at)), if last.is_none() => match watch.due().filter(|(at, _)| *at <= Instant::now()) {
                Some((_, Ending::Silent)) => {
                    closed("silent");
                    break;
                }
                Some((_, Ending::Stalled)) => {
                    closed("stalled");
                    break;
                }
                Some((_, Ending::Idle)) => {
                    closed("idle");
                    connection.as_mut().graceful_shutdown();
                    last = Some(Instant::now() + FAREWELL);
                }
                None => {}
            },
        }
    }
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => pending().await,
    }
}

async fn answer(
    router: axum::Router,
    request: Request<Incoming>,
    peer: Peer,
    open: OpenRequest,
) -> Result<Response<Body>, Infallible> {
    let mut request = request.map(Body::new);
    request.extensions_mut().insert(peer);
    let response = router.oneshot(request).await?;
    Ok(response.map(|body| observed(body, open)))
}

/// The requests of one connection.
struct Requests {
    watch: Arc<Watch>,
    listener: Arc<Listener>,
    /// A guest has none, and does not give way.
    id: OnceLock<Id>,
}

/// A request until the end of its response.
struct OpenRequest(Arc<Requests>);

impl OpenRequest {
    fn new(requests: Arc<Requests>) -> Self {
        if requests.watch.began() == 1 {
            requests.tell();
        }
        Self(requests)
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        if self.0.watch.ended() == 0 {
            self.0.tell();
        }
    }
}

impl Requests {
    /// The connection has a place now.
    fn have(&self, arrival: &Arrival) {
        if let Arrival::Place(place, _) = arrival {
            // A connection gets one place in its life.
            let _ = self.id.set(place.id);
            self.tell();
        }
    }

    /// Tells the crowd whether the connection has a request. What counts is what is so under the lock: two threads may
    /// end and begin a request at the same moment.
    fn tell(&self) {
        if let Some(id) = self.id.get() {
            let mut open = self.listener.open.lock();
            let since = self.watch.is_idle().then(Instant::now);
            open.crowd.set_idle(*id, since);
        }
    }
}

/// A response's body keeps its request open.
impl Observer for OpenRequest {}
