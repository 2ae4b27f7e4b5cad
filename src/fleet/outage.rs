//! Decides whether failures are the worker's fault or the requests': a pure function of the outcomes and their times.
//!
//! A request that fails while others succeed is at fault itself. If many requests of a worker fail alike and none
//! succeeds, the worker is at fault, or something in front of it: a gateway without its upstream, a wrong key, a
//! missing path. Then the worker is held: single requests on trial find out, at growing intervals, whether it answers
//! again. Failures meanwhile use up no try. The first success ends the outage.
//!
//! A 429 or 503 without `Retry-After` also holds the worker, for a short pause. The pause doubles until a request
//! succeeds. A worker that answers most requests is not held for a few push-backs: four successes offset one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU32, Ordering},
    },
    time::Duration,
};

use smallvec::SmallVec;
use tokio::time::Instant;

/// This many different requests must fail alike, without a success in between, before the worker is at fault.
pub const REQUESTS: usize = 8;
/// The share of the failures since the last success that must be alike: three of four.
const ALIKE: (usize, usize) = (3, 4);
/// Time after a success during which the worker is not at fault, because a few bad lines may follow each other.
const GRACE: Duration = Duration::from_millis(100);
/// The time before the first request on trial. It doubles with each that fails.
pub const FIRST_GAP: Duration = Duration::from_millis(100);
/// The longest such time, and so the longest time until the end of an outage is noticed.
pub const LONGEST_GAP: Duration = Duration::from_secs(5);
/// Requests usually fail at once in an outage. Each time that those on trial have not failed for this long, twice as
/// many are sent.
const TRUST: Duration = Duration::from_secs(2);
/// The most doublings of the requests on trial.
const MOST_TRUST: u32 = 16;
/// Failures are forgotten after this time without another one.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// A worker that has failed everything for this long is named to users, although it may not be at fault.
const SUSPICIOUS: Duration = Duration::from_secs(2);
/// Connections that break within this time count as one death of the worker, and answers cut off as one stop.
const TOGETHER: Duration = Duration::from_millis(500);
/// The first and the longest pause after a 429 or 503 without `Retry-After`.
pub const FIRST_PAUSE: Duration = Duration::from_millis(50);
pub const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// This many successes offset one push-back, so a worker with fewer than one push-back in five answers is not held.
const EARNS_ONE: u32 = 4;
/// The most push-backs that successes offset. A worker that accepts nothing any more is held after as many.
const MOST_EARNED: u32 = 8;

/// How a request failed, if that may be the worker's fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sign {
    /// The worker answered with this status.
    Status(u16),
    /// The connection broke.
    Broken,
    /// The answer was a success, but unusable. The number is a hash of its beginning, equal for copies of one page.
    Bad(u64),
    /// The engine cut the answer off.
    CutOff,
}

impl Sign {
    /// Whether a worker that fails so fails all that it has at once, when it stops or dies.
    fn comes_together(self) -> bool {
        matches!(self, Self::Broken | Self::CutOff)
    }

    /// Whether this failure shows that an outage with the other sign is over: what answers does not break off, and what
    /// begins a text has its engine back.
    fn ends(self, outage: Self) -> bool {
        self != outage && (outage == Self::Broken || self == Self::CutOff)
    }
}

impl std::fmt::Display for Sign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status(status) => write!(f, "answers {status} to every request"),
            Self::Broken => f.write_str("breaks off every request"),
            Self::Bad(_) => f.write_str("answers every request with the same invalid answer"),
            Self::CutOff => f.write_str("cuts off every answer"),
        }
    }
}

/// The verdict on a failure, which may come after the failure was counted. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Blame(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    whose: AtomicU8,
    failures: AtomicU32,
}

/// Who is at fault for a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not known yet: nothing has succeeded since, and too little has failed.
    Open,
    Worker,
    Request,
}

impl Blame {
    const WORKER: u8 = 1;
    const REQUEST: u8 = 2;

    /// The verdict so far. It may change at any moment, so callers ask once and act on that.
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

    /// The number of failures under this verdict so far.
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

/// How many requests may be sent to a worker now, as far as outages are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Requests may use all slots.
    Open,
    /// This many on trial, in all, until one comes back: they find out whether it answers again.
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
    /// When the next request on trial may be sent.
    next: Instant,
    gap: Duration,
}

impl Fault {
    /// How many times [`TRUST`] has passed since `next`. Call it only after that moment.
    fn trusted(&self, now: Instant) -> u32 {
        u32::try_from((now - self.next).as_secs() / TRUST.as_secs()).unwrap_or(u32::MAX / 2)
    }
}

