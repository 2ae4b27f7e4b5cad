//! Progress on stderr: a live bar on a terminal, otherwise a line every few seconds and at each change of state.

use std::{
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;

use super::{
    json, out,
    printable::{escaped, one_line},
};
use crate::pb;

/// The shortest time between two plain lines of the same state.
const PLAIN: Duration = Duration::from_secs(3);
/// The template of a batch's bar: the state's name, the bar, then the message in the rest of the line.
const REQUESTS: &str = "{prefix:11} {bar:20.cyan/dim} {pos}/{len}  {wide_msg}";
/// Redraws per second.
const REDRAWS: u8 = 10;

/// The state of a batch according to its events.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// `BatchStatus`, as on the wire.
    pub status: i32,
    /// Requests.
    pub counts: pb::RequestCounts,
    /// Speed and ETA, or why there is no progress.
    pub progress: pb::BatchProgress,
}

impl View {
    /// Applies an event.
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

    /// Finished requests, successful or not.
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

    /// The bar's message: failures, speeds and ETA, or the reason for waiting.
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
        one_line(parts.join(", "))
    }

    fn plain(&self) -> String {
        let head = format!("{} {}/{}", self.state(), self.done(), self.total());
        match self.message().as_str() {
            "" => head,
            message => format!("{head}, {message}"),
        }
    }
}

/// How progress is shown.
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
    /// The line to print now. `None` if neither the state nor the reason for waiting has changed and the last line is
    /// recent.
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
    /// A meter for a batch's requests.
    #[must_use]
    pub fn requests(json: bool) -> Self {
        match (json, io::stderr().is_terminal()) {
            (true, _) => Self::Silent,
            (false, false) => Self::Plain(Plain::default()),
            (false, true) => Self::Bar(bar(0, REQUESTS)),
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

    /// Prints a message above the bar.
    pub fn say(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| note(text)),
            Self::Plain(_) | Self::Silent => note(text),
        }
    }

    /// Ends the meter and leaves its last state on the screen.
    pub fn finish(&self) {
        if let Self::Bar(bar) = self {
            bar.abandon();
            // The bar leaves the cursor at its end.
            note("");
        }
    }
}

/// A bar for bytes. Hidden if stderr is not a terminal or JSON is wanted.
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

/// Prints a line on stderr, without control characters. Ignores errors, because without stderr nobody can read them.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{}", escaped(text));
}

/// Says that the command reads stdin, if stdin is a terminal.
pub fn note_terminal() {
    if io::stdin().is_terminal() {
        note("reading from the terminal; end the input with Ctrl-D on a line of its own");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use indicatif::TermLike;
    use proptest::prelude::*;

    use super::{super::printable::tests::text as texts, *};

    /// A terminal that remembers what it was told to write.
    #[derive(Clone, Debug, Default)]
    struct Screen(Arc<Mutex<String>>);

    impl TermLike for Screen {
        fn width(&self) -> u16 {
            80
        }

        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }

        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)
        }

        fn write_str(&self, text: &str) -> io::Result<()> {
            self.0.lock().unwrap().push_str(text);
            Ok(())
        }

        fn clear_line(&self) -> io::Result<()> {
            Ok(())
        }

        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    proptest! {
        /// A waiting reason names models and holds what workers say.
        #[test]
        fn progress_holds_any_text(reason in texts(), status in 0..9_i32, numbers in any::<[i64; 4]>(), rate in any::<f64>()) {
            let view = View {
                status,
                counts: pb::RequestCounts { total: numbers[0], completed: numbers[1], failed: numbers[2] },
                progress: pb::BatchProgress {
                    waiting_reason: reason,
                    requests_per_second: rate,
                    output_tokens_per_second: -rate,
                    eta: Some(prost_types::Duration { seconds: numbers[3], nanos: 0 }),
                    ..pb::BatchProgress::default()
                },
            };
            let line = view.plain();
            prop_assert!(!line.chars().any(char::is_control), "{line}");
            let screen = Screen::default();
            let bar = bar(0, REQUESTS);
            bar.set_draw_target(ProgressDrawTarget::term_like(Box::new(screen.clone())));
            Meter::Bar(bar).show(&view);
            let drawn = screen.0.lock().unwrap().clone();
            prop_assert!(drawn.contains('/') && !drawn.chars().any(|char| char.is_control() && char != '\n'), "{drawn:?}");
        }
    }

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
        let mut meter = Meter::Bar(bar(0, REQUESTS));
        meter.show(&running(5));
        let Meter::Bar(bar) = &meter else { panic!("a bar") };
        assert_eq!((bar.length(), bar.position()), (Some(1_000), 8));
        super::bar(1, "{prefix:11} {bar:20.cyan/dim} {bytes}/{total_bytes}  {bytes_per_sec}  eta {eta}");
    }
}
