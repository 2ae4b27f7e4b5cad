//! Decides in which order the lines of a segment are sent, and which go to which worker. Pure.
//!
//! A worker keeps the beginnings of prompts that it has read for a while, and reads none of them twice (vLLM's prefix
//! cache). Lines that begin alike are therefore sent one after the other, and to the same worker. Where lines begin alike is
//! seen from their bytes: a system prompt comes first, and one client writes it in one way.
//!
//! Within that, lines that may take long go first: what is still running when the others are done should be short. Lines
//! that share nothing and may take equally long stay in the order of the file.

use std::{collections::VecDeque, hash::BuildHasher};

use smallvec::SmallVec;

/// Lines with this many leading bytes in common are alike: about 64 tokens, four blocks of a GPU's cache.
const ALIKE: usize = 256;
/// The most leading bytes of a line that are compared.
const COMPARED: usize = 16 * 1024;

/// Identifies a line by its index in the work list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LineKey(pub(super) u32);

#[cfg(test)]
impl LineKey {
    pub(super) fn at(place: u32) -> Self {
        Self(place)
    }

    pub(super) fn place(self) -> u32 {
        self.0
    }
}

/// The facts about a line that has not been sent.
#[derive(Clone, Copy, Debug)]
pub struct Sketch<'a> {
    pub key: LineKey,
    /// What the model reads, as JSON.
    pub prompt: &'a [u8],
    /// The most tokens of the answer. `None`: not limited.
    pub max_tokens: Option<u32>,
}

impl<'a> Sketch<'a> {
    fn leading(&self) -> &'a [u8] {
        &self.prompt[..self.prompt.len().min(COMPARED)]
    }

    /// Its length class: answers that differ by less than a factor of two are equally long.
    fn class(&self) -> u32 {
        self.max_tokens.map_or(u32::BITS, |tokens| tokens.max(1).ilog2())
    }
}

/// Lines that are sent one after the other.
#[derive(Clone, Debug)]
struct PrefixGroup {
    /// The hash of their common beginning. `None`: they have none.
    fingerprint: Option<u64>,
    lines: VecDeque<LineKey>,
}

/// The lines of a lane that are ready to be sent.
#[derive(Clone, Debug, Default)]
pub struct Ready {
    /// Lines that were sent before, which go first.
    again: VecDeque<LineKey>,
    runs: Vec<PrefixGroup>,
    /// All runs before it are empty.
    first: usize,
    /// The run that each worker is at.
    at: SmallVec<[(u64, usize); 4]>,
    fresh: usize,
}

impl Ready {
    /// Arranges lines, given in the order of the file, in the order of sending.
    #[must_use]
    pub fn plan(lines: &[Sketch<'_>]) -> Self {
        let mut order: Vec<usize> = (0..lines.len()).collect();
        order.sort_by(|a, b| lines[*a].leading().cmp(lines[*b].leading()).then(a.cmp(b)));
        let alike = |a: usize, b: usize| {
            let (a, b) = (lines[a].leading(), lines[b].leading());
            a.len() >= ALIKE && b.len() >= ALIKE && a[..ALIKE] == b[..ALIKE]
        };
        let mut groups: Vec<&[usize]> = order.chunk_by(|a, b| alike(*a, *b)).collect();
        groups.sort_by_key(|group| {
            let longest = group.iter().map(|at| lines[*at].class()).max().unwrap_or_default();
            (std::cmp::Reverse(longest), group.iter().copied().min())
        });
        let mut ready = Self { fresh: lines.len(), ..Self::default() };
        for group in groups {
            let keys = group.iter().map(|at| lines[*at].key);
            match (group, ready.runs.last_mut()) {
                ([_], Some(PrefixGroup { fingerprint: None, lines })) => lines.extend(keys),
                ([_], _) => ready.runs.push(PrefixGroup { fingerprint: None, lines: keys.collect() }),
                ([one, ..], _) => {
                    let fingerprint = Some(fingerprint(&lines[*one].leading()[..ALIKE]));
                    ready.runs.push(PrefixGroup { fingerprint, lines: keys.collect() });
                }
                ([], _) => {}
            }
        }
        ready
    }

    /// The number of lines.
    #[must_use]
    pub fn count(&self) -> usize {
        self.again.len() + self.fresh
    }

    /// Adds a line that was sent before. It goes before lines that were not, and after others that were.
    pub fn again(&mut self, key: LineKey) {
        self.again.push_back(key);
    }

    /// Takes the lines that were sent before for which `picks` returns true.
    pub fn take_again(&mut self, mut picks: impl FnMut(LineKey) -> bool) -> Vec<LineKey> {
        let mut taken = Vec::new();
        self.again.retain(|key| {
            let pick = picks(*key);
            if pick {
                taken.push(*key);
            }
            !pick
        });
        taken
    }

    /// The lines that were sent before.
    pub fn sent_before(&self) -> impl Iterator<Item = LineKey> + '_ {
        self.again.iter().copied()
    }

