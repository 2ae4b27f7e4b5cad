//! A TCP proxy with which a test takes one network path apart: later, for good, or in one direction only, while every other
//! path stays whole.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

/// Chunks of 16 KiB that are on their way in one direction of one connection.
const ON_THE_WAY: usize = 64;

/// Which way bytes are held. They are taken from the sender, who can't tell, and come out at [`Proxy::heal`], as they do
/// when TCP sends again what a network has swallowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    Neither,
    /// From the server: what was asked for happens, and nobody hears of it.
    Answers,
    Both,
}

#[derive(Clone, Copy, Debug)]
struct State {
    latency: Duration,
    held: Held,
    /// Connections of an earlier time are reset.
    resets: usize,
    /// Connections of an earlier time are silent for ever.
    stranded: usize,
}

/// The proxy. It serves until the test ends. Clones are the same proxy.
#[derive(Clone)]
pub struct Proxy {
    pub address: SocketAddr,
    state: Arc<watch::Sender<State>>,
}

impl Proxy {
    pub async fn start(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = State { latency: Duration::ZERO, held: Held::Neither, resets: 0, stranded: 0 };
        let proxy = Self { address, state: Arc::new(watch::Sender::new(state)) };
        let serving = proxy.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let serving = serving.clone();
                tokio::spawn(async move { serving.relay(client, to).await });
            }
        });
        proxy
    }

    /// In front of a database: its URL through the proxy, too.
    pub async fn of_database(url: &str) -> (Self, String) {
        let mut url = url::Url::parse(url).unwrap();
        let address = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap());
        let proxy = Self::start(address.parse().unwrap()).await;
        url.set_port(Some(proxy.address.port())).unwrap();
        (proxy, url.to_string())
    }

    /// In front of a worker: its URL through the proxy, too.
    pub async fn of_worker(url: &str) -> (Self, String) {
        let proxy = Self::start(url.strip_prefix("http://").unwrap().parse().unwrap()).await;
        let url = format!("http://{}", proxy.address);
        (proxy, url)
    }

    /// Every byte comes so much later, in both directions.
    pub fn delay(&self, latency: Duration) {
        self.state.send_modify(|state| state.latency = latency);
    }

    /// Cuts the path; connections stay open, and new ones are taken.
    pub fn hold(&self, held: Held) {
        self.state.send_modify(|state| state.held = held);
    }

    /// Everything that is held comes through, and what follows.
    pub fn heal(&self) {
        self.hold(Held::Neither);
    }

    /// Resets every connection there is.
    pub fn reset(&self) {
        self.state.send_modify(|state| state.resets += 1);
    }

    /// Every connection there is stays open and is silent for ever, as behind a firewall that has forgotten it. New ones
    /// work.
    pub fn strand(&self) {
        self.state.send_modify(|state| state.stranded += 1);
    }

    async fn relay(&self, mut client: TcpStream, to: SocketAddr) {
        let mut state = self.state.subscribe();
        let now = *state.borrow();
        // A server that is not there refuses: so does the proxy.
        let Ok(mut server) = TcpStream::connect(to).await else {
            let _ = client.set_zero_linger();
            return;
        };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let up = |state: &State| state.held == Held::Both || state.stranded > now.stranded;
        let down = |state: &State| state.held != Held::Neither || state.stranded > now.stranded;
        {
            let (from_client, to_client) = tokio::io::split(&mut client);
            let (from_server, to_server) = tokio::io::split(&mut server);
            tokio::select! {
                _ = async {
                    tokio::join!(
                        pump(from_client, to_server, self.state.subscribe(), up),
                        pump(from_server, to_client, self.state.subscribe(), down),
                    )
                } => {}
                _ = state.wait_for(|state| state.resets > now.resets) => {}
            }
        }
        if self.state.borrow().resets > now.resets {
            let _ = (client.set_zero_linger(), server.set_zero_linger());
        }
    }
}

/// One direction of one connection, to its end.
async fn pump(
    mut from: ReadHalf<&mut TcpStream>,
    mut to: WriteHalf<&mut TcpStream>,
    mut state: watch::Receiver<State>,
    held: impl Fn(&State) -> bool,
) {
    let (taken, mut given) = mpsc::channel::<(Instant, Vec<u8>)>(ON_THE_WAY);
    let latency = state.clone();
    let read = async move {
        let mut buffer = vec![0; 16 * 1024];
        loop {
            // A connection that breaks ends as one that is closed.
            let count = from.read(&mut buffer).await.unwrap_or(0);
            let due = Instant::now() + latency.borrow().latency;
            if taken.send((due, buffer[..count].to_vec())).await.is_err() || count == 0 {
                return;
            }
        }
    };
    let write = async move {
        while let Some((due, bytes)) = given.recv().await {
            sleep_until(due).await;
            let _ = state.wait_for(|state| !held(state)).await;
            if bytes.is_empty() {
                break;
            }
            if to.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(read, write);
}
