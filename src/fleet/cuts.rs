//! Tells apart why a worker cuts answers off: because it stops or is put to sleep, or because of what the request asks.
//! Pure.
//!
//! A worker that stops cuts off everything that it has, and is gone for a while. A request that the engine always
//! aborts is cut off alone, while the worker lives on and answers others. What happens after a cut-off says which it was, so
//! its evidence is read when the same request is cut off once more.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

/// Requests that are cut off within this time are cut off together.
const TOGETHER: Duration = Duration::from_secs(1);

/// One cut-off, of one request or of several together. Clones share it.
#[derive(Clone, Debug)]
pub struct Cut {
    shared: Arc<Shared>,
    life: u32,
    lives: Arc<AtomicU32>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Whether more than one request was cut off.
    in_company: AtomicBool,
    /// Whether the worker has answered another request since.
    answered: AtomicBool,
}

impl Cut {
    /// The evidence against a request is enough when it adds up to this. It takes five cut-offs before the last one if
    /// the request was alone and others were answered since, ten if only one of that is so, and twenty if neither is.
    pub const ENOUGH: u32 = 20;

    /// How much it says against a request that was cut off, and has been cut off again now. Nothing if the worker was
    /// away since, because then it has cut everything off.
    #[must_use]
    pub fn evidence(&self) -> u32 {
        if self.lives.load(Ordering::Acquire) != self.life {
            return 0;
        }
        match (self.shared.in_company.load(Ordering::Acquire), self.shared.answered.load(Ordering::Acquire)) {
            (false, true) => 4,
            (false, false) | (true, true) => 2,
            (true, false) => 1,
        }
    }
}

/// The cut-offs of one worker.
#[derive(Debug, Default)]
pub(super) struct Cuts {
    /// How often the worker was away.
    lives: Arc<AtomicU32>,
    /// The newest one: its first request, and when that was cut off.
    newest: Option<(Instant, u64, Cut)>,
    /// Whether the newest one has had an answer after it.
    answered: bool,
}

impl Cuts {
    /// A request was cut off. `request` identifies it over all its tries.
    pub(super) fn cut_off(&mut self, request: u64, now: Instant) -> Cut {
        if let Some((at, first, cut)) = &self.newest
            && now < *at + TOGETHER
            && cut.life == self.lives.load(Ordering::Acquire)
        {
            if *first != request {
                cut.shared.in_company.store(true, Ordering::Release);
                return cut.clone();
            }
            if !self.answered {
                return cut.clone();
            }
        }
        let life = self.lives.load(Ordering::Acquire);
        let cut = Cut { shared: Arc::default(), life, lives: self.lives.clone() };
        self.newest = Some((now, request, cut.clone()));
        self.answered = false;
        cut
    }

    /// A request was answered.
    pub(super) fn answered(&mut self) {
        if let Some((_, _, cut)) = &self.newest
            && !std::mem::replace(&mut self.answered, true)
        {
            cut.shared.answered.store(true, Ordering::Release);
        }
    }

    /// The worker is away: what it has cut off before, it may have cut off for that.
    pub(super) fn begin_new_life(&mut self) {
        self.lives.fetch_add(1, Ordering::AcqRel);
        self.newest = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const APART: Duration = Duration::from_secs(2);

    /// The evidence against request 0 after so many cut-offs, each followed by what `then` does.
    fn evidence(cut_offs: u32, then: impl Fn(&mut Cuts, Instant)) -> u32 {
        let (mut cuts, mut now, mut sum) = (Cuts::default(), Instant::now(), 0);
        let mut last: Option<Cut> = None;
        for _ in 0..cut_offs {
            let cut = cuts.cut_off(0, now);
            sum += last.replace(cut).map_or(0, |last| last.evidence());
            then(&mut cuts, now);
            now += APART;
        }
        sum
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_cut_off_alone_while_others_are_answered_is_found_soon() {
        let after = |then: fn(&mut Cuts, Instant)| (1..).find(|times| evidence(*times, then) >= Cut::ENOUGH);
        assert_eq!(after(|cuts, _| cuts.answered()), Some(6));
        assert_eq!(after(|_, _| {}), Some(11), "nobody else is there");
        let company = |cuts: &mut Cuts, now| drop(cuts.cut_off(1, now));
        assert_eq!(
            after(|cuts, now| {
                drop(cuts.cut_off(1, now));
                cuts.answered();
            }),
            Some(11)
        );
        assert_eq!(after(company), Some(21));
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_is_restarted_again_and_again_says_nothing_against_a_request() {
        let restarted = |cuts: &mut Cuts, _| {
            cuts.answered();
            cuts.begin_new_life();
            cuts.answered();
        };
        assert_eq!(evidence(1_000, restarted), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn its_own_quick_tries_are_no_company() {
        let now = Instant::now();
        let mut cuts = Cuts::default();
        let first = cuts.cut_off(7, now);
        cuts.answered();
        let second = cuts.cut_off(7, now + TOGETHER / 4);
        assert_eq!((first.evidence(), second.evidence()), (4, 2), "nobody was answered after the second");
        cuts.answered();
        cuts.cut_off(8, now + TOGETHER / 2);
        assert_eq!((first.evidence(), second.evidence()), (4, 2), "the second is in company now");
    }
}
