//! `tidemill top`: workers and unfinished batches, live.

mod screen;

use std::{
    collections::VecDeque,
    io::{self, IsTerminal as _},
    time::Duration,
};

use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tonic::Status;

use super::{client::Client, error, json, out};
use crate::{config::parse_span, pb};

/// The most batches to list.
const BATCHES: i32 = 200;
/// Samples in the curve.
const HISTORY: usize = 240;

pub(super) const HELP: &str = "\
Keys: q, Esc or Ctrl-C ends it.

Examples:
  tidemill top                     live, until q
  tidemill top --once              the current state, as text
  tidemill top --json --interval 10s | jq '[.workers[].output_tokens_per_second] | add'

If stdout is not a terminal, each update is printed as text. A worker's IN FLIGHT (of the limit), REQ/S, TOK/S and TIME (of \
a request, from sending it to its answer) are measured by the server that answers; RUNNING, WAITING, KV and HITS (the share of \
prompt tokens that its prefix cache held lately) are the worker's own, whoever sends to it.

\"a request takes\" says where the time goes on that server: waiting in its segment, being sent, at the worker, and until \
its answer is durable.";

/// Arguments of `top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Time between two updates, 100ms to 1h.
    #[arg(long, value_name = "SPAN", default_value = "1s", value_parser = interval)]
    interval: Duration,
    /// Print the current state once and exit.
    #[arg(long)]
    once: bool,
}

fn interval(text: &str) -> Result<Duration, String> {
    let span = parse_span(text)?;
    if (Duration::from_millis(100)..=Duration::from_secs(3_600)).contains(&span) {
        Ok(span)
    } else {
        Err("expected 100ms to 1h".into())
    }
}

/// The state of workers and batches at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Look {
    pub workers: Vec<pb::Worker>,
    /// How long requests spend in each stage.
    pub stages: pb::RequestStages,
    /// Unfinished ones, in the order in which they are served.
    pub batches: Vec<pb::Batch>,
    /// There are more batches than listed.
    pub more: bool,
}

impl Look {
    async fn at(client: &Client) -> Result<Self, Status> {
        use pb::BatchStatus::{Cancelling, Finalizing, InProgress, Validating};
        let (mut workers, mut batches) = (client.workers(), client.batches());
        let unfinished = pb::ListBatchesRequest {
            page_size: BATCHES,
            statuses: [Validating, InProgress, Finalizing, Cancelling].map(Into::into).to_vec(),
            ..pb::ListBatchesRequest::default()
        };
        let (workers, batches) =
            tokio::try_join!(workers.list_workers(pb::ListWorkersRequest {}), batches.list_batches(unfinished))?;
        let (workers, batches) = (workers.into_inner(), batches.into_inner());
        let mut look = Self {
            workers: workers.workers,
            stages: workers.request_stages.unwrap_or_default(),
            more: !batches.next_page_token.is_empty(),
            batches: batches.batches,
        };
        // They are listed newest first; the order of serving is the reverse.
        look.batches.reverse();
        look.batches.sort_by_key(|batch| batch.progress.as_ref().map_or(0, |progress| progress.queue_position));
        Ok(look)
    }

    fn json(&self) -> Value {
        json!({
            "workers": json::list(&self.workers),
            "request_stages": json::of(&self.stages),
            "batches": json::list(&self.batches),
        })
    }

    /// The stages in words. `None` if nothing has been measured yet.
    fn split(&self) -> Option<String> {
        let stages = [
            ("in line", &self.stages.queue),
            ("to be sent", &self.stages.dispatch),
            ("at the worker", &self.stages.worker),
            ("until it is durable", &self.stages.persist),
        ];
        let known = stages.iter().filter_map(|(name, time)| {
            json::duration(time.as_ref()).map(|time| format!("{} {name}", out::brief(time)))
        });
        let known: Vec<_> = known.collect();
        (!known.is_empty()).then(|| format!("a request takes {}", known.join(", ")))
    }

    /// All workers together.
    fn totals(&self) -> Totals {
        let mut totals = Totals { workers: self.workers.len(), ..Totals::default() };
        for worker in &self.workers {
            totals.healthy += usize::from(worker.state == i32::from(pb::WorkerState::Healthy));
            totals.in_flight += i64::from(worker.in_flight);
            totals.limit += i64::from(worker.limit);
            totals.requests_per_second += worker.requests_per_second;
            totals.tokens_per_second += worker.output_tokens_per_second;
        }
        totals
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    workers: usize,
    healthy: usize,
    in_flight: i64,
    limit: i64,
    requests_per_second: f64,
    tokens_per_second: f64,
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} of {} workers healthy, {} in flight of {}, {} req/s, {} tok/s",
            self.healthy,
            self.workers,
            self.in_flight,
            self.limit,
            out::short(self.requests_per_second),
            out::short(self.tokens_per_second)
        )
    }
}

/// The content of the screen.
#[derive(Debug, Default)]
pub(super) struct View {
    pub look: Look,
    /// Why the last update failed; `look` is then an older state.
    pub away: Option<String>,
    /// Requests per second of all workers, newest last.
    pub history: VecDeque<u64>,
}

