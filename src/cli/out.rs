//! Output on stdout, and numbers and durations formatted for people.

use std::{
    fmt::Display,
    io::{self, IsTerminal as _, Write as _},
    time::Duration,
};

use crate::pb;

use super::{
    json,
    printable::{escaped, one_line, width},
};

/// The widest column, so that one long cell does not push all others off the screen.
const WIDEST: usize = 120;

/// Prints a line, without control characters. Unlike `println!` it does not panic if the reader has gone away.
///
/// # Errors
/// stdout can't be written.
pub fn line(text: impl Display) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}", escaped(&text.to_string()))?;
    stdout.flush()
}

/// Prints text that is user data: a pipe or a file gets it unchanged.
///
/// # Errors
/// stdout can't be written.
pub fn data(text: &str) -> io::Result<()> {
    if io::stdout().is_terminal() {
        return line(text);
    }
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()
}

/// Prints rows in columns, each as wide as its widest cell, except the last.
///
/// # Errors
/// stdout can't be written.
pub fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> io::Result<()> {
    line(columns(head, rows))
}

fn columns<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let head = head.map(str::to_owned);
    let rows: Vec<[String; N]> =
        std::iter::once(head).chain(rows.iter().map(|row| row.clone().map(one_line))).collect();
    let widest = |column: usize| rows.iter().map(|row| width(&row[column])).max().unwrap_or(0).min(WIDEST);
    let widths: [usize; N] = std::array::from_fn(widest);
    let render = |row: &[String; N]| {
        let cells: Vec<_> = row.iter().zip(widths).map(|(cell, width)| padded(cell, width)).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(render).collect::<Vec<_>>().join("\n")
}

/// Pads a cell to its column's width. Nothing is cut off. (A format width would panic above 65,535.)
fn padded(cell: &str, columns: usize) -> String {
    let missing = columns.saturating_sub(width(cell));
    format!("{cell}{}", " ".repeat(missing))
}

/// A number in at most four characters or so: 950, 1.2k, 34k, 5.6M.
#[must_use]
pub fn short(number: f64) -> String {
    let number = number.max(0.0);
    let mut scaled = number;
    for unit in ["", "k", "M", "G"] {
        if scaled < 999.5 {
            return match unit {
                "" if number >= 99.95 || number.fract() < 0.05 => format!("{number:.0}"),
                "" => format!("{number:.1}"),
                _ if scaled >= 9.95 => format!("{scaled:.0}{unit}"),
                _ => format!("{scaled:.1}{unit}"),
            };
        }
        scaled /= 1_000.0;
    }
    format!("{scaled:.1}T")
}

/// A duration in its two largest units: 45s, 3m 20s, 2h 5m, 3d 4h.
#[must_use]
pub fn span(span: Duration) -> String {
    let seconds = span.as_secs().saturating_add(u64::from(span.subsec_nanos() >= 500_000_000));
    let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, minutes) => format!("{minutes}m {}s", seconds % 60),
        (0, hours, _) => format!("{hours}h {}m", minutes % 60),
        (days, _, _) => format!("{days}d {}h", hours % 24),
    }
}

/// A duration in about six characters, down to microseconds: 85us, 1.4ms, 230ms, 4.2s, 3m 20s.
#[must_use]
pub fn brief(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let scaled = |number: f64, unit: &str| {
        if number < 9.95 { format!("{number:.1}{unit}") } else { format!("{number:.0}{unit}") }
    };
    match seconds {
        _ if time.is_zero() => "0s".into(),
        _ if seconds < 999.5e-6 => format!("{:.0}us", seconds * 1e6),
        _ if seconds < 0.9995 => scaled(seconds * 1e3, "ms"),
        _ if seconds < 59.5 => scaled(seconds, "s"),
        _ => span(time),
    }
}

/// The hit rate of a worker's prefix cache, or a dash if it is not reported.
#[must_use]
pub fn hits(worker: &pb::Worker) -> String {
    worker.prefix_hit_rate.map_or_else(|| "-".into(), |rate| format!("{:.0}%", rate * 100.0))
}

