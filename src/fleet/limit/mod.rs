//! How many requests one worker may have in flight: pure. It is looked at again and again with what the worker did since.
//!
//! A vLLM server says in `/metrics` how many requests run and how many wait. The limit is raised until a few wait, so that a
//! place that becomes free is filled at once, and no further: what waits there is late for interactive calls, and for other
//! nodes that use the worker. Of a worker that says nothing only the throughput is known: [`climb`] feels its way.
//!
//! It is here and not in the scheduler because the fleet uses it, and the scheduler uses the fleet.

mod climb;
#[cfg(test)]
mod engine;
#[cfg(test)]
mod tests;

use std::time::Duration;

use super::Load;
use climb::Climb;

/// The lowest limit: a worker that takes requests at all gets one at a time.
pub const FLOOR: u32 = 1;
/// The first limit. Little for a GPU, and few enough that a small worker is not flooded.
pub const START: u32 = 64;
/// Between two looks at a worker that has requests in flight.
pub const TICK: Duration = Duration::from_millis(100);

/// So much of what the engine can run is to wait even when the least waits: below the least more is sent, above the most
/// less.
const LEAST_WAITING: f64 = 0.05;
const MOST_WAITING: f64 = 0.10;
/// Looks in a row with too few waiting after which the limit doubles again.
const LOWS_TO_RAMP: u32 = 4;
/// After a change, what is seen for so long is still of the time before.
const SETTLE: Duration = Duration::from_millis(250);
/// Less is sent only after so much time, or a request's latency if that is longer, in which never too few waited.
const SHORTEST_WATCH: Duration = Duration::from_secs(1);
const LONGEST_WATCH: Duration = Duration::from_secs(3);
/// For so long the most that ran at once counts as what the engine can run, or up to twice as long.
const CAPACITY_LASTS: Duration = Duration::from_secs(2);
/// With so little of the KV cache free, more requests would only push others out.
const FULL_CACHE: f64 = 0.97;
/// What a push-back leaves of the limit, and what it leaves if there was one just before, or if the limit was doubling.
const BACK_OFF: f64 = 0.9;
const BACK_OFF_MORE: f64 = 0.5;
/// Push-backs within so short a time are one.
const CUT_GAP: Duration = Duration::from_millis(500);
/// A push-back so soon after another is worse than one alone.
const CUT_AGAIN: Duration = Duration::from_secs(2);
/// Push-backs are a reason to send less if they are more than one in so many.
const MANY_OF: u32 = 10;
/// A worker whose metrics have been read counts as one with metrics for so long without them.
const METRICS_LAST: Duration = Duration::from_secs(10);

/// What one worker did since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seen {
    /// This node's requests there, now.
    pub in_flight: u32,
    /// The limit was reached since: more would have been sent.
    pub full: bool,
    /// Requests answered since.
    pub answered: u32,
    /// How long they took, on average: by Little's law, in flight over latency is the throughput.
    pub latency: Duration,
    /// What its `/metrics` says, if they have just been read.
    pub load: Option<Load>,
    /// 429, 503 and time-outs since.
    pub pushed_back: u32,
}

/// One worker's limit.
#[derive(Clone, Debug)]
pub struct Limiter {
    cap: u32,
    limit: u32,
    /// Doubles while too few wait.
    ramping: bool,
    /// Looks in a row with too few waiting; with enough.
    lows: u32,
    enough: u32,
    capacity: Capacity,
    /// Since when enough wait, and how many more than needed at the least.
    watch: Option<(Duration, f64)>,
    /// Of the requests answered last.
    latency: Duration,
    last: Option<(Duration, Load)>,
    cut: Option<Cut>,
    push_backs: PushBacks,
    climb: Climb,
    changed_at: Duration,
}

/// What came back lately: of the last half second, or of the second before.
#[derive(Clone, Copy, Debug, Default)]
struct PushBacks {
    since: Duration,
    pushed_back: u32,
    answered: u32,
}

impl PushBacks {
    /// Takes in what was seen. Returns whether so many were pushed back that fewer should be sent: a few of many are those
    /// requests' own bad luck.
    fn are_many(&mut self, now: Duration, seen: &Seen) -> bool {
        if now.saturating_sub(self.since) >= CUT_GAP {
            // The older half counts half.
            *self = Self { since: now, pushed_back: self.pushed_back / 2, answered: self.answered / 2 };
        }
        self.pushed_back = self.pushed_back.saturating_add(seen.pushed_back);
        self.answered = self.answered.saturating_add(seen.answered);
        let all = u64::from(self.pushed_back) + u64::from(self.answered) + u64::from(seen.in_flight);
        seen.pushed_back > 0 && u64::from(self.pushed_back) * u64::from(MANY_OF) > all
    }
}

