//! Finds how many requests one worker may have in flight. Pure: called repeatedly with what the worker did since the
//! last call.
//!
//! A vLLM server reports in `/metrics` how many requests run and how many wait. The limit is raised until a few wait,
//! so that a finished request is replaced at once, and no further: a longer queue delays interactive calls, and other
//! nodes that use the worker. For a worker without metrics only the throughput is known; [`climb`] handles it.
//!
//! It is in `fleet` because the fleet uses it, and the scheduler uses the fleet.

mod climb;
#[cfg(test)]
mod engine;
#[cfg(test)]
mod tests;

use std::time::Duration;

use super::Load;
use climb::Climb;

/// The lowest limit.
pub const FLOOR: u32 = 1;
/// The first limit: little for a GPU, and few enough not to flood a small worker.
pub const START: u32 = 64;
/// The time between two updates for a worker that has requests in flight.
pub const TICK: Duration = Duration::from_millis(100);

/// The wanted queue, as a share of what the engine can run, measured when the fewest wait: below the lower bound more
/// is sent, above the upper bound less.
const LEAST_WAITING: f64 = 0.05;
const MOST_WAITING: f64 = 0.10;
/// Consecutive updates with too few waiting after which the limit doubles again.
const LOWS_TO_RAMP: u32 = 4;
/// Time after a change during which measurements still reflect the old limit.
const SETTLE: Duration = Duration::from_millis(250);
/// The limit is lowered only if enough requests waited throughout this time, or throughout a request's latency if that
/// is longer, within these bounds.
const SHORTEST_WATCH: Duration = Duration::from_secs(1);
const LONGEST_WATCH: Duration = Duration::from_secs(3);
/// How long the highest number of running requests counts as the engine's capacity; at most twice this.
const CAPACITY_LASTS: Duration = Duration::from_secs(2);
/// Use of the KV cache above which more requests would only evict others.
const FULL_CACHE: f64 = 0.97;
/// The factor by which a push-back lowers the limit, and the factor if there was one just before, or if the limit was
/// doubling.
const BACK_OFF: f64 = 0.9;
const BACK_OFF_MORE: f64 = 0.5;
/// Push-backs within this time count as one.
const CUT_GAP: Duration = Duration::from_millis(500);
/// A second push-back within this time lowers the limit by [`BACK_OFF_MORE`].
const CUT_AGAIN: Duration = Duration::from_secs(2);
/// Push-backs lower the limit only if they are more than one in this many answers.
const MANY_OF: u32 = 10;
/// How long a worker counts as one with metrics after they were last read.
const METRICS_LAST: Duration = Duration::from_secs(10);

/// What one worker did since the last update.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seen {
    /// This node's requests in flight there now.
    pub in_flight: u32,
    /// Whether the limit was reached since, so that more would have been sent.
    pub full: bool,
    /// Requests answered since the last update.
    pub answered: u32,
    /// Their mean duration. By Little's law, requests in flight divided by latency is the throughput.
    pub latency: Duration,
    /// The worker's metrics, if they have just been read.
    pub load: Option<Load>,
    /// 429, 503 and timeouts since the last update.
    pub pushed_back: u32,
}

/// One worker's limit.
#[derive(Clone, Debug)]
pub struct LimitFinder {
    cap: u32,
    limit: u32,
    /// Whether the limit doubles while too few wait.
    ramping: bool,
    /// Consecutive updates with too few waiting, and with enough.
    lows: u32,
    enough: u32,
    capacity: Capacity,
    /// Since when enough wait, and the smallest excess since then.
    watch: Option<(Duration, f64)>,
    /// The latency of the requests answered last.
    latency: Duration,
    last: Option<(Duration, Load)>,
    cut: Option<Cut>,
    push_backs: PushBacks,
    climb: Climb,
    changed_at: Duration,
}

/// Recent answers and push-backs: of the last half second, and of the second before.
#[derive(Clone, Copy, Debug, Default)]
struct PushBacks {
    since: Duration,
    pushed_back: u32,
    answered: u32,
}

