//! Progress on stderr: a live bar on a terminal, else a line every few seconds and at each change of state.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;

use super::{json, out};
use crate::pb;

/// The shortest time between two plain lines of the same state.
const PLAIN: Duration = Duration::from_secs(3);
/// Redraws per second.
const REDRAWS: u8 = 10;

/// A batch as its events have told it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// `BatchStatus`, as on the wire.
    pub status: i32,
    /// Requests.
    pub counts: pb::RequestCounts,
    /// What moves, or why nothing does.
    pub progress: pb::BatchProgress,
}

impl View {
    /// Takes an event in.
    pub fn apply(&mut self, event: &pb::batch_event::Event) {
        match event {
            pb::batch_event::Event::StateChanged(batch) => {
                self.status = batch.status;
                self.counts = batch.request_counts.unwrap_or_default();
                self.progress = batch.progress.clone().unwrap_or_default();
                self.progress.waiting_reason.clone_from(&batch.waiting_reason);
            }
            pb::batch_event::Event::Progress(progress) => {
                self.counts = progress.request_counts.unwrap_or(self.counts);
                self.progress = progress.clone();
            }
            pb::batch_event::Event::Heartbeat(_) => {}
        }
    }

    /// Requests that are done with, well or not.
    #[must_use]
    pub fn done(&self) -> u64 {
        u64::try_from(self.counts.completed.saturating_add(self.counts.failed)).unwrap_or(0)
    }

    fn total(&self) -> u64 {
        u64::try_from(self.counts.total).unwrap_or(0)
    }

    fn state(&self) -> String {
        out::words(json::batch_status(self.status))
    }

    /// All but state and counts: what failed, speeds, ETA, or why nothing moves.
    #[must_use]
    pub fn message(&self) -> String {
        let mut parts = Vec::new();
        if self.counts.failed > 0 {
            parts.push(format!("{} failed", self.counts.failed));
        }
        let running = self.status == i32::from(pb::BatchStatus::InProgress);
        if !self.progress.waiting_reason.is_empty() {
            parts.push(format!("waiting: {}", self.progress.waiting_reason));
        } else if running && self.progress.queue_position > 0 {
            parts.push(format!("{} batches ahead", self.progress.queue_position));
        }
        if running && self.progress.requests_per_second > 0.0 {
            parts.push(format!("{} req/s", out::short(self.progress.requests_per_second)));
            parts.push(format!("{} tok/s", out::short(self.progress.output_tokens_per_second)));
        }
        if let Some(eta) = json::duration(self.progress.eta.as_ref()).filter(|_| running) {
            parts.push(format!("eta {}", out::span(eta)));
        }
        parts.join(", ")
    }

    fn plain(&self) -> String {
        let head = format!("{} {}/{}", self.state(), self.done(), self.total());
        match self.message().as_str() {
            "" => head,
            message => format!("{head}, {message}"),
        }
    }
}

/// Where progress is shown.
pub enum Meter {
    /// On a terminal.
    Bar(ProgressBar),
    /// Elsewhere.
    Plain(Plain),
    /// Nowhere: the events themselves are printed.
    Silent,
}

/// Decides which plain lines are worth printing.
#[derive(Default)]
pub struct Plain {
    last: Option<(Instant, String, String)>,
}

impl Plain {
    /// The line to print now, if it is time or the state or the reason for waiting is a new one.
    fn due(&mut self, view: &View, now: Instant) -> Option<String> {
        let key = format!("{} {}", view.status, view.progress.waiting_reason);
        let line = view.plain();
        if let Some((at, last_key, last_line)) = &self.last {
            let news = *last_key != key || (now.duration_since(*at) >= PLAIN && *last_line != line);
            if !news {
                return None;
            }
        }
        self.last = Some((now, key, line.clone()));
        Some(line)
    }
}

impl Meter {
    /// For requests.
    #[must_use]
    pub fn requests(json: bool) -> Self {
        match (json, io::stderr().is_terminal()) {
            (true, _) => Self::Silent,
            (false, false) => Self::Plain(Plain::default()),
            (false, true) => {
                // The name of the state in front, then the bar; the message takes what is left of the line.
                Self::Bar(bar(0, "{prefix:11} {bar:20.cyan/dim} {pos}/{len}  {wide_msg}"))
            }
        }
    }

    /// Shows a batch.
    pub fn show(&mut self, view: &View) {
        match self {
            Self::Bar(bar) => {
                bar.set_length(view.total());
                bar.set_position(view.done());
                bar.set_prefix(view.state());
                bar.set_message(view.message());
            }
            Self::Plain(plain) => {
                if let Some(line) = plain.due(view, Instant::now()) {
                    note(&line);
                }
            }
            Self::Silent => {}
        }
    }