    /// The next line.
    #[must_use]
    pub fn peek(&self) -> Option<LineKey> {
        self.again.front().or_else(|| self.runs[self.first..].iter().find_map(|run| run.lines.front())).copied()
    }

    /// Takes the next line.
    pub fn take(&mut self) -> Option<LineKey> {
        self.again.pop_front().or_else(|| {
            let at = (self.first..self.runs.len()).find(|at| !self.runs[*at].lines.is_empty())?;
            self.take_from(at)
        })
    }

    /// Takes the line that is best sent to this worker: one that was sent before and may go there, else the next one like
    /// those that went there last, else one of those that no other worker is at. `workers` are all that may be sent to.
    /// `fits` says whether a line that was sent before may go there.
    pub fn take_for(&mut self, worker: u64, workers: &[u64], fits: impl Fn(LineKey) -> bool) -> Option<LineKey> {
        if let Some(key) = self.again.front().copied()
            && (self.fresh == 0 || fits(key))
        {
            return self.again.pop_front();
        }
        if workers.len() < 2 {
            return self.take();
        }
        self.at.retain(|(_, run)| !self.runs[*run].lines.is_empty());
        let mine = self.at.iter().find(|(other, _)| *other == worker).map(|(_, run)| *run);
        let run = match mine {
            Some(run) => run,
            None => {
                let run = self.next_run(worker, workers)?;
                // Lines that have nothing in common are anybody's.
                if self.runs[run].fingerprint.is_some() {
                    self.at.push((worker, run));
                }
                run
            }
        };
        self.take_from(run)
    }

    /// Takes the last of the lines that were not sent before, or one that was if there is no other.
    pub fn take_last(&mut self) -> Option<LineKey> {
        let last = (self.first..self.runs.len()).rev().find(|at| !self.runs[*at].lines.is_empty());
        let Some(at) = last else { return self.again.pop_front() };
        let key = self.runs[at].lines.pop_back();
        self.took_one();
        key
    }

    fn next_run(&self, worker: u64, workers: &[u64]) -> Option<usize> {
        let open = |at: &usize| !self.runs[*at].lines.is_empty();
        let untaken = |at: &usize| open(at) && self.at.iter().all(|(_, run)| run != at);
        let home = |at: &usize| self.runs[*at].fingerprint.is_none_or(|print| home(print, workers) == Some(worker));
        // No worker stays idle for the sake of another one's cache: if nothing else is left, it helps with the longest
        // run.
        (self.first..self.runs.len())
            .find(|at| untaken(at) && home(at))
            .or_else(|| (self.first..self.runs.len()).find(untaken))
            .or_else(|| (self.first..self.runs.len()).filter(open).max_by_key(|at| self.runs[*at].lines.len()))
    }

    fn take_from(&mut self, at: usize) -> Option<LineKey> {
        let key = self.runs[at].lines.pop_front()?;
        self.took_one();
        Some(key)
    }

    fn took_one(&mut self) {
        self.fresh -= 1;
        while self.runs.get(self.first).is_some_and(|run| run.lines.is_empty()) {
            self.first += 1;
        }
    }
}