/// The state of one worker, according to its answers.
#[derive(Clone, Debug, Default)]
pub struct Outage {
    /// Failures since the last success.
    failures: SmallVec<[Alike; 2]>,
    first_failure: Option<Instant>,
    last_failure: Option<Instant>,
    /// The verdict of these failures.
    verdict: Blame,
    /// When connections last broke together, or answers were cut off together.
    together: Option<(Sign, Instant)>,
    fault: Option<Fault>,
    /// When its last outage ended. A request sent before that which fails belongs to the outage.
    recovered: Option<Instant>,
    /// The end of the hold that its last `Retry-After` asked for.
    asked: Option<Instant>,
    /// The end of its pause, unless it answers before, and the pause's length.
    paused: Option<(Instant, Duration)>,
    /// Successes that have not offset a push-back, at most [`MOST_EARNED`] times [`EARNS_ONE`].
    credit: u32,
    succeeded: Option<Instant>,
}

impl Outage {
    /// A request has its answer. Returns whether this ends a hold.
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

    /// Decides that the failures so far were the requests' fault, and forgets them.
    fn forget(&mut self) {
        self.failures.clear();
        if self.verdict.is_open() {
            self.verdict.decide(Blame::REQUEST);
        }
        self.verdict = Blame::default();
        self.first_failure = None;
    }

    /// A request that was sent at `sent` has failed. `request` identifies it over all its tries. Returns whether the
    /// worker is at fault, and the verdict, which may come later.
    pub fn failed(&mut self, sign: Sign, request: u64, sent: Instant, now: Instant) -> (bool, Blame) {
        let is_over = |fault: &Fault| sent >= fault.next && sign.ends(fault.sign);
        if self.fault.take_if(|fault| is_over(fault)).is_some() {
            self.forget();
        }
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
        if sign.comes_together() {
            // A worker that dies breaks all its connections: that is one failure, and the worker's.
            if self.together.is_some_and(|(other, at)| other == sign && now < at + TOGETHER) {
                return (false, self.verdict.clone());
            }
            self.together = Some((sign, now));
        }
        self.drop_what_ends_by(sign);
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

    /// A request that was sent at `sent` got an answer that is not the request's, and shows no more than that something
    /// answers. Returns whether that ends an outage.
    pub fn answered_otherwise(&mut self, sent: Instant) -> bool {
        if self.fault.is_none() {
            self.failures.retain(|alike| alike.sign != Sign::Broken);
            self.first_failure = self.first_failure.filter(|_| !self.failures.is_empty());
        }
        let ends = self.fault.take_if(|fault| sent >= fault.next && fault.sign == Sign::Broken).is_some();
        if ends {
            self.forget();
        }
        ends
    }

    /// Drops the failures that are over because there is one with this sign.
    fn drop_what_ends_by(&mut self, sign: Sign) {
        self.failures.retain(|alike| !sign.ends(alike.sign));
        self.first_failure = self.first_failure.filter(|_| !self.failures.is_empty());
    }

    /// It answered 429 or 503. `asked`: its `Retry-After`. Without one it pauses, unless earlier successes offset this.
    /// Only a request sent after the last pause makes the next one longer.
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

    /// Forgets everything but its `Retry-After`: it was replaced, or was away.
    pub fn reset(&mut self) {
        *self = Self { asked: self.asked, ..Self::default() };
    }

    /// How many requests may be sent now.
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
                // One more each time after the last doubling: the ones before may have ended without an outcome, for
                // example because a caller hung up.
                Gate::Trial((1 << trusted.min(MOST_TRUST)) + trusted.saturating_sub(MOST_TRUST))
            }
        }
    }

    /// When [`Outage::gate`] changes with time alone. `None`: not before a request ends.
    #[must_use]
    pub fn changes_at(&self, now: Instant) -> Option<Instant> {
        let held = [self.asked, self.paused.map(|(until, _)| until)].into_iter().flatten().filter(|until| now < *until);
        let held = held.max();
        let fault = self
            .fault
            .as_ref()
            .map(|fault| if now < fault.next { fault.next } else { fault.next + TRUST * (fault.trusted(now) + 1) });
        // After a hold, the caller asks again.
        held.or(fault)
    }

    /// Whether it was held and nothing has succeeded since.
    #[must_use]
    pub fn is_doubted(&self) -> bool {
        self.fault.is_some() || self.paused.is_some()
    }

    /// The failure that it may turn out to be at fault for, and since when, if it has failed everything for a while.
    #[must_use]
    pub fn suspicion(&self, now: Instant) -> Option<(Sign, Instant)> {
        // One of long ago may be over: nobody has asked since.
        self.last_failure.filter(|last| now < *last + FORGOTTEN)?;
        let since = self.first_failure.filter(|since| self.fault.is_none() && now >= *since + SUSPICIOUS)?;
        let most = self.failures.iter().max_by_key(|alike| alike.count)?;
        (most.count > 1).then_some((most.sign, since))
    }

    /// The current outage: how requests fail, and since when.
    #[must_use]
    pub fn complaint(&self) -> Option<(Sign, Instant)> {
        self.fault.as_ref().map(|fault| (fault.sign, fault.since))
    }
}

#[cfg(test)]
mod tests;
