//! The bad lines of a file: the first ones are described, all are counted.

use std::collections::BinaryHeap;

use crate::domain::{
    BatchError,
    request_line::{Field, Problem},
};

/// The most bad lines that are described.
pub const MAX_REPORTS: usize = 100;

/// A description of a bad line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LineReport {
    /// The line number, from 1, counting blank lines.
    pub line: u64,
    /// The request's `custom_id` if it could be read.
    pub custom_id: Option<String>,
    /// What is wrong and what is expected.
    pub message: String,
    /// The kind of mistake, in OpenAI's words.
    pub fault: Fault,
}

impl LineReport {
    /// This problem as an error of the batch that fails because of it.
    #[must_use]
    pub fn into_error(self) -> BatchError {
        BatchError {
            code: self.fault.code.to_owned(),
            message: self.message,
            line: i64::try_from(self.line).unwrap_or(i64::MAX),
            param: self.fault.param.unwrap_or_default().to_owned(),
        }
    }
}

/// What kind of mistake a line has, as programs read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    /// OpenAI's code for it.
    pub code: &'static str,
    /// The field of the line that is wrong. `None`: the line as a whole.
    pub param: Option<&'static str>,
}

impl Fault {
    /// A mistake in one field.
    #[must_use]
    pub const fn in_field(code: &'static str, param: &'static str) -> Self {
        Self { code, param: Some(param) }
    }
}

impl From<&Problem> for Fault {
    fn from(problem: &Problem) -> Self {
        Self { code: problem.code(), param: problem.field().map(Field::path) }
    }
}

/// The reports of the first bad lines.
#[derive(Debug, Default)]
pub(super) struct Reports {
    /// The highest line number on top, to be replaced by a lower one.
    lowest: BinaryHeap<LineReport>,
    total: u64,
}

impl Reports {
    /// Reports a line, once. Lines come in any order, because duplicates are found last.
    pub(super) fn add(&mut self, line: u64, custom_id: Option<String>, fault: Fault, message: impl FnOnce() -> String) {
        self.total += 1;
        if self.lowest.len() == MAX_REPORTS {
            if self.lowest.peek().is_some_and(|highest| highest.line < line) {
                return;
            }
            self.lowest.pop();
        }
        self.lowest.push(LineReport { line, custom_id, message: message(), fault });
    }

    /// The number of bad lines.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// The reports in the order of lines, and the number of bad lines in all.
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
            reports.add(line, None, Fault { code: "invalid_request", param: None }, || format!("bad {line}"));
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
