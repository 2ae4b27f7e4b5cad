//! Decides how long a line whose last try has failed waits until it is clear whether its worker is at fault. Pure.
//!
//! The worker's verdict is open until something succeeds there, or enough fails alike. The line waits for it as long as
//! there is news: further failures of the worker in the same matter. What counts as silence is measured in turns, each
//! looked at only after the one before: a machine that stands still for a while has one long turn, and hears what came
//! meanwhile before the next.

use std::time::Duration;

use tokio::time::Instant;

use crate::fleet::{Blame, outage::Verdict};

/// The shortest length of a turn.
const TURN: Duration = Duration::from_millis(500);
/// Silent turns that end the doubt if the segment has other lines that may tell: ten seconds.
const SILENT_AMONG_OTHERS: u32 = 20;
/// Silent turns if it has none: one second. Other batches may still tell.
const SILENT_ALONE: u32 = 2;
/// The most turns without other lines, however much fails in other batches.
const MOST_ALONE: u32 = 20;

/// One line's doubt.
pub(super) struct Doubt {
    blame: Blame,
    /// The relevant failures at the last check.
    failures: u32,
    silent: u32,
    alone: u32,
    next: Instant,
    /// When the line is sent again to find out.
    again: Option<Instant>,
}

impl Doubt {
    /// `again`: when the line is sent again to find out, if it is; it does not end before.
    pub(super) fn new(blame: Blame, again: Option<Instant>, now: Instant) -> Self {
        let failures = blame.failures();
        Self { blame, failures, silent: 0, alone: 0, next: again.unwrap_or(now + TURN), again }
    }

    /// Whether the line is to be sent again now, as nothing else has told.
    pub(super) fn asks_again(&self, now: Instant) -> bool {
        self.again.is_some_and(|at| at <= now)
    }

    /// When to check again, if nothing happens before.
    pub(super) fn next_look(&self) -> Instant {
        self.next
    }

    /// Decides whose failure it was. `others`: whether other lines of the segment may still tell.
    pub(super) fn look(&mut self, others: bool, now: Instant) -> Verdict {
        let verdict = self.blame.verdict();
        if verdict != Verdict::Open || self.again.is_some() || now < self.next {
            return verdict;
        }
        self.next = now + TURN;
        let before = std::mem::replace(&mut self.failures, self.blame.failures());
        self.silent = if before == self.failures { self.silent + 1 } else { 0 };
        self.alone = if others { 0 } else { self.alone + 1 };
        let silent = self.silent >= if others { SILENT_AMONG_OTHERS } else { SILENT_ALONE };
        if silent || self.alone >= MOST_ALONE { Verdict::Request } else { Verdict::Open }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::outage::{Outage, REQUESTS, Sign};

    const SIGN: Sign = Sign::Status(502);

    /// How long the doubt about the first of `lines` failures lasts, one each `gap`, and how it ends.
    fn ends(lines: u32, gap: Duration, others: impl Fn(u32) -> bool) -> (Duration, Verdict) {
        let start = Instant::now();
        let mut outage = Outage::default();
        let (_, blame) = outage.failed(SIGN, 0, start, start);
        let mut doubt = Doubt::new(blame, None, start);
        let (mut failed, mut now) = (1, start);
        loop {
            now += Duration::from_millis(100);
            while failed < lines && start + gap * failed <= now {
                outage.failed(SIGN, u64::from(failed), now, now);
                failed += 1;
            }
            match doubt.look(others(failed), now) {
                Verdict::Open => {}
                verdict => return (now - start, verdict),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn few_lines_that_fail_end_soon() {
        for lines in 1..u32::try_from(REQUESTS).unwrap() {
            let (after, verdict) = ends(lines, Duration::ZERO, |_| false);
            assert!(verdict == Verdict::Request && after <= Duration::from_millis(1_500), "{lines}: {after:?}");
        }
        let (after, verdict) = ends(3, Duration::from_secs(60), |_| true);
        assert_eq!((after, verdict), (Duration::from_secs(10), Verdict::Request), "others that say nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn while_the_worker_fails_others_the_doubt_lasts_until_the_verdict() {
        let (after, verdict) = ends(8, Duration::from_secs(9), |_| true);
        assert_eq!((after, verdict), (Duration::from_secs(63), Verdict::Worker), "however slowly it fails them");
        let (_, verdict) = ends(8, Duration::from_millis(900), |_| false);
        assert_eq!(verdict, Verdict::Worker, "lines of other batches tell too");
        let (after, verdict) = ends(7, Duration::from_secs(9), |failed| failed < 7);
        assert!(verdict == Verdict::Request && after <= Duration::from_millis(55_500), "{after:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_machine_that_stands_still_hears_the_others_first() {
        let now = Instant::now();
        let mut outage = Outage::default();
        let (_, blame) = outage.failed(SIGN, 0, now, now);
        let mut doubt = Doubt::new(blame.clone(), None, now);
        let late = now + Duration::from_secs(3_600);
        assert_eq!(doubt.look(true, late), Verdict::Open, "an hour in one turn");
        assert_eq!(doubt.look(true, late), Verdict::Open);
        let mut doubt = Doubt::new(blame, None, now);
        outage.succeeded(now);
        assert_eq!(doubt.look(true, now), Verdict::Request, "a success elsewhere tells at once");
    }
}
