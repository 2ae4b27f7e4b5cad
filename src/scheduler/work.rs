//! Sends the lines of one segment to workers, collects their answers into parts, and merges the parts into one object
//! at the end.

mod writing;

use std::{
    hash::BuildHasher,
    sync::{Arc, Weak, atomic::Ordering},
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use tokio::time::Instant;

use super::{
    Control,
    checkpoint::{Checkpoint, Stop},
    deaths,
    doubts::Doubt,
    lines::{Lane, LineKey, WorkList},
    run::{Ended, Run},
    seat::{Apart, Seat},
    stages::{self, Stage},
    tries::{error_code, is_a_try, is_death},
};
use crate::{
    domain::{Endpoint, SegmentRef, WorkerPriority, lifecycle::Ending},
    fleet::{
        Acquire, Answer, Call, Extras, Failure, FailureKind, Held, NoSlot, Rank, Slot, Want, Worker,
        may_refuse_priority,
        outage::{self, Verdict},
    },
    results::{self, PartBuilder, Reply},
    store::NewPart,
};

/// A part is written when it has this many lines: as many as a segment has, so that a segment whose lines are answered
/// within [`SchedulerOptions::flush_interval`] is one object, and nothing is merged.
pub const PART_LINES: usize = 1_000;
/// A part is written when it has this many bytes.
pub const PART_BYTES: usize = 4 * 1024 * 1024;

/// How long a segment is kept while no worker serves its models, if lines in it have failed: given back, it would
/// forget how often, and a request that kills the only worker would kill it again and again. A vLLM worker is back
/// within minutes.
const KEPT_STRANDED: Duration = Duration::from_secs(15 * 60);

/// What part of the patience with an error status a success that is a page or cut short gets: whoever set up a wrong
/// address should not wait long for its error.
const PAGES: f64 = 0.4;

/// The priority of batch requests where a header says it: behind what carries none (0), and with room on both sides.
const BEHIND_OTHERS: i32 = 10;

/// If fewer lines than this are left, a line can be blamed for its worker's death although no other was answered.
const FEW: usize = outage::REQUESTS;

/// The outcome of a request, and its slot.
struct Sent {
    seat: Seat,
    key: LineKey,
    at: Instant,
    result: Result<Answer, Failure>,
}

/// A line whose last try has failed, while it is not clear yet whether the worker is at fault.
pub(super) struct Doubtful {
    doubt: Doubt,
    key: LineKey,
    worker: Arc<Worker>,
    failure: Failure,
}

/// A running segment.
pub(super) struct Work<'a> {
    pub(super) run: &'a mut Run,
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) endpoint: Endpoint,
    pub(super) rank: Rank,
    pub(super) list: WorkList,
    /// The workers that serve each model, by affinity.
    pub(super) peers: Vec<Vec<u64>>,
    pub(super) number: &'a mut u32,
    pub(super) builder: PartBuilder,
    /// The memory of the answers in `builder`.
    pub(super) held: Held,
    /// Bytes of the largest answer so far.
    pub(super) largest: usize,
    /// When the oldest line in `builder` was finished.
    pub(super) oldest: Option<Instant>,
    /// When the run began to send lines.
    pub(super) started: Instant,
    /// Since when no worker serves the remaining lines.
    pub(super) stranded: Option<Instant>,
    /// The durable parts.
    pub(super) parts: Vec<NewPart>,
    /// A number of the segment, used in its requests' numbers.
    pub(super) salt: u64,
    pub(super) doubtful: Vec<Doubtful>,
    /// Suspects in flight, and how long they are to be kept apart from others.
    pub(super) apart: Vec<(Instant, Weak<Apart>)>,
}

/// A number for a segment: the same on every node.
pub(super) fn salt(segment: &SegmentRef) -> u64 {
    foldhash::quality::FixedState::default().hash_one((segment.batch.as_str(), segment.index.0))
}

