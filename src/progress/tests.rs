//! The streams against a real database.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use futures::{Stream, StreamExt};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use super::{hub::Asked, *};
use crate::{
    domain::{
        BatchStatus, Endpoint, Epoch, File, FileId, FileKind, LineSet, NewBatch, NodeId, Priority, Scope, SegmentIndex,
        SegmentRef, SegmentSpan, batch::DEFAULT_WINDOW,
    },
    fleet::{Fleet, FleetOptions, InFlight},
    scheduler::Troubles,
    store::{Commit, CreatedBatch, FinalObject, NewPart, StateEvent, Store},
};

/// A fleet that looks for no workers: it must not ask the database while a test has paused the clock.
async fn no_workers(store: &Store) -> Fleet {
    let options = FleetOptions { limit: InFlight::Fixed(1), ..FleetOptions::default() };
    let stop = CancellationToken::new();
    stop.cancel();
    Fleet::start(store.clone(), options, &TaskTracker::new(), stop).await.unwrap()
}

struct World {
    store: Store,
    hub: Hub,
    node: NodeId,
    folder: tempfile::TempDir,
    shutdown: CancellationToken,
    _stop: DropGuard,
}

impl World {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::sqlite(&folder.path().join("db")).await.unwrap();
        let shutdown = CancellationToken::new();
        let hub = Hub::new(store.clone(), no_workers(&store).await, Troubles::default(), shutdown.clone());
        let _stop = shutdown.clone().drop_guard();
        Self { store, hub, node: NodeId::generate(), folder, shutdown, _stop }
    }

    fn run(self) -> Self {
        let hub = self.hub.clone();
        tokio::spawn(async move { hub.run().await });
        self
    }

    /// A batch of ten lines in one segment.
    async fn batch(&self, owner: &str) -> BatchId {
        let id = FileId::generate();
        let file = File {
            id: id.clone(),
            owner: owner.into(),
            kind: FileKind::Input,
            filename: "f".into(),
            bytes: 100,
            line_count: 10,
            models: vec!["m".into()],
            endpoint: Some(Endpoint::ChatCompletions),
            created_at: Timestamp::now(),
            expires_at: None,
            object_key: Some(format!("in/{id}")),
            crc32c: None,
        };
        let span = SegmentSpan {
            index: SegmentIndex(0),
            first_line: 1,
            line_span: 10,
            requests: 10,
            offset: 0,
            length: 100,
            models: 1,
            crc32c: None,
        };
        self.store.insert_file(&file, None, &[span]).await.unwrap();
        let new = NewBatch {
            owner: owner.into(),
            input_file_id: id,
            endpoint: Endpoint::ChatCompletions,
            completion_window: DEFAULT_WINDOW,
            priority: Priority::default(),
            metadata: BTreeMap::new(),
            request_id: None,
            request_hash: None,
            webhook: None,
            webhook_endpoint_id: None,
            output_expires_after: None,
        };
        match self.store.create_batch(new).await.unwrap() {
            CreatedBatch::New(batch) => batch.id,
            other => panic!("{other:?}"),
        }
    }

    async fn claim(&self, id: &BatchId) -> (SegmentRef, Epoch) {
        let claimed = self.store.claim_segment(&self.node, id, 1, Duration::from_secs(60)).await.unwrap().unwrap();
        (claimed.segment, claimed.epoch)
    }

    async fn part(&self, of: &(SegmentRef, Epoch), line: u32) {
        let part = NewPart {
            object_key: format!("{}/{line}", of.0),
            output_bytes: 1,
            error_bytes: 0,
            crc32c: 0,
            completed: LineSet::from_iter([line]),
            failed: LineSet::default(),
            not_run: 0,
            usage: TokenUsage { output: 5, total: 5, ..TokenUsage::default() },
        };
        assert_eq!(self.store.commit_part(&of.0, of.1, &part).await.unwrap(), Commit::Done);
    }

    async fn finish(&self, of: &(SegmentRef, Epoch)) {
        let object = FinalObject {
            object_key: format!("{}/final", of.0),
            output_bytes: 10,
            error_bytes: 0,
            output_lines: 10,
            error_lines: 0,
            crc32c: 0,
        };
        assert_eq!(self.store.finish_segment(&of.0, of.1, None, &object, &[]).await.unwrap(), Commit::Done);
    }

    async fn history(&self, id: &BatchId) -> Vec<StateEvent> {
        self.store.history(id).await.unwrap().unwrap().1
    }

    async fn watch(&self, id: &BatchId, after: i64) -> impl Stream<Item = Result<Event, WatchError>> + Unpin + use<> {
        Box::pin(self.hub.watch(id, Revision(after), INTERVAL_RANGE.0).await.unwrap())
    }
}