/// How many requests the engine can run at once: as many as it was seen to.
#[derive(Clone, Copy, Debug, Default)]
struct Capacity {
    since: Duration,
    now: f64,
    before: f64,
}

impl Capacity {
    fn note(&mut self, now: Duration, running: f64) {
        if now.saturating_sub(self.since) >= CAPACITY_LASTS {
            *self = Self { since: now, now: 0.0, before: self.now };
        }
        self.now = self.now.max(running);
    }

    fn get(&self) -> f64 {
        self.now.max(self.before)
    }
}

/// The last push-back.
#[derive(Clone, Copy, Debug)]
struct Cut {
    at: Duration,
    /// What was left then.
    left: f64,
}

impl Cut {
    /// How far the limit may have grown since: slowly near where the worker pushed back, then ever faster, as TCP's CUBIC
    /// does. Back at that place after some 6 s, past its double after 16 s.
    fn allows(self, now: Duration) -> f64 {
        let seconds = now.saturating_sub(self.at).as_secs_f64();
        let cubed = seconds.powi(3);
        // The second term is for those that are almost at the floor.
        self.left * (1.0 + 0.01 * seconds + 0.000_2 * cubed) + (0.1 * seconds + 0.002 * cubed)
    }
}

impl Limiter {
    /// For a worker of which nothing is known. `cap` is 1 or more.
    #[must_use]
    pub fn new(cap: u32) -> Self {
        let limit = START.min(cap).max(FLOOR);
        Self {
            cap: cap.max(FLOOR),
            limit,
            ramping: true,
            lows: 0,
            enough: 0,
            capacity: Capacity::default(),
            watch: None,
            latency: Duration::ZERO,
            last: None,
            cut: None,
            push_backs: PushBacks::default(),
            climb: Climb::default(),
            changed_at: Duration::ZERO,
        }
    }

    /// The limit in force.
    #[must_use]
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// How long to wait before the worker's metrics are read again: short while the limit is about to change, for they are
    /// not free to a busy server.
    #[must_use]
    pub fn pace(&self, now: Duration) -> Duration {
        let quiet = now.saturating_sub(self.changed_at);
        let many_wait = self.last.is_some_and(|(_, load)| load.waiting > MOST_WAITING * load.running + 2.0);
        if self.ramping && self.last.is_some() && quiet < Duration::from_secs(3) {
            TICK
        } else if quiet < Duration::from_secs(5) {
            Duration::from_millis(250)
        } else if many_wait {
            Duration::from_millis(500)
        } else {
            Duration::from_secs(1)
        }
    }

    /// Takes into account what the worker did since the last look. `now` counts from any fixed time. Returns the limit.
    pub fn look(&mut self, now: Duration, seen: &Seen) -> u32 {
        let before = self.limit;
        if seen.answered > 0 {
            self.latency = seen.latency;
        }
        let pushed_back = self.push_backs.are_many(now, seen);
        if pushed_back {
            self.pushed_back_at(now, seen);
        }
        match (seen.load, self.last) {
            (Some(load), last) => {
                // A lower count than before is a worker that was started anew.
                if last.is_some_and(|(_, last)| load.preemptions > last.preemptions) {
                    self.preempted_at(now, seen, load);
                } else if !pushed_back {
                    self.by_queue(now, seen, load);
                }
                self.last = Some((now, load));
            }
            // The worker is too busy to say: wait until it does.
            (None, Some((at, _))) if now.saturating_sub(at) < METRICS_LAST => {}
            (None, _) => {
                self.last = None;
                let most = self.most(now);
                self.limit = self.climb.look(now, seen, self.limit, most);
            }
        }
        self.limit = self.limit.clamp(FLOOR, self.cap);
        if self.limit != before {
            self.changed_at = now;
            self.watch = None;
        }
        self.limit
    }

    /// The limit may be that high now.
    fn most(&self, now: Duration) -> u32 {
        self.cut.map_or(self.cap, |cut| round(cut.allows(now)).min(self.cap))
    }

    /// More requests run than the cache has room for: fewer than run now are to be there at all.
    fn preempted_at(&mut self, now: Duration, seen: &Seen, load: Load) {
        let in_flight = f64::from(seen.in_flight);
        let share = in_flight / (load.running + load.waiting).max(in_flight).max(1.0);
        self.back_off(now, seen, load.running * share * BACK_OFF);
    }

