//! Whether failures are the worker's or the requests': a pure function of what came back, and when.
//!
//! One request that fails while others succeed is at fault itself. When many requests of a worker fail alike and none
//! succeeds, the worker is at fault, or what stands in front of it: a gateway without its upstream, a key that is not
//! taken, a path that is not there. Then the worker is held: one request at a time finds out whether it answers again,
//! at growing intervals. What fails meanwhile uses up no try. The first success ends it.
//!
//! A 429 or 503 without `Retry-After` holds the worker for a moment too. That moment doubles while nothing else comes
//! back, and the first success ends it as well. A worker that answers most requests is not held for a few that it pushes
//! back: its successes earn that.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, Ordering},
    },
    time::Duration,
};

use smallvec::SmallVec;
use tokio::time::Instant;

/// Different requests that must fail alike, without a success in between, before the worker is at fault. A batch of fewer
/// lines ends after its tries, whatever the reason.
pub const REQUESTS: usize = 8;
/// Of the failures since the last success, at least so many must be alike: three of four.
const ALIKE: (usize, usize) = (3, 4);
/// So soon after a success the worker is not at fault yet: a few lines in a row may have it in themselves.
const GRACE: Duration = Duration::from_millis(100);
/// How long a worker at fault is left alone before the first request that finds out whether it still is. Doubles.
pub const FIRST_GAP: Duration = Duration::from_millis(100);
/// The longest such time: an outage that ends is noticed within it.
pub const LONGEST_GAP: Duration = Duration::from_secs(5);
/// In an outage requests fail at once as a rule. While those on trial have not failed for so long, twice as many are sent.
const TRUST: Duration = Duration::from_secs(2);
/// Doublings of the requests on trial.
const MOST_TRUST: u32 = 16;
/// After so long without a failure what failed before says nothing any more.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// A worker that fails everything for so long is named, before it is certain that it is at fault.
const SUSPICIOUS: Duration = Duration::from_secs(2);
/// Connections that break together are one death of the worker.
const TOGETHER: Duration = Duration::from_millis(500);
/// The hold after a first 429 or 503 without `Retry-After`, and the longest.
pub const FIRST_PAUSE: Duration = Duration::from_millis(50);
pub const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// So many successes earn one push-back without a hold: fewer than one answer in five is a push-back then.
const EARNS_ONE: u32 = 4;
/// At most so many push-backs are earned: a worker that takes nothing any more is held after as many.
const MOST_EARNED: u32 = 8;

/// How a request failed, where that may be the worker's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// With this status.
    Status(u16),
    /// The connection broke.
    Broken,
    /// With a success that is no answer: a number for how it looks, so that those of one page are alike.
    Bad(u64),
}

impl std::fmt::Display for Sign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(status) => write!(f, "answers {status} to every request"),
            Self::Broken => f.write_str("breaks off every request"),
            Self::Bad(_) => f.write_str("answers every request with the same, and that is no answer"),
        }
    }
}

/// What becomes clear about a failure after it was counted: whether the worker was at fault. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Blame(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    whose: AtomicU8,
    failures: AtomicU32,
}

/// Whose failure it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not known yet: nothing has succeeded since, and not enough has failed.
    Open,
    /// The worker's.
    Worker,
    /// The request's.
    Request,
}

impl Blame {
    const WORKER: u8 = 1;
    const REQUEST: u8 = 2;

    /// What is known now. Whoever acts on it asks once: the next moment it may be another.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        match self.0.whose.load(Ordering::Acquire) {
            Self::WORKER => Verdict::Worker,
            Self::REQUEST => Verdict::Request,
            _ => Verdict::Open,
        }
    }

    /// Whether the worker was at fault.
    #[must_use]
    pub fn is_workers(&self) -> bool {
        self.verdict() == Verdict::Worker
    }

    /// Whether that is not known yet.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.verdict() == Verdict::Open
    }

    /// How many failures speak in this matter so far.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.0.failures.load(Ordering::Acquire)
    }

    fn decide(&self, whose: u8) {
        self.0.whose.store(whose, Ordering::Release);
    }
}