fn status(event: &Event) -> Option<(BatchStatus, i64)> {
    match &event.kind {
        EventKind::StateChanged { batch, .. } => Some((batch.status, event.revision.0)),
        EventKind::Progress(_) | EventKind::Heartbeat => None,
    }
}

/// The states of a stream that ends by itself.
async fn states(stream: impl Stream<Item = Result<Event, WatchError>>) -> Vec<(BatchStatus, i64)> {
    let events: Vec<_> = tokio::time::timeout(Duration::from_secs(300), stream.collect()).await.expect("the end");
    events.iter().filter_map(|event: &Result<Event, _>| status(event.as_ref().unwrap())).collect()
}

#[tokio::test]
async fn whoever_reconnects_with_any_revision_misses_no_state() {
    let world = World::new().await.run();
    let id = world.batch("").await;
    let lease = world.claim(&id).await;
    for line in 0..5 {
        world.part(&lease, line).await;
    }
    world.finish(&lease).await;
    let all: Vec<_> =
        world.history(&id).await.iter().map(|event| (event.batch.status, event.batch.revision.0)).collect();
    let last = all.last().unwrap().1;
    assert!(all.len() == 4 && last > 8, "{all:?}");
    for after in 1..=last {
        let expected: Vec<_> = all.iter().copied().filter(|(_, revision)| *revision > after).collect();
        assert_eq!(states(world.watch(&id, after).await).await, expected, "after {after}");
    }
    assert_eq!(states(world.watch(&id, 0).await).await, [(BatchStatus::Completed, last)]);
    // Beyond the end there is nothing to wait for.
    assert!(states(world.watch(&id, last + 7).await).await.is_empty());
}