impl View {
    fn take(&mut self, look: Result<Look, Status>) -> Result<(), Status> {
        match look {
            Ok(look) => {
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a curve for people
                self.history.push_back(look.totals().requests_per_second.max(0.0).round() as u64);
                if self.history.len() > HISTORY {
                    self.history.pop_front();
                }
                (self.look, self.away) = (look, None);
                Ok(())
            }
            Err(status) if error::is_transient(&status) => {
                self.away = Some(error::brief(&status));
                Ok(())
            }
            Err(status) => Err(status),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// The server does not answer the first look, or the terminal can't be written.
pub async fn run(args: TopArgs, client: &Client, server: &str) -> anyhow::Result<()> {
    let first = super::client::retry(|| async { Look::at(client).await.map(tonic::Response::new) }).await?;
    let mut ticks = tokio::time::interval(args.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    if client.json || args.once || !io::stdout().is_terminal() {
        let mut look = first;
        loop {
            print(&look, client.json)?;
            if args.once {
                return Ok(());
            }
            ticks.tick().await;
            look = super::client::retry(|| async { Look::at(client).await.map(tonic::Response::new) }).await?;
        }
    }
    let mut view = View::default();
    view.take(Ok(first))?;
    let mut terminal = ratatui::try_init()?;
    let ended = live(&mut terminal, &mut view, ticks, (client, server)).await;
    // Not `restore`, which panics where stderr is gone as well.
    let _ = ratatui::try_restore();
    ended
}

async fn live(
    terminal: &mut ratatui::DefaultTerminal,
    view: &mut View,
    mut ticks: tokio::time::Interval,
    (client, server): (&Client, &str),
) -> anyhow::Result<()> {
    let mut keys = keys();
    loop {
        terminal.draw(|frame| screen::draw(frame, view, server))?;
        tokio::select! {
            _ = ticks.tick() => view.take(Look::at(client).await)?,
            key = keys.recv() => match key {
                Some(Event::Key(key)) if ends(key) => return Ok(()),
                // The size has changed: draw again.
                Some(_) => {}
                None => return Ok(()),
            }
        }
    }
}

/// Keys typed. The thread ends with the process, because a read of the terminal can't be cancelled.
fn keys() -> mpsc::UnboundedReceiver<Event> {
    let (sender, keys) = mpsc::unbounded_channel();
    let read = move || {
        while let Ok(event) = event::read() {
            if sender.send(event).is_err() {
                return;
            }
        }
    };
    // Without the thread the screen ends at once, as when the terminal is gone.
    let _ = std::thread::Builder::new().name("keys".to_owned()).spawn(read);
    keys
}

fn ends(key: KeyEvent) -> bool {
    let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind == KeyEventKind::Press && (control_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc))
}

fn print(look: &Look, json: bool) -> io::Result<()> {
    if json {
        return out::line(look.json());
    }
    out::line(look.totals())?;
    if let Some(split) = look.split() {
        out::line(split)?;
    }
    out::table(screen::WORKERS, &look.workers.iter().map(screen::worker).collect::<Vec<_>>())?;
    out::line("")?;
    if look.batches.is_empty() {
        return out::line("no unfinished batches");
    }
    out::table(screen::BATCHES, &look.batches.iter().map(screen::batch).collect::<Vec<_>>())?;
    if look.more { out::line("and more") } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_have_bounds() {
        assert_eq!(interval("250ms"), Ok(Duration::from_millis(250)));
        assert!(interval("10ms").is_err() && interval("2h").is_err() && interval("soon").is_err());
    }

    #[test]
    fn keys_that_end_it() {
        assert!(ends(KeyEvent::from(KeyCode::Char('q'))) && ends(KeyEvent::from(KeyCode::Esc)));
        assert!(ends(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
        assert!(!ends(KeyEvent::from(KeyCode::Char('c'))));
    }

    #[test]
    fn the_time_of_a_request_is_split() {
        assert_eq!(Look::default().split(), None);
        let time = |millis| prost_types::Duration::try_from(Duration::from_millis(millis)).ok();
        let stages = pb::RequestStages { queue: time(1_500), worker: time(20), ..pb::RequestStages::default() };
        let look = Look { stages, ..Look::default() };
        assert_eq!(look.split().as_deref(), Some("a request takes 1.5s in line, 20ms at the worker"));
        assert_eq!(look.json()["request_stages"]["worker"], "0.02s");
    }

    #[test]
    fn a_server_that_is_away_leaves_the_last_picture() {
        let mut view = View::default();
        let worker = pb::Worker { requests_per_second: 41.6, ..pb::Worker::default() };
        view.take(Ok(Look { workers: vec![worker], ..Look::default() })).unwrap();
        view.take(Err(Status::unavailable("restarting"))).unwrap();
        assert_eq!((view.look.workers.len(), view.away.as_deref()), (1, Some("restarting")));
        assert_eq!(view.history, [42]);
        view.take(Ok(Look::default())).unwrap();
        assert_eq!((view.look.workers.len(), view.away.as_deref()), (0, None));
        assert!(view.take(Err(Status::unauthenticated("who?"))).is_err(), "that does not go away by itself");
    }
}
