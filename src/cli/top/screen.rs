//! Draws the screen of `tidemill top`.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::Line,
    widgets::{Paragraph, Row, Sparkline, Table},
};

use super::{
    super::{json, out, printable},
    View,
};
use crate::{cli::meter, pb};

/// Height of the curve in lines.
const CURVE: u16 = 3;
/// Characters of a progress bar.
const BAR: u64 = 16;

pub const WORKERS: [&str; 11] =
    ["WORKER", "STATE", "IN FLIGHT", "RUNNING", "WAITING", "KV", "HITS", "REQ/S", "TOK/S", "TIME", "MODELS"];
pub const BATCHES: [&str; 7] = ["BATCH", "STATE", "DONE", "", "FAILED", "MODELS", "NOW"];

/// A worker's cells. What it does not report is a dash.
pub fn worker(worker: &pb::Worker) -> [String; 11] {
    let reported = |text: String| if worker.reports_metrics { text } else { "-".into() };
    [
        worker.url.split_once("://").map_or(worker.url.as_str(), |(_, host)| host).to_owned(),
        out::words(json::worker_state(worker.state)),
        format!("{}/{}", worker.in_flight, worker.limit),
        reported(out::short(worker.running)),
        reported(out::short(worker.waiting)),
        reported(format!("{:.0}%", worker.kv_cache_usage * 100.0)),
        out::hits(worker),
        out::short(worker.requests_per_second),
        out::short(worker.output_tokens_per_second),
        json::duration(worker.request_time.as_ref()).map_or_else(|| "-".into(), out::brief),
        if worker.last_error.is_empty() { worker.models.join(",") } else { worker.last_error.clone() },
    ]
}

/// A batch's cells.
pub fn batch(batch: &pb::Batch) -> [String; 7] {
    let mut view = meter::View::default();
    view.apply(&pb::batch_event::Event::StateChanged(batch.clone()));
    let (done, total) = (view.done(), u64::try_from(view.counts.total).unwrap_or(0));
    // It has a column of its own.
    let failed = std::mem::take(&mut view.counts.failed);
    let filled = done.saturating_mul(BAR).checked_div(total).unwrap_or(0);
    [
        batch.id.clone(),
        out::words(json::batch_status(batch.status)),
        format!("{done}/{total}"),
        (0..BAR).map(|at| if at < filled { '█' } else { '░' }).collect(),
        failed.to_string(),
        batch.models.join(","),
        view.message(),
    ]
}

