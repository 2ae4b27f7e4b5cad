//! Takes connections and serves HTTP/1.1 and HTTP/2 on them, with and without TLS.
//!
//! - [`activity`]: how long a connection may go on doing what it does; pure.
//! - [`crowd`]: which connection gives way to a new one when there are as many as there may be; pure.
//! - [`limit`]: how many that is. [`tls`]: TLS from PEM files.
//! - [`connection`]: one connection from its first byte to its end. [`watched`]: its bytes, noted.

mod activity;
mod connection;
mod crowd;
mod limit;
pub(in crate::api) mod tls;
mod watched;

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::Router;
use parking_lot::Mutex;
use tokio::{
    net::{TcpListener, TcpStream},
    time::Instant,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    connection::Arrival,
    crowd::{Crowd, Id},
};
use crate::{access::Peer, telemetry::Seldom};

/// Connections that are open.
const CONNECTIONS: &str = "tidemill_connections";
/// Connections that the server ended or refused, by reason.
const CLOSED: &str = "tidemill_connections_closed_total";
/// Counts connections that could not be accepted because file descriptors or memory were lacking.
const ACCEPT_ERRORS: &str = "tidemill_accept_errors_total";

/// The pause after a failed accept; it doubles up to [`LONGEST_PAUSE`] while none works.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Between two log lines of the same trouble.
const QUIET: Duration = Duration::from_secs(10);
/// Connections beyond the limit that are served for [`activity::HEAD`] all the same, so that a health check gets through
/// when all places are taken by connections at work.
const GUESTS: usize = 16;

/// How connections are treated.
pub(in crate::api) struct Options {
    /// Connections at a time; none: as many as the descriptors allow, at most 10,000.
    pub(in crate::api) max_connections: Option<u32>,
    /// After which time a connection is asked to end.
    pub(in crate::api) max_age: Option<Duration>,
    /// None: no TLS.
    pub(in crate::api) tls: Option<TlsAcceptor>,
}

/// Accepts connections and keeps track of the open ones.
pub(in crate::api) struct Listener {
    service: Router,
    server: connection::Http,
    options: Options,
    most: usize,
    open: Mutex<Open>,
    guests: AtomicUsize,
    /// Asks all connections to end, each with its last response.
    closing: CancellationToken,
    /// Ends them at once.
    cut: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Default)]
struct Open {
    crowd: Crowd,
    /// Ends the connection.
    ends: HashMap<Id, CancellationToken>,
    next: Id,
}

impl Open {
    /// Ends a connection that gives way.
    fn end(&mut self, id: Id) {
        self.crowd.leave(id);
        if let Some(end) = self.ends.remove(&id) {
            end.cancel();
        }
    }
}

/// A connection's place among those that are open. It is given back when it is dropped.
struct Place {
    listener: Arc<Listener>,
    id: Id,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.listener.open.lock();
        open.crowd.leave(self.id);
        open.ends.remove(&self.id);
        metrics::gauge!(CONNECTIONS).decrement(1.0);
    }
}