impl PartialEq for Blame {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Blame {}

/// What may be sent to a worker at a moment, as far as this decides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// As many requests as it has slots.
    Open,
    /// So many in all until one comes back: they find out whether it answers again.
    Trial(u32),
    /// None.
    Closed,
}

/// Failures of one kind since the last success.
#[derive(Clone, Debug)]
struct Alike {
    sign: Sign,
    count: usize,
    /// The first requests that failed so, each once.
    requests: SmallVec<[u64; REQUESTS]>,
}

/// The worker is at fault.
#[derive(Clone, Debug)]
struct Fault {
    sign: Sign,
    since: Instant,
    /// When the next request finds out whether it still is.
    next: Instant,
    gap: Duration,
}

impl Fault {
    /// How many times [`TRUST`] has passed since the next request may be sent. Only after that moment.
    fn trusted(&self, now: Instant) -> u32 {
        u32::try_from((now - self.next).as_secs() / TRUST.as_secs()).unwrap_or(u32::MAX / 2)
    }
}

/// What one worker's answers say of it.
#[derive(Clone, Debug, Default)]
pub struct Outage {
    /// Failures since the last success.
    failures: SmallVec<[Alike; 2]>,
    first_failure: Option<Instant>,
    last_failure: Option<Instant>,
    /// Shared by these failures.
    verdict: Blame,
    /// When connections last broke together.
    broke: Option<Instant>,
    fault: Option<Fault>,
    /// When it was last found to be well again. What was sent before and fails is what its outage has left behind.
    recovered: Option<Instant>,
    /// It takes nothing until then, for it asked for that.
    asked: Option<Instant>,
    /// It takes nothing until then or until it has answered something; and how long that was.
    paused: Option<(Instant, Duration)>,
    /// Successes that no push-back has used up, [`MOST_EARNED`] times [`EARNS_ONE`] at most.
    credit: u32,
    succeeded: Option<Instant>,
}

impl Outage {
    /// A request came back with an answer that is its own. Returns whether requests may go there that might not before.
    pub fn succeeded(&mut self, now: Instant) -> bool {
        if !self.failures.is_empty() {
            self.forget();
        }
        self.succeeded = Some(now);
        self.credit = (self.credit + 1).min(MOST_EARNED * EARNS_ONE);
        let paused = self.paused.take().is_some();
        let recovers = self.fault.take().is_some();
        if recovers {
            self.recovered = Some(now);
        }
        recovers || paused
    }

    /// What failed so far was the requests' fault.
    fn forget(&mut self) {
        self.failures.clear();
        if self.verdict.is_open() {
            self.verdict.decide(Blame::REQUEST);
        }
        self.verdict = Blame::default();
        self.first_failure = None;
    }

    /// A request that was sent at `sent` failed. `request` is the same each time it is sent. Returns whether the worker is
    /// at fault for it, and what will tell that later.
    pub fn failed(&mut self, sign: Sign, request: u64, sent: Instant, now: Instant) -> (bool, Blame) {
        if let Some(fault) = &mut self.fault {
            if sent >= fault.next {
                fault.gap = (2 * fault.gap).min(LONGEST_GAP);
                fault.next = now + fault.gap;
                fault.sign = sign;
            }
            return (true, self.verdict.clone());
        }
        if self.recovered.is_some_and(|at| sent < at) {
            let verdict = Blame::default();
            verdict.decide(Blame::WORKER);
            return (true, verdict);
        }
        let together = sign == Sign::Broken && self.broke.is_some_and(|at| now < at + TOGETHER);
        if sign == Sign::Broken && !together {
            self.broke = Some(now);
        }
        if together {
            // A worker that dies breaks off all it has: that is one failure, of it and not of them.
            return (false, self.verdict.clone());
        }
        if self.last_failure.replace(now).is_some_and(|last| now >= last + FORGOTTEN) {
            self.forget();
        }
        let verdict = self.verdict.clone();
        verdict.0.failures.fetch_add(1, Ordering::AcqRel);
        let since = *self.first_failure.get_or_insert(now);
        let all: usize = 1 + self.failures.iter().map(|alike| alike.count).sum::<usize>();
        let alike = match self.failures.iter_mut().position(|alike| alike.sign == sign) {
            Some(at) => &mut self.failures[at],
            None => {
                self.failures.push(Alike { sign, count: 0, requests: SmallVec::new() });
                let last = self.failures.len() - 1;
                &mut self.failures[last]
            }
        };
        alike.count += 1;
        if alike.requests.len() < REQUESTS && !alike.requests.contains(&request) {
            alike.requests.push(request);
        }
        let is_fresh = self.succeeded.is_some_and(|at| now < at + GRACE);
        if is_fresh || alike.requests.len() < REQUESTS || alike.count * ALIKE.1 < all * ALIKE.0 {
            return (false, verdict);
        }
        self.fault = Some(Fault { sign, since, next: now + FIRST_GAP, gap: FIRST_GAP });
        verdict.decide(Blame::WORKER);
        (true, verdict)
    }