    fn pushed_back_at(&mut self, now: Duration, seen: &Seen) {
        let again = self.cut.is_some_and(|cut| now.saturating_sub(cut.at) < CUT_AGAIN);
        // What was not used was not what was too much.
        let used = f64::from(self.limit.min(seen.in_flight.max(self.limit / 2)));
        self.back_off(now, seen, used * if self.ramping || again { BACK_OFF_MORE } else { BACK_OFF });
    }

    fn back_off(&mut self, now: Duration, seen: &Seen, left: f64) {
        let too_soon = self.cut.is_some_and(|cut| now.saturating_sub(cut.at) < CUT_GAP);
        // The last one has not had its effect yet.
        let pending = self.cut.is_some_and(|cut| f64::from(seen.in_flight) > cut.left.max(f64::from(self.limit)));
        if too_soon || pending {
            return;
        }
        let left = left.clamp(f64::from(FLOOR), f64::from(self.limit));
        self.limit = round(left);
        self.cut = Some(Cut { at: now, left });
        self.ramping = false;
        (self.lows, self.enough) = (0, 0);
        self.climb = Climb::default();
    }

    /// What waits is judged by the least of it. An engine whose requests are all alike runs them in waves: they are answered
    /// together, and until the next ones have come in it would be idle, if they were not waiting there already. So what
    /// counts is by how much what is there, running or waiting, exceeds what the engine can run at once.
    fn by_queue(&mut self, now: Duration, seen: &Seen, load: Load) {
        let before = self.capacity.get();
        self.capacity.note(now, load.running);
        if self.capacity.get() < before {
            // What was thought to be needed was not.
            self.watch = None;
        }
        let (total, capacity) = (load.running + load.waiting, self.capacity.get());
        // An engine whose cache is full runs fewer than it did: what waits, waits.
        let full_cache = load.kv_cache_usage >= FULL_CACHE;
        let spare = if full_cache { load.waiting } else { (total - capacity).min(load.waiting) };
        // Where few run the shares are no whole requests: one may wait.
        let least = (LEAST_WAITING * capacity).max(1.0);
        let most = (MOST_WAITING * capacity).max(2.0);
        let target = f64::midpoint(least, most);
        // Other nodes send to this worker too: each answers for its share of what waits.
        let in_flight = f64::from(seen.in_flight);
        let share = if in_flight > 0.0 { in_flight / total.max(in_flight) } else { 0.0 };
        let settled = now.saturating_sub(self.changed_at) >= SETTLE;
        if spare < least {
            self.watch = None;
            (self.lows, self.enough) = if load.waiting < least { (self.lows + 1, 0) } else { (0, self.enough + 1) };
            self.ramping &= self.enough < 2;
            if !seen.full || full_cache {
                return;
            }
            self.ramping |= self.lows >= LOWS_TO_RAMP;
            let more = if self.ramping {
                // What was sent has not all arrived: whether more is needed is not known yet.
                if total < in_flight / 2.0 {
                    return;
                }
                // Doubled from what is in use: a look too early doubles nothing twice.
                (2 * seen.in_flight).max(self.limit + 1)
            } else if settled && seen.answered > 0 {
                // More than another full engine's worth can't help.
                let room = (2.0 * capacity - total.max(in_flight)).max(1.0);
                self.limit + round(((target - spare) * share).clamp(1.0, room))
            } else {
                return;
            };
            let more = more.min((2 * self.limit).max(self.limit + 1));
            self.limit = self.limit.max(more.min(self.most(now)));
            return;
        }
        (self.lows, self.enough) = (0, self.enough + 1);
        self.ramping &= self.enough < 2;
        if !settled {
            return;
        }
        let (since, spare) = self.watch.map_or((now, spare), |(since, fewest)| (since, spare.min(fewest)));
        self.watch = Some((since, spare));
        let watched = now.saturating_sub(since) >= self.latency.clamp(SHORTEST_WATCH, LONGEST_WATCH);
        if watched && spare > most && in_flight > 0.0 {
            // Counted from what is in flight, not from the limit, so that the delay until they are fewer does no harm: what
            // has gone since no longer waits either.
            let fewer = round((in_flight - (spare - target) * share).max(0.0));
            self.limit = self.limit.min(fewer.max(self.limit / 8));
        } else if watched {
            self.watch = None;
        }
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // saturates, and is clamped
fn round(limit: f64) -> u32 {
    limit.round() as u32
}