    /// Says something without spoiling the bar.
    pub fn say(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| note(text)),
            Self::Plain(_) | Self::Silent => note(text),
        }
    }

    /// Leaves the last picture where it is.
    pub fn finish(&self) {
        if let Self::Bar(bar) = self {
            bar.abandon();
            // The bar leaves the cursor at its end.
            note("");
        }
    }
}

/// A bar for bytes; invisible where stderr is no terminal or JSON is wanted.
#[must_use]
pub fn bytes(what: &str, total: u64, json: bool) -> ProgressBar {
    if json || !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = bar(total, "{prefix:11} {bar:20.cyan/dim} {bytes}/{total_bytes}  {bytes_per_sec}  eta {eta}");
    bar.set_prefix(what.to_owned());
    bar
}

fn bar(total: u64, template: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(REDRAWS));
    let style = ProgressStyle::with_template(template).expect("the template is valid: a test reads it");
    bar.set_style(style.progress_chars("=> "));
    bar
}

/// A line on stderr. If stderr is gone, nobody is left to be told.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(completed: i64) -> View {
        View {
            status: pb::BatchStatus::InProgress.into(),
            counts: pb::RequestCounts { total: 1_000, completed, failed: 3 },
            progress: pb::BatchProgress {
                requests_per_second: 42.0,
                output_tokens_per_second: 1_234.0,
                eta: Some(prost_types::Duration { seconds: 200, nanos: 0 }),
                ..pb::BatchProgress::default()
            },
        }
    }

    #[test]
    fn a_line_tells_all() {
        let view = running(117);
        assert_eq!(view.plain(), "in progress 120/1000, 3 failed, 42 req/s, 1.2k tok/s, eta 3m 20s");
        let progress = pb::BatchProgress { waiting_reason: "no worker for \"m\"".into(), ..Default::default() };
        let waiting = View { progress, counts: pb::RequestCounts { total: 9, ..Default::default() }, ..view };
        assert_eq!(waiting.plain(), "in progress 0/9, waiting: no worker for \"m\"");
        let done = View { status: pb::BatchStatus::Completed.into(), ..running(997) };
        assert_eq!(done.plain(), "completed 1000/1000, 3 failed", "speeds and ETA are over");
    }

    #[test]
    fn events_add_up() {
        use pb::batch_event::Event;
        let mut view = View::default();
        let batch = pb::Batch {
            status: pb::BatchStatus::InProgress.into(),
            request_counts: Some(pb::RequestCounts { total: 10, completed: 1, failed: 0 }),
            waiting_reason: "why".into(),
            ..pb::Batch::default()
        };
        view.apply(&Event::StateChanged(batch));
        assert_eq!((view.done(), view.progress.waiting_reason.as_str()), (1, "why"));
        let counts = Some(pb::RequestCounts { total: 10, completed: 4, failed: 1 });
        view.apply(&Event::Progress(pb::BatchProgress { request_counts: counts, ..Default::default() }));
        assert_eq!((view.done(), view.progress.waiting_reason.as_str()), (5, ""));
        view.apply(&Event::Heartbeat(pb::Heartbeat {}));
        assert_eq!(view.done(), 5);
    }

    #[test]
    fn plain_lines_come_with_news_or_with_time() {
        let (mut plain, start) = (Plain::default(), Instant::now());
        assert!(plain.due(&running(1), start).is_some());
        assert!(plain.due(&running(2), start + Duration::from_secs(1)).is_none());
        assert!(plain.due(&running(3), start + PLAIN).is_some());
        assert!(plain.due(&running(3), start + 3 * PLAIN).is_none(), "the same again is no news");
        let done = View { status: pb::BatchStatus::Completed.into(), ..running(3) };
        assert!(plain.due(&done, start + 3 * PLAIN).is_some());
    }

    #[test]
    fn the_bars_templates_are_valid() {
        let mut meter = Meter::Bar(bar(0, "{prefix:11} {bar:20.cyan/dim} {pos}/{len}  {wide_msg}"));
        meter.show(&running(5));
        let Meter::Bar(bar) = &meter else { panic!("a bar") };
        assert_eq!((bar.length(), bar.position()), (Some(1_000), 8));
        super::bar(1, "{prefix:11} {bar:20.cyan/dim} {bytes}/{total_bytes}  {bytes_per_sec}  eta {eta}");
    }
}
