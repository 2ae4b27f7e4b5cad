//! Nodes, a database, objects, a clock, and everything that can go wrong with them, in the order that a seed says.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidemill::{
    blobs::Blobs,
    domain::{
        BatchError, BatchId, BatchStatus, Endpoint, File, FileId, FileKind, NewBatch, NodeId, Owner, Priority, Scope,
        SegmentIndex, SegmentRef, SegmentSpan, Timestamp,
        webhook::{Defaults, WebhookConfig, WebhookEvent},
    },
    store::{CancelledBatch, ClaimedSegment, Commit, CreatedBatch, DeliveryFilter, Store, with_clock},
};

use crate::{
    database::Database,
    model::{Model, Segment, State},
    node::{Call, Next, Runner},
    outbox::Outbox,
};

const LEASE: Duration = Duration::from_secs(30);
const SECOND: i64 = 1_000_000;
const SMALL_WHILE: i64 = 5 * SECOND;
const WINDOW: Duration = Duration::from_secs(24 * 3_600);
/// Steps with faults; then all faults end, and so must every batch.
const TROUBLE: usize = 75;
const PATIENCE: usize = 2_000;
/// How many of the steps are those of webhooks.
const WEBHOOKS: f64 = 0.2;
const MODELS: [&str; 2] = ["a", "b"];

struct Node {
    id: NodeId,
    /// Stopped until it thaws: it does nothing, and does not notice.
    frozen: bool,
}

/// A call of a process that is gone, which may still reach the database.
struct Ghost {
    claimed: ClaimedSegment,
    call: Call,
}

pub struct World {
    seed: u64,
    random: StdRng,
    clock: Arc<AtomicI64>,
    store: Store,
    blobs: Blobs,
    nodes: Vec<Node>,
    runners: BTreeMap<u64, Runner>,
    next_runner: u64,
    ghosts: Vec<Ghost>,
    models: Vec<Model>,
    has_webhooks: bool,
    outbox: Outbox,
    served: i64,
    faults: bool,
}

impl World {
    pub async fn run(database: &Database, seed: u64) {
        database.empty().await;
        let clock = Arc::new(AtomicI64::new(1_800_000_000 * SECOND));
        let mut world = Self {
            seed,
            random: StdRng::seed_from_u64(seed),
            clock: clock.clone(),
            store: database.store.clone(),
            blobs: Blobs::memory(),
            nodes: (0..3).map(|_| Node { id: NodeId::generate(), frozen: false }).collect(),
            runners: BTreeMap::new(),
            next_runner: 0,
            ghosts: Vec::new(),
            models: Vec::new(),
            has_webhooks: false,
            outbox: Outbox::default(),
            served: 0b11,
            faults: true,
        };
        Box::pin(with_clock(clock, world.live())).await;
    }

    async fn live(&mut self) {
        for _ in 0..self.random.random_range(1..=2) {
            self.submit().await;
        }
        for _ in 0..TROUBLE {
            self.step().await;
        }
        self.faults = false;
        self.served = 0b11;
        self.nodes.iter_mut().for_each(|node| node.frozen = false);
        let mut steps = 0;
        while self.models.iter().any(|model| !model.status.is_terminal()) {
            self.step().await;
            steps += 1;
            assert!(steps < PATIENCE, "seed {}: a batch does not end: {:#?}", self.seed, self.models);
        }
        // What is still under way changes nothing any more.
        while let Some(ghost) = self.ghosts.pop() {
            self.execute(&ghost.claimed, &ghost.call).await;
        }
        let mut steps = 0;
        while self.has_webhooks && !self.outbox.is_all_settled(&self.store).await {
            for _ in 0..10 {
                self.webhooks().await;
            }
            self.pass(LEASE.as_micros() as i64);
            steps += 1;
            assert!(steps < PATIENCE, "seed {}: a webhook is never settled", self.seed);
        }
        self.outbox.check_end(&self.store).await;
        for at in 0..self.models.len() {
            self.models[at].check(&self.store).await;
            self.check_results(at).await;
        }
    }

    fn now(&self) -> i64 {
        self.clock.load(Ordering::Relaxed)
    }