/// A state's name in lower case with spaces: "in progress".
#[must_use]
pub fn words(name: &str) -> String {
    name.to_lowercase().replace('_', " ")
}

/// A batch in a few lines.
#[must_use]
pub fn batch(batch: &pb::Batch) -> String {
    let counts = batch.request_counts.unwrap_or_default();
    let usage = batch.usage.unwrap_or_default();
    let mut rows = vec![
        ("batch", batch.id.clone()),
        ("status", words(json::batch_status(batch.status))),
        ("requests", format!("{} of {} completed, {} failed", counts.completed, counts.total, counts.failed)),
        ("tokens", tokens(&usage)),
        ("endpoint", batch.endpoint.clone()),
        ("models", batch.models.join(", ")),
        ("waiting", batch.waiting_reason.clone()),
        ("input", batch.input_file_id.clone()),
        ("output", batch.output_file_id.clone()),
        ("errors", batch.error_file_id.clone()),
        ("metadata", batch.metadata.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(" ")),
        ("priority", if batch.priority == 0 { String::new() } else { batch.priority.to_string() }),
        ("webhook", batch.webhook.as_ref().map(|webhook| webhook.url.clone()).unwrap_or_default()),
    ];
    let times = [
        ("created", &batch.create_time),
        ("started", &batch.in_progress_time),
        ("completed", &batch.completed_time),
        ("failed", &batch.failed_time),
        ("expired", &batch.expired_time),
        ("cancelled", &batch.cancelled_time),
        ("expires", &batch.expire_time),
    ];
    rows.extend(times.map(|(name, time)| (name, json::time(time.as_ref()).unwrap_or_default())));
    rows.extend(batch.errors.iter().map(|error| ("error", batch_error(error))));
    fields(&rows)
}

fn batch_error(error: &pb::BatchError) -> String {
    let place = if error.line > 0 { format!("line {}: ", error.line) } else { String::new() };
    format!("{place}{} ({})", error.message, error.code)
}

/// Tokens in and out.
#[must_use]
pub fn tokens(usage: &pb::TokenUsage) -> String {
    let cached = if usage.cached_input_tokens > 0 {
        format!(" ({} from the prefix cache)", usage.cached_input_tokens)
    } else {
        String::new()
    };
    format!("{} in{cached}, {} out, {} together", usage.input_tokens, usage.output_tokens, usage.total_tokens)
}

/// A file in a few lines.
#[must_use]
pub fn file(file: &pb::File) -> String {
    fields(&[
        ("file", file.id.clone()),
        ("filename", file.filename.clone()),
        ("purpose", file.purpose.clone()),
        ("bytes", file.bytes.to_string()),
        ("lines", file.line_count.to_string()),
        ("endpoint", file.endpoint.clone()),
        ("models", file.models.join(", ")),
        ("created", json::time(file.create_time.as_ref()).unwrap_or_default()),
        ("expires", json::time(file.expire_time.as_ref()).unwrap_or_default()),
    ])
}

