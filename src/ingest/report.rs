//! What is wrong with a file, line by line: the lowest lines are told, all are counted.

use std::collections::BinaryHeap;

/// How many bad lines are reported.
pub const MAX_REPORTS: usize = 100;

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LineReport {
    /// Its number, from 1, blank lines counted.
    pub line: u64,
    /// The request's `custom_id` if it could be read.
    pub custom_id: Option<String>,
    /// What is wrong and what is expected.
    pub message: String,
}

/// The reports of the lowest lines.
#[derive(Debug, Default)]
pub(super) struct Reports {
    /// The highest line on top, to make room for a lower one.
    lowest: BinaryHeap<LineReport>,
    total: u64,
}

impl Reports {
    /// Reports a line. Duplicates are found last, so lines come in any order; each comes once.
    pub(super) fn add(&mut self, line: u64, custom_id: Option<String>, message: impl FnOnce() -> String) {
        self.total += 1;
        if self.lowest.len() == MAX_REPORTS {
            if self.lowest.peek().is_some_and(|highest| highest.line < line) {
                return;
            }
            self.lowest.pop();
        }
        self.lowest.push(LineReport { line, custom_id, message: message() });
    }

    /// How many lines are bad.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// The reports, lowest line first, and how many bad lines there are in all.
    pub(super) fn into_sorted(self) -> (Vec<LineReport>, u64) {
        (self.lowest.into_sorted_vec(), self.total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_are_kept_in_whatever_order_they_come() {
        let mut reports = Reports::default();
        for line in (1..=500).map(|n| n * 7 % 503) {
            reports.add(line, None, || format!("bad {line}"));
        }
        let (reports, total) = reports.into_sorted();
        assert_eq!(total, 500);
        let lines: Vec<u64> = reports.iter().map(|report| report.line).collect();
        let mut all: Vec<u64> = (1..=500).map(|n| n * 7 % 503).collect();
        all.sort_unstable();
        assert_eq!(lines, all[..MAX_REPORTS]);
        assert_eq!(reports[3].message, format!("bad {}", reports[3].line));
    }
}
