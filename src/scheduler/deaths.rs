//! Finds the line that may be what kills workers. Pure.
//!
//! When a worker dies, every request that it had is lost, though at most one of them killed it; as a rule none did, and
//! somebody has restarted it. What tells them apart is what becomes of the neighbours: a line that was there at two deaths
//! whose other lines have been answered since is a suspect, and so is one that was there at three.
//!
//! Suspects are sent apart from all others, but together: as many at a time as half of those that were lost. If the
//! worker dies of that, half as many are sent next time, until one is left alone. That one ends in the error file if its
//! worker dies again, provided that other requests have been answered since it was lost last: else it is the worker that
//! answers nobody.

use std::time::Duration;

use smallvec::SmallVec;
use tokio::time::Instant;

use crate::fleet::WorkerKey;

/// Lines that a worker loses within this time are lost in one death.
const TOGETHER: Duration = Duration::from_secs(1);
/// Deaths that make a suspect if lines that were there too have been answered since; and if none has.
const WITH_SURVIVORS: usize = 2;
const WITHOUT_SURVIVORS: usize = 3;
/// The most deaths remembered for a line.
const REMEMBERED: usize = 8;
/// Suspects are apart from others for so much longer than the longest of them lived before, and a moment more.
const LIVES_ON: (u32, u32) = (5, 4);
const MOMENT: Duration = Duration::from_secs(1);

/// Identifies a death.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeathId(u32);

#[derive(Clone, Copy, Debug)]
struct Death {
    worker: WorkerKey,
    at: Instant,
    lost: u32,
    survivors: u32,
}

/// The deaths of workers in which lines of a segment were lost.
#[derive(Debug, Default)]
pub struct Deaths {
    all: Vec<Death>,
}

impl Deaths {
    /// Records that a worker lost a line.
    pub fn note(&mut self, worker: WorkerKey, now: Instant) -> DeathId {
        let one = self.all.iter().rposition(|death| death.worker == worker && now < death.at + TOGETHER);
        let at = one.unwrap_or_else(|| {
            self.all.push(Death { worker, at: now, lost: 0, survivors: 0 });
            self.all.len() - 1
        });
        self.all[at].lost += 1;
        DeathId(u32::try_from(at).unwrap_or(u32::MAX))
    }

    fn get(&mut self, id: DeathId) -> Option<&mut Death> {
        self.all.get_mut(id.0 as usize)
    }
}

/// A line's history of deaths.
#[derive(Clone, Debug, Default)]
pub struct Losses {
    deaths: SmallVec<[DeathId; 2]>,
    /// The number of suspects that may be sent together with it, counting itself; 0: any.
    company: u32,
    /// The longest time that it was at a worker that died.
    lived: Duration,
    /// Requests answered by all workers when it was lost last.
    answers: u64,
}

/// The circumstances of a loss.
#[derive(Clone, Copy, Debug)]
pub struct Lost {
    /// The worker that died.
    pub worker: WorkerKey,
    /// The time of the loss.
    pub now: Instant,
    /// How long the line had been there.
    pub lived: Duration,
    /// The number of lines that were apart from others there, counting itself; 0: it was among others.
    pub apart: u32,
    /// Requests answered by all workers so far.
    pub answers: u64,
}

impl Losses {
    /// The number of lines that may be sent together with it, counting itself; 0: any.
    #[must_use]
    pub fn company(&self) -> u32 {
        self.company
    }

    /// How long it should be kept apart from others.
    #[must_use]
    pub fn apart_for(&self) -> Duration {
        self.lived * LIVES_ON.0 / LIVES_ON.1 + MOMENT
    }

    /// Records a death. Returns whether the worker probably died of this line: it was alone, and others have been
    /// answered since its previous loss.
    pub fn lose(&mut self, deaths: &mut Deaths, lost: Lost) -> bool {
        let id = deaths.note(lost.worker, lost.now);
        if !self.deaths.contains(&id) {
            if self.deaths.len() == REMEMBERED {
                self.deaths.remove(0);
            }
            self.deaths.push(id);
        }
        self.lived = self.lived.max(lost.lived);
        let others_live = lost.answers > std::mem::replace(&mut self.answers, lost.answers);
        if lost.apart > 0 {
            self.company = (lost.apart / 2).max(1);
        }
        lost.apart == 1 && others_live
    }

    /// Updates, before it is sent again, whether it is a suspect.
    pub fn suspect(&mut self, deaths: &mut Deaths) {
        if self.company > 0 {
            return;
        }
        let Some(last) = self.deaths.last().copied() else { return };
        let survived =
            self.deaths.iter().filter(|id| deaths.get(**id).is_some_and(|death| death.survivors > 0)).count();
        if survived >= WITH_SURVIVORS || self.deaths.len() >= WITHOUT_SURVIVORS {
            let lost = deaths.get(last).map_or(1, |death| death.lost);
            self.company = lost.div_ceil(2).max(1);
        }
    }