#[tokio::test]
async fn whoever_drops_the_stream_after_every_event_misses_no_state() {
    let world = World::new().await.run();
    let id = world.batch("").await;
    let follower = async {
        let (mut seen, mut told) = (0, Vec::new());
        loop {
            let mut stream = world.watch(&id, seen).await;
            // Sometimes one event, sometimes two.
            for _ in 0..=(told.len() % 2) {
                let Some(event) = stream.next().await else { return told };
                let event = event.unwrap();
                seen = event.revision.0;
                told.extend(status(&event));
            }
        }
    };
    let driver = async {
        let lease = world.claim(&id).await;
        for line in 0..10 {
            world.part(&lease, line).await;
            tokio::task::yield_now().await;
        }
        world.finish(&lease).await;
    };
    let (told, ()) =
        tokio::time::timeout(Duration::from_secs(300), async { tokio::join!(Box::pin(follower), Box::pin(driver)) })
            .await
            .expect("the end");
    let mut expected: Vec<_> =
        world.history(&id).await.iter().map(|event| (event.batch.status, event.batch.revision.0)).collect();
    // The first event is the state in which the batch was found.
    expected.retain(|(_, revision)| *revision >= told[0].1);
    assert!(told.len() >= 3, "{told:?}");
    let found = told[0];
    assert_eq!(told[1..], expected.into_iter().filter(|(_, revision)| *revision > found.1).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_slow_reader_gets_every_state_and_only_the_newest_progress() {
    let world = World::new().await.run();
    let id = world.batch("").await;
    let mut stream = world.watch(&id, 0).await;
    assert_eq!(status(&stream.next().await.unwrap().unwrap()).unwrap().0, BatchStatus::InProgress);
    let lease = world.claim(&id).await;
    for line in 0..9 {
        world.part(&lease, line).await;
    }
    let store = world.store.clone();
    let wanted = store.batch(&id, &Scope::All).await.unwrap().unwrap().revision;
    // One look brings the newest, not nine.
    let event = loop {
        let event = stream.next().await.unwrap().unwrap();
        if event.revision == wanted {
            break event;
        }
    };
    let EventKind::Progress(progress) = event.kind else { panic!("{event:?}") };
    assert_eq!((progress.counts.completed, progress.usage.output), (9, 45));
    assert!(progress.rates.moving() && progress.eta.is_some() && progress.waiting_reason.is_none(), "{progress:?}");
    world.store.cancel_batch(&id, &Scope::All).await.unwrap();
    world.finish(&lease).await;
    let told = states(stream).await;
    assert_eq!(told.iter().map(|one| one.0).collect::<Vec<_>>(), [BatchStatus::Cancelling, BatchStatus::Cancelled]);
}

#[tokio::test]
async fn progress_comes_at_most_once_an_interval() {
    let world = World::new().await.run();
    let id = world.batch("").await;
    let interval = Duration::from_secs(30);
    let mut stream = Box::pin(world.hub.watch(&id, Revision(0), interval).await.unwrap());
    let lease = world.claim(&id).await;
    let mut other = world.watch(&id, 0).await;
    for line in 0..10 {
        world.part(&lease, line).await;
        // Another watcher sees the part, so the hub has read it.
        while !matches!(&other.next().await.unwrap().unwrap().kind, EventKind::Progress(progress) if progress.counts.completed > i64::from(line))
        {
        }
    }
    world.finish(&lease).await;
    let all: Vec<_> = stream.by_ref().map(Result::unwrap).collect().await;
    let told: Vec<_> = all.iter().map(|event| status(event).map(|one| one.0)).collect();
    let expected = [BatchStatus::InProgress, BatchStatus::Finalizing, BatchStatus::Completed];
    assert_eq!(told, expected.map(Some));
}

#[tokio::test]
async fn silence_is_broken_by_heartbeats() {
    // Nobody runs the hub: nothing asks the database while the clock is paused.
    let world = World::new().await;
    let id = world.batch("").await;
    let mut stream = world.watch(&id, 0).await;
    let mut all = Box::pin(world.hub.watch_all(Scope::All, Sequence(0), DEFAULT_INTERVAL).await.unwrap());
    assert!(status(&stream.next().await.unwrap().unwrap()).is_some());
    assert!(status(&all.next().await.unwrap().unwrap()).is_some());
    // It looks for states once more before it waits: the clock must not jump while the database works.
    assert!(tokio::time::timeout(Duration::from_secs(2), all.next()).await.is_err());
    tokio::time::pause();
    let began = tokio::time::Instant::now();
    for beats in 1..=3u32 {
        let event = stream.next().await.unwrap().unwrap();
        assert!(matches!(event.kind, EventKind::Heartbeat) && event.batch.as_ref() == Some(&id), "{event:?}");
        let late = began.elapsed().abs_diff(HEARTBEAT * beats);
        assert!(late < Duration::from_secs(1), "{late:?}");
    }
    // Its time for a heartbeat is long past; it looks into the database first, which a paused clock would call too
    // slow.
    tokio::time::resume();
    let event = all.next().await.unwrap().unwrap();
    assert!(matches!(event.kind, EventKind::Heartbeat) && event.batch.is_none(), "{event:?}");
    assert_eq!(event.sequence, Sequence(2));
}

#[tokio::test]
async fn a_shutdown_ends_every_stream() {
    let world = World::new().await.run();
    let id = world.batch("").await;
    let mut stream = world.watch(&id, 0).await;
    let mut all = Box::pin(world.hub.watch_all(Scope::All, Sequence(0), DEFAULT_INTERVAL).await.unwrap());
    stream.next().await.unwrap().unwrap();
    all.next().await.unwrap().unwrap();
    world.shutdown.cancel();
    let mut ends = Vec::new();
    while let Some(event) = stream.next().await {
        ends.extend(event.err());
    }
    while let Some(event) = all.next().await {
        ends.extend(event.err());
    }
    assert!(matches!(ends.as_slice(), [WatchError::ShuttingDown, WatchError::ShuttingDown]), "{ends:?}");
    let again = world.hub.watch(&id, Revision(0), DEFAULT_INTERVAL).await;
    assert!(matches!(again.err(), Some(WatchError::ShuttingDown)));
}

#[tokio::test]
async fn what_is_not_there_is_refused() {
    let world = World::new().await.run();
    let id = world.batch("").await;
    let refused = world.hub.watch(&BatchId::from_text("batch_no"), Revision(0), DEFAULT_INTERVAL).await.err();
    assert!(matches!(refused, Some(WatchError::NotFound(_))));
    let newest = world.store.batch(&id, &Scope::All).await.unwrap().unwrap().revision.0;
    let refused = world.hub.watch(&id, Revision(newest + 1), DEFAULT_INTERVAL).await.err();
    assert!(
        matches!(refused, Some(WatchError::Ahead { asked, newest: known }) if asked == newest + 1 && known == newest)
    );
    let refused = world.hub.watch_all(Scope::All, Sequence(99), DEFAULT_INTERVAL).await.err();
    assert!(matches!(refused, Some(WatchError::Ahead { asked: 99, newest: 2 })));
}

#[tokio::test]
async fn another_nodes_changes_are_found_and_unwatched_batches_are_forgotten() {
    let world = World::new().await.run();
    let id = world.batch("").await;
    let stream = world.watch(&id, 0).await;
    let mut all = Box::pin(world.hub.watch_all(Scope::All, Sequence(0), DEFAULT_INTERVAL).await.unwrap());
    assert_eq!(status(&all.next().await.unwrap().unwrap()).unwrap().0, BatchStatus::InProgress);
    assert_eq!(world.hub.feed_count(), 1);
    // A second connection to the same database: the hub hears nothing of what it commits.
    let other = Store::sqlite(&world.folder.path().join("db")).await.unwrap();
    let node = NodeId::generate();
    let claimed = other.claim_segment(&node, &id, 1, Duration::from_secs(60)).await.unwrap().unwrap();
    let object = FinalObject {
        object_key: "o".into(),
        output_bytes: 1,
        error_bytes: 0,
        output_lines: 10,
        error_lines: 0,
        crc32c: 0,
    };
    other.finish_segment(&claimed.segment, claimed.epoch, None, &object, &[]).await.unwrap();
    let expected = [BatchStatus::InProgress, BatchStatus::Finalizing, BatchStatus::Completed];
    assert_eq!(states(stream).await.iter().map(|one| one.0).collect::<Vec<_>>(), expected);
    let mut told = Vec::new();
    while told.last() != Some(&BatchStatus::Completed) {
        let event = all.next().await.unwrap().unwrap();
        told.extend(status(&event).map(|one| one.0));
    }
    assert_eq!(told, expected[1..]);
    drop(all);
    let forgotten = async {
        while world.hub.feed_count() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(300), forgotten).await.expect("the feed is dropped");
}

#[tokio::test]
async fn a_dashboard_sees_every_state_of_its_owners_batches_and_resumes() {
    let world = World::new().await.run();
    let (mine, theirs) = (world.batch("me").await, world.batch("you").await);
    let mut stream =
        Box::pin(world.hub.watch_all(Scope::Of("me".into()), Sequence(0), INTERVAL_RANGE.0).await.unwrap());
    let first = stream.next().await.unwrap().unwrap();
    assert_eq!((first.batch.clone(), first.sequence), (Some(mine.clone()), Sequence(4)));
    let lease = world.claim(&mine).await;
    world.part(&lease, 0).await;
    world.store.cancel_batch(&theirs, &Scope::All).await.unwrap();
    let event = loop {
        let event = stream.next().await.unwrap().unwrap();
        if matches!(&event.kind, EventKind::Progress(progress) if progress.counts.completed == 1) {
            break event;
        }
    };
    assert_eq!(event.batch.as_ref(), Some(&mine));
    drop(stream);
    // While nobody looks: one ends, one begins.
    world.finish(&lease).await;
    let next = world.batch("me").await;
    let stream = world.hub.watch_all(Scope::Of("me".into()), event.sequence, INTERVAL_RANGE.0).await.unwrap();
    let told: Vec<_> = stream
        .filter_map(async |event| {
            let event = event.unwrap();
            status(&event).map(|(status, _)| (event.batch.unwrap(), status))
        })
        .take(4)
        .collect()
        .await;
    let expected = [
        (mine.clone(), BatchStatus::Finalizing),
        (mine, BatchStatus::Completed),
        (next.clone(), BatchStatus::Validating),
        (next, BatchStatus::InProgress),
    ];
    assert_eq!(told, expected);
}

#[tokio::test]
async fn a_batch_says_why_it_waits() {
    let world = World::new().await;
    let id = world.batch("").await;
    let batch = world.store.batch(&id, &Scope::All).await.unwrap().unwrap();
    let progress = world.hub.progress(&batch).await.unwrap();
    assert!(progress.waiting_reason.unwrap().starts_with("no worker is registered"));
    let second = world.batch("").await;
    let second = world.store.batch(&second, &Scope::All).await.unwrap().unwrap();
    assert_eq!(world.hub.progress(&second).await.unwrap().queue_position, 1);
    let both = world.hub.progresses(&[second.clone(), batch]).await.unwrap();
    assert_eq!(both.iter().map(|one| one.queue_position).collect::<Vec<_>>(), [1, 0]);
    assert!(!world.store.running().await.unwrap().contains(&second.id));
    world.claim(&second.id).await;
    assert!(world.store.running().await.unwrap().contains(&second.id));
}

#[tokio::test]
async fn what_a_look_costs_does_not_grow_with_the_batches_that_wait() {
    /// The statements of a list of so many waiting batches, of the start of a stream of all, and of one look
    /// afterwards.
    async fn statements(count: usize) -> [u64; 3] {
        let world = World::new().await;
        for _ in 0..count {
            world.batch("").await;
        }
        let spent = |since: &mut u64| {
            let before = std::mem::replace(since, world.store.statements());
            *since - before
        };
        let mut since = world.store.statements();
        let batches = world.store.batches(&crate::store::BatchFilter::within(Scope::All), None, 1_000).await.unwrap();
        let progresses = world.hub.progresses(&batches).await.unwrap();
        assert_eq!((batches.len(), progresses.len()), (count, count));
        let places: Vec<_> = progresses.iter().rev().map(|progress| progress.queue_position).collect();
        assert_eq!(places, (0..i64::try_from(count).unwrap()).collect::<Vec<_>>(), "each has its place");
        let listed = spent(&mut since);
        let mut all = Box::pin(world.hub.watch_all(Scope::All, Sequence(0), DEFAULT_INTERVAL).await.unwrap());
        for _ in 0..count {
            all.next().await.unwrap().unwrap();
        }
        let begun = spent(&mut since);
        world.hub.ask_now().await;
        [listed, begun, spent(&mut since)]
    }
    let few = statements(3).await;
    assert_eq!(statements(60).await, few);
    assert!(few.iter().all(|count| (1..=12).contains(count)), "{few:?}");
}

#[tokio::test]
async fn a_look_at_batches_that_wait_costs_next_to_nothing_while_nothing_changes() {
    /// The statements of the first look of one who watches so many, of each of the next five, of the first after a
    /// batch before them has ended, and of the one after that.
    async fn statements(count: usize) -> [u64; 4] {
        let world = World::new().await;
        let before_all = world.batch("you").await;
        let mut batches = Vec::new();
        for _ in 0..count {
            batches.push(world.batch("me").await);
        }
        let mut all =
            Box::pin(world.hub.watch_all(Scope::Of("me".into()), Sequence(0), DEFAULT_INTERVAL).await.unwrap());
        for _ in 0..count {
            all.next().await.unwrap().unwrap();
        }
        let mut asked = Asked::new();
        let mut look = async || {
            let before = world.store.statements();
            world.hub.ask_once(&mut asked).await.unwrap();
            world.store.statements() - before
        };
        let first = look().await;
        let mut still = HashSet::new();
        for _ in 0..5 {
            still.insert(look().await);
        }
        assert_eq!(still.len(), 1, "{still:?}");
        let place = async |at: usize| {
            let mut one = Box::pin(world.hub.watch(&batches[at], Revision(0), DEFAULT_INTERVAL).await.unwrap());
            match one.next().await.unwrap().unwrap().kind {
                EventKind::StateChanged { progress, .. } => progress.unwrap().queue_position,
                other => panic!("{other:?}"),
            }
        };
        let last = count - 1;
        assert_eq!(place(last).await, i64::try_from(count).unwrap());
        world.store.cancel_batch(&before_all, &Scope::All).await.unwrap();
        let changed = look().await;
        assert_eq!(place(last).await, i64::try_from(last).unwrap(), "it has moved up at the next look");
        [first, still.into_iter().next().unwrap(), changed, look().await]
    }
    let few = statements(3).await;
    assert_eq!(statements(60).await, few);
    let [first, still, changed, after] = few;
    assert!(still < first && still <= 2, "{few:?}");
    assert_eq!((changed, after), (first, still), "{few:?}");
}

#[tokio::test]
async fn what_nobody_watches_is_remembered_only_up_to_a_bound() {
    let world = World::new().await;
    for _ in 0..10_000 {
        world.hub.hears_of(BatchId::generate());
    }
    assert!(world.hub.unwatched_count() <= 256);
    world.hub.ask_now().await;
    assert_eq!(world.hub.unwatched_count(), 0);
    // And after that it hears of others again.
    world.hub.hears_of(BatchId::generate());
    assert_eq!(world.hub.unwatched_count(), 1);
}