impl PushBacks {
    /// Adds what was seen. Returns whether there are enough push-backs to send less: a few of many are not the worker's
    /// state.
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

/// The engine's capacity: the most requests that it was seen to run at once.
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

/// The last reduction of the limit.
#[derive(Clone, Copy, Debug)]
struct Cut {
    at: Duration,
    /// The limit after it.
    left: f64,
}

impl Cut {
    /// The bound of the limit after this time: it grows slowly near where the worker pushed back, then ever faster, as
    /// TCP's CUBIC does. It reaches the old limit after about 6 s and twice that after 16 s.
    fn allows(self, now: Duration) -> f64 {
        let seconds = now.saturating_sub(self.at).as_secs_f64();
        let cubed = seconds.powi(3);
        // The second term is for limits near the floor.
        self.left * (1.0 + 0.01 * seconds + 0.000_2 * cubed) + (0.1 * seconds + 0.002 * cubed)
    }
}

impl LimitFinder {
    /// The limiter of a new worker. `cap` is 1 or more.
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

    /// The time until the worker's metrics should be read again: short while the limit is about to change, because
    /// reading them costs a busy server time.
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

    /// Updates the limit with what the worker did since the last update. `now` counts from any fixed time. Returns the
    /// limit.
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
                // A lower count than before means that the worker was restarted.
                if last.is_some_and(|(_, last)| load.preemptions > last.preemptions) {
                    self.preempted_at(now, seen, load);
                } else if !pushed_back {
                    self.by_queue(now, seen, load);
                }
                self.last = Some((now, load));
            }
            // The worker is too busy to answer: wait until it does.
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

    /// The highest limit allowed now.
    fn most(&self, now: Duration) -> u32 {
        self.cut.map_or(self.cap, |cut| round(cut.allows(now)).min(self.cap))
    }

    /// More requests run than the cache has room for: lower the limit below what runs now.
    fn preempted_at(&mut self, now: Duration, seen: &Seen, load: Load) {
        let in_flight = f64::from(seen.in_flight);
        let share = in_flight / (load.running + load.waiting).max(in_flight).max(1.0);
        self.back_off(now, seen, load.running * share * BACK_OFF);
    }

    fn pushed_back_at(&mut self, now: Duration, seen: &Seen) {
        let again = self.cut.is_some_and(|cut| now.saturating_sub(cut.at) < CUT_AGAIN);
        // The unused part of the limit was not the cause.
        let used = f64::from(self.limit.min(seen.in_flight.max(self.limit / 2)));
        self.back_off(now, seen, used * if self.ramping || again { BACK_OFF_MORE } else { BACK_OFF });
    }

    fn back_off(&mut self, now: Duration, seen: &Seen, left: f64) {
        let too_soon = self.cut.is_some_and(|cut| now.saturating_sub(cut.at) < CUT_GAP);
        // The last reduction has not had its effect yet.
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

    /// Sets the limit by the engine's queue, judged by its minimum. An engine whose requests are all alike runs them in
    /// waves: they finish together, and until new ones arrive the engine would be idle if none were waiting. So the
    /// measure is by how much the requests there, running or waiting, exceed the engine's capacity.
    fn by_queue(&mut self, now: Duration, seen: &Seen, load: Load) {
        let before = self.capacity.get();
        self.capacity.note(now, load.running);
        if self.capacity.get() < before {
            // The queue was longer than needed.
            self.watch = None;
        }
        let (total, capacity) = (load.running + load.waiting, self.capacity.get());
        // An engine with a full cache runs fewer than before; the rest waits.
        let full_cache = load.kv_cache_usage >= FULL_CACHE;
        let spare = if full_cache { load.waiting } else { (total - capacity).min(load.waiting) };
        // With few running requests the shares are fractions: one may wait.
        let least = (LEAST_WAITING * capacity).max(1.0);
        let most = (MOST_WAITING * capacity).max(2.0);
        let target = f64::midpoint(least, most);
        // Other nodes send to this worker too: each accounts for its share of the queue.
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
                // Not all requests sent have arrived, so it is not known yet whether more are needed.
                if total < in_flight / 2.0 {
                    return;
                }
                // Doubles the requests in flight, not the limit, so that an early update does not double twice.
                (2 * seen.in_flight).max(self.limit + 1)
            } else if settled && seen.answered > 0 {
                // More than twice the capacity can't help.
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
            // Computed from the requests in flight, not from the limit, so the delay until they are fewer does no harm:
            // requests that have finished since no longer wait either.
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
