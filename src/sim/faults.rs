//! Faults that a test can cause at run time, and what it can observe: the handle to a running [`super::Sim`].

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::http::StatusCode;
use bytes::Bytes;
use tokio::sync::watch;

/// A fault of an inference request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Answer with this status and, in whole seconds, a `Retry-After` header.
    Fail {
        /// The answer's status.
        status: StatusCode,
        /// The `Retry-After` header. `None`: without it.
        retry_after: Option<Duration>,
    },
    /// Accept the request and never answer it.
    Hang,
    /// Close the connection without an answer.
    Reset,
    /// Answer 200, send some of the body, and close the connection.
    Truncate,
    /// Answer 200 with half of the tokens and this `finish_reason`, or `status` of a response; `None`: null.
    CutOff(Option<&'static str>),
    /// Answer 200 with this content type and body.
    Body(&'static str, &'static [u8]),
    /// Answer with this status and a page of HTML, as a gateway does; a redirect leads to a login.
    Page(StatusCode),
    /// Answer as usual, with so many more headers.
    Headers(u16),
    /// Answer as usual, with this encoding.
    Encoded(Coding),
    /// Answer as usual, with a field that makes the answer this many bytes longer.
    Big {
        /// The additional bytes.
        bytes: usize,
        /// Whether the head says how long the body is.
        sized: bool,
    },
}

/// How a body is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    Gzip,
    /// zlib, as HTTP says.
    Deflate,
    Zstd,
    /// The head says `br`.
    Brotli,
}

/// A request as it was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// The path, such as `/v1/chat/completions`.
    pub path: &'static str,
    /// The body, untouched.
    pub body: Bytes,
}

/// The handle. Cheap to clone; all clones act on the same [`super::Sim`].
#[derive(Clone, Default)]
pub struct Faults {
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    plan: Mutex<Plan>,
    /// Whether the plan holds anything, so that an undisturbed request takes no lock. Changed under the plan's lock.
    armed: AtomicBool,
    unhealthy: AtomicBool,
    /// The bits of a double; 0 stands for 1.0.
    slow_down: AtomicU64,
    preemptions: AtomicU64,
    asleep: watch::Sender<bool>,
    recording: AtomicBool,
    recorded: Mutex<Vec<Received>>,
    received: AtomicU64,
    in_flight: AtomicUsize,
    max_in_flight: AtomicUsize,
}

#[derive(Default)]
struct Plan {
    /// The faults of the next requests, one entry each.
    next: VecDeque<Fault>,
    /// The fault of all other requests.
    always: Option<Fault>,
}

impl Faults {
    /// The next `count` inference requests meet `fault`, after those that earlier calls have spoken for.
    pub fn next(&self, count: usize, fault: Fault) {
        self.change(|plan| plan.next.extend(std::iter::repeat_n(fault, count)));
    }

    /// The next `count` inference requests are answered with `status`.
    pub fn fail_next(&self, count: usize, status: StatusCode, retry_after: Option<Duration>) {
        self.next(count, Fault::Fail { status, retry_after });
    }

    /// All inference requests from now on meet `fault`; with none, they are answered again. Those that hang already go on
    /// hanging until their client gives up.
    pub fn always(&self, fault: Option<Fault>) {
        self.change(|plan| plan.always = fault);
    }

    /// Ends all planned faults, as if there had never been any.
    pub fn clear(&self) {
        self.change(|plan| *plan = Plan::default());
    }

    /// Whether `/health` answers 503.
    pub fn set_unhealthy(&self, unhealthy: bool) {
        self.state.unhealthy.store(unhealthy, Ordering::Release);
    }

    /// Requests that begin from now on take `factor` times as long. A factor that is not positive counts as 1.
    pub fn set_slow_down(&self, factor: f64) {
        let factor = if factor.is_finite() && factor > 0.0 { factor } else { 1.0 };
        self.state.slow_down.store(factor.to_bits(), Ordering::Release);
    }

    /// Puts the engine to sleep, as `POST /sleep?level=1` does: what runs is answered at once with `abort`, and what comes
    /// waits.
    pub fn sleep(&self) {
        self.state.asleep.send_replace(true);
    }

    /// Wakes the engine up.
    pub fn wake_up(&self) {
        self.state.asleep.send_replace(false);
    }

    pub(super) fn is_asleep(&self) -> bool {
        *self.state.asleep.borrow()
    }

    /// Waits until the engine sleeps, or until it does not.
    pub(super) async fn until_asleep(&self, asleep: bool) {
        // The sender is there as long as this handle.
        let _ = self.state.asleep.subscribe().wait_for(|now| *now == asleep).await;
    }

    /// Adds to the preemptions that `/metrics` shows.
    pub fn preempt(&self, count: u64) {
        self.state.preemptions.fetch_add(count, Ordering::AcqRel);
    }

    /// Whether to keep every inference request from now on: for [`Faults::recorded`]. Off at first.
    pub fn record(&self, on: bool) {
        self.state.recording.store(on, Ordering::Release);
    }

    /// The inference requests kept, in the order in which they came.
    #[must_use]
    pub fn recorded(&self) -> Vec<Received> {
        lock(&self.state.recorded).clone()
    }

    /// How many of the requests kept contain `marker`.
    #[must_use]
    pub fn times_received(&self, marker: &str) -> usize {
        let finder = memchr::memmem::Finder::new(marker);
        lock(&self.state.recorded).iter().filter(|one| finder.find(&one.body).is_some()).count()
    }

    /// Inference requests received so far, whatever became of them.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.state.received.load(Ordering::Acquire)
    }

    /// Inference requests without an answer so far whose client still waits.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.state.in_flight.load(Ordering::Acquire)
    }

    /// The most that were ever in flight at once.
    #[must_use]
    pub fn max_in_flight(&self) -> usize {
        self.state.max_in_flight.load(Ordering::Acquire)
    }

    pub(super) fn preemptions(&self) -> u64 {
        self.state.preemptions.load(Ordering::Acquire)
    }

    pub(super) fn is_unhealthy(&self) -> bool {
        self.state.unhealthy.load(Ordering::Acquire)
    }

    pub(super) fn slow_down(&self) -> f64 {
        match self.state.slow_down.load(Ordering::Acquire) {
            0 => 1.0,
            bits => f64::from_bits(bits),
        }
    }

    /// Notes a request; it is in flight until the guard is dropped.
    pub(super) fn receive(&self, path: &'static str, body: &Bytes) -> InFlight {
        let state = &self.state;
        if state.recording.load(Ordering::Acquire) {
            lock(&state.recorded).push(Received { path, body: body.clone() });
        }
        state.received.fetch_add(1, Ordering::AcqRel);
        let now = state.in_flight.fetch_add(1, Ordering::AcqRel) + 1;
        state.max_in_flight.fetch_max(now, Ordering::AcqRel);
        InFlight(state.clone())
    }

    /// The fault of the current request. `None`: none.
    pub(super) fn take(&self) -> Option<Fault> {
        if !self.state.armed.load(Ordering::Acquire) {
            return None;
        }
        self.change(|plan| plan.next.pop_front().or(plan.always))
    }

    fn change<T>(&self, change: impl FnOnce(&mut Plan) -> T) -> T {
        let mut plan = lock(&self.state.plan);
        let out = change(&mut plan);
        self.state.armed.store(!plan.next.is_empty() || plan.always.is_some(), Ordering::Release);
        out
    }
}

/// Counts a request as in flight until it is dropped: when it is answered, or when its client has gone.
pub(super) struct InFlight(Arc<State>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A panic elsewhere leaves these plain values whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
