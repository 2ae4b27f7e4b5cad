//! Supervises the parts of a running server, each a task of its own. If a part panics or ends before it is told to, the
//! server ends. Otherwise a server that reports SERVING with a dead part would be noticed only much later, by what is
//! missing.

use std::{
    any::Any,
    fmt::{self, Display},
    panic::AssertUnwindSafe,
    sync::Arc,
};

use futures::FutureExt;
use tokio::{sync::watch, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// A task that runs as long as the server does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumString, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "kebab-case")]
pub enum Part {
    /// Answers gRPC and HTTP.
    Api,
    /// Claims segments and keeps their leases.
    Scheduler,
    /// Does what is periodic: closes windows, deletes garbage and old rows.
    Upkeep,
    /// Finds out which batches have changed.
    Hub,
    /// Reads a watched batch that has changed.
    HubRead,
    /// Writes this node's heartbeat.
    Heartbeat,
    /// Keeps the list of workers in sync with the database.
    Workers,
    /// Checks the health of one worker.
    Probe,
    /// Adjusts one worker's limit.
    Limit,
    /// Sends webhooks.
    Webhooks,
    /// Retries many dead letters.
    RetryJobs,
    /// Encrypts stored webhook secrets with the current master key.
    Resealing,
    /// Receives notifications of other nodes' commits (PostgreSQL only).
    Listener,
    /// Checks that the blob store still belongs to this database.
    StoreCheck,
}

impl Part {
    /// The part's name in the log, and after `panic-` in `TIDEMILL_FAULT`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.into()
    }
}

impl Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A part that ended before the shutdown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the part {part:?} of the server has died: {why}", part = .part.name())]
pub struct Died {
    pub part: Part,
    /// Its panic message, its error, or that it ended.
    pub why: String,
}

/// Runs the parts and records the first one that dies. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Supervisor {
    tasks: TaskTracker,
    died: Arc<watch::Sender<Option<Died>>>,
}

impl Default for Supervisor {
    fn default() -> Self {
        Self { tasks: TaskTracker::new(), died: Arc::new(watch::Sender::new(None)) }
    }
}

impl From<&TaskTracker> for Supervisor {
    /// A supervisor whose parts `tasks` tracks too.
    fn from(tasks: &TaskTracker) -> Self {
        Self { tasks: tasks.clone(), ..Self::default() }
    }
}

impl Supervisor {
    /// Runs a part until `stop`. If it ends before that, or with a panic or an error, it has died.
    pub fn spawn<T: Ended>(
        &self,
        part: Part,
        stop: &CancellationToken,
        task: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<()> {
        self.watch(part, Some(stop.clone()), task)
    }

    /// Runs a part's task that may end. It has died only if it ends with a panic or an error.
    pub fn spawn_once<T: Ended>(&self, part: Part, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<()> {
        self.watch(part, None, task)
    }

    fn watch<T: Ended>(
        &self,
        part: Part,
        stop: Option<CancellationToken>,
        task: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<()> {
        let died = self.died.clone();
        let task = AssertUnwindSafe(task).catch_unwind().boxed();
        self.tasks.spawn(async move {
            let why = match task.await {
                Err(panic) => format!("it panicked: {}", message(&*panic)),
                Ok(ended) => match (ended.error(), stop) {
                    (Some(error), _) => error,
                    (None, Some(stop)) if !stop.is_cancelled() => "it ended before the shutdown".to_owned(),
                    (None, _) => return,
                },
            };
            tracing::error!(%part, why, "a part of the server has died");
            died.send_if_modified(|first| {
                let is_first = first.is_none();
                first.get_or_insert(Died { part, why });
                is_first
            });
        })
    }

    /// Waits for the first part that dies.
    pub async fn died(&self) -> Died {
        let mut died = self.died.subscribe();
        match died.wait_for(Option::is_some).await.map(|died| died.clone()) {
            Ok(Some(died)) => died,
            // The sender is this supervisor's own.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Waits until all parts have ended. No more can be started.
    pub async fn ended(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// The result of a part's task.
pub trait Ended: Send + 'static {
    /// The error with which it ended. `None`: it ended without one.
    fn error(self) -> Option<String>;
}

impl Ended for () {
    fn error(self) -> Option<String> {
        None
    }
}

impl<E: Display + Send + 'static> Ended for Result<(), E> {
    fn error(self) -> Option<String> {
        self.err().map(|error| error.to_string())
    }
}

/// Runs a loop that shares a task with others, so that its panic names it.
pub async fn named<T>(part: Part, task: impl Future<Output = T>) -> T {
    match AssertUnwindSafe(task).catch_unwind().await {
        Ok(ended) => ended,
        Err(panic) => std::panic::resume_unwind(Box::new(format!("{part}: {}", message(&*panic)))),
    }
}

#[must_use]
pub fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&'static str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("it does not say why")
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn panics(why: &'static str) {
        panic!("{why}")
    }

    #[tokio::test]
    async fn a_part_that_panics_ends_early_or_fails_has_died_and_the_first_counts() {
        let stop = CancellationToken::new();
        for (part, why) in [(0, "it panicked: oh no"), (1, "it ended before the shutdown"), (2, "no disk")] {
            let supervisor = Supervisor::default();
            supervisor.spawn(Part::Hub, &stop, async move {
                match part {
                    0 => panic!("oh no"),
                    1 => Ok(()),
                    _ => Err("no disk"),
                }
            });
            let died = supervisor.died().await;
            assert_eq!((died.part, died.why.as_str()), (Part::Hub, why));
            supervisor.spawn_once(Part::Upkeep, panics("later"));
            supervisor.ended().await;
            assert_eq!(supervisor.died().await.part, Part::Hub, "the first");
            assert_eq!(died.to_string(), format!("the part \"hub\" of the server has died: {why}"));
        }
    }

    #[tokio::test]
    async fn a_part_that_ends_when_it_is_told_to_is_fine() {
        let (supervisor, stop) = (Supervisor::default(), CancellationToken::new());
        let told = stop.clone();
        supervisor.spawn(Part::Hub, &stop, async move { told.cancelled().await });
        supervisor.spawn_once(Part::HubRead, async {});
        stop.cancel();
        supervisor.ended().await;
        assert!(supervisor.died().now_or_never().is_none());
    }

    #[tokio::test]
    async fn a_loop_that_shares_a_task_is_named() {
        let supervisor = Supervisor::default();
        supervisor.spawn_once(
            Part::Webhooks,
            async { tokio::join!(named(Part::RetryJobs, panics("oh no")), std::future::pending::<()>()) }.map(|_| ()),
        );
        assert_eq!(supervisor.died().await.why, "it panicked: retry-jobs: oh no");
    }
}