/// Which of the workers lines of that beginning are best sent to, whichever segment or server they are in: rendezvous
/// hashing (Thaler and Ravishankar, 1998). A worker that comes or goes moves no others' share.
fn home(print: u64, workers: &[u64]) -> Option<u64> {
    workers.iter().copied().max_by_key(|worker| fingerprint(&(print ^ worker.rotate_left(32)).to_le_bytes()))
}

/// A hash that is equal on all servers of one version.
fn fingerprint(bytes: &[u8]) -> u64 {
    foldhash::quality::FixedState::default().hash_one(bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn system(name: &str) -> String {
        format!(r#"[{{"role":"system","content":"{} {}"}},"#, name, "be kind and brief. ".repeat(20))
    }

    fn ready(lines: &[(String, Option<u32>)]) -> Ready {
        let sketches: Vec<Sketch<'_>> = (0u32..)
            .zip(lines)
            .map(|(at, (prompt, max_tokens))| Sketch {
                key: LineKey::at(at),
                prompt: prompt.as_bytes(),
                max_tokens: *max_tokens,
            })
            .collect();
        Ready::plan(&sketches)
    }

    fn places(mut ready: Ready) -> Vec<u32> {
        std::iter::from_fn(|| ready.take()).map(LineKey::place).collect()
    }

    #[test]
    fn lines_that_begin_alike_go_together_and_the_others_stay_in_order() {
        let (a, b) = (system("a"), system("b"));
        let lines: Vec<_> =
            [("x", &b), ("9", &a), ("short", &String::new()), ("y", &b), ("1", &a), ("tiny", &String::new())]
                .into_iter()
                .map(|(user, system)| (format!("{system}{user}"), Some(16)))
                .collect();
        assert_eq!(places(ready(&lines)), [0, 3, 4, 1, 2, 5]);
        let alone: Vec<_> = (0..50).map(|at| (format!("{} {}", 97 * at % 50, system("c")), None)).collect();
        assert_eq!(places(ready(&alone)), (0..50).collect::<Vec<_>>(), "nothing in common: as in the file");
    }

    #[test]
    fn what_may_take_long_goes_first_but_tears_no_group() {
        let a = system("a");
        let lines = [
            ("p".to_owned(), Some(16)),
            (format!("{a}1"), Some(16)),
            ("q".to_owned(), Some(4_000)),
            (format!("{a}2"), Some(900)),
            ("r".to_owned(), Some(30)),
            ("s".to_owned(), None),
        ];
        assert_eq!(places(ready(&lines)), [5, 2, 1, 3, 0, 4]);
    }

    #[test]
    fn the_last_line_is_one_that_was_not_sent_before() {
        let mut ready = ready(&[("a".to_owned(), None), ("b".to_owned(), None), ("c".to_owned(), None)]);
        let a = ready.take().unwrap();
        ready.again(a);
        let order: Vec<u32> = std::iter::from_fn(|| ready.take_last()).map(LineKey::place).collect();
        assert_eq!((order, ready.count()), (vec![2, 1, 0], 0));
    }

    #[test]
    fn a_line_that_was_sent_before_goes_first_where_it_may() {
        let mut ready = ready(&[("a".to_owned(), None), ("b".to_owned(), None)]);
        let a = ready.take().unwrap();
        ready.again(a);
        assert_eq!((ready.count(), ready.peek()), (2, Some(a)));
        let b = ready.take_for(7, &[7, 8], |_| false).unwrap();
        assert_ne!(b, a, "it failed on that worker");
        assert_eq!(ready.take_for(7, &[7, 8], |_| false), Some(a), "but nothing else is left");
        assert!(ready.count() == 0 && ready.take_for(7, &[7], |_| true).is_none());
    }

    #[test]
    fn a_group_goes_to_one_worker_and_the_same_one_in_every_segment() {
        let lines = |salt: &str| -> Vec<_> {
            (0..400).map(|at| (format!("{}{salt}{at}", system(&format!("s{}", at % 40))), Some(16))).collect()
        };
        let workers = [11, 22, 33, 44];
        // Workers take turns, as slots become free.
        let sent = |salt: &str| {
            let lines = lines(salt);
            let mut ready = ready(&lines);
            let mut to: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
            for turn in 0.. {
                let worker = workers[turn % workers.len()];
                let Some(key) = ready.take_for(worker, &workers, |_| true) else { break };
                to.entry(key.place() as usize % 40).or_default().push(worker);
            }
            to
        };
        let main = |to: &[u64]| *workers.iter().max_by_key(|w| to.iter().filter(|other| other == w).count()).unwrap();
        let (first, second) = (sent("x"), sent("y"));
        let whole = first.values().filter(|to| to.iter().all(|worker| *worker == to[0])).count();
        assert!(whole >= 32, "{whole} of 40 groups went to one worker");
        let same = first.iter().filter(|(group, to)| main(to) == main(&second[group])).count();
        assert!(same >= 28, "{same} of 40 groups went to the same worker again");
    }

    #[test]
    fn a_small_prefix_cache_is_enough() {
        // 800 requests over 40 prompts in random order; the cache holds 16 prompts, and forgets the one not used for longest.
        let prompt = |at: u64| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) % 40;
        let lines: Vec<_> = (0..800).map(|at| (format!("{}{at}", system(&format!("s{}", prompt(at)))), None)).collect();
        let hits = |order: &mut dyn Iterator<Item = u64>| {
            let mut cache: VecDeque<u64> = VecDeque::new();
            let mut hits = 0;
            for prompt in order.map(prompt) {
                let known = cache.iter().position(|other| *other == prompt);
                hits += usize::from(known.is_some());
                known.map(|at| cache.remove(at));
                cache.push_back(prompt);
                if cache.len() > 16 {
                    cache.pop_front();
                }
            }
            hits
        };
        let in_file = hits(&mut (0..800));
        let planned = hits(&mut places(ready(&lines)).into_iter().map(u64::from));
        assert!(in_file < 480, "{in_file} of 800 as they come");
        assert_eq!(planned, 760, "all but the first of each prompt");
    }

    #[test]
    fn a_worker_that_goes_moves_only_its_own() {
        let prints: Vec<u64> = (0..1_000u64).map(|at| fingerprint(&at.to_le_bytes())).collect();
        let (all, fewer) = ([1, 2, 3, 4], [1, 2, 4]);
        for worker in all {
            let share = prints.iter().filter(|print| home(**print, &all) == Some(worker)).count();
            assert!((180..320).contains(&share), "{share} of 1,000");
        }
        for print in prints {
            let before = home(print, &all);
            assert!(before == Some(3) || home(print, &fewer) == before);
        }
    }

    proptest! {
        /// Every line comes once, whatever the workers, and lines that begin alike come in one piece where there is one worker.
        #[test]
        fn every_line_comes_once(
            lines in prop::collection::vec((0usize..5, 0u32..3, prop::option::of(1u32..5_000)), 0..60),
            workers in prop::collection::vec(0u64..4, 1..80),
            back in prop::collection::vec(any::<bool>(), 80),
        ) {
            let lines: Vec<_> = lines
                .into_iter()
                .map(|(group, user, tokens)| (if group == 0 { format!("{user}") } else { format!("{}{user}", system(&group.to_string())) }, tokens))
                .collect();
            let group = |place: u32| lines[place as usize].0.get(..60).map(str::to_owned);
            let order = places(ready(&lines));
            let groups: Vec<_> = order.iter().filter_map(|place| group(*place)).collect();
            let mut pieces = groups.clone();
            pieces.dedup();
            let distinct: std::collections::BTreeSet<_> = groups.iter().collect();
            prop_assert_eq!(pieces.len(), distinct.len());

            let (mut ready, all) = (ready(&lines), [0, 1, 2, 3]);
            let mut seen = std::collections::BTreeSet::new();
            let mut turn = 0;
            while let Some(key) = ready.take_for(workers[turn % workers.len()], &all, |key| key.place() % 2 == 0) {
                if back[turn % back.len()] && turn < 80 {
                    ready.again(key);
                } else {
                    prop_assert!(seen.insert(key.place()));
                }
                turn += 1;
                prop_assert_eq!(ready.count(), lines.len() - seen.len());
                prop_assert_eq!(ready.peek().is_none(), ready.count() == 0);
            }
            prop_assert_eq!(seen.len(), lines.len());
        }
    }
}
