//! The doors of the real program while somebody leans on them.

use std::time::{Duration, Instant};

use tidemill::pb::ListFilesRequest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{crowds::alone, server::Server, support::patience::ends};

/// `GET /healthz` on a connection of its own.
async fn is_healthy(server: &Server) -> bool {
    let ask = async {
        let mut tcp = TcpStream::connect(server.address()).await?;
        tcp.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await?;
        let mut said = String::new();
        tcp.read_to_string(&mut said).await?;
        Ok::<_, std::io::Error>(said.starts_with("HTTP/1.1 200") && said.ends_with("ok\n"))
    };
    ends("it says how it is", ask).await.unwrap_or(false)
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_beyond_the_descriptors_cost_nothing_and_keep_nobody_out() {
    let _alone = alone().await;
    let (server, started) = (Server::start_with_files(&[], 256).await, Instant::now());
    let mut idle = Vec::new();
    for at in 0..600 {
        idle.push(TcpStream::connect(server.address()).await.unwrap());
        if at % 50 == 0 {
            assert!(is_healthy(&server).await, "after {at} idle connections");
        }
    }
    let (used, began) = (server.processor_time(), Instant::now());
    for _ in 0..20 {
        assert!(is_healthy(&server).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let share = (server.processor_time() - used).as_secs_f64() / began.elapsed().as_secs_f64();
    assert!(share < 0.2, "{:.0}% of a core with nothing to do", share * 100.0);
    let mut client = server.client().await;
    client.list_files(ListFilesRequest::default()).await.unwrap();
    let open: f64 = server.metric("tidemill_connections ").await.unwrap().parse().unwrap();
    assert!(open <= 128.0, "{open} connections of 256 descriptors");
    let closed = server.metric("tidemill_connections_closed_total{reason=\"gave_way\"}").await.unwrap();
    assert!(closed.parse::<u64>().unwrap() >= 400, "{closed}");
    let said = server.log().matches("as many connections are open as may be").count();
    let seconds = usize::try_from(started.elapsed().as_secs()).unwrap();
    assert!((1..6 + seconds).contains(&said), "said {said} times in {seconds} s");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_who_is_refused_again_and_again_does_not_fill_the_log() {
    let (server, started) = (Server::start(&[]).await, Instant::now());
    let client = reqwest::Client::new();
    for at in 0..300 {
        let request =
            client.get(format!("http://{}/healthz", server.address())).header("host", format!("evil{at}.example"));
        assert_eq!(request.send().await.unwrap().status().as_u16(), 421);
        let page = client.post(format!("http://{}/x", server.address())).header("origin", "https://evil.example");
        assert_eq!(page.send().await.unwrap().status().as_u16(), 403);
    }
    let log = server.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("evil")).collect();
    let minutes = usize::try_from(started.elapsed().as_secs() / 60).unwrap();
    assert!((1..=2 * (1 + minutes)).contains(&lines.len()), "one a minute: {} lines, first {}", lines.len(), lines[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_without_ca_certificates_can_run_a_server() {
    let nothing = [("SSL_CERT_FILE", "/nonexistent/ca.pem"), ("SSL_CERT_DIR", "/nonexistent")];
    let nothing = nothing.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let server = Server::in_environment(&["--worker", "https://127.0.0.1:9"], nothing.to_vec(), None).await;
    let mut client = server.client().await;
    client.list_files(ListFilesRequest::default()).await.unwrap();
    assert!(server.log().contains("SSL_CERT_FILE"), "{}", server.log());
}