impl Work<'_> {
    /// Sends lines and takes answers until all are done, or no more can be sent.
    pub(super) async fn send_all(&mut self) -> Result<Ended, Stop> {
        let mut in_flight = FuturesUnordered::new();
        let mut wishes: Vec<Option<Acquire>> = self.list.lanes().map(|_| None).collect();
        let mut flushing: Option<BoxFuture<'static, Result<NewPart, Stop>>> = None;
        let mut topology = self.run.fleet.topology();
        self.look_at_peers();
        let mut control = self.run.control.clone();
        let timer = tokio::time::sleep(Duration::ZERO);
        tokio::pin!(timer);
        loop {
            let wish = *control.borrow_and_update();
            match wish {
                Control::Abandon => return Ok(Ended::Lost),
                Control::Finish(ending) => {
                    // Dropping them closes their connections: the workers stop generating.
                    drop(in_flight);
                    drop(wishes);
                    self.end_unfinished(ending);
                    self.wait_for(flushing).await?;
                    return Ok(Ended::Finished);
                }
                Control::Run | Control::Drain { .. } => {}
            }
            let now = Instant::now();
            self.settle_doubts(now);
            self.list.wake(now);
            self.let_others_join(now);
            let draining = matches!(wish, Control::Drain { .. });
            if !draining && self.has_room(flushing.is_some()) {
                self.send_ready(&in_flight, &mut wishes);
            } else {
                wishes.fill_with(|| None);
            }
            self.count_remaining();
            if self.list.open() == 0 || (in_flight.is_empty() && (draining || self.is_given_up(now))) {
                drop(wishes);
                self.wait_for(flushing).await?;
                return Ok(if self.list.open() == 0 { Ended::Finished } else { Ended::Released });
            }
            if flushing.is_none() && self.is_due(now) && self.list.open() > 0 {
                flushing = Some(self.flush());
            }
            let until = self.next_wake(wish, flushing.is_some(), now);
            if timer.deadline() != until {
                timer.as_mut().reset(until);
            }
            tokio::select! {
                Some(sent) = in_flight.next() => {
                    let mut all = vec![sent];
                    while let Some(Some(sent)) = in_flight.next().now_or_never() {
                        all.push(sent);
                    }
                    self.take_all(all);
                }
                () = any_granted(&mut wishes) => {}
                part = async { match flushing.as_mut() { Some(flush) => flush.await, None => std::future::pending().await } } => {
                    flushing = None;
                    self.parts.push(part?);
                }
                () = &mut timer => {
                    if let Control::Drain { deadline } = wish && deadline <= Instant::now() {
                        in_flight.clear();
                    }
                }
                changed = control.changed() => if changed.is_err() { return Ok(Ended::Lost) },
                _ = topology.changed() => self.look_at_peers(),
            }
        }
    }

    /// Sends what is ready, as far as slots are free or were waited for; where none is, one wish a lane waits for all
    /// that it needs.
    fn send_ready(&mut self, in_flight: &FuturesUnordered<BoxFuture<'static, Sent>>, wishes: &mut [Option<Acquire>]) {
        for (lane, wish) in self.list.lanes().zip(wishes) {
            while let Some(key) = self.list.peek(lane) {
                let slot = match wish {
                    Some(waits) => match waits.try_next() {
                        Ok(slot) => slot,
                        Err(NoSlot::Yet) => break,
                        Err(NoSlot::Ended) => {
                            *wish = None;
                            continue;
                        }
                    },
                    None => {
                        let failed_on = self.list.failed_on(key);
                        // Lines that have failed before have a wish of their own, and so have suspects.
                        let slots = if lane.alone || !failed_on.is_empty() { 1 } else { self.list.ready_in(lane) };
                        let want = Want {
                            model: self.list.models()[lane.model].clone(),
                            rank: self.rank,
                            avoid: failed_on.iter().copied().collect(),
                            alone: lane.alone,
                        };
                        let Some(slot) = self.run.fleet.try_acquire(&want) else {
                            *wish = Some(self.run.fleet.acquire(want, u32::try_from(slots).unwrap_or(u32::MAX)));
                            continue;
                        };
                        slot
                    }
                };
                if lane.alone {
                    self.send_suspects(lane, slot, in_flight);
                } else if let Some(key) = self.take_for(lane, &slot) {
                    in_flight.push(self.send(Seat::Own(slot), key));
                }
            }
            if self.list.peek(lane).is_none() {
                // Slots without a line are returned, because others can use them.
                *wish = None;
            }
        }
    }

    /// Sends suspects together over the one slot of a worker that has nothing else.
    fn send_suspects(&mut self, lane: Lane, slot: Slot, in_flight: &FuturesUnordered<BoxFuture<'static, Sent>>) {
        let (keys, time) = self.list.take_suspects(lane.model, slot.worker.limit());
        if keys.is_empty() {
            return;
        }
        let count = u32::try_from(keys.len()).unwrap_or(u32::MAX);
        tracing::debug!(
            worker = %slot.worker.id, segment = %self.run.claimed.segment, count,
            "requests that may have killed workers are sent apart from others"
        );
        let apart = Arc::new(Apart::new(slot, count));
        self.apart.push((Instant::now() + time, Arc::downgrade(&apart)));
        for key in keys {
            in_flight.push(self.send(Seat::Apart(apart.clone()), key));
        }
    }

    /// Suspects that have been at their worker for longer than any of them lived before are not apart any longer.
    fn let_others_join(&mut self, now: Instant) {
        self.apart.retain(|(until, apart)| match apart.upgrade() {
            Some(apart) if *until <= now => {
                apart.let_others_join();
                false
            }
            Some(_) => true,
            None => false,
        });
    }

    /// Ends the lines whose last try has failed, once it is clear that the worker is not at fault, or nothing is heard
    /// of that; runs the others again.
    fn settle_doubts(&mut self, now: Instant) {
        let others = self.list.open() > self.doubtful.len();
        let patience = self.run.options.tries.patience;
        for mut doubtful in std::mem::take(&mut self.doubtful) {
            match doubtful.doubt.look(others, now) {
                Verdict::Open if doubtful.doubt.asks_again(now) => self.list.later(doubtful.key, now),
                Verdict::Open => self.doubtful.push(doubtful),
                Verdict::Worker => {
                    self.list.doubt(doubtful.key, None, now);
                    self.list.tally(doubtful.key).forgive_cuts();
                    self.list.later(doubtful.key, now);
                }
                Verdict::Request if self.list.has_last_chance(doubtful.key, patience, now) => {
                    self.list.later(doubtful.key, now);
                }
                Verdict::Request => self.give_up(doubtful.key, &doubtful.worker, doubtful.failure),
            }
        }
    }

    fn look_at_peers(&mut self) {
        self.peers = self.list.models().iter().map(|model| self.run.fleet.affinities(model)).collect();
    }

    /// Takes the line that fits the slot's worker best.
    fn take_for(&mut self, lane: Lane, slot: &Slot) -> Option<LineKey> {
        if slot.is_doubted() {
            return self.list.take_to_find_out(lane);
        }
        let worker = (slot.worker.key(), slot.worker.affinity());
        self.list.take_for(lane, worker, &self.peers[lane.model])
    }

    fn send(&self, seat: Seat, key: LineKey) -> BoxFuture<'static, Sent> {
        let request = self.salt.wrapping_add(u64::from(self.list.index(key)));
        let slot = seat.slot();
        let body = self.list.body(key);
        // A client's own is left as it is; vLLM would take the header before it.
        let priority = if self.list.has_priority(key) { WorkerPriority::Off } else { self.run.options.worker_priority };
        let (header, with_priority) = match priority {
            WorkerPriority::Off => (None, None),
            WorkerPriority::Auto => (Some(BEHIND_OTHERS), None),
            WorkerPriority::Body(_) if slot.worker.refuses_priority() => (None, None),
            WorkerPriority::Body(priority) => (None, Some(self.list.body_with_priority(key, priority))),
        };
        let (endpoint, timeout, expected) = (self.endpoint, self.run.options.request_timeout, self.largest);
        let model = self.list.models()[self.list.model(key)].clone();
        let slotted = stages::is_sampled(self.list.index(key)).then(Instant::now);
        let slotted = slotted.map(|slotted| {
            self.run.stages.took(Stage::Queue, slotted - self.started);
            (slotted, self.run.stages.clone())
        });
        async move {
            let slot = seat.slot();
            let at = Instant::now();
            let sent = slotted.map(|(slotted, stages)| {
                stages.took(Stage::Dispatch, slotted.elapsed());
                (Instant::now(), stages)
            });
            let extras = Extras::default();
            let call = Call { endpoint, model: &model, body, priority: header, timeout, expected, extras };
            let result = match with_priority {
                None => slot.send(call).await,
                Some(with) => send_with(slot, with, call).await,
            };
            if let Some((sent, stages)) = sent {
                stages.took(Stage::Worker, sent.elapsed());
            }
            let result = slot.tell(request, at, result);
            Sent { seat, key, at, result }
        }
        .boxed()
    }

    /// Takes what came of requests. Their slots go back together, so that another segment is woken once for all of
    /// them, and before the results are written down, so that nobody waits for that.
    fn take_all(&mut self, all: Vec<Sent>) {
        let (mut slots, mut results) = (Vec::with_capacity(all.len()), Vec::with_capacity(all.len()));
        for Sent { seat, key, at, result } in all {
            let (worker, apart) = (seat.slot().worker.clone(), seat.apart());
            if let Seat::Own(slot) = seat {
                slots.push(slot);
            }
            results.push((key, worker, at, apart, result));
        }
        Slot::give_back(slots);
        for (key, worker, at, apart, result) in results {
            self.take(key, &worker, at, apart, result);
        }
    }

    /// Handles the outcome of a request that was sent at `at`. `apart`: the number of suspects apart from others; 0:
    /// among others.
    fn take(&mut self, key: LineKey, worker: &Arc<Worker>, at: Instant, apart: u32, result: Result<Answer, Failure>) {
        let failure = match result {
            Ok(answer) => {
                self.list.acquit(key);
                self.answered(key, worker, answer, None);
                return;
            }
            Err(failure) => failure,
        };
        metrics::counter!("tidemill_tries_failed_total", "kind" => failure.kind.as_str()).increment(1);
        let now = Instant::now();
        if is_death(failure.kind) {
            let (answers, lived) = (self.run.fleet.answers(), now - at);
            // A segment with few lines has nobody else who could be answered.
            let few = self.list.open() < FEW;
            let lost = deaths::Lost { worker: failure.worker, now, lived, apart, answers };
            let own = self.list.lost(key, lost);
            if own || (few && apart == 1) {
                self.list.tally(key).blame(own);
            }
        } else if is_a_try(failure.kind) {
            self.list.acquit(key);
            self.list.doubt(key, failure.blame.clone(), now);
        }
        if let Some(cut) = &failure.cut {
            self.list.cut_off(key, cut.clone());
        }
        let at_fault = matches!(failure.kind, FailureKind::Outage | FailureKind::Local);
        let tally = if at_fault { self.list.tally(key) } else { self.list.failed(key, failure.worker) };
        match self.run.options.tries.next(tally, failure.kind, failure.retry_after, rand::random()) {
            Some(wait) => self.list.later(key, now + wait),
            // Not only while that is open: it may have been decided between the failure and now.
            None => match failure.blame.clone().filter(|_| failure.may_be_the_workers()) {
                Some(blame) => {
                    let by_status = failure.answer.as_ref().is_some_and(|answer| !answer.is_success());
                    let by_proxy = failure.is_page || by_status;
                    let patience = self.run.options.tries.patience;
                    let patience = if by_status { patience } else { patience.mul_f64(PAGES) };
                    let again = by_proxy.then(|| self.list.ask_again(key, patience, now)).flatten();
                    let (doubt, worker) = (Doubt::new(blame, again, now), worker.clone());
                    self.doubtful.push(Doubtful { doubt, key, worker, failure });
                }
                None => self.give_up(key, worker, failure),
            },
        }
    }

    /// Ends a line that has used up its tries.
    fn give_up(&mut self, key: LineKey, worker: &Worker, failure: Failure) {
        let times = self.list.tally(key).times();
        let message = format!("{} (after {times} tries)", failure.message);
        let code = error_code(failure.kind);
        match failure.answer {
            // A success that is none needs words: by its status it would pass for an answer. So does a redirect.
            Some(answer) if !answer.is_error() && !failure.is_doubtful => {
                self.answered(key, worker, *answer, Some((code, &message)));
            }
            Some(answer) => self.answered(key, worker, *answer, None),
            None => {
                self.error(key, code, &message);
            }
        }
    }

    /// The request has its answer, or a last one that is a `problem`: a code and a message.
    fn answered(&mut self, key: LineKey, worker: &Worker, answer: Answer, problem: Option<(&str, &str)>) {
        let id = self.request_id(key);
        let reply = Reply {
            status: answer.status,
            request_id: answer.request_id.as_deref(),
            body: &answer.body,
            is_json: answer.usage.is_some(),
            error: problem,
        };
        let index = self.list.index(key);
        let line = results::render_answer(&id, self.list.custom_id(key), reply);
        if answer.is_success() && problem.is_none() {
            let usage = answer.usage.unwrap_or_default();
            worker.count(usage.output);
            self.builder.complete(index, line, usage);
            metrics::counter!("tidemill_requests_total", "outcome" => "completed").increment(1);
        } else {
            self.builder.fail(index, line);
            metrics::counter!("tidemill_requests_total", "outcome" => "failed").increment(1);
        }
        self.largest = self.largest.max(answer.body.len());
        self.held.absorb(answer.held);
        self.list.done(key);
        self.oldest.get_or_insert_with(Instant::now);
    }

    fn error(&mut self, key: LineKey, code: &str, message: &str) {
        let line = results::render_error(&self.request_id(key), self.list.custom_id(key), code, message);
        self.builder.fail(self.list.index(key), line);
        self.failed(key);
    }

    fn failed(&mut self, key: LineKey) {
        self.list.done(key);
        self.oldest.get_or_insert_with(Instant::now);
        metrics::counter!("tidemill_requests_total", "outcome" => "failed").increment(1);
    }

    fn request_id(&self, key: LineKey) -> String {
        let line = self.run.claimed.span.first_line + i64::from(self.list.index(key));
        results::request_id(&self.run.claimed.segment.batch, line)
    }

    /// Ends every line without a result as the batch ends.
    fn end_unfinished(&mut self, ending: Ending) {
        self.doubtful.clear();
        for key in self.list.unfinished() {
            let (code, message) = (ending.error_code(), ending.error_message());
            let line = results::render_error(&self.request_id(key), self.list.custom_id(key), code, message);
            self.builder.end(self.list.index(key), line);
            self.failed(key);
        }
    }

    /// Whether no model of the remaining lines is served, and none of them only waits for its next try.
    fn is_stranded(&self) -> bool {
        !self.list.has_later()
            && self.doubtful.is_empty()
            && (0..self.list.models().len())
                .all(|model| self.list.ready(model) == 0 || self.run.fleet.capacity(&self.list.models()[model]) == 0)
    }

    /// Whether the run is stranded and there is no reason to keep it.
    fn is_given_up(&mut self, now: Instant) -> bool {
        if !self.is_stranded() {
            self.stranded = None;
            return false;
        }
        let since = *self.stranded.get_or_insert(now);
        !self.list.has_suspects() || since + KEPT_STRANDED <= now
    }

    /// While a part is being written, the next one may fill up, but not without limit.
    fn has_room(&self, flushing: bool) -> bool {
        !flushing || (self.builder.bytes() < 2 * PART_BYTES && self.builder.lines() < 2 * PART_LINES)
    }

    fn is_due(&self, now: Instant) -> bool {
        self.builder.lines() >= PART_LINES
            || self.builder.bytes() >= PART_BYTES
            || self.oldest.is_some_and(|oldest| oldest + self.run.options.flush_interval <= now)
    }

    fn next_wake(&self, wish: Control, flushing: bool, now: Instant) -> Instant {
        let flush = self.oldest.filter(|_| !flushing).map(|oldest| oldest + self.run.options.flush_interval);
        let drain = match wish {
            Control::Drain { deadline } => Some(deadline),
            Control::Run | Control::Finish(_) | Control::Abandon => None,
        };
        let far = now + Duration::from_secs(3_600);
        let stranded = self.stranded.map(|since| since + KEPT_STRANDED).filter(|until| *until > now);
        let doubt = self.doubtful.iter().map(|doubtful| doubtful.doubt.next_look()).min();
        let apart = self.apart.iter().map(|(until, _)| *until).min();
        [flush, drain, stranded, doubt, apart, self.list.next_due()].into_iter().flatten().min().unwrap_or(far)
    }

    /// The plan counts the lines that are ready: those in flight hold slots already.
    fn count_remaining(&self) {
        for (model, count) in self.run.remaining.iter().enumerate() {
            count.store(self.list.ready(model), Ordering::Relaxed);
        }
    }
}

/// Sends a body with a priority, and without it if the worker refuses that.
async fn send_with(slot: &Slot, with: Bytes, without: Call<'_>) -> Result<Answer, Failure> {
    let refusal = match slot.send(Call { body: with, ..without.clone() }).await {
        Ok(answer) if may_refuse_priority(&answer) => answer,
        // It may say so in another form than the API's.
        Err(Failure { answer: Some(answer), .. }) if may_refuse_priority(&answer) => *answer,
        result => return result,
    };
    let answer = slot.send(without).await?;
    // Refused again, it was not for its priority: an error message may well quote the whole request.
    if answer.is_success() {
        slot.worker.refused_priority(&refusal);
    }
    Ok(answer)
}

/// Waits until one of the wishes has a slot or has ended.
async fn any_granted(wishes: &mut [Option<Acquire>]) {
    std::future::poll_fn(|context| {
        let mut polled = wishes.iter_mut().flatten().map(|wish| wish.poll_ready(context));
        polled.find(Poll::is_ready).unwrap_or(Poll::Pending)
    })
    .await;
}