    /// It said 429 or 503. `asked`: its `Retry-After`. Without one, only a request sent after the last pause makes it longer,
    /// and what the successes before have earned holds nothing.
    pub fn pushed_back(&mut self, asked: Option<Duration>, sent: Instant, now: Instant) {
        match asked {
            Some(asked) => self.asked = self.asked.max(Some(now + asked)),
            None => match &mut self.paused {
                Some((until, _)) if sent < *until => {}
                None if self.credit >= EARNS_ONE => self.credit -= EARNS_ONE,
                paused => {
                    let pause = paused.map_or(FIRST_PAUSE, |(_, pause)| (2 * pause).min(LONGEST_PAUSE));
                    *paused = Some((now + pause, pause));
                }
            },
        }
    }

    /// It is another one now, or was away.
    pub fn reset(&mut self) {
        *self = Self { asked: self.asked, ..Self::default() };
    }

    /// What may be sent there.
    #[must_use]
    pub fn gate(&self, now: Instant) -> Gate {
        if self.asked.is_some_and(|until| now < until) || self.paused.is_some_and(|(until, _)| now < until) {
            return Gate::Closed;
        }
        match &self.fault {
            None => Gate::Open,
            Some(fault) if now < fault.next => Gate::Closed,
            Some(fault) => {
                let trusted = fault.trusted(now);
                // One more each time after the last doubling: what became of those before may tell nothing, for instance
                // because a caller hung up.
                Gate::Trial((1 << trusted.min(MOST_TRUST)) + trusted.saturating_sub(MOST_TRUST))
            }
        }
    }

    /// When [`Outage::gate`] says something else by itself; none: not before something comes back.
    #[must_use]
    pub fn changes_at(&self, now: Instant) -> Option<Instant> {
        let held = [self.asked, self.paused.map(|(until, _)| until)].into_iter().flatten().filter(|until| now < *until);
        let held = held.max();
        let fault = self
            .fault
            .as_ref()
            .map(|fault| if now < fault.next { fault.next } else { fault.next + TRUST * (fault.trusted(now) + 1) });
        // What is held is looked at again when that is over.
        held.or(fault)
    }

    /// Whether it was held and nothing has succeeded since.
    #[must_use]
    pub fn is_doubted(&self) -> bool {
        self.fault.is_some() || self.paused.is_some()
    }

    /// What it may turn out to be at fault for, and since when: it has failed everything for a while, but not enough.
    #[must_use]
    pub fn suspicion(&self, now: Instant) -> Option<(Sign, Instant)> {
        let since = self.first_failure.filter(|since| self.fault.is_none() && now >= *since + SUSPICIOUS)?;
        let most = self.failures.iter().max_by_key(|alike| alike.count)?;
        (most.count > 1).then_some((most.sign, since))
    }

    /// What is wrong with it, and since when.
    #[must_use]
    pub fn complaint(&self) -> Option<(Sign, Instant)> {
        self.fault.as_ref().map(|fault| (fault.sign, fault.since))
    }
}

#[cfg(test)]
mod tests;
