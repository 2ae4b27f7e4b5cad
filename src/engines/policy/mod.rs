//! Which model is loaded where: the decision, without IO, clock or randomness.
//!
//! [`decide`] gets the [`World`] and answers with [`Action`]s and with one [`Reason`] for each model that has work
//! and is not served. Its rules, of which the first that applies counts:
//!
//! 1. A GPU on which an engine starts, wakes, drains, falls asleep or stops is left alone.
//! 2. Free GPUs go to the best waiting model that fits (see 7).
//! 3. An engine without lines to send makes room for a model that wants its GPUs. It drains first.
//! 4. A model whose deadline is at stake takes the place of one that has more time, and not of one that has less.
//!    Work that is more than an hour late is no reason to swap.
//! 5. A model with work of a higher priority takes the place of one without, if that work is worth the two swaps or
//!    the loaded model has run its quantum: ten times what the two swaps cost, at least 5 minutes.
//! 6. A model whose oldest line has waited for its quantum, at least 30 minutes, takes the place of one that has run
//!    its own quantum and has more work left than the waiting one needs: the short work goes first. The same holds if
//!    what is left of the loaded model came much later. Priorities are respected: this rule never favours lower ones.
//!    So swaps for fairness take at most 1/11 of the time.
//! 7. Of several waiting models the one with the least time to its deadline goes first if that is under an hour; then
//!    higher priorities; then one that has waited four times as long as rule 6 asks; then the one that finishes most
//!    batches per second: the least (swap + work) / batches. Idle GPUs are taken before those whose engines must
//!    leave, and among these the ones that come back cheapest.
//! 8. A loaded model gets another engine on idle GPUs if its work, shared by one engine more, is worth three starts.
//!    The additional engine leaves first when another model wants its GPUs.
//! 9. Live calls for a model that is not loaded count as work of a priority above all others, if
//!    [`World::live_calls_swap`].
//!
//! A model that needs several GPUs would wait forever where small models take turns on each of them. So its GPUs are
//! promised to it once it has waited as long as rule 6 asks, and nothing else starts there. A [`Promise`] also
//! remembers for whom an engine has been drained.

mod costs;
mod decide;
mod reason;
mod rules;
#[cfg(test)]
mod tests;

use std::{fmt, sync::Arc, time::Duration};

pub use costs::{Costs, Phase};
pub use decide::decide;
pub use reason::Reason;

use super::place::Memory;
pub use super::place::{EngineId, Gpu};
use crate::domain::Timestamp;

/// A model's own name, as requests use it. Aliases and LoRA adapters count for the model that serves them.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelName(Arc<str>);

impl ModelName {
    /// Its text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for ModelName {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

/// What becomes of an engine that makes room.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    /// Its process ends.
    #[default]
    Stop,
    /// It sleeps: its weights leave the GPU, and the process stays.
    Sleep,
}

/// A model that can be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Its name.
    pub model: ModelName,
    /// How many GPUs one engine needs.
    pub gpus: usize,
    /// How much of each of them.
    pub memory: Memory,
    /// What becomes of its engine when another model needs the GPUs.
    pub keep: Keep,
    /// Without demand for so long, its engine stops. `None`: it stays until another model needs the GPUs.
    pub idle: Option<Duration>,
    /// The most engines of this model at a time, at least one.
    pub replicas: usize,
}

/// What an engine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It loads its model.
    Starting,
    /// It comes back from sleep.
    Waking,
    /// It serves.
    Ready,
    /// It gets no new requests and finishes those that it has.
    Draining,
    /// It goes to sleep.
    FallingAsleep,
    /// It sleeps.
    Sleeping,
    /// It ends, and the GPUs' memory is not yet back.
    Stopping,
}

impl State {
    /// Whether what happens next on its GPUs is decided already.
    #[must_use]
    pub fn is_transit(self) -> bool {
        match self {
            Self::Starting | Self::Waking | Self::Draining | Self::FallingAsleep | Self::Stopping => true,
            Self::Ready | Self::Sleeping => false,
        }
    }
}

/// An engine that lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Engine {
    /// Its id.
    pub id: EngineId,
    /// What it serves.
    pub model: ModelName,
    /// The GPUs that it runs on.
    pub gpus: Vec<u32>,
    /// What it does.
    pub state: State,
    /// Since when it does that.
    pub since: Timestamp,
    /// Requests that it has.
    pub in_flight: u64,
    /// Since when its model has had no lines and the engine no requests. `None`: it has some.
    pub idle_since: Option<Timestamp>,
}

/// Work of one priority for one model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Lines that are not with a worker. A line that waits less than 30 s for its next try counts.
    pub lines: u64,
    /// Batches that these lines belong to.
    pub batches: u64,
    /// When the oldest of these lines came. `None`: there are no lines.
    pub oldest: Option<Timestamp>,
    /// Lines that have to be answered by a time.
    pub deadlines: Vec<Deadline>,
}

/// Lines whose batches close at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline {
    /// When their window closes.
    pub closes: Timestamp,
    /// How many lines.
    pub lines: u64,
}

/// Live calls that wait for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LiveCalls {
    /// How many.
    pub calls: u64,
    /// Since when the first of them waits.
    pub since: Timestamp,
}

/// What there is to do for a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Demand {
    /// The model.
    pub model: ModelName,
    /// Live calls that wait for it.
    pub live: Option<LiveCalls>,
    /// Batches' lines, by priority, the lowest first.
    pub by_priority: [Work; 3],
}

/// A model that can't be loaded for a while, because it failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// The model.
    pub model: ModelName,
    /// When it is tried again. `None`: when its configuration changes.
    pub until: Option<Timestamp>,
}

/// GPUs that are kept for a model, because engines on them have been or will be told to leave for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Promise {
    /// The model.
    pub model: ModelName,
    /// The GPUs.
    pub gpus: Vec<u32>,
}

/// All that the decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct World<'a> {
    /// The time.
    pub now: Timestamp,
    /// The GPUs that engines may use.
    pub gpus: &'a [Gpu],
    /// The models that can be loaded.
    pub specs: &'a [Spec],
    /// The engines that live.
    pub engines: &'a [Engine],
    /// The work.
    pub demand: &'a [Demand],
    /// The models that have failed.
    pub blocked: &'a [Blocked],
    /// The last decision's promises, as they were.
    pub promises: &'a [Promise],
    /// What swaps cost.
    pub costs: &'a Costs,
    /// The longest that a draining engine may take to finish its requests.
    pub drain_timeout: Duration,
    /// Whether live calls for a model that is not loaded are a reason to load it (rule 9).
    pub live_calls_swap: bool,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start an engine.
    Start {
        /// What it serves.
        model: ModelName,
        /// The GPUs that it runs on.
        gpus: Vec<u32>,
    },
    /// Wake an engine that sleeps.
    Wake(EngineId),
    /// Send an engine no new requests.
    Drain(EngineId),
    /// Put an engine to sleep. Requests that it still has run again elsewhere.
    Sleep(EngineId),
    /// End an engine. Requests that it still has run again elsewhere.
    Stop(EngineId),
}

/// The answer of [`decide`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Decision {
    /// What to do now.
    pub actions: Vec<Action>,
    /// The promises to give to the next call.
    pub promises: Vec<Promise>,
    /// Why the models with work that are not served have to wait.
    pub why: Vec<(ModelName, Reason)>,
    /// When to decide again if nothing else happens. `None`: time alone changes nothing.
    pub again_at: Option<Timestamp>,
}