    /// A batch of one to three segments of one to ten lines, some with a webhook.
    async fn submit(&mut self) {
        let (mut input, mut spans, mut segments, mut line) = (String::new(), Vec::new(), Vec::new(), 0u32);
        for index in 0..self.random.random_range(1..=3) {
            let (offset, first, mut models) = (input.len(), line, 0);
            for _ in 0..self.random.random_range(1..=10) {
                let model = self.random.random_range(0..MODELS.len());
                models |= 1 << model;
                input.push_str(&format!(
                    r#"{{"custom_id":"{line}","method":"POST","url":"/v1/completions","body":{{"model":"{}"}}}}"#,
                    MODELS[model]
                ));
                input.push('\n');
                line += 1;
            }
            let lines = line - first;
            spans.push(SegmentSpan {
                index: SegmentIndex(index),
                first_line: i64::from(first) + 1,
                line_span: lines as i32,
                requests: lines as i32,
                offset: offset as i64,
                length: (input.len() - offset) as i64,
                models,
                crc32c: None,
            });
            segments.push(Segment { lines, state: State::Queued, epoch: 0, expires: 0, models, object: None });
        }
        let id = FileId::generate();
        let file = File {
            owner: Owner::nobody(),
            kind: FileKind::Input,
            filename: "input.jsonl".into(),
            bytes: input.len() as i64,
            line_count: line.into(),
            models: MODELS.map(str::to_owned).into(),
            endpoint: Some(Endpoint::Completions),
            created_at: Timestamp(self.now()),
            expires_at: None,
            object_key: Some(format!("inputs/{id}")),
            id,
            crc32c: None,
        };
        self.blobs.put(file.object_key.as_ref().unwrap(), input.into()).await.unwrap();
        self.store.insert_file(&file, None, &spans).await.unwrap();
        let webhook = self.random.random_bool(0.5).then(|| {
            self.has_webhooks = true;
            let receiver = self.random.random_range(0..2);
            let attempts = self.random.random_range(1..=3);
            let webhook = WebhookConfig::new(format!("https://receiver{receiver}.example/"));
            let webhook = webhook.events(self.events()).max_retries(Some(attempts));
            webhook.resolve(Defaults::default()).unwrap().0
        });
        let new = NewBatch {
            owner: Owner::nobody(),
            input_file_id: file.id,
            endpoint: Endpoint::Completions,
            completion_window: WINDOW,
            priority: Priority::default(),
            metadata: BTreeMap::new(),
            request_id: None,
            request_hash: None,
            webhook,
            webhook_endpoint_id: None,
            output_expires_after: None,
        };
        let CreatedBatch::New(batch) = self.store.create_batch(new).await.unwrap() else { panic!("no batch") };
        self.models.push(Model::new(batch.id, segments));
    }

    fn events(&mut self) -> Vec<String> {
        let all = WebhookEvent::SUBSCRIBABLE.into_iter().filter(|_| self.random.random_bool(0.6));
        all.map(|event| event.as_str().to_owned()).collect()
    }

    async fn step(&mut self) {
        if self.has_webhooks && self.random.random_bool(WEBHOOKS) {
            return self.webhooks().await;
        }
        let kind = self.random.random_range(0..if self.faults { 130 } else { 94 });
        match kind {
            0..12 => self.claim().await,
            12..45 => self.advance().await,
            45..80 => self.answer().await,
            80..88 => self.renew().await,
            88..94 => self.pass(SMALL_WHILE),
            94..97 => self.pass(LEASE.as_micros() as i64 + SECOND),
            // A clock that jumps: whole hours forwards, or back as NTP does.
            97 => self.pass(3_600 * SECOND),
            98 => self.pass(-SMALL_WHILE),
            99..105 => self.crash().await,
            105..108 => self.restart_all().await,
            108..112 => {
                let node = self.random.random_range(0..self.nodes.len());
                self.nodes[node].frozen ^= true;
            }
            112..115 => self.served = self.random.random_range(0..4),
            115..119 => self.tear().await,
            119..126 => self.haunt().await,
            126..128 => self.cancel().await,
            128 => self.expire().await,
            129 => self.fail(),
            _ => unreachable!(),
        }
        // All of them at times: what a step should not have touched.
        let all = self.random.random_bool(0.05);
        for model in self.models.iter_mut().filter(|model| model.touched || all) {
            model.check(&self.store).await;
        }
    }

