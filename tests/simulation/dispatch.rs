//! One node's work on its segments, without IO: the work list, the board, the health of workers, the tries and the plan, all
//! of them the real ones, in virtual time. Workers refuse, hang, come back, answer badly and lose what they had; lines that
//! kill every worker that takes them exist too.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use rand::{RngExt, SeedableRng, rngs::StdRng};
use tidemill::{
    domain::{LineSet, Priority, Timestamp},
    fleet::{
        FailureKind, Rank, Tenant, Want, WorkerKey,
        board::{Board, Holder, Ticket},
        health::{Change, Health, Probe},
    },
    scheduler::{
        TryPolicy,
        lines::{Lane, LineKey, WorkList},
        plan::Demand,
    },
};
use tokio::time::Instant;

const MODELS: [&str; 2] = ["a", "b"];
const TRIES: TryPolicy = TryPolicy {
    max_tries: 4,
    base: Duration::from_millis(250),
    cap: Duration::from_secs(30),
    max_pauses: 1_000,
    patience: Duration::ZERO,
};
/// Steps with faults; then the workers are well for good.
const TROUBLE: usize = 150;
const PATIENCE: usize = 5_000;

fn lane(model: usize) -> Lane {
    Lane { model, alone: false }
}

struct Worker {
    models: Vec<&'static str>,
    limit: u32,
    health: Health,
}

struct Segment {
    rank: Rank,
    list: WorkList,
    /// By line: tries begun.
    begun: BTreeMap<LineKey, u32>,
    done: BTreeSet<LineKey>,
    waiting: BTreeMap<usize, Ticket>,
    lines: u32,
    done_before: u32,
}

impl Segment {
    fn holder(&self, model: usize) -> Holder {
        Want { model: MODELS[model].into(), rank: self.rank, avoid: [].into_iter().collect(), alone: false }.holder()
    }
}

struct Flight {
    segment: usize,
    line: LineKey,
    worker: u32,
    holder: Holder,
}

pub struct Dispatch {
    random: StdRng,
    now: Instant,
    workers: Vec<Worker>,
    board: Board,
    segments: Vec<Segment>,
    flights: Vec<Flight>,
    faults: bool,
}

impl Dispatch {
    pub fn run(seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let segments = (0..random.random_range(1..=3)).map(|_| segment(&mut random)).collect();
        let workers = (0..3u32)
            .map(|at| Worker {
                models: if at == 0 { MODELS.to_vec() } else { vec![MODELS[random.random_range(0..2)]] },
                limit: random.random_range(1..4),
                health: Health::default(),
            })
            .collect();
        let (board, now) = (Board::default(), Instant::now());
        let mut node = Self { random, now, workers, board, segments, flights: Vec::new(), faults: true };
        for _ in 0..TROUBLE {
            node.step();
        }
        node.faults = false;
        let mut steps = 0;
        while node.segments.iter().any(|segment| segment.list.open() > 0) {
            node.step();
            steps += 1;
            assert!(steps < PATIENCE, "lines are left that nobody runs");
        }
        for segment in &node.segments {
            assert_eq!(segment.done.len() as u32 + segment.done_before, segment.lines, "each line once");
            assert!(segment.list.unfinished().is_empty() && segment.list.open_models() == 0);
            assert!(!segment.list.has_later());
        }
        assert!(node.flights.is_empty());
    }

    fn step(&mut self) {
        match self.random.random_range(0..10) {
            0..3 => self.pass(),
            3 => self.probe(),
            4..8 => self.land(),
            _ => {}
        }
        self.send();
        self.check();
    }

    fn pass(&mut self) {
        let most = if self.faults && self.random.random_bool(0.02) { 3_600_000 } else { 8_000 };
        self.now += Duration::from_millis(self.random.random_range(0..most));
        for segment in &mut self.segments {
            segment.list.wake(self.now);
            assert!(segment.list.next_due().is_none_or(|due| due > self.now), "a line overslept");
        }
    }

    fn probe(&mut self) {
        let at = self.random.random_range(0..self.workers.len());
        let probe = match if self.faults { self.random.random_range(0..10) } else { 0 } {
            0..6 => Probe::Well(vec![]),
            6..9 => Probe::Silent("timeout".into()),
            _ => Probe::Unwell("refused".into()),
        };
        let worker = &mut self.workers[at];
        let change = worker.health.observe(&probe);
        let well = worker.health.is_well();
        let models = worker.models.iter().map(|model| Arc::from(*model));
        self.board.set(WorkerKey(at as u32), models, well, well, worker.limit);
        match change {
            Change::Up => assert!(well),
            Change::Down => {
                assert!(!well);
                // What it had is abandoned.
                let (lost, rest) =
                    std::mem::take(&mut self.flights).into_iter().partition(|one| one.worker == at as u32);
                self.flights = rest;
                let lost: Vec<Flight> = lost;
                lost.into_iter().for_each(|flight| self.failed(&flight, FailureKind::Removed, None));
            }
            Change::None => {}
        }
    }

    /// A request comes to its end.
    fn land(&mut self) {
        if self.flights.is_empty() {
            return;
        }
        let flight = self.flights.swap_remove(self.random.random_range(0..self.flights.len()));
        // Every seventh line is poison: no worker ever answers it.
        let poison = self.segments[flight.segment].list.index(flight.line) % 7 == 3;
        if poison || (self.faults && self.random.random_bool(0.3)) {
            let asked = self.random.random_bool(0.2).then(|| Duration::from_secs(self.random.random_range(0..60)));
            // Nor does a poison line get half of an answer.
            let cut = !poison && self.random.random_bool(0.5);
            self.failed(&flight, if cut { FailureKind::CutOff } else { FailureKind::Status }, asked);
        } else {
            self.board.release(WorkerKey(flight.worker), &flight.holder);
            self.end(&flight);
        }
    }

