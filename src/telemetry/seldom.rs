//! Rate limits for log lines that others can cause.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Allows a log line at most once per pause, with the number left out before it. Otherwise whoever can cause a line
/// could fill the disk and hide what matters.
#[derive(Debug)]
pub(crate) struct Seldom {
    pause: Duration,
    /// When the last line was written, and how many have been left out since.
    last: Mutex<Option<(Instant, u64)>>,
}

impl Seldom {
    pub(crate) const fn every(pause: Duration) -> Self {
        Self { pause, last: Mutex::new(None) }
    }

    /// The number of lines left out, if one may be written now.
    pub(crate) fn may(&self) -> Option<u64> {
        let now = Instant::now();
        let mut last = self.last.lock();
        match last.as_mut() {
            Some((at, left_out)) if now < *at + self.pause => {
                *left_out += 1;
                None
            }
            _ => Some(last.replace((now, 0)).map_or(0, |(_, left_out)| left_out)),
        }
    }
}

/// Logs a line of this place at most once a second, with how many were left out as `unlogged`.
macro_rules! seldom {
    ($level:ident, $($line:tt)+) => {{
        static SAID: $crate::telemetry::Seldom = $crate::telemetry::Seldom::every(std::time::Duration::from_secs(1));
        if let Some(unlogged) = SAID.may() {
            tracing::$level!(unlogged, $($line)+);
        }
    }};
}

pub(crate) use seldom;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_line_comes_once_a_pause_and_counts_the_others() {
        let said = Seldom::every(Duration::from_secs(60));
        let mut lines = Vec::new();
        for second in 0..=180 {
            for _ in 0..10 {
                lines.extend(said.may().map(|left_out| (second, left_out)));
            }
            tokio::time::advance(Duration::from_secs(1)).await;
        }
        assert_eq!(lines, [(0, 0), (60, 599), (120, 599), (180, 599)]);
    }
}
