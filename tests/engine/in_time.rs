//! What must not wait while a node takes on much at once.

use std::time::{Duration, Instant};

use sea_orm::{ConnectionTrait, DatabaseConnection, Statement};
use tidemill::{
    blobs::Blobs,
    domain::{BatchStatus, Timestamp},
    fleet::InFlight,
    scheduler::SchedulerOptions,
    sim::SimConfig,
};

use crate::direct;
use crate::{
    harness::{Node, Worker, chats, options},
    patience::until,
};

async fn number(database: &DatabaseConnection, sql: &str) -> i64 {
    let row = database.query_one_raw(Statement::from_string(database.get_database_backend(), sql)).await.unwrap();
    row.unwrap().try_get_by_index(0).unwrap()
}

/// Something that SQLite is busy with for about so long on this machine, as a query.
async fn work(database: &DatabaseConnection, long: Duration) -> String {
    let count = |most: u128| {
        format!(
            "SELECT count(*) FROM (WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < {most}) \
                 SELECT x FROM c)"
        )
    };
    const SOME: u128 = 100_000;
    let began = Instant::now();
    number(database, &count(SOME)).await;
    count((SOME * long.as_micros() / began.elapsed().as_micros()).max(1))
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_are_renewed_while_hundreds_of_segments_are_claimed() {
    const BATCHES: i64 = 150;
    let hour = Duration::from_secs(3_600);
    let worker = Worker::start(SimConfig { latency: hour, ..SimConfig::default() }).await;
    let folder = tempfile::tempdir().unwrap();
    let lease = Duration::from_secs(3);
    let options = SchedulerOptions { lease, request_timeout: hour, drain: Duration::ZERO, ..options() };
    let blobs = Blobs::directory(&folder.path().join("blobs")).unwrap();
    let node = Node::start_limited(folder.path(), blobs, &[], options, InFlight::Fixed(1_024)).await;
    for _ in 0..BATCHES {
        node.submit(&chats(1), 1).await;
    }
    let database = direct::connect(format!("sqlite://{}", folder.path().join("db").display())).await;
    // Each claim takes so long that the first leases would run out before the last segment is claimed.
    let slow = work(&database, 4 * lease / u32::try_from(BATCHES).unwrap()).await;
    let trigger = format!("CREATE TRIGGER slow AFTER UPDATE ON segments WHEN NEW.epoch > OLD.epoch BEGIN {slow}; END");
    database.execute_unprepared(&trigger).await.unwrap();
    let began = Instant::now();
    node.fleet.register(&worker.url()).await.unwrap();
    let leased = "SELECT count(*) FROM segments WHERE state = 'leased'";
    let mut late = 0;
    until("all are claimed", async || {
        let now = Timestamp::now().0;
        let expired = format!("{leased} AND lease_expires_at < {now}");
        late = late.max(number(&database, &expired).await);
        number(&database, leased).await == BATCHES
    })
    .await;
    assert!(began.elapsed() > lease, "this has tested nothing: {:?}", began.elapsed());
    assert_eq!(late, 0, "leases that ran out while others were claimed");
    assert_eq!(number(&database, "SELECT max(epoch) FROM segments").await, 1, "each is claimed once");
    node.stop().await;
}

/// The lines of a segment are parsed and sorted on a thread for what blocks. There is one such thread here, and it is taken.
#[test]
fn a_segments_lines_are_not_read_on_the_threads_that_serve() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let worker = Worker::start(SimConfig::default()).await;
        let folder = tempfile::tempdir().unwrap();
        let node = Node::start_on(folder.path(), Blobs::memory(), &[], options(), 8).await;
        let id = node.submit(&chats(20), 20).await;
        let (taking, taken) = tokio::sync::oneshot::channel();
        let (release, released) = std::sync::mpsc::channel::<()>();
        let blocking = tokio::task::spawn_blocking(move || {
            taking.send(()).unwrap();
            released.recv().unwrap();
        });
        taken.await.unwrap();
        node.fleet.register(&worker.url()).await.unwrap();
        let database = direct::connect(format!("sqlite://{}", folder.path().join("db").display())).await;
        let leased = "SELECT count(*) FROM segments WHERE state = 'leased'";
        until("it is claimed", async || number(&database, leased).await == 1).await;
        // Everything else goes on meanwhile: it has the time to be sent.
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(worker.sim.faults().received(), 0, "its lines were read on a thread that serves others");
        release.send(()).unwrap();
        blocking.await.unwrap();
        assert_eq!(node.ended(&id).await.status, BatchStatus::Completed);
        node.stop().await;
    });
}
