//! With real sockets and, where time matters, a clock that jumps to what is due next.

use axum::{body::Body, routing::get};
use futures::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

struct Running {
    address: SocketAddr,
    listener: Arc<Listener>,
    stop: CancellationToken,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
        self.listener.cut();
    }
}

/// A server of "/" and of "/endless", whose answer never ends.
async fn run(most: u32) -> Running {
    let endless = || async {
        let chunk = Ok::<_, io::Error>(bytes::Bytes::from_static(b"some\n"));
        Body::from_stream(futures::stream::iter([chunk]).chain(futures::stream::pending()))
    };
    let service = Router::new().route("/", get(async || "here\n")).route("/endless", get(endless));
    let listener = Listener::new(service, Options { max_connections: Some(most), max_age: None, tls: None });
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let stop = CancellationToken::new();
    tokio::spawn({
        let (listener, stop) = (listener.clone(), stop.clone());
        async move { listener.run(socket, stop).await }
    });
    Running { address, listener, stop }
}

impl Running {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// A connection with a request that never ends.
    async fn busy(&self) -> TcpStream {
        let mut tcp = self.connect().await;
        tcp.write_all(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut some = [0; 12];
        tcp.read_exact(&mut some).await.unwrap();
        assert_eq!(&some, b"HTTP/1.1 200");
        tcp
    }
}

/// A request on a connection that stays, and what is answered.
async fn ask(tcp: &mut TcpStream) -> io::Result<String> {
    tcp.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await?;
    let mut said = String::new();
    while !said.ends_with("here\n") {
        let mut some = [0; 1_024];
        match tcp.read(&mut some).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => said.push_str(&String::from_utf8_lossy(&some[..count])),
        }
    }
    Ok(said)
}

/// Reads until the other end closes the connection, and says how long that took.
async fn closed_after(tcp: &mut TcpStream) -> Duration {
    let began = Instant::now();
    // However it is closed.
    let _ = tcp.read_to_end(&mut Vec::new()).await;
    began.elapsed()
}

fn about(took: Duration, wanted: Duration) -> bool {
    took.abs_diff(wanted) < Duration::from_secs(1)
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_does_not_get_going_ends_after_ten_seconds() {
    let server = run(100).await;
    for begin in ["", "G", "GET / HTTP/1.1\r\nhost: x\r\n", "PRI * HTTP/2.0\r\n"] {
        let mut tcp = server.connect().await;
        tcp.write_all(begin.as_bytes()).await.unwrap();
        let took = closed_after(&mut tcp).await;
        assert!(about(took, activity::HEAD), "{begin:?}: {took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_comes_a_byte_a_second_is_not_waited_for() {
    let server = run(100).await;
    let (mut read, mut write) = server.connect().await.into_split();
    let began = Instant::now();
    tokio::spawn(async move {
        for byte in b"GET / HTTP/1.1\r\nhost: a-name-that-takes-its-time\r\n\r\n" {
            if write.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    });
    let mut said = Vec::new();
    let _ = read.read_to_end(&mut said).await;
    assert!(said.is_empty() && about(began.elapsed(), activity::HEAD), "{:?} {said:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn between_two_requests_there_is_time() {
    let server = run(100).await;
    let mut tcp = server.connect().await;
    ask(&mut tcp).await.unwrap();
    tokio::time::sleep(Duration::from_secs(600)).await;
    ask(&mut tcp).await.unwrap();
    let took = closed_after(&mut tcp).await;
    assert!(about(took, activity::IDLE), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_request_may_take_its_time() {
    let server = run(100).await;
    let mut busy = server.busy().await;
    let more = tokio::time::timeout(Duration::from_secs(3_600), busy.read_to_end(&mut Vec::new())).await;
    assert!(more.is_err(), "it runs on");
}

#[tokio::test(start_paused = true)]
async fn an_http2_connection_without_requests_is_kept_for_a_while_and_then_ended() {
    let server = run(100).await;
    let mut tcp = server.connect().await;
    // The preface, empty SETTINGS, and no answer to anything.
    tcp.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let took = closed_after(&mut tcp).await;
    // hyper asks whether its client lives, and this one does not.
    assert!(took > activity::HEAD && took < Duration::from_secs(60), "{took:?}");
}

#[tokio::test]
async fn idle_connections_give_way_and_those_at_work_do_not() {
    let server = run(4).await;
    let mut busy = server.busy().await;
    let mut idle = Vec::new();
    for _ in 0..20 {
        let mut tcp = server.connect().await;
        ask(&mut tcp).await.unwrap();
        idle.push(tcp);
    }
    assert_eq!(server.listener.open.lock().crowd.len(), 4);
    for (at, tcp) in idle.iter_mut().enumerate() {
        assert_eq!(ask(tcp).await.is_ok(), at >= 17, "{at}: the longest idle one went first");
    }
    let more = tokio::time::timeout(Duration::from_millis(50), busy.read_to_end(&mut Vec::new())).await;
    assert!(more.is_err(), "the one at work is still served");
}

#[tokio::test]
async fn a_request_gets_through_when_all_places_are_at_work() {
    let server = run(2).await;
    let working = [server.busy().await, server.busy().await];
    let mut guest = server.connect().await;
    ask(&mut guest).await.unwrap();
    // But not without bound.
    let mut guests = Vec::new();
    for _ in 1..GUESTS {
        let mut tcp = server.connect().await;
        ask(&mut tcp).await.unwrap();
        guests.push(tcp);
    }
    let mut refused = server.connect().await;
    assert!(ask(&mut refused).await.is_err());
    drop(working);
}

#[tokio::test(start_paused = true)]
async fn a_guest_stays_if_there_is_a_place_for_it_by_then() {
    let server = run(1).await;
    let working = server.busy().await;
    let (mut first, mut second) = (server.connect().await, server.connect().await);
    ask(&mut first).await.unwrap();
    ask(&mut second).await.unwrap();
    drop(working);
    tokio::time::sleep(activity::HEAD + Duration::from_secs(1)).await;
    let stayed = [ask(&mut first).await.is_ok(), ask(&mut second).await.is_ok()];
    assert_eq!(stayed.into_iter().filter(|stayed| *stayed).count(), 1, "{stayed:?}: there was one place");
    assert_eq!(server.listener.guests.load(Ordering::Relaxed), 0);
}

#[tokio::test(start_paused = true)]
async fn whoever_reads_nothing_is_cut_some_time() {
    let flood = || async {
        Body::from_stream(futures::stream::repeat_with(|| Ok::<_, io::Error>(bytes::Bytes::from(vec![0; 65_536]))))
    };
    let service = Router::new().route("/", get(flood));
    let listener = Listener::new(service, Options { max_connections: Some(5), max_age: None, tls: None });
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let stop = CancellationToken::new();
    let running = tokio::spawn({
        let (listener, stop) = (listener.clone(), stop.clone());
        async move { listener.run(socket, stop).await }
    });
    let began = Instant::now();
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    while listener.open.lock().crowd.len() == 0 {
        tokio::task::yield_now().await;
    }
    stop.cancel();
    running.await.unwrap();
    listener.ended().await;
    assert!(about(began.elapsed(), activity::STALLED), "{:?}", began.elapsed());
}