    fn failed(&mut self, flight: &Flight, kind: FailureKind, asked: Option<Duration>) {
        self.board.release(WorkerKey(flight.worker), &flight.holder);
        let random = self.random.random_range(0.0..1.0);
        let segment = &mut self.segments[flight.segment];
        if matches!(kind, FailureKind::Removed | FailureKind::CutOff) {
            // The worker's going uses up no try, nor does its stopping in the middle.
            *segment.begun.get_mut(&flight.line).expect("it was sent") -= 1;
        }
        let list = &mut segment.list;
        let tally = list.failed(flight.line, WorkerKey(flight.worker));
        match TRIES.next(tally, kind, asked, random) {
            Some(wait) => {
                list.later(flight.line, self.now + wait);
            }
            None => self.end(flight),
        }
    }

    fn end(&mut self, flight: &Flight) {
        let segment = &mut self.segments[flight.segment];
        segment.list.done(flight.line);
        assert!(segment.done.insert(flight.line), "a line ended twice");
    }

    fn send(&mut self) {
        for at in 0..self.segments.len() {
            for (model, name) in MODELS.into_iter().enumerate() {
                while let Some(line) = self.segments[at].list.peek(lane(model)) {
                    let segment = &mut self.segments[at];
                    if segment.waiting.contains_key(&model) {
                        break;
                    }
                    let avoid = segment.list.failed_on(line).iter().copied().collect();
                    let want = Want { model: name.into(), rank: segment.rank, avoid, alone: false };
                    match self.board.take(&want) {
                        Some(worker) => self.start(at, model, worker),
                        None => drop(segment.waiting.insert(model, self.board.queue(want))),
                    }
                }
            }
        }
        for (ticket, worker) in self.board.grant() {
            let (at, model) = self
                .segments
                .iter()
                .enumerate()
                .find_map(|(at, segment)| {
                    segment.waiting.iter().find(|(_, mine)| **mine == ticket).map(|(model, _)| (at, *model))
                })
                .expect("a slot for nobody");
            self.segments[at].waiting.remove(&model);
            if self.segments[at].list.peek(lane(model)).is_some() {
                self.start(at, model, worker);
            } else {
                let holder = self.segments[at].holder(model);
                self.board.release(worker, &holder);
            }
        }
    }

    fn start(&mut self, at: usize, model: usize, worker: WorkerKey) {
        let segment = &mut self.segments[at];
        let line = segment.list.take(lane(model)).unwrap();
        assert!(!segment.done.contains(&line), "a line that has ended was sent");
        assert!(self.flights.iter().all(|flight| (flight.segment, flight.line) != (at, line)), "a line is sent twice");
        let begun = segment.begun.entry(line).or_default();
        *begun += 1;
        assert!(*begun <= TRIES.max_tries, "a line has more tries than it may");
        let desk = &self.workers[worker.0 as usize];
        assert!(desk.health.is_well() && desk.models.contains(&MODELS[model]), "sent to a worker that can't take it");
        let holder = segment.holder(model);
        self.flights.push(Flight { segment: at, line, worker: worker.0, holder });
    }

    fn check(&self) {
        let mut demand = Demand::new();
        for (key, worker) in (0..).zip(&self.workers) {
            let (in_flight, _) = self.board.load(WorkerKey(key));
            assert!(in_flight <= worker.limit);
            assert_eq!(in_flight as usize, self.flights.iter().filter(|flight| flight.worker == key).count());
        }
        for model in self.board.served() {
            demand.serve(model.clone(), self.board.capacity(&model));
        }
        let names = MODELS.map(str::to_owned);
        for segment in &self.segments {
            let ready: usize = (0..MODELS.len()).map(|model| segment.list.ready(model)).sum();
            assert!(ready <= segment.list.open());
            assert_eq!(segment.list.open(), segment.list.unfinished().len());
            assert_eq!(segment.list.open() + segment.done.len(), (segment.lines - segment.done_before) as usize);
            demand.running(segment.rank.tenant(), 1_000);
            for (at, name) in names.iter().enumerate() {
                demand.at_hand(name.as_str().into(), segment.rank, segment.list.ready(at));
            }
            let wanted = demand.wanted(&names, segment.rank);
            let served = self.board.served();
            assert!((0..MODELS.len()).all(|at| wanted & 1 << at == 0 || served.contains(MODELS[at])));
        }
    }
}

fn segment(random: &mut StdRng) -> Segment {
    let lines = random.random_range(1..=12u32);
    let mut text = String::new();
    for line in 0..lines {
        let model = MODELS[random.random_range(0..MODELS.len())];
        text.push_str(&format!(
            "{{\"custom_id\":\"{line}\",\"method\":\"POST\",\"url\":\"/v1/completions\",\"body\":{{\"model\":\"{model}\"}}}}\n"
        ));
    }
    let done: LineSet = (0..lines).filter(|_| random.random_bool(0.2)).collect();
    let rank = Rank::batch(Priority::new(random.random_range(-1..=1)).unwrap(), Timestamp(random.random_range(0..3)))
        .of(Tenant::named(["a", "b"][random.random_range(0..2)]));
    Segment {
        rank,
        list: WorkList::read(text.into(), &MODELS.map(str::to_owned), &done).unwrap(),
        begun: BTreeMap::new(),
        done: BTreeSet::new(),
        waiting: BTreeMap::new(),
        lines,
        done_before: done.len() as u32,
    }
}
