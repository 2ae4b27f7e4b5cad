//! Receivers of every kind, each with the outcome that is promised for it.

use std::{
    io::Write as _,
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tidemill::{
    delivery::{
        Options, Webhooks,
        egress::{Guard, Policy},
        schedule::Schedule,
    },
    domain::webhook::{DeliveryState, ErrorKind, WebhookTarget},
    store::{AttemptRecord, DeliveryRecord},
};

use crate::{
    fixture::{Db, Running, settled, target},
    receiver::{Receiver, Reply},
};

crate::on_both!(what_each_answer_means, retry_after_is_honoured);

/// Delivers the end of one batch there and returns what became of it.
async fn deliver(db: &Db, running: &Running, webhook: WebhookTarget) -> (DeliveryRecord, Vec<AttemptRecord>) {
    let _ = running;
    let batch = db.batch(Some(webhook), None).await;
    db.complete(&batch.id).await;
    let delivery = settled(db, &batch.id).await.remove(0);
    let attempts = db.attempts(&delivery.id).await;
    (delivery, attempts)
}

async fn what_each_answer_means(db: Db) {
    let running = db.start();
    let other = Receiver::always(200).await;
    for (status, attempts) in [
        (200, 1),
        (202, 1),
        (204, 1),
        (299, 1),
        (301, 3),
        (302, 3),
        (303, 3),
        (304, 3),
        (307, 3),
        (308, 3),
        (400, 3),
        (404, 3),
        (410, 1),
        (500, 3),
        (503, 3),
    ] {
        let elsewhere = other.url("/elsewhere");
        let receiver =
            Receiver::start(move |_, _| Reply::With(status, vec![("location", elsewhere.clone())], b"so".to_vec()))
                .await;
        let (delivery, log) = deliver(&db, &running, target(receiver.url("/hook"))).await;
        assert_eq!(receiver.requests().len(), attempts, "{status}");
        assert_eq!(log.len(), attempts, "{status}");
        assert!(log.iter().all(|one| one.http_status == Some(status)), "{status}");
        let good = (200..300).contains(&status);
        assert_eq!(delivery.state, if good { DeliveryState::Delivered } else { DeliveryState::Dead }, "{status}");
        if status == 410 {
            assert_eq!(log[0].error_kind, Some(ErrorKind::Gone));
        }
        if !matches!(status, 204 | 304) {
            assert_eq!(log[0].response_excerpt.as_deref(), Some("so"), "{status}");
        }
    }
    assert!(other.requests().is_empty(), "no redirect is followed");
    running.stop().await;
}

async fn retry_after_is_honoured(db: Db) {
    let running = db.start();
    let receiver = Receiver::start(|n, _| match n {
        1 => Reply::With(429, vec![("retry-after", "1".into())], Vec::new()),
        _ => Reply::Status(200),
    })
    .await;
    let began = Instant::now();
    let (delivery, log) = deliver(&db, &running, target(receiver.url("/"))).await;
    assert_eq!((delivery.state, log.len()), (DeliveryState::Delivered, 2));
    assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
    running.stop().await;
    // The others nobody waits for here: what is due tells. Without one the wait is some 1,000 s.
    let schedule = Schedule::try_new(vec![Duration::from_secs(1_000)]).unwrap();
    let running = Running::start(Webhooks::new(db.store.clone(), Options { schedule, ..db.options() }).unwrap());
    for (value, seconds) in [
        ("soon".to_owned(), 700..=1_200),
        ("-1".to_owned(), 700..=1_200),
        ("1e18".to_owned(), 700..=1_200),
        (httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(3_000)), 2_700..=3_000),
        ("1000000000000000000".to_owned(), 3_400..=3_600),
    ] {
        let receiver =
            Receiver::start(move |_, _| Reply::With(503, vec![("retry-after", value.clone())], Vec::new())).await;
        let batch = db.batch(Some(target(receiver.url("/"))), None).await;
        db.complete(&batch.id).await;
        receiver.wait(1).await;
        let due = crate::fixture::eventually("a next attempt", || async {
            let one = db.deliveries(&batch.id).await.remove(0);
            (one.state == DeliveryState::Pending).then_some(one.next_attempt_at).flatten()
        })
        .await;
        let wait = due.since(tidemill::domain::Timestamp::now()).as_secs();
        assert!(seconds.contains(&wait), "{wait} s");
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_manners() {
    let db = Db::sqlite().await;
    let running = db.start();
    let bomb = {
        let mut zip = Vec::new();
        // A valid gzip stream of nothing but zeros would do; not even its header must be looked at.
        zip.write_all(&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3]).unwrap();
        zip.resize(40_000, 0);
        zip
    };
    let brief = Duration::from_millis(400);
    // For whoever has answered by then, on any machine.
    let ample = Duration::from_secs(10);
    let mut attempts = Vec::new();
    for (name, timeout, reply, state, kind) in [
        ("drips headers", brief, Reply::DripHeaders, DeliveryState::Dead, Some(ErrorKind::Timeout)),
        ("never answers", brief, Reply::Silent, DeliveryState::Dead, Some(ErrorKind::Timeout)),
        // It has said that it has the event; how long it talks after that is its own business.
        ("drips a good body", ample, Reply::DripBody(200), DeliveryState::Delivered, None),
        ("drips a bad body", ample, Reply::DripBody(500), DeliveryState::Dead, Some(ErrorKind::Status)),
        ("never ends a good body", ample, Reply::Endless(200), DeliveryState::Delivered, None),
        ("never ends a bad body", ample, Reply::Endless(404), DeliveryState::Dead, Some(ErrorKind::Status)),
        ("resets", ample, Reply::Reset, DeliveryState::Dead, Some(ErrorKind::Transport)),
        ("is no HTTP server", ample, Reply::Nonsense, DeliveryState::Dead, Some(ErrorKind::Transport)),
        (
            "sends a gzip bomb",
            ample,
            Reply::With(200, vec![("content-encoding", "gzip".into())], bomb),
            DeliveryState::Delivered,
            None,
        ),
        (
            "says more than is kept",
            ample,
            Reply::With(500, vec![], "é\0\n".repeat(50_000).into_bytes()),
            DeliveryState::Dead,
            Some(ErrorKind::Status),
        ),
    ] {
        let (db, running) = (&db, &running);
        attempts.push(async move {
            let receiver = Receiver::start(move |_, _| reply.clone()).await;
            let webhook = WebhookTarget { max_attempts: 1, timeout, ..target(receiver.url("/")) };
            let (delivery, log) = deliver(db, running, webhook).await;
            (name, state, kind, receiver, delivery, log)
        });
    }
    // Some of them never end by themselves: that all are settled says that an attempt ends with its timeout.
    for (name, state, kind, receiver, delivery, log) in futures::future::join_all(attempts).await {
        assert_eq!((delivery.state, log[0].error_kind), (state, kind), "{name}: {log:?}");
        assert_eq!((log.len(), receiver.requests().len()), (1, 1), "{name}");
        let excerpt = log[0].response_excerpt.clone().unwrap_or_default();
        assert!(excerpt.chars().count() <= 200 && !excerpt.contains('\0'), "{name}");
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_there_and_never_accepting() {
    let db = Db::sqlite().await;
    let running = db.start();
    // A port that is taken, so that nobody else gets it, and not listened at.
    let taken = tokio::net::TcpSocket::new_v4().unwrap();
    taken.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let closed = taken.local_addr().unwrap();
    let (delivery, log) = deliver(&db, &running, target(format!("http://{closed}/"))).await;
    assert_eq!((delivery.state, log.len(), log[0].error_kind), (DeliveryState::Dead, 3, Some(ErrorKind::Connect)));
    // It listens, but nobody ever takes the connection.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let webhook = WebhookTarget { max_attempts: 1, timeout: Duration::from_millis(300), ..target(url) };
    let (delivery, log) = deliver(&db, &running, webhook).await;
    assert_eq!((delivery.state, log[0].error_kind), (DeliveryState::Dead, Some(ErrorKind::Timeout)));
    // It takes the connection and breaks it before it has read a byte.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let resetting = tokio::spawn(async move {
        for _ in 0..3 {
            listener.accept().await.unwrap().0.set_zero_linger().unwrap();
        }
    });
    let (delivery, log) = deliver(&db, &running, target(url)).await;
    assert_eq!((delivery.state, log.len()), (DeliveryState::Dead, 3));
    // Whether it breaks before or after the connection is there is the machine's choice.
    for attempt in &log {
        assert!(matches!(attempt.error_kind, Some(ErrorKind::Transport | ErrorKind::Connect)), "{attempt:?}");
    }
    resetting.await.unwrap();
    // No such name: it may come to be, so it is tried again.
    let (delivery, log) = deliver(&db, &running, target("http://no-such-name.invalid/".into())).await;
    assert_eq!((delivery.state, log.len(), log[0].error_kind), (DeliveryState::Dead, 3, Some(ErrorKind::Dns)));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forbidden_address_is_dead_at_once_and_never_connected_to() {
    let db = Db::sqlite().await;
    let receiver = Receiver::always(200).await;
    let port = receiver.address.port();
    let options = Options { guard: Guard::new(Policy::default()), ..db.options() };
    let running = Running::start(Webhooks::new(db.store.clone(), options).unwrap());
    for host in ["127.0.0.1", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]", "localhost", "169.254.169.254"] {
        let (delivery, log) = deliver(&db, &running, target(format!("http://{host}:{port}/"))).await;
        assert_eq!((delivery.state, log.len()), (DeliveryState::Dead, 1), "{host}");
        assert_eq!(log[0].error_kind, Some(ErrorKind::ForbiddenAddress), "{host}");
    }
    assert!(receiver.requests().is_empty());
    running.stop().await;
}

/// A name that is public when the batch is created and this machine when it is sent to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_changes_its_mind_gains_nothing() {
    let db = Db::sqlite().await;
    let receiver = Receiver::always(200).await;
    let asked = Arc::new(AtomicUsize::new(0));
    let lookups = asked.clone();
    let guard = Guard::with_lookup(
        Policy::default(),
        Arc::new(move |_| {
            let first = lookups.fetch_add(1, Ordering::SeqCst) == 0;
            let address = if first { Ipv4Addr::new(93, 184, 215, 14) } else { Ipv4Addr::LOCALHOST };
            Box::pin(async move { Ok(vec![IpAddr::V4(address)]) })
        }),
    );
    let webhooks = Webhooks::new(db.store.clone(), Options { guard, ..db.options() }).unwrap();
    let url = format!("http://rebind.test:{}/", receiver.address.port());
    let webhook = webhooks.accept(tidemill::domain::webhook::WebhookConfig::new(url)).await.unwrap();
    let running = Running::start(webhooks);
    let (delivery, log) = deliver(&db, &running, webhook).await;
    assert_eq!((delivery.state, log.len()), (DeliveryState::Dead, 1));
    assert_eq!(log[0].error_kind, Some(ErrorKind::ForbiddenAddress));
    assert!(asked.load(Ordering::SeqCst) >= 2 && receiver.requests().is_empty());
    running.stop().await;
}