/// Draws the whole screen.
pub fn draw(frame: &mut Frame, view: &View, server: &str) {
    let workers = u16::try_from(view.look.workers.len()).unwrap_or(u16::MAX).saturating_add(2);
    let split = view.look.split();
    let [head, times, curve, upper, lower, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(split.is_some().into()),
        Constraint::Length(CURVE),
        Constraint::Max(workers),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let title = shown(&format!("tidemill {server}: {}", view.look.totals()));
    frame.render_widget(Line::styled(title, Modifier::BOLD), head);
    frame.render_widget(Line::raw(split.unwrap_or_default()), times);
    draw_curve(frame, view, curve);
    let widths = [
        Constraint::Max(32),
        Constraint::Length(8),
        Constraint::Length(11),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(5),
        Constraint::Length(4),
        Constraint::Length(6),
        Constraint::Length(6),
        Constraint::Length(6),
        Constraint::Fill(1),
    ];
    let rows =
        view.look.workers.iter().map(|one| Row::new(worker(one).map(|cell| shown(&cell))).style(worker_style(one)));
    frame.render_widget(Table::new(rows, widths).header(header(WORKERS)).column_spacing(2), upper);
    draw_batches(frame, view, lower);
    let foot_line = match &view.away {
        Some(why) => Line::styled(shown(&format!("the server can't be reached ({why}), trying again")), Color::Red),
        None => Line::styled("q: quit", Modifier::DIM),
    };
    frame.render_widget(foot_line, foot);
}

/// Requests per second at the last updates, the newest at the right.
fn draw_curve(frame: &mut Frame, view: &View, area: Rect) {
    let shown = view.history.len().saturating_sub(area.width.into());
    let samples: Vec<u64> = view.history.iter().skip(shown).copied().collect();
    let width = u16::try_from(samples.len()).unwrap_or(u16::MAX).min(area.width);
    let right = Rect { x: area.x + area.width - width, width, ..area };
    frame.render_widget(Sparkline::default().data(&samples).style(Color::Cyan), right);
}

fn draw_batches(frame: &mut Frame, view: &View, area: Rect) {
    let batches = &view.look.batches;
    if batches.is_empty() {
        frame.render_widget(Paragraph::new("no unfinished batches").style(Modifier::DIM), area);
        return;
    }
    // One line each for the header and for the count of what does not fit.
    let room = usize::from(area.height.saturating_sub(2));
    let widths = [
        Constraint::Max(46),
        Constraint::Length(11),
        Constraint::Length(17),
        Constraint::Length(16),
        Constraint::Length(6),
        Constraint::Max(24),
        Constraint::Fill(1),
    ];
    let rows =
        batches.iter().take(room).map(|one| Row::new(batch(one).map(|cell| shown(&cell))).style(batch_style(one)));
    frame.render_widget(Table::new(rows, widths).header(header(BATCHES)).column_spacing(2), area);
    if batches.len() > room || view.look.more {
        let more = batches.len().saturating_sub(room);
        let text = if view.look.more { format!("and more than {more} others") } else { format!("and {more} others") };
        let last = Rect { y: area.y + area.height.saturating_sub(1), height: 1, ..area };
        frame.render_widget(Line::styled(text, Modifier::DIM), last);
    }
}

/// A cell cut to the width of any screen: the library counts columns in 16 bits.
fn shown(cell: &str) -> String {
    const MOST: usize = 500;
    let end = cell.char_indices().nth(MOST).map_or(cell.len(), |(at, _)| at);
    printable::one_line(cell[..end].to_owned())
}

fn header<const N: usize>(names: [&'static str; N]) -> Row<'static> {
    Row::new(names).style(Modifier::DIM)
}

fn worker_style(worker: &pb::Worker) -> Style {
    match pb::WorkerState::try_from(worker.state).unwrap_or_default() {
        pb::WorkerState::Healthy | pb::WorkerState::Unspecified => Style::default(),
        pb::WorkerState::Starting | pb::WorkerState::Draining => Color::Yellow.into(),
        pb::WorkerState::Down => Color::Red.into(),
    }
}

fn batch_style(batch: &pb::Batch) -> Style {
    if batch.waiting_reason.is_empty() { Style::default() } else { Color::Yellow.into() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ratatui::{Terminal, backend::TestBackend};

    use super::{super::Look, *};
    use crate::cli::printable::tests::text as texts;

    proptest! {
        #[test]
        fn the_picture_holds_any_text(text in texts(), other in texts()) {
            let worker = pb::Worker {
                id: text.clone(),
                url: other.clone(),
                models: vec![text.clone(), other.clone()],
                ..pb::Worker::default()
            };
            let down = pb::Worker { last_error: text.clone(), ..worker.clone() };
            let batch = pb::Batch {
                id: other.clone(),
                models: vec![text.clone()],
                waiting_reason: other,
                ..pb::Batch::default()
            };
            let look = Look { workers: vec![worker, down], batches: vec![batch], ..Look::default() };
            let text = drawn(&View { look, away: Some(text), ..View::default() }, 120, 16);
            prop_assert!(!text.chars().any(|char| char.is_control() && char != '\n'), "{text:?}");
        }
    }

    fn look() -> Look {
        let worker = |url: &str, state: pb::WorkerState| pb::Worker {
            url: url.into(),
            state: state.into(),
            models: vec!["m".into()],
            in_flight: 60,
            limit: 64,
            ..pb::Worker::default()
        };
        let healthy = pb::Worker {
            reports_metrics: true,
            running: 56.0,
            waiting: 4.0,
            kv_cache_usage: 0.42,
            prefix_hit_rate: Some(0.83),
            request_time: Some(prost_types::Duration { seconds: 0, nanos: 186_000_000 }),
            requests_per_second: 321.0,
            output_tokens_per_second: 5_000.0,
            ..worker("http://gpu-1:8000", pb::WorkerState::Healthy)
        };
        let down = pb::Worker {
            last_error: "connection refused".into(),
            ..worker("http://gpu-2:8000", pb::WorkerState::Down)
        };
        let batches = (0..30).map(|number| pb::Batch {
            id: format!("batch_{number:02}"),
            status: pb::BatchStatus::InProgress.into(),
            request_counts: Some(pb::RequestCounts { total: 100, completed: 45, failed: 5 }),
            progress: Some(pb::BatchProgress { queue_position: number, ..pb::BatchProgress::default() }),
            waiting_reason: if number == 1 { "no worker serves \"x\"".into() } else { String::new() },
            ..pb::Batch::default()
        });
        let stages = pb::RequestStages {
            persist: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
            ..pb::RequestStages::default()
        };
        Look { workers: vec![healthy, down], stages, batches: batches.collect(), more: false }
    }

    fn drawn(view: &View, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, view, "http://h:4080")).unwrap();
        terminal.backend().to_string()
    }

    #[test]
    fn the_picture_shows_workers_batches_and_what_they_wait_for() {
        let mut view = View { look: look(), history: (1..=400).collect(), ..View::default() };
        let text = drawn(&view, 160, 24);
        let line = |needle: &str| text.lines().find(|line| line.contains(needle)).unwrap_or_else(|| panic!("{text}"));
        assert!(
            line("tidemill http://h:4080").contains("1 of 2 workers healthy, 120 in flight of 128, 321 req/s, 5.0k")
        );
        for cell in ["healthy", "60/64", "56", "42%", "83%", "321", "5.0k", "186ms"] {
            assert!(line("gpu-1:8000").contains(cell), "{cell}: {text}");
        }
        assert!(line("gpu-2:8000").contains("connection refused") && line("gpu-2:8000").contains(" - "), "{text}");
        assert!(line("batch_00").contains("50/100") && line("batch_00").contains("████████░░░░░░░░"), "{text}");
        assert!(line("batch_01").contains("waiting: no worker serves \"x\""), "{text}");
        assert!(line("others").contains("and 18 others"), "{text}");
        assert!(line("a request takes").contains("1.0s until it is durable"), "{text}");
        assert!(line("q: quit").contains("q: quit"));
        view.away = Some("connection refused".into());
        assert!(drawn(&view, 160, 24).contains("the server can't be reached"));
        view.look = Look::default();
        assert!(drawn(&view, 160, 24).contains("no unfinished batches"));
    }

    #[test]
    fn no_terminal_is_too_small() {
        let view = View { look: look(), history: [1, 2].into(), ..View::default() };
        for (width, height) in [(1, 1), (5, 3), (20, 6), (80, 8)] {
            drawn(&view, width, height);
        }
    }
}