/// Names and values, one per line, without empty values.
fn fields(rows: &[(&str, String)]) -> String {
    let set: Vec<_> = rows.iter().filter(|(_, value)| !value.is_empty()).collect();
    let width = set.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let line = |(name, value): &&(&str, String)| format!("{}  {}", padded(name, width), one_line(value.clone()));
    set.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::printable::tests::text as texts, *};

    #[test]
    fn numbers_are_short() {
        for (number, text) in [
            (0.0, "0"),
            (0.25, "0.2"),
            (3.0, "3"),
            (41.66, "41.7"),
            (99.96, "100"),
            (999.0, "999"),
            (999.7, "1.0k"),
            (1_234.0, "1.2k"),
            (34_499.0, "34k"),
            (999_700.0, "1.0M"),
            (5.6e6, "5.6M"),
            (7e12, "7.0T"),
            (-1.0, "0"),
            (f64::NAN, "0"),
        ] {
            assert_eq!(short(number), text, "{number}");
        }
    }

    #[test]
    fn spans_have_two_units() {
        for (seconds, text) in [(0.4, "0s"), (44.6, "45s"), (60.0, "1m 0s"), (3_599.9, "1h 0m"), (273_600.0, "3d 4h")] {
            assert_eq!(span(Duration::from_secs_f64(seconds)), text);
        }
    }

    #[test]
    fn spans_of_requests_are_short() {
        for (seconds, text) in [
            (0.0, "0s"),
            (85e-6, "85us"),
            (999.6e-6, "1.0ms"),
            (0.00142, "1.4ms"),
            (0.2304, "230ms"),
            (0.9996, "1.0s"),
            (4.24, "4.2s"),
            (42.4, "42s"),
            (59.7, "1m 0s"),
            (200.0, "3m 20s"),
        ] {
            assert_eq!(brief(Duration::from_secs_f64(seconds)), text);
        }
    }

    /// A listed name or message may have any length and hold anything.
    #[test]
    fn a_cell_of_any_length_is_printed() {
        let long = "x".repeat(70_000);
        let rows = [[long.clone(), "1".to_owned()], ["b".to_owned(), "\u{1b}[2J\n".to_owned()]];
        let text = columns(["ID", "N"], &rows);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3, "control characters do not reach the terminal");
        assert_eq!(lines[1], format!("{long}  1"));
        assert_eq!(lines[0], format!("ID{}  N", " ".repeat(WIDEST - 2)));
        assert!(lines[2].ends_with("  [2J"), "{}", lines[2]);
    }

    #[test]
    fn columns_line_up() {
        let rows = [["batch_é".to_owned(), "1".to_owned()], ["b".to_owned(), String::new()]];
        assert_eq!(columns(["ID", "N"], &rows), "ID       N\nbatch_é  1\nb");
        let wide = [["潮".to_owned(), "1".to_owned()], ["ebb".to_owned(), "2".to_owned()]];
        assert_eq!(columns(["ID", "N"], &wide), "ID   N\n潮   1\nebb  2");
    }

    proptest! {
        /// Whoever names a model or a file, or runs a worker, writes into these.
        #[test]
        fn tables_and_descriptions_hold_any_text(text in texts(), other in texts()) {
            let rows = [[text.clone(), other.clone()], [other.clone(), text.clone()]];
            let table = columns(["ID", "N"], &rows);
            prop_assert_eq!(table.split('\n').count(), 3, "a row is a line");
            let sent = pb::Batch {
                id: text.clone(),
                endpoint: other.clone(),
                models: vec![text.clone(), other.clone()],
                waiting_reason: text.clone(),
                input_file_id: other.clone(),
                metadata: [(text.clone(), other.clone())].into(),
                errors: vec![pb::BatchError { code: text.clone(), message: other.clone(), line: 3, param: text.clone() }],
                ..pb::Batch::default()
            };
            let stored = pb::File { id: other.clone(), filename: text, purpose: other, ..pb::File::default() };
            for shown in [table, batch(&sent), file(&stored)] {
                prop_assert!(!shown.chars().any(|char| char.is_control() && char != '\n'));
            }
        }
    }

    #[test]
    fn a_batch_shows_what_is_set() {
        let sent = pb::Batch {
            id: "batch_1".into(),
            status: pb::BatchStatus::InProgress.into(),
            request_counts: Some(pb::RequestCounts { total: 5, completed: 2, failed: 1 }),
            waiting_reason: "no healthy worker serves \"m\"".into(),
            errors: vec![pb::BatchError { code: "c".into(), message: "bad".into(), line: 3, param: String::new() }],
            ..pb::Batch::default()
        };
        let text = batch(&sent);
        assert!(text.contains("status    in progress\nrequests  2 of 5 completed, 1 failed\n"), "{text}");
        assert!(text.contains("waiting   no healthy worker"), "{text}");
        assert!(text.ends_with("error     line 3: bad (c)"), "{text}");
        assert!(!text.contains("webhook"), "{text}");
    }
}