    async fn webhooks(&mut self) {
        let (now, awake) = (self.now(), self.all_awake());
        self.outbox.step(&self.store, &awake, now, self.faults, &mut self.random).await;
    }

    fn pass(&mut self, micros: i64) {
        self.clock.fetch_add(micros, Ordering::Relaxed);
    }

    fn all_awake(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|node| !self.nodes[*node].frozen).collect()
    }

    fn awake(&mut self) -> Option<usize> {
        let awake = self.all_awake();
        (!awake.is_empty()).then(|| awake[self.random.random_range(0..awake.len())])
    }

    fn model(&mut self, id: &BatchId) -> &mut Model {
        self.models.iter_mut().find(|model| model.id == *id).unwrap()
    }

    async fn claim(&mut self) {
        let Some(node) = self.awake() else { return };
        let at = self.random.random_range(0..self.models.len());
        let (id, ending) = (self.models[at].id.clone(), self.models[at].ending);
        let mask = if ending.is_some() { i64::MAX } else { self.served };
        let now = self.now();
        let expected = self.models[at].claim(mask, now, LEASE.as_micros() as i64);
        let claimed = self.store.claim_segment(&self.nodes[node].id, &id, mask, LEASE).await.unwrap();
        Model::check_claim(expected, claimed.as_ref());
        let Some(claimed) = claimed else { return };
        if self.faults && self.random.random_bool(0.1) {
            // The answer is lost: the node does not know what it has.
            return;
        }
        self.next_runner += 1;
        self.runners.insert(self.next_runner, Runner::new(node, claimed));
    }

    fn pick(&mut self, wanted: impl Fn(&Runner) -> bool) -> Option<u64> {
        let ready: Vec<u64> = self
            .runners
            .iter()
            .filter(|(_, runner)| !self.nodes[runner.node].frozen && wanted(runner))
            .map(|(id, _)| *id)
            .collect();
        (!ready.is_empty()).then(|| ready[self.random.random_range(0..ready.len())])
    }

    async fn advance(&mut self) {
        let Some(id) = self.pick(|_| true) else { return };
        let runner = self.runners.get_mut(&id).unwrap();
        runner.step(&self.store, &self.blobs, self.served, &mut self.random).await;
    }

    /// A call reaches the database, or does not; its answer reaches the caller, or does not, and then it calls again.
    async fn answer(&mut self) {
        let Some(id) = self.pick(|runner| runner.calling.is_some()) else { return };
        let runner = &self.runners[&id];
        let (claimed, call) = (runner.claimed.clone(), runner.calling.clone().unwrap());
        if self.faults && self.random.random_bool(0.1) {
            return;
        }
        let commit = self.execute(&claimed, &call).await;
        if self.faults && self.random.random_bool(0.2) {
            return;
        }
        if self.runners.get_mut(&id).unwrap().answered(commit) == Next::Over {
            self.runners.remove(&id);
        }
    }

    async fn execute(&mut self, claimed: &ClaimedSegment, call: &Call) -> Commit {
        let (segment, epoch) = (&claimed.segment, claimed.epoch);
        let model = self.models.iter_mut().find(|model| model.id == segment.batch).unwrap();
        let (expected, answered) = match call {
            Call::Commit(part) => {
                (model.commit(segment.index, epoch, part), self.store.commit_part(segment, epoch, part).await.unwrap())
            }
            Call::Finish { last, object, superseded } => (
                model.finish(segment.index, epoch, last.as_ref(), object),
                self.store.finish_segment(segment, epoch, last.as_ref(), object, superseded).await.unwrap(),
            ),
            Call::Drop(torn) => (
                model.drop_parts(segment.index, epoch, torn),
                self.store.drop_parts(segment, epoch, torn).await.unwrap(),
            ),
            Call::Release(mask) => {
                model.release(segment.index, epoch, *mask);
                self.store.release_segment(segment, epoch, *mask).await.unwrap();
                (Commit::Done, Commit::Done)
            }
            Call::Fail => {
                let error =
                    BatchError { code: "input_unreadable".into(), message: "no".into(), line: 0, param: String::new() };
                (model.fail(segment.index, epoch), self.store.fail_batch(segment, epoch, error).await.unwrap())
            }
        };
        if std::env::var_os("TIDEMILL_SIM_SEED").is_some() {
            println!("{segment} under epoch {epoch}: {answered:?} {call:?}");
        }
        assert_eq!(answered, expected, "{segment} under epoch {epoch}: {call:?}");
        answered
    }

    /// A node keeps the leases of what it runs, and hears what has become of its batches.
    async fn renew(&mut self) {
        let Some(node) = self.awake() else { return };
        let mine: Vec<u64> = self.runners.iter().filter(|(_, runner)| runner.node == node).map(|(id, _)| *id).collect();
        if mine.is_empty() {
            return;
        }
        let running: Vec<SegmentRef> = mine.iter().map(|id| self.runners[id].claimed.segment.clone()).collect();
        let renewed = self.store.renew_leases(&self.nodes[node].id, &running, LEASE).await.unwrap();
        let until = self.now() + LEASE.as_micros() as i64;
        for held in &renewed.held {
            assert!(running.contains(&held.segment), "nobody runs it, and yet its lease would never run out: {held:?}");
            self.model(&held.segment.batch).renew(held.segment.index, held.epoch, until);
        }
        for id in mine {
            let runner = self.runners.get_mut(&id).unwrap();
            let held = renewed
                .held
                .iter()
                .find(|held| held.segment == runner.claimed.segment && held.epoch == runner.claimed.epoch);
            match held {
                Some(held) if !held.batch_ended => runner.ending = runner.ending.or(held.ending),
                Some(_) | None => {
                    // It may be in the middle of a call.
                    let runner = self.runners.remove(&id).unwrap();
                    self.leave_ghost(runner);
                }
            }
        }
    }

    fn leave_ghost(&mut self, runner: Runner) {
        if let Some(call) = runner.calling
            && self.faults
        {
            self.ghosts.push(Ghost { claimed: runner.claimed, call });
        }
    }

    /// `kill -9`, and a new process in its place.
    async fn crash(&mut self) {
        let node = self.random.random_range(0..self.nodes.len());
        self.nodes[node] = Node { id: NodeId::generate(), frozen: false };
        self.outbox.crash(node);
        let gone: Vec<u64> = self.runners.iter().filter(|(_, runner)| runner.node == node).map(|(id, _)| *id).collect();
        for id in gone {
            let runner = self.runners.remove(&id).unwrap();
            self.leave_ghost(runner);
        }
    }

    /// The one process of a small installation is killed and started: nothing of it is left, and its leases end at once.
    async fn restart_all(&mut self) {
        self.runners.clear();
        self.ghosts.clear();
        self.nodes.iter_mut().for_each(|node| *node = Node { id: NodeId::generate(), frozen: false });
        self.store.release_all().await.unwrap();
        self.models.iter_mut().for_each(Model::release_all);
        let now = self.now();
        self.outbox.restart_all(&self.store, now).await;
    }

    /// A call of a process that is gone, or was frozen until now, reaches the database.
    async fn haunt(&mut self) {
        if self.ghosts.is_empty() {
            return;
        }
        let ghost = self.ghosts.swap_remove(self.random.random_range(0..self.ghosts.len()));
        self.execute(&ghost.claimed, &ghost.call).await;
        if self.random.random_bool(0.3) {
            self.ghosts.push(ghost);
        }
    }

    /// The disk loses part of an object, or all of it, that a segment still needs to be merged.
    async fn tear(&mut self) {
        let keys: Vec<String> =
            self.runners.values().flat_map(Runner::durable).map(|part| part.object_key.clone()).collect();
        if keys.is_empty() {
            return;
        }
        let key = &keys[self.random.random_range(0..keys.len())];
        let Ok(object) = self.blobs.get(key).await else { return };
        match self.random.random_range(0..=object.len()) {
            0 => self.blobs.delete(key).await.unwrap(),
            length => self.blobs.put(key, object.slice(..length - 1)).await.unwrap(),
        }
    }

    async fn cancel(&mut self) {
        let at = self.random.random_range(0..self.models.len());
        let cancelled = self.store.cancel_batch(&self.models[at].id, &Scope::All).await.unwrap();
        let status = self.models[at].status;
        let accepted = matches!(status, BatchStatus::InProgress | BatchStatus::Cancelling | BatchStatus::Cancelled);
        assert_eq!(matches!(cancelled, CancelledBatch::Batch(_)), accepted, "cancelled while {status:?}");
        self.models[at].cancel();
    }

    /// Every window closes: a day passes, with all leases, and an hour for the clock's going back.
    async fn expire(&mut self) {
        self.pass(WINDOW.as_micros() as i64 + 3_600 * SECOND);
        let closed = self.store.close_windows(100).await.unwrap();
        for model in &mut self.models {
            assert_eq!(closed.contains(&model.id), model.status == BatchStatus::InProgress);
            model.close_window();
        }
    }

    /// A run finds that its batch can't go on.
    fn fail(&mut self) {
        let Some(id) = self.pick(|runner| runner.calling.is_none()) else { return };
        self.runners.get_mut(&id).unwrap().calling = Some(Call::Fail);
    }

    /// Each line of each segment has exactly one answer, in input order, in the file that its count says.
    async fn check_results(&self, at: usize) {
        let model = &self.models[at];
        let batch = self.store.batch(&model.id, &Scope::All).await.unwrap().unwrap();
        self.check_deliveries(at).await;
        if batch.status == BatchStatus::Failed {
            return;
        }
        assert_eq!(batch.counts.completed + batch.counts.failed, batch.counts.total, "all lines are counted");
        let mut expected = 0..u32::MAX;
        let (mut outputs, mut errors) = (0, 0);
        let records = self.store.segments(&model.id, SegmentIndex(0), 1_000).await.unwrap();
        assert_eq!(records.len(), model.segments.len());
        for (record, segment) in records.iter().zip(&model.segments) {
            let object = self.blobs.get(record.object_key.as_ref().unwrap()).await.expect("the final object is there");
            assert_eq!(object.len() as u64, record.output_bytes + record.error_bytes);
            let (output, error) = object.split_at(record.output_bytes as usize);
            let (output, error) = (custom_ids(output), custom_ids(error));
            assert!(output.is_sorted() && error.is_sorted(), "input order");
            outputs += output.len() as i64;
            errors += error.len() as i64;
            let mut all = [output, error].concat();
            all.sort_unstable();
            let lines: Vec<u32> = expected.by_ref().take(segment.lines as usize).collect();
            assert_eq!(all, lines, "seed {}: each line once", self.seed);
        }
        assert_eq!((batch.counts.completed, batch.counts.failed), (outputs, errors), "counts and lines");
        for (file, lines) in [(&batch.output_file_id, outputs), (&batch.error_file_id, errors)] {
            assert_eq!(file.is_some(), lines > 0);
            if let Some(id) = file {
                assert_eq!(self.store.file(id, &Scope::All).await.unwrap().unwrap().line_count, lines);
            }
        }
    }

    /// One delivery of the end to whoever wants it, none to anybody else.
    async fn check_deliveries(&self, at: usize) {
        let batch = self.store.batch(&self.models[at].id, &Scope::All).await.unwrap().unwrap();
        let filter = DeliveryFilter { batch_id: Some(batch.id.clone()), ..DeliveryFilter::within(Scope::All) };
        let deliveries = self.store.deliveries(&filter, None, 1_000).await.unwrap();
        let events: Vec<_> =
            deliveries.iter().map(|one| one.event).filter(|event| *event != WebhookEvent::Progress).collect();
        let wanted = WebhookEvent::of(batch.status)
            .filter(|event| batch.webhook.as_ref().is_some_and(|webhook| webhook.events.wants(*event)));
        assert_eq!(events, wanted.into_iter().collect::<Vec<_>>(), "deliveries of the end");
    }
}

fn custom_ids(text: &[u8]) -> Vec<u32> {
    let lines = text.split_inclusive(|byte| *byte == b'\n');
    lines
        .map(|line| {
            assert_eq!(line.last(), Some(&b'\n'));
            let line: serde_json::Value = serde_json::from_slice(line).unwrap();
            line["custom_id"].as_str().unwrap().parse().unwrap()
        })
        .collect()
}