/// A connection beyond the limit. Its count is given back when it is dropped.
struct Guest(Arc<Listener>);

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.guests.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Listener {
    pub(in crate::api) fn new(service: Router, options: Options) -> Arc<Self> {
        metrics::describe_gauge!(CONNECTIONS, "client connections that are open");
        metrics::describe_counter!(CLOSED, "client connections that the server ended or refused, by reason");
        metrics::describe_counter!(
            ACCEPT_ERRORS,
            "connections that could not be accepted because file descriptors or memory were lacking"
        );
        Arc::new(Self {
            service,
            server: connection::http(),
            most: limit::most(options.max_connections),
            options,
            open: Mutex::default(),
            guests: AtomicUsize::new(0),
            closing: CancellationToken::new(),
            cut: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Takes connections until `stop`. Then no more are taken, and those that are open are asked to end.
    pub(in crate::api) async fn run(self: &Arc<Self>, listener: TcpListener, stop: CancellationToken) {
        let (mut pause, said) = (PAUSE, Seldom::every(QUIET));
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((tcp, from)) => {
                    pause = PAUSE;
                    if self.take(tcp, from, &said) {
                        // One that gave way ends in a task of its own: its descriptor is free before the next is taken.
                        tokio::task::yield_now().await;
                    }
                }
                Err(error) if is_of_one_connection(&error) => {
                    tracing::debug!(%error, "a connection broke before it was taken");
                }
                Err(error) => {
                    metrics::counter!(ACCEPT_ERRORS).increment(1);
                    if let Some(unlogged) = said.may() {
                        tracing::warn!(
                            %error,
                            unlogged,
                            connections = self.open.lock().crowd.len(),
                            "no connection can be taken: idle ones are closed; raise the limit of open files (ulimit -n, \
                             LimitNOFILE=) or lower --max-connections"
                        );
                    }
                    {
                        let mut open = self.open.lock();
                        if let Some(id) = open.crowd.least_missed() {
                            open.end(id);
                            closed("descriptors");
                        }
                    }
                    tokio::select! {
                        () = stop.cancelled() => break,
                        () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
                    }
                }
            }
        }
        drop(listener);
        self.closing.cancel();
        self.tasks.close();
    }

    /// Waits until all connections have ended.
    pub(in crate::api) async fn ended(&self) {
        self.tasks.wait().await;
    }

    /// Ends what is left at once.
    pub(in crate::api) fn cut(&self) {
        self.cut.cancel();
    }

    /// Serves a new connection, if it finds a place. Returns whether another had to give way.
    fn take(self: &Arc<Self>, tcp: TcpStream, from: SocketAddr, said: &Seldom) -> bool {
        // Best effort: without it small responses come later.
        let _ = tcp.set_nodelay(true);
        let peer = Peer::of(from.ip());
        let mut gave_way = false;
        let arrival = {
            let mut open = self.open.lock();
            if open.crowd.len() >= self.most
                && let Some(victim) = open.crowd.gives_way(peer)
            {
                open.end(victim);
                closed("gave_way");
                gave_way = true;
            }
            if open.crowd.len() < self.most { Some(self.enter(&mut open, peer)) } else { None }
        };
        let arrival = arrival.or_else(|| self.guest());
        let full = gave_way || !matches!(arrival, Some(Arrival::Place(..)));
        if full && let Some(unlogged) = said.may() {
            tracing::warn!(
                %peer,
                unlogged,
                limit = self.most,
                "as many connections are open as may be: idle ones are closed for new ones; see --max-connections"
            );
        }
        match arrival {
            Some(arrival) => {
                self.tasks.spawn(connection::serve(self.clone(), tcp, peer, arrival));
            }
            None => closed("refused"),
        }
        gave_way
    }

    fn enter(self: &Arc<Self>, open: &mut Open, peer: Peer) -> Arrival {
        let (id, end) = (open.next, CancellationToken::new());
        open.next += 1;
        open.crowd.enter(id, peer, Instant::now());
        open.ends.insert(id, end.clone());
        metrics::gauge!(CONNECTIONS).increment(1.0);
        Arrival::Place(Place { listener: self.clone(), id }, end)
    }

    fn guest(self: &Arc<Self>) -> Option<Arrival> {
        let taken = self
            .guests
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |guests| (guests < GUESTS).then_some(guests + 1));
        taken.is_ok().then(|| Arrival::Guest { _counted: Guest(self.clone()) })
    }

    /// A place for a guest whose time is over, if there is one now.
    fn settle(self: &Arc<Self>, peer: Peer) -> Option<Arrival> {
        let mut open = self.open.lock();
        (open.crowd.len() < self.most).then(|| self.enter(&mut open, peer))
    }
}

fn closed(reason: &'static str) {
    metrics::counter!(CLOSED, "reason" => reason).increment(1);
}

/// Whether an accept failed because of that one connection: the next may work at once.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted, TimedOut};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted | TimedOut)
}