    /// Records that it was answered, or failed without harm to its worker: it is no longer a suspect.
    pub fn acquit(&mut self, deaths: &mut Deaths) {
        for id in std::mem::take(&mut self.deaths) {
            if let Some(death) = deaths.get(id) {
                death.survivors += 1;
            }
        }
        self.company = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lost(worker: u32, now: Instant, apart: u32, answers: u64) -> Lost {
        Lost { worker: WorkerKey(worker), now, lived: Duration::from_secs(2), apart, answers }
    }

    #[tokio::test(start_paused = true)]
    async fn two_deaths_whose_lines_nobody_has_answered_yet_make_no_suspect_and_three_do() {
        let (mut deaths, mut lines) = (Deaths::default(), vec![Losses::default(); 64]);
        let mut now = Instant::now();
        for round in 1..=3 {
            for line in &mut lines {
                assert!(!line.lose(&mut deaths, lost(1, now, 0, 0)));
                now += Duration::from_millis(1);
            }
            lines.iter_mut().for_each(|line| line.suspect(&mut deaths));
            let company = if round < 3 { 0 } else { 32 };
            assert!(lines.iter().all(|line| line.company() == company), "after {round} deaths");
            now += Duration::from_secs(2);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_there_at_two_deaths_that_others_survived_is_a_suspect() {
        let (mut deaths, mut now) = (Deaths::default(), Instant::now());
        let [mut poison, mut a, mut b] = [(); 3].map(|()| Losses::default());
        poison.lose(&mut deaths, lost(1, now, 0, 0));
        a.lose(&mut deaths, lost(1, now, 0, 0));
        now += Duration::from_secs(9);
        poison.lose(&mut deaths, lost(2, now, 0, 0));
        b.lose(&mut deaths, lost(2, now, 0, 0));
        poison.suspect(&mut deaths);
        assert_eq!(poison.company(), 0);
        a.acquit(&mut deaths);
        poison.suspect(&mut deaths);
        assert_eq!(poison.company(), 0, "one death may be chance");
        b.acquit(&mut deaths);
        poison.suspect(&mut deaths);
        assert_eq!(poison.company(), 1, "half of the two that were lost there");
        assert_eq!(poison.apart_for(), Duration::from_millis(3_500));
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_alone_is_to_blame_only_if_others_are_answered() {
        let (mut deaths, mut line, now) = (Deaths::default(), Losses::default(), Instant::now());
        let mut at = |seconds, apart, answers| {
            line.lose(&mut deaths, lost(1, now + Duration::from_secs(seconds), apart, answers))
        };
        assert!(!at(0, 2, 5), "not alone");
        assert!(!at(10, 1, 5), "nobody else was answered since");
        assert!(at(20, 1, 6));
        assert!(!at(30, 1, 6) && at(40, 1, 7));
    }

    proptest! {
        /// Workers die of one line out of many: it is found, after as many deaths as halving takes, and only it is.
        #[test]
        fn the_one_that_kills_is_found_by_halving(count in 2u32..200, poison in 0u32..200, pick in any::<u64>()) {
            let poison = poison % count;
            let (mut deaths, mut now) = (Deaths::default(), Instant::now());
            let mut open: Vec<(u32, Losses)> = (0..count).map(|at| (at, Losses::default())).collect();
            let (mut answers, mut blamed, mut died) = (0, 0, 0);
            while !open.is_empty() {
                now += Duration::from_secs(5);
                open.iter_mut().for_each(|(_, line)| line.suspect(&mut deaths));
                let least = open.iter().map(|(_, line)| line.company()).min().unwrap();
                let most = if least == 0 { count } else { least };
                // Any of those that may be sent together.
                let rotated = usize::try_from(pick).unwrap_or(0) % open.len();
                open.rotate_left(rotated);
                let mut group: Vec<usize> = (0..open.len()).filter(|at| open[*at].1.company() == least).collect();
                group.truncate(most as usize);
                let apart = if least == 0 { 0 } else { group.len() as u32 };
                if group.iter().any(|at| open[*at].0 == poison) {
                    died += 1;
                    for at in &group {
                        let to_blame = open[*at].1.lose(&mut deaths, lost(1, now, apart, answers));
                        prop_assert!(!to_blame || open[*at].0 == poison);
                        blamed += u32::from(to_blame);
                    }
                    if blamed == 2 {
                        open.retain(|(at, _)| *at != poison);
                    }
                    // Others are answered meanwhile.
                    answers += 1;
                } else {
                    answers += 1;
                    for at in group.into_iter().rev() {
                        let (_, mut line) = open.remove(at);
                        line.acquit(&mut deaths);
                    }
                }
                prop_assert!(died <= 3 + 8 + 2, "{died} deaths for {count} lines");
            }
            prop_assert_eq!(blamed, 2);
        }
    }
}
