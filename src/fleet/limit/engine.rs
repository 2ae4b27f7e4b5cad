//! A vLLM server in virtual time, for the tests of the limit: a front end that reads requests and writes answers one at a
//! time, and an engine that gives every running sequence a token a step. Nodes send as much as their limits allow.

use std::{collections::VecDeque, time::Duration};

use super::{LimitFinder, Seen, TICK};
use crate::fleet::Load;

/// The resolution of this simulation.
const STEP: Duration = Duration::from_millis(1);

/// What the server is like.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    pub max_num_seqs: usize,
    /// A step of the engine takes so long, and so much longer for each running sequence; seconds.
    pub step: f64,
    pub step_per_seq: f64,
    /// The first step of a sequence takes so much longer.
    pub prefill: f64,
    /// Tokens that a request gets.
    pub tokens: u32,
    /// Every other request gets so many more.
    pub spread: u32,
    /// What the front end takes for one request, and for one answer; seconds.
    pub front: f64,
    /// Tokens that the KV cache holds; every sequence has so many from its start.
    pub cache: usize,
    pub prompt: usize,
    /// Whether `/metrics` answers.
    pub metrics: bool,
}

impl Model {
    pub fn of(max_num_seqs: usize) -> Self {
        Self {
            max_num_seqs,
            step: 0.01,
            step_per_seq: 0.000_05,
            prefill: 0.0,
            tokens: 16,
            spread: 5,
            front: 0.000_01,
            cache: usize::MAX,
            prompt: 16,
            metrics: true,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Request {
    node: usize,
    sent: f64,
    left: u32,
    got: u32,
}

/// Who sends.
pub struct Node {
    pub limiter: Option<LimitFinder>,
    pub limit: u32,
    pub in_flight: u32,
    pub limits: Vec<u32>,
    /// It has requests to send.
    pub busy: bool,
    full: bool,
    answered: u32,
    latencies: f64,
    pub pushed_back: u32,
    scraped: f64,
}

pub struct World {
    pub model: Model,
    pub now: f64,
    pub nodes: Vec<Node>,
    pub stalled: bool,
    /// More than so many at once are refused, as a gateway does.
    pub refuses_above: usize,
    pub done: u64,
    pub preemptions: u64,
    inbox: VecDeque<Request>,
    waiting: VecDeque<Request>,
    running: Vec<Request>,
    outbox: VecDeque<Request>,
    front: f64,
    step_left: f64,
    gauges: (usize, usize),
    sent: u64,
    ticked: f64,
}

impl World {
    /// With one adaptive node per cap, or nodes of fixed limits.
    pub fn adaptive(model: Model, caps: &[u32]) -> Self {
        let limiters = caps.iter().map(|cap| LimitFinder::new(*cap));
        Self::with(model, limiters.map(|limiter| (limiter.limit(), Some(limiter))).collect())
    }

    pub fn fixed(model: Model, limit: u32) -> Self {
        Self::with(model, vec![(limit, None)])
    }

    fn with(model: Model, nodes: Vec<(u32, Option<LimitFinder>)>) -> Self {
        let node = |(limit, limiter)| Node {
            limiter,
            limit,
            in_flight: 0,
            limits: Vec::new(),
            busy: true,
            full: false,
            answered: 0,
            latencies: 0.0,
            pushed_back: 0,
            scraped: -1e9,
        };
        Self {
            model,
            now: 0.0,
            nodes: nodes.into_iter().map(node).collect(),
            stalled: false,
            refuses_above: usize::MAX,
            done: 0,
            preemptions: 0,
            inbox: VecDeque::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            outbox: VecDeque::new(),
            front: 0.0,
            step_left: 0.0,
            gauges: (0, 0),
            sent: 0,
            ticked: 0.0,
        }
    }

    /// Lets so many seconds pass; returns the answers per second meanwhile.
    pub fn run(&mut self, seconds: f64) -> f64 {
        let (until, done) = (self.now + seconds, self.done);
        while self.now < until {
            self.send();
            if !self.stalled {
                self.front_end();
                self.engine();
            }
            self.now += STEP.as_secs_f64();
            if self.now - self.ticked >= TICK.as_secs_f64() {
                self.ticked = self.now;
                self.look();
            }
        }
        #[allow(clippy::cast_precision_loss)]
        let rate = (self.done - done) as f64 / seconds;
        rate
    }

    pub fn limit(&self) -> u32 {
        self.nodes.iter().map(|node| node.limit).sum()
    }

    /// What every request that is there has, tokens.
    fn used(&self) -> usize {
        self.running.iter().map(|request| self.model.prompt + request.got as usize).sum()
    }

    fn send(&mut self) {
        for at in 0..self.nodes.len() {
            while self.nodes[at].busy && self.nodes[at].in_flight < self.nodes[at].limit {
                let there = self.inbox.len() + self.waiting.len() + self.running.len();
                if there >= self.refuses_above {
                    self.nodes[at].pushed_back += 1;
                    self.nodes[at].full = true;
                    break;
                }
                self.sent += 1;
                let left = self.model.tokens + if self.sent.is_multiple_of(2) { self.model.spread } else { 0 };
                self.inbox.push_back(Request { node: at, sent: self.now, left, got: 0 });
                self.nodes[at].in_flight += 1;
            }
            self.nodes[at].full |= self.nodes[at].in_flight >= self.nodes[at].limit;
        }
    }

    fn front_end(&mut self) {
        self.front += STEP.as_secs_f64();
        while self.front >= self.model.front {
            if let Some(request) = self.outbox.pop_front() {
                let node = &mut self.nodes[request.node];
                node.in_flight -= 1;
                node.answered += 1;
                node.latencies += self.now - request.sent;
                self.done += 1;
            } else if let Some(request) = self.inbox.pop_front() {
                self.waiting.push_back(request);
            } else {
                self.front = 0.0;
                return;
            }
            self.front -= self.model.front;
        }
    }

    fn engine(&mut self) {
        self.step_left -= STEP.as_secs_f64();
        if self.step_left > 0.0 {
            return;
        }
        for request in &mut self.running {
            request.left -= 1;
            request.got += 1;
        }
        self.outbox.extend(self.running.extract_if(.., |request| request.left == 0));
        let mut used = self.used();
        while used > self.model.cache
            && let Some(mut last) = self.running.pop()
        {
            self.preemptions += 1;
            used -= self.model.prompt + last.got as usize;
            last.left += last.got;
            last.got = 0;
            self.waiting.push_front(last);
        }
        let mut fresh = 0.0;
        while self.running.len() < self.model.max_num_seqs
            && used + self.model.prompt <= self.model.cache
            && let Some(request) = self.waiting.pop_front()
        {
            used += self.model.prompt;
            fresh += 1.0;
            self.running.push(request);
        }
        self.gauges = (self.running.len(), self.waiting.len());
        #[allow(clippy::cast_precision_loss)]
        let sequences = self.running.len() as f64;
        if sequences > 0.0 {
            self.step_left += self.model.step + self.model.step_per_seq * sequences + self.model.prefill * fresh;
        } else {
            self.step_left = 0.0;
        }
    }

    #[allow(clippy::cast_precision_loss)]
    fn load(&self) -> Load {
        Load {
            running: self.gauges.0 as f64,
            waiting: self.gauges.1 as f64,
            kv_cache_usage: self.used() as f64 / self.model.cache as f64,
            preemptions: self.preemptions as f64,
            ..Load::default()
        }
    }

    fn look(&mut self) {
        let (load, now) = (self.load(), Duration::from_secs_f64(self.now));
        for node in &mut self.nodes {
            node.limits.push(node.limit);
            let Some(limiter) = &mut node.limiter else { continue };
            let scrape = self.model.metrics
                && !self.stalled
                && self.now - node.scraped >= limiter.pace(now).as_secs_f64() - 1e-6;
            if scrape {
                node.scraped = self.now;
            }
            let seen = Seen {
                in_flight: node.in_flight,
                full: node.full,
                answered: node.answered,
                latency: Duration::from_secs_f64(node.latencies / f64::from(node.answered.max(1))),
                load: scrape.then_some(load),
                pushed_back: node.pushed_back,
            };
            node.limit = limiter.look(now, &seen);
            (node.full, node.answered, node.latencies, node.pushed_back) = (false, 0, 0.0, 0);
        }
    }
}
